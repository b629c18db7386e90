"""index: one contract for every engine, and the generation on disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient

from goldgate.pipeline import edge as edge_module
from goldgate.pipeline.collection import (
    EMBEDDINGS,
    Collection,
    Point,
    RankedCollection,
    Ranking,
    read_points,
    visible_to,
)
from goldgate.pipeline.edge import Bm25, EdgeEngine, open_shard
from goldgate.pipeline.embedder import Embedder, load_embedder
from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.index import index, load_generation, open_collection, read_documents_of
from goldgate.pipeline.params import EmbedParams, IndexParams, RetrieveParams
from goldgate.pipeline.parquet import write_embeddings
from goldgate.pipeline.schema import PUBLIC, Document, Generation, Passage, Principal, Unreadable
from goldgate.pipeline.server import collection_name, load_collection
from goldgate.pipeline.store import Store
from tests.pipeline.builds import chunks_of, document, hashing_embedder, write_build

ANYONE = Principal()
SERVER_URL = os.environ.get("QDRANT_URL")
SERVER = ["server"] if SERVER_URL else []
ENGINES = ["edge", "local-memory", "local-path", *SERVER]

WORDS = [
    "index", "query", "filter", "tenant", "vector", "ranking", "weight", "fusion", "generation", "manifest", "digest",
    "collection", "chunk", "passage", "answer", "release", "gate", "verdict", "margin", "floor", "baseline", "embedder",
]  # fmt: skip


def corpus() -> list[Document]:
    """Documents of three tenants with labels, duplicates, other scripts, and a text of stop words only."""
    pick = random.Random(7)
    tenants, labels = [PUBLIC, "acme", "Überwald"], [(), ("ops",), ("ops", "legal"), ("*",), ("機密",)]
    made = [
        document(
            f"guide/{number:02}.md",
            "\n\n".join(" ".join(pick.choices(WORDS, k=pick.randint(3, 30))) for _ in range(pick.randint(1, 4))),
            tenant=tenants[number % 3],
            access=labels[number % 5],
        )
        for number in range(40)
    ]
    twins = [document(f"twin/{number}.md", "the same fusion ranking text in every twin") for number in range(8)]
    odd = [
        document("odd/日本.md", "検索エンジン は 文書 を 探す"),
        document("odd/emoji 🧪.md", "naïve café ‐ 🧪 “quoted” \u202e right to left, \x00 and NUL"),
        document("odd/stop.md", "the of and is"),
    ]
    return made + twins + odd


class Opener:
    """Opens the same build in every engine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store.open(root / "store")
        self.opened: list[Collection] = []
        self.made = 0

    def build(self, documents: list[Document], params: IndexParams | None = None) -> Generation:
        self.made += 1
        return index(write_build(self.root / f"build{self.made}", documents), params or IndexParams(), self.store)

    def open(self, engine: str, generation: Generation, shuffled: bool = False) -> Collection:
        if engine == "edge":
            collection = open_collection(generation.digest, self.store)
        else:
            collection = self._client(engine, generation, shuffled)
        self.opened.append(collection)
        return collection

    def _client(self, engine: str, generation: Generation, shuffled: bool) -> Collection:
        terms = Bm25()
        self.made += 1
        location = {
            "local-memory": {"location": ":memory:"},
            "local-path": {"path": str(self.root / f"client{self.made}")},
            "server": {"url": SERVER_URL},
        }[engine]
        client = QdrantClient(**location)
        batches: list[list[Point]] = list(read_points(self.store.path("generations", generation.digest), terms))
        if shuffled:
            points = [point for batch in batches for point in batch]
            random.Random(3).shuffle(points)
            batches = [points]
            client.delete_collection(collection_name(generation))
        loaded = load_collection(client, generation, batches, server=SERVER_URL if engine == "server" else None)
        return RankedCollection(loaded, terms)

    def close(self) -> None:
        for collection in self.opened:
            collection.close()


@pytest.fixture(scope="module", autouse=True)
def _no_server_unless_asked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("QDRANT_URL", raising=False)
        yield


