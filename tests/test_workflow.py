"""The whole loop through the command line, on a small knowledge base with the shipped doubles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from goldgate.cli import main
from goldgate.evals import evaluate
from goldgate.pipeline.params import EmbedParams
from goldgate.pipeline.schema import Report, Verdict

ROOT = Path(__file__).resolve().parents[1]
TOWNS = (
    "Aldon", "Brimley", "Corvale", "Dunmere", "Eastwick", "Farrow", "Glenmoor", "Hartfell", "Inverlay", "Jarrow",
    "Kelso", "Larkhill", "Morwen", "Norvale", "Oakham", "Penrith", "Quorn", "Rothby", "Selkirk", "Thornby",
)  # fmt: skip
Run = Callable[..., int]


def town_page(town: str, year: int) -> str:
    return (
        f"# {town}\n\nThe bridge of {town} was opened in {year}. It carries the road to the coast.\n\n"
        f"## Market\n\nThe market of {town} is held on day {year % 7 + 1} of the week, in front of the old town hall.\n"
    )


def gold() -> list[dict[str, object]]:
    cases: list[dict[str, object]] = []
    for number, town in enumerate(TOWNS):
        year = 1801 + 3 * number
        page = f"{town.lower()}.md"
        cases.append(
            {
                "id": f"bridge-{town.lower()}", "question": f"When was the bridge of {town} opened?",
                "answerable": True,
                "must_say": [str(year)], "must_hold": number == 3, "cluster": page,
                "evidence": [{"document": page, "quote": f"The bridge of {town} was opened in {year}."}],
            }
        )  # fmt: skip
        cases.append(
            {
                "id": f"market-{town.lower()}", "question": f"On which day is the market of {town} held?",
                "cluster": page,
                "answerable": True, "must_say": [f"day {year % 7 + 1}"],
                "evidence": [{"document": page, "heading": "Market"}],
            }
        )  # fmt: skip
    cases += [
        {"id": f"unknown-{n}", "question": f"{word}?", "answerable": False, "cluster": f"unknown-{n}"}
        for n, word in enumerate(("Xylophones", "Zeppelins", "Quasars", "Violins"))
    ]
    return cases


POLICY = """
zero_tolerance = ["leaks"]
[[conditions]]
metric = "evidence_recall"
margin = 0.1
[[conditions]]
metric = "abstention"
margin = 0.1
"""


def write_project(folder: Path) -> Path:
    """Write a repository with knowledge, gold set, policy and parameters."""
    knowledge = folder / "knowledge"
    knowledge.mkdir(parents=True)
    for number, town in enumerate(TOWNS):
        (knowledge / f"{town.lower()}.md").write_text(town_page(town, 1801 + 3 * number), encoding="utf-8")
    (folder / "golden").mkdir()
    (folder / "golden" / "cases.jsonl").write_text("".join(json.dumps(c) + "\n" for c in gold()), encoding="utf-8")
    (folder / "golden" / "gate.toml").write_text(POLICY, encoding="utf-8")
    shutil.copytree(ROOT / "serving" / "prompts", folder / "serving" / "prompts")
    shutil.copytree(ROOT / "serving" / "models", folder / "serving" / "models")
    (folder / "params.toml").write_text(
        '[embed]\nmodel = "hashing"\n[model]\nfile = "serving/models/extractive.toml"\n', encoding="utf-8"
    )
    (folder / "baseline.json").write_text('{"release": null, "dtype": null}\n', encoding="utf-8")
    return folder


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in `folder`, with the shipped doubles."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GOLDGATE_STORE", raising=False)
    monkeypatch.setattr(evaluate, "JUDGE_EMBEDDING", EmbedParams(model="hashing"))
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with knowledge, gold set, policy and parameters; the working directory."""
    return enter(write_project(tmp_path / "project"), monkeypatch)


def measure() -> int:
    """Build, answer, evaluate and gate; return the gate's exit code."""
    for command in (["build", "--engine", "local"], ["model"], ["answer"], ["evaluate"]):
        code = main(command)
        assert code == 0, command
    return main(["gate"])


