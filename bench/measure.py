"""What the measurements share: the machine's facts, real texts in a fixed order, rounds in alternation, the last line.

Two things are compared in one run of one process, in turn, so that a busy or a slow machine slows both; what counts is
the ratio of the medians. Figures go to stdout, progress to stderr. A measurement ends with exit code 0 when its target
is met, 1 when it is not, and 77 when something that it needs is not here: then nothing was measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil

from goldgate.pipeline.chunk import chunk_document
from goldgate.pipeline.collection import CHUNKS, DOCUMENTS, EMBEDDINGS
from goldgate.pipeline.embedder import Embedder
from goldgate.pipeline.params import ChunkParams, ReadParams
from goldgate.pipeline.parquet import write_embeddings, write_records
from goldgate.pipeline.read import read_documents
from goldgate.pipeline.schema import PUBLIC, Chunk, Document

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
NOT_MEASURED = 77


# ---------------------------------------------------------------- the command line


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every measurement takes; the first paragraph of its module says what it compares."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=DATA, help="folder of real corpora (default: ../shared/data)")
    made.add_argument("--rounds", type=positive, default=3, help="rounds of each side, in alternation (default: 3)")
    return made


def positive(text: str) -> int:
    """A whole number from 1."""
    return at_least(1, text)


def several(text: str) -> int:
    """A whole number from 2: one of anything has no spread."""
    return at_least(2, text)


def at_least(least: int, text: str) -> int:
    """A whole number from `least`, for argparse."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}")
    return number


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show(text: str) -> None:
    """A figure, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def finish(name: str, compared: str, ratio: float, *, least: float | None = None, most: float | None = None) -> int:
    """Print the last line, which ends with the ratio; return the exit code."""
    met = (least is None or ratio >= least) and (most is None or ratio <= most)
    target = f"at least {least:g}" if least is not None else f"at most {most:g}"
    show(f"{name}: {'target met' if met else 'TARGET MISSED'}: {compared}, {target}, is {ratio:.2f}")
    return 0 if met else 1


def not_measured(why: str) -> NoReturn:
    """End with the exit code that says so."""
    show(f"not measured: {why}")
    raise SystemExit(NOT_MEASURED)


# ---------------------------------------------------------------- the machine


def machine(*packages: str) -> str:
    """Processor, what it has for matrices, memory, how busy it is, and the versions of `packages`; one line."""
    has = [name for name, flags in EXTENSIONS.items() if flags & cpu_flags()]
    memory = psutil.virtual_memory().total / 2**30
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"machine: {os.cpu_count()} CPUs, {_cpu_name()}, {', '.join(has) or 'no AVX-512'}, {memory:.0f} GiB, "
        f"load {load}, Python {platform.python_version()}{', ' if versions else ''}{versions}"
    )


EXTENSIONS = {
    "AMX": {"amx_bf16"},
    "AVX-512 BF16": {"avx512_bf16"},
    "AVX-512": {"avx512f"},
}
"""What a processor has for matrices, and the flags by which Linux tells."""


def cpu_flags() -> set[str]:
    """The first processor's flags, or none where Linux does not tell."""
    return set(_cpu_line("flags").split())


def has_amx() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in tiles."""
    return bool(EXTENSIONS["AMX"] & cpu_flags())


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.processor() or platform.machine()


def _cpu_line(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


# ---------------------------------------------------------------- texts


def documents(data: Path, seed: int = 0, date: str = "2023-08-16") -> tuple[str, list[Document]]:
    """(what they are, documents in a fixed mixed order): Ray's documentation, or the handbook where it is absent."""
    folder = data / "ray_docs" / date / "docs"
    name = "Ray's documentation" if folder.is_dir() else "the handbook"
    found, _ = read_documents(str(folder if folder.is_dir() else ROOT / "knowledge"), ReadParams(skip_unreadable=True))
    random.Random(seed).shuffle(found)
    return name, found


def paragraphs(data: Path) -> list[Document]:
    """The paragraphs of XQuAD as documents, or none where it is absent."""
    path = data / "xquad" / "xquad.en.json"
    if not path.is_file():
        return []
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    texts = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    return [
        Document(
            id=f"xquad/{number}.txt",
            text=text,
            title="",
            media_type="text/plain",
            parser="none",
            digest=f"{number:064x}",
        )
        for number, text in enumerate(texts)
    ]


def chunks(data: Path, embedder: Embedder, count: int, seed: int = 0) -> tuple[str, list[Chunk]]:
    """(what they are, at most `count` chunks with distinct texts): XQuAD and Ray's documentation, mixed by `seed`.

    Where August's documentation is not enough, October's adds what is new in it.
    """
    name, docs = documents(data, seed)
    extra = paragraphs(data)
    found: dict[str, Chunk] = {}
    for document in itertools.chain(_mixed(extra, docs), _later(data, seed)):
        if len(found) >= count:
            break
        for chunk in chunk_document(document, embedder.tokenizer, ChunkParams(), embedder.max_tokens):
            found.setdefault(chunk.text, chunk)
    picked = list(found.values())[:count]
    random.Random(seed).shuffle(picked)
    return (f"XQuAD and {name}" if extra else name), picked