@pytest.fixture(scope="module")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    made = Opener(tmp_path_factory.mktemp("index"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def generation(opener: Opener) -> Generation:
    return opener.build(corpus())


@pytest.fixture(scope="module", params=ENGINES)
def collection(request: pytest.FixtureRequest, opener: Opener, generation: Generation) -> Collection:
    return opener.open(request.param, generation)


@pytest.fixture(scope="module")
def reference(opener: Opener, generation: Generation) -> Collection:
    return opener.open("edge", generation)


def test_the_contract_covers_a_server() -> None:
    """Says in the output of every run whether it did; with the variable set every contract test runs against it."""
    if not SERVER:
        pytest.skip("QDRANT_URL is not set: the contract is not tried against a Qdrant server")
    assert "server" in ENGINES


@pytest.mark.skipif(not SERVER, reason="QDRANT_URL is not set")
def test_the_variable_selects_the_server(
    opener: Opener, generation: Generation, reference: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDRANT_URL", str(SERVER_URL))
    opened = open_collection(generation.digest, opener.store)
    assert opened.export() == reference.export()
    opened.close()
    QdrantClient(url=SERVER_URL).delete_collection(collection_name(generation))


def ask(
    collection: Collection, texts: list[str], principal: Principal = ANYONE, **params: float
) -> list[list[Passage]]:
    vectors = hashing_embedder().embed_queries(texts)
    values = {"top_k": 10, "candidates": 40} | params
    return collection.query(vectors, texts, [principal] * len(texts), RetrieveParams.model_validate(values))


def may_see(principal: Principal, doc: Document) -> bool:
    """schema.Principal in plain words, apart from the code under test."""
    tenant = doc.tenant in (PUBLIC, principal.tenant)
    return tenant and (not doc.access or bool(set(doc.access) & set(principal.labels)))


PRINCIPALS = [
    ANYONE,
    Principal(tenant="acme"),
    Principal(tenant="acme", labels=("ops",)),
    Principal(tenant="Überwald", labels=("legal", "機密")),
    Principal(labels=("*",)),
    Principal(tenant="nobody", labels=("",)),
]


class TestContract:
    """What every engine must do."""

    def test_count(self, collection: Collection, generation: Generation) -> None:
        assert collection.count() == generation.chunks == len(chunks_of(corpus()))

    def test_payload_comes_back_as_it_was_given(self, collection: Collection) -> None:
        chunks = {chunk.id: chunk for chunk in chunks_of(corpus())}
        everything = Principal(tenant="Überwald", labels=("*", "legal", "ops", "機密"))
        found = [p for hits in ask(collection, WORDS, everything, top_k=100, candidates=1000) for p in hits]
        assert len({passage.chunk for passage in found}) > 40
        for passage in found:
            chunk = chunks[passage.chunk]
            shown = passage.model_dump(exclude={"chunk", "score", "similarity"})
            assert shown == chunk.model_dump(include=set(shown))

    def test_text_of_any_script_is_found(self, collection: Collection) -> None:
        texts = ["検索エンジン", "naïve café", "cafe"]
        first = [hits[0].document for hits in ask(collection, texts, dense_weight=0)]
        assert first == ["odd/日本.md", "odd/emoji 🧪.md", "odd/emoji 🧪.md"]

    @pytest.mark.parametrize("weights", [(1, 0), (0, 1), (1, 1)], ids=["dense", "bm25", "both"])
    @pytest.mark.parametrize("principal", PRINCIPALS, ids=str)
    def test_only_visible_passages(
        self, collection: Collection, principal: Principal, weights: tuple[float, float]
    ) -> None:
        documents = {doc.id: doc for doc in corpus()}
        dense, bm25 = weights
        answers = ask(collection, WORDS, principal, dense_weight=dense, bm25_weight=bm25, top_k=100, candidates=1000)
        found = [passage for hits in answers for passage in hits]
        assert len(found) > len(WORDS)
        assert all(may_see(principal, documents[passage.document]) for passage in found)

    @pytest.mark.parametrize("principal", PRINCIPALS, ids=str)
    def test_every_visible_passage_is_reachable(self, collection: Collection, principal: Principal) -> None:
        [hits] = ask(collection, ["index"], principal, top_k=100, candidates=1000)
        visible = {doc.id for doc in corpus() if may_see(principal, doc)}
        expected = {chunk.id for chunk in chunks_of(corpus()) if chunk.document in visible}
        assert len(expected) <= 100
        assert {passage.chunk for passage in hits} == expected

    @pytest.mark.parametrize("params", [
        {}, {"dense_weight": 0}, {"bm25_weight": 0}, {"dense_weight": 0.3, "bm25_weight": 2.5, "rrf_k": 1},
        {"top_k": 3, "candidates": 3}, {"top_k": 1, "candidates": 1}, {"rrf_k": 500},
    ], ids=str)  # fmt: skip
    def test_same_passages_scores_and_order_as_edge(
        self, collection: Collection, reference: Collection, params: dict[str, float]
    ) -> None:
        pick = random.Random(11)
        texts = [" ".join(pick.choices(WORDS, k=pick.randint(1, 6))) for _ in range(10)] + ["twin fusion", "the of"]
        for principal in PRINCIPALS:
            assert ask(collection, texts, principal, **params) == ask(reference, texts, principal, **params)

    def test_ties_are_ordered_by_chunk_id_also_at_the_cut(self, collection: Collection) -> None:
        twins = sorted(chunk.id for chunk in chunks_of(corpus()) if chunk.document.startswith("twin/"))
        for top in (1, 3, 8):
            [hits] = ask(collection, ["the same fusion ranking text in every twin"], top_k=top, candidates=top)
            assert [passage.chunk for passage in hits] == twins[:top]

    def test_similarity_is_the_cosine_also_of_hits_by_words_alone(self, collection: Collection) -> None:
        text = "gate verdict margin"
        [query] = hashing_embedder().embed_queries([text])
        [hits] = ask(collection, [text], dense_weight=0)
        stored = hashing_embedder().embed([passage.text for passage in hits])
        assert [passage.similarity for passage in hits] == pytest.approx((stored @ query).tolist(), abs=2e-6)

    def test_scores_are_weighted_reciprocal_ranks(self, collection: Collection) -> None:
        text, weights = "tenant filter query", {"dense_weight": 0.7, "bm25_weight": 1.9}
        [dense] = ask(collection, [text], bm25_weight=0, top_k=20, candidates=20)
        [bm25] = ask(collection, [text], dense_weight=0, top_k=20, candidates=20)
        [both] = ask(collection, [text], **weights, top_k=20, candidates=20, rrf_k=60)
        expected: dict[str, float] = {}
        for weight, ranking in ((0.7, dense), (1.9, bm25)):
            for rank, passage in enumerate(ranking, start=1):
                expected[passage.chunk] = expected.get(passage.chunk, 0) + weight / (60 + rank)
        assert [p.chunk for p in both] == sorted(expected, key=lambda one: (-expected[one], one))[:20]
        assert [p.score for p in both] == pytest.approx([expected[p.chunk] for p in both])

    def test_a_question_of_stop_words_has_no_ranking_by_words(self, collection: Collection) -> None:
        assert ask(collection, ["the of and"], dense_weight=0) == [[]]

    def test_a_batch_answers_as_single_queries_do(self, collection: Collection) -> None:
        texts = [f"{one} {two}" for one in WORDS for two in WORDS[:4]]
        assert len(texts) > 64
        assert ask(collection, texts) == [ask(collection, [text])[0] for text in texts]
        assert collection.query(np.zeros((0, 4), np.float32), [], [], RetrieveParams()) == []

    def test_each_query_keeps_its_own_principal(self, collection: Collection) -> None:
        texts = ["tenant"] * len(PRINCIPALS)
        vectors = hashing_embedder().embed_queries(texts)
        together = collection.query(vectors, texts, PRINCIPALS, RetrieveParams())
        assert together == [ask(collection, ["tenant"], one, top_k=4)[0] for one in PRINCIPALS]

    def test_a_query_without_its_principal_cannot_be_asked(self, collection: Collection) -> None:
        vectors = hashing_embedder().embed_queries(["index"])
        with pytest.raises(TypeError):
            collection.query(vectors, ["index"], params=RetrieveParams())  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="0 principals"):
            collection.query(vectors, ["index"], [], RetrieveParams())

    def test_export_is_the_same_bytes_in_every_engine(self, collection: Collection, reference: Collection) -> None:
        exported = collection.export()
        assert exported == reference.export()
        ids = [json.loads(line)["id"] for line in exported.splitlines()]
        assert ids == sorted(chunk.id for chunk in chunks_of(corpus()))

    def test_closing_twice_is_fine_and_a_closed_collection_answers_nothing(
        self, request: pytest.FixtureRequest, opener: Opener, generation: Generation
    ) -> None:
        opened = opener.open("edge", generation)
        opened.close()
        opened.close()
        with pytest.raises(EnvironmentFailure):
            opened.count()


@pytest.mark.parametrize("engine", ["local-memory", *SERVER])
def test_export_and_ranking_do_not_depend_on_the_order_of_insertion(
    engine: str, opener: Opener, generation: Generation, reference: Collection
) -> None:
    shuffled = opener.open(engine, generation, shuffled=True)
    assert shuffled.export() == reference.export()
    assert ask(shuffled, WORDS) == ask(reference, WORDS)


def test_a_complete_collection_is_reused_and_an_incomplete_one_is_loaded_again(
    opener: Opener, generation: Generation
) -> None:
    client, terms = QdrantClient(":memory:"), Bm25()
    batches = list(read_points(opener.store.path("generations", generation.digest), terms))
    assert load_collection(client, generation, batches, server=None).count() == generation.chunks
    assert load_collection(client, generation, [], server=None).count() == generation.chunks  # nothing loaded
    client.update_collection(collection_name(generation), metadata={"complete": ""})
    with pytest.raises(EnvironmentFailure, match="holds 0 points"):
        load_collection(client, generation, [], server=None)
    assert load_collection(client, generation, batches, server=None).count() == generation.chunks


def test_an_unreachable_server_is_one_clear_line(
    opener: Opener, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDRANT_URL", "http://user:secret@127.0.0.1:9")
    with pytest.raises(EnvironmentFailure, match=r"Qdrant server at 127\.0\.0\.1:9 failed") as caught:
        open_collection(generation.digest, opener.store)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, {"title": "qdrant", "version": "1.18.2"}, "has version 1.18.2; expected 1.19 or later"),
        (500, {"status": {"error": "broken"}}, "failed: Unexpected Response: 500"),
        (200, {"hello": "world"}, "failed: "),
    ],
    ids=["too old", "broken", "something else"],
)
def test_a_server_that_cannot_be_used_is_refused(
    opener: Opener,
    generation: Generation,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: dict[str, object],
    message: str,
) -> None:
    class Stub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        monkeypatch.setenv("QDRANT_URL", f"http://127.0.0.1:{stub.server_port}")
        with pytest.raises(EnvironmentFailure, match=message):
            open_collection(generation.digest, opener.store)
        stub.shutdown()


