"""generation -> Qdrant server collection, through qdrant-client: one collection per generation.

The name holds the generation's digest and this module's layout, so that one server serves many applications and
releases side by side. A collection is marked complete in its metadata after its points were counted; only an
unmarked one is ever dropped. The same code drives the client's local mode, which searches exactly and has no indexes.

Needs Qdrant 1.19: an older server ignores the IDF corpus and would count terms of documents that the principal may not
see. One shard per collection, because the server counts IDF per shard.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException

from goldgate.pipeline.collection import (
    BM25,
    DENSE,
    INDEXED,
    POINTS_PER_BATCH,
    Hit,
    Payload,
    Point,
    Progress,
    Ranking,
    Sparse,
    Terms,
    Vectors,
    Visible,
    read_points,
)
from goldgate.pipeline.errors import EnvironmentFailure
from goldgate.pipeline.schema import Generation

LAYOUT = 1
"""Raised whenever this module stores points differently; part of the collection's name."""

KEY_VARIABLE = "QDRANT_API_KEY"
OLDEST_SERVER = (1, 19)
_TIMEOUT_S = 60
_INDEXING_S = 1800.0
_SCROLL = 256


def open_server(
    url: str, generation: Generation, folder: Path, terms: Terms, progress: Progress | None = None
) -> ClientEngine:
    """Open the collection of `generation` on the server at `url`, loading it from `folder` where it is not complete.

    Raises EnvironmentFailure when the server is not reachable, too old or fails, or holds other points.
    """
    with _server_errors(url):
        # Its own compatibility check only warns; the version is checked below, and refused.
        client = QdrantClient(
            url=url, api_key=os.environ.get(KEY_VARIABLE), timeout=_TIMEOUT_S, check_compatibility=False
        )
        try:
            _check_version(client.info().version)
            return load_collection(client, generation, read_points(folder, terms), server=url, progress=progress)
        except BaseException:
            client.close()
            raise


def load_collection(
    client: QdrantClient,
    generation: Generation,
    batches: Iterable[Sequence[Point]],
    *,
    server: str | None,
    progress: Progress | None = None,
) -> ClientEngine:
    """Return an engine over the collection of `generation`, loading `batches` unless it is complete already.

    `server` is the address for messages; None stands for the client's local mode.
    """
    engine = ClientEngine(client, generation, server)
    name = engine.name
    if client.collection_exists(name):
        if (client.get_collection(name).config.metadata or {}).get("complete") == generation.digest:
            _check_count(engine, generation)
            return engine
        client.delete_collection(name)
    _create(client, name, generation, server is not None)
    _upload(client, name, generation, batches, progress)
    if generation.hnsw and server is not None:
        _build_graph(client, name, generation)
    _check_count(engine, generation)
    client.update_collection(name, metadata={"complete": generation.digest})
    return engine


def collection_name(generation: Generation) -> str:
    """Name of a generation's collection on a server."""
    return f"goldgate-{LAYOUT}-{generation.digest}"


def _create(client: QdrantClient, name: str, generation: Generation, server: bool) -> None:
    client.create_collection(
        name,
        vectors_config={DENSE: models.VectorParams(size=generation.dimension, distance=models.Distance.DOT)},
        sparse_vectors_config={BM25: models.SparseVectorParams(modifier=models.Modifier.IDF)},
        shard_number=1,
        hnsw_config=models.HnswConfigDiff(m=0),  # no graph while points arrive, and none at all for exact search
        metadata={"generation": generation.digest},
    )
    if server:
        for field in INDEXED:  # before the points, so that the graph gets links within each tenant
            schema = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=field == "tenant")
            client.create_payload_index(name, field, schema, wait=True)


def _upload(
    client: QdrantClient,
    name: str,
    generation: Generation,
    batches: Iterable[Sequence[Point]],
    progress: Progress | None,
) -> None:
    done = 0
    for points in batches:
        client.upload_points(name, map(_client_point, points), batch_size=POINTS_PER_BATCH, wait=True)
        done += len(points)
        if progress is not None:
            progress("index", done, generation.chunks)


def _build_graph(client: QdrantClient, name: str, generation: Generation) -> None:
    hnsw = generation.hnsw_params
    client.update_collection(name, hnsw_config=models.HnswConfigDiff(m=hnsw["m"], ef_construct=hnsw["ef_construct"]))
    end = time.monotonic() + _INDEXING_S
    while client.get_collection(name).status != models.CollectionStatus.GREEN:
        if time.monotonic() > end:
            raise EnvironmentFailure(
                f"the server did not finish indexing {name} in {_INDEXING_S:.0f} s", "", "try again"
            )
        time.sleep(0.2)


