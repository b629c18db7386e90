"""key -> vector: the content-addressed embedding store, so that a text is embedded once in its life.

`embeddings/<embedder digest>/<SHA-256 of the file>.parquet`: immutable shards with columns `key` and `vector`. A key
may be in several shards. A shard whose bytes do not match its name is dropped with a warning, and its texts are
embedded again.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.parquet import read_table, vector_table, vectors_of, write_table
from goldgate.pipeline.store import Store, digest_bytes, digest_file

Progress = Callable[[str, int, int], None]
"""(what, done, total); a total of 0 is not known yet, or `what` is a message."""

SHARD_ROWS = 8192
"""Vectors per shard; a build that is cut off keeps the full shards that it wrote."""

MANY_SHARDS = 64
"""More than this are merged into one, so that many small edits do not slow down every later build."""


class VectorStore:
    """The vectors of one embedder. Only the holder of the store's build lock may have one."""

    def __init__(self, store: Store, embedder: str, dimension: int, progress: Progress) -> None:
        """Verify the shards of the embedder with digest `embedder` and learn their keys."""
        self._store = store
        self._kind = f"embeddings/{embedder}"
        self._dimension = dimension
        self._buffer: dict[str, np.ndarray] = {}
        self._shards: list[Path] = []
        self.keys: set[str] = set()
        folder = store.path(self._kind)
        for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
            if self._learn(path):
                self._shards.append(path)
            else:
                path.unlink(missing_ok=True)
                progress(f"dropped the damaged embedding shard {path.name}; its texts are embedded again", 0, 0)
        if len(self._shards) > MANY_SHARDS:
            self._merge()

    def _learn(self, path: Path) -> bool:
        if digest_file(path) != path.stem:
            return False
        try:
            table = read_table(path, ["key", "vector"])
        except UsageError:
            return False
        if table.schema.field("vector").type.list_size != self._dimension:
            return False
        self.keys.update(table.column("key").to_pylist())
        return True

    def add(self, keys: Sequence[str], vectors: np.ndarray) -> None:
        """Keep new vectors, (n, dimension) float32; full shards go to the disk at once, the rest at `flush`."""
        for key, vector in zip(keys, vectors, strict=True):
            if key not in self.keys:
                self._buffer[key] = vector
                self.keys.add(key)
        if len(self._buffer) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on the disk yet as one shard."""
        if not self._buffer:
            return
        names = sorted(self._buffer)
        data = io.BytesIO()
        write_table(data, vector_table("key", names, np.stack([self._buffer[name] for name in names])))
        content = data.getvalue()
        self._shards.append(self._store.write_bytes(f"{self._kind}/{digest_bytes(content)}.parquet", content))
        self._buffer.clear()

    def lookup(self, keys: Sequence[str]) -> np.ndarray:
        """The vectors of `keys`, (n, dimension) float32. Raises EnvironmentFailure for a key that nobody embedded."""
        self.flush()
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        found = np.empty((len(keys), self._dimension), dtype=np.float32)
        for path in self._shards:
            table = read_table(path, ["key", "vector"])
            vectors = vectors_of(table, path)
            for index, key in enumerate(table.column("key").to_pylist()):
                for row in rows.pop(key, ()):
                    found[row] = vectors[index]
        if rows:
            raise EnvironmentFailure(f"{len(rows)} texts were not embedded", "a vector for every text", "build again")
        return found

    def _merge(self) -> None:
        """Put all shards into one. A crash in between leaves duplicates, which do no harm."""
        old, names = list(self._shards), sorted(self.keys)
        vectors = self.lookup(names)
        self._shards, self.keys = [], set()
        self.add(names, vectors)
        self.flush()
        for path in set(old) - set(self._shards):
            path.unlink(missing_ok=True)