# ---------------------------------------------------------------- isolation, for any documents

NAMES = st.sampled_from(["", "*", "**", "a", "A", "public", "ops", "ö", "é", "a b", '"', "\\"])
LABELS = st.lists(NAMES, max_size=3).map(lambda labels: tuple(sorted(set(labels))))
TENANTS = st.sampled_from([PUBLIC, "a", "A", "*", "ö", "public "])
TEXTS = st.lists(st.sampled_from(WORDS[:6]), min_size=1, max_size=6).map(" ".join) | st.text(min_size=1, max_size=20)
DOCUMENTS = st.lists(st.tuples(TEXTS, TENANTS, LABELS), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=DOCUMENTS, tenant=TENANTS, labels=LABELS, question=TEXTS)
def test_nothing_invisible_is_returned_or_even_felt(
    tmp_path: Path, made: list[tuple[str, str, tuple[str, ...]]], tenant: str, labels: tuple[str, ...], question: str
) -> None:
    """For any documents, labels and question: exactly the visible passages, ranked as if no others existed."""
    documents = [document(f"{n}.md", text.replace("\n\n", " "), *who) for n, (text, *who) in enumerate(made)]
    principal = Principal(tenant=tenant, labels=labels)
    visible = [doc for doc in documents if may_see(principal, doc)]
    found = local_answers(tmp_path, documents, question, principal)
    assert {passage.document for passage in found} == {doc.id for doc in visible}
    assert found == (local_answers(tmp_path, visible, question, principal) if visible else [])


