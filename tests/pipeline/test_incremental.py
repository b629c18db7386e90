"""An incremental build equals a build from scratch, and embeds exactly the texts that nobody embedded before."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goldgate.pipeline import edge as edge_module
from goldgate.pipeline import embed as embed_module
from goldgate.pipeline import index as index_module
from goldgate.pipeline import shard
from goldgate.pipeline import stream as stream_module
from goldgate.pipeline.chunk import chunk_document
from goldgate.pipeline.collection import Point
from goldgate.pipeline.embed import CHUNKS_FILE, COUNTS_FILE, EMBEDDINGS_FILE, EmbedCounts, embed
from goldgate.pipeline.embedder import load_embedder
from goldgate.pipeline.index import index, open_collection
from goldgate.pipeline.params import ChunkParams, EmbedParams, IndexParams, RetrieveParams
from goldgate.pipeline.parquet import read_records, write_records
from goldgate.pipeline.schema import Chunk, Document, Passage, Principal
from goldgate.pipeline.store import Store
from goldgate.pipeline.stream import Piece, Work, ray_session
from tests.pipeline.corpus import document

CHUNK = ChunkParams(max_tokens=24, overlap_tokens=6)
NAMES = [f"{folder}{letter}.md" for folder in ("", "deep/") for letter in "abcd"]
QUERIES = ["What may a gate never pass?", "how to roll back a release", "Fact 7", "Sprache", "operators and facts"] * 2
PRINCIPALS = [Principal()] * 5 + [Principal(labels=("ops",))] * 5
FOR_OPERATORS = "This document is for operators only."
"""A document with this paragraph gets an access label: its other chunks keep their ids and change what is stored."""

PARAGRAPHS = [
    "# The gate\n\nThe gate compares a candidate with production. It never passes what was not measured.",
    "# Releases\n\n## Promote\n\nA release is immutable; production points to one of them.",
    "Rolling back moves the pointer. It needs no judge, no model and no network, only the release that was there.",
    "| metric | floor |\n|---|---|\n| evidence recall | 0.8 |\n| abstention | 0.9 |",
    "- one\n- two\n- three\n",
    "Ein Satz auf Deutsch mit Umlauten: äöü. 日本語の文。",
    "A vector depends only on its text. " * 6,
    "Short.",
    FOR_OPERATORS,
]


@dataclass(frozen=True)
class Edit:
    """One edit of a corpus; it does nothing where its document is not there."""

    kind: str
    name: str
    place: int
    text: str
    other: str

    def apply(self, corpus: dict[str, list[str]]) -> dict[str, list[str]]:
        """Name -> paragraphs, in the order in which the documents are handed over."""
        after = {name: list(parts) for name, parts in corpus.items()}
        if self.kind == "add":
            after.setdefault(self.name, []).append(self.text)
        elif self.kind == "edit" and self.name in after:
            after[self.name][self.place % len(after[self.name])] = self.text
        elif self.kind == "delete" and len(after) > 1:
            after.pop(self.name, None)
        elif self.kind == "rename" and self.name in after and self.other not in after:
            after[self.other] = after.pop(self.name)
        elif self.kind == "reorder":
            names = list(after)
            cut = self.place % len(names)
            after = {name: after[name] for name in reversed(names[cut:] + names[:cut])}
        return after


paragraphs = st.sampled_from(PARAGRAPHS) | st.integers(0, 99).map(lambda n: f"Fact {n} has the value {n * n}.")
edits = st.builds(
    Edit,
    kind=st.sampled_from(["add", "edit", "delete", "rename", "reorder"]),
    name=st.sampled_from(NAMES),
    place=st.integers(0, 7),
    text=paragraphs,
    other=st.sampled_from(NAMES),
)
corpora = st.dictionaries(st.sampled_from(NAMES), st.lists(paragraphs, min_size=1, max_size=3), min_size=1, max_size=5)
scripts = st.lists(edits, min_size=1, max_size=5)


def documents(corpus: dict[str, list[str]]) -> list[Document]:
    made = ((document(name, "\n\n".join(parts)), FOR_OPERATORS in parts) for name, parts in corpus.items())
    return [one.model_copy(update={"access": ("ops",)}) if restricted else one for one, restricted in made]


@dataclass
class Builder:
    """Builds corpora one after the other in one store, and knows which texts it has seen."""

    folder: Path
    params: EmbedParams
    engine: str
    seen: set[str] = field(default_factory=set)

    @property
    def out(self) -> Path:
        return self.folder / "build"

    @property
    def store(self) -> Store:
        return Store.open(self.folder / "store")

    def build(self, corpus: dict[str, list[str]]) -> EmbedCounts:
        """Embed, and check the count of embedded texts against the texts themselves."""
        counts = embed(documents(corpus), CHUNK, self.params, self.store, self.out, engine=self.engine, dtype="float32")  # type: ignore[arg-type]
        texts = {chunk.text for chunk in read_records(self.out / CHUNKS_FILE, Chunk)}
        assert (counts.embedded, counts.reused) == (len(texts - self.seen), len(texts & self.seen))
        self.seen |= texts
        return counts

    def result(self) -> dict[str, bytes]:
        """The files that must be equal, byte for byte."""
        return {name: (self.out / name).read_bytes() for name in (CHUNKS_FILE, EMBEDDINGS_FILE, COUNTS_FILE)}

    def manifest(self, corpus: dict[str, list[str]]) -> tuple[str, bytes]:
        """The generation's digest and its manifest."""
        ordered = sorted(documents(corpus), key=lambda doc: doc.id)
        write_records(self.out / "documents.parquet", ordered, Document)
        digest = index(self.out, IndexParams(), self.store).digest
        return digest, self.store.path("generations", digest, "manifest.json").read_bytes()

    def base(self, digest: str) -> str:
        """Which collection the one of this generation grew out of; empty when it was built from scratch."""
        return str(json.loads(self.store.path("collections", digest, "collection.json").read_bytes())["base"])

    def collection(self, digest: str) -> tuple[bytes, list[list[Passage]]]:
        """The collection's export, and the ranked passages of fixed queries with their scores."""
        vectors = load_embedder(self.params, "float32").embed_queries(QUERIES)
        collection = open_collection(digest, self.store)
        try:
            return collection.export(), collection.query(vectors, QUERIES, PRINCIPALS, RetrieveParams())
        finally:
            collection.close()


