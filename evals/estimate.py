"""(scores of candidate and production, clusters) -> bounds, p-values and cases needed.

Pure statistics for paired scores in [0, 1]: no I/O, no clock, no random numbers. scipy is imported where it is used, so
that importing the gate stays instant.

The model. The gold set is a sample of questions, drawn in clusters (cases that share a source document). Of `n` cases,
`n - m` are *identical*: their inputs have the same content address, so their difference is 0 and **known**. The other
`m` were answered again and are *sampled*; an observed zero among them is only an observation. The mean difference is
`(m / n) * mean over the m`, and the bounds below are bounds for the m, scaled.

Methods, and where they come from:

* differences in {-1, 0, 1} (binary scores): limits for the shares of losses and of gains, combined into one for their
  difference by MOVER with the multinomial's negative correlation (Newcombe, Stat. Med. 17:2635, 1998; Zou and Donner,
  Stat. Med. 27:1693, 2008). Under 50 cases the limits are Clopper-Pearson's (Biometrika 26:404, 1934); from 50 on
  Wilson's (JASA 22:209, 1927), never narrower than Clopper-Pearson's for the losses alone. Enumerated over all outcomes
  (tests/evals/test_estimate.py) a true difference is missed in at most 5.0 % of samples below 50 cases and 5.6 % above,
  where Tango's score limits and Jeffreys' reach 9 %. Without any loss it is the exact `1 - alpha ** (1 / m)`;
* graded differences: cluster-robust t limits, CR2 variance with the Bell-McCaffrey-Satterthwaite degrees of freedom
  (Bell and McCaffrey, Survey Methodology 28:169, 2002; Pustejovsky and Tipton, JBES 36:672, 2018), but never narrower
  than the gamma limit of Fay and Feuer (Stat. Med. 16:791, 1997) with one unseen complete loss: rare large losses
  leave no trace in a standard error, and a t interval over near-zeros would pass anything;
* clusters: exact limits at the effective sample size n / deff, times the ratio of t quantiles that pays for few
  clusters (Korn and Graubard, Survey Methodology 24:193, 1998). deff is CR2 variance over the independent one, at
  least 1, over all n cases, the known zeros included. For cases as evaluation data: Miller, arXiv 2411.00640;
* p-values: the level at which the bound excludes zero, and for binary scores at least McNemar's exact p.

What no method can see: with not one difference observed, nothing tells how strongly differences would cluster, so the
exact bound counts cases. It holds for independent cases and is optimistic for clustered ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

EPSILON = 1e-9
"""Differences of scores closer to zero than this are rounding."""

FEW = 50
"""Below so many (effective) cases binary limits are exact; above, Wilson's are as good and narrower."""

MAX_CASES = 100_000
"""More cases than this are not a plan."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the bounds need to know of `n` paired differences; sums are over the `changed` ones, `stderr` is CR2's."""

    n: float
    changed: float
    loss: float = 0.0
    gain: float = 0.0
    loss_squares: float = 0.0
    gain_squares: float = 0.0
    ternary: bool = True
    design_effect: float = 1.0
    dof: float = math.inf
    stderr: float = 0.0

    @property
    def delta(self) -> float:
        """Mean difference over all n cases; negative is worse."""
        return (self.gain - self.loss) / self.n if self.n else 0.0

    def flipped(self) -> Sample:
        """Return the same sample with losses and gains exchanged."""
        return replace(
            self, loss=self.gain, gain=self.loss, loss_squares=self.gain_squares, gain_squares=self.loss_squares
        )

    def scaled(self, factor: float) -> Sample:
        """Return what `factor` times as many cases of the same kind would look like."""
        return replace(
            self,
            n=self.n * factor,
            changed=self.changed * factor,
            loss=self.loss * factor,
            gain=self.gain * factor,
            loss_squares=self.loss_squares * factor,
            gain_squares=self.gain_squares * factor,
            dof=self.dof * factor,
            stderr=self.stderr / math.sqrt(factor),
        )