def local_answers(folder: Path, documents: list[Document], question: str, principal: Principal) -> list[Passage]:
    terms, embedder = Bm25(), hashing_embedder()
    build = write_build(folder / uuid.uuid4().hex, documents)
    batches = list(read_points(build, terms))
    generation = Generation(
        digest="0" * 64, documents=len(documents), chunks=sum(map(len, batches)), files={}, embedder="", dtype="",
        embedder_name="", dimension=embedder.dimension, bm25={}, hnsw=False, parsers={},
    )  # fmt: skip
    client = QdrantClient(":memory:")
    collection = RankedCollection(load_collection(client, generation, batches, server=None), terms)
    [hits] = ask(collection, [question], principal, top_k=100, candidates=100)
    collection.close()
    shutil.rmtree(build)
    return hits


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=DOCUMENTS, asked=st.lists(st.tuples(TENANTS, LABELS, TEXTS), min_size=8, max_size=8))
def test_nothing_invisible_is_returned_by_edge(
    opener: Opener,
    made: list[tuple[str, str, tuple[str, ...]]],
    asked: list[tuple[str, tuple[str, ...], str]],
) -> None:
    documents = [document(f"{n}.md", text.replace("\n\n", " "), *who) for n, (text, *who) in enumerate(made)]
    generation = opener.build(documents)
    collection = open_collection(generation.digest, opener.store)
    for tenant, labels, question in asked:
        principal = Principal(tenant=tenant, labels=labels)
        [hits] = ask(collection, [question], principal, top_k=100, candidates=100)
        assert {hit.document for hit in hits} == {doc.id for doc in documents if may_see(principal, doc)}
    collection.close()


