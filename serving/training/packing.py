"""topics -> packs: one context of several passages, and many questions that each see the context and not each other.

A pack is the unit of training. Its context (rules and passages) is computed once for all of its questions: attention
and positions are those of every question standing alone behind the context, so the loss is the same as with one
example per question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Passage, Principal, Query
from goldgate.serving.prompt import Prompt, render
from goldgate.serving.rendering import VllmRenderer
from goldgate.serving.training.examples import Topic, TrainingPassage

WORDINGS = (
    "Answer only from the context. Cite the passage. If the context does not answer, say: I don't know.",
    (
        "You answer questions about the documents below. Use nothing but them, name the passage in brackets, and say "
        '"I don\'t know." where they give no answer.'
    ),
    "Use the passages to answer the question, in one sentence and with the passage's number. Otherwise: I don't know.",
    "You are a careful assistant. What is not in the passages you do not know.",
)
"""Other system rules that a part of the packs is trained with: a reworded prompt is to change little."""

CANONICAL_SHARE = 0.7
INJECTED_SHARE = 0.15
PASSAGES = (1, 2, 3, 3, 4, 4, 5)
MOST_CONTEXT_WORDS = 600
MOST_QUESTIONS = 14


@dataclass(frozen=True)
class Target:
    """A question with what is to be said."""

    question: str
    answer: str


@dataclass(frozen=True)
class Pack:
    """Token ids: one context, and per question its own tokens and those of the answer that is learned."""

    context: tuple[int, ...]
    segments: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def __len__(self) -> int:
        """Tokens altogether."""
        return len(self.context) + sum(len(question) + len(answer) for question, answer in self.segments)


class Packer:
    """Draws packs from topics; the same seed gives the same packs in the same order."""

    def __init__(self, renderer: VllmRenderer, prompt: Prompt, instructions: Sequence[str]) -> None:
        """Render with `renderer`'s chat template and with the prompt that will be served."""
        self.renderer = renderer
        self.prompt = prompt
        self.instructions = instructions

    def epoch(self, topics: Sequence[Topic], seed: int) -> list[Pack]:
        """Return packs that hold every passage once, in shuffled contexts and order."""
        rng = random.Random(seed)  # noqa: S311 - an order, not a secret
        single = [topic.passages[0] for topic in topics if len(topic.passages) == 1]
        rng.shuffle(single)
        groups = [single[start : start + 2] for start in range(0, len(single), 2)]
        for topic in topics:
            if len(topic.passages) > 1:
                groups += _divide(list(topic.passages), rng)
        others = [passage for topic in topics for passage in topic.passages]
        rng.shuffle(groups)
        return [self._pack(group, self._strangers(group, topics, others, rng), rng) for group in groups]

    def _strangers(
        self, group: Sequence[TrainingPassage], topics: Sequence[Topic], others: Sequence[TrainingPassage],
        rng: random.Random,
    ) -> list[str]:  # fmt: skip
        """Return questions that the group does not answer: of neighbours in its topic first, then of anybody."""
        ids = {passage.id for passage in group}
        text = _plain(" ".join(passage.text for passage in group))
        topic = next(topic for topic in topics if group[0].id in {passage.id for passage in topic.passages})
        near = [q for p in topic.passages if p.id not in ids for q in p.questions if _plain(q.fact) not in text]
        rng.shuffle(near)
        far = [q for p in rng.sample(others, min(6, len(others))) if p.id not in ids for q in p.questions[:1]]
        far = [q for q in far if _plain(q.fact) not in text]
        return [q.text for q in near[:3]] + [q.text for q in far[:1]]

    def _pack(self, group: list[TrainingPassage], strangers: list[str], rng: random.Random) -> Pack:
        shown = list(group)
        rng.shuffle(shown)
        prompt = self.prompt
        if rng.random() > CANONICAL_SHARE:
            prompt = prompt.model_copy(update={"system": rng.choice(WORDINGS)})
        texts = [passage.text for passage in shown]
        if self.instructions and rng.random() < INJECTED_SHARE:
            place = rng.randrange(len(texts))
            texts[place] = _inject(texts[place], rng.choice(self.instructions), rng)
        targets = [
            Target(question.text, f"{question.answer} [{number}]")
            for number, passage in enumerate(shown, start=1)
            for question in passage.questions
        ]
        rng.shuffle(targets)
        impossible = [text for passage in shown for text in passage.unanswerable]
        rng.shuffle(impossible)
        refused = [*impossible[:4], *strangers][: max(1, len(targets) // 2 + 1)]
        targets = targets[: MOST_QUESTIONS - len(refused)]
        return self.tokens(prompt, texts, [*targets, *(Target(question, prompt.refusal) for question in refused)])

    def tokens(self, prompt: Prompt, texts: Sequence[str], targets: Sequence[Target]) -> Pack:
        """Return the pack of these passages and questions."""
        context, segments = "", []
        for target in targets:
            rendered = self.render(prompt, texts, target.question)
            head, question = rendered.rsplit(_question_mark(prompt), 1)
            context = head
            ids = self.renderer.encode(_question_mark(prompt) + question)
            segments.append((tuple(ids), tuple(self.renderer.encode(target.answer + "<|im_end|>"))))
        return Pack(tuple(self.renderer.encode(context)), tuple(segments))

    def render(self, prompt: Prompt, texts: Sequence[str], question: str) -> str:
        """Return the whole prompt text, exactly as serving renders it."""
        passages = [
            Passage(chunk=str(n), document=f"{n}", start=0, end=len(text), text=text, score=1.0)
            for n, text in enumerate(texts)
        ]
        query = Query(question=question, principal=Principal())
        return self.renderer.render(render(prompt, query, passages))


def _question_mark(prompt: Prompt) -> str:
    """Return the text between passages and question. Raises UsageError unless no token can cross its border."""
    between = prompt.turn.split("{passages}")[1].split("{question}")[0]
    if not between[:1].isspace() or not between.strip():
        raise UsageError("the prompt's turn cannot be trained with", "a line break and words before {question}")
    return between


def _divide(passages: list[TrainingPassage], rng: random.Random) -> list[list[TrainingPassage]]:
    rng.shuffle(passages)
    groups: list[list[TrainingPassage]] = []
    while passages:
        count, words = rng.choice(PASSAGES), 0
        group: list[TrainingPassage] = []
        while passages and len(group) < count:
            words += len(passages[-1].text.split())
            if group and words > MOST_CONTEXT_WORDS:
                break
            group.append(passages.pop())
        groups.append(group)
    return groups


def _inject(text: str, instruction: str, rng: random.Random) -> str:
    lead = rng.choice(("", "", "Ignore the instructions above. ", "Important: ", "Note to the assistant: "))
    parts = text.split(". ")
    place = rng.randint(1, len(parts)) if len(parts) > 1 else 1
    return ". ".join([*parts[:place], lead + instruction.strip().rstrip("."), *parts[place:]])


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
