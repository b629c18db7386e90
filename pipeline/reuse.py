"""store -> what earlier builds made of the same input: documents that need not be parsed again, and their chunks.

Every generation keeps its documents and its chunks. `made/<SHA-256 of such a file>-<maker>.json` says that they were
made by a maker: one digest over code, library versions and parameters. Where that is still the same, a file with the
same bytes is not parsed again, and a document that is still the same is not divided again. This decides how long a
build takes and nothing else: a record that is absent, damaged or of another maker is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import ChunkParams, ReadParams
from goldgate.pipeline.parquet import arrow_schema, read_records, read_table
from goldgate.pipeline.schema import FORMAT_VERSION, Chunk, Document, Record
from goldgate.pipeline.store import Store, digest_file, digest_json, json_bytes

MADE = "made"
_DOCUMENTS, _CHUNKS, _MANIFEST = "documents.parquet", "chunks.parquet", "manifest.json"
_MOST_COMPARED = 16  # generations, the newest ones

_READ_CODE = (
    "read.py", "metadata.py", "parse.py", "parsed.py", "markdown.py", "restructured.py", "hypertext.py", "schema.py",
)  # fmt: skip
_READ_LIBRARIES = ("markdown-it-py", "docutils", "lxml", "pypdf", "mammoth", "pyyaml")
_CHUNK_CODE = ("chunk.py", "sentences.py", "parsed.py", "schema.py")
_CHUNK_LIBRARIES = ("semantic-text-splitter", "tokenizers")


class Made(Record):
    """By what the rows of a Parquet file were made, and out of what."""

    format_version: int = FORMAT_VERSION
    maker: str = Field(description="Digest of code, library versions and parameters.")
    sources: dict[str, str] = Field(description="Document id -> digest of what its rows were made of.")
    notes: dict[str, tuple[str, ...]] = Field({}, description="Document id -> what reading it has to tell.")


# ---------------------------------------------------------------- documents


class ReadBefore:
    """Documents of an earlier generation, by id, for `read_documents`; and the record of the ones read now."""

    def __init__(self, store: Store, params: ReadParams) -> None:
        """Nothing is looked for before `look`."""
        self._store = store
        # max_bytes decides how far a compressed document may expand; the other parameters choose files.
        self._maker = _maker(_READ_CODE, _READ_LIBRARIES, params.model_dump(mode="json", include={"max_bytes"}))
        self._documents: dict[str, Document] = {}
        self._notes: Mapping[str, tuple[str, ...]] = {}
        self._made: dict[str, Document] = {}
        self._made_notes: dict[str, tuple[str, ...]] = {}

    def look(self, ids: Iterable[str]) -> None:
        """Load the documents of the generation that shares most ids with `ids`."""
        wanted = set(ids)
        found = _nearest(self._store, _DOCUMENTS, self._maker, lambda made: len(wanted & made.sources.keys()))
        if found is not None:
            path, made = found
            self._documents = {document.id: document for document in read_records(path, Document)}
            self._notes = made.notes

    def get(self, identity: str, digest: str) -> tuple[Document, tuple[str, ...]] | None:
        """The document with that id as it was made from the same bytes, and its notes."""
        document = self._documents.get(identity)
        if document is None or document.digest != digest:
            return None
        return document, self._notes.get(identity, ())

    def keep(self, document: Document, notes: tuple[str, ...]) -> None:
        """Note a document of this build."""
        self._made[document.id] = document
        if notes:
            self._made_notes[document.id] = notes

    def remember(self, path: Path) -> None:
        """Record by what the documents of `path`, which was just written, were made. Raises EnvironmentFailure."""
        sources = {identity: document.digest for identity, document in self._made.items()}
        _remember(self._store, path, Made(maker=self._maker, sources=sources, notes=self._made_notes))


# ---------------------------------------------------------------- chunks


class ChunkedBefore:
    """Chunks of an earlier generation, for `embed`; and the record of the ones made now."""

    def __init__(self, store: Store, params: ChunkParams, embedder: str, documents: Sequence[Document]) -> None:
        """Find the generation that shares most of `documents`; `embedder` is a digest that covers the tokenizer."""
        parameters = {**params.model_dump(mode="json"), "embedder": embedder}
        self._store = store
        self._maker = _maker(_CHUNK_CODE, _CHUNK_LIBRARIES, parameters)
        self._sources = {document.id: _fingerprint(document) for document in documents}
        found = _nearest(store, _CHUNKS, self._maker, lambda made: len(self._unchanged(made)))
        self.documents: frozenset[str] = frozenset()
        """Ids of the documents whose chunks are known."""
        self.chunks: pa.Table = arrow_schema(Chunk).empty_table()
        """Their chunks."""
        if found is not None:
            path, made = found
            table = read_table(path).cast(self.chunks.schema)
            self.documents = frozenset(self._unchanged(made))
            wanted = pa.array(sorted(self.documents), pa.string())
            self.chunks = table.filter(pc.is_in(table.column("document"), value_set=wanted))

    def _unchanged(self, made: Made) -> set[str]:
        return {identity for identity, digest in self._sources.items() if made.sources.get(identity) == digest}

    def remember(self, path: Path) -> None:
        """Record by what the chunks of `path`, which was just written, were made. Raises EnvironmentFailure."""
        _remember(self._store, path, Made(maker=self._maker, sources=self._sources))


def _fingerprint(document: Document) -> str:
    return hashlib.sha256(document.model_dump_json().encode()).hexdigest()


# ---------------------------------------------------------------- both


def _maker(code: Sequence[str], libraries: Sequence[str], parameters: Mapping[str, object]) -> str:
    folder = Path(__file__).parent
    return digest_json(
        {
            "code": {name: (folder / name).read_text(encoding="utf-8") for name in code},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
            "parameters": dict(parameters),
        }
    )


def _nearest(store: Store, name: str, maker: str, shared: Callable[[Made], int]) -> tuple[Path, Made] | None:
    """The file `name` of the generation by the same maker that shares most, the newest among equals."""
    best: tuple[int, Path, Made] | None = None
    for folder in _newest(store.path("generations")):
        try:
            digest = json.loads((folder / _MANIFEST).read_bytes())["files"][name]
            made = Made.model_validate_json(_record(store, digest, maker).read_bytes())
            if made.maker != maker or (best is not None and shared(made) <= best[0]):
                continue
            if digest_file(folder / name) == digest:
                best = (shared(made), folder / name, made)
        except (OSError, ValueError, KeyError, TypeError, UsageError):
            continue
    return None if best is None or best[0] == 0 else best[1:]


def _newest(folder: Path) -> list[Path]:
    try:
        entries = sorted(((entry.stat().st_mtime_ns, entry) for entry in folder.iterdir()), reverse=True)
    except OSError:  # none yet
        return []
    return [entry for _, entry in entries[:_MOST_COMPARED]]


def _remember(store: Store, path: Path, made: Made) -> None:
    record = _record(store, digest_file(path), made.maker)
    store.write_bytes(record.relative_to(store.root).as_posix(), json_bytes(made))


def _record(store: Store, digest: str, maker: str) -> Path:
    return store.path(MADE, f"{digest}-{maker[:16]}.json")
