"""evals/estimate.py: bounds that miss the truth as rarely as they say, by enumeration and by simulation."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from goldgate.evals.estimate import (
    Level,
    Sample,
    bounds,
    level,
    more_cases,
    p_worse,
    paired,
    sign_test,
    smallest_margin,
)

ALPHA = 0.05


def single(differences: list[float], identical: int = 0) -> Sample:
    """Every case its own cluster; `identical` further cases are known zeros."""
    values = [*differences, *[0.0] * identical]
    flags = [False] * len(differences) + [True] * identical
    return paired(values, [str(i) for i in range(len(values))], flags)


# ---------------------------------------------------------------- figures that the brief states


@pytest.mark.parametrize(("n", "points"), [(60, 4.9), (99, 3.0), (20, 13.9)])
def test_an_observed_zero_gets_the_exact_bound(n: int, points: float) -> None:
    lower, upper = bounds(single([0.0] * n), ALPHA)
    assert round(-100 * lower, 1) == points
    assert upper == -lower
    assert smallest_margin(n, ALPHA) == pytest.approx(-lower)


def test_a_known_zero_has_no_width() -> None:
    assert bounds(single([], identical=5), ALPHA) == (0.0, 0.0)
    lower, _ = bounds(single([0.0] * 3, identical=117), ALPHA)
    assert lower == pytest.approx(-3 / 120 * (1 - 0.05 ** (1 / 3)))


def test_a_bound_never_reaches_beyond_what_changed() -> None:
    """Three of 120 cases were answered again and all lost: the mean cannot have fallen by more than 2.5 points."""
    assert bounds(single([-1.0] * 3, identical=117), ALPHA)[0] == pytest.approx(-3 / 120)


def test_mcnemar_exact() -> None:
    table = stats.binomtest(9, 12, 0.5, alternative="greater").pvalue
    assert sign_test(9, 3) == pytest.approx(table)
    assert sign_test(0, 3) == sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(1 / 32)


def test_clopper_pearson_floor() -> None:
    exact = stats.binomtest(80, 100).proportion_ci(0.90, method="exact")
    lower, upper = level([1.0] * 80 + [0.0] * 20, [str(i) for i in range(100)]).bounds(ALPHA)
    assert (lower, upper) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_equal_clusters_give_the_classic_t() -> None:
    """CR2 with equal clusters is the t interval over cluster means, with G - 1 degrees of freedom."""
    rng = random.Random(3)
    means = [rng.uniform(-0.4, 0.4) for _ in range(12)]
    sample = paired([m for m in means for _ in range(4)], [str(i) for i in range(12) for _ in range(4)], [False] * 48)
    assert sample.stderr == pytest.approx(stats.sem(means))
    assert sample.dof == pytest.approx(11)
    assert sample.design_effect == pytest.approx(4 * 47 / 44)


def test_one_cluster_is_taken_as_independent_cases() -> None:
    values = [-1.0, 0.0, 0.0, 1.0] * 5
    assert bounds(paired(values, ["one"] * 20, [False] * 20), ALPHA) == bounds(single(values), ALPHA)


def test_clustering_widens() -> None:
    values = [-1.0] * 6 + [0.0] * 54
    together = paired(values, [str(i // 3) for i in range(60)], [False] * 60)
    assert bounds(together, ALPHA)[0] < bounds(single(values), ALPHA)[0] - 0.02


def test_rare_losses_are_not_hidden_by_small_noise() -> None:
    """A t interval over near-zeros has hardly any width; a rare complete loss would never show in it."""
    noise = [0.001 * (-1) ** i for i in range(60)]
    assert bounds(single(noise), ALPHA)[0] < -0.045
    one_loss = bounds(single([-1.0, *noise[1:]]), ALPHA)[0]
    assert one_loss < -0.07  # Clopper-Pearson for 1 of 60: 0.0766; the t interval would say 0.045


# ---------------------------------------------------------------- coverage


@pytest.mark.parametrize(("n", "limit"), [(10, 0.05), (20, 0.05), (40, 0.05), (60, 0.056), (120, 0.056), (200, 0.056)])
def test_binary_coverage_by_enumeration(n: int, limit: float) -> None:
    """All outcomes of n independent cases: no true difference on the grid is missed by more than stated."""
    most = min(n, 75)
    outcomes = [(b, c) for b in range(most + 1) for c in range(most + 1 - b)]
    lower = {(b, c): bounds(Sample(n=n, changed=n, loss=b, gain=c), ALPHA)[0] for b, c in outcomes}
    log_ways = {
        (b, c): math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1) - math.lgamma(n - b - c + 1)
        for b, c in outcomes
    }
    worst = 0.0
    for lost in (0.005, 0.02, 0.05, 0.1, 0.15, 0.2):
        for won in (0.001, 0.02, 0.05, 0.1):
            rest = math.log(1 - lost - won)
            logs = (math.log(lost), math.log(won))
            missed = math.fsum(
                math.exp(log_ways[b, c] + b * logs[0] + c * logs[1] + (n - b - c) * rest)
                for b, c in outcomes
                if lower[b, c] > won - lost
            )
            worst = max(worst, missed)
    assert worst <= limit


def simulated_misses(kind: str, n: int, per: int, repeats: int, share: float) -> tuple[float, float]:
    """Share of samples whose lower, and whose upper bound misses the true mean difference.

    `per` cases a cluster with a common latent draw (pair correlation 0.1), `share` of the cases answered again.
    """
    rng = random.Random(f"{kind} {n} {per} {share}")
    lost, won = 0.12, 0.06
    sizes = (0.33, 0.5, 1.0) if kind == "graded" else (1.0,)
    true = (won - lost) * sum(sizes) / len(sizes) * share
    missed_low = missed_high = 0
    for _ in range(repeats):
        differences, clusters, identical = [], [], []
        for i in range(n):
            if i % per == 0:
                latent = rng.random()
            draw = latent if per > 1 and rng.random() < 0.316 else rng.random()
            again = rng.random() < share
            value = -rng.choice(sizes) if draw < lost else rng.choice(sizes) if draw > 1 - won else 0.0
            if kind == "graded" and not value:
                value = max(-1.0, min(1.0, rng.gauss(0, 0.05)))
            differences.append(value if again else 0.0)
            clusters.append(str(i // per))
            identical.append(not again)
        lower, upper = bounds(paired(differences, clusters, identical), ALPHA)
        missed_low += lower > true
        missed_high += upper < true
    return missed_low / repeats, missed_high / repeats


@pytest.mark.parametrize("kind", ["binary", "graded"])
@pytest.mark.parametrize(("n", "per", "share"), [(20, 1, 1), (60, 3, 1), (120, 3, 1), (120, 3, 0.4), (400, 6, 1)])
def test_coverage_by_simulation(kind: str, n: int, per: int, share: float) -> None:
    """At most 6 % one-sided; the limit leaves room for the noise of 500 samples (standard error 1 point)."""
    low, high = simulated_misses(kind, n, per, 500, share)
    assert low <= 0.07
    assert high <= 0.07


def test_ignoring_clusters_misses_more() -> None:
    """The planted fault of the simulation: strongly clustered cases taken as independent."""
    rng = random.Random(5)
    missed = {True: 0, False: 0}
    for _ in range(400):
        lost = [rng.random() < 0.15 for _ in range(40)]
        values = [-1.0 if lost[i // 5] else 0.0 for i in range(200)]
        for clustered in missed:
            names = [str(i // 5 if clustered else i) for i in range(200)]
            missed[clustered] += bounds(paired(values, names, [False] * 200), ALPHA)[0] > -0.15
    assert missed[True] / 400 <= 0.07
    assert missed[False] / 400 > 0.12


def test_floor_coverage() -> None:
    rng = random.Random(11)
    missed = 0
    for _ in range(400):
        values = [rng.choice([0.0, 0.5, 1.0, 1.0]) for _ in range(60)]
        missed += level(values, [str(i) for i in range(60)]).bounds(ALPHA)[0] > 0.625
    assert missed / 400 <= 0.07


# ---------------------------------------------------------------- properties

DIFFERENCES = st.lists(st.sampled_from([-1.0, -0.5, -0.1, 0.0, 0.0, 0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=60)


@settings(max_examples=150, deadline=None)
@given(DIFFERENCES, st.integers(1, 5))
def test_bounds_enclose_the_mean_and_nest(differences: list[float], per: int) -> None:
    names = [str(i // per) for i in range(len(differences))]
    sample = paired(differences, names, [False] * len(differences))
    wide, narrow = bounds(sample, 0.01), bounds(sample, 0.1)
    assert -1 <= wide[0] <= narrow[0] + 1e-9 <= sample.delta + 2e-9
    assert sample.delta - 2e-9 <= narrow[1] - 1e-9 <= wide[1] <= 1
    mirrored = bounds(paired([-d for d in differences], names, [False] * len(differences)), 0.1)
    assert mirrored == (pytest.approx(-narrow[1]), pytest.approx(-narrow[0]))


@settings(max_examples=150, deadline=None)
@given(DIFFERENCES)
def test_p_worse_agrees_with_the_bound(differences: list[float]) -> None:
    sample = single(differences)
    p, upper = p_worse(sample), bounds(sample, ALPHA)[1]
    if p <= ALPHA - 1e-6:
        assert upper < 1e-9
    if upper < -1e-6 and not sample.ternary:
        assert p <= ALPHA + 1e-6
    if sample.ternary:
        assert p >= sign_test(sample.loss, sample.gain) - 1e-12


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 150), st.data())
def test_one_more_loss_never_raises_a_binary_bound(n: int, data: st.DataObject) -> None:
    losses = data.draw(st.integers(0, n - 1))
    gains = data.draw(st.integers(0, n - 1 - losses))
    before = bounds(Sample(n=n, changed=n, loss=losses, gain=gains), ALPHA)[0]
    assert bounds(Sample(n=n, changed=n, loss=losses + 1, gain=gains), ALPHA)[0] <= before + 1e-12


def test_more_cases() -> None:
    sample = single([-1.0] * 4 + [1.0] * 4 + [0.0] * 92)
    margin = 0.03
    assert bounds(sample, ALPHA)[0] < -margin
    more = more_cases(100, lambda factor: bounds(sample.scaled(factor), ALPHA)[0] > -margin)
    assert more is not None
    assert bounds(sample.scaled((100 + more) / 100), ALPHA)[0] > -margin
    assert bounds(sample.scaled((99 + more) / 100), ALPHA)[0] <= -margin
    assert more_cases(100, lambda factor: False) is None
    assert more_cases(0, lambda factor: True) is None


def test_nothing_at_all() -> None:
    assert bounds(paired([], [], []), ALPHA) == (0.0, 0.0)
    assert bounds(single([-1.0]), ALPHA) == (-1.0, pytest.approx(0.9, abs=1.0))
    assert isinstance(level([], []), Level)


def test_importing_loads_neither_scipy_nor_numpy() -> None:
    code = "import sys, goldgate.evals.estimate; print('scipy' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
