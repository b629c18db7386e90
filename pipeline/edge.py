"""generation -> Qdrant Edge shard: built once in a process of its own (`shard.py`), opened as a private copy.

Facts of qdrant-edge-py 0.9.0 that shape this module (each tried out):

* A shard has one open handle, and opening rewrites `edge_config.json`: every process opens its own copy.
* The engine flushes some four hundred times while it builds a shard of any size, two seconds on a slow disk: a shard of
  moderate size is built in memory and then copied to the disk, where each file is flushed once.
* In an optimised segment the score of a point does not depend on the points before it. Every shard is optimised, and so
  one that grew out of an earlier shard ranks bit by bit as one built from scratch.
* Segment names are random and most files are sparse (hundreds of MB of holes around a few MB of data): the shard is
  derived data outside any identity, it is copied without its holes, and its digests count only data.
* Calls hold the GIL (a spinning thread got 2 % of its speed during a query), so threads do not speed up queries;
  one query takes about a millisecond.
* IDF depends on the corpus: ln(1 + (N - df + 0.5) / (df + 0.5)) over the points that `IdfParams.corpus` selects, at
  query time. Document weights depend on the document alone, because the average length is a constant here.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import qdrant_edge as edge

import goldgate
from goldgate.pipeline.collection import (
    BM25,
    DENSE,
    INDEXED,
    Hit,
    Payload,
    Point,
    Progress,
    Ranking,
    Sparse,
    Vectors,
    Visible,
    read_points,
)
from goldgate.pipeline.errors import EnvironmentFailure
from goldgate.pipeline.schema import Generation
from goldgate.pipeline.shard import Job, PlainPoint

LAYOUT = 2
"""Raised whenever this module stores points differently; a collection of another layout is built again."""

MARKER, SHARD, MANIFEST = "collection.json", "shard", "manifest.json"
_BLOCK = 1 << 16
_SCROLL = 1000

MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; folders in it get random names
_MOST_MEMORY = 512 << 20  # bytes, by the estimate below
_POINT_BYTES, _SHARD_BYTES = 8192, 32 << 20  # an upper estimate of a point without vector, and of an empty shard
_PREFIX, _LEFT_S = "goldgate-shard-", 86_400


class DamagedCollection(EnvironmentFailure):
    """A derived collection that is incomplete, altered or of another layout; it can be built again."""


class Bm25:
    """Edge's own BM25 embedder with fixed parameters, the only one that makes sparse vectors here.

    The average length is a constant (about the mean of 200-token chunks after stop words), not the corpus mean:
    editing one document must not change the stored weights of all others.
    """

    K, B, AVERAGE_LENGTH, LANGUAGE = 1.2, 0.75, 100.0, "english"

    def __init__(self) -> None:
        """Load the tokenizer, the stop words and the stemmer; they are inside the package."""
        self._model = edge.Bm25(
            edge.Bm25Config(
                k=self.K, b=self.B, avg_len=self.AVERAGE_LENGTH, language=self.LANGUAGE, lowercase=True,
                ascii_folding=True, tokenizer=edge.TokenizerType.Word,
            )
        )  # fmt: skip

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Return what belongs into a manifest: everything that decides the sparse vectors."""
        return {
            "implementation": "qdrant-edge-py Bm25",
            "version": importlib.metadata.version("qdrant-edge-py"),
            "k": str(cls.K),
            "b": str(cls.B),
            "average_length": str(cls.AVERAGE_LENGTH),
            "language": cls.LANGUAGE,
            "tokenizer": "word",
            "ascii_folding": "true",
            "idf": "at query time, over the visible points",
        }

    def document(self, text: str) -> Sparse:
        """Return the term weights of a stored text."""
        return _sparse(self._model.embed_document(text))

    def query(self, text: str) -> Sparse:
        """Return the terms of a query, each with weight 1; empty when only stop words remain."""
        return _sparse(self._model.embed_query(text))


# ---------------------------------------------------------------- build


class Difference(NamedTuple):
    """What makes the collection of one generation out of an earlier one's."""

    base: str
    """Folder of the earlier collection. Where it turns out to be damaged, the new one is built from scratch."""
    delete: list[str]
    """Ids of the points that are gone."""
    upsert: list[int]
    """Rows of the new chunks.parquet that are not in the earlier collection, or not as they are now; ascending."""


