"""documents -> chunk tables with new vectors: the two engines of `embed`, one over Ray Data and one in this process.

Over Ray Data, CPU tasks chunk blocks of documents while a pool of actors, each with the model loaded once, embeds;
blocks flow through as they are ready. Both engines call the same functions, and a vector depends only on its text, so
that they give the same vectors. ray is imported here and in serving only.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import goldgate
from goldgate.pipeline.chunk import chunk_document
from goldgate.pipeline.embedder import Embedder, embedding_key, load_embedder, use_threads
from goldgate.pipeline.errors import EnvironmentFailure, GoldgateError
from goldgate.pipeline.interrupts import undisturbed
from goldgate.pipeline.params import ChunkParams, EmbedParams
from goldgate.pipeline.parquet import arrow_schema, from_table, to_table
from goldgate.pipeline.schema import Chunk, Document
from goldgate.pipeline.store import digest_json
from goldgate.pipeline.vectors import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXTS_PER_CALL = 1024
"""Rows that an actor embeds in one call: enough to fill the batches of most lengths."""

CHARACTERS_PER_BLOCK = 400_000
"""Text of one block of documents, about 500 chunks: small enough to stream, large enough to be worth its overhead."""

CHUNK_CPUS = 0.25
"""What Ray reserves for a chunking task. Other than an actor's, or Ray would fuse both steps into the actor."""


@dataclass(frozen=True)
class Work:
    """What both engines need."""

    documents: Sequence[Document]
    chunk: ChunkParams
    embed: EmbedParams
    embedder: Embedder
    known: frozenset[str]  # keys that have a vector already


@dataclass(frozen=True)
class Piece:
    """A part of the result: chunks with their keys (columns of Chunk and `key`), and vectors of new keys."""

    chunks: pa.Table
    keys: list[str]
    vectors: np.ndarray  # (len(keys), dimension) float32


def chunk_schema() -> pa.Schema:
    """Columns of Chunk, and `key`."""
    return arrow_schema(Chunk).append(pa.field("key", pa.string(), nullable=False))


# ---------------------------------------------------------------- in this process


def local_pieces(work: Work, progress: Progress) -> Generator[Piece, None, None]:
    """Chunk everything, then embed what is new, in this process."""
    embedder, new = work.embedder, dict[str, str]()
    blocks = _blocks(work.documents)
    done = 0
    for block in blocks:
        table = _chunk_table(block, embedder.tokenizer, work.chunk, embedder.max_tokens, embedder.digest)
        done += len(block)
        progress("chunk documents", done, len(work.documents))
        texts = zip(table.column("key").to_pylist(), table.column("text").to_pylist(), strict=True)
        new.update((key, text) for key, text in texts if key not in work.known)
        yield Piece(table, [], np.empty((0, embedder.dimension), dtype=np.float32))
    keys = list(new)
    for first in range(0, len(keys), TEXTS_PER_CALL):
        part = keys[first : first + TEXTS_PER_CALL]
        yield Piece(chunk_schema().empty_table(), part, embedder.embed([new[key] for key in part]))
        progress("embed texts", first + len(part), len(keys))


def _chunk_table(
    documents: Sequence[Document], tokenizer: Tokenizer, params: ChunkParams, max_tokens: int, embedder: str
) -> pa.Table:
    chunks = [chunk for document in documents for chunk in chunk_document(document, tokenizer, params, max_tokens)]
    return with_keys(to_table(chunks, Chunk), embedder)


def with_keys(chunks: pa.Table, embedder: str) -> pa.Table:
    """A table of chunks with the embedding key of each text for the embedder of that digest, in column `key`."""
    keys = [embedding_key(embedder, text) for text in chunks.column("text").to_pylist()]
    return chunks.append_column(chunk_schema().field("key"), pa.array(keys, pa.string()))


def _blocks(documents: Sequence[Document]) -> list[list[Document]]:
    blocks: list[list[Document]] = []
    size = CHARACTERS_PER_BLOCK
    for document in documents:
        if size >= CHARACTERS_PER_BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(document)
        size += len(document.text)
    return blocks


