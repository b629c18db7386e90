"""(report, baseline report, policy) -> Verdict. Pure: no I/O, no clock, no random numbers.

The rule, in the order in which the words are tried:

* **FAIL**: harm was measured. A critical condition is broken (worse with its upper bound below 0 and not shown
  tolerable, or its floor shown broken; Holm's step-down over all critical conditions, Scand. J. Stat. 6:65, 1979), a
  `must_hold` case is lost, a zero-tolerance metric is hit, or the touched cases got worse. Harm that was measured stays
  measured, whatever else is missing.
* **NOT_COMPUTED**: something critical was not measured.
* **INCONCLUSIVE**: a critical condition is neither shown to hold nor shown broken, or a supporting one is broken.
* **PASS**: every critical condition holds, an intersection-union test at `alpha` each without correction (Berger,
  Technometrics 24:295, 1982), and so do the touched cases and `must_hold`.

The touched cases. A mean over the gold set hides local harm, so every case that was answered again is looked at, one
by one: did its answer (correctness, or refusal where it is due) or, failing that, its evidence get better or worse by
at least `min_change`? They hold when none got worse. When some did, they hold only if the exact lower bound of the net
loss among the touched cases lies above `-touched_margin`: a reworded prompt that touches all 120 cases and flips four
each way is shown to be harmless, one case of five lost is not. They are broken when the exact sign test rejects and
that bound is not met, or with a lost `must_hold`; everything between is INCONCLUSIVE, as is a document whose evidence
is no longer retrieved for any of several cases. "Not significantly worse" is never enough.

Tiers: critical decides; supporting turns PASS into INCONCLUSIVE when shown broken; advisory is shown only. A critical
metric whose judge is not calibrated is advisory, and its line says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from goldgate.evals.conditions import Conditions, listed, name_of
from goldgate.evals.diagnose import diagnose
from goldgate.evals.pairs import Comparison, compare
from goldgate.evals.policy import feasible, load_policy
from goldgate.evals.touched import MustHoldCases, must_hold_cases, touched_cases
from goldgate.pipeline.schema import (
    FORMAT_VERSION,
    Condition,
    EvidenceChange,
    Policy,
    Report,
    Touched,
    Verdict,
    VerdictWord,
)

__all__ = ["bootstrap_problems", "decide", "feasible", "load_policy", "report_digest"]


def decide(
    report: Report,
    baseline: Report | None,
    policy: Policy,
    *,
    baseline_release: str | None = None,
    baseline_gold: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge `report` against production's `baseline` under `policy`; the diagnosis is part of the verdict.

    `baseline_release` is production's release digest. Where `baseline` was scored again under the candidate's gold set,
    `baseline_gold` (case id -> case digest) is production's own, so that removed and changed cases are seen.
    """
    whole = _readable(report, baseline, policy, baseline_release)
    if whole is not None:
        return whole
    if baseline is None:
        return _without_baseline(report, policy)
    comparison = compare(report, baseline, baseline_gold)
    lines = Conditions(report, baseline, comparison, policy)
    conditions = lines.conditions()
    must_hold = must_hold_cases(report, baseline, comparison, policy)
    touched = touched_cases(report, baseline, comparison, policy, must_hold)
    gaps = [*_gaps(report, comparison, policy, touched), *lines.gaps(conditions), *must_hold.gaps]
    word, reason = _word(conditions, touched, must_hold, gaps)
    verdict = Verdict(
        verdict=word,
        candidate=report_digest(report),
        baseline=baseline_release,
        conditions=tuple(conditions),
        touched=touched,
        must_hold=must_hold.record,
        needed_cases=lines.needed(conditions) if word == "INCONCLUSIVE" else {},
        reason=reason,
        evidence=_evidence(report),
        changed_cases=comparison.changed_cases,
        skipped_documents=report.unreadable,
        digests=_digests(report, baseline, policy),
    )
    return verdict.model_copy(update={"diagnosis": diagnose(report, baseline, verdict)})


def report_digest(report: Report) -> str:
    """Return the SHA-256 of a report's canonical JSON, whatever the order of its cases."""
    from goldgate.pipeline.store import digest_json

    cases = tuple(sorted(report.cases, key=lambda case: case.id))
    return digest_json(report.model_copy(update={"cases": cases}))


def bootstrap_problems(report: Report, policy: Policy) -> list[str]:
    """Return what speaks against a report by itself, without production: one line each, worst first.

    Zero-tolerance hits, floors shown broken, and whatever a critical condition needs that was not measured.
    """
    if report.format_version != FORMAT_VERSION:
        return [f"the report has format {report.format_version}, this goldgate reads {FORMAT_VERSION}"]
    lines = Conditions(report, None, _alone(report), policy)
    conditions = lines.conditions()
    broken = [_harm(c) for c in conditions if c.tier == "critical" and c.status == "broken"]
    return [*broken, *_gaps(report, _alone(report), policy), *lines.gaps(conditions)]


def _alone(report: Report) -> Comparison:
    return Comparison((), tuple(sorted(report.cases, key=lambda case: case.id)), (), (), {})


def _readable(report: Report, baseline: Report | None, policy: Policy, release: str | None) -> Verdict | None:
    """Return the verdict on reports that cannot be read at all, else None."""
    problem = ""
    for name, one in (("the candidate's", report), ("production's", baseline)):
        if one is None or problem:
            continue
        ids = [case.id for case in one.cases]
        if one.format_version != FORMAT_VERSION:
            problem = f"{name} report has format {one.format_version}, this goldgate reads {FORMAT_VERSION}"
        elif not ids:
            problem = f"{name} report has no cases"
        elif len(set(ids)) != len(ids):
            problem = f"{name} report has the case {next(i for i in sorted(ids) if ids.count(i) > 1)} twice"
    if not problem:
        return None
    verdict = Verdict(
        verdict="NOT_COMPUTED",
        candidate=report_digest(report),
        baseline=release,
        reason=problem,
        skipped_documents=report.unreadable,
        digests=_digests(report, baseline, policy),
    )
    return verdict.model_copy(update={"diagnosis": diagnose(report, baseline, verdict)})