def build_shard(
    generation: Path, out: Path, progress: Progress | None = None, difference: Difference | None = None
) -> None:
    """Fill the empty folder `out` from a generation's folder, in a child process (`shard.py`).

    With a `difference`, the earlier collection that it names is copied and changed; points and rankings are the same
    either way. Raises EnvironmentFailure with the child's last words, and with the usual cause when a signal ended it.
    """
    manifest = Generation.model_validate_json((generation / MANIFEST).read_bytes())
    place = _workplace(manifest, out)
    try:
        if difference is not None and _grow(place / "grown", manifest, generation, difference, progress):
            _copy_out(place / "grown", out, manifest, Path(difference.base).name)
        else:
            _fill(place / "scratch", manifest, generation, progress)
            _copy_out(place / "scratch", out, manifest, "")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _fill(folder: Path, manifest: Generation, generation: Path, progress: Progress | None) -> None:
    """Make a shard of all points of a generation."""
    folder.mkdir()
    job = _job(folder, manifest, None)
    found = _run(job, read_points(generation, Bm25()), manifest.chunks, progress)
    if found != manifest.chunks:
        raise EnvironmentFailure(f"the new collection holds {found} points", f"{manifest.chunks}", "try again")


def _grow(
    folder: Path, manifest: Generation, generation: Path, difference: Difference, progress: Progress | None
) -> bool:
    """Make a shard out of an earlier one; says whether that worked. It may have been damaged, or be gone by now."""
    try:
        folder.mkdir()
        _verified(Path(difference.base), folder)
        points = read_points(generation, Bm25(), difference.upsert)
        found = _run(_job(folder, manifest, difference), points, len(difference.upsert), progress)
    except (EnvironmentFailure, OSError):  # without it everything is loaded, and what is wrong otherwise comes up again
        return False
    return found == manifest.chunks


def _job(folder: Path, manifest: Generation, difference: Difference | None) -> Job:
    return Job(
        folder=str(folder.absolute()),
        grown=difference is not None,
        dense=DENSE,
        sparse=BM25,
        dimension=manifest.dimension,
        hnsw=manifest.hnsw_params,
        indexed=list(INDEXED),
        delete=[] if difference is None else difference.delete,
        vacuum=difference is not None and not difference.upsert,
    )


def _run(job: Job, batches: Iterable[Sequence[Point]], total: int, progress: Progress | None) -> int:
    """Feed the child; returns how many points are in its shard. Raises EnvironmentFailure when it fails."""
    root = str(Path(goldgate.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "goldgate.pipeline.shard"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(  # noqa: S603 - own module, no shell
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child,
    ):
        try:
            if child.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it died: why is known below
                    _feed(child.stdin, job, batches, total, progress)
            found, _ = child.communicate()
        except BaseException:
            child.kill()
            raise
        if child.returncode != 0:
            errors.seek(0)
            raise _build_failure(child.returncode, errors.read())
        return int(found)


def _feed(pipe: IO[str], job: Job, batches: Iterable[Sequence[Point]], total: int, progress: Progress | None) -> None:
    done = 0
    pipe.write(json.dumps(job) + "\n")
    for points in batches:
        pipe.write(json.dumps([_plain(point) for point in points]) + "\n")
        done += len(points)
        if progress is not None:
            progress("index", done, total)
    pipe.write("null\n")
    pipe.flush()


def _plain(point: Point) -> PlainPoint:
    dense = base64.b64encode(point.dense.astype(np.float32).tobytes()).decode("ascii")
    return point.id, dense, list(point.bm25.indices), list(point.bm25.values), point.payload


def _workplace(generation: Generation, out: Path) -> Path:
    """Make a folder to build in: in memory where the shard takes little of it, else on the disk of `out`."""
    need = generation.chunks * (_POINT_BYTES + 8 * generation.dimension) + _SHARD_BYTES
    prefix = f"{_PREFIX}{os.getpid()}-"
    with contextlib.suppress(OSError):  # no such file system here
        for left in MEMORY.glob(f"{_PREFIX}*"):  # by a build whose two processes were both killed
            if time.time() - left.stat().st_mtime > _LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
        if need <= _MOST_MEMORY and shutil.disk_usage(MEMORY).free > 2 * need:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=MEMORY))
    return Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))