# ---------------------------------------------------------------- over Ray Data


def ray_pieces(work: Work, progress: Progress) -> Generator[Piece, None, None]:
    """Chunk and embed over Ray Data: in a running Ray if this process has one, else in one that ends with this call.

    Raises what the steps raise (GoldgateError), or EnvironmentFailure when Ray itself fails.
    """
    with ray_session(work.embed.actors), _quiet():
        try:
            yield from _stream(work, progress)
        except GoldgateError:
            raise
        except Exception as error:
            known = _goldgate_error(error)
            if known is not None:
                raise known from None
            raise EnvironmentFailure(f"Ray Data failed: {_last_line(error)}", "", "see --traceback") from error


def _stream(work: Work, progress: Progress) -> Iterator[Piece]:
    import ray

    embedder = work.embedder
    claims = ray.remote(num_cpus=0)(Claims).remote(work.known)
    done = 0
    for table in _dataset(work, claims).iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0):
        vectors = table.column("vector").combine_chunks()
        new = table.filter(vectors.is_valid())
        flat = np.frombuffer(b"".join(new.column("vector").to_pylist()), dtype=np.float32)
        done += new.num_rows
        progress("embed texts", done, 0)
        yield Piece(
            table.drop_columns(["vector"]).cast(chunk_schema()),
            new.column("key").to_pylist(),
            flat.reshape(-1, embedder.dimension),
        )
    progress("embed texts", done, done)


