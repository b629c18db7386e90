"""questions, a build -> hit@5 and the state of the evidence: what `run` and `tune` count.

hit@5, page: the labelled page is the document of one of the first five passages. hit@5, section: one of them overlaps
the labelled section (the page, where no section is labelled) by at least half of the shorter of the two, which is
evidence recall with one piece of evidence per question. Questions whose evidence is stale are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from goldgate.evals.scores import covers
from goldgate.pipeline.embedder import Embedder, load_embedder
from goldgate.pipeline.index import open_collection
from goldgate.pipeline.params import Params, RetrieveParams
from goldgate.pipeline.parquet import read_records
from goldgate.pipeline.schema import Document, Generation, GoldCase, Passage, ResolvedEvidence
from goldgate.pipeline.store import Store
from goldgate.serving.retrieve import Retriever

PUBLISHED = "rag_runs/evaluations__gte-large_gpt-4.json"
TOP = 5


@dataclass
class Hits:
    """hit@5 of one date."""

    page: int
    page_of: int
    section: int
    section_of: int
    labelled_section: int
    labelled_section_of: int
    states: dict[str, list[str]]

    def as_json(self) -> dict[str, object]:
        """Counts, shares and the cases by the state of their evidence."""
        return {
            "page": share(self.page, self.page_of), "questions": self.page_of,
            "section_or_page": share(self.section, self.section_of),
            "section": share(self.labelled_section, self.labelled_section_of),
            "questions_with_section": self.labelled_section_of,
            "evidence": {state: len(names) for state, names in self.states.items()},
            "stale": self.states["stale"], "moved": self.states["moved"],
        }  # fmt: skip


def share(part: int, whole: int) -> float:
    """A share to four digits."""
    return round(part / whole, 4)


def read_build(build: Path) -> dict[str, Document]:
    """The documents of a build, by id."""
    return {document.id: document for document in read_records(build / "documents.parquet", Document)}


def retrieve(
    build: Path, store: Store, params: Params, cases: Sequence[GoldCase], settings: Sequence[RetrieveParams]
) -> list[dict[str, list[Passage]]]:
    """The first five passages of every question under each setting, by the parts that answer in production."""
    generation = Generation.model_validate_json((build / "generation.json").read_bytes())
    embedder = Remembering(load_embedder(params.embed, generation.dtype))
    queries = [case.query() for case in cases]
    collection = open_collection(generation.digest, store)
    try:
        found = [
            Retriever(collection, embedder, each.model_copy(update={"top_k": TOP})).retrieve(queries)
            for each in settings
        ]
    finally:
        collection.close()
    return [{case.id: passages for case, passages in zip(cases, ranked, strict=True)} for ranked in found]


class Remembering:
    """Embeds the same questions once."""

    def __init__(self, embedder: Embedder) -> None:
        """Start with nothing."""
        self._embedder = embedder
        self._known: dict[tuple[str, ...], npt.NDArray[np.float32]] = {}

    def embed_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The vectors of `texts`."""
        if tuple(texts) not in self._known:
            self._known[tuple(texts)] = self._embedder.embed_queries(texts)
        return self._known[tuple(texts)]


def hits(
    cases: Iterable[GoldCase], found: Mapping[str, Sequence[Passage]],
    places: Mapping[str, tuple[ResolvedEvidence, ...]], documents: Mapping[str, Document],
) -> Hits:  # fmt: skip
    """Count hits over the questions whose evidence is there."""
    states: dict[str, list[str]] = {"resolved": [], "moved": [], "stale": []}
    count = Hits(0, 0, 0, 0, 0, 0, states)
    for case in cases:
        (piece,) = places[case.id]
        states[piece.state].append(case.id)
        if piece.state == "stale":
            continue
        passages = found[case.id]
        hit = any(covers(piece, passage, documents) for passage in passages)
        count.page += any(passage.document == piece.document for passage in passages)
        count.section += hit
        count.page_of += 1
        count.section_of += 1
        if case.evidence[0].start is not None:
            count.labelled_section += hit
            count.labelled_section_of += 1
    return count


def published(data: Path, only: Set[str] | None = None) -> dict[str, float]:
    """Hits of gte-large from its stored results: the page of a URL, as it was published, and the URL with its anchor.

    `only` restricts them to these cases.
    """
    lines = (data / "eval/gold_map.eval-dataset-v1.jsonl").read_text(encoding="utf-8").splitlines()
    results = json.loads((data / PUBLISHED).read_text(encoding="utf-8"))["results"]
    pairs = [
        (label["source"], row["sources"])
        for label, row in zip(map(json.loads, lines), results, strict=True)
        if only is None or label["id"] in only
    ]
    hit: dict[str, float] = {}
    for top in (TOP, max(len(sources) for _, sources in pairs)):
        pages = sum(page(wanted) in map(page, sources[:top]) for wanted, sources in pairs)
        urls = sum(wanted in sources[:top] for wanted, sources in pairs)
        hit[f"page@{top}"], hit[f"url@{top}"] = share(pages, len(pairs)), share(urls, len(pairs))
    return hit


def page(url: str) -> str:
    """A URL without its anchor."""
    return url.partition("#")[0]
