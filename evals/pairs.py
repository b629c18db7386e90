"""(report, baseline) -> the same case on both sides, and what changed between them.

Pure. A pair is *identical* when both answers have the same content address and say the same: whatever was not
generated again is a known zero, not an observed one. Cases whose gold definition changed may lose but never gain:
a new definition cannot offset a loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from goldgate.pipeline.schema import CaseReport, MetricInfo, Passage, Report, ResolvedEvidence, Score

EVIDENCE_METRICS = frozenset({"evidence_recall", "evidence_precision"})
"""Metrics that stale evidence takes away; the policy limits how much of it."""

ANSWER_METRICS = frozenset({"faithfulness", "answer_relevance", "contextual_relevance", "evidence_precision"})
"""Metrics that can stop applying to a case because of what was answered or retrieved, a refusal for example."""


EPSILON = 1e-9
"""Differences of scores closer to zero than this are rounding."""

SEVERAL = 2
"""A document that loses its evidence in all of at least so many cases is lost as a whole."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One case as production (`old`) and the candidate (`new`) answered it."""

    new: CaseReport
    old: CaseReport
    identical: bool
    revised: bool

    @property
    def id(self) -> str:
        """The case's id."""
        return self.new.id


@dataclass(frozen=True, slots=True)
class Comparison:
    """All pairs, by case id, and the gold cases that differ."""

    pairs: tuple[Pair, ...]
    added: tuple[CaseReport, ...]
    removed: tuple[str, ...]
    incomparable: tuple[str, ...]
    changed_cases: dict[str, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric on one pair, or why there is none. Without scores and without a reason the metric does not apply."""

    new: float | None = None
    old: float | None = None
    missing: str = ""
    stale: bool = False

    @property
    def scored(self) -> bool:
        """True when both sides have a score."""
        return self.new is not None and self.old is not None

    @property
    def delta(self) -> float:
        """Candidate minus production; only where `scored`."""
        return (self.new or 0.0) - (self.old or 0.0)


def compare(report: Report, baseline: Report, gold: Mapping[str, str] | None) -> Comparison:
    """Match cases by id. `gold` is production's own gold set (id -> case digest) where `baseline` was scored again."""
    before = dict(gold) if gold is not None else {case.id: case.case_digest for case in baseline.cases}
    old = {case.id: case for case in baseline.cases}
    changed: dict[str, str] = {}
    pairs, added, incomparable = [], [], []
    new_ids = {case.id for case in report.cases}
    for case in sorted(report.cases, key=lambda c: c.id):
        if case.id not in before:
            changed[case.id] = "added"
        elif before[case.id] != case.case_digest:
            changed[case.id] = "changed"
        other = old.get(case.id)
        if other is None:
            added.append(case)
            continue
        if other.case_digest != case.case_digest:
            incomparable.append(case.id)
            continue
        pairs.append(Pair(case, other, _same_answer(case, other), case.id in changed))
    removed = sorted((set(before) | set(old)) - new_ids)
    changed.update(dict.fromkeys(removed, "removed"))
    return Comparison(tuple(pairs), tuple(added), tuple(removed), tuple(incomparable), dict(sorted(changed.items())))


def _same_answer(new: CaseReport, old: CaseReport) -> bool:
    if new.answer is None or old.answer is None or new.key != old.key or not new.key:
        return False
    return new.answer.text == old.answer.text and _texts(new.answer.passages) == _texts(old.answer.passages)


def _texts(passages: Iterable[Passage] | None) -> list[tuple[str, str]] | None:
    """What the model saw. Ranking scores and offsets may shift when something else in the documents changed."""
    return None if passages is None else [(passage.document, passage.text) for passage in passages]


def measure(metric: str, pair: Pair) -> Measured:
    """Return the metric's scores on both sides of a pair, or why they are missing."""
    new, old = pair.new.scores.get(metric), pair.old.scores.get(metric)
    if metric in EVIDENCE_METRICS and (_gone(new, pair.new) or _gone(old, pair.old)):
        return Measured(stale=True)
    missing = missing_score(metric, pair.new) or missing_score(metric, pair.old)
    if missing:
        return Measured(missing=missing)
    if (new is None) != (old is None) and metric not in ANSWER_METRICS:
        return Measured(missing="measured on one side only")
    if new is None or old is None:
        return Measured()
    return Measured(new.value, old.value)


def missing_score(metric: str, case: CaseReport) -> str:
    """Return why a score that should be there is not; "" when it is there, does not apply, or its evidence is stale."""
    if case.failure is not None:
        return f"no answer ({case.failure.kind}: {case.failure.message})"
    score = case.scores.get(metric)
    if score is None or score.value is not None or (metric in EVIDENCE_METRICS and _gone(score, case)):
        return ""
    return score.reason


def _gone(score: Score | None, case: CaseReport) -> bool:
    """True when there is no score because every piece of evidence is stale."""
    stale = bool(case.evidence) and all(piece.state == "stale" for piece in case.evidence)
    return stale and (score is None or (score.value is None and score.failure is None))


def why_not(metric: str, report: Report, baseline: Report | None) -> tuple[str, str]:
    """Return (status, reason) when a metric cannot be compared between two reports at all; ("", "") when it can."""
    new = report.metrics.get(metric)
    if new is None:
        return "not_computed", "was not computed on the candidate"
    old = baseline.metrics.get(metric) if baseline is not None else new
    if old is None:
        return "not_computed", "was not computed on production: score production again"
    if new.not_measured or old.not_measured:
        if new.not_measured and old.not_measured:
            return "not_measured", new.not_measured
        side = "the candidate" if new.not_measured else "production"
        return "not_computed", f"not measured on {side}: {new.not_measured or old.not_measured}"
    if _instrument(new) != _instrument(old):
        return "not_computed", "was measured with other code or another judge on production: score production again"
    return "", ""


def _instrument(info: MetricInfo) -> tuple[str, str]:
    return info.judge, info.code_digest


# ---------------------------------------------------------------- evidence


def found(piece: ResolvedEvidence, passages: Iterable[Passage]) -> bool:
    """True when one passage of the document overlaps the piece by half of the shorter of the two."""
    return any(
        2 * (min(piece.end, passage.end) - max(piece.start, passage.start))
        >= min(piece.end - piece.start, passage.end - passage.start)
        > 0
        for passage in passages
        if passage.document == piece.document
    )


def lost_documents(pair: Pair) -> tuple[set[str], set[str]]:
    """Return the documents whose evidence production retrieved for this case and the candidate does not.

    The first set holds those where the evidence is still there, the second those where it is stale.
    """
    recall = pair.old.scores.get("evidence_recall")
    if pair.identical or recall is None or not recall.value or pair.new.answer is None:
        return set(), set()
    known = {piece.document for piece in pair.old.evidence if piece.state != "stale"}
    stale = {piece.document for piece in pair.new.evidence if piece.state == "stale"} & known
    measured = measure("evidence_recall", pair)
    if not measured.scored or measured.delta > -EPSILON:
        return set(), stale
    passages = pair.new.answer.passages or ()
    unseen = {p.document for p in pair.new.evidence if p.state != "stale" and not found(p, passages)}
    return (unseen or known - stale), stale


def evidence_lost(pairs: Iterable[Pair]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return (document -> cases that lost its evidence, documents not retrieved for any of their several cases)."""
    had: dict[str, int] = {}
    lost: dict[str, int] = {}
    unseen: dict[str, int] = {}
    for pair in pairs:
        recall = pair.old.scores.get("evidence_recall")
        gone, stale = lost_documents(pair)
        for document in {piece.document for piece in pair.old.evidence if piece.state != "stale"}:
            had[document] = had.get(document, 0) + bool(recall is not None and recall.value)
            if document in gone | stale:
                lost[document] = lost.get(document, 0) + 1
            if document in gone:
                unseen[document] = unseen.get(document, 0) + 1
    whole = sorted(document for document, count in unseen.items() if count == had[document] >= SEVERAL)
    return dict(sorted(lost.items())), tuple(whole)
