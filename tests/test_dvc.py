"""`dvc repro` through `goldgate repro`: what runs again, what does not, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_workflow import POLICY, TOWNS, gold, town_page

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository's pipeline over a small knowledge base, with the shipped doubles."""
    return write_dvc_project(tmp_path_factory.mktemp("dvc") / "project")


def write_dvc_project(folder: Path) -> Path:
    """Write that copy."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("pipeline", "serving", "evals"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copyfile(ROOT / ".dvcignore", folder / ".dvcignore")
    pipeline = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    (folder / "dvc.yaml").write_text(
        pipeline.replace("goldgate embed", "goldgate embed --engine local"), encoding="utf-8"
    )
    (folder / "knowledge").mkdir()
    for number, town in enumerate(TOWNS[:8]):
        (folder / "knowledge" / f"{town.lower()}.md").write_text(town_page(town, 1801 + 3 * number), encoding="utf-8")
    (folder / "golden").mkdir()
    names = {town.lower() for town in TOWNS[:8]}
    cases = [c for c in gold() if str(c["id"]).split("-")[1] in names or str(c["id"]).startswith("unknown")]
    (folder / "golden" / "cases.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cases), encoding="utf-8")
    (folder / "golden" / "gate.toml").write_text(POLICY.replace("0.1", "0.5"), encoding="utf-8")
    (folder / "golden" / "labels.jsonl").touch()
    write_params(folder)
    (folder / "baseline.json").write_text('{"release": null, "dtype": null}\n', encoding="utf-8")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True, env=environment())
    return folder


def write_params(folder: Path, **changed: str) -> None:
    """Every section that dvc.yaml names, with `section=text` put into one of them."""
    text = {
        "read": "max_bytes = 1000000", "chunk": "max_tokens = 60", "embed": 'model = "hashing"', "index": "hnsw_m = 16",
        "retrieve": "top_k = 4", "prompt": 'file = "serving/prompts/grounded.toml"',
        "model": 'file = "serving/models/extractive.toml"', "answer": "batch = 8",
        "evaluate": 'metrics = ["evidence_recall", "correctness", "abstention", "leaks"]',
    } | changed  # fmt: skip
    lines = [f"[{section}]\n{body}\n" for section, body in text.items()]
    body = "".join(lines).replace("max_tokens = 60", "max_tokens = 60\noverlap_tokens = 0")
    (folder / "params.toml").write_text(body, encoding="utf-8")


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"GOLDGATE_STORE", "PYTHONPATH"}}
    return {**kept, "GIT_CEILING_DIRECTORIES": "/", "DVC_NO_ANALYTICS": "1"}


def goldgate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "goldgate"), *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment(), timeout=600
    )


def stages_run(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


def test_the_pipeline_names_only_files_that_exist() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert list(stages) == ["read", "embed", "index", "model", "answer", "evaluate", "gate"]
    deps = {d for stage in stages.values() for d in stage["deps"] if not d.startswith("build/")}
    assert [d for d in sorted(deps) if not (ROOT / d).exists()] == []


def test_every_module_of_the_answer_path_is_a_dependency() -> None:
    from goldgate.serving.answer import ANSWER_PATH

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert {f"serving/{name}" for name in ANSWER_PATH} <= set(stages["answer"]["deps"])


def test_repro_runs_what_changed_and_ends_with_the_verdict(project: Path) -> None:
    first = goldgate(project, "repro")
    assert first.returncode == 0, first.stdout + first.stderr
    assert stages_run(first) == ["read", "embed", "index", "model", "answer", "evaluate", "gate"]
    assert "PASS" not in first.stdout  # there is no production: nothing green
    assert stages_run(goldgate(project, "repro")) == []
    write_params(project, retrieve="top_k = 3")
    again = goldgate(project, "repro")
    assert again.returncode == 0, again.stdout + again.stderr
    assert stages_run(again)[0] == "answer"
    assert {"read", "embed", "index", "model"} & set(stages_run(again)) == set()
    released = goldgate(project, "release", "--bootstrap")
    assert released.returncode == 0, released.stderr
    assert goldgate(project, "promote", released.stdout.split()[-1]).returncode == 0
    judged = goldgate(project, "repro")
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "PASS" in judged.stdout
    page = project / "knowledge" / "dunmere.md"
    page.write_text("# Dunmere\n\nThis page is being revised.\n", encoding="utf-8")
    harmful = goldgate(project, "repro")
    assert harmful.returncode == 1, harmful.stdout + harmful.stderr  # dvc itself returns 255
    assert "FAIL" in harmful.stdout
    metrics = json.loads((project / "build" / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["evidence_recall"]) >= {"mean", "n"}
