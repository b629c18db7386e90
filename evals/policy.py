"""gate.toml -> Policy, and whether a gold set can ever satisfy it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from goldgate.evals.estimate import smallest_margin
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.params import EvaluateParams, load_toml
from goldgate.pipeline.schema import FORMAT_VERSION, ConditionPolicy, GoldCase, Policy

LLM_PREFIX = "llm_"
"""DeepEval's LLM metrics carry this prefix; which there are depends on the judge."""


def load_policy(path: Path, known: Collection[str] = EvaluateParams().metrics) -> Policy:
    """Read a policy. Raises UsageError for an unknown field or metric (with the nearest name), a metric held twice to
    the same slice, a newer format, or a policy without any critical condition."""
    policy = load_toml(path, Policy)
    if policy.format_version > FORMAT_VERSION:
        raise UsageError(f"{path} has format {policy.format_version}", f"at most {FORMAT_VERSION}", "upgrade goldgate")
    named = [c.metric for c in policy.conditions]
    for metric in (*named, *policy.zero_tolerance, policy.must_hold_metric, *policy.allow_not_measured):
        if metric not in known and not metric.startswith(LLM_PREFIX):
            near = difflib.get_close_matches(metric, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise UsageError(f"{path}: metric {metric!r} is unknown", "", hint)
    held = [(c.metric, name) for c in policy.conditions for name in (c.slices or ("",))]
    twice = sorted({f"{metric} {name}".strip() for metric, name in held if held.count((metric, name)) > 1})
    if twice:
        raise UsageError(f"{path}: {twice[0]} has two conditions", "one per metric and slice", "remove one")
    if not any(condition.tier == "critical" for condition in policy.conditions):
        raise UsageError(f"{path} has no critical condition", "at least one", 'set tier = "critical" on one')
    return policy


def feasible(policy: Policy, cases: Sequence[GoldCase]) -> None:
    """Raise UsageError when a critical condition could never hold, even if not one regenerated case got worse.

    The message names the smallest margin that the gold set supports: `1 - alpha ** (1 / n)`.
    """
    for condition, name, n in critical(policy, cases):
        check_feasible(policy, condition, name, n)


def critical(policy: Policy, cases: Sequence[GoldCase]) -> Iterator[tuple[ConditionPolicy, str, int]]:
    """Yield every critical condition with its slice ("" for all cases) and how many cases carry what it needs."""
    for condition in policy.conditions:
        if condition.tier == "critical":
            for name in condition.slices or ("",):
                n = sum(applies(condition.metric, case) for case in cases if not name or name in case.slices)
                yield condition, name, n


def check_feasible(policy: Policy, condition: ConditionPolicy, name: str, n: int) -> None:
    """Raise UsageError when `n` cases could never show the condition to hold, as `feasible` does."""
    where = f"{condition.metric} in slice {name}" if name else condition.metric
    if n < condition.min_cases:
        raise UsageError(
            f"{where} needs {condition.min_cases} cases, the gold set has {n} that carry what it needs",
            "", "add cases or lower min_cases",
        )  # fmt: skip
    margin = smallest_margin(n, policy.alpha)
    if margin >= condition.margin:
        raise UsageError(
            f"{where} has a margin of {100 * condition.margin:.1f} points, which {n} cases can never show to hold",
            f"more than {100 * margin:.1f} points", "widen the margin or add cases",
        )  # fmt: skip


def applies(metric: str, case: GoldCase) -> bool:
    """True when a gold case carries what a metric needs."""
    if metric in {"evidence_recall", "evidence_precision"}:
        return bool(case.evidence)
    if metric == "correctness":
        return case.answerable is not False and bool(case.expected_answer or case.must_say)
    if metric == "abstention":
        return case.answerable is not None
    return True