def paired(differences: Sequence[float], clusters: Sequence[str], identical: Sequence[bool]) -> Sample:
    """Summarise n differences (candidate minus production, in [-1, 1]), one cluster name and one flag each.

    A case flagged identical must have the difference 0. A single cluster over all cases says nothing about variation
    between clusters: the cases are then taken as independent (questions about that one source).
    """
    n = len(differences)
    if not n:
        return Sample(0, 0)
    losses = [max(-d, 0.0) for d in differences]
    gains = [max(d, 0.0) for d in differences]
    stderr, dof, design_effect = _cluster_robust(differences, clusters)
    return Sample(
        n=n,
        changed=n - sum(identical),
        loss=math.fsum(losses),
        gain=math.fsum(gains),
        loss_squares=math.fsum(x * x for x in losses),
        gain_squares=math.fsum(x * x for x in gains),
        ternary=all(min(abs(d), abs(abs(d) - 1)) < EPSILON for d in differences),
        design_effect=design_effect,
        dof=dof,
        stderr=stderr,
    )


def bounds(sample: Sample, alpha: float) -> tuple[float, float]:
    """Lower and upper bound of the mean difference over the n cases, each missed with probability about `alpha`."""
    lower = _lower(sample, alpha)
    upper = -_lower(sample.flipped(), alpha)
    return lower, upper


def p_worse(sample: Sample) -> float:
    """One-sided p-value of "the candidate is not worse": small when the upper bound lies below zero.

    For binary scores of independent cases never below the exact McNemar p-value.
    """
    if sample.delta >= 0:
        return 1.0
    p = _smallest_level(lambda alpha: -_lower(sample.flipped(), alpha) < 0)
    return max(p, sign_test(sample.loss, sample.gain)) if sample.ternary else p


@dataclass(frozen=True, slots=True)
class Level:
    """A mean of values in [0, 1], seen from 1 and from 0."""

    shortfall: Sample
    surplus: Sample

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Lower and upper bound of the mean; for binary values of independent cases never inside Clopper-Pearson's."""
        return 1 + _lower(self.shortfall, alpha), -_lower(self.surplus, alpha)

    def p_below(self, floor: float) -> float:
        """One-sided p-value of "the mean is at least `floor`": small when the upper bound lies below it."""
        return _smallest_level(lambda alpha: -_lower(self.surplus, alpha) < floor)

    def scaled(self, factor: float) -> Level:
        """Return what `factor` times as many cases of the same kind would look like."""
        return Level(self.shortfall.scaled(factor), self.surplus.scaled(factor))


def level(values: Sequence[float], clusters: Sequence[str]) -> Level:
    """Summarise n values in [0, 1], one cluster name each."""
    changed = [False] * len(values)
    return Level(paired([v - 1 for v in values], clusters, changed), paired([-v for v in values], clusters, changed))


def sign_test(worse: float, better: float) -> float:
    """Exact one-sided sign test: probability of at least `worse` losses among all changes, if each were a fair coin.

    For binary scores this is McNemar's exact test (McNemar 1947; Fay and Lumbard, Stat. Med. 40:1147, 2021).
    """
    from scipy import special

    return float(special.betainc(worse, better + 1, 0.5)) if worse > EPSILON else 1.0


def smallest_margin(n: float, alpha: float) -> float:
    """Smallest margin that `n` cases can support with no loss at all: 60 cases 0.049, 99 cases 0.030 at 5 %."""
    return -math.expm1(math.log(alpha) / n) if n else 1.0


def more_cases(n: int, decided: Callable[[float], bool]) -> int | None:
    """How many more cases than `n` make `decided(factor)` true, factor = cases / n; None if 100 000 would not."""
    least, most = n, MAX_CASES
    if not n or most <= least or not decided(most / n):
        return None
    while most - least > 1:
        middle = (least + most) // 2
        if decided(middle / n):
            most = middle
        else:
            least = middle
    return most - n


def _lower(sample: Sample, alpha: float) -> float:
    """Lower bound of the mean difference."""
    m, share = sample.changed, sample.changed / sample.n if sample.n else 0.0
    if not m:
        return 0.0
    if sample.loss + sample.gain < EPSILON:
        return -share * smallest_margin(m, alpha)
    width = _binary_width(sample, alpha) if sample.ternary else _graded_width(sample, alpha)
    return max(sample.delta - float(width) * share, -share)


def _effective_size(sample: Sample, alpha: float) -> float:
    """Korn and Graubard's effective number of changed cases."""
    from scipy import special

    ratio = 1.0
    if sample.dof < sample.n - 1 and alpha < 0.49:
        all_cases = special.stdtrit(max(sample.n - 1, 1), 1 - alpha)
        ratio = min(1.0, float(all_cases / special.stdtrit(sample.dof, 1 - alpha)) ** 2)
    return sample.changed * ratio / sample.design_effect