def check(start: dict[str, list[str]], script: list[Edit], builder: Builder, scratch: Builder) -> list[str]:
    """Build after every edit in one store, and the last state from scratch in another; returns the generations."""
    corpora = list(itertools.accumulate(script, lambda corpus, edit: edit.apply(corpus), initial=start))
    digests = []
    for corpus in corpora:
        builder.build(corpus)
        digests.append(builder.manifest(corpus)[0])
    scratch.build(corpora[-1])
    assert builder.result() == scratch.result()
    assert builder.manifest(corpora[-1]) == scratch.manifest(corpora[-1])
    return digests


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish generations without loading their collections."""
    monkeypatch.setattr(index_module, "prepare_collection", lambda *given: None)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what the child process does to load a collection, without starting one for each."""

    def run(job: shard.Job, batches: Iterable[Sequence[Point]], total: int, progress: object) -> int:
        return shard.build(job, ([edge_module._plain(point) for point in points] for points in batches))

    monkeypatch.setattr(edge_module, "_run", run)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Makes pairs of fresh builders."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        numbers = itertools.count()
        yield lambda: tuple(Builder(Path(folder, f"{next(numbers)}"), HASHING, "local") for _ in range(2))  # type: ignore[return-value]


Pair = Callable[[], tuple[Builder, Builder]]
MEMORY = Path("/dev/shm")  # where flushing to the disk, a thousand times here, costs nothing
HASHING = EmbedParams(model="hashing")
REAL = EmbedParams(batch_rows=8)


RELAXED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)  # the fixtures hold no state that examples share


@settings(RELAXED, max_examples=200)
@given(start=corpora, script=scripts)
def test_an_incremental_build_equals_one_from_scratch(
    no_collection: None, pair: Pair, start: dict[str, list[str]], script: list[Edit]
) -> None:
    check(start, script, *pair())


def test_a_grown_collection_equals_one_from_scratch(in_this_process: None, pair: Pair) -> None:
    grown: list[bool] = []

    @settings(RELAXED, max_examples=15)
    @given(start=corpora, script=scripts)
    def holds(start: dict[str, list[str]], script: list[Edit]) -> None:
        builder, scratch = pair()
        digests = check(start, script, builder, scratch)
        grown.extend(builder.base(digest) != "" for digest in digests)
        assert scratch.base(digests[-1]) == ""
        assert builder.collection(digests[-1]) == scratch.collection(digests[-1])

    holds()
    assert sum(grown) >= 10  # the difference is what was tried, and not a load of everything


