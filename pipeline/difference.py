"""a generation and earlier ones -> how its collection differs from the nearest of theirs.

Only collections that are searched exactly are compared: two graphs of the same points need not find the same passages.
Which collection is the nearest decides how long a build takes, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from goldgate.pipeline.collection import CHUNKS, EMBEDDINGS, read_vectors
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
    alike = [one for one in earlier if all(getattr(one, name) == getattr(generation, name) for name in _ALIKE)]
    ids = _ids(store.path("generations", generation.digest))
    shares = {one.digest: (len(ids & _ids(store.path("generations", one.digest))), one.digest) for one in alike}
    nearest = max(alike, key=lambda one: shares[one.digest], default=None)
    if nearest is None or not _is_whole(nearest, store):
        return None
    mine, theirs = (_Points(store.path("generations", one.digest)) for one in (generation, nearest))
    delete = [chunk for chunk in theirs.rows if chunk not in mine.rows]
    upsert = mine.differing(theirs)
    if len(delete) + len(upsert) > _MOST_CHANGED * generation.chunks:
        return None
    return Difference(str(store.path("collections", nearest.digest)), delete, upsert)


class _Points:
    """What is stored of each chunk of a generation."""

    def __init__(self, folder: Path) -> None:
        """Read the generation in `folder`."""
        table = read_table(folder / CHUNKS)
        self._columns = [column.to_pylist() for column in table.columns]
        self._vectors = read_vectors(folder / EMBEDDINGS)
        self.rows = {chunk: row for row, chunk in enumerate(table.column("id").to_pylist())}

    def differing(self, other: _Points) -> list[int]:
        """Return the rows whose chunk is not in `other`, or there with another vector or any other value."""
        pairs = [(row, other.rows[chunk]) for chunk, row in self.rows.items() if chunk in other.rows]
        mine, theirs = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        # As bits: 0.0 and -0.0 are equal, and not the same export.
        equal = (self._vectors[mine].view(np.uint32) == other._vectors[theirs].view(np.uint32)).all(axis=1).tolist()
        columns = list(zip(self._columns, other._columns, strict=True))
        same = {
            row
            for (row, their), is_equal in zip(pairs, equal, strict=True)
            if is_equal and all(one[row] == two[their] for one, two in columns)
        }
        return sorted(set(self.rows.values()) - same)


def _ids(folder: Path) -> set[str]:
    return set(read_table(folder / CHUNKS, ["id"]).column("id").to_pylist())


def _is_whole(generation: Generation, store: Store) -> bool:
    """Whether the files that are compared are those of the manifest."""
    folder = store.path("generations", generation.digest)
    try:
        return all(digest_file(folder / name) == generation.files[name] for name in (CHUNKS, EMBEDDINGS))
    except (OSError, KeyError, UsageError):
        return False
