"""How often the gate is wrong, on answers that people judged.

    .venv/bin/python -m bench.verdict_error_rates [--samples 100] [--margin 0.05] [--half report]

EVOUNA-NQ holds the answers of five systems to the same questions, each judged right or wrong by people, so the true
difference between any two systems is known. Every run draws n questions (with replacement: the half is the population)
and lets the gate decide between two systems from the people's labels, with `golden/gate.toml` but for three things: its
correctness condition alone, `--margin` as its margin, and no least number of cases. Every answer counts as answered
again. Beside it, on the same draws, stand the rules of other tools and the plain rule, a t interval.

* null: the labels of a pair are swapped per question with probability 1/2, so neither system is better.
  A FAIL is a *false block*.
* bad: the candidate is truly worse by the margin or more. A PASS is a *bad promotion*.
* worse, tolerable: truly worse by less than the margin. good: truly better.

A rule that was tuned must be reported on the other half of the questions: `--half tuning` gives the first. Target:
false blocks and bad promotions of the gate at most 5 % each at every n.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from pathlib import Path

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy import special

from bench.measure import ROOT, finish, machine, not_measured, parser, positive, say, several, show
from goldgate.evals.calibrate import SYSTEMS, evouna
from goldgate.evals.estimate import sign_test
from goldgate.evals.gate import decide, load_policy
from goldgate.pipeline.schema import Answer, CaseReport, MetricInfo, Passage, Policy, Report, Score

TARGET = 0.05
SIZES = (50, 100, 200, 400)
HALVES = ("tuning", "report")
METRIC = "correctness"
KINDS = ("null", "bad", "worse, tolerable", "good")
WORDS = ("PASS", "FAIL", "INCONCLUSIVE")

Rule = Callable[[int, int, int, float], str]
"""(questions, losses, gains, production's mean) -> PASS, FAIL or INCONCLUSIVE."""


@dataclass
class Tally:
    """Decisions of one rule at one number of questions, by kind of pair."""

    words: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})

    def share(self, kind: str, word: str) -> float:
        """Share of the draws of a kind that got the word."""
        total = self.words[kind].total()
        return self.words[kind][word] / total if total else math.nan


# ---------------------------------------------------------------- the gate itself


def gate_rule(policy: Policy) -> Rule:
    """Return the whole gate as a rule: real reports go through `decide`.

    With one metric and every question its own cluster, the verdict depends on the counts alone: each is decided once.
    """

    @functools.cache
    def rule(n: int, losses: int, gains: int) -> str:
        production = _report("a", n, range(losses, losses + gains))
        candidate = _report("b", n, range(losses))
        word = decide(candidate, production, policy, baseline_release="production").verdict
        if word not in WORDS:
            raise AssertionError(f"the gate said {word}")
        return word

    return lambda n, losses, gains, _mean: rule(n, losses, gains)


def replayed_policy(margin: float) -> Policy:
    """Return the shipped policy with its correctness condition alone, at this margin, for any number of cases."""
    policy = load_policy(ROOT / "golden" / "gate.toml")
    kept = [c.model_copy(update={"margin": margin, "min_cases": 1}) for c in policy.conditions if c.metric == METRIC]
    return policy.model_copy(update={"conditions": tuple(kept), "zero_tolerance": (), "max_stale_share": 1.0})


def _report(side: str, n: int, wrong: range) -> Report:
    """A report over n questions; `wrong` are those that this side alone got wrong, the rest counts as right on both."""
    return Report.model_construct(
        format_version=1, system="builtin", parts={"model": side}, gold_digest="gold", documents={}, unreadable=(),
        git={},
        metrics={METRIC: MetricInfo(name=METRIC, judge="people", calibrated=True, code_digest="labels")},
        cases=tuple(_case(side, number, number not in wrong) for number in range(n)),
    )  # fmt: skip


def _case(side: str, number: int, right: bool) -> CaseReport:
    passages = (Passage(chunk="c", document="d", start=0, end=1, text="t", score=1.0),)
    return CaseReport.model_construct(
        id=f"q{number}", question="q", cluster=f"q{number}", slices=(), language="en", must_hold=False, answerable=True,
        case_digest="gold", key=f"{side}{number}", answer=Answer(text=f"{side}{number}", passages=passages),
        failure=None, evidence=(), scores={METRIC: Score(value=float(right))},
    )  # fmt: skip


# ---------------------------------------------------------------- other rules


def drop_rule(points: float) -> Rule:
    """A mean drop of more than so many points blocks."""
    return lambda n, losses, gains, _mean: "FAIL" if 100 * (losses - gains) / n > points else "PASS"


def floor_rule(true_mean: float, points: float) -> Rule:
    """A fixed floor so many points under what production is known to reach."""

    def rule(n: int, losses: int, gains: int, mean: float) -> str:
        return "FAIL" if 100 * (mean + (gains - losses) / n) < 100 * true_mean - points else "PASS"

    return rule


def significant_rule(points: float) -> Rule:
    """Blocks when worse by McNemar's exact test and by more than so many points."""

    def rule(n: int, losses: int, gains: int, _mean: float) -> str:
        return "FAIL" if 100 * (losses - gains) / n > points and sign_test(losses, gains) <= TARGET else "PASS"

    return rule


def plain_rule(margin: float) -> Rule:
    """The rule of the gate with nothing but a t interval over all differences."""

    def rule(n: int, losses: int, gains: int, _mean: float) -> str:
        delta = (gains - losses) / n
        variance = ((losses + gains) - n * delta**2) / (n - 1)
        width = float(special.stdtrit(n - 1, 1 - TARGET)) * math.sqrt(variance / n)
        if delta - width > -margin:
            return "PASS"
        return "FAIL" if delta + width < 0 else "INCONCLUSIVE"

    return rule


