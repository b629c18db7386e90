"""model files -> report: how well each answers and refuses on texts and a domain that training never saw.

    python -m goldgate.serving.training.judge --model serving/models/smollm2-135m-grounded.toml

Three sources: the half of XQuAD's articles that is kept for judging, our own passages that are kept, and the PostgreSQL
manual (Debian's postgresql-doc-15, another domain; the questions lie in judged/). The passages beside the right one are
the nearest others by embedding, as retrieval would bring them. Models run on vLLM as they are served.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import typer

from goldgate.pipeline.chunk import chunk_document
from goldgate.pipeline.embedder import Embedder, load_embedder
from goldgate.pipeline.errors import GoldgateError, UsageError
from goldgate.pipeline.params import AnswerParams, ChunkParams, EmbedParams, ReadParams
from goldgate.pipeline.read import read_documents
from goldgate.pipeline.schema import Failure, Passage, Principal, Query
from goldgate.pipeline.store import Store, digest_file, json_bytes
from goldgate.serving.abstain import detect_abstention
from goldgate.serving.answer import post_process
from goldgate.serving.generate import Generation, Generator, load_generator
from goldgate.serving.model import build_model, load_model_spec
from goldgate.serving.prompt import Prompt, load_prompt, render
from goldgate.serving.training.examples import load_own, load_xquad
from goldgate.serving.training.packing import fit

JUDGED = Path(__file__).parent / "judged" / "postgresql.jsonl"
MANUAL = Path("/usr/share/doc/postgresql-doc-15/html")
SEED = 20261125

_MARK = re.compile(r"\[(\d+)\]")
T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """One question over given passages. Without facts it must be refused."""

    question: str
    passages: tuple[str, ...]
    facts: tuple[str, ...] = ()
    """What a right answer holds, each `a|b` for alternatives."""
    right: int = 0
    """Number of the passage that answers; 0: none does."""


@dataclass(frozen=True)
class Outcome:
    """What a model made of it."""

    refused: bool
    holds: bool
    cited: int | None
    copied: bool
    failed: bool = False


@dataclass(frozen=True)
class Tally:
    """Counts over one set; `None` where nothing of the kind was asked."""

    asked: int
    failed: int = 0
    fact_in_answer: int | None = None
    refused: int = 0
    right_passage_cited: int | None = None
    copied_word_for_word: int = 0
    examples: tuple[dict[str, str], ...] = field(default=())


class Neighbours:
    """Finds the texts nearest to a question, by the embedder that retrieval uses."""

    def __init__(self, texts: Sequence[str], embedder: Embedder) -> None:
        """Embed `texts` once."""
        self.texts = list(texts)
        self.embedder = embedder
        self.vectors = embedder.embed([fit(text, embedder) for text in texts])

    def nearest(self, question: str, count: int, but: str = "", facts: tuple[str, ...] = ()) -> list[str]:
        """Return the `count` nearest texts other than `but` that do not hold the facts."""
        scores = self.vectors @ self.embedder.embed_queries([question])[0]
        ranked = (self.texts[index] for index in np.argsort(-scores, kind="stable"))
        found = (text for text in ranked if text != but and not (facts and _holds(text, facts)))
        return list(itertools.islice(found, count))


def xquad_sets(data: Path, embedder: Embedder, limit: int) -> Iterator[tuple[str, list[Ask]]]:
    """Yield the right paragraph alone, among three, and three wrong ones, over articles that training never saw."""
    passages = [passage for topic in load_xquad(data, judged=True) for passage in topic.passages]
    near = Neighbours([passage.text for passage in passages], embedder)
    pairs = [(passage, question) for passage in passages for question in passage.questions]
    chosen = _sample(pairs, limit)
    yield "xquad, 1 passage", [Ask(q.text, (p.text,), (q.fact,), 1) for p, q in chosen]
    rng = random.Random(SEED)  # noqa: S311 - an order, not a secret
    three = []
    wrong = []
    for passage, question in chosen:
        others = near.nearest(question.text, 3, passage.text, (question.fact,))
        three.append(_among(question.text, passage.text, others[:2], (question.fact,), rng))
        wrong.append(Ask(question.text, tuple(others)))
    yield "xquad, 3 passages", three
    yield "xquad, 3 wrong passages", wrong


def own_sets(embedder: Embedder, limit: int) -> Iterator[tuple[str, list[Ask]]]:
    """Yield answerable and unanswerable questions over our own kept passages, three each."""
    passages = [passage for topic in load_own(judged=True) for passage in topic.passages]
    near = Neighbours([passage.text for passage in passages], embedder)
    rng = random.Random(SEED)  # noqa: S311 - an order, not a secret
    answerable = _sample([(p, q) for p in passages for q in p.questions], limit)
    three = [_among(q.text, p.text, near.nearest(q.text, 2, p.text), (q.fact,), rng) for p, q in answerable]
    yield "own passages, 3 passages", three
    missed = _sample([(p, q) for p in passages for q in p.unanswerable], limit)
    shown = [_among(q, p.text, near.nearest(q, 2, p.text), (), rng).passages for p, q in missed]
    yield "own passages, near miss", [Ask(q, texts) for (_, q), texts in zip(missed, shown, strict=True)]


def manual_sets(folder: Path, embedder: Embedder, limit: int) -> Iterator[tuple[str, list[Ask]]]:
    """Yield questions about the PostgreSQL manual: right chunk among three, three wrong ones, and unanswerable ones."""
    rows = [json.loads(line) for line in JUDGED.read_text(encoding="utf-8").splitlines() if line.strip()]
    pages = sorted({row["document"] for row in rows if row["document"]})
    documents, _ = read_documents(str(folder), ReadParams(include=tuple(pages)))
    chunks = {
        document.id: chunk_document(document, embedder.tokenizer, ChunkParams(), embedder.max_tokens)
        for document in documents
    }
    near = Neighbours([chunk.text for page in sorted(chunks) for chunk in chunks[page]], embedder)
    rng = random.Random(SEED)  # noqa: S311 - an order, not a secret
    three, wrong, impossible, divided = [], [], [], 0
    for row in _sample(rows, limit):
        question, facts = row["question"], tuple(row["facts"])
        if row["document"] is None:
            impossible.append(Ask(question, tuple(near.nearest(question, 3))))
            continue
        right = [c.text for c in chunks[row["document"]] if _plain(row["quote"]) in _plain(c.text)]
        if not right:
            divided += 1  # the anchor lies in two chunks: no passage answers by itself
            continue
        others = near.nearest(question, 3, right[0], facts)
        three.append(_among(question, right[0], others[:2], facts, rng))
        wrong.append(Ask(question, tuple(others)))
    if divided:
        typer.echo(f"postgresql manual: {divided} questions left out, two chunks share what answers them", err=True)
    yield "postgresql manual, 3 passages", three
    yield "postgresql manual, 3 wrong passages", wrong
    yield "postgresql manual, unanswerable", impossible


def judge(asks: Sequence[Ask], prompt: Prompt, generator: Generator, said: Callable[[int, int], None]) -> Tally:
    """Ask a model and count. An engine failure counts as failed, never as wrong or refused."""
    outcomes: list[Outcome] = []
    examples: list[dict[str, str]] = []
    for start in range(0, len(asks), generator.batch):
        batch = asks[start : start + generator.batch]
        made = generator.generate([render(prompt, _query(ask), _passages(ask)) for ask in batch])
        for ask, generation in zip(batch, made, strict=True):
            text = post_process(generation.text) if isinstance(generation, Generation) else ""
            outcomes.append(outcome(ask, generation if isinstance(generation, Failure) else text))
            examples.append({"question": ask.question, "expected": " & ".join(ask.facts), "answer": text})
        said(start + len(batch), len(asks))
    counted = [one for one in outcomes if not one.failed]
    answered = [one for one in counted if not one.refused]
    has_facts = any(ask.facts for ask in asks)
    return Tally(
        asked=len(outcomes),
        failed=len(outcomes) - len(counted),
        fact_in_answer=sum(one.holds for one in counted) if has_facts else None,
        refused=sum(one.refused for one in counted),
        right_passage_cited=_right_cited(asks, outcomes) if has_facts else None,
        copied_word_for_word=sum(one.copied for one in answered),
        examples=tuple(examples),
    )


def outcome(ask: Ask, said: str | Failure) -> Outcome:
    """Judge one answer: a fact counts only in an answer that does not refuse."""
    if isinstance(said, Failure) or not said:
        return Outcome(refused=False, holds=False, cited=None, copied=False, failed=True)
    refused = detect_abstention(said)
    marks = _MARK.findall(said)
    body = _plain(_MARK.sub("", said))
    return Outcome(
        refused=refused,
        holds=not refused and bool(ask.facts) and _holds(said, ask.facts),
        cited=int(marks[-1]) if marks else None,
        copied=not refused and bool(body) and any(body in _plain(passage) for passage in ask.passages),
    )


def _right_cited(asks: Sequence[Ask], outcomes: Sequence[Outcome]) -> int:
    return sum(one.holds and one.cited == ask.right for ask, one in zip(asks, outcomes, strict=True))


def _among(question: str, right: str, others: Sequence[str], facts: tuple[str, ...], rng: random.Random) -> Ask:
    place = rng.randint(0, len(others))
    passages = (*others[:place], right, *others[place:])
    return Ask(question, passages, facts, place + 1)


def _sample(items: Sequence[T], limit: int) -> list[T]:
    if len(items) <= limit:
        return list(items)
    return [items[index] for index in sorted(random.Random(SEED).sample(range(len(items)), limit))]  # noqa: S311


def _query(ask: Ask) -> Query:
    return Query(question=ask.question, principal=Principal())


def _passages(ask: Ask) -> list[Passage]:
    return [
        Passage(chunk=str(n), document=str(n), start=0, end=len(text), text=text, score=1.0)
        for n, text in enumerate(ask.passages)
    ]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _holds(text: str, facts: Sequence[str]) -> bool:
    plain = f" {_plain(text)} "
    return all(any(f" {_plain(option)} " in plain for option in fact.split("|")) for fact in facts)


# ---------------------------------------------------------------- report


def table(report: dict[str, dict[str, Tally]]) -> str:
    """Return a Markdown table: one line per set, one group of columns per model."""
    names = list(report)
    lines = [
        "| set | questions | " + " | ".join(f"{n}: fact in answer | refused | cited rightly" for n in names) + " |",
        "|---|---|" + "---|---|---|" * len(names),
    ]
    for name in report[names[0]]:
        tallies = [report[model][name] for model in names]
        cells = [cell for tally in tallies for cell in _cells(tally)]
        lines.append(f"| {name} | {tallies[0].asked} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(tally: Tally) -> list[str]:
    measured = tally.asked - tally.failed
    return [
        _share(tally.fact_in_answer, measured),
        _share(tally.refused, measured),
        _share(tally.right_passage_cited, tally.fact_in_answer),
    ]


def _share(part: int | None, whole: int | None) -> str:
    """Return a share with its exact 95 % interval (Clopper-Pearson), in percent."""
    if part is None or not whole:
        return "not measured"
    from scipy.stats import binomtest

    interval = binomtest(part, whole).proportion_ci(method="exact")
    return f"{100 * part / whole:.0f} % ({100 * interval.low:.0f}-{100 * interval.high:.0f})"


def main(
    model: Annotated[list[Path], typer.Option(help="Model file; give it again for a second model to compare.")],
    data: Annotated[Path, typer.Option(help="The shared data.")] = Path("../shared/data"),
    manual: Annotated[Path, typer.Option(help="HTML of the PostgreSQL 15 manual.")] = MANUAL,
    prompt: Annotated[Path, typer.Option(help="Prompt file.")] = Path("serving/prompts/grounded.toml"),
    limit: Annotated[int, typer.Option(help="Most questions of a set; drawn with a fixed seed.")] = 200,
    out: Annotated[Path, typer.Option(help="Report with counts and every answer, outside Git.")] = Path(
        "build/judged.json"
    ),
    store: Annotated[str, typer.Option(help="Store with the models.", envvar="GOLDGATE_STORE")] = ".goldgate",
) -> None:
    """Measure models on what training never saw, and print a table."""
    try:
        if not manual.is_dir():
            raise UsageError(f"{manual} is not there", "the PostgreSQL manual", "apt-get install postgresql-doc-15")
        embedder = load_embedder(EmbedParams())
        sets = dict(
            [*xquad_sets(data, embedder, limit), *own_sets(embedder, limit), *manual_sets(manual, embedder, limit)]
        )
        rules = load_prompt(prompt)
        report: dict[str, dict[str, Tally]] = {}
        for path in model:
            spec = load_model_spec(path)
            generator = load_generator(build_model(spec, Store.open(store)), AnswerParams())
            try:
                report[spec.name] = {
                    name: judge(asks, rules, generator, functools.partial(_say, name)) for name, asks in sets.items()
                }
            finally:
                generator.close()
    except GoldgateError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    named = {name: {key: tally.__dict__ for key, tally in tallies.items()} for name, tallies in report.items()}
    out.write_bytes(json_bytes({"prompt": digest_file(prompt), "limit": limit, "models": named}))
    typer.echo(table(report))


def _say(name: str, done: int, total: int) -> None:
    typer.echo(f"{name}: {done}/{total}", err=True)


if __name__ == "__main__":
    typer.run(main)
