"""(policy, gold set) -> plan: what each critical condition could show, before anything is run.

Pure. The question a plan answers, one condition at a time: a change that does no harm, how often would the condition
be shown to hold? Where that is rare, the gate will often say INCONCLUSIVE, and more cases are the remedy. What else
decides, `must_hold` and the touched cases, is not planned.

The model: of the cases that are answered again a share `discordant` changes its binary score, for better or worse with
probability 1/2 each (the null of McNemar's test). How often the bound of `estimate.bounds` then lies above the margin
is summed exactly over all outcomes; outcomes whose probability is below 1e-9 are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from goldgate.evals import estimate
from goldgate.evals.policy import check_feasible, critical
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import GoldCase, Policy

RARE = 1e-9
MOST_CASES = 20_000
"""A plan for more cases than this is not one; keeps the sums below a second."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a plan takes for granted; all are shares but `design_effect`."""

    discordant: float = 0.15
    """Of the cases answered again: whose score changes, one way or the other."""
    touched: float = 1.0
    """Of all cases: answered again. A reworded prompt touches all, an edited document a few."""
    power: float = 0.8
    """How often a harmless change should be shown to be harmless."""
    design_effect: float = 1.0
    """How many clustered cases count as one independent case."""

    def __post_init__(self) -> None:
        """Raise UsageError for what is not a share, or a design effect below 1."""
        for name in ("discordant", "touched", "power"):
            value = getattr(self, name)
            if not 0 < value <= 1 or (name == "power" and value == 1):
                expected = "between 0 and 1" if name == "power" else "above 0 and at most 1"
                raise UsageError(f"--{name} is {value:g}", expected)
        if not 1 <= self.design_effect <= 1000:
            raise UsageError(f"--design-effect is {self.design_effect:g}", "1 to 1000")


@dataclass(frozen=True, slots=True)
class Line:
    """What one critical condition can show."""

    metric: str
    slice: str
    cases: int
    margin: float
    least_margin: float
    """Smallest margin that so many cases could show, if all were answered again and nothing got worse."""
    passes: float
    """How often a harmless change is shown to be harmless."""
    wanted: int | None
    """Cases with which it would be shown with the wanted power; None: more than 20 000."""
    problem: str = ""
    """Why the condition can never hold, if it cannot."""


def plan(policy: Policy, cases: Sequence[GoldCase], assumed: Assumptions) -> list[Line]:
    """Return one line for each critical condition and slice, in the policy's order."""
    lines = []
    for condition, name, n in critical(policy, cases):
        problem = ""
        try:
            check_feasible(policy, condition, name, n)
        except UsageError as error:
            problem = error.what
        least = estimate.smallest_margin(n, policy.alpha)
        shown = passes(n, condition.margin, policy.alpha, assumed)
        more = wanted(condition.margin, policy.alpha, assumed, condition.min_cases)
        lines.append(Line(condition.metric, name, n, condition.margin, least, shown, more, problem))
    return lines


def passes(n: int, margin: float, alpha: float, assumed: Assumptions) -> float:
    """Return the probability that a harmless change over `n` cases is shown to lose less than the margin."""
    from scipy import stats

    size = math.floor(n / assumed.design_effect)
    m = round(size * assumed.touched)
    if not size:
        return 0.0
    if not m:
        return 1.0
    total = 0.0
    changes = stats.binom(m, assumed.discordant)
    low, high = (int(x) for x in changes.ppf([RARE, 1 - RARE]))
    for changed in range(low, high + 1):
        most = _tolerable(size, m, changed, margin, alpha)
        if most >= 0:
            total += float(changes.pmf(changed) * stats.binom.cdf(most, changed, 0.5))
    return total


def _tolerable(n: int, m: int, changed: int, margin: float, alpha: float) -> int:
    """Return the most losses among `changed` of `m` cases with which the condition holds; -1: not even none."""

    def holds(losses: int) -> bool:
        sample = estimate.Sample(n=n, changed=m, loss=losses, gain=changed - losses)
        return estimate.bounds(sample, alpha)[0] > -margin

    if not holds(0):
        return -1
    low, high = 0, changed
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def wanted(margin: float, alpha: float, assumed: Assumptions, at_least: int = 1) -> int | None:
    """Return how many cases show a harmless change to be harmless with the wanted power."""
    low, high = 0, max(at_least, 2)
    while passes(high, margin, alpha, assumed) < assumed.power:
        if high == MOST_CASES:
            return None
        low, high = high, min(2 * high, MOST_CASES)
    # Counts are whole: the power is not quite monotone, so that a few cases fewer may do as well.
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        if passes(middle, margin, alpha, assumed) < assumed.power:
            low = middle
        else:
            high = middle
    return max(high, at_least)


def table(lines: Sequence[Line], assumed: Assumptions) -> str:
    """Return the plan for people: a table, what it takes for granted, and what to do about what cannot hold."""
    heads = ("condition", "cases", "margin", "least margin", "shown to hold", "cases wanted")
    rows = [heads]
    for line in lines:
        count = f"over {MOST_CASES}" if line.wanted is None else str(line.wanted)
        shown = f"{100 * line.margin:.1f}", f"{100 * line.least_margin:.1f}", f"{100 * line.passes:.0f} %"
        rows.append((f"{line.metric} {line.slice}".strip(), str(line.cases), *shown, count))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    changed = f"of those {100 * assumed.discordant:g} % change, half of them for the better"
    text += [
        "",
        "Margins are in points. The least margin can be shown when all cases are answered again and none gets worse.",
        f"Shown to hold: how often, by a change that does no harm; {100 * assumed.power:g} % are wanted.",
        "Each condition by itself: must_hold, the touched cases and the other conditions may say otherwise.",
        f"Assumed: {100 * assumed.touched:g} % of the cases are answered again, {changed};",
        f"{assumed.design_effect:g} clustered cases count as one.",
    ]
    text += [f"can never hold: {line.problem}; add cases or change the policy" for line in lines if line.problem]
    return "\n".join(text)
