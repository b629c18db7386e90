"""(query, principal) -> passages: what a built collection does, whichever engine holds it.

An engine ranks by one vector at a time and filters while it ranks. Everything that decides the order of passages
beyond that is here, so that Qdrant Edge, a Qdrant server and the client's local mode give the same passages:

* **visibility**: tenant and access labels are conditions of every request; a request cannot be built without them.
  Inverse document frequencies are counted over the visible points only, so that a document that the principal may
  not see cannot even shift the order of those it may.
* **ties**: points of equal score are ordered by chunk id, also where the candidates are cut off. Engines return them
  in any order, which is why weighted reciprocal rank fusion is done here in a few lines and not by the engine's own
  `Rrf`: that one takes the ranks of tied points as they come, and cuts them off as they come.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.params import RetrieveParams
from goldgate.pipeline.parquet import read_records, read_table
from goldgate.pipeline.schema import PUBLIC, Chunk, Passage, Principal

Vectors = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
Payload = dict[str, object]

DOCUMENTS, CHUNKS, EMBEDDINGS = "documents.parquet", "chunks.parquet", "embeddings.parquet"
EMBEDDING_COLUMNS = ("chunk", "vector")
DENSE, BM25 = "dense", "bm25"
"""Names of the two vectors of a point."""

INDEXED = ("tenant", "access", "document")
"""Payload fields with an index; `tenant` is the one that separates tenants."""

EVERYONE = "*"
"""Stored as the access label of a document that carries none."""

POINTS_PER_BATCH = 256
QUERIES_PER_BATCH = 64


class Collection(Protocol):
    """A searchable collection. Safe to close twice; a closed collection answers nothing."""

    def query(
        self, vectors: Vectors, texts: Sequence[str], principals: Sequence[Principal], params: RetrieveParams
    ) -> list[list[Passage]]:
        """Return at most `params.top_k` visible passages per query, best first.

        `vectors` holds one unit vector per query, shape (n, dimension); `texts` the same queries as text, for BM25;
        `principals` who asks each. Raises EnvironmentFailure when the engine fails.
        """
        ...

    def export(self) -> bytes:
        """Return the content, one JSON line per point, sorted by id: the same content gives the same bytes."""
        ...

    def count(self) -> int:
        """Return the number of points."""
        ...

    def close(self) -> None:
        """Release the engine and its files."""
        ...


class Sparse(NamedTuple):
    """A sparse vector; indices ascend."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


class Point(NamedTuple):
    """A stored chunk. `id` is the chunk id, a UUID in its canonical form."""

    id: str
    dense: Vectors
    bm25: Sparse
    payload: Payload


class Hit(NamedTuple):
    """A ranked point. Scores compare within one ranking only."""

    id: str
    score: float


@dataclass(frozen=True, slots=True)
class Visible:
    """What a principal may see: any of the tenants and any of the access labels."""

    tenants: tuple[str, ...]
    access: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """One search by one vector. There is no default for `visible`: nothing is searched without a principal."""

    vector: Vectors | Sparse
    visible: Visible
    limit: int

    @property
    def using(self) -> Literal["dense", "bm25"]:
        """Name of the vector that ranks."""
        return "bm25" if isinstance(self.vector, Sparse) else "dense"


class Engine(Protocol):
    """Where the points are. `rank` filters while it searches and orders by descending score."""

    def rank(self, rankings: Sequence[Ranking]) -> list[list[Hit]]: ...
    def fetch(self, ids: Sequence[str]) -> Iterable[tuple[str, Payload, Vectors]]: ...
    def scroll(self) -> Iterator[Point]: ...
    def count(self) -> int: ...
    def close(self) -> None: ...


class Terms(Protocol):
    """The one BM25 implementation that both indexes and queries, whatever the engine."""

    def document(self, text: str) -> Sparse: ...
    def query(self, text: str) -> Sparse: ...


# ---------------------------------------------------------------- points


