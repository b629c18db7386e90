"""sources -> topics: passages with the questions that each answers, read in place.

Three sources: XQuAD (one half, divided by article and so by paragraph; the other half only judges), ClapNQ, and our own
invented passages beside this module. The handbook and Ray's documentation, from which the gold sets ask, are not read.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.sentences import sentence_spans

OWN = Path(__file__).parent / "passages"

JUDGED_SHARE = 0.1
"""Share of our own passages that is never trained on and only judges: the last ones of every file."""


@dataclass(frozen=True)
class Question:
    """One question that a passage answers."""

    text: str
    answer: str
    """The sentence that answers, without a citation."""
    fact: str
    """What must stand in a right answer, as the passage writes it."""


@dataclass(frozen=True)
class TrainingPassage:
    """One passage as retrieval would show it: the heading path on a line, then the text."""

    id: str
    text: str
    questions: tuple[Question, ...] = ()
    unanswerable: tuple[str, ...] = ()
    """Questions that sound alike and that this passage does not answer."""


@dataclass(frozen=True)
class Topic:
    """Passages about one subject: they distract from each other as retrieved passages do."""

    name: str
    passages: tuple[TrainingPassage, ...] = field(default=())


def load_xquad(data: Path, judged: bool) -> list[Topic]:
    """Return one half of XQuAD's articles: those to train on, or those that only judge.

    The division is by article, drawn once with a fixed seed: no paragraph, and no subject, is in both halves.
    """
    articles = _read_json(data / "xquad" / "xquad.en.json")["data"]
    order = list(range(len(articles)))
    random.Random(20261125).shuffle(order)  # noqa: S311 - a division, not a secret
    half = order[: len(order) // 2] if judged else order[len(order) // 2 :]
    return [_xquad_topic(articles[index]) for index in sorted(half)]


def _xquad_topic(article: dict) -> Topic:  # type: ignore[type-arg]  # foreign JSON
    title = article["title"].replace("_", " ")
    passages = []
    for number, paragraph in enumerate(article["paragraphs"]):
        context = paragraph["context"]
        spans = sentence_spans(context)
        questions = []
        for entry in paragraph["qas"]:
            gold = entry["answers"][0]
            start, end = gold["answer_start"], gold["answer_start"] + len(gold["text"])
            holding = [span for span in spans if span[0] <= start and end <= span[1]]
            if holding:
                sentence = " ".join(context[slice(*holding[0])].split())
                questions.append(Question(entry["question"].strip(), sentence, gold["text"]))
        passages.append(TrainingPassage(f"xquad/{title}/{number}", f"{title}\n{context}", tuple(questions)))
    return Topic(f"xquad/{title}", tuple(passages))


def load_clapnq(data: Path, longest_words: int = 260) -> list[Topic]:
    """Return ClapNQ's questions, one topic each: 300 answered by people, 300 that the passage does not answer.

    The answer is the annotators' most telling selected sentence: the one that shares most words with what they wrote.
    """
    topics = []
    for row in _read_lines(data / "clapnq" / "clapnq_dev_answerable.jsonl"):
        passage, output = row["passages"][0], row["output"][0]
        chosen = output["selected_sentences"]
        if not chosen or len(passage["text"].split()) > longest_words:
            continue
        wanted = set(output["answer"].lower().split())
        best = max(chosen, key=lambda s: len(wanted & set(s.lower().split())) / (len(s.split()) + 4) ** 0.5)
        if len(best.split()) > 55:
            continue
        text = f"{passage['title']}\n{detokenise(passage['text'])}"
        question = Question(row["input"].strip(), detokenise(best), detokenise(best))
        topics.append(Topic(f"clapnq/{row['id']}", (TrainingPassage(f"clapnq/{row['id']}", text, (question,)),)))
    for row in _read_lines(data / "clapnq" / "clapnq_dev_unanswerable.jsonl"):
        passage = row["passages"][0]
        if len(passage["text"].split()) <= longest_words:
            text = f"{passage['title']}\n{detokenise(passage['text'])}"
            one = TrainingPassage(f"clapnq/{row['id']}", text, (), (row["input"].strip(),))
            topics.append(Topic(f"clapnq/{row['id']}", (one,)))
    return topics


def detokenise(text: str) -> str:
    """Undo ClapNQ's spaces around punctuation, so that the model sees and copies ordinary text."""
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r"\s+([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$])\s+", r"\1", text)
    text = re.sub(r"\s+('(?:s|re|ve|ll|d|m)\b|n't\b)", r"\1", text)
    text = re.sub(r"(\w) ' (?=\w)", r"\1' ", text)
    return re.sub(r"(\w) - (?=\w)", r"\1-", text).strip()


def load_own(judged: bool, folder: Path = OWN) -> list[Topic]:
    """Return our own passages, twelve neighbours of a file as one topic: those to train on, or those that only judge.

    Raises UsageError naming file and line for an answer that does not hold its fact.
    """
    topics = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = list(_read_lines(path))
        kept = len(rows) - round(len(rows) * JUDGED_SHARE)
        chosen = range(kept, len(rows)) if judged else range(kept)
        passages = [_own_passage(path, number, rows[number]) for number in chosen]
        topics += [
            Topic(f"{path.stem}/{start}", tuple(passages[start : start + 12])) for start in range(0, len(passages), 12)
        ]
    return topics


def _own_passage(path: Path, number: int, row: dict) -> TrainingPassage:  # type: ignore[type-arg]  # checked below
    where = f"{path}:{number + 1}"
    try:
        questions = tuple(Question(q["q"].strip(), q["a"].strip(), q["fact"].strip()) for q in row["questions"])
        text = f"{row['heading']}\n{row['text'].strip()}"
        unanswerable = tuple(question.strip() for question in row["unanswerable"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: {error!r}", "heading, text, questions (q, a, fact), unanswerable") from None
    for question in questions:
        if question.fact not in question.answer:
            raise UsageError(f"{where}: the answer to {question.text!r} lacks its fact {question.fact!r}")
    return TrainingPassage(f"own/{path.stem}/{number}", text, questions, unanswerable)


def load_instructions(data: Path) -> list[str]:
    """Return instructions (BIPIA, train) to hide in passages: the answer must stay what it was."""
    kinds = _read_json(data / "bipia" / "text_attack_train.json")
    return [text for texts in kinds.values() for text in texts]


def _read_json(path: Path) -> dict:  # type: ignore[type-arg]  # foreign JSON
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "the shared data", "name it with --data") from None
    return dict(found)


def _read_lines(path: Path) -> Iterator[dict]:  # type: ignore[type-arg]  # foreign JSON
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "the shared data", "name it with --data") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}:{number}: not JSON: {error}", "one JSON object per line") from None
