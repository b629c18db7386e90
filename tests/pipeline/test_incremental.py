"""An incremental build equals a build from scratch, and embeds exactly the texts that nobody embedded before."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goldgate.pipeline import edge as edge_module
from goldgate.pipeline import index as index_module
from goldgate.pipeline.embed import CHUNKS_FILE, COUNTS_FILE, EMBEDDINGS_FILE, EmbedCounts, embed
from goldgate.pipeline.embedder import load_embedder
from goldgate.pipeline.index import index, open_collection
from goldgate.pipeline.params import ChunkParams, EmbedParams, IndexParams, RetrieveParams
from goldgate.pipeline.parquet import read_records, write_records
from goldgate.pipeline.schema import Chunk, Document, Passage, Principal
from goldgate.pipeline.store import Store
from goldgate.pipeline.stream import ray_session
from tests.pipeline.corpus import document

CHUNK = ChunkParams(max_tokens=24, overlap_tokens=6)
NAMES = [f"{folder}{letter}.md" for folder in ("", "deep/") for letter in "abcd"]
QUERIES = ["What may a gate never pass?", "how to roll back a release", "Fact 7", "Sprache"]
PRINCIPALS = [Principal()] * len(QUERIES)
PARAGRAPHS = [
    "# The gate\n\nThe gate compares a candidate with production. It never passes what was not measured.",
    "# Releases\n\n## Promote\n\nA release is immutable; production points to one of them.",
    "Rolling back moves the pointer. It needs no judge, no model and no network, only the release that was there.",
    "| metric | floor |\n|---|---|\n| evidence recall | 0.8 |\n| abstention | 0.9 |",
    "- one\n- two\n- three\n",
    "Ein Satz auf Deutsch mit Umlauten: äöü. 日本語の文。",
    "A vector depends only on its text. " * 6,
    "Short.",
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
    return [document(name, "\n\n".join(parts)) for name, parts in corpus.items()]


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

    def collection(self, digest: str) -> tuple[bytes, list[list[Passage]]]:
        """The collection's export, and the ranked passages of fixed queries with their scores."""
        vectors = load_embedder(self.params, "float32").embed_queries(QUERIES)
        collection = open_collection(digest, self.store)
        try:
            return collection.export(), collection.query(vectors, QUERIES, PRINCIPALS, RetrieveParams())
        finally:
            collection.close()


def check(start: dict[str, list[str]], script: list[Edit], builder: Builder, scratch: Builder) -> str:
    """Build after every edit in one store, and the last state from scratch in another; returns the generation."""
    corpus = start
    builder.build(corpus)
    for edit in script:
        corpus = edit.apply(corpus)
        builder.build(corpus)
    scratch.build(corpus)
    assert builder.result() == scratch.result()
    assert builder.manifest(corpus) == scratch.manifest(corpus)
    return builder.manifest(corpus)[0]


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish generations without loading their collections."""
    monkeypatch.setattr(index_module, "open_collection", lambda *given: io.BytesIO())


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what the child process does to load a collection, without starting one for each."""
    monkeypatch.setattr(index_module, "build_shard", lambda source, out, progress: edge_module._build(source, out))


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


@settings(RELAXED, max_examples=15)
@given(start=corpora, script=scripts)
def test_its_collection_and_its_rankings_are_equal_too(
    in_this_process: None, pair: Pair, start: dict[str, list[str]], script: list[Edit]
) -> None:
    builder, scratch = pair()
    digest = check(start, script, builder, scratch)
    assert builder.collection(digest) == scratch.collection(digest)


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

START = {"a.md": [PARAGRAPHS[0], PARAGRAPHS[2]], "b.md": [PARAGRAPHS[1]], "deep/c.md": [PARAGRAPHS[5]]}
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
    exported, ranked = grown.collection(digest)
    assert (exported, ranked) == scratch.collection(digest)
    assert all(ranked)  # every query found something to rank
