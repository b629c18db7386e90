"""documents, chunks and embeddings Parquet -> an immutable generation and its Qdrant collection.

A generation is three Parquet files and a manifest, named by what they hold; it is the artifact. The collection is
derived from it: a Qdrant Edge shard in the store, or a collection on the Qdrant server that QDRANT_URL names. It may be
deleted and is built again when it is absent or damaged. A shard grows out of the nearest earlier one where there is
one, and equals one built from scratch. Both steps end in a rename, so that running again after an interruption, or
twice, gives the same digest and builds nothing twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from goldgate.pipeline.collection import (
    CHUNKS,
    DOCUMENTS,
    EMBEDDING_COLUMNS,
    EMBEDDINGS,
    Collection,
    Progress,
    RankedCollection,
    read_vectors,
)
from goldgate.pipeline.difference import find_difference
from goldgate.pipeline.edge import (
    MANIFEST,
    Bm25,
    DamagedCollection,
    Difference,
    build_shard,
    can_grow,
    check_shard,
    open_shard,
)
from goldgate.pipeline.errors import EnvironmentFailure, GoldgateError, Refused, UsageError
from goldgate.pipeline.params import IndexParams, parse_record
from goldgate.pipeline.parquet import arrow_schema, read_records, read_schema, read_table
from goldgate.pipeline.schema import FORMAT_VERSION, Chunk, Document, Generation, Unreadable
from goldgate.pipeline.store import Store, digest_file, digest_json, json_bytes, replace_files

__all__ = ["Collection", "index", "load_generation", "open_collection", "read_documents_of"]

SERVER_VARIABLE = "QDRANT_URL"
"""Address of a Qdrant server; where it is set the collection lives there and not in the store."""

_PARQUETS = (DOCUMENTS, CHUNKS, EMBEDDINGS)
_EMBED_RECORD = "embed.json"
_GENERATION_RECORD = "generation.json"
_WAIT_S = 900.0  # for another process that builds the same collection
_MOST_COMPARED = 16  # earlier collections, the newest ones


def index(
    build: Path,
    params: IndexParams,
    store: Store,
    unreadable: Sequence[Unreadable] = (),
    progress: Progress | None = None,
) -> Generation:
    """Publish the generation of the folder `build`, build its collection, and write `build/generation.json`.

    Raises UsageError when the files of `build` are absent or do not belong together, EnvironmentFailure when disk,
    engine or server fail; the store then holds what it held, or in addition the complete generation.
    """
    generation = _describe(build, params, unreadable)
    store.publish("generations", generation.digest, lambda folder: _copy_generation(build, generation, folder))
    prepare_collection(generation, store, progress)
    replace_files(build, [_GENERATION_RECORD], lambda out: _write(out / _GENERATION_RECORD, generation))
    return generation


def prepare_collection(generation: Generation, store: Store, progress: Progress | None = None) -> None:
    """Build the collection of a generation where it is absent or damaged. Raises as `open_collection` does."""
    if os.environ.get(SERVER_VARIABLE):
        open_collection(generation.digest, store, progress).close()
        return
    _verified_folder(generation, store)
    if not _ensure_shard(generation, store, progress):
        _repair_shard(generation, store, progress)


def open_collection(generation_digest: str, store: Store, progress: Progress | None = None) -> Collection:
    """Open the collection of a generation, building it where it is absent or damaged.

    Raises Refused for a generation that the store does not hold, EnvironmentFailure when the generation's files differ
    from its manifest or were indexed by another BM25 than the installed one, or when the engine fails.
    """
    generation = load_generation(generation_digest, store)
    folder = _verified_folder(generation, store)
    terms = Bm25()
    url = os.environ.get(SERVER_VARIABLE)
    if url:
        from goldgate.pipeline.server import open_server

        return RankedCollection(open_server(url, generation, folder, terms, progress), terms)
    _ensure_shard(generation, store, progress)
    try:
        engine = open_shard(store.path("collections", generation.digest), generation)
    except DamagedCollection:
        _repair_shard(generation, store, progress)
        engine = open_shard(store.path("collections", generation.digest), generation)
    return RankedCollection(engine, terms)


def load_generation(digest: str, store: Store) -> Generation:
    """Read a generation's manifest. Raises Refused when the store does not hold it, UsageError for a newer format,
    EnvironmentFailure when the manifest is not the one of that name."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise UsageError(f"{digest!r:.80} is no digest of a generation", "64 hexadecimal digits")
    path = store.path("generations", digest, MANIFEST)
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Refused(f"the store holds no generation {digest}", "", "run goldgate build") from None
    except (OSError, ValueError) as error:
        raise EnvironmentFailure(f"{path} cannot be read: {error}", "", "run goldgate index again") from None
    found = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise UsageError(
            f"generation {digest} has format {found}", f"at most {FORMAT_VERSION}", "use a newer goldgate for it"
        )
    generation = parse_record(raw, Generation, str(path))
    if generation.digest != digest or _digest(generation) != digest:
        raise EnvironmentFailure(f"{path} is damaged: it is not the manifest of its name", "", _AGAIN.format(digest))
    return generation