def _check_version(version: str) -> None:
    if tuple(int(part) for part in version.split("-", maxsplit=1)[0].split(".")[:2]) < OLDEST_SERVER:
        raise EnvironmentFailure(f"the Qdrant server has version {version}", "1.19 or later", "upgrade it")


def _check_count(engine: ClientEngine, generation: Generation) -> None:
    found = engine.count()
    if found != generation.chunks:
        raise EnvironmentFailure(
            f"the server's collection {engine.name} holds {found} points",
            f"{generation.chunks}",
            "delete that collection on the server and run goldgate index again",
        )


def _client_point(point: Point) -> models.PointStruct:
    sparse = models.SparseVector(indices=list(point.bm25.indices), values=list(point.bm25.values))
    return models.PointStruct(id=point.id, vector={DENSE: point.dense.tolist(), BM25: sparse}, payload=point.payload)


class ClientEngine:
    """A collection behind qdrant-client. See collection.Engine."""

    def __init__(self, client: QdrantClient, generation: Generation, server: str | None) -> None:
        """Take over `client`; `server` is its address, None for local mode."""
        self.name = collection_name(generation)
        self._client = client
        self._server = server
        self._exact = not generation.hnsw
        self._ef = generation.hnsw_params.get("ef_search")

    def rank(self, rankings: Sequence[Ranking]) -> list[list[Hit]]:
        """See collection.Engine."""
        with _server_errors(self._server):
            found = self._client.query_batch_points(self.name, [self._request(one) for one in rankings])
        return [[Hit(str(point.id), point.score) for point in response.points] for response in found]

    def _request(self, ranking: Ranking) -> models.QueryRequest:
        seen = _filter(ranking.visible)
        vector: list[float] | models.SparseVector
        params: models.SearchParams | None
        if isinstance(ranking.vector, Sparse):
            vector = models.SparseVector(indices=list(ranking.vector.indices), values=list(ranking.vector.values))
            params = models.SearchParams(idf=models.IdfCorpusParams(corpus=seen))
        else:
            vector = ranking.vector.tolist()
            # Local mode always searches exactly, and warns about parameters that it has no use for.
            params = models.SearchParams(exact=self._exact, hnsw_ef=self._ef) if self._server else None
        return models.QueryRequest(
            query=vector, using=ranking.using, filter=seen, params=params, limit=ranking.limit, with_payload=False
        )

    def fetch(self, ids: Sequence[str]) -> Iterable[tuple[str, Payload, Vectors]]:
        """See collection.Engine."""
        if not ids:
            return []
        with _server_errors(self._server):
            records = self._client.retrieve(self.name, list(ids), with_payload=True, with_vectors=[DENSE])
        return [(str(one.id), one.payload or {}, _dense(one)) for one in records]

    def scroll(self) -> Iterator[Point]:
        """See collection.Engine."""
        offset: Any = None
        while True:
            with _server_errors(self._server):
                records, offset = self._client.scroll(
                    self.name, limit=_SCROLL, offset=offset, with_payload=True, with_vectors=True
                )
            for one in records:
                yield Point(str(one.id), _dense(one), _sparse(one), one.payload or {})
            if offset is None:
                return

    def count(self) -> int:
        """See collection.Engine."""
        with _server_errors(self._server):
            return self._client.count(self.name, exact=True).count

    def close(self) -> None:
        """Close the connection; the collection stays on the server."""
        self._client.close()


def _dense(record: models.Record) -> Vectors:
    vectors = record.vector if isinstance(record.vector, dict) else {}
    return np.asarray(vectors[DENSE], dtype=np.float32)


def _sparse(record: models.Record) -> Sparse:
    vectors = record.vector if isinstance(record.vector, dict) else {}
    found = vectors.get(BM25)
    if not isinstance(found, models.SparseVector):  # a text without a single term
        return Sparse((), ())
    pairs = sorted(zip(found.indices, found.values, strict=True))
    return Sparse(tuple(index for index, _ in pairs), tuple(value for _, value in pairs))


def _filter(visible: Visible) -> models.Filter:
    return models.Filter(
        must=[
            models.FieldCondition(key="tenant", match=models.MatchAny(any=list(visible.tenants))),
            models.FieldCondition(key="access", match=models.MatchAny(any=list(visible.access))),
        ]
    )


@contextlib.contextmanager
def _server_errors(server: str | None) -> Iterator[None]:
    """Turn what the client raises into an EnvironmentFailure that names the server, without its credentials."""
    try:
        yield
    except (ApiException, QdrantException, OSError) as error:
        parts = urlsplit(server or "")
        where = f"the Qdrant server at {parts.hostname}:{parts.port or 6333}" if server else "the local Qdrant client"
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise EnvironmentFailure(f"{where} failed: {first[0]:.200}", "", "check QDRANT_URL and the server") from error