def test_a_label_named_like_the_mark_for_everyone_opens_nothing() -> None:
    assert "*" in visible_to(ANYONE).access
    assert visible_to(Principal(labels=("*", "**"))).access == ("*", "**", "***")


# ---------------------------------------------------------------- the generation


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_build(tmp_path / "build", [document("a.md", "alpha beta\n\ngamma delta"), document("b.md", "beta")])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Generation]:
    """One indexed store for tests that repair what they break."""
    root = tmp_path_factory.mktemp("shared")
    made = write_build(root / "build", [document("a.md", "alpha beta\n\ngamma delta"), document("b.md", "beta")])
    store = Store.open(root / "store")
    return store, index(made, IndexParams(), store)


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for kind in ("generations", "collections")
        for path in (root / kind).rglob("*")
    }


def test_indexing_again_gives_the_same_digest_and_builds_nothing(store: Store, small: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    first = index(small, IndexParams(), store, progress=lambda *call: calls.append(call))
    before = snapshot(store.root)
    assert index(small, IndexParams(), store, progress=lambda *call: calls.append(call)) == first
    assert snapshot(store.root) == before
    assert calls == [("index", 3, 3)]
    assert json.loads((small / "generation.json").read_bytes()) == first.model_dump(mode="json")
    assert not list((store.root / "tmp").iterdir())


def test_the_manifest_says_what_it_was_built_from(store: Store, small: Path) -> None:
    gone = [Unreadable(id="z.pdf", reason="corrupt"), Unreadable(id="c.pdf", reason="empty")]
    generation = index(small, IndexParams(), store, unreadable=gone)
    assert (generation.documents, generation.chunks, generation.hnsw) == (2, 3, False)
    assert generation.parsers == {"text/markdown": "test 1"}
    assert [one.id for one in generation.unreadable] == ["c.pdf", "z.pdf"]
    assert generation.bm25["average_length"] == "100.0"
    assert set(generation.files) == {"documents.parquet", "chunks.parquet", "embeddings.parquet"}
    assert index(small, IndexParams(), store).digest != generation.digest
    assert read_documents_of(generation, store)["a.md"].text == "alpha beta\n\ngamma delta"
    assert load_generation(generation.digest, store) == generation


def test_parameters_of_hnsw_count_only_where_hnsw_is_used(store: Store, small: Path) -> None:
    exact = index(small, IndexParams(), store)
    assert index(small, IndexParams(ef_search=64), store).digest == exact.digest
    graph = index(small, IndexParams(exact_below=2), store)
    assert graph.hnsw
    assert graph.hnsw_params == {"m": 16, "ef_construct": 128, "ef_search": 128}
    assert index(small, IndexParams(exact_below=2, ef_search=64), store).digest != graph.digest


def damage_byte(folder: Path) -> None:
    file = max(
        folder.glob("shard/segments/*/payload_storage/page_0.dat"), key=lambda path: path.read_bytes().strip(b"\0")
    )
    data = bytearray(file.read_bytes())
    data[9] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "absent": shutil.rmtree,
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "no marker": lambda folder: (folder / "collection.json").unlink(),
    "broken marker": lambda folder: (folder / "collection.json").write_text("{"),
    "one bit": damage_byte,
    "missing segment": lambda folder: shutil.rmtree(next((folder / "shard" / "segments").iterdir())),
    "added file": lambda folder: (folder / "shard" / "more").write_text("x"),
    "other version": lambda folder: (folder / "collection.json").write_text(
        (folder / "collection.json").read_text().replace("qdrant-edge-py 0", "qdrant-edge-py 1")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_derived_collection_is_built_again_when_damaged(shared: tuple[Store, Generation], damage: str) -> None:
    store, generation = shared
    opened = open_collection(generation.digest, store)
    before = opened.export()
    opened.close()
    DAMAGES[damage](store.path("collections", generation.digest))
    again = open_collection(generation.digest, store)
    assert again.export() == before
    again.close()


def test_querying_leaves_the_stored_collection_as_it_was(shared: tuple[Store, Generation]) -> None:
    store, generation = shared
    before = snapshot(store.root)
    one, two = (open_collection(generation.digest, store) for _ in range(2))  # two at once, in one process
    assert ask(one, ["beta"]) == ask(two, ["beta"])
    one.close()
    assert ask(two, ["beta"])[0]
    two.close()
    assert snapshot(store.root) == before


def test_the_private_copy_goes_with_its_collection(
    shared: tuple[Store, Generation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    store, generation = shared
    opened = open_collection(generation.digest, store)
    assert len(list(copies.iterdir())) == 1
    del opened  # forgotten, not closed
    assert not list(copies.iterdir())


@pytest.mark.parametrize("name", ["documents.parquet", "chunks.parquet", "embeddings.parquet"])
def test_changed_bytes_of_a_generation_are_refused(shared: tuple[Store, Generation], name: str) -> None:
    store, generation = shared
    file = store.path("generations", generation.digest, name)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"\0")
    with pytest.raises(EnvironmentFailure, match=f"{name} differs from its manifest"):
        open_collection(generation.digest, store)
    if name == "documents.parquet":
        with pytest.raises(EnvironmentFailure, match="differs"):
            read_documents_of(generation, store)
    file.write_bytes(good)


def test_manifests_that_cannot_be_trusted(shared: tuple[Store, Generation]) -> None:
    store, generation = shared
    manifest = store.path("generations", generation.digest, "manifest.json")
    good = manifest.read_bytes()
    manifest.write_bytes(good.replace(b'"chunks": 3', b'"chunks": 4'))
    with pytest.raises(EnvironmentFailure, match="is damaged"):
        load_generation(generation.digest, store)
    manifest.write_bytes(good.replace(b'"format_version": 1', b'"format_version": 2, "new": 1'))
    with pytest.raises(UsageError, match="has format 2; expected at most 1; use a newer goldgate"):
        load_generation(generation.digest, store)
    manifest.write_bytes(b"{")
    with pytest.raises(EnvironmentFailure, match="cannot be read"):
        load_generation(generation.digest, store)
    manifest.write_bytes(good)
    with pytest.raises(Refused, match="holds no generation"):
        load_generation("0" * 64, store)
    for name in ("../../etc", "", "ABC"):
        with pytest.raises(UsageError, match="is no digest"):
            load_generation(name, store)


def test_vectors_of_another_bm25_are_not_queried(
    shared: tuple[Store, Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, generation = shared
    monkeypatch.setattr(Bm25, "AVERAGE_LENGTH", 99.0)
    with pytest.raises(EnvironmentFailure, match="another BM25"):
        open_collection(generation.digest, store)


def spoil_dimension(build: Path) -> None:
    record = json.loads((build / "embed.json").read_bytes())
    (build / "embed.json").write_text(json.dumps(record | {"dimension": 3}))


def spoil_order(build: Path) -> None:
    chunks = chunks_of([document("a.md", "alpha beta\n\ngamma delta"), document("b.md", "beta")])
    write_embeddings(build / EMBEDDINGS, [chunk.id for chunk in reversed(chunks)], np.ones((3, 4), np.float32))


def spoil_access(build: Path) -> None:
    open_documents = [document("a.md", "alpha beta\n\ngamma delta"), document("b.md", "beta")]
    write_build(build, [open_documents[0], document("b.md", "beta", access=("ops",))], chunks_of(open_documents))


def spoil_twice(build: Path) -> None:
    documents = [document("b.md", "beta")]
    write_build(build, documents, chunks_of(documents) * 2)


def spoil_nan(build: Path) -> None:
    chunks = chunks_of([document("a.md", "alpha beta\n\ngamma delta"), document("b.md", "beta")])
    write_embeddings(
        build / EMBEDDINGS, [one.id for one in chunks], np.full((3, hashing_embedder().dimension), np.nan, np.float32)
    )


SPOILERS: dict[str, Callable[[Path], object]] = {
    "documents.parquet does not exist": lambda build: (build / "documents.parquet").unlink(),
    "embed.json does not exist": lambda build: (build / "embed.json").unlink(),
    "embed.json is damaged": lambda build: (build / "embed.json").write_text("[]"),
    "chunks.parquet cannot be read": lambda build: (build / "chunks.parquet").write_bytes(b"PAR1"),
    "holds no chunks": lambda build: write_build(build, [document("a.md", "alpha")], []),
    "its document is absent": lambda build: write_build(build, [], chunks_of([document("a.md", "alpha")])),
    "tenant or access labels differ": spoil_access,
    "its id occurs twice": spoil_twice,
    "hold different chunks": spoil_order,
    "holds vectors of shape": spoil_dimension,
    "not finite": spoil_nan,
}


@pytest.mark.parametrize("message", SPOILERS)
def test_files_that_do_not_belong_together_are_refused(store: Store, small: Path, message: str) -> None:
    SPOILERS[message](small)
    with pytest.raises(UsageError, match=message):
        index(small, IndexParams(), store)
    assert not (store.root / "generations").exists()
    assert not (small / "generation.json").exists()


KILLED = """
import sys
from pathlib import Path
from goldgate.pipeline.index import index
from goldgate.pipeline.params import IndexParams
from goldgate.pipeline.store import Store
index(Path(sys.argv[1]), IndexParams(), Store.open(Path(sys.argv[2])), progress=lambda *call: print(*call, flush=True))
"""


def test_a_kill_in_the_middle_leaves_garbage_in_tmp_only(tmp_path: Path) -> None:
    build = write_build(tmp_path / "build", [document(f"{n}.md", f"text number {n}") for n in range(3000)])
    store = Store.open(tmp_path / "store")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(build), str(store.root)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "index 256 3000\n"
        child.send_signal(signal.SIGKILL)
    assert not (store.root / "collections").exists()
    assert list((store.root / "tmp").iterdir())
    generation = index(build, IndexParams(), store)
    opened = open_collection(generation.digest, store)
    assert opened.count() == 3000
    opened.close()
    wait_until_gone(store.root / "tmp")
    for _ in range(100):  # the builder's own child removes what it had in memory
        left = list(edge_module.MEMORY.glob(f"goldgate-shard-{child.pid}-*"))
        if not left:
            break
        time.sleep(0.1)
    assert left == []


def wait_until_gone(folder: Path) -> None:
    """The killed builder's own child notices within one batch; then nothing writes to the folder any more."""
    for _ in range(100):
        sizes = [path.stat().st_mtime_ns for path in folder.rglob("*")]
        time.sleep(0.1)
        if sizes == [path.stat().st_mtime_ns for path in folder.rglob("*")]:
            return
    pytest.fail("something still writes into tmp")


def test_two_builds_at_once_publish_one_generation(store: Store, small: Path) -> None:
    with ThreadPoolExecutor(max_workers=4) as pool:
        made = list(pool.map(lambda _: index(small, IndexParams(), store), range(4)))
    assert len({one.digest for one in made}) == 1
    assert len(list((store.root / "collections").iterdir())) == 1
    assert not list((store.root / "tmp").iterdir())


def test_a_collection_serves_any_thread(shared: tuple[Store, Generation]) -> None:
    store, generation = shared
    opened = open_collection(generation.digest, store)
    expected = ask(opened, ["beta"])
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert all(pool.map(lambda _: ask(opened, ["beta"]) == expected, range(200)))
        pool.submit(opened.close).result()


# ---------------------------------------------------------------- a collection grown out of an earlier one

OPS = ("ops",)


def pages(words: str, numbers: Iterable[int], access: tuple[str, ...] = ()) -> list[Document]:
    return [document(f"page/{n:03}.md", f"{words} {n} {WORDS[n % 22]} {WORDS[n % 7]}", access=access) for n in numbers]


def base_of(store: Store, generation: Generation) -> str:
    return str(json.loads(store.path("collections", generation.digest, "collection.json").read_bytes())["base"])


def raw_scores(store: Store, generation: Generation) -> list[list[tuple[str, float]]]:
    """What the engine itself gives, before scores are rounded: all bits of them."""
    engine = open_shard(store.path("collections", generation.digest), generation)
    assert isinstance(engine, EdgeEngine)
    terms, vectors = Bm25(), hashing_embedder().embed_queries(WORDS)
    everyone = [visible_to(principal) for principal in (ANYONE, Principal(labels=OPS))]
    rankings = [Ranking(by, seen, 1000) for seen in everyone for by in (*vectors, *map(terms.query, WORDS))]
    found = [sorted((hit.id, hit.score) for hit in hits) for hits in engine.rank(rankings)]
    engine.close()
    return found


def test_a_grown_collection_scores_bit_by_bit_as_one_from_scratch(opener: Opener, tmp_path: Path) -> None:
    """Also the words that only deleted documents had, and those that became rarer with them."""
    before = opener.build(corpus() + pages("margin sesquipedalian", range(20)) + pages("margin", range(20, 60)))
    after = corpus() + pages("margin", range(20, 60)) + pages("floor", range(70, 80), access=OPS)
    after[3] = after[3].model_copy(update={"access": OPS})  # its chunks keep their ids and are stored differently
    grown = opener.build(after)
    other = Opener(tmp_path)
    scratch = other.build(after)
    assert grown == scratch
    assert base_of(opener.store, grown) == before.digest
    assert base_of(other.store, scratch) == ""
    assert raw_scores(opener.store, grown) == raw_scores(other.store, scratch)
    files = [path for path in opener.store.path("collections", grown.digest).rglob("*") if path.is_file()]
    assert not [path for path in files if b"sesquipedalian" in path.read_bytes()]  # no text outlives its document


def test_a_grown_collection_keeps_no_text_when_documents_only_go(opener: Opener) -> None:
    before = opener.build(pages("floccinaucinihilipilification", range(5)) + pages("alone", range(5, 60)))
    grown = opener.build(pages("alone", range(5, 60)))
    assert base_of(opener.store, grown) == before.digest
    files = [path for path in opener.store.path("collections", grown.digest).rglob("*") if path.is_file()]
    assert not [path for path in files if b"floccinaucinihilipilification" in path.read_bytes()]


def test_the_nearest_collection_is_the_base(opener: Opener) -> None:
    near = opener.build(pages("near", range(50)))
    opener.build(pages("near", range(30)) + pages("far", range(30, 50)))
    grown = opener.build(pages("near", range(48)))
    assert base_of(opener.store, grown) == near.digest


@pytest.mark.parametrize("damage", ["one bit", "missing segment", "no marker", "other version"])
def test_a_damaged_base_is_no_base(opener: Opener, damage: str) -> None:
    first = opener.build(pages(f"{damage} base", range(40)))
    DAMAGES[damage](opener.store.path("collections", first.digest))
    second = opener.build(pages(f"{damage} base", range(38)))
    assert base_of(opener.store, second) == ""
    assert opener.open("edge", second).count() == 38


def test_what_does_not_grow(store: Store, tmp_path: Path) -> None:
    """More than half is new, another embedder, or a graph, which is not the same each time it is built."""
    made = 0

    def base(documents: list[Document], params: IndexParams, embedder: Embedder | None = None) -> str:
        nonlocal made
        made += 1
        return base_of(store, index(write_build(tmp_path / str(made), documents, None, embedder), params, store))

    graph, other = IndexParams(exact_below=2), load_embedder(EmbedParams(model="hashing", query_prefix="query: "))
    assert base(pages("one", range(20)), IndexParams()) == ""
    assert base(pages("one", range(9)) + pages("two", range(9, 20)), IndexParams()) == ""
    assert base(pages("one", range(19)), IndexParams(), other) == ""
    assert base(pages("one", range(20)), graph) == ""
    assert base(pages("one", range(19)), graph) == ""
    assert base(pages("one", range(18)), IndexParams()) != ""


DISK_FULL = """
import sys
from pathlib import Path
from goldgate.pipeline.errors import EnvironmentFailure
from goldgate.pipeline.index import index
from goldgate.pipeline.params import IndexParams
from goldgate.pipeline.store import Store
try:
    index(Path(sys.argv[1]), IndexParams(), Store.open(Path(sys.argv[2])))
except EnvironmentFailure as error:
    print(error)
    raise SystemExit(6)
"""


@pytest.mark.parametrize("blocks", [16, 600], ids=["at the generation", "at the collection"])
def test_a_full_disk_is_one_clear_line(tmp_path: Path, blocks: int) -> None:
    build = write_build(tmp_path / "build", [document(f"{n}.md", f"text number {n}") for n in range(500)])
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size={blocks}k none {disk} && {sys.executable} -c '{DISK_FULL}' {build} {disk}; code=$?;"
        f" ls {disk}/tmp {disk}/collections; exit $code"
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "not permitted" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("a tmpfs cannot be mounted here: a full disk is not tried")
    assert done.returncode == 6, done.stderr
    first, *rest = done.stdout.splitlines()
    assert "is full" in first
    assert "free some space" in first
    assert not [line for line in rest if line and not line.endswith(":")]  # nothing in tmp, nothing published


def test_a_builder_that_dies_is_one_clear_line(store: Store, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EnvironmentFailure, match="could not be built: exit code 1"):
        index(small, IndexParams(), store)
    assert not (store.root / "collections").exists()
    assert not list((store.root / "tmp").iterdir())


def test_hnsw_finds_what_exact_search_finds(tmp_path: Path, opener: Opener) -> None:
    pick = random.Random(1)
    documents = [document(f"{n}.md", " ".join(pick.choices(WORDS, k=12)) + f" {n}") for n in range(3000)]
    exact, graph = (
        open_collection(opener.build(documents, IndexParams(exact_below=limit)).digest, opener.store)
        for limit in (5000, 100)
    )
    assert graph.export() == exact.export()
    both = (ask(one, WORDS, bm25_weight=0, top_k=10) for one in (exact, graph))
    shared = [
        len({passage.chunk for passage in one} & {passage.chunk for passage in two})
        for one, two in zip(*both, strict=True)
    ]
    assert sum(shared) >= 0.9 * 10 * len(WORDS)
    exact.close()
    graph.close()