def read_documents_of(generation: Generation | str, store: Store) -> dict[str, Document]:
    """Read the documents of a generation (or of its digest), by id. Raises as `open_collection` does."""
    manifest = load_generation(generation, store) if isinstance(generation, str) else generation
    path = store.path("generations", manifest.digest, DOCUMENTS)
    _check_bytes(path, manifest)
    return {document.id: document for document in read_records(path, Document)}


# ---------------------------------------------------------------- the generation

_AGAIN = "remove generations/{} from the store and run goldgate index again"


def _describe(build: Path, params: IndexParams, unreadable: Sequence[Unreadable]) -> Generation:
    """Check that the files of `build` belong together and return their manifest."""
    files = {name: _digest_input(build / name) for name in _PARQUETS}
    embedder = _read_embed_record(build / _EMBED_RECORD)
    documents = _read_outlines(build / DOCUMENTS)
    chunks = read_records(build / CHUNKS, Chunk)
    _check_chunks(build, chunks, documents)
    _check_vectors(build / EMBEDDINGS, chunks, int(embedder["dimension"]))
    hnsw = len(chunks) > params.exact_below
    generation = Generation(
        documents=len(documents),
        chunks=len(chunks),
        files=files,
        embedder=embedder["embedder"],
        embedder_name=embedder["name"],
        dtype=embedder["dtype"],
        dimension=int(embedder["dimension"]),
        bm25=Bm25.describe(),
        hnsw=hnsw,
        hnsw_params=params.model_dump(include={"ef_construct", "ef_search"}) | {"m": params.hnsw_m} if hnsw else {},
        parsers=_parsers(documents.values()),
        tenants=tuple(sorted({chunk.tenant for chunk in chunks})),
        unreadable=tuple(sorted(unreadable, key=lambda one: one.id)),
    )
    return generation.model_copy(update={"digest": _digest(generation)})


def _digest(generation: Generation) -> str:
    return digest_json(generation.model_dump(mode="json", exclude={"digest"}))


def _digest_input(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError:
        raise UsageError(
            f"{path} does not exist or cannot be read", "", "run goldgate read and goldgate embed"
        ) from None


def _read_embed_record(path: Path) -> dict[str, str]:
    """Read who made the vectors. The record itself is the embed stage's; four of its fields are needed here."""
    try:
        raw = json.loads(path.read_bytes())
        return {name: str(raw[name]) for name in ("embedder", "name", "dtype", "dimension")}
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "", "run goldgate embed") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}", "what goldgate embed writes", "run goldgate embed") from None


class _Outline(NamedTuple):
    """What a manifest and its chunks have to do with a document."""

    tenant: str
    access: tuple[str, ...]
    characters: int
    media_type: str
    parser: str


def _read_outlines(path: Path) -> dict[str, _Outline]:
    """Read the outline of every document, by id. The blocks, which are most of the work, are left alone."""
    schema = read_schema(path)
    if not schema.equals(arrow_schema(Document)):
        raise UsageError(f"{path} holds other records", "Document records", "run goldgate read")
    table = read_table(path, ["id", "tenant", "access", "text", "media_type", "parser"])
    ids, tenants, access, texts, media_types, parsers = (column.to_pylist() for column in table.columns)
    outlines = map(_Outline, tenants, map(tuple, access), map(len, texts), media_types, parsers)
    return dict(zip(ids, outlines, strict=True))


