"""retrieve: what is searched for, by whom, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from goldgate.pipeline.collection import Collection
from goldgate.pipeline.embedder import Embedder
from goldgate.pipeline.index import index, open_collection
from goldgate.pipeline.params import IndexParams, RetrieveParams
from goldgate.pipeline.schema import Message, Principal, Query
from goldgate.pipeline.store import Store
from goldgate.serving.retrieve import Retriever, search_text
from tests.pipeline.builds import document, write_build

DOCUMENTS = [
    document("install.md", "To install goldgate run make demo.\n\nThe installation takes ten minutes on Linux."),
    document("windows.md", "Windows is not supported; use a virtual machine."),
    document("gate.md", "The gate gives one of four verdicts.\n\nA verdict of FAIL blocks the release."),
    document("runbook.md", "The pager of the operators rings when the gate is down.", access=("ops",)),
    document("acme.md", "The gate of acme has a margin of three points.", tenant="acme"),
]
ANYONE = Principal()


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    root = tmp_path_factory.mktemp("retrieve")
    store = Store.open(root / "store")
    generation = index(write_build(root / "build", DOCUMENTS), IndexParams(), store)
    opened = open_collection(generation.digest, store)
    yield opened
    opened.close()


def found(collection: Collection, embedder: Embedder, query: Query, **params: float) -> list[str]:
    retriever = Retriever(collection, embedder, RetrieveParams.model_validate(params))
    [passages] = retriever.retrieve([query])
    assert all(passage.similarity is not None for passage in passages)
    return [passage.document for passage in passages]


def test_the_passage_that_answers_is_first(collection: Collection, hashing: Embedder) -> None:
    assert found(collection, hashing, Query(question="Is Windows supported?", principal=ANYONE))[0] == "windows.md"
    assert found(collection, hashing, Query(question="four verdicts", principal=ANYONE))[0] == "gate.md"


def test_only_what_the_principal_may_see(collection: Collection, hashing: Embedder) -> None:
    question = "What about the gate, its margin and its pager?"
    seen = {
        principal: set(found(collection, hashing, Query(question=question, principal=principal), top_k=40))
        for principal in (ANYONE, Principal(tenant="acme"), Principal(labels=("ops",)))
    }
    public = {"install.md", "windows.md", "gate.md"}
    assert list(seen.values()) == [public, public | {"acme.md"}, public | {"runbook.md"}]


def test_a_query_cannot_be_expressed_without_its_principal() -> None:
    with pytest.raises(ValueError, match="principal"):
        Query(question="Is Windows supported?")  # type: ignore[call-arg]


def test_a_follow_up_is_searched_with_the_turn_before_it(collection: Collection, hashing: Embedder) -> None:
    history = (
        Message(role="user", content="How many verdicts does the gate give?"),
        Message(role="assistant", content="Windows Windows Windows"),
        Message(role="user", content="How do I install goldgate?"),
        Message(role="assistant", content="Run make demo."),
    )
    follow_up = Query(question="How long does it take?", history=history, principal=ANYONE)
    assert search_text(follow_up) == "How long does it take?\nHow do I install goldgate?"
    assert found(collection, hashing, follow_up, top_k=2) == ["install.md", "install.md"]
    alone = Query(question="install", history=history[1:2], principal=ANYONE)
    assert search_text(alone) == "install"


def test_many_queries_at_once_are_answered_in_their_order(collection: Collection, hashing: Embedder) -> None:
    retriever = Retriever(collection, hashing, RetrieveParams(top_k=2))
    queries = [
        Query(question=question, principal=principal)
        for question in ("Windows", "verdict FAIL", "margin of acme", "pager")
        for principal in (ANYONE, Principal(tenant="acme"), Principal(labels=("ops",)))
    ]
    together = retriever.retrieve(queries)
    assert together == [retriever.retrieve([query])[0] for query in queries]
    assert [len(passages) for passages in together] == [2] * len(queries)
    assert retriever.retrieve([]) == []


def test_the_threshold_of_similarity_is_not_applied_here(collection: Collection, hashing: Embedder) -> None:
    query = Query(question="zebra", principal=ANYONE)
    assert len(found(collection, hashing, query, min_similarity=0.99)) == 4


def test_a_weight_of_zero_turns_a_ranking_off(collection: Collection, hashing: Embedder) -> None:
    query = Query(question="zebra verdicts", principal=ANYONE)
    assert set(found(collection, hashing, query, dense_weight=0)) == {"gate.md"}
    assert len(found(collection, hashing, query, bm25_weight=0, top_k=40)) == 5


@pytest.mark.engine
def test_meaning_finds_what_words_do_not(tmp_path: Path, minilm: Embedder) -> None:
    store = Store.open(tmp_path / "store")
    generation = index(write_build(tmp_path / "build", DOCUMENTS, embedder=minilm), IndexParams(), store)
    collection = open_collection(generation.digest, store)
    query = Query(question="operating system of Microsoft", principal=ANYONE)
    assert found(collection, minilm, query, bm25_weight=0)[0] == "windows.md"
    collection.close()
