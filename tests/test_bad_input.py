"""Bad input to a repository with a live release: one clear line, the documented exit code, the store as good as before.

Each case goes through the command line. Full disks, two builds at once and Ctrl-C are in test_workflow.py and
test_interrupts.py.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from goldgate.cli import main
from tests.pipeline.test_store import mounted
from tests.serving.models import model_folder
from tests.test_workflow import enter, gold, measure, write_project

Plant = Callable[[Path], None]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose first release is live; measured with the doubles."""
    folder = write_project(tmp_path_factory.mktemp("live") / "project")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        assert measure() == 4  # there is no production yet
        assert main(["release", "--bootstrap"]) == 0
        (made,) = (folder / ".goldgate" / "releases").iterdir()
        assert main(["promote", made.name]) == 0
    # Derived from the generation, and full of holes which a copy would fill.
    shutil.rmtree(folder / ".goldgate" / "collections")
    return folder


@pytest.fixture
def live(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that repository; the working directory."""
    return enter(Path(shutil.copytree(template, tmp_path / "project")), monkeypatch)


def published(store: Path) -> dict[str, bytes]:
    """Everything in a store that is not scratch."""
    scratch = {"tmp", "locks"}
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.relative_to(store).parts[0] not in scratch
    }


def add_to_params(text: str) -> Plant:
    def plant(folder: Path) -> None:
        params = folder / "params.toml"
        params.write_text(params.read_text(encoding="utf-8") + text, encoding="utf-8")

    return plant


def add_to_gold(case: dict[str, object]) -> Plant:
    def plant(folder: Path) -> None:
        with (folder / "golden" / "cases.jsonl").open("a", encoding="utf-8") as cases:
            cases.write(json.dumps(case) + "\n")

    return plant


def misspell_policy(folder: Path) -> None:
    policy = folder / "golden" / "gate.toml"
    policy.write_text(policy.read_text(encoding="utf-8").replace("abstention", "abstension"), encoding="utf-8")


def empty_knowledge(folder: Path) -> None:
    shutil.rmtree(folder / "knowledge")
    (folder / "knowledge").mkdir()


def newer_store(folder: Path) -> None:
    (folder / ".goldgate" / "format.json").write_text('{"format_version": 99}\n', encoding="utf-8")


def truncated_model(folder: Path) -> None:
    """A model of the user's own, converted, and then cut in the store."""
    source = model_folder(folder / "weights")
    model = folder / "serving" / "models" / "mine.toml"
    model.write_text(f'name = "mine"\nkind = "vllm"\nsource = "{source}"\n', encoding="utf-8")
    params = folder / "params.toml"
    text = params.read_text(encoding="utf-8").replace("extractive.toml", "mine.toml")
    params.write_text(text, encoding="utf-8")
    assert main(["model"]) == 0
    (weights,) = folder.glob(".goldgate/models/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])


BUILD = ["build", "--engine", "local"]
BAD: dict[str, tuple[Plant, list[str], int, str]] = {
    "unknown parameter": (
        add_to_params("[retrieve]\ntopk = 3\n"), BUILD, 2, "retrieve.topk is unknown; did you mean top_k?"
    ),
    "misspelt metric": (
        add_to_params('[evaluate]\nmetrics = ["corectness"]\n'), ["evaluate"], 2, "did you mean correctness"
    ),
    "misspelt metric in the policy": (misspell_policy, ["gate"], 2, "did you mean abstention"),
    "gold case without any expectation": (
        add_to_gold({"id": "new", "question": "Why?"}), ["answer"], 2, "cases.jsonl:45: the record: has no expectation"
    ),
    "duplicate ids": (
        add_to_gold(gold()[0]), ["answer"], 2, "cases.jsonl:45: duplicate id bridge-aldon; expected another id"
    ),
    "knowledge base empty": (empty_knowledge, BUILD, 2, "knowledge"),
    "a store from a newer format": (newer_store, BUILD, 2, "has format 99; expected at most 1; use a newer goldgate"),
    "model file truncated": (truncated_model, ["answer"], 6, "model.safetensors has "),
}  # fmt: skip


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is no progress; nothing is on stdout."""
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("goldgate:")]
    assert len(lines) == 1, said.err
    assert said.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in said.err
    return lines[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_its_code_and_harms_nothing(
    name: str, live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, command, code, words = BAD[name]
    plant(live)
    before = published(live / ".goldgate")
    built = published(live / "build")
    capsys.readouterr()
    assert main(command) == code
    assert words in one_line(capsys)
    assert published(live / ".goldgate") == before
    # An evaluation that fails leaves no earlier report that the gate could take for its own.
    gone = {"report.json", "metrics.json"} if command == ["evaluate"] else set()
    assert published(live / "build") == {name: data for name, data in built.items() if name not in gone}


def test_evidence_that_is_not_in_the_document_is_named_and_never_green(
    live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = live / "golden" / "cases.jsonl"
    text = cases.read_text(encoding="utf-8")
    cases.write_text(text.replace("was opened in", "was closed in"), encoding="utf-8")
    before = published(live / ".goldgate")
    capsys.readouterr()
    assert main(["golden", "lint"]) == 2
    listed = capsys.readouterr().out.splitlines()
    assert listed[-1] == "44 cases, 20 problems"
    assert all(("bridge-" in line and "not in" in line) or "stale" in line for line in listed[:-1]), listed
    assert published(live / ".goldgate") == before
    for command in (["answer"], ["evaluate"]):
        assert main(command) == 0
    assert main(["gate"]) == 4
    assert "evidence are stale" in capsys.readouterr().out


def test_a_store_that_cannot_be_written(tmp_path: Path, live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for disk in mounted(tmp_path / "disk", "ro,size=64k"):
        capsys.readouterr()
        assert main([*BUILD, "--store", str(disk / "store")]) == 6
        assert "cannot be written: Read-only file system" in one_line(capsys)
    assert main(["status"]) == 0


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_port_that_is_taken(taken: int, live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = published(live / ".goldgate")
    capsys.readouterr()
    assert main(["serve", "--port", str(taken)]) == 6
    assert f"port {taken} of 127.0.0.1 is taken" in one_line(capsys)
    assert published(live / ".goldgate") == before
