"""a generation and earlier ones -> how its collection differs from the nearest of theirs.

Only collections that are searched exactly are compared: two graphs of the same points need not find the same passages.
Which collection is the nearest decides how long a build takes, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from goldgate.pipeline.collection import CHUNKS, EMBEDDINGS, Vectors, read_vectors
from goldgate.pipeline.edge import Difference
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.parquet import read_table
from goldgate.pipeline.schema import Generation
from goldgate.pipeline.store import Store, digest_file

_MOST_CHANGED = 1 / 2  # of the points: above, loading all of them is the quicker way
_SMALLEST_VECTOR = 1024  # bytes, exclusive: a single new point must be enough for the engine to optimise its segment
_ALIKE = ("embedder", "dimension", "bm25", "hnsw")


def find_difference(generation: Generation, earlier: Sequence[Generation], store: Store) -> Difference | None:
    """Return how the collection of `generation` differs from the one of `earlier` that shares most chunks with it.

    None where no earlier one is alike (embedder, BM25, exact search), whole, and at least half the same.
    """
    if generation.hnsw or 4 * generation.dimension <= _SMALLEST_VECTOR:
        return None
    mine = _Points.read(store.path("generations", generation.digest))
    shares = {
        other.digest: len(mine.rows.keys() & _ids(store.path("generations", other.digest)))
        for other in earlier
        if all(getattr(other, name) == getattr(generation, name) for name in _ALIKE) and _is_whole(other, store)
    }
    if not shares:
        return None
    nearest = max(shares, key=lambda digest: (shares[digest], digest))
    theirs = _Points.read(store.path("generations", nearest))
    delete = [chunk for chunk in theirs.rows if chunk not in mine.rows]
    upsert = mine.differing(theirs)
    if len(delete) + len(upsert) > _MOST_CHANGED * generation.chunks:
        return None
    return Difference(str(store.path("collections", nearest)), delete, upsert)


class _Points:
    """What is stored of each chunk of a generation."""

    def __init__(self, rows: dict[str, int], values: list[tuple[object, ...]], vectors: Vectors) -> None:
        self.rows = rows  # chunk id -> row
        self._values = values
        self._vectors = vectors

    @classmethod
    def read(cls, folder: Path) -> _Points:
        table = read_table(folder / CHUNKS)
        columns = [column.to_pylist() for column in table.columns]
        ids = table.column("id").to_pylist()
        values = [tuple(map(_comparable, row)) for row in zip(*columns, strict=True)]
        return cls({chunk: row for row, chunk in enumerate(ids)}, values, read_vectors(folder / EMBEDDINGS))

    def differing(self, other: _Points) -> list[int]:
        """Return the rows whose chunk is not in `other`, or there with another vector or any other value."""
        shared = [(row, other.rows[chunk]) for chunk, row in self.rows.items() if chunk in other.rows]
        pairs = np.array(shared, dtype=np.int64).reshape(-1, 2)
        # As bits: 0.0 and -0.0 are equal, and not the same export.
        mine, theirs = (one.view(np.uint32) for one in (self._vectors[pairs[:, 0]], other._vectors[pairs[:, 1]]))
        moved = {
            row for row, differs in zip(pairs[:, 0].tolist(), (mine != theirs).any(axis=1), strict=True) if differs
        }
        same = {row for row, their in shared if self._values[row] == other._values[their] and row not in moved}
        return sorted(set(self.rows.values()) - same)


def _comparable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _ids(folder: Path) -> set[str]:
    return set(read_table(folder / CHUNKS, ["id"]).column("id").to_pylist())


def _is_whole(generation: Generation, store: Store) -> bool:
    """Whether the files that are compared are those of the manifest."""
    folder = store.path("generations", generation.digest)
    try:
        return all(digest_file(folder / name) == generation.files[name] for name in (CHUNKS, EMBEDDINGS))
    except (OSError, KeyError, UsageError):
        return False