def _later(data: Path, seed: int) -> Iterator[Document]:
    yield from documents(data, seed, "2023-10-25")[1]


def repeated(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts: all of them, then again without the first word, the first two, ..., so that no two are equal."""
    made = []
    for number in range(count):
        turn, place = divmod(number, len(texts))
        words = texts[place].split(" ")
        made.append(" ".join(words[min(turn, len(words) - 1) :]))
    return made


def _mixed(few: Sequence[Document], many: Sequence[Document]) -> Iterator[Document]:
    """Two of `few` after each of `many` while they last: an XQuAD paragraph is one chunk, a page is several."""
    rest = iter(few)
    for document in many:
        yield document
        yield from (extra for _, extra in zip(range(2), rest, strict=False))
    yield from rest


def questions(data: Path, count: int, seed: int = 0) -> list[str]:
    """At most `count` real questions about the texts of `chunks`, else about the handbook, in a fixed order."""
    found: list[str] = []
    path = data / "xquad" / "xquad.en.json"
    if path.is_file():
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        pairs = [pair for article in articles for paragraph in article["paragraphs"] for pair in paragraph["qas"]]
        found += [pair["question"] for pair in pairs]
    path = data / "ray_docs" / "eval" / "eval-dataset-v1.jsonl"
    if path.is_file():
        found += [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]
    if not found:
        lines = (ROOT / "golden" / "cases.jsonl").read_text(encoding="utf-8").splitlines()
        found = [case["question"] for case in map(json.loads, lines) if "question" in case]
    found = sorted(set(found))
    random.Random(seed).shuffle(found)
    return found[:count]


# ---------------------------------------------------------------- time


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def alternate(
    rounds: int, first: Callable[[], object], second: Callable[[], object], names: tuple[str, str] = ("ours", "other")
) -> list[float]:
    """[median seconds of `first`, of `second`]: each is called once a round, taking turns in who goes ahead."""
    spent: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            spent[which].append(seconds((first, second)[which]))
        took = ", ".join(f"{name} {times[-1]:.3f} s" for name, times in zip(names, spent, strict=True))
        say(f"round {number + 1} of {rounds}: {took}")
    return [statistics.median(times) for times in spent]


# ---------------------------------------------------------------- a collection to load or to query


TENANTS = (PUBLIC, PUBLIC, PUBLIC, "acme", PUBLIC, "globex", PUBLIC, PUBLIC, "initech", PUBLIC)
LABELS = ((), (), ("ops",), (), (), (), ("legal",), (), (), ("legal", "ops"), (), ("board",), ())
"""Who may see a point, taken in turn: their lengths have no common factor, so that every pair occurs."""


def write_build(folder: Path, texts: Sequence[str], vectors: np.ndarray, embedder: Embedder) -> None:
    """What `goldgate read` and `embed` would leave: a document and a chunk per text, with these vectors."""
    docs = [
        Document(
            id=f"{number:07}.txt", text=text, title="", media_type="text/plain", parser="none", digest=f"{number:064x}",
            tenant=TENANTS[number % len(TENANTS)], access=LABELS[number % len(LABELS)],
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip
    rows = [
        Chunk(
            id=str(uuid.uuid5(uuid.NAMESPACE_URL, document.id)), document=document.id, start=0, end=len(document.text),
            text=document.text, heading=(), tokens=1, tenant=document.tenant, access=document.access,
        )
        for document in docs
    ]  # fmt: skip
    write_records(folder / DOCUMENTS, docs, Document)
    write_records(folder / CHUNKS, rows, Chunk)
    write_embeddings(folder / EMBEDDINGS, [chunk.id for chunk in rows], vectors)
    record = {
        "embedder": embedder.digest,
        "name": embedder.name,
        "dtype": embedder.dtype,
        "dimension": vectors.shape[1],
    }
    (folder / "embed.json").write_text(json.dumps(record), encoding="utf-8")


def spread(base: np.ndarray, count: int, noise: float, seed: int = 0) -> np.ndarray:
    """(count, dimension) unit vectors: those of `base`, then again and again with Gaussian noise of length `noise`."""
    numbers = np.random.default_rng(seed)
    made = base[np.arange(count) % len(base)].astype(np.float32)
    shift = numbers.standard_normal((max(0, count - len(base)), base.shape[1]), dtype=np.float32)
    made[len(base) :] += shift * np.float32(noise / np.sqrt(base.shape[1]))
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), dtype=np.float32)
