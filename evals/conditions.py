"""(report, baseline, policy) -> conditions: one line per metric and slice, and zero tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from goldgate.evals import estimate
from goldgate.evals.pairs import Comparison, Measured, Pair, measure, missing_score, why_not
from goldgate.pipeline.schema import (
    CaseReport,
    Condition,
    ConditionPolicy,
    ConditionStatus,
    Interval,
    Policy,
    Report,
    Tier,
)

SHOWN = 3
"""Names spelled out in one line before the rest is counted."""

DIGITS = 9
"""Decimals of every figure in a verdict: more would be rounding noise."""

NO_BASELINE = "no production to compare with"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A condition before Holm's correction."""

    policy: ConditionPolicy
    slice: str
    tier: Tier
    status: ConditionStatus | None
    note: str
    sample: estimate.Sample
    identical: int
    missing: tuple[str, ...]
    values: tuple[float, ...]
    level: estimate.Level
    baseline: float | None
    candidate: float | None
    p_worse: float | None
    p_floor: float | None


class Conditions:
    """The conditions of one comparison."""

    def __init__(self, report: Report, baseline: Report | None, comparison: Comparison, policy: Policy) -> None:
        self.report, self.baseline, self.comparison, self.policy = report, baseline, comparison, policy
        self.one_cluster = len({case.cluster for case in report.cases}) < 2
        self.drafts = [
            self._draft(condition, name) for condition in policy.conditions for name in condition.slices or ("",)
        ]

    def conditions(self) -> list[Condition]:
        """Return all conditions: the policy's in its order, then zero tolerance."""
        critical = [p for d in self.drafts if d.tier == "critical" for p in (d.p_worse, d.p_floor) if p is not None]
        limit = holm(critical, self.policy.alpha)
        done = [self._condition(d, limit if d.tier == "critical" else self.policy.alpha) for d in self.drafts]
        return [*done, *(self._zero_tolerance(metric) for metric in self.policy.zero_tolerance)]

    def gaps(self, conditions: Sequence[Condition]) -> list[str]:
        """Return one line for everything critical that was not measured."""
        allowed = set(self.policy.allow_not_measured)
        lines = [
            f"{name_of(c)}: {c.note}"
            for c in conditions
            if c.tier == "critical"
            and (c.status == "not_computed" or (c.status == "not_measured" and c.metric not in allowed))
            and not (self.baseline is None and c.note == NO_BASELINE)
        ]
        if not any(d.tier == "critical" and d.status != "not_measured" for d in self.drafts):
            lines.append("no critical condition is left that could decide")
        return lines

    def needed(self, conditions: Sequence[Condition]) -> dict[str, int]:
        """Return how many more cases would decide each inconclusive critical condition, where that many would."""
        needed: dict[str, int] = {}
        for draft, condition in zip(self.drafts, conditions, strict=False):
            if draft.tier != "critical" or condition.status != "inconclusive":
                continue
            more = estimate.more_cases(int(draft.sample.n), partial(self._decided, draft))
            if more is not None:
                needed[name_of(condition)] = more
        return needed

    def _decided(self, draft: _Draft, factor: float) -> bool:
        """Whether `factor` times as many cases with the same rates would hold or break the condition."""
        lower, upper = estimate.bounds(draft.sample.scaled(factor), self.policy.alpha)
        floor, holds = draft.policy.floor, lower > -draft.policy.margin
        if floor is None:
            return holds or upper < 0
        least, most = draft.level.scaled(factor).bounds(self.policy.alpha)
        return (holds and least >= floor) or upper < 0 or most < floor

    def _draft(self, condition: ConditionPolicy, name: str) -> _Draft:
        status, note = why_not(condition.metric, self.report, self.baseline)
        tier: Tier = condition.tier
        info = self.report.metrics.get(condition.metric)
        if tier == "critical" and info is not None and not info.calibrated and not status:
            tier, note = "advisory", "advisory: the judge is not calibrated against people"
        pairs = [p for p in self.comparison.pairs if not name or name in p.new.slices]
        usable = [(p, m) for p in pairs if not status and (m := measure(condition.metric, p)).scored]
        added = [c for c in self.comparison.added if not name or name in c.slices]
        missing = [] if status else _missing(condition.metric, pairs, added)
        sample, identical = self._paired(usable)
        cases = [
            *(p.new for p, _ in usable),
            *(c for c in added if not status and _value(condition.metric, c) is not None),
        ]
        cases.sort(key=lambda case: case.id)
        values = tuple(v for c in cases if (v := _value(condition.metric, c)) is not None)
        level, floor = estimate.level(values, self._clusters(cases)), condition.floor
        return _Draft(
            policy=condition, slice=name, tier=tier, status=status or None, note=note,  # type: ignore[arg-type]
            sample=sample, identical=identical, missing=tuple(missing), values=values, level=level,
            baseline=mean([m.old for _, m in usable if m.old is not None]),
            candidate=mean([m.new for _, m in usable if m.new is not None] if usable else values),
            p_worse=estimate.p_worse(sample) if sample.changed else None,
            p_floor=level.p_below(floor) if floor is not None and values else None,
        )  # fmt: skip

    def _paired(self, usable: Sequence[tuple[Pair, Measured]]) -> tuple[estimate.Sample, int]:
        # A case whose gold definition changed cannot offset a loss.
        deltas = [min(m.delta, 0.0) if p.revised else m.delta for p, m in usable]
        same = [p.identical and abs(d) < estimate.EPSILON for (p, _), d in zip(usable, deltas, strict=True)]
        return estimate.paired(deltas, self._clusters([p.new for p, _ in usable]), same), sum(same)

    def _clusters(self, cases: Sequence[CaseReport]) -> tuple[str, ...]:
        # One source for all cases: there is nothing to generalise to but its questions.
        return tuple(case.id if self.one_cluster else case.cluster for case in cases)

    def _condition(self, draft: _Draft, limit: float) -> Condition:
        interval = None
        if draft.sample.n and draft.status is None:
            lower, upper = estimate.bounds(draft.sample, self.policy.alpha)
            interval = Interval(lower=round(lower, DIGITS), upper=round(upper, DIGITS))
        status, note = self._status(draft, interval, limit)
        delta = rounded(draft.sample.delta) if interval is not None else None
        return Condition(
            metric=draft.policy.metric, slice=draft.slice, tier=draft.tier,
            n=int(draft.sample.n) or len(draft.values), identical=draft.identical,
            candidate=rounded(draft.candidate), baseline=rounded(draft.baseline), delta=delta,
            interval=interval, margin=draft.policy.margin, floor=draft.policy.floor,
            p_worse=rounded(draft.p_worse), status=status, note=note,
        )  # fmt: skip

    def _status(self, draft: _Draft, interval: Interval | None, limit: float) -> tuple[ConditionStatus, str]:
        if draft.status is not None:
            return draft.status, draft.note
        policy, floor_note = draft.policy, ""
        floor_holds = policy.floor is None
        if policy.floor is not None and draft.values:
            lower, upper = draft.level.bounds(self.policy.alpha)
            floor_holds = lower >= policy.floor
            if upper < policy.floor and draft.p_floor is not None and draft.p_floor <= limit:
                return "broken", joined(draft.note, f"at most {100 * upper:.1f} %, below the floor")
            floor_note = "" if floor_holds else f"the floor is not shown: at least {100 * lower:.1f} %"
        tolerable = interval is not None and interval.lower > -policy.margin
        shown_worse = draft.p_worse is not None and draft.p_worse <= limit
        if interval is not None and interval.upper < 0 and shown_worse and not tolerable:
            return "broken", draft.note
        problem = _shortage(draft, self.baseline is None)
        if problem:
            return "not_computed", joined(draft.note, problem)
        if tolerable and floor_holds:
            return "holds", draft.note
        return "inconclusive", joined(draft.note, floor_note)

    def _zero_tolerance(self, metric: str) -> Condition:
        status, note = why_not(metric, self.report, None)
        cases = sorted(self.report.cases, key=lambda case: case.id)
        values = {c.id: v for c in cases if (v := _value(metric, c)) is not None}
        hits = [name for name, value in values.items() if value < 1]
        word: ConditionStatus
        if hits:
            word, note = "broken", f"zero tolerance: {listed(hits)}"
        elif status:
            word = "not_measured" if status == "not_measured" else "not_computed"
        else:
            missing = [f"{c.id}: {why}" for c in cases if (why := missing_score(metric, c))]
            missing += [f"{p.id}: no longer measured" for p in self.comparison.pairs if _dropped(metric, p)]
            word = "not_computed" if missing or not values else "holds"
            note = listed(missing, "; ") if missing else "zero tolerance" if values else "measured on no case"
        return Condition(
            metric=metric, tier="critical", n=len(values), status=word, note=note,
            candidate=rounded(mean(list(values.values()))),
        )  # fmt: skip