def _without_baseline(report: Report, policy: Policy) -> Verdict:
    problems = bootstrap_problems(report, policy)
    verdict = Verdict(
        verdict=None,
        candidate=report_digest(report),
        baseline=None,
        conditions=tuple(Conditions(report, None, _alone(report), policy).conditions()),
        reason=": ".join(["no_baseline", *([listed(problems, "; ")] if problems else [])]),
        evidence=_evidence(report),
        skipped_documents=report.unreadable,
        digests=_digests(report, None, policy),
    )
    return verdict.model_copy(update={"diagnosis": diagnose(report, None, verdict)})


def _evidence(report: Report) -> tuple[EvidenceChange, ...]:
    """Return what a person should review: stale first, then moved, by case."""
    found = [
        EvidenceChange(case=case.id, document=piece.document, state=piece.state, note=piece.note)
        for case in report.cases
        for piece in case.evidence
        if piece.state != "resolved"
    ]
    return tuple(sorted(found, key=lambda change: (change.state != "stale", change.case, change.document)))


def _digests(report: Report, baseline: Report | None, policy: Policy) -> dict[str, str]:
    from goldgate.pipeline.store import digest_json

    digests = {"gold": report.gold_digest, "policy": digest_json(policy)}
    if baseline is not None:
        digests["baseline_report"] = report_digest(baseline)
    return {**digests, **{f"part.{name}": digest for name, digest in sorted(report.parts.items())}}


def _gaps(report: Report, comparison: Comparison, policy: Policy, touched: Touched | None = None) -> list[str]:
    """Return one line for everything about gold set and documents that keeps the verdict from being computed."""
    lines = []
    if touched is not None and touched.status == "not_measured":
        lines.append(f"none of the {touched.total} touched cases could be looked at")
    unreviewed = [name for name in comparison.removed if name not in policy.reviewed_removals]
    if unreviewed:
        lines.append(f"removed from the gold set without review: {listed(unreviewed)}")
    changed = [name for name in comparison.incomparable if name not in policy.reviewed_removals]
    if changed:
        lines.append(f"production was not measured under the changed gold case: {listed(changed)}")
    pieces = [piece for case in report.cases for piece in case.evidence]
    stale = sum(piece.state == "stale" for piece in pieces)
    if pieces and stale / len(pieces) > policy.max_stale_share:
        limit = f"{100 * policy.max_stale_share:.0f} % are tolerated"
        names = sorted(c.id for c in report.cases if any(piece.state == "stale" for piece in c.evidence))
        lines.append(f"{stale} of {len(pieces)} pieces of evidence are stale, {limit}: {listed(names)}")
    if len(report.unreadable) > policy.max_unreadable:
        names = [document.id for document in report.unreadable]
        lines.append(f"{len(names)} documents were skipped, {policy.max_unreadable} are tolerated: {listed(names)}")
    return lines


def _word(
    conditions: Sequence[Condition], touched: Touched, must_hold: MustHoldCases, gaps: Sequence[str]
) -> tuple[VerdictWord, str]:
    harms = [_harm(c) for c in conditions if c.tier == "critical" and c.status == "broken"]
    if must_hold.record.lost:
        harms.append(f"must_hold lost: {listed(must_hold.record.lost)}")
    elif touched.status == "broken":
        harms.append(f"of {touched.total} touched cases {touched.worse} got worse and {touched.better} better")
    if harms:
        return "FAIL", listed(harms, "; ")
    if gaps:
        return "NOT_COMPUTED", listed(gaps, "; ")
    doubts = [_doubt(c) for c in conditions if c.tier == "critical" and c.status == "inconclusive"]
    doubts += [f"supporting: {_harm(c)}" for c in conditions if c.tier == "supporting" and c.status == "broken"]
    if touched.status == "inconclusive":
        doubts.append(_touched_doubt(touched))
    if doubts:
        return "INCONCLUSIVE", listed(doubts, "; ")
    left_out = [name_of(c) for c in conditions if c.tier == "critical" and c.status == "not_measured"]
    reason = "every critical condition is shown to hold"
    return "PASS", f"{reason}; not measured: {', '.join(left_out)}" if left_out else reason


def _harm(condition: Condition) -> str:
    if condition.interval is None or (condition.interval.upper >= 0 or "floor" in condition.note):
        return f"{name_of(condition)}: {condition.note}"
    least, delta = -100 * condition.interval.upper, -100 * (condition.delta or 0.0)
    margin = 100 * (condition.margin or 0.0)
    return f"{name_of(condition)} fell by {delta:.1f} points (at least {least:.1f}; margin {margin:.1f})"


def _doubt(condition: Condition) -> str:
    if condition.interval is None or condition.interval.lower > -(condition.margin or 0.0):
        return f"{name_of(condition)}: {condition.note}"
    worst = -100 * condition.interval.lower
    return f"{name_of(condition)} could be {worst:.1f} points worse (margin {100 * (condition.margin or 0.0):.1f})"


def _touched_doubt(touched: Touched) -> str:
    if touched.worse:
        return f"{touched.worse} of {touched.total} touched cases got worse, {touched.better} better"
    documents = [name for name, count in touched.evidence_lost.items() if count > 1]
    if documents:
        return f"no longer retrieved for any of its cases: {listed(documents)}"
    return "evidence is stale for cases that nothing else measures"