def release(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["release", *options]) == 0
    return capsys.readouterr().out.split()[-1]


@pytest.fixture
def live(project: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The digest of a first release that is live."""
    assert measure() == 4  # there is no production to compare with: nothing green
    digest = release(capsys, "--bootstrap")
    assert main(["promote", digest]) == 0
    return digest


def verdict() -> Verdict:
    return Verdict.model_validate_json(Path("build/verdict.json").read_bytes())


def test_first_release_then_nothing_changed_is_a_pass(live: str, project: Path) -> None:
    assert json.loads((project / "baseline.json").read_text())["release"] == live
    assert measure() == 0
    found = verdict()
    assert found.verdict == "PASS"
    assert found.touched is not None
    assert found.touched.total == 0
    compared = [c for c in found.conditions if c.metric in {"evidence_recall", "abstention"}]
    assert [c.delta for c in compared] == [0.0, 0.0]
    assert all(c.identical == c.n for c in compared)


def test_a_page_that_lost_its_facts_is_refused(live: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for town in ("dunmere", "eastwick"):
        (project / "knowledge" / f"{town}.md").write_text(
            f"# {town}\n\nThis page is being revised.\n", encoding="utf-8"
        )
    assert measure() == 1
    found = verdict()
    assert found.verdict == "FAIL"
    assert found.must_hold is not None
    assert found.must_hold.lost == ("bridge-dunmere",)
    assert found.diagnosis is not None
    assert found.diagnosis.part == "document"
    assert main(["release"]) == 5
    assert "the verdict is FAIL; expected PASS" in capsys.readouterr().err


def test_a_harmful_retrieval_setting_is_refused(live: str, project: Path) -> None:
    params = project / "params.toml"
    text = params.read_text(encoding="utf-8")
    params.write_text(text + "[retrieve]\ntop_k = 1\nbm25_weight = 0.0\n", encoding="utf-8")
    code = measure()
    assert code in {1, 3}
    assert verdict().verdict in {"FAIL", "INCONCLUSIVE"}
    assert main(["release"]) == 5


def test_a_good_edit_passes_is_promoted_and_rolled_back(
    live: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = project / "knowledge" / "quorn.md"
    page.write_text(
        page.read_text(encoding="utf-8") + "\n## Library\n\nThe library of Quorn has 900 books.\n", encoding="utf-8"
    )
    assert measure() == 0
    digest = release(capsys)
    assert main(["promote", digest]) == 0
    capsys.readouterr()
    assert main(["ask", "How many books has the library of Quorn?"]) == 0
    assert "900 books" in capsys.readouterr().out
    assert main(["rollback", "--note", "drill"]) == 0
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["release"] == live
    assert main(["log", "--json"]) == 0
    assert [e["kind"] for e in json.loads(capsys.readouterr().out)] == ["promoted", "promoted", "rolled_back"]


def _loosen(project: Path) -> None:
    (project / "golden" / "gate.toml").write_text(POLICY.replace("0.1", "0.9"), encoding="utf-8")


def _reword(project: Path) -> None:
    path = project / "serving" / "prompts" / "grounded.toml"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("numbered passages", "passages with numbers"), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before


def _other_gold(project: Path) -> None:
    path = project / "golden" / "cases.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in gold()[1:]), encoding="utf-8")


def _other_report(project: Path) -> None:
    path = project / "build" / "report.json"
    path.write_bytes(
        path.read_bytes().replace(b'"value": 1.0', b'"value": 0.5', 1).replace(b'"value":1.0', b'"value":0.5', 1)
    )


def _other_retrieval(project: Path) -> None:
    path = project / "params.toml"
    path.write_text(path.read_text(encoding="utf-8") + "[retrieve]\ntop_k = 2\n", encoding="utf-8")


@pytest.mark.parametrize("change", [_loosen, _reword, _other_gold, _other_report, _other_retrieval])
def test_only_what_was_judged_is_released(live: str, project: Path, change: Callable[[Path], None]) -> None:
    """The same build passes; one part exchanged behind the verdict's back, and it is refused."""
    assert measure() == 0
    change(project)
    assert main(["release"]) == 5
    assert verdict().verdict == "PASS"


def test_a_removed_case_never_helps(live: str, project: Path) -> None:
    _other_gold(project)
    assert measure() == 4
    assert "removed from the gold set" in verdict().reason


def test_a_baseline_file_that_lies_is_refused(live: str, project: Path) -> None:
    (project / "baseline.json").write_text('{"release": null, "dtype": null}\n', encoding="utf-8")
    for command in (["build", "--engine", "local"], ["answer"], ["evaluate"]):
        assert main(command) == 0
    assert main(["gate"]) == 2
    assert main(["status", "--write-baseline"]) == 0
    assert main(["gate"]) == 0


def test_the_same_inputs_give_the_same_bytes(live: str, project: Path) -> None:
    names = ("report.json", "answers.jsonl", "generation.json", "chunks.parquet", "embeddings.parquet", "metrics.json")
    assert measure() == 0
    before = {name: (project / "build" / name).read_bytes() for name in names}
    shutil.rmtree(project / "build")
    assert measure() == 0
    assert {name: (project / "build" / name).read_bytes() for name in names} == before


def test_an_unreadable_document_stops_the_build_and_a_skipped_one_shows(
    live: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "knowledge" / "broken.pdf").write_bytes(b"%PDF-1.7 this is no PDF")
    capsys.readouterr()
    assert main(["build", "--engine", "local"]) == 2
    assert "unreadable: broken.pdf" in capsys.readouterr().err
    assert main(["build", "--engine", "local", "--skip-unreadable"]) == 0
    for command in (["answer"], ["evaluate"]):
        assert main(command) == 0
    assert main(["gate"]) == 4
    assert [item.id for item in verdict().skipped_documents] == ["broken.pdf"]


def test_reports_for_people(live: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure() == 0
    capsys.readouterr()
    for form, said in (("text", "PASS"), ("markdown", "PASS"), ("html", "<html"), ("json", '"PASS"')):
        assert main(["report", "--format", form]) == 0
        assert said in capsys.readouterr().out
    assert main(["report", "--format", "pdf"]) == 2


def test_the_suite_by_hand_writes_the_same_report(live: str, project: Path) -> None:
    assert measure() == 0
    by_command = Report.model_validate_json((project / "build" / "report.json").read_bytes())
    (project / "build" / "report.json").unlink()
    code = (
        "import sys, pytest\n"
        "from goldgate.evals import evaluate\n"
        "from goldgate.pipeline.params import EmbedParams\n"
        "evaluate.JUDGE_EMBEDDING = EmbedParams(model='hashing')\n"
        f"sys.exit(pytest.main([{str(ROOT / 'evals')!r}, '-q', '-p', 'no:cacheprovider']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=project)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    by_hand = Report.model_validate_json((project / "build" / "report.json").read_bytes())
    assert by_hand == by_command


def test_two_builds_into_one_folder_at_once(project: Path) -> None:
    code = (
        "import sys, time\n"
        "from goldgate.workspace import Workspace\n"
        "ws = Workspace()\n"
        "with ws.exclusive(ws.store()):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        assert main(["build", "--engine", "local"]) == 5
    finally:
        holder.communicate("")
    assert main(["build", "--engine", "local"]) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and a kernel that allows it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_production_stays(
    live: str, project: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in (project / ".goldgate" / "apps").rglob("*") if p.is_file()}
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 200_000)
    capsys.readouterr()
    code = main(["build", "--engine", "local", "--store", str(small_disk / "store")])
    err = capsys.readouterr().err.strip()
    assert code == 6, err
    assert "bug" not in err
    filler.unlink()
    assert before == {p: p.read_bytes() for p in (project / ".goldgate" / "apps").rglob("*") if p.is_file()}
    assert main(["status"]) == 0