def _shortage(draft: _Draft, alone: bool) -> str:
    """Return why a condition has too little to be decided, or ""."""
    if draft.missing:
        return f"not measured on {len(draft.missing)}: {listed(draft.missing, '; ')}"
    count = len(draft.values) if alone else int(draft.sample.n)
    if count < draft.policy.min_cases:
        return f"{count} cases carry what it needs, {draft.policy.min_cases} are required"
    return NO_BASELINE if alone else ""


def holm(p_values: Sequence[float], alpha: float) -> float:
    """Return the largest p-value that Holm's step-down rejects at `alpha`; -1 when it rejects none."""
    limit, count = -1.0, len(p_values)
    for position, p in enumerate(sorted(p_values)):
        if p > alpha / (count - position):
            break
        limit = p
    return limit


def _missing(metric: str, pairs: Sequence[Pair], added: Sequence[CaseReport]) -> list[str]:
    lines = [f"{p.id}: {m.missing}" for p in pairs if (m := measure(metric, p)).missing]
    return lines + [f"{case.id}: {why}" for case in added if (why := missing_score(metric, case))]


def _dropped(metric: str, pair: Pair) -> bool:
    return metric in pair.old.scores and metric not in pair.new.scores


def _value(metric: str, case: CaseReport) -> float | None:
    score = case.scores.get(metric)
    return score.value if score is not None and case.failure is None else None


def name_of(condition: Condition) -> str:
    """Metric, and slice where there is one, for people."""
    return f"{condition.metric} in {condition.slice}" if condition.slice else condition.metric


def joined(*parts: str) -> str:
    """Join what is not empty."""
    return "; ".join(part for part in parts if part)


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first few items and count the rest."""
    more = len(items) - SHOWN
    return separator.join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def mean(values: Sequence[float]) -> float | None:
    """Mean, or None of nothing."""
    return math.fsum(values) / len(values) if values else None


def rounded(value: float | None) -> float | None:
    """Round to DIGITS."""
    return None if value is None else round(value, DIGITS)