def read_points(generation: Path, terms: Terms, rows: Sequence[int] | None = None) -> Iterator[list[Point]]:
    """Yield the points of a generation in batches, in the order of its Parquet files; with `rows` those rows only."""
    chunks = read_records(generation / CHUNKS, Chunk, rows)
    vectors = read_vectors(generation / EMBEDDINGS)
    if rows is not None:
        vectors = vectors[list(rows)]
    for start in range(0, len(chunks), POINTS_PER_BATCH):
        part = slice(start, start + POINTS_PER_BATCH)
        yield [
            Point(chunk.id, vector, terms.document(chunk.text), payload_of(chunk))
            for chunk, vector in zip(chunks[part], vectors[part], strict=True)
        ]


def read_vectors(path: Path) -> Vectors:
    """Read the vectors of embeddings.parquet as an array of shape (chunks, dimension).

    Raises UsageError when the column does not hold float32 vectors of one length.
    """
    column = read_table(path, EMBEDDING_COLUMNS).column(EMBEDDING_COLUMNS[1]).combine_chunks()
    if not str(column.type).startswith("fixed_size_list<") or column.null_count or column.flatten().null_count:
        raise UsageError(f"{path}: {EMBEDDING_COLUMNS[1]} has type {column.type}", "vectors", "run goldgate embed")
    # DLPack, because to_numpy imports pandas: two seconds of every build.
    flat: Vectors = np.from_dlpack(column.flatten()).astype(np.float32)
    return flat.reshape(len(column), column.type.list_size)


def payload_of(chunk: Chunk) -> Payload:
    """Return what is stored beside the vectors of `chunk`."""
    return {
        "chunk": chunk.id,
        "document": chunk.document,
        "start": chunk.start,
        "end": chunk.end,
        "text": chunk.text,
        "heading": list(chunk.heading),
        "tenant": chunk.tenant,
        "access": [_label(label) for label in chunk.access] or [EVERYONE],
    }


def visible_to(principal: Principal) -> Visible:
    """Return the condition that schema.Principal describes."""
    return Visible(
        tenants=tuple(sorted({PUBLIC, principal.tenant})),
        access=tuple(sorted({EVERYONE, *map(_label, principal.labels)})),
    )


def _label(label: str) -> str:
    """Keep a label that someone calls `*` apart from EVERYONE, on both sides alike."""
    return f"{EVERYONE}{label}" if label.startswith(EVERYONE) else label


# ---------------------------------------------------------------- ranking


class RankedCollection:
    """The Collection over an Engine: visibility, both rankings, fusion, passages."""

    def __init__(self, engine: Engine, terms: Terms) -> None:
        """Take over `engine`; closing the collection closes it."""
        self._engine = engine
        self._terms = terms

    def query(
        self, vectors: Vectors, texts: Sequence[str], principals: Sequence[Principal], params: RetrieveParams
    ) -> list[list[Passage]]:
        """See Collection.query."""
        if not len(vectors) == len(texts) == len(principals):
            raise ValueError(f"{len(vectors)} vectors, {len(texts)} texts and {len(principals)} principals")
        found: list[list[Passage]] = []
        for start in range(0, len(texts), QUERIES_PER_BATCH):
            part = slice(start, start + QUERIES_PER_BATCH)
            found += self._query(vectors[part], texts[part], principals[part], params)
        return found

    def _query(
        self, vectors: Vectors, texts: Sequence[str], principals: Sequence[Principal], params: RetrieveParams
    ) -> list[list[Passage]]:
        weights: list[tuple[int, float]] = []
        rankings: list[Ranking] = []
        for number, (vector, text, principal) in enumerate(zip(vectors, texts, principals, strict=True)):
            visible = visible_to(principal)
            for weight, by in ((params.dense_weight, vector), (params.bm25_weight, self._terms.query(text))):
                if weight > 0 and not (isinstance(by, Sparse) and not by.indices):  # only stop words: no ranking
                    weights.append((number, weight))
                    rankings.append(Ranking(by, visible, params.candidates))
        scores: list[dict[str, float]] = [{} for _ in texts]
        for (number, weight), hits in zip(weights, rank_completely(self._engine, rankings), strict=True):
            add_reciprocal_ranks(scores[number], hits, weight, params.rrf_k)
        best = [sorted(score.items(), key=_best_first)[: params.top_k] for score in scores]
        return self._passages(vectors, best)

    def _passages(self, vectors: Vectors, best: Sequence[Sequence[tuple[str, float]]]) -> list[list[Passage]]:
        wanted = sorted({chunk for ranked in best for chunk, _ in ranked})
        stored = {chunk: (payload, vector) for chunk, payload, vector in self._engine.fetch(wanted)}
        if len(stored) != len(wanted):
            missing = next(chunk for chunk in wanted if chunk not in stored)
            raise EnvironmentFailure(f"chunk {missing} left the collection while it was queried", "", "try again")
        return [
            [_passage(stored[chunk][0], score, cosine(vector, stored[chunk][1])) for chunk, score in ranked]
            for vector, ranked in zip(vectors, best, strict=True)
        ]

    def export(self) -> bytes:
        """See Collection.export. Dense vectors are base64 of little-endian float32."""
        lines = sorted((point.id, _export_line(point)) for point in self._engine.scroll())
        return b"".join(line for _, line in lines)

    def count(self) -> int:
        """See Collection.count."""
        return self._engine.count()

    def close(self) -> None:
        """See Collection.close."""
        self._engine.close()


