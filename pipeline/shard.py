"""points on standard input -> Qdrant Edge shard: the child process of a build.

Building can die with its process (a full disk under a memory map is a SIGBUS): it happens in a child. The parent reads
and prepares the points meanwhile, so that the child imports the engine and little else and is there at once.

Standard input holds lines of JSON: the job, then batches of points, then null. Standard output gets the number of
points that are in the shard when it is read back.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import qdrant_edge as edge

_LARGEST_SEGMENT = 1 << 30  # KB

PlainPoint = tuple[str, str, list[int], list[float], dict[str, object]]
"""Id, dense vector as base64 of the machine's float32, terms and weights of the sparse vector, payload."""


class Job(NamedTuple):
    """What is to be built."""

    folder: str
    """Where: an empty folder, or a copy of an earlier shard with the same vectors and the same search."""
    grown: bool
    """Whether it is a copy."""
    dense: str
    """Name of the dense vector."""
    sparse: str
    """Name of the sparse vector."""
    dimension: int
    hnsw: dict[str, int]
    """Parameters of the graph: m, ef_construct; empty for exact search."""
    indexed: list[str]
    """Payload fields with an index; the first one separates tenants."""
    delete: list[str]
    """Ids of points of the copy that are gone."""
    vacuum: bool
    """Whether only points go, so that nothing else would make the engine rebuild their segment."""


def build(job: Job, batches: Iterable[list[PlainPoint]]) -> int:
    """Build the shard and return the number of its points. Raises what the engine raises, bare Exception."""
    shard = _grown(job) if job.grown else _created(job)
    for points in batches:
        upsert = edge.UpdateOperation.upsert_points([_edge_point(job, point) for point in points])
        shard.update(upsert)
    shard.optimize()
    shard.flush()
    shard.close()
    return _read_back(job.folder)


def _created(job: Job) -> Any:  # noqa: ANN401 - the engine publishes no types
    shard = edge.EdgeShard.create(job.folder, _config(job))
    for field in job.indexed:  # before the points, so that the graph gets links within each tenant
        index = edge.KeywordIndexParams(is_tenant=field == job.indexed[0])
        shard.update(edge.UpdateOperation.create_field_index(field, index))
    return shard


def _grown(job: Job) -> Any:  # noqa: ANN401 - the engine publishes no types
    shard = edge.EdgeShard.load(job.folder, _config(job))
    _delete(shard, job.delete)
    return shard


def _delete(shard: Any, ids: list[str]) -> None:  # noqa: ANN401 - the engine publishes no types
    if ids:
        shard.update(edge.UpdateOperation.delete_points([*ids]))


def _config(job: Job) -> Any:  # noqa: ANN401 - the engine publishes no types
    return edge.EdgeConfig(
        vectors={job.dense: edge.EdgeVectorParams(size=job.dimension, distance=edge.Distance.Dot)},
        sparse_vectors={job.sparse: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
        # m = 0 builds no graph: search is exact then.
        hnsw_config=edge.HnswIndexConfig(
            m=job.hnsw.get("m", 0), ef_construct=job.hnsw.get("ef_construct", 8), full_scan_threshold=1000
        ),
        # Every segment of more than a kilobyte is optimised: in a growing one the float32 sum of a BM25 score depends
        # on the order in which it first saw the terms. A new segment takes the one there was into it, whatever its
        # size, and leaves the deleted points behind: no text outlives its document.
        optimizers=edge.EdgeOptimizersConfig(
            default_segment_number=1, indexing_threshold=1, max_segment_size=_LARGEST_SEGMENT,
            deleted_threshold=0.0 if job.vacuum else 0.2, vacuum_min_vector_number=0,
        ),
        wal_enabled=False,
    )  # fmt: skip


def _edge_point(job: Job, point: PlainPoint) -> Any:  # noqa: ANN401 - the engine publishes no types
    identity, dense, indices, values, payload = point
    vectors: Any = {
        job.dense: memoryview(base64.b64decode(dense)).cast("f").tolist(),
        job.sparse: edge.SparseVector(indices, values),
    }
    return edge.Point(identity, vectors, payload)


def _read_back(folder: str) -> int:
    """Open what was written and count its points."""
    shard = edge.EdgeShard.load(folder)
    found = int(shard.count(edge.CountRequest(exact=True)))
    shard.close()
    return found


def _batches(lines: Iterable[str]) -> Iterator[list[PlainPoint]]:
    for line in lines:
        batch = json.loads(line)
        if batch is None:
            return
        yield batch
    raise SystemExit("the parent process is gone")  # nobody will publish this


def main() -> None:
    """Do the job; when the parent was killed, nobody else removes the folder and what is beside it."""
    parent = os.getppid()
    job = Job(*json.loads(sys.stdin.readline()))
    try:
        sys.stdout.write(f"{build(job, _batches(sys.stdin))}\n")
    finally:
        if os.getppid() != parent:
            shutil.rmtree(os.path.dirname(job.folder), ignore_errors=True)  # noqa: PTH120 - without pathlib


if __name__ == "__main__":
    main()
