"""pairs -> the touched cases one by one, and the must_hold cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from goldgate.evals import estimate
from goldgate.evals.conditions import rounded
from goldgate.evals.pairs import Comparison, Measured, Pair, evidence_lost, measure, why_not
from goldgate.pipeline.schema import CaseChange, ConditionStatus, MustHold, Policy, Report, Touched

ANSWERED = 0.5
"""A must_hold case is answered when its score is at least this."""


@dataclass(frozen=True, slots=True)
class MustHoldCases:
    record: MustHold
    gaps: tuple[str, ...]


def must_hold_cases(report: Report, baseline: Report, comparison: Comparison, policy: Policy) -> MustHoldCases:
    """Which must_hold cases production answers, and which of them the candidate lost."""
    total, lost, gaps = 0, [], []
    for pair in comparison.pairs:
        if not (pair.new.must_hold or pair.old.must_hold):
            continue
        metric = _deciding(pair, policy, report, baseline)
        measured = measure(metric, pair) if metric else Measured(missing="no metric measures it")
        if measured.new is None or measured.old is None:
            gaps.append(f"must_hold {pair.id}: {measured.missing or 'its evidence is stale'}")
        elif measured.old >= ANSWERED:
            total += 1
            if measured.new < ANSWERED or measured.delta <= -policy.min_change + estimate.EPSILON:
                lost.append(pair.id)
    gaps += [
        f"must_hold {case.id}: {case.failure.message}" for case in comparison.added if case.must_hold and case.failure
    ]
    status: ConditionStatus = "broken" if lost else "not_computed" if gaps else "holds"
    return MustHoldCases(MustHold(total=total, lost=tuple(lost), status=status), tuple(gaps))


def _deciding(pair: Pair, policy: Policy, report: Report, baseline: Report) -> str:
    """Return the metric that says whether a case is answered: refusal where it is due, else the policy's."""
    first = "abstention" if pair.new.answerable is False else policy.must_hold_metric
    for metric in (first, policy.must_hold_metric, "abstention", "evidence_recall", *policy.zero_tolerance):
        present = metric in pair.new.scores or metric in pair.old.scores
        if present and not why_not(metric, report, baseline)[0]:
            return metric
    return ""


def touched_cases(
    report: Report, baseline: Report, comparison: Comparison, policy: Policy, must_hold: MustHoldCases
) -> Touched:
    """Look at every case that was answered again, one by one."""
    touched = [pair for pair in comparison.pairs if not pair.identical]
    usable = [m for m in _touch_metrics(policy) if _counts(m, report, baseline)]
    seen = [_change(pair, usable, policy) for pair in comparison.pairs]
    changes = [change for change, _ in seen if change is not None]
    worse = sum(c.candidate < c.baseline for c in changes)
    better = len(changes) - worse
    lost, whole = evidence_lost(comparison.pairs)
    unclear = [
        p.id for p, (_, measured) in zip(comparison.pairs, seen, strict=True) if not p.identical and not measured
    ]
    p = estimate.sign_test(worse, better) if changes else None
    status = _touched_status(len(touched), worse, better, policy)
    if must_hold.record.lost:
        status = "broken"
    elif status == "holds" and (whole or _stale_now(comparison.pairs, set(unclear))):
        status = "inconclusive"
    elif touched and len(unclear) == len(touched) and status == "holds":
        status = "not_measured"
    return Touched(
        total=len(touched), better=better, worse=worse, p_worse=rounded(p), status=status, cases=tuple(changes),
        evidence_lost=lost,
    )  # fmt: skip


def _touched_status(total: int, worse: int, better: int, policy: Policy) -> ConditionStatus:
    if not worse:
        return "holds"
    total = max(total, worse + better)
    sample = estimate.Sample(n=total, changed=total, loss=worse, gain=better)
    lower, _ = estimate.bounds(sample, policy.alpha)
    if lower > -policy.touched_margin:
        return "holds"
    return "broken" if estimate.sign_test(worse, better) <= policy.alpha else "inconclusive"


def _touch_metrics(policy: Policy) -> tuple[str, ...]:
    return tuple(dict.fromkeys((policy.must_hold_metric, "abstention", "evidence_recall")))


def _counts(metric: str, report: Report, baseline: Report) -> bool:
    info = report.metrics.get(metric)
    return info is not None and info.calibrated and not why_not(metric, report, baseline)[0]


def _change(pair: Pair, metrics: Sequence[str], policy: Policy) -> tuple[CaseChange | None, bool]:
    """Return (what got better or worse, whether anything was measured); the answer counts before its evidence."""
    order = list(metrics)
    if pair.new.answerable is False and "abstention" in order:
        order.sort(key=lambda metric: metric != "abstention")
    measured = False
    for metric in order:
        m = measure(metric, pair)
        if m.new is None or m.old is None:
            continue
        measured = True
        if abs(m.delta) < policy.min_change - estimate.EPSILON or (pair.revised and m.delta > 0):
            continue
        change = CaseChange(case=pair.id, question=pair.new.question, metric=metric, baseline=m.old, candidate=m.new)
        return change, True
    return None, measured


def _stale_now(pairs: Sequence[Pair], unclear: set[str]) -> bool:
    """True when a case lost its evidence from the documents and nothing else tells whether it is still answered."""
    return any(
        pair.id in unclear and any(piece.state == "stale" for piece in pair.new.evidence)
        and any(piece.state != "stale" for piece in pair.old.evidence)
        for pair in pairs
    )  # fmt: skip
