"""What loading a collection in bulk saves over one upsert per point.

    .venv/bin/python -m bench.load [--points 10000] [--single 1000] [--rounds 3]

Ours is all that `goldgate index` does to have the points of a generation searchable and safe on the disk: a process of
its own, reading Parquet, BM25, upserts in batches, optimising, counting what was written, flushing. The other makes
the same points ready beforehand and then upserts one at a time into the same kind of Qdrant Edge shard, each flushed
before the next, so that a point that was reported is kept; optimising is not counted against it. It gets the first
`--single` points only (flushing gets slower as a shard grows, so this favours it); compared are points per second.
Target: at least 5 times as fast.

Qdrant Edge runs in the process: without flushing, its upserts cost the same alone and in batches, and that figure is
printed too. Where QDRANT_URL names a server, both ways are also measured through qdrant-client, and the last number is
the ratio there.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import qdrant_edge as edge

from bench.measure import alternate, chunks, finish, machine, parser, positive, repeated, say, show, spread, write_build
from goldgate.pipeline.collection import BM25, DENSE, INDEXED, Point, read_points
from goldgate.pipeline.edge import Bm25, build_shard
from goldgate.pipeline.embedder import load_embedder
from goldgate.pipeline.index import index
from goldgate.pipeline.params import EmbedParams, IndexParams
from goldgate.pipeline.schema import Generation
from goldgate.pipeline.store import Store

TARGET = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parser(__doc__)
    options.add_argument("--points", type=positive, default=10_000, help="points loaded in bulk (default: 10000)")
    options.add_argument("--single", type=positive, default=1000, help="points upserted one at a time (default: 1000)")
    chosen = options.parse_args(arguments)
    show(machine("qdrant-edge-py", "qdrant-client"))
    with tempfile.TemporaryDirectory(prefix="goldgate-bench-") as name:
        folder = Path(name)
        generation, source = _generation(chosen.data, chosen.points, folder)
        points = [point for batch in read_points(source, Bm25()) for point in batch]
        ratio = _edge(source, points, chosen.single, chosen.rounds, folder)
        url = os.environ.get("QDRANT_URL")
        if url:
            ratio = _server(url, generation, points, chosen.single, chosen.rounds)
        else:
            show("a Qdrant server: not measured, QDRANT_URL is not set")
    return finish("load", "points/s in bulk ÷ of one upsert per point", ratio, least=TARGET)


def _generation(data: Path, count: int, folder: Path) -> tuple[Generation, Path]:
    """A generation of real texts, repeated where there are too few, with vectors drawn at random: no search happens."""
    embedder = load_embedder(EmbedParams(model="hashing"))
    name, found = chunks(data, embedder, count)
    texts = repeated([chunk.text for chunk in found], count)
    base = np.random.default_rng(0).standard_normal((count, embedder.dimension), dtype=np.float32)
    (folder / "build").mkdir()
    write_build(folder / "build", texts, spread(base, count, 0.0), embedder)
    store = Store.open(folder / "store")
    # On the way the collection is built once, which warms the disk cache.
    generation = index(folder / "build", IndexParams(exact_below=count), store)
    show(f"{count} points: texts of {name}, {len(found)} different ones, vectors of {embedder.dimension} dimensions")
    return generation, store.path("generations", generation.digest)


# ---------------------------------------------------------------- Qdrant Edge


def _edge(source: Path, points: Sequence[Point], single: int, rounds: int, folder: Path) -> float:
    ready = [_edge_point(point) for point in points]
    first = ready[:single]

    def bulk() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            build_shard(source, Path(out))

    def one_by_one() -> None:
        _upsert_each(folder, first, flush=True)

    bulk_s, single_s = alternate(rounds, bulk, one_by_one, ("in bulk", "one by one"))
    quick_s, batch_s = alternate(
        rounds,
        lambda: _upsert_each(folder, ready, flush=False),
        lambda: _upsert_batches(folder, ready),
        ("one by one, not flushed", "in batches, not flushed"),
    )
    bulk_rate, single_rate = len(points) / bulk_s, len(first) / single_s
    show(f"Edge, in bulk, all of `goldgate index`:      {bulk_rate:8.0f} points/s ({bulk_s:.2f} s)")
    show(f"Edge, one upsert per point, each flushed:    {single_rate:8.0f} points/s ({len(first)} points)")
    show(f"Edge, one upsert per point, never flushed:   {len(ready) / quick_s:8.0f} points/s, the upserts alone")
    show(f"Edge, upserts of 256 points, never flushed:  {len(ready) / batch_s:8.0f} points/s, the upserts alone")
    return bulk_rate / single_rate


def _edge_point(point: Point) -> Any:  # noqa: ANN401 - the engine publishes no types
    vectors = {DENSE: point.dense.tolist(), BM25: edge.SparseVector(list(point.bm25[0]), list(point.bm25[1]))}
    return edge.Point(point.id, vectors, point.payload)


def _upsert_each(folder: Path, points: Sequence[Any], *, flush: bool) -> None:
    def fill(shard: Any) -> None:  # noqa: ANN401 - as above
        for point in points:
            shard.update(edge.UpdateOperation.upsert_points([point]))
            if flush:
                shard.flush()

    _with_shard(folder, fill)


def _upsert_batches(folder: Path, points: Sequence[Any], rows: int = 256) -> None:
    def fill(shard: Any) -> None:  # noqa: ANN401 - as above
        for start in range(0, len(points), rows):
            shard.update(edge.UpdateOperation.upsert_points(list(points[start : start + rows])))

    _with_shard(folder, fill)


def _with_shard(folder: Path, fill: Callable[[Any], None]) -> None:
    """A new shard with the payload indexes of ours; filled, closed and removed."""
    place = Path(tempfile.mkdtemp(dir=folder))
    config = edge.EdgeConfig(
        vectors={DENSE: edge.EdgeVectorParams(size=384, distance=edge.Distance.Dot)},
        sparse_vectors={BM25: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
        hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=8, full_scan_threshold=1000),
        wal_enabled=False,
    )
    shard = edge.EdgeShard.create(str(place), config)
    for field in INDEXED:
        index = edge.KeywordIndexParams(is_tenant=field == "tenant")
        shard.update(edge.UpdateOperation.create_field_index(field, index))
    fill(shard)
    shard.close()
    shutil.rmtree(place)


# ---------------------------------------------------------------- a Qdrant server


def _server(url: str, generation: Generation, points: Sequence[Point], single: int, rounds: int) -> float:
    """Ratio of points per second through qdrant-client, over collections that are removed again."""
    from qdrant_client import QdrantClient, models

    from goldgate.pipeline.server import collection_name, load_collection

    client = QdrantClient(url=url, api_key=os.environ.get("QDRANT_API_KEY"), timeout=60, check_compatibility=False)
    name = f"goldgate-bench-{os.getpid()}"

    def bulk() -> None:
        client.delete_collection(collection_name(generation))
        load_collection(client, generation, [points], server=url)

    def one_by_one() -> None:
        client.delete_collection(name)
        client.create_collection(
            name,
            vectors_config={DENSE: models.VectorParams(size=generation.dimension, distance=models.Distance.DOT)},
            sparse_vectors_config={BM25: models.SparseVectorParams(modifier=models.Modifier.IDF)},
        )
        for point in points[:single]:
            sparse = models.SparseVector(indices=list(point.bm25.indices), values=list(point.bm25.values))
            vector = {DENSE: point.dense.tolist(), BM25: sparse}
            client.upsert(name, [models.PointStruct(id=point.id, vector=vector, payload=point.payload)], wait=True)

    say(f"the same through qdrant-client at {url}")
    try:
        bulk_s, single_s = alternate(rounds, bulk, one_by_one, ("in bulk", "one by one"))
    finally:
        client.delete_collection(name)
        client.delete_collection(collection_name(generation))
    bulk_rate, single_rate = len(points) / bulk_s, min(single, len(points)) / single_s
    show(f"server, in bulk, until complete:             {bulk_rate:8.0f} points/s ({bulk_s:.2f} s)")
    show(f"server, one upsert per point, waited for:    {single_rate:8.0f} points/s")
    return bulk_rate / single_rate


if __name__ == "__main__":
    raise SystemExit(main())