STEADY = {f"steady/{number}.md": [f"Fact {number} is {number * number}."] for number in range(30)}
BEFORE = {**STEADY, "a.md": PARAGRAPHS[:3], "b.md": PARAGRAPHS[5:7], "c.md": [PARAGRAPHS[4]]}
AFTER = {**STEADY, "a.md": [*PARAGRAPHS[:3], FOR_OPERATORS], "b.md": PARAGRAPHS[6:7], "d.md": [PARAGRAPHS[4]]}


def grow(builder: Builder) -> tuple[str, bytes]:
    """Build BEFORE, then AFTER; returns what the second collection grew out of, and its content."""
    for corpus in (BEFORE, AFTER):
        builder.build(corpus)
        digest, _ = builder.manifest(corpus)
    return builder.base(digest), builder.collection(digest)[0]


def from_scratch(builder: Builder) -> bytes:
    builder.build(AFTER)
    return builder.collection(builder.manifest(AFTER)[0])[0]


def test_skipped_deletions_are_noticed_and_wrong_ones_would_be_seen(
    in_this_process: None, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The property test can fail; and points too many or too few bring a build back to scratch."""
    builder, scratch = pair()
    base, content = grow(builder)
    assert base
    assert content == from_scratch(scratch)
    one, two = pair()
    monkeypatch.setattr(shard, "_delete", lambda opened, ids: None)
    assert grow(one) == ("", content)
    delete, steady = shard.edge.UpdateOperation.delete_points, [chunk.id for chunk in chunks_of(scratch, STEADY)]
    monkeypatch.setattr(shard, "_delete", lambda opened, ids: opened.update(delete(steady[: len(ids)])))
    base, wrong = grow(two)
    assert base
    assert wrong != content
    assert len(wrong.splitlines()) == len(content.splitlines())


def chunks_of(builder: Builder, names: Collection[str]) -> list[Chunk]:
    return [chunk for chunk in read_records(builder.out / CHUNKS_FILE, Chunk) if chunk.document in names]


def test_changed_labels_that_are_overlooked_would_be_seen(
    in_this_process: None, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, scratch = pair()

    def only_new(mine: Any, theirs: Any) -> list[int]:
        return sorted(row for chunk, row in mine.rows.items() if chunk not in theirs.rows)

    monkeypatch.setattr("goldgate.pipeline.difference._Points.differing", only_new)
    base, content = grow(builder)
    assert base
    assert content != from_scratch(scratch)


def test_a_document_that_did_not_change_is_not_divided_again(
    tmp_path: Path, no_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided: list[str] = []

    def chunk(doc: Document, *more: Any) -> list[Chunk]:
        divided.append(doc.id)
        return chunk_document(doc, *more)

    monkeypatch.setattr(stream_module, "chunk_document", chunk)
    builder = Builder(tmp_path, HASHING, "local")
    builder.build(BEFORE)
    builder.manifest(BEFORE)
    assert sorted(divided) == sorted(BEFORE)
    divided.clear()
    builder.build(AFTER)
    assert sorted(divided) == ["a.md", "b.md", "d.md"]
    builder.manifest(AFTER)
    divided.clear()
    builder.build({**AFTER, "c.md": BEFORE["c.md"]})
    assert divided == ["c.md"]
    divided.clear()
    builder.build(BEFORE)  # back: the generation that shares most is found, not the last one
    assert divided == []
    monkeypatch.setattr(stream_module, "chunk_document", chunk_document)
    for path in builder.store.path("made").iterdir():
        path.write_bytes(b"{")
    counts = builder.build(AFTER)
    assert counts.documents == len(AFTER)


def test_few_changes_start_no_ray(tmp_path: Path, no_collection: None, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder(tmp_path, HASHING, "local")
    builder.build(BEFORE)
    builder.manifest(BEFORE)
    started: list[Work] = []

    def over_ray(work: Work, report: object) -> Generator[Piece, None, None]:
        started.append(work)
        yield from ()

    monkeypatch.setattr(embed_module, "ray_pieces", over_ray)
    builder.engine = "ray"
    assert builder.build(AFTER).chunks
    assert builder.build(AFTER).embedded == 0
    assert started == []
    monkeypatch.setattr(embed_module, "CHARACTERS_PER_BLOCK", 10)
    embed(documents(AFTER), CHUNK, HASHING, builder.store, builder.out, engine="ray")
    assert [[doc.id for doc in work.documents] for work in started] == [["a.md", "b.md", "d.md"]]


def test_editing_one_document_embeds_its_changed_chunks_only(tmp_path: Path) -> None:
    corpus = {f"{number}.md": [f"Document {number} holds one fact.", "All hold this one."] for number in range(50)}
    builder = Builder(tmp_path, HASHING, "local")
    assert builder.build(corpus).documents == 50
    before = set(builder.seen)
    counts = builder.build({**corpus, "7.md": ["Document 7 holds another fact.", "All hold this one."]})
    assert counts.embedded == len(builder.seen - before) == 1


def test_a_renamed_document_embeds_nothing(tmp_path: Path) -> None:
    builder = Builder(tmp_path, HASHING, "local")
    builder.build({"old.md": ["One.", "Two."], "other.md": ["Three."]})
    assert builder.build({"new.md": ["One.", "Two."], "other.md": ["Three."]}).embedded == 0
    assert {chunk.document for chunk in read_records(builder.out / CHUNKS_FILE, Chunk)} == {"new.md", "other.md"}


def test_a_vector_that_is_not_its_texts_would_be_seen(tmp_path: Path) -> None:
    """The property test can fail: a store whose vectors belong to other texts gives other bytes."""
    import goldgate.pipeline.vectors as vectors

    builder, scratch = Builder(tmp_path / "a", HASHING, "local"), Builder(tmp_path / "b", HASHING, "local")
    corpus = {"a.md": ["One fact."], "b.md": ["Another fact."]}
    builder.build(corpus)
    shard = next(builder.store.path("embeddings").rglob("*.parquet"))
    table = vectors.read_table(shard)
    keys = table.column("key").to_pylist()
    wrong = vectors.vector_table("key", keys[::-1], vectors.vectors_of(table, shard))
    shard.unlink()
    vectors.write_table(shard, wrong)
    shard.rename(shard.with_name(f"{vectors.digest_file(shard)}.parquet"))
    builder.build(corpus)
    scratch.build(corpus)
    assert builder.result()[EMBEDDINGS_FILE] != scratch.result()[EMBEDDINGS_FILE]
    assert builder.result()[CHUNKS_FILE] == scratch.result()[CHUNKS_FILE]


# ---------------------------------------------------------------- Ray Data and the real embedder

START = {**STEADY, "a.md": [PARAGRAPHS[0], PARAGRAPHS[2]], "b.md": [PARAGRAPHS[1]], "deep/c.md": [PARAGRAPHS[5]]}
SCRIPTS = {
    "add": [Edit("add", "d.md", 0, PARAGRAPHS[6], ""), Edit("add", "a.md", 0, PARAGRAPHS[3], "")],
    "edit": [Edit("edit", "a.md", 1, "Rolling back takes a minute.", ""), Edit("edit", "b.md", 0, PARAGRAPHS[4], "")],
    "delete": [Edit("delete", "b.md", 0, "", ""), Edit("add", "b.md", 0, PARAGRAPHS[1] + " New words.", "")],
    "rename": [Edit("rename", "a.md", 0, "", "deep/z.md"), Edit("add", "a.md", 0, PARAGRAPHS[7], "")],
    "reorder": [Edit("reorder", "a.md", 1, "", ""), Edit("edit", "deep/c.md", 0, PARAGRAPHS[6], "")],
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """One store that every script below goes on with, over one Ray."""
    with ray_session(1):
        builder = Builder(tmp_path_factory.mktemp("grown"), REAL, "ray")
        builder.build(START)
        builder.manifest(START)
        yield builder


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_over_ray_with_the_real_embedder(grown: Builder, tmp_path: Path, name: str) -> None:
    """Grown edit by edit over Ray Data; from scratch in this process."""
    corpus = START
    for edit in SCRIPTS[name]:
        corpus = edit.apply(corpus)
    assert corpus != START
    grown.build(corpus)
    scratch = Builder(tmp_path, REAL, "local")
    scratch.build(corpus)
    assert grown.result() == scratch.result()
    digest, manifest = grown.manifest(corpus)
    assert (digest, manifest) == scratch.manifest(corpus)
    assert grown.base(digest)
    assert not scratch.base(digest)
    exported, ranked = grown.collection(digest)
    assert (exported, ranked) == scratch.collection(digest)
    assert all(ranked)  # every query found something to rank
