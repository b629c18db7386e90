"""(report, baseline, verdict) -> Diagnosis: which part is to blame, why it is thought so, and what to do next. Pure.

Every case that got worse is explained by itself, and the part that explains most of them is named:

* zero tolerance hit: security, which is also told by itself whichever part is named;
* its evidence is gone from a document that changed, or another document that changed took its place: document;
* its evidence is unchanged and no longer retrieved: retrieval;
* its evidence is retrieved as before and the answer got worse: generation when the model changed or the answer is less
  faithful, prompt when only the prompt changed or a faithful answer became less relevant;
* everything good and still wrong: the document now says something else, or the gold case is out of date.

A fault can show at one stage and come from another, so what changed outranks where it shows: with nothing but documents
changed, retrieval and generation are not to blame. For the same reason one leak among many lost cases does not hide
what lost them: security is named when it explains the verdict by itself, or as many cases as any other part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from goldgate.evals.pairs import Comparison, Pair, compare, lost_documents, measure
from goldgate.pipeline.schema import CaseReport, Condition, Diagnosis, Report, Verdict

Part = Literal["retrieval", "generation", "prompt", "document", "gold", "security", "none", "unknown"]

ORDER: tuple[Part, ...] = ("security", "document", "retrieval", "prompt", "generation", "gold", "unknown")
"""Which part is named when two explain equally many cases."""

SHOWN = 5
"""Evidence lines, and names in one of them."""

RETRIEVAL_PARTS = ("retrieval", "embedder")

DO_NEXT: dict[Part, str] = {
    "retrieval": "compare the retrieved passages of these cases; undo the change of {changed}, or raise top_k",
    "generation": "read these answers beside the old ones; undo the change of {changed}",
    "prompt": "read these answers beside the old ones; undo or reword the change of the prompt",
    "document": "look at the changes in {documents}: restore what answered these questions, or correct the gold cases",
    "gold": "review the gold cases named above, then judge again",
    "security": "do not release; find out how this text reached the answer",
    "unknown": "read these answers beside the old ones in the report",
    "none": "",
}

# What follows a verdict, by system: an application over HTTP is judged here and released where it runs.
PASSED = {
    "builtin": "goldgate release",
    "http": "put this version live where it runs, and keep its report.json to compare the next one with: "
    "goldgate gate --against",
}
FIRST = {
    "builtin": "goldgate release --bootstrap makes the first release",
    "http": "keep this report.json, and compare the next version with it: goldgate gate --against",
}

ZERO = "zero tolerance: "
LEAKED = "text that must never be shown came out"


@dataclass(frozen=True, slots=True)
class _Changes:
    """What differs between candidate and production besides the answers."""

    parts: tuple[str, ...]
    documents: frozenset[str]

    @property
    def knowledge_only(self) -> bool:
        """Documents changed, and neither retrieval nor embedder nor prompt nor model."""
        return bool(self.documents) and not set(self.parts) - {"knowledge_base"}

    @property
    def retrieval(self) -> bool:
        return any(part in self.parts for part in RETRIEVAL_PARTS)


@dataclass(frozen=True, slots=True)
class _Explained:
    case: str
    part: Part
    why: str


def diagnose(
    report: Report, baseline: Report | None, verdict: Verdict, changed_parts: Sequence[str] | None = None
) -> Diagnosis:
    """Explain a verdict. `changed_parts` names the parts that changed; without it their digests are compared."""
    hits = leaks(verdict)
    if baseline is None or verdict.touched is None:
        return _security(hits) if hits else _without_pairs(report, verdict)
    changes = _changes(report, baseline, changed_parts)
    leaking = _leaking(report, verdict)
    worse = [pair for pair in _worse(compare(report, baseline, None), verdict) if pair.id not in leaking]
    explained = [_explain(pair, changes, verdict.changed_cases) for pair in worse]
    if hits:
        return _with_leaks(hits, leaking, explained, verdict, changes, len(report.cases))
    balanced = verdict.touched.worse <= verdict.touched.better and verdict.verdict == "INCONCLUSIVE"
    if not explained or balanced or verdict.verdict in {"PASS", "NOT_COMPUTED"}:
        return _nothing_to_blame(report, verdict, changes)
    return _blame(explained, verdict, changes, len(report.cases))


def leaks(verdict: Verdict) -> tuple[str, ...]:
    """Return one line for each zero-tolerance metric that was hit: the metric and its cases."""
    return tuple(f"{condition.metric}: {condition.note.removeprefix(ZERO)}" for condition in _zero_hits(verdict))


def security_lines(verdict: Verdict) -> tuple[str, ...]:
    """Return what a report must say about leaks beside a headline that is about another part."""
    if verdict.diagnosis is not None and verdict.diagnosis.part == "security":
        return ()
    return tuple(f"{LEAKED}, in {hit}" for hit in leaks(verdict))


def _zero_hits(verdict: Verdict) -> list[Condition]:
    return [c for c in verdict.conditions if c.status == "broken" and c.note.startswith(ZERO)]


# ---------------------------------------------------------------- with something to blame


def _blame(explained: Sequence[_Explained], verdict: Verdict, changes: _Changes, total: int) -> Diagnosis:
    part = _most_blamed(explained)
    lines = _evidence_lines(explained, part, verdict, changes)
    lost = verdict.touched.evidence_lost if verdict.touched is not None else {}
    documents = sorted({*lost} & changes.documents) or sorted(changes.documents)
    do_next = DO_NEXT[part].format(
        changed=_names([name for name in changes.parts if name != "code"]) or "the code",
        documents=_names(documents) or "the documents",
    )
    cause = f"because of {_article(part)}: {_most_often(explained, part)}"
    return Diagnosis(part=part, headline=f"{_counted(verdict, total)}, {cause}", evidence=lines, do_next=do_next)


def _most_blamed(explained: Sequence[_Explained]) -> Part:
    counts = Counter(item.part for item in explained)
    return max(counts, key=lambda name: (counts[name], -ORDER.index(name)))


def _leaking(report: Report, verdict: Verdict) -> list[str]:
    """The cases that hit zero tolerance."""
    metrics = [condition.metric for condition in _zero_hits(verdict)]

    def hit(case: CaseReport) -> bool:
        found = (case.scores.get(metric) for metric in metrics)
        return any(score is not None and score.value is not None and score.value < 1 for score in found)

    return sorted(case.id for case in report.cases if hit(case))


def _with_leaks(
    hits: Sequence[str], leaking: Sequence[str], losses: Sequence[_Explained], verdict: Verdict, changes: _Changes,
    total: int,
) -> Diagnosis:  # fmt: skip
    explained = [*(_Explained(case, "security", LEAKED) for case in leaking), *losses]
    if not losses or not _harmful_without_leaks(verdict) or _most_blamed(explained) == "security":
        return _security(hits, _others(losses, "security"), changes)
    blamed = _blame(losses, verdict, changes, total)
    return blamed.model_copy(
        update={
            "evidence": (*(f"{LEAKED}, in {hit}" for hit in hits), *blamed.evidence),
            "do_next": f"{DO_NEXT['security']}; besides, {blamed.do_next}",
        }
    )


def _harmful_without_leaks(verdict: Verdict) -> bool:
    """Whether something else keeps this change from passing: then the leak is not all there is to explain."""
    touched = verdict.touched
    others = {c.status for c in verdict.conditions if c.tier == "critical" and not c.note.startswith(ZERO)}
    others |= {touched.status} if touched is not None else set()
    if "broken" in others or (verdict.must_hold is not None and verdict.must_hold.lost):
        return True
    return "inconclusive" in others and touched is not None and touched.worse > touched.better


def _security(hits: Sequence[str], others: Sequence[str] = (), changes: _Changes | None = None) -> Diagnosis:
    changed = [f"changed: {', '.join(changes.parts)}"] if changes is not None and changes.parts else []
    return Diagnosis(
        part="security", headline=f"{LEAKED}, in {hits[0]}", evidence=(*hits, *others, *changed),
        do_next=DO_NEXT["security"],
    )  # fmt: skip


# ---------------------------------------------------------------- without anything to blame


def _without_pairs(report: Report, verdict: Verdict) -> Diagnosis:
    if verdict.verdict is None:
        return Diagnosis(
            part="none", headline="there is no production to compare with", do_next=FIRST[report.system],
        )  # fmt: skip
    return Diagnosis(part="unknown", headline=verdict.reason, do_next="measure again, then judge again")


def _nothing_to_blame(report: Report, verdict: Verdict, changes: _Changes) -> Diagnosis:
    counted = _counted(verdict, len(report.cases))
    if verdict.verdict == "NOT_COMPUTED":
        gold = "removed" in verdict.changed_cases.values() or "stale" in verdict.reason or "gold case" in verdict.reason
        part: Part = "document" if "stale" in verdict.reason and changes.documents else "gold" if gold else "unknown"
        do_next = DO_NEXT["gold"] if gold else "measure what is missing, then judge again"
        return Diagnosis(
            part=part, headline=f"{counted}; not everything was measured", evidence=(verdict.reason,), do_next=do_next
        )
    if verdict.verdict == "INCONCLUSIVE":
        do_next = "judge the changed answers yourself (goldgate review), or add cases like those that changed"
        return Diagnosis(part="none", headline=f"{counted}, too few cases to be sure", do_next=do_next)
    if verdict.verdict == "FAIL":
        return Diagnosis(part="unknown", headline=f"{counted}; {verdict.reason}", do_next=DO_NEXT["unknown"])
    return Diagnosis(part="none", headline=counted, do_next=PASSED[report.system])


def _counted(verdict: Verdict, total: int) -> str:
    touched = verdict.touched
    if touched is None or not touched.total:
        return f"none of {total} answers changed"
    lost = set(verdict.must_hold.lost if verdict.must_hold else ())
    worse = len({c.case for c in touched.cases if c.candidate < c.baseline} | lost)
    better = f", {touched.better} better" if touched.better else ""
    return f"{touched.total} of {total} answers changed, {worse or 'none'} worse{better}"


# ---------------------------------------------------------------- one case


def _worse(comparison: Comparison, verdict: Verdict) -> list[Pair]:
    names = {c.case for c in (verdict.touched.cases if verdict.touched else ()) if c.candidate < c.baseline}
    names |= set(verdict.must_hold.lost if verdict.must_hold else ())
    chosen = [pair for pair in comparison.pairs if pair.id in names]
    if chosen or verdict.verdict != "FAIL":
        return chosen
    broken = [c.metric for c in verdict.conditions if c.status == "broken" and c.tier == "critical"]
    return [p for p in comparison.pairs if any(measure(m, p).scored and measure(m, p).delta < 0 for m in broken)]


def _explain(pair: Pair, changes: _Changes, revised: Container[str]) -> _Explained:
    gone, stale = lost_documents(pair)
    if stale:
        return _Explained(pair.id, "document", f"the evidence is no longer in {_names(sorted(stale))}")
    if gone:
        return _lost_from_retrieval(pair, gone, changes)
    if pair.id in revised:
        return _Explained(pair.id, "gold", "the gold case changed, and production's answer meets it better")
    return _worse_answer(pair, changes)


def _lost_from_retrieval(pair: Pair, gone: set[str], changes: _Changes) -> _Explained:
    edited = sorted(gone & changes.documents)
    if edited and not changes.retrieval:
        return _Explained(pair.id, "document", f"the evidence in {_names(edited)} changed and is no longer retrieved")
    if changes.knowledge_only:
        crowd = sorted((_retrieved(pair.new.answer) - _retrieved(pair.old.answer)) & changes.documents)
        if crowd:
            return _Explained(pair.id, "document", f"{_names(crowd)} took the place of {_names(sorted(gone))}")
    return _Explained(pair.id, "retrieval", f"evidence in {_names(sorted(gone))} is no longer retrieved")


def _worse_answer(pair: Pair, changes: _Changes) -> _Explained:
    evidence = {piece.document for piece in pair.new.evidence}
    edited = sorted((evidence or _retrieved(pair.new.answer)) & changes.documents)
    if edited and (changes.knowledge_only or any(piece.state != "resolved" for piece in pair.new.evidence)):
        return _Explained(pair.id, "document", f"{_names(edited)} changed and is answered from differently")
    if changes.retrieval and _retrieved_text(pair.new.answer) != _retrieved_text(pair.old.answer):
        return _Explained(pair.id, "retrieval", "the evidence is there as before, among other passages")
    if changes.knowledge_only:
        return _Explained(pair.id, "document", "other passages of the changed documents came beside the evidence")
    return _worse_writing(pair, changes)


def _worse_writing(pair: Pair, changes: _Changes) -> _Explained:
    faithful, relevant = measure("faithfulness", pair), measure("answer_relevance", pair)
    less_faithful = faithful.scored and faithful.delta < 0
    shown = "the answer is less faithful to the same evidence" if less_faithful else "the evidence is there as before"
    if "prompt" in changes.parts and not ("model" in changes.parts and less_faithful):
        return _Explained(pair.id, "prompt", f"{shown}, and the prompt changed")
    if "model" in changes.parts or "code" in changes.parts:
        what = "the model" if "model" in changes.parts else "the code of the answer path"
        return _Explained(pair.id, "generation", f"{shown}, and {what} changed")
    if relevant.scored and relevant.delta < 0 and faithful.scored and not less_faithful:
        return _Explained(pair.id, "prompt", "the answer is faithful and less relevant")
    if less_faithful:
        return _Explained(pair.id, "generation", shown)
    return _Explained(pair.id, "unknown", "no part that is known to decide answers changed")


def _retrieved(answer: object) -> set[str]:
    return {document for document, _ in _retrieved_text(answer)}


def _retrieved_text(answer: object) -> list[tuple[str, str]]:
    passages = getattr(answer, "passages", None) or ()
    return [(passage.document, passage.text) for passage in passages]


# ---------------------------------------------------------------- words


def _changes(report: Report, baseline: Report, changed_parts: Sequence[str] | None) -> _Changes:
    names = sorted({*report.parts, *baseline.parts})
    parts = [name for name in names if report.parts.get(name) != baseline.parts.get(name)]
    both = {*report.documents, *baseline.documents}
    documents = {name for name in both if report.documents.get(name) != baseline.documents.get(name)}
    return _Changes(tuple(parts if changed_parts is None else sorted(changed_parts)), frozenset(documents))


def _evidence_lines(
    explained: Sequence[_Explained], part: Part, verdict: Verdict, changes: _Changes
) -> tuple[str, ...]:
    same = [item for item in explained if item.part == part]
    reasons: dict[str, list[str]] = {}
    for item in same:
        reasons.setdefault(item.why, []).append(item.case)
    often = sorted(reasons, key=lambda why: (-len(reasons[why]), why))
    lines = [f"{why}: {_names(reasons[why])}" for why in often[:SHOWN]]
    if len(often) > SHOWN:
        lines.append(f"and {len(often) - SHOWN} more reasons for the same part")
    lines += _others(explained, part)
    lost = verdict.touched.evidence_lost if verdict.touched else {}
    if lost:
        lines.append("evidence lost from retrieval: " + _names([f"{name} ({count})" for name, count in lost.items()]))
    if changes.parts:
        lines.append(f"changed: {', '.join(changes.parts)}")
    if changes.documents:
        lines.append(f"changed documents: {_names(sorted(changes.documents))}")
    return tuple(lines)


def _others(explained: Sequence[_Explained], part: Part) -> list[str]:
    others = Counter(item.part for item in explained if item.part != part)
    return [f"{count} worse for another reason: {_article(name)}" for name, count in sorted(others.items())]


def _most_often(explained: Sequence[_Explained], part: Part) -> str:
    counts = Counter(item.why for item in explained if item.part == part)
    return min(counts, key=lambda why: (-counts[why], why))


def _article(part: str) -> str:
    return {"prompt": "the prompt", "document": "a document", "gold": "the gold set", "unknown": "an unknown part"}.get(
        part, part
    )


def _names(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