def _binary_width(sample: Sample, alpha: float) -> float:
    """Distance of the lower limit from the mean over the changed cases: MOVER of the limits of losses and gains."""
    size = _effective_size(sample, alpha)
    lost, won = sample.loss / sample.changed, sample.gain / sample.changed
    exact = _most(lost, size, alpha) - lost
    if size < FEW:
        return _mover(lost, won, exact, won - (1 - _most(1 - won, size, alpha)))
    down, up = _wilson(lost, size, alpha) - lost, won - (1 - _wilson(1 - won, size, alpha))
    return max(_mover(lost, won, down, up), exact)


def _mover(lost: float, won: float, down: float, up: float) -> float:
    """Combine the distances of two limits; losses and gains exclude each other, hence the negative correlation."""
    spread = (1 - lost) * (1 - won)
    correlation = -math.sqrt(lost * won / spread) if spread > 0 else 0.0
    return math.sqrt(max(down * down + up * up - 2 * correlation * down * up, 0.0))


def _most(share: float, size: float, alpha: float) -> float:
    """Clopper-Pearson's upper limit of a share."""
    from scipy import special

    return float(special.betaincinv(share * size + 1, (1 - share) * size, 1 - alpha)) if share < 1 else 1.0


def _wilson(share: float, size: float, alpha: float) -> float:
    """Wilson's upper limit of a share."""
    from scipy import special

    z = float(special.ndtri(1 - alpha))
    spread = z * math.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    return (share + z * z / (2 * size) + spread) / (1 + z * z / size)


def _graded_width(sample: Sample, alpha: float) -> float:
    """Distance of the lower limit from the mean over the changed cases: CR2 t, at least Fay-Feuer's for the losses."""
    from scipy import special

    size = _effective_size(sample, alpha)
    per_case = size / sample.changed
    t_width = float(special.stdtrit(max(sample.dof, 1), 1 - alpha)) * sample.stderr * sample.n / sample.changed
    total = sample.loss * per_case
    variance = max(sample.loss_squares - sample.loss**2 / sample.changed, 0.0) * per_case
    # Gamma with the moments of the observed losses plus one unseen complete loss.
    shape, scale = (total + 1) ** 2 / (variance + 1), (variance + 1) / (total + 1)
    rare_width = (min(float(special.gammaincinv(shape, 1 - alpha)) * scale, size) - total) / size
    return max(t_width, rare_width)


def _smallest_level(excluded: Callable[[float], bool]) -> float:
    """Smallest alpha at which a bound excludes the hypothesis, within 1e-12 .. 0.5; 1 when none of these does."""
    low, high = 1e-12, 0.5
    if not excluded(high):
        return 1.0
    if excluded(low):
        return low
    for _ in range(40):
        middle = math.sqrt(low * high)
        if excluded(middle):
            high = middle
        else:
            low = middle
    return high


def _cluster_robust(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float, float]:
    """CR2 standard error of the mean, Satterthwaite degrees of freedom, and design effect (at least 1)."""
    n = len(values)
    mean = math.fsum(values) / n
    sums: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums.setdefault(cluster, []).append(value - mean)
    if n == 1:
        return 0.0, 1.0, 1.0
    if len(sums) == 1:
        sums = {str(i): [value - mean] for i, value in enumerate(values)}
    sizes = [len(group) for group in sums.values()]
    totals = [math.fsum(group) for group in sums.values()]
    weights = [1 / (1 - size / n) for size in sizes]
    variance = math.fsum(w * total * total for w, total in zip(weights, totals, strict=True)) / n**2
    own = [w * (size - size * size / n) for w, size in zip(weights, sizes, strict=True)]
    cross = [w * size * size for w, size in zip(weights, sizes, strict=True)]
    squares = math.fsum(x * x for x in own) + (math.fsum(cross) ** 2 - math.fsum(x * x for x in cross)) / n**2
    dof = math.fsum(own) ** 2 / squares
    independent = math.fsum((value - mean) ** 2 for value in values) / (n * (n - 1))
    design_effect = max(1.0, variance / independent) if independent > 0 else 1.0
    return math.sqrt(variance), max(dof, 1.0), design_effect
