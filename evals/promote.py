"""production's release -> the documents and the report that a candidate is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from goldgate.pipeline.errors import NotComputed, UsageError
from goldgate.pipeline.params import EvaluateParams
from goldgate.pipeline.schema import CaseAnswer, Document, Evidence, GoldCase, Report, ResolvedEvidence
from goldgate.pipeline.store import Store
from goldgate.serving.prompt import load_prompt
from goldgate.serving.release import load_release, production, release_folder


def production_documents(store: Store, application: str = "default") -> dict[str, Document] | None:
    """Return the documents of the live release by id, or None when nothing is live."""
    live = production(store, application)
    return None if live is None else release_documents(store, live)


def release_documents(store: Store, digest: str) -> dict[str, Document]:
    """Return the documents of a release by id. Raises Refused or UsageError when its bytes are not those released."""
    from goldgate.pipeline.index import load_generation, read_documents_of

    release = load_release(store, digest)
    return read_documents_of(load_generation(release.generation, store), store)


def production_places(store: Store, application: str = "default") -> dict[Evidence, ResolvedEvidence] | None:
    """Return where the live release's report found each piece of evidence, or None when nothing is live."""
    live = production(store, application)
    return None if live is None else released_places(store, live)


def released_places(store: Store, digest: str) -> dict[Evidence, ResolvedEvidence]:
    """Return where a release's report found each piece of evidence of its own gold set, in its own documents."""
    from goldgate.evals.golden import load_cases

    found = {case.id: case.evidence for case in released_report(store, digest).cases}
    places: dict[Evidence, ResolvedEvidence] = {}
    for case in load_cases(release_folder(store, digest) / "cases.jsonl"):
        # A report without documents located nothing.
        if len(found.get(case.id, ())) == len(case.evidence):
            places |= zip(case.evidence, found[case.id], strict=True)
    return places


def released_report(store: Store, digest: str) -> Report:
    """Return the report that a release was made with. Raises Refused when its bytes are not those released."""
    load_release(store, digest)
    return Report.model_validate_json((release_folder(store, digest) / "report.json").read_bytes())


def production_report(store: Store, digest: str, candidate: Report, cases: Sequence[GoldCase]) -> Report:
    """Return the report of release `digest`, measured under the candidate's definitions.

    When the gold set or the metric code changed since, production's stored answers are measured again by the
    candidate's; nothing is generated. A case that the candidate's gold set no longer has keeps its place, so that the
    gate sees its removal. Raises NotComputed when production cannot be measured again.
    """
    stored = released_report(store, digest)
    folder = release_folder(store, digest)
    if stored.gold_digest == candidate.gold_digest and _definitions(stored) == _definitions(candidate):
        return stored
    from goldgate.evals.evaluate import read_answers
    from goldgate.evals.golden import load_cases

    try:
        old = {case.id: case for case in load_cases(folder / "cases.jsonl")}
        answers = read_answers(folder / "answers.jsonl")
        documents = release_documents(store, digest)
        rules = load_prompt(folder / "prompt.toml").system
        places = released_places(store, digest)
        return _measure_again(stored, candidate, merge_cases(old, cases), answers, documents, places, rules)
    except UsageError as error:
        raise NotComputed(f"production's answers cannot be measured again: {error}") from error


def merge_cases(old: Mapping[str, GoldCase], new: Sequence[GoldCase]) -> list[GoldCase]:
    """Return the cases that production is measured on: the new expectation wherever production answered that question.

    A case whose question changed keeps the old one, because production's answer belongs to it; a removed case stays;
    an added case has no answer of production and is left out.
    """
    current = {case.id: case for case in new}
    merged = []
    for name, case in old.items():
        changed = current.get(name)
        merged.append(changed if changed is not None and changed.query() == case.query() else case)
    return merged


def _definitions(report: Report) -> dict[str, tuple[str, str]]:
    return {name: (info.code_digest, info.not_measured) for name, info in report.metrics.items()}


def _measure_again(
    stored: Report, candidate: Report, cases: Sequence[GoldCase], answers: Mapping[str, CaseAnswer],
    documents: Mapping[str, Document], places: Mapping[Evidence, ResolvedEvidence], rules: str,
) -> Report:  # fmt: skip
    from goldgate.evals.evaluate import Inputs, evaluate, load_similarity

    # A judge behind an endpoint is not asked here: its metrics are advisory, and asking costs.
    metrics = tuple(name for name, info in candidate.metrics.items() if not info.judge.startswith("llm:"))
    inputs = Inputs(
        cases=tuple(cases), answers=answers, params=EvaluateParams(metrics=metrics), system="builtin",
        parts=stored.parts, documents=documents, previous=documents, places=places, similarity=load_similarity(),
        unreadable=stored.unreadable, git=stored.git, system_prompt=rules,
    )  # fmt: skip
    return evaluate(inputs)
