"""The plan of a gold set: what it could show, before anything is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from goldgate.cli import main
from goldgate.evals import estimate
from goldgate.evals.plan import Assumptions, passes, plan, table, wanted
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import ConditionPolicy, GoldCase, Policy

ROOT = Path(__file__).parents[2]


def gold(n: int, slices: tuple[str, ...] = ()) -> list[GoldCase]:
    return [
        GoldCase(id=f"c{i}", question=f"q{i}?", cluster=f"d{i}", slices=slices, answerable=True, must_say=("x",))
        for i in range(n)
    ]


def policy(**changes: object) -> Policy:
    return Policy(conditions=(ConditionPolicy(metric="correctness", **({"margin": 0.05} | changes)),))  # type: ignore[arg-type]


@pytest.mark.parametrize(("margin", "cases"), [(0.10, 91), (0.05, 369), (0.03, 1029)])
def test_the_cases_wanted_are_those_of_mcnemars_test(margin: float, cases: int) -> None:
    """One-sided 5 %, 80 % power, 15 % discordant; our bound is a little wider than McNemar's for few cases."""
    found = wanted(margin, 0.05, Assumptions())
    assert found is not None
    assert cases <= found <= 1.15 * cases


@pytest.mark.parametrize("touched", [1.0, 0.2])
def test_the_sum_agrees_with_a_simulation(touched: float) -> None:
    n, rng = 120, np.random.default_rng(0)
    m = round(n * touched)
    changed = rng.binomial(m, 0.15, 4000)
    lost = rng.binomial(changed, 0.5)
    held = [
        estimate.bounds(estimate.Sample(n=n, changed=m, loss=float(w), gain=float(c - w)), 0.05)[0] > -0.05
        for c, w in zip(changed, lost, strict=True)
    ]
    assert passes(n, 0.05, 0.05, Assumptions(touched=touched)) == pytest.approx(np.mean(held), abs=0.025)


def test_what_helps_helps() -> None:
    assert passes(400, 0.05, 0.05, Assumptions()) > passes(100, 0.05, 0.05, Assumptions())
    assert passes(100, 0.10, 0.05, Assumptions()) > passes(100, 0.05, 0.05, Assumptions())
    assert passes(100, 0.05, 0.05, Assumptions(touched=0.1)) > passes(100, 0.05, 0.05, Assumptions())
    assert passes(400, 0.05, 0.05, Assumptions(design_effect=2)) == passes(200, 0.05, 0.05, Assumptions())
    assert passes(0, 0.05, 0.05, Assumptions()) == 0
    assert passes(100, 0.05, 0.05, Assumptions(touched=1e-6)) == 1, "nothing is answered again: a known zero"


def test_a_condition_that_can_never_hold_says_so() -> None:
    assert plan(policy(), gold(100), Assumptions())[0].problem == ""
    assert plan(policy(), gold(50), Assumptions())[0].problem == (
        "correctness has a margin of 5.0 points, which 50 cases can never show to hold"
    )
    assert plan(policy(min_cases=60), gold(50), Assumptions())[0].problem == (
        "correctness needs 60 cases, the gold set has 50 that carry what it needs"
    )
    (line,) = plan(policy(slices=("rare",)), gold(100), Assumptions())
    assert (line.slice, line.cases, line.passes) == ("rare", 0, 0)
    assert "can never hold: correctness in slice rare needs 1 cases, the gold set has 0" in table([line], Assumptions())


def test_a_plan_agrees_with_the_gate_on_what_can_hold() -> None:
    """The gate's bound for no loss at all counts cases, so a design effect makes no condition impossible."""
    (line,) = plan(policy(), gold(100), Assumptions(design_effect=2, touched=0.1))
    assert line.problem == ""
    assert line.passes > 0.5


def test_wanted_reaches_its_limit() -> None:
    assert passes(20_000, 0.0069, 0.05, Assumptions()) > 0.8
    assert wanted(0.0069, 0.05, Assumptions(), 60) is not None


def test_advisory_conditions_are_not_planned() -> None:
    assert plan(policy(tier="advisory"), gold(10), Assumptions()) == []


@pytest.mark.parametrize("bad", [{"discordant": 0}, {"touched": 1.1}, {"power": 1}, {"design_effect": 0.5}])
def test_impossible_assumptions(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="--"):
        Assumptions(**bad)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the shipped gold set and policy; with a quarter of the cases it ends with exit code 2."""
    files = ["--golden", str(ROOT / "golden" / "cases.jsonl"), "--policy", str(ROOT / "golden" / "gate.toml")]
    assert main(["golden", "plan", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["metric"] for line in found["conditions"]] == ["evidence_recall", "abstention", "correctness"]
    assert all(0 < line["passes"] < 1 and line["wanted"] > line["cases"] for line in found["conditions"])
    assert main(["golden", "plan", *files, "--touched", "0.1"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110
    shutil.copytree(ROOT / "golden", tmp_path / "golden")
    few = (tmp_path / "golden" / "cases.jsonl").read_text(encoding="utf-8").splitlines()[::4]
    (tmp_path / "golden" / "cases.jsonl").write_text("\n".join(few) + "\n", encoding="utf-8")
    files[1] = str(tmp_path / "golden" / "cases.jsonl")
    assert main(["golden", "plan", *files]) == 2
    assert "can never hold: correctness needs 60 cases" in capsys.readouterr().out