def rank_completely(engine: Engine, rankings: Sequence[Ranking]) -> list[list[Hit]]:
    """Rank, order ties by chunk id, and cut each list at its limit so that the cut does not depend on the engine.

    Where the score at the cut goes on behind it, the search is repeated with a larger limit until the tie is whole.
    """
    done: list[list[Hit]] = [[] for _ in rankings]
    open_now = {number: ranking.limit + 1 for number, ranking in enumerate(rankings)}
    while open_now:
        requests = [replace(rankings[number], limit=limit) for number, limit in open_now.items()]
        still_open: dict[int, int] = {}
        for (number, limit), hits in zip(open_now.items(), engine.rank(requests), strict=True):
            ordered = sorted((Hit(hit.id, _rounded(hit.score)) for hit in hits), key=_best_first)
            cut = rankings[number].limit
            if len(ordered) == limit and ordered[cut - 1].score == ordered[-1].score:
                still_open[number] = limit * 4
            done[number] = ordered[:cut]
        open_now = still_open
    return done


def add_reciprocal_ranks(scores: dict[str, float], hits: Sequence[Hit], weight: float, rrf_k: int) -> None:
    """Add weight / (rrf_k + rank) for each hit, ranks from 1 (Cormack, Clarke and Buettcher, SIGIR 2009)."""
    for rank, hit in enumerate(hits, start=1):
        scores[hit.id] = scores.get(hit.id, 0.0) + weight / (rrf_k + rank)


def cosine(query: Vectors, passage: Vectors) -> float:
    """Cosine of two unit vectors, computed alike for every engine."""
    product = float(np.dot(query.astype(np.float64), passage.astype(np.float64)))
    return round(min(1.0, max(-1.0, product)), 6)


def _rounded(score: float) -> float:
    """Five significant digits, six decimals: engines sum float32 in different orders, and that noise, also the one
    around 0, must not decide a rank."""
    return round(float(f"{score:.5g}"), 6) + 0.0  # + 0.0: no negative zero


def _best_first(item: tuple[str, float]) -> tuple[float, str]:
    return -item[1], item[0]


def _passage(payload: Mapping[str, object], score: float, similarity: float) -> Passage:
    shown = {name: payload[name] for name in ("chunk", "document", "start", "end", "text", "heading", "tenant")}
    return Passage.model_validate({**shown, "score": score, "similarity": similarity})


def _export_line(point: Point) -> bytes:
    dense = base64.b64encode(np.asarray(point.dense, dtype="<f4").tobytes()).decode("ascii")
    bm25 = [[index, float(np.float32(value))] for index, value in sorted(zip(*point.bm25, strict=True))]
    record = {"id": point.id, "payload": point.payload, "dense": dense, "bm25": bm25}
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"