def _dataset(work: Work, claims: Any) -> Any:  # noqa: ANN401 - ray publishes no types for these
    import ray

    actors, resources = _resources(work.embed.actors)
    embedder = work.embedder
    blocks = [to_table(block, Document) for block in _blocks(work.documents)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        chunk_block,
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=CHUNK_CPUS,
        fn_args=(embedder.tokenizer.to_str(), work.chunk, embedder.max_tokens, embedder.digest),
    )
    return dataset.map_batches(
        EmbedActor,
        batch_format="pyarrow",
        batch_size=TEXTS_PER_CALL,
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_args=(work.embed, embedder.dtype, embedder.digest, claims, (os.cpu_count() or 1) // actors),
        **resources,
    )


def _resources(wanted: int) -> tuple[int, dict[str, float]]:
    """How many actors, and what Ray reserves for each: a GPU where there are some, else a CPU or a share of one."""
    import ray

    free = ray.available_resources()
    gpus, cpus = int(free.get("GPU", 0)), free.get("CPU", 0.0) - CHUNK_CPUS
    if gpus:
        return min(wanted, gpus), {"num_gpus": 1}
    if cpus <= 0:
        raise EnvironmentFailure("Ray has no free CPU", f"more than {CHUNK_CPUS}", "wait, or stop what else runs on it")
    return wanted, {"num_cpus": min(1.0, int(100 * cpus / wanted) / 100)}


def chunk_block(table: pa.Table, tokenizer: str, params: ChunkParams, max_tokens: int, embedder: str) -> pa.Table:
    """A block of documents -> its chunks and their keys. Runs as a CPU task of Ray Data."""
    return _chunk_table(from_table(table, Document), _tokenizer(tokenizer), params, max_tokens, embedder)


@functools.lru_cache(maxsize=2)
def _tokenizer(serialized: str) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(serialized)


class Claims:
    """Who embeds which text: a Ray actor that grants every new key to one batch, so that no text is embedded twice."""

    def __init__(self, known: frozenset[str]) -> None:
        """`known` keys are granted to nobody."""
        self._known = known
        self._owner: dict[str, str] = {}

    def claim(self, batch: str, keys: Sequence[str]) -> list[str]:
        """The keys that `batch` is to embed. A batch that Ray runs again after a crash is granted the same."""
        return [key for key in keys if key not in self._known and self._owner.setdefault(key, batch) == batch]


class EmbedActor:
    """A stateful operator of Ray Data: the model is loaded once, then every call embeds a batch of chunks."""

    def __init__(self, params: EmbedParams, dtype: str, digest: str, claims: Any, threads: int) -> None:  # noqa: ANN401
        """Load the model. Raises EnvironmentFailure when this worker has another model than the driver."""
        self._embedder = load_embedder(params, dtype)
        if self._embedder.digest != digest:
            raise EnvironmentFailure("a Ray worker has another embedding model", f"digest {digest[:12]}", "")
        use_threads(threads)
        self._embedder.warm()
        self._claims = claims

    def __call__(self, table: pa.Table) -> pa.Table:
        """Add the column `vector`: float32 bytes at the first row of every new key, null elsewhere."""
        import ray

        keys, texts = table.column("key").to_pylist(), table.column("text").to_pylist()
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        batch = digest_json(table.column("id").to_pylist())
        rows = [first[key] for key in ray.get(self._claims.claim.remote(batch, sorted(first)))]
        vectors = self._embedder.embed([texts[row] for row in rows])
        column: list[bytes | None] = [None] * len(keys)
        for row, vector in zip(rows, vectors, strict=True):
            column[row] = vector.tobytes()
        return table.append_column("vector", pa.array(column, pa.binary()))


def ray_is_there() -> bool:
    """Whether this process has a Ray already, or is told of one: then it is used, however little there is to do."""
    return bool(os.environ.get("RAY_ADDRESS")) or ("ray" in sys.modules and bool(sys.modules["ray"].is_initialized()))


@contextlib.contextmanager
def ray_session(actors: int) -> Iterator[None]:
    """A Ray that this process has already, or the one at $RAY_ADDRESS, or a local one; what starts here ends here."""
    import ray

    if ray.is_initialized():
        yield
        return
    where: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS")}
    if not where["address"]:
        # One logical CPU more than the actors take: without it the chunking tasks would never be scheduled.
        cpus = max(os.cpu_count() or 1, actors + 1)
        where = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    with _notes():
        try:
            with _environment(), _muted("ray", logging.ERROR), _without_native_output():
                _start_ray(where)
            yield
        finally:
            with undisturbed():
                ray.shutdown()


def _start_ray(where: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(**where, log_to_driver=False, configure_logging=False)
    except Exception as error:  # it raises anything, a bare Exception when the machine is too busy to start in time
        raise EnvironmentFailure(
            f"Ray does not start: {_last_line(error)}", "free memory, free cores and a writable /tmp",
            "run goldgate doctor, then try again, or use --engine local",
        ) from error  # fmt: skip


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What a starting Ray and its workers inherit: our import path, no usage statistics, no chatter on stderr."""
    home = str(Path(goldgate.__file__).resolve().parents[1])
    values = {
        "PYTHONPATH": os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal"),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """What Ray has to say (a worker that ran out of memory, a task tried again) goes to stderr, behind the work.

    Ray prints it to stdout, which is for results, whenever it hears of it: of an interrupt, too, that every actor was
    killed. Where the work fails with a reason of ours, or was interrupted, that reason is all there is to say.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except (GoldgateError, KeyboardInterrupt):
        raise
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    sys.stderr.write(said.getvalue())


@contextlib.contextmanager
def _without_native_output() -> Iterator[None]:
    """Ray's native part writes to file descriptor 2, past Python, which log level it was given."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@contextlib.contextmanager
def _muted(name: str, level: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data's own bars and logs off the terminal; failures reach the caller as exceptions."""
    import ray.data

    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        with _muted("ray.data", logging.CRITICAL):
            yield
    finally:
        context.enable_progress_bars = bars


def _goldgate_error(error: BaseException) -> GoldgateError | None:
    """The expected error inside what Ray wraps around it."""
    seen: set[int] = set()
    pending: list[BaseException] = [error]
    while pending:
        current = pending.pop()
        if isinstance(current, GoldgateError):
            return current
        if id(current) in seen:
            continue
        seen.add(id(current))
        inner = (current.__cause__, current.__context__, getattr(current, "cause", None))
        pending += [item for item in inner if isinstance(item, BaseException)]
    return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
