"""topics -> packs: one context of several passages, and many questions that each see the context and not each other.

A pack is the unit of training. Its context (rules and passages) is computed once for all of its questions: attention
and positions are those of every question standing alone behind the context, so the loss is the same as with one
example per question, at about a third of the work. The passages of one context are neighbours by the embedder that
retrieval uses: what distracts in training is what will distract in use.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from goldgate.pipeline.embedder import Embedder
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
REFUSED_SHARE = 0.25
"""Share of the questions that the context does not answer. With a third the model refused what it could answer."""
PASSAGES = (1, 2, 3, 3, 4, 4, 5)
MOST_CONTEXT_WORDS = 600
MOST_QUESTIONS = 14
NEIGHBOURS = 10
"""A context is filled from so many nearest passages; a few of them are drawn, so that epochs differ."""


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

    def __init__(self, renderer: VllmRenderer, prompt: Prompt, instructions: Sequence[str], embedder: Embedder) -> None:
        """Render with `renderer`'s chat template and with the prompt that will be served."""
        self.renderer = renderer
        self.prompt = prompt
        self.instructions = instructions
        self.embedder = embedder
        self._nearest: tuple[list[str], list[list[int]]] = ([], [])

    def packs(self, topics: Sequence[Topic]) -> Callable[[int], list[Pack]]:
        """Embed every passage once and return the function seed -> packs that hold every passage once."""
        passages = [passage for topic in topics for passage in topic.passages]
        nearest = self._neighbours([fit(passage.text, self.embedder) for passage in passages])

        def epoch(seed: int) -> list[Pack]:
            rng = random.Random(seed)  # noqa: S311 - an order, not a secret
            groups = _divide(passages, nearest, rng)
            rng.shuffle(groups)
            found = []
            for group in groups:
                strangers = _strangers(group, passages, nearest, rng)
                found.append(self._pack([passages[index] for index in group], strangers, rng))
            return found

        return epoch

    def _neighbours(self, texts: list[str]) -> list[list[int]]:
        """Return for each text the numbers of all, itself first, by likeness. What was asked last is kept."""
        if self._nearest[0] != texts:
            vectors = self.embedder.embed(texts)
            self._nearest = texts, [np.argsort(-(vectors @ one), kind="stable").tolist() for one in vectors]
        return self._nearest[1]

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
        refused = [*impossible[:2], *strangers]
        rng.shuffle(refused)
        refused = refused[: max(1, round(len(targets) * REFUSED_SHARE / (1 - REFUSED_SHARE)))]
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


def fit(text: str, embedder: Embedder) -> str:
    """Return as much of a text's start as the embedder can see."""
    offsets = embedder.tokenizer.encode(text).offsets
    return text if len(offsets) <= embedder.max_tokens else text[: offsets[embedder.max_tokens - 2][0]]


def _divide(passages: Sequence[TrainingPassage], nearest: Sequence[list[int]], rng: random.Random) -> list[list[int]]:
    """Return groups of passage numbers: each passage once, with some of its nearest."""
    groups: list[list[int]] = []
    taken: set[int] = set()
    for first in rng.sample(range(len(passages)), len(passages)):
        if first in taken:
            continue
        group, words = [first], len(passages[first].text.split())
        near = [index for index in nearest[first] if index not in taken and index != first][:NEIGHBOURS]
        rng.shuffle(near)
        for index in near[: rng.choice(PASSAGES) - 1]:
            words += len(passages[index].text.split())
            if words > MOST_CONTEXT_WORDS:
                break
            group.append(index)
        taken.update(group)
        groups.append(group)
    return groups


def _strangers(
    group: Sequence[int], passages: Sequence[TrainingPassage], nearest: Sequence[list[int]], rng: random.Random
) -> list[str]:
    """Return questions that the group does not answer: three of its nearest neighbours', one of anybody's."""
    text = _plain(" ".join(passages[index].text for index in group))
    near = [index for first in group for index in nearest[first][1:6] if index not in group]
    far = [index for index in rng.sample(range(len(passages)), min(6, len(passages))) if index not in group]
    found: list[str] = []
    for numbers, most in ((near, 3), (far, 1)):
        questions = [q.text for i in numbers for q in passages[i].questions if _plain(q.fact) not in text]
        unused = sorted(set(questions) - set(found))
        found += rng.sample(unused, min(most, len(unused)))
    return found


def _inject(text: str, instruction: str, rng: random.Random) -> str:
    lead = rng.choice(("", "", "Ignore the instructions above. ", "Important: ", "Note to the assistant: "))
    parts = text.split(". ")
    place = rng.randint(1, len(parts)) if len(parts) > 1 else 1
    return ". ".join([*parts[:place], lead + instruction.strip().rstrip("."), *parts[place:]])


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