# ---------------------------------------------------------------- the replay


def draws(labels: np.ndarray, kind: str, pairs: Sequence[tuple[int, int]], n: int, samples: int, seed: int) -> Iterator[
    tuple[int, int, int, float, float]
]:  # fmt: skip
    """Yield (n, losses, gains, production's mean in the draw, its true mean) for every pair and sample."""
    for pair in pairs:
        rng = np.random.default_rng([seed, n, KINDS.index(kind), *pair])
        for _ in range(samples):
            drawn = labels[rng.integers(0, len(labels), n)][:, pair]
            true_mean = labels[:, pair[0]].mean()
            if kind == "null":
                swap = rng.random(n) < 0.5
                drawn = np.where(swap[:, None], drawn[:, ::-1], drawn)
                true_mean = labels[:, list(pair)].mean()
            old, new = drawn[:, 0], drawn[:, 1]
            yield n, int((old & ~new).sum()), int((~old & new).sum()), float(old.mean()), float(true_mean)


def kinds_of(labels: np.ndarray, margin: float) -> dict[str, list[tuple[int, int]]]:
    """Return the pairs (production, candidate) of each kind; at the null a pair has no direction."""
    systems = range(labels.shape[1])
    made: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    made["null"] = list(combinations(systems, 2))
    for old, new in permutations(systems, 2):
        difference = labels[:, new].mean() - labels[:, old].mean()
        made["bad" if difference <= -margin else "worse, tolerable" if difference < 0 else "good"].append((old, new))
    return made


def replay(labels: np.ndarray, sizes: Sequence[int], samples: int, margin: float) -> dict[str, dict[int, Tally]]:
    """Return for each rule and number of questions what it decided."""
    rules: dict[str, Rule] = {
        "this gate": gate_rule(replayed_policy(margin)),
        "plain rule (t interval)": plain_rule(margin),
        "mean drop > 1.5 points blocks": drop_rule(1.5),
        "mean drop > 5 points blocks": drop_rule(5),
        "floor 2 points under production": lambda *_: "",  # needs production's true mean: made per draw
        "significant and > 2 points blocks": significant_rule(2),
    }
    tallies = {name: {n: Tally() for n in sizes} for name in rules}
    for kind, pairs in kinds_of(labels, margin).items():
        for n in sizes:
            say(f"{kind}: {len(pairs)} pairs, {n} questions, {samples} draws each")
            for size, losses, gains, mean, true_mean in draws(labels, kind, pairs, n, samples, seed=0):
                for name, rule in rules.items():
                    used = floor_rule(true_mean, 2) if name.startswith("floor") else rule
                    tallies[name][n].words[kind][used(size, losses, gains, mean)] += 1
    return tallies


def main(arguments: list[str] | None = None) -> int:
    """Replay and print; return the exit code."""
    options = parser(__doc__)
    options.add_argument("--samples", type=positive, default=100, help="draws for each pair and n (default: 100)")
    options.add_argument("--margin", type=float, default=0.05, help="margin, as a share (default: 0.05)")
    options.add_argument("--half", choices=HALVES, default="report", help="half of the questions (default: report)")
    options.add_argument("--sizes", type=several, nargs="+", default=list(SIZES), help="numbers of questions")
    chosen = options.parse_args(arguments)
    show(machine("scipy"))
    path = chosen.data / "evouna" / "NQ.json"
    if not path.is_file():
        not_measured(f"{path} is not there")
    rows = evouna(path, HALVES.index(chosen.half))
    labels = np.array([[bool(row[f"judge_{system}"]) for system in SYSTEMS] for row in rows])
    pairs = {kind: len(found) for kind, found in kinds_of(labels, chosen.margin).items()}
    means = ", ".join(f"{name} {100 * labels[:, i].mean():.1f}" for i, name in enumerate(SYSTEMS))
    show(f"EVOUNA-NQ, {chosen.half} half: {len(rows)} questions; right by people, in %: {means}")
    show(
        f"margin {100 * chosen.margin:g} points; pairs: {', '.join(f'{kind} {count}' for kind, count in pairs.items())}"
    )
    tallies = replay(labels, chosen.sizes, chosen.samples, chosen.margin)
    heads = " / ".join(map(str, chosen.sizes))
    asked = {
        "false block": ("null", "FAIL"), "bad promotion": ("bad", "PASS"), "null passed": ("null", "PASS"),
        "null left to a person": ("null", "INCONCLUSIVE"), "bad failed": ("bad", "FAIL"),
        "tolerable passed": ("worse, tolerable", "PASS"), "good passed": ("good", "PASS"),
    }  # fmt: skip
    show(f"\n| rule, in % at n = {heads} | {' | '.join(asked)} |\n|{'---|' * (len(asked) + 1)}")
    for name, by_size in tallies.items():
        cells = [" / ".join(_percent(t.share(*what)) for t in by_size.values()) for what in asked.values()]
        show(f"| {name} | {' | '.join(cells)} |")
    ours = tallies["this gate"].values()
    shares = [share for t in ours for share in (t.share("null", "FAIL"), t.share("bad", "PASS"))]
    worst = max(share for share in shares if not math.isnan(share))
    return finish("verdict_error_rates", "largest false block or bad promotion ÷ 5 %", worst / TARGET, most=1.0)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
