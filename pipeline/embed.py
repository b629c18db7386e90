"""documents -> chunks.parquet, embeddings.parquet: chunk, embed what is new, write both in one fixed order.

Chunking and embedding are one stage because they are one Ray Data stream (`stream.py`); vectors that exist already
come from the embedding store (`vectors.py`), and chunks of documents that did not change from an earlier generation
(`reuse.py`). The same documents and parameters give the same bytes, whatever was built
before.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from goldgate.pipeline.embedder import Embedder, load_embedder
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import ChunkParams, EmbedParams
from goldgate.pipeline.parquet import write_embeddings, write_table
from goldgate.pipeline.reuse import ChunkedBefore
from goldgate.pipeline.schema import Document, Record
from goldgate.pipeline.store import Store, json_bytes, replace_files
from goldgate.pipeline.stream import (
    CHARACTERS_PER_BLOCK,
    Work,
    local_pieces,
    ray_is_there,
    ray_pieces,
    with_keys,
)
from goldgate.pipeline.vectors import Progress, VectorStore

CHUNKS_FILE = "chunks.parquet"
EMBEDDINGS_FILE = "embeddings.parquet"
COUNTS_FILE = "embed.json"

_WORK_COUNTS = {"embedded", "reused"}


class EmbedCounts(Record):
    """What `embed` made. embed.json holds all but the last two, which depend on what the store had before."""

    documents: int = Field(ge=0)
    chunks: int = Field(ge=0)
    texts: int = Field(ge=0, description="Distinct chunk texts.")
    embedder: str = Field(description="Digest of the embedder.")
    name: str = Field(description="Name of the embedder.")
    dtype: str
    dimension: int = Field(gt=0)
    embedded: int | None = Field(default=None, description="Texts embedded by this run; None in embed.json.")
    reused: int | None = Field(default=None, description="Texts whose vector was there; None in embed.json.")


def embed(
    documents: Sequence[Document],
    chunk: ChunkParams,
    embed: EmbedParams,
    store: Store,
    out: Path,
    *,
    engine: Literal["ray", "local"] = "ray",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> EmbedCounts:
    """Write chunks.parquet, embeddings.parquet and embed.json to the folder `out`; returns the counts.

    Chunks are sorted by document id, start, end and id; `embeddings.parquet` has a row for each, in the same order.
    Raises UsageError for documents or parameters that cannot be embedded, Refused while another build runs in `store`,
    EnvironmentFailure for a damaged model, a full disk or a failing Ray; then `out` and the store are as good as
    before.
    """
    report = progress or _silent
    ordered = _checked(documents)
    embedder = load_embedder(embed, dtype)
    if chunk.max_tokens > embedder.max_tokens:
        raise UsageError(
            f"[chunk] max_tokens is {chunk.max_tokens}", f"at most {embedder.max_tokens}, what {embedder.name} can see"
        )
    with store.lock("build"):
        vectors = VectorStore(store, embedder.digest, embedder.dimension, report)
        before = ChunkedBefore(store, chunk, embedder.digest, ordered)
        known, rest = _known(before, ordered, embedder, vectors.keys)
        work = Work(rest, chunk, embed, embedder, frozenset(vectors.keys))
        chunks, embedded = _run(work, known, vectors, engine, report)
        keys = chunks.column("key").to_pylist()
        counts = _counts(len(ordered), embedder, keys, embedded)
        _write(out, chunks.drop_columns(["key"]), vectors, keys, counts)
        before.remember(out / CHUNKS_FILE)
    return counts


def _known(
    before: ChunkedBefore, documents: Sequence[Document], embedder: Embedder, have: Collection[str]
) -> tuple[pa.Table, list[Document]]:
    """Chunks of the documents that did not change and whose texts all have vectors; and the other documents."""
    chunks = with_keys(before.chunks, embedder.digest)
    keys = zip(chunks.column("document").to_pylist(), chunks.column("key").to_pylist(), strict=True)
    known = before.documents - {document for document, key in keys if key not in have}
    kept = pc.is_in(chunks.column("document"), value_set=pa.array(sorted(known), pa.string()))
    return chunks.filter(kept), [document for document in documents if document.id not in known]


def _run(work: Work, known: pa.Table, vectors: VectorStore, engine: str, report: Progress) -> tuple[pa.Table, int]:
    """Drain the engine's stream; returns all chunks in order, with their keys, and how many texts were embedded."""
    # One block is one task and one call of an actor: beside what is known already it is not worth starting a Ray.
    few = known.num_rows > 0 and sum(len(document.text) for document in work.documents) <= CHARACTERS_PER_BLOCK
    here = engine == "local" or not work.documents or (few and not ray_is_there())
    pieces = local_pieces(work, report) if here else ray_pieces(work, report)
    tables, embedded = [known], 0
    with contextlib.closing(pieces):  # Ctrl-C and errors end Ray before they travel on
        for piece in pieces:
            tables.append(piece.chunks)
            vectors.add(piece.keys, piece.vectors)
            embedded += len(piece.keys)
    vectors.flush()
    chunks = pa.concat_tables(tables)
    if not chunks.num_rows:
        raise UsageError("the documents have no text to embed", "at least one chunk")
    order = [(column, "ascending") for column in ("document", "start", "end", "id")]
    return chunks.take(pc.sort_indices(chunks, sort_keys=order)), embedded


def _checked(documents: Sequence[Document]) -> list[Document]:
    if not documents:
        raise UsageError("there are no documents to embed", "at least one document")
    twice = [name for name, times in Counter(document.id for document in documents).items() if times > 1]
    if twice:
        raise UsageError(f"the document id {min(twice)} is given twice", "one document per id")
    return sorted(documents, key=lambda document: document.id)


def _counts(documents: int, embedder: Embedder, keys: Sequence[str], embedded: int) -> EmbedCounts:
    texts = len(set(keys))
    return EmbedCounts(
        documents=documents,
        chunks=len(keys),
        texts=texts,
        embedder=embedder.digest,
        name=embedder.name,
        dtype=embedder.dtype,
        dimension=embedder.dimension,
        embedded=embedded,
        reused=texts - embedded,
    )


def _write(out: Path, chunks: pa.Table, vectors: VectorStore, keys: Sequence[str], counts: EmbedCounts) -> None:
    """Write the three files beside `out` and then rename them into it, embed.json last."""
    embeddings = vectors.lookup(keys)

    def fill(partial: Path) -> None:
        write_table(partial / CHUNKS_FILE, chunks)
        write_embeddings(partial / EMBEDDINGS_FILE, chunks.column("id").to_pylist(), embeddings)
        (partial / COUNTS_FILE).write_bytes(json_bytes(counts.model_dump(exclude=_WORK_COUNTS)))

    replace_files(out, [CHUNKS_FILE, EMBEDDINGS_FILE, COUNTS_FILE], fill)


def _silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""
