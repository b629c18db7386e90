"""What Ray Data costs: our stage (chunk, embed) in its steady state against the actor's work in a bare loop.

    .venv/bin/python -m bench.ray_overhead [--calls 4] [--rounds 3]

The stage is what `goldgate embed` runs: documents stream through CPU tasks that chunk them into an actor that embeds
them, and back to the driver. Its start (Ray, workers, loading the model) is left out: the clock runs from the first
result to the last. The bare loop does the actor's work alone, in this process, with as many threads: it embeds the
same chunks in calls of the same size. Chunking is thus in the stage's time and not in the loop's. Target: at least
0.9 of the loop's speed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import documents, finish, machine, not_measured, parser, positive, say, seconds, show
from goldgate.pipeline.chunk import chunk_document
from goldgate.pipeline.embedder import Embedder, load_embedder, use_threads
from goldgate.pipeline.params import ChunkParams, EmbedParams
from goldgate.pipeline.schema import Document
from goldgate.pipeline.stream import TEXTS_PER_CALL, Work, ray_pieces, ray_session

TARGET = 0.9


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parser(__doc__)
    options.add_argument(
        "--calls", type=positive, default=4, help=f"calls of the actor, {TEXTS_PER_CALL} texts each (default: 4)"
    )
    options.add_argument("--model", default="all-MiniLM-L6-v2", help="as [embed] model; hashing only tries the script")
    chosen = options.parse_args(arguments)
    if chosen.calls < 2:
        options.error("--calls must be at least 2: the first result only starts the clock")
    params = EmbedParams(model=chosen.model)
    embedder = load_embedder(params)
    params = params.model_copy(update={"dtype": embedder.dtype})
    use_threads(os.cpu_count() or 1)
    name, picked = _documents(chosen.data, embedder, chosen.calls * TEXTS_PER_CALL)
    work = Work(picked, ChunkParams(), params, embedder, frozenset())
    show(machine("ray", "torch"))
    stage: list[float] = []
    loop: list[float] = []
    texts: list[str] = []
    with ray_session(params.actors):
        for number in range(chosen.rounds):
            say(f"round {number + 1} of {chosen.rounds}: Ray Data starts its actor, then the clock runs")
            spent, counted, texts = _stream(work)
            if not counted:
                not_measured("the stage gave one result only; it takes two to run a clock between them")
            stage.append(counted / spent)
            loop.append(_rate_of_loop(embedder, texts[-counted:]))
            say(f"round {number + 1} of {chosen.rounds}: stage {stage[-1]:.1f}, loop {loop[-1]:.1f} texts/s")
    ours, bare = statistics.median(stage), statistics.median(loop)
    show(
        f"documents: {len(picked)} of {name}, {len(texts)} distinct chunks; {os.cpu_count()} threads; {embedder.dtype}"
    )
    show(f"Ray Data stage, from first result to last: {ours:.1f} texts/s")
    show(f"the actor's work in a bare loop:           {bare:.1f} texts/s")
    return finish("ray_overhead", "texts/s of the Ray Data stage ÷ of the bare loop", ours / bare, least=TARGET)


def _documents(data: Path, embedder: Embedder, count: int) -> tuple[str, list[Document]]:
    """Documents with about `count` distinct chunks."""
    name, found = documents(data)
    texts: set[str] = set()
    for used, document in enumerate(found, 1):
        texts.update(c.text for c in chunk_document(document, embedder.tokenizer, ChunkParams(), embedder.max_tokens))
        if len(texts) >= count:
            return name, found[:used]
    if len(texts) <= TEXTS_PER_CALL:
        not_measured(f"{name} has {len(texts)} chunks; more than {TEXTS_PER_CALL} are needed")
    return name, found


def _stream(work: Work) -> tuple[float, int, list[str]]:
    """Seconds from the first result with vectors to the last, texts embedded between them, and all texts."""
    first = last = 0.0
    counted = 0
    texts: list[str] = []
    for piece in ray_pieces(work, _silent):
        texts += _new_texts(piece.chunks.column("key").to_pylist(), piece.chunks.column("text").to_pylist(), piece.keys)
        last = time.perf_counter()
        if first:
            counted += len(piece.keys)
        first = first or last
    return last - first, counted, texts


def _new_texts(keys: Sequence[str], texts: Sequence[str], new: Sequence[str]) -> list[str]:
    wanted = dict(zip(keys, texts, strict=True))
    return [wanted[key] for key in new]


def _rate_of_loop(embedder: Embedder, texts: Sequence[str]) -> float:
    """Embed what the stage embedded while its clock ran."""
    parts = [texts[first : first + TEXTS_PER_CALL] for first in range(0, len(texts), TEXTS_PER_CALL)]
    embedder.embed(texts[:64])
    return len(texts) / seconds(lambda: [embedder.embed(part) for part in parts])


def _silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


if __name__ == "__main__":
    raise SystemExit(main())