def _check_chunks(build: Path, chunks: Sequence[Chunk], documents: Mapping[str, _Outline]) -> None:
    """Refuse chunks of other documents: who may see a passage is decided by what is written in it."""
    if not chunks:
        raise UsageError(f"{build / CHUNKS} holds no chunks", "at least one", "give documents with text")
    seen: set[str] = set()
    for chunk in chunks:
        document = documents.get(chunk.document)
        if document is None:
            problem = "its document is absent"
        elif (chunk.tenant, chunk.access) != (document.tenant, document.access):
            problem = "tenant or access labels differ from its document's"
        elif chunk.end > document.characters:
            problem = "its span is outside the document"
        elif chunk.id in seen:
            problem = "its id occurs twice"
        elif not _is_uuid(chunk.id):
            problem = "its id is not a UUID"
        else:
            seen.add(chunk.id)
            continue
        raise UsageError(f"{build / CHUNKS}: chunk {chunk.id} of {chunk.document}: {problem}", "", "run goldgate embed")


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _check_vectors(path: Path, chunks: Sequence[Chunk], dimension: int) -> None:
    ids = read_table(path, EMBEDDING_COLUMNS).column(EMBEDDING_COLUMNS[0]).to_pylist()
    if ids != [chunk.id for chunk in chunks]:
        raise UsageError(f"{path} and {CHUNKS} hold different chunks", "one vector per chunk", "run goldgate embed")
    vectors = read_vectors(path)
    if vectors.shape != (len(chunks), dimension) or not np.isfinite(vectors).all():
        raise UsageError(
            f"{path} holds vectors of shape {vectors.shape}, or numbers that are not finite",
            f"finite vectors of {dimension} dimensions",
            "run goldgate embed",
        )


def _parsers(documents: Iterable[_Outline]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for document in documents:
        found.setdefault(document.media_type, set()).add(document.parser)
    return {media_type: ", ".join(sorted(parsers)) for media_type, parsers in sorted(found.items())}


def _copy_generation(build: Path, generation: Generation, folder: Path) -> None:
    for name, digest in generation.files.items():
        shutil.copyfile(build / name, folder / name)
        if digest_file(folder / name) != digest:
            raise Refused(f"{build / name} changed while it was indexed", "", "run goldgate index again")
    _write(folder / MANIFEST, generation)


def _write(path: Path, generation: Generation) -> None:
    path.write_bytes(json_bytes(generation))


def _verified_folder(generation: Generation, store: Store) -> Path:
    """Return the folder of a generation after comparing its files with its manifest, and its BM25 with ours."""
    folder = store.path("generations", generation.digest)
    for name in _PARQUETS:
        _check_bytes(folder / name, generation)
    if generation.bm25 != Bm25.describe():
        mine, theirs = Bm25.describe()["version"], generation.bm25.get("version")
        raise EnvironmentFailure(
            f"generation {generation.digest} was indexed by another BM25 ({theirs}) than this one ({mine})",
            "the same for indexing and querying",
            "install that version, or run goldgate index again",
        )
    return folder


def _check_bytes(path: Path, generation: Generation) -> None:
    try:
        found = digest_file(path)
    except OSError as error:
        raise EnvironmentFailure(
            f"{path} cannot be read: {error.strerror}", "", _AGAIN.format(generation.digest)
        ) from None
    if found != generation.files.get(path.name):
        raise EnvironmentFailure(
            f"{path} differs from its manifest",
            f"SHA-256 {generation.files.get(path.name)}",
            _AGAIN.format(generation.digest),
        )


# ---------------------------------------------------------------- the collection in the store


def _ensure_shard(generation: Generation, store: Store, progress: Progress | None) -> bool:
    """Build the shard where there is none; says whether that was done."""
    digest = generation.digest
    if store.has("collections", digest):
        return False
    with store.lock(f"collection-{digest[:12]}", wait_s=_WAIT_S):
        if store.has("collections", digest):  # a second builder finds it published
            return False
        source, difference = store.path("generations", digest), _difference(generation, store)
        store.publish("collections", digest, lambda out: build_shard(source, out, progress, difference))
    return True


def _difference(generation: Generation, store: Store) -> Difference | None:
    """How the collection differs from the nearest one in the store, if one is near enough."""
    try:
        entries = [(entry.stat().st_mtime_ns, entry) for entry in store.path("collections").iterdir()]
        newest = [entry.name for _, entry in sorted(entries, reverse=True) if can_grow(entry)]
        return find_difference(generation, _earlier(newest, store), store)
    except (OSError, GoldgateError):  # none yet, or removed meanwhile: it is built from scratch
        return None


def _earlier(digests: Sequence[str], store: Store) -> list[Generation]:
    earlier = []
    for digest in digests[:_MOST_COMPARED]:
        with contextlib.suppress(GoldgateError):  # its generation was removed, or is damaged
            earlier.append(load_generation(digest, store))
    return earlier


def _repair_shard(generation: Generation, store: Store, progress: Progress | None) -> None:
    """Build the shard again where the one in the store is damaged."""
    folder = store.path("collections", generation.digest)
    with store.lock(f"collection-{generation.digest[:12]}", wait_s=_WAIT_S):
        if folder.is_dir():
            try:
                check_shard(folder)  # another process may have built it anew meanwhile
            except DamagedCollection:
                with store.temporary() as trash:
                    folder.rename(trash / "damaged")
    _ensure_shard(generation, store, progress)
