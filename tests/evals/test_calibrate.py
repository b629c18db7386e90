"""The judges against people: the figures are real, current, and a worse judge would not pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from goldgate.evals import calibration
from goldgate.evals.calibrate import SYSTEMS, agreement, check_arm, evouna, kappa, main, reversals, says_fact
from goldgate.evals.judge import judge_digest


@pytest.fixture(scope="module")
def labels() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared data folder (../shared/data) is not here")
    return path


def test_the_committed_calibration_is_of_the_code_as_it_stands() -> None:
    data = json.loads(calibration.CALIBRATION.read_text())
    assert {record["judge_digest"] for record in data["metrics"].values()} == {judge_digest()}, (
        "the judge changed: run python -m goldgate.evals.calibrate"
    )
    assert calibration.is_calibrated("correctness")
    assert not calibration.is_calibrated("faithfulness")
    assert not calibration.is_calibrated("no_such_metric")


def test_changed_code_is_uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "judge_digest", lambda: "0" * 64)
    assert not calibration.is_calibrated("correctness")


def test_the_figures_can_be_made_again(labels: Path, tmp_path: Path) -> None:
    assert main(["--data", str(labels), "--out", str(tmp_path / "c.json"), "--no-embedder"]) == 0
    again = json.loads((tmp_path / "c.json").read_text())["metrics"]
    committed = json.loads(calibration.CALIBRATION.read_text())["metrics"]
    assert again["correctness"] == committed["correctness"]
    assert again["abstention"] == committed["abstention"]


def test_tuning_and_report_questions_are_apart(labels: Path) -> None:
    path = labels / "evouna" / "NQ.json"
    tuned, reported = ({row["question"] for row in evouna(path, half)} for half in (0, 1))
    assert len(tuned) > 1400
    assert len(reported) > 1400
    assert not tuned & reported


def test_worse_judges_do_not_pass(labels: Path) -> None:
    rows = evouna(labels / "evouna" / "NQ.json", 1)[:600]
    assert check_arm(rows, says_fact)["passes"]
    assert not check_arm(rows, lambda row, system: True)["passes"]
    assert not check_arm(rows, lambda row, system: bool(row["answer_fid"]) and system != "fid")["passes"]
    plain = check_arm(rows, lambda row, system: row["golden_answer"] in row[f"answer_{system}"])
    assert not plain["passes"]


def test_a_judge_against_one_system_is_reversed(labels: Path) -> None:
    rows = evouna(labels / "evouna" / "NQ.json", 1)[:600]
    harsh = check_arm(rows, lambda row, system: bool(row[f"judge_{system}"]) and system != "gpt4")
    assert any("gpt4" in pair for pair in harsh["rankings_reversed"])
    assert not harsh["passes"]


def test_kappa_and_intervals() -> None:
    assert kappa(np.array([20.0, 5.0, 10.0, 15.0])) == pytest.approx(0.4)  # a textbook table
    human = np.array([[True], [False]] * 50)
    perfect = agreement(human, human)
    assert perfect["kappa"]["value"] == 1
    assert perfect["agreement"]["lower"] < 1  # 100 of 100 is not certainty
    assert agreement(~human, human)["kappa"]["value"] == -1
    assert reversals(np.ones((40, len(SYSTEMS)), bool), np.ones((40, len(SYSTEMS)), bool)) == []


def test_no_labels_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "c.json"), "--no-embedder"]) == 2
    assert "NQ.json does not exist" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