def _build_failure(code: int, errors: str) -> EnvironmentFailure:
    if code < 0:
        name = signal.Signals(-code).name
        cause = {"SIGBUS": ": the disk is full", "SIGKILL": ": killed, perhaps for lack of memory"}.get(name, "")
        return EnvironmentFailure(
            f"the process that builds the collection was ended by {name}{cause}",
            "",
            "free some space or memory and run it again; no half collection was published",
        )
    last = errors.strip().splitlines()[-1:] or [f"exit code {code}"]
    return EnvironmentFailure(f"the collection could not be built: {last[0]}", "", "nothing was published; try again")


def _copy_out(folder: Path, out: Path, generation: Generation, base: str) -> None:
    """Copy a complete shard to `out` and add its marker. `base` names the collection that it grew out of, if any."""
    files = {}
    for name in _files(folder):
        (out / SHARD / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = _copy_data(folder / name, out / SHARD / name)
    marker = {"layout": LAYOUT, "engine": _engine(), "points": generation.chunks, "base": base, "files": files}
    (out / MARKER).write_text(json.dumps(marker, sort_keys=True, indent=1), encoding="utf-8")


def _engine() -> str:
    return f"qdrant-edge-py {importlib.metadata.version('qdrant-edge-py')}"


# ---------------------------------------------------------------- open


def can_grow(folder: Path) -> bool:
    """Whether another shard may be made out of the one in `folder`, as far as its marker tells."""
    try:
        _marker(folder)
    except DamagedCollection:
        return False
    return True


def check_shard(folder: Path) -> None:
    """Raise DamagedCollection unless `folder` holds exactly what was built."""
    _verified(folder, None)


def open_shard(folder: Path, generation: Generation) -> EdgeEngine:
    """Copy the shard in `folder`, verifying it, and open the copy.

    The copy lies in the system's temporary folder and is removed on close, at garbage collection and at exit. Raises
    DamagedCollection, or EnvironmentFailure when there is no room for the copy.
    """
    copy = Path(tempfile.mkdtemp(prefix="goldgate-collection-"))
    try:
        points = _verified(folder, copy)
        shard = edge.EdgeShard.load(str(copy))
        if points != generation.chunks or shard.count(edge.CountRequest(exact=True)) != points:
            shard.close()
            raise DamagedCollection(f"the collection {folder} holds another number of points than its generation")
        return EdgeEngine(shard, copy, generation)
    except OSError as error:
        shutil.rmtree(copy, ignore_errors=True)
        raise EnvironmentFailure(
            f"the collection {folder} cannot be copied to {copy}: {error.strerror}", "", "free some space there"
        ) from error
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def _verified(folder: Path, copy: Path | None) -> int:
    """Compare every file with the marker's digest, copying on the way; returns the number of points."""
    files, points = _marker(folder)
    if sorted(files) != _files(folder / SHARD):
        raise DamagedCollection(f"the collection {folder} is damaged: files are missing or were added")
    for name, digest in files.items():
        if copy is not None:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if _copy_data(folder / SHARD / name, None if copy is None else copy / name) != digest:
            raise DamagedCollection(f"the collection {folder} is damaged: {name} has other bytes")
    return points


def _marker(folder: Path) -> tuple[dict[str, str], int]:
    """The digests of a shard's files, and the number of its points. Raises DamagedCollection."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        files, points = dict(marker["files"]), int(marker["points"])
        origin = (marker["layout"], marker["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedCollection(f"the collection {folder} is damaged: no valid {MARKER}") from None
    if origin != (LAYOUT, _engine()):
        raise DamagedCollection(f"the collection {folder} was built by another version")
    return files, points


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _copy_data(source: Path, target: Path | None) -> str:
    """Copy a sparse file without its holes and return the SHA-256 of its size and of its blocks that are not zero."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, (Path(os.devnull) if target is None else target).open("wb") as writing:
        size = os.fstat(reading.fileno()).st_size
        digest.update(str(size).encode())
        for offset in _data_blocks(reading.fileno(), size):
            block = os.pread(reading.fileno(), _BLOCK, offset)
            if block.count(0) == len(block):
                continue  # a hole on one file system may be stored zeros on another
            digest.update(offset.to_bytes(8, "little") + block)
            if target is not None:
                writing.seek(offset)
                writing.write(block)
        if target is not None:
            writing.truncate(size)
    return digest.hexdigest()


def _data_blocks(descriptor: int, size: int) -> Iterator[int]:
    """Yield the offsets of the blocks that hold data, ascending."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        first = max(offset, start - start % _BLOCK)
        yield from range(first, end, _BLOCK)
        offset = end + -end % _BLOCK


class EdgeEngine:
    """An open private copy of a shard. See collection.Engine."""

    def __init__(self, shard: Any, copy: Path, generation: Generation) -> None:  # noqa: ANN401 - no types
        """Take over `shard` and its folder `copy`."""
        self._shard = shard
        self._exact = not generation.hnsw
        self._ef = generation.hnsw_params.get("ef_search")
        self._discard = weakref.finalize(self, _discard, shard, copy, os.getpid())

    def rank(self, rankings: Sequence[Ranking]) -> list[list[Hit]]:
        """See collection.Engine."""
        with _engine_errors():
            found = self._shard.query_batch(edge.QueryBatchRequest([self._request(one) for one in rankings]))
        return [[Hit(str(point.id), point.score) for point in points] for points in found]

    def _request(self, ranking: Ranking) -> Any:  # noqa: ANN401 - the engine publishes no types
        seen = _filter(ranking.visible)
        if isinstance(ranking.vector, Sparse):
            vector = edge.SparseVector(list(ranking.vector.indices), list(ranking.vector.values))
            params = edge.SearchParams(exact=True, idf=edge.IdfParams(seen))
        else:
            vector = ranking.vector.tolist()
            params = edge.SearchParams(exact=self._exact, hnsw_ef=self._ef)
        query = edge.Query.Nearest(vector, using=ranking.using)
        return edge.QueryRequest(limit=ranking.limit, query=query, filter=seen, params=params, with_payload=False)

    def fetch(self, ids: Sequence[str]) -> Iterable[tuple[str, Payload, Vectors]]:
        """See collection.Engine."""
        with _engine_errors():
            records = self._shard.retrieve(list(ids), True, [DENSE])
        return [(str(one.id), one.payload, np.asarray(one.vector[DENSE], dtype=np.float32)) for one in records]

    def scroll(self) -> Iterator[Point]:
        """See collection.Engine."""
        offset = None
        while True:
            with _engine_errors():
                records, offset = self._shard.scroll(
                    edge.ScrollRequest(offset=offset, limit=_SCROLL, with_payload=True, with_vector=True)
                )
            for one in records:
                dense = np.asarray(one.vector[DENSE], dtype=np.float32)
                yield Point(str(one.id), dense, _sparse(one.vector.get(BM25)), one.payload)
            if offset is None:
                return

    def count(self) -> int:
        """See collection.Engine."""
        with _engine_errors():
            return int(self._shard.count(edge.CountRequest(exact=True)))

    def close(self) -> None:
        """Close the shard and remove the copy."""
        self._discard()


def _discard(shard: Any, copy: Path, owner: int) -> None:  # noqa: ANN401 - the engine publishes no types
    if os.getpid() == owner:  # a forked child leaves its parent's copy alone
        shard.close()
        shutil.rmtree(copy, ignore_errors=True)


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turn what the engine raises (bare Exception, by its binding) into an EnvironmentFailure."""
    try:
        yield
    except Exception as error:
        raise EnvironmentFailure(f"Qdrant Edge failed: {error}", "", "open the collection again") from error


@functools.lru_cache(maxsize=1024)  # both rankings of a query share one, and so do queries of the same principal
def _filter(visible: Visible) -> Any:  # noqa: ANN401 - the engine publishes no types
    return edge.Filter(
        must=[
            edge.FieldCondition("tenant", match=edge.MatchAny(list(visible.tenants))),
            edge.FieldCondition("access", match=edge.MatchAny(list(visible.access))),
        ]
    )


def _sparse(vector: Any) -> Sparse:  # noqa: ANN401 - the engine publishes no types
    if vector is None:  # a text without a single term
        return Sparse((), ())
    pairs = sorted(zip(vector.indices, vector.values, strict=True))
    return Sparse(tuple(index for index, _ in pairs), tuple(value for _, value in pairs))
