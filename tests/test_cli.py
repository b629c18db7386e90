"""The command line is a contract: help for every option, exit codes, one line for every expected error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from goldgate.cli import VERDICT_CODES, app, main
from goldgate.pipeline.errors import ExitCode

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "doctor", "read", "embed", "index", "build", "model", "answer", "evaluate", "gate", "report", "review", "release",
    "promote", "rollback", "status", "log", "serve", "ask", "gc", "repro", "demo", "golden",
}  # fmt: skip


def commands() -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    found = {}
    for name, command in root.commands.items():
        found[name] = command
        for child, inner in getattr(command, "commands", {}).items():
            found[f"{name} {child}"] = inner
    return found


def test_the_commands_are_these() -> None:
    assert {name for name in commands() if " " not in name} == COMMANDS


def test_every_command_option_and_argument_has_help() -> None:
    silent = [name for name, command in commands().items() if not command.help]
    for name, command in commands().items():
        silent += [
            f"{name} {parameter.name}"
            for parameter in command.params
            if parameter.name != "help" and not getattr(parameter, "help", None)
        ]
    assert silent == []


def test_every_command_can_show_a_traceback() -> None:
    leaves = {name: c for name, c in commands().items() if not hasattr(c, "commands")}
    assert [name for name, c in leaves.items() if "traceback" not in {p.name for p in c.params}] == []


def test_the_verdict_is_the_exit_code() -> None:
    expected = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3, "NOT_COMPUTED": 4, None: 4}
    assert {word: int(code) for word, code in VERDICT_CODES.items()} == expected


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "goldgate.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


BAD_INPUT = {
    "unknown command": (["gtae"], 2, "No such command 'gtae'. Did you mean 'gate'"),
    "unknown option": (["gate", "--polcy", "x"], 2, "No such option"),
    "missing argument": (["ask"], 2, "Missing argument"),
    "no parameters": (["read"], 2, "params.toml does not exist"),
    "nothing built": (["gate", "--policy", "gate.toml"], 2, "gate.toml does not exist"),
    "nothing live to ask": (["ask", "hello?"], 5, "nothing is live"),
    "nothing to roll back to": (["rollback"], 5, "there is no release to roll back to"),
    "no digest": (["promote", "latest"], 2, "'latest' is no release digest"),
    "unknown digest": (["promote", "0123456789"], 5, "not in this store"),
    "bad application": (["log", "--app", "../x"], 2, "is no name"),
    "demo elsewhere": (["demo", "--keep", "kept"], 2, "the root of a goldgate repository"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_its_code(name: str, tmp_path: Path) -> None:
    arguments, code, said = BAD_INPUT[name]
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[retrieve]\ntopk = 3\n", "retrieve.topk is unknown; did you mean top_k?"),
        ("[retreive]\n", "retreive is unknown; did you mean retrieve?"),
        ("[chunk]\nmax_tokens = 'many'\n", "chunk.max_tokens"),
        ("[chunk]\noverlap_tokens = 150\n", "at most half of max_tokens"),
        ("[retrieve]\ntop_k = 0\n", "retrieve.top_k"),
        ("[retrieve]\ndense_weight = 0\nbm25_weight = 0\n", "nothing would rank"),
        ("[retrieve\n", "valid TOML"),
    ],
)
def test_a_bad_parameter_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "params.toml").write_text(text, encoding="utf-8")
    done = run("read", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "build").exists()


def test_traceback_only_on_request(tmp_path: Path) -> None:
    assert "Traceback" in run("rollback", "--traceback", cwd=tmp_path).stderr


def test_a_bug_has_its_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("goldgate.doctor.examine", lambda store: 1 / 0)
    assert main(["doctor"]) == ExitCode.BUG
    assert "bug: ZeroDivisionError" in capsys.readouterr().err


def test_ctrl_c_that_comes_out_as_another_error_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library under way may turn it into an error of its own."""

    def examine(store: Path) -> object:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("the module could not be initialised") from None
        return []

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr("goldgate.doctor.examine", examine)
        assert main(["doctor"]) == ExitCode.INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "goldgate: interrupted; what was finished is kept\n"


def test_doctor_says_what_is_here(tmp_path: Path) -> None:
    done = run("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert {"processor", "memory", "AVX-512", "AMX", "GPU", "vLLM", "free disk", "core packages"} <= set(found)
    assert found["core packages"]["ok"] is True


def test_doctor_says_in_words_which_debian_packages_of_the_tests_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert main(["doctor", "--store", str(tmp_path / "store")]) == 0
    absent = capsys.readouterr().out
    for name in ("chromium", "redis-server"):
        assert f"{name}: not found, only tests need it (GOLDGATE_APT=1 installs it); for " in absent
        (programs / name).touch(mode=0o755)
    assert main(["doctor", "--store", str(tmp_path / "store")]) == 0
    present = capsys.readouterr().out
    assert "chromium: found; for the tests that look at the HTML report" in present
    assert "redis-server: found; for tests of a cache in Redis" in present


def test_the_installer_knows_the_packages_that_doctor_knows() -> None:
    from goldgate.doctor import PACKAGES_OF_TESTS

    script = (ROOT / "scripts" / "install").read_text(encoding="utf-8")
    assert [name for name in PACKAGES_OF_TESTS if f"missing+=({name})" not in script] == []


def test_a_store_from_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    marker = store / "format.json"
    marker.write_text('{"format_version": 99}\n', encoding="utf-8")
    done = run("log", "--store", str(store), cwd=tmp_path)
    assert done.returncode == 2
    assert "99" in done.stderr
    assert [p.name for p in store.iterdir()] == ["format.json"]


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder", encoding="utf-8")
    done = run("log", "--store", str(tmp_path / "store"), cwd=tmp_path)
    assert done.returncode == 6
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_file_name_cannot_forge_a_line(tmp_path: Path) -> None:
    done = run("log", "--app", "a\ngoldgate: PASS", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_stdout_going_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m goldgate.cli doctor --json | head -c 1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert b"bug" not in done.stderr


@pytest.mark.parametrize("step", ["read", "build"])
def test_interrupted_is_130_and_the_store_is_as_good_as_before(step: str, tmp_path: Path) -> None:
    (tmp_path / "params.toml").write_text('[embed]\nmodel = "hashing"\n', encoding="utf-8")
    knowledge = tmp_path / "knowledge"
    knowledge.mkdir()
    for number in range(3000):
        (knowledge / f"{number}.md").write_text(f"# Page {number}\n\n" + "Some words here. " * 200, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "goldgate.cli", step]
    if step == "build":
        command += ["--engine", "local"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "build").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, err
    assert out == ""
    assert "interrupted" in err
    for page in list(knowledge.iterdir())[10:]:
        page.unlink()
    again = run("build", "--engine", "local", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["generation"]["documents"] == 10
