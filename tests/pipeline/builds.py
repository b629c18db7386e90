"""Small build folders for tests of what comes after embedding: real Parquet, the hashing embedder, no Ray."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from goldgate.pipeline.collection import CHUNKS, DOCUMENTS, EMBEDDINGS
from goldgate.pipeline.embedder import Embedder, load_embedder
from goldgate.pipeline.params import EmbedParams
from goldgate.pipeline.parquet import write_embeddings, write_records
from goldgate.pipeline.schema import PUBLIC, Chunk, Document

NAMESPACE = uuid.UUID("b3c1de8e-4bb4-4a1b-9f0c-6a2d5c7d1c11")


def hashing_embedder() -> Embedder:
    return load_embedder(EmbedParams(model="hashing"))


def document(name: str, text: str, tenant: str = PUBLIC, access: Sequence[str] = ()) -> Document:
    return Document(
        id=name,
        text=text,
        title=name,
        media_type="text/markdown",
        parser="test 1",
        digest=hashlib.sha256(text.encode()).hexdigest(),
        tenant=tenant,
        access=tuple(sorted(set(access))),
    )


def chunks_of(documents: Sequence[Document]) -> list[Chunk]:
    """One chunk per paragraph."""
    chunks = []
    for doc in documents:
        start = 0
        for paragraph in doc.text.split("\n\n"):
            span = (start, start + len(paragraph))
            start = span[1] + 2
            chunks.append(
                Chunk(
                    id=str(uuid.uuid5(NAMESPACE, f"{doc.id}\0{span}\0{paragraph}")),
                    document=doc.id,
                    start=span[0],
                    end=span[1],
                    text=paragraph,
                    heading=(doc.title,),
                    tokens=max(1, len(paragraph.split())),
                    tenant=doc.tenant,
                    access=doc.access,
                )
            )
    return sorted(chunks, key=lambda chunk: (chunk.document, chunk.start, chunk.end, chunk.id))


def write_build(
    folder: Path, documents: Sequence[Document], chunks: Sequence[Chunk] | None = None, embedder: Embedder | None = None
) -> Path:
    """Write what read and embed leave in a build folder."""
    folder.mkdir(parents=True, exist_ok=True)
    embedder = embedder or hashing_embedder()
    chunks = chunks_of(documents) if chunks is None else chunks
    write_records(folder / DOCUMENTS, sorted(documents, key=lambda doc: doc.id), Document)
    write_records(folder / CHUNKS, chunks, Chunk)
    vectors = embedder.embed([chunk.text for chunk in chunks]).astype(np.float32)
    write_embeddings(folder / EMBEDDINGS, [chunk.id for chunk in chunks], vectors)
    record = {"embedder": embedder.digest, "name": embedder.name, "dtype": embedder.dtype}
    (folder / "embed.json").write_text(json.dumps({**record, "dimension": embedder.dimension}))
    return folder
