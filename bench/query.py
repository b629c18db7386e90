"""What a hybrid filtered query costs beside the engine's own, and how HNSW compares with exact search.

    .venv/bin/python -m bench.query [--points 10000] [--queries 300] [--large 100000 | --large 0]

First a collection that is searched exactly. Ours is `Collection.query`, one call per question, as serving makes it:
terms of the question, ranking by meaning and by words over what the principal may see, ties by chunk id, fusion,
passages checked. The raw call is one query of Qdrant Edge with both rankings as prefetches, the same filters and the
engine's own fusion, its request made ready beforehand. Embedding the question is in neither. Target: at most 1.5
times the raw call's time, and the same passages (the engine orders ties as they come; those are counted apart).

Then a collection above `index.exact_below`: recall of the ten nearest by HNSW against exact search of the same
points, for principals who see more or less of them, and latency of whole queries. Target: recall at least 0.99 for
each.

The texts are real. The first `--texts` of them are embedded and have their own vectors; every other point has one of
these vectors with noise added. Texts that are used again lose a word each time, so that no two are equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import qdrant_edge as edge

from bench.measure import (
    ROOT,
    chunks,
    finish,
    machine,
    parser,
    positive,
    questions,
    repeated,
    say,
    seconds,
    show,
    spread,
    write_build,
)
from goldgate.pipeline.collection import BM25, DENSE, Collection, RankedCollection, visible_to
from goldgate.pipeline.edge import Bm25, open_shard
from goldgate.pipeline.embedder import Embedder, load_embedder
from goldgate.pipeline.index import index, open_collection
from goldgate.pipeline.params import EmbedParams, IndexParams, RetrieveParams, load_params
from goldgate.pipeline.schema import Generation, Passage, Principal
from goldgate.pipeline.store import Store

MOST_RATIO, LEAST_RECALL = 1.5, 0.99
NEAREST = 10
NOISE = 0.5  # length of the noise beside a unit vector: a copy has a cosine of about 0.89 to its original
PRINCIPALS = {
    "public, no label": Principal(),
    "public, label ops": Principal(labels=("ops",)),
    "tenant acme": Principal(tenant="acme"),
    "tenant acme, three labels": Principal(tenant="acme", labels=("board", "legal", "ops")),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parser(__doc__)
    options.add_argument("--points", type=positive, default=10_000, help="points searched exactly (default: 10000)")
    options.add_argument("--queries", type=positive, default=300, help="different questions (default: 300)")
    options.add_argument(
        "--large", type=int, default=100_000, help="points searched by HNSW; 0: none (default: 100000)"
    )
    options.add_argument("--texts", type=positive, default=3000, help="texts that are embedded (default: 3000)")
    options.add_argument("--model", default="all-MiniLM-L6-v2", help="as [embed] model; hashing only tries the script")
    chosen = options.parse_args(arguments)
    embedder = load_embedder(EmbedParams(model=chosen.model))
    name, found = chunks(chosen.data, embedder, max(chosen.points, chosen.texts))
    texts = [chunk.text for chunk in found]
    asked = questions(chosen.data, chosen.queries)
    say(f"embedding {min(len(texts), chosen.texts)} texts of {name} and {len(asked)} questions")
    base, vectors = embedder.embed(texts[: chosen.texts]), embedder.embed_queries(asked)
    show(machine("qdrant-edge-py"))
    setting = Setting(embedder, texts, base, list(zip(asked, vectors, strict=True)), chosen)
    with tempfile.TemporaryDirectory(prefix="goldgate-bench-") as folder:
        recalled = not chosen.large or _large(setting, Path(folder))
        ours, raw = _small(setting, Path(folder))
    code = finish("query", "time of a hybrid filtered query ÷ of the raw engine call", ours / raw, most=MOST_RATIO)
    return code if recalled else 1


class Setting:
    """What both measurements ask, and of what."""

    def __init__(
        self, embedder: Embedder, texts: Sequence[str], base: np.ndarray, asked: list[tuple[str, np.ndarray]],
        chosen: argparse.Namespace,
    ) -> None:  # fmt: skip
        """`base` holds vectors of the first texts, `asked` questions with theirs."""
        self.embedder, self.texts, self.base, self.asked = embedder, texts, base, asked
        self.points, self.large, self.rounds = int(chosen.points), int(chosen.large), int(chosen.rounds)
        self.params = load_params(ROOT / "params.toml")

    def build(self, folder: Path, count: int, params: IndexParams) -> tuple[Generation, Store]:
        """A generation of `count` points, loaded into Qdrant Edge."""
        (folder / "build").mkdir(parents=True)
        write_build(folder / "build", repeated(self.texts, count), spread(self.base, count, NOISE), self.embedder)
        store = Store.open(folder / "store")
        took = seconds(lambda: index(folder / "build", params, store))
        say(f"{count} points indexed in {took:.1f} s")
        return Generation.model_validate_json((folder / "build" / "generation.json").read_bytes()), store


# ---------------------------------------------------------------- ours and the engine's own


def _small(setting: Setting, folder: Path) -> tuple[float, float]:
    """Median milliseconds of our query and of the raw call."""
    generation, store = setting.build(folder / "small", setting.points, IndexParams(exact_below=setting.points))
    params = setting.params.retrieve
    collection = open_collection(generation.digest, store)
    raw = _RawShard(store.path("collections", generation.digest), folder / "raw")
    principals = list(PRINCIPALS.values())
    plan = [(text, vector, principals[number % len(principals)]) for number, (text, vector) in enumerate(setting.asked)]
    requests = [raw.request(*one, params) for one in plan]
    spent: dict[str, list[float]] = {"ours": [], "raw": []}
    agreed = tied = 0
    for turn in range(setting.rounds + 1):  # the first warms both up
        for number, ((text, vector, principal), request) in enumerate(zip(plan, requests, strict=True)):
            mine = lambda: collection.query(vector[None], [text], [principal], params)  # noqa: B023, E731
            theirs = lambda: raw.query(request)  # noqa: B023, E731
            answers = _both(mine, theirs, spent, swap=bool((turn + number) % 2), warm=turn == 0)
            if turn == 0:
                agreed += _same(*answers)
                tied += not _same(*answers) and _same_scores(*answers)
    collection.close()
    raw.close()
    show(f"{setting.points} points, exact search, {len(plan)} questions, {setting.rounds} rounds, top {params.top_k}")
    show(f"same passages in the same order: {agreed} of {len(plan)}; {tied} more differ within ties")
    for name in ("raw", "ours"):
        show(f"{name + ':':5} {_latency(spent[name])}")
    return float(np.median(spent["ours"])), float(np.median(spent["raw"]))


def _both(
    mine: Callable[[], list[list[Passage]]], theirs: Callable[[], list[Any]], spent: dict[str, list[float]], *,
    swap: bool, warm: bool,
) -> tuple[list[Passage], list[Any]]:  # fmt: skip
    """Run both, in this order or the other, and note what they took."""
    results: dict[str, Any] = {}
    for name, call in (("raw", theirs), ("ours", mine)) if swap else (("ours", mine), ("raw", theirs)):
        begin = time.perf_counter()
        results[name] = call()
        if not warm:
            spent[name].append(1000 * (time.perf_counter() - begin))
    return results["ours"][0], results["raw"]


def _same(mine: Sequence[Passage], theirs: Sequence[Any]) -> bool:
    return [passage.chunk for passage in mine] == [point.payload["chunk"] for point in theirs]


def _same_scores(mine: Sequence[Passage], theirs: Sequence[Any]) -> bool:
    ours, others = [passage.score for passage in mine], [point.score for point in theirs]
    return len(ours) == len(others) and np.allclose(ours, others, rtol=1e-4)


class _RawShard:
    """Qdrant Edge as it comes: a query with two prefetches and its own reciprocal rank fusion."""

    def __init__(self, collection: Path, copy: Path) -> None:
        import shutil

        shutil.copytree(collection / "shard", copy)
        self._shard = edge.EdgeShard.load(str(copy))
        self._terms = Bm25()

    def request(self, text: str, vector: np.ndarray, principal: Principal, params: RetrieveParams) -> Any:  # noqa: ANN401
        """The same question for the same principal, made ready."""
        visible = visible_to(principal)
        seen = edge.Filter(
            must=[
                edge.FieldCondition("tenant", match=edge.MatchAny(list(visible.tenants))),
                edge.FieldCondition("access", match=edge.MatchAny(list(visible.access))),
            ]
        )
        terms = self._terms.query(text)
        sparse = edge.SparseVector(list(terms.indices), list(terms.values))
        by_meaning = edge.Prefetch(
            limit=params.candidates, filter=seen, params=edge.SearchParams(exact=True),
            query=edge.Query.Nearest(vector.tolist(), using=DENSE),
        )  # fmt: skip
        by_words = edge.Prefetch(
            limit=params.candidates, filter=seen, params=edge.SearchParams(exact=True, idf=edge.IdfParams(seen)),
            query=edge.Query.Nearest(sparse, using=BM25),
        )  # fmt: skip
        # The engine counts ranks from 0, the paper and we from 1.
        fusion = edge.Fusion.Rrf(k=params.rrf_k + 1, weights=[params.dense_weight, params.bm25_weight])
        return edge.QueryRequest(
            limit=params.top_k, prefetches=[by_meaning, by_words], query=fusion, with_payload=True, with_vector=[DENSE]
        )

    def query(self, request: Any) -> list[Any]:  # noqa: ANN401
        return list(self._shard.query(request))

    def close(self) -> None:
        self._shard.close()


# ---------------------------------------------------------------- HNSW and exact search


def _large(setting: Setting, folder: Path) -> bool:
    """Print recall and latency for every principal; say whether every recall is as high as it must be."""
    params = setting.params.index.model_copy(
        update={"exact_below": min(setting.params.index.exact_below, setting.large - 1)}
    )
    generation, store = setting.build(folder / "large", setting.large, params)
    graph = open_collection(generation.digest, store)
    shard = store.path("collections", generation.digest)
    exact = RankedCollection(open_shard(shard, generation.model_copy(update={"hnsw": False})), Bm25())
    show(
        f"{setting.large} points, HNSW m {params.hnsw_m}, ef_construct {params.ef_construct}, ef_search "
        f"{params.ef_search}, {len(setting.asked)} questions each"
    )
    met = True
    for name, principal in PRINCIPALS.items():
        recall = _recall(setting, graph, exact, principal)
        met = met and recall >= LEAST_RECALL
        spent = _latencies(setting, graph, principal)
        show(f"{name + ':':27} recall@{NEAREST} {recall:.4f}; hybrid query {_latency(spent)}")
    if not met:
        show(f"TARGET MISSED: a recall is below {LEAST_RECALL}")
    graph.close()
    exact.close()
    return met


def _recall(setting: Setting, graph: Collection, exact: Collection, principal: Principal) -> float:
    """Mean share of the ten nearest by exact search that HNSW finds, as production asks: with its candidates."""
    params = setting.params.retrieve.model_copy(update={"bm25_weight": 0.0, "top_k": NEAREST})
    shares = []
    for text, vector in setting.asked:
        wanted, got = (
            {passage.chunk for passage in collection.query(vector[None], [text], [principal], params)[0]}
            for collection in (exact, graph)
        )
        shares.append(len(wanted & got) / len(wanted))
    return float(np.mean(shares))


def _latencies(setting: Setting, collection: Collection, principal: Principal) -> list[float]:
    """Milliseconds of each question's whole query."""
    return [
        1000 * seconds(lambda: collection.query(vector[None], [text], [principal], setting.params.retrieve))  # noqa: B023
        for text, vector in setting.asked
    ]


def _latency(spent: Sequence[float]) -> str:
    return f"p50 {np.percentile(spent, 50):.2f} ms, p95 {np.percentile(spent, 95):.2f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
