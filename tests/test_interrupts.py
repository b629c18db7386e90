"""Ctrl-C in each stage: one line, exit code 130, nothing half-written, nobody left behind, and again it succeeds.

The real command runs in a process of its own until its progress says that it is inside the stage. Reading and
embedding in this process are in test_cli.py and pipeline/test_embed.py. The answers come from the doubles and from a
slow endpoint: loading vLLM for one signal takes a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from goldgate.cli import main
from goldgate.pipeline.schema import Report
from goldgate.pipeline.store import Store, json_bytes
from goldgate.serving.model import build_model, load_model_spec
from tests.serving.endpoint import Endpoint, Reply, completion, endpoint
from tests.test_bad_input import published
from tests.test_dvc import write_dvc_project
from tests.test_workflow import enter

ROOT = Path(__file__).resolve().parents[1]
PAGES, QUESTIONS, CASES = 200, 40, 400
MODEL = "smollm2-135m-grounded.toml"
WEIGHTS_BYTES = 700_000_000
"""More than the libraries of the conversion take without the weights."""

MARK = "GOLDGATE_TEST_MARK"
PATIENCE_S = 300
LINE = "goldgate: interrupted; what was finished is kept"


@pytest.fixture(scope="module", autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    """A shell that runs the tests in the background has turned Ctrl-C off for them and for what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Running:
    """A goldgate command in a session of its own, whose progress is read while it runs."""

    def __init__(self, cwd: Path, *arguments: str, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        kept = {name: value for name, value in os.environ.items() if name not in {"GOLDGATE_STORE", "RAY_ADDRESS"}}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "goldgate.cli", *arguments],
            cwd=cwd,
            env={**kept, "PYTHONPATH": str(ROOT), MARK: self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self.printed = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever went wrong, nobody stays."""
        for process in self._marked():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        self.said.extend(iter(self.process.stderr.readline, ""))  # type: ignore[union-attr]

    def wait_until(self, inside: Callable[[], bool]) -> None:
        """Wait until the command is inside its stage."""
        until = time.monotonic() + PATIENCE_S
        while not inside():
            assert self.process.poll() is None, f"ended too early: {self.said}"
            assert time.monotonic() < until, f"not in time: {self.said}"
            time.sleep(0.005)

    def tells(self, pattern: str) -> bool:
        """Whether a line of its progress matches."""
        return any(re.match(pattern, line) for line in list(self.said))

    def interrupt(self, *, group: bool = False) -> None:
        """Press Ctrl-C (`group`: as a terminal does, for the whole group) and check how the command ends."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        if group:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            self.process.send_signal(signal.SIGINT)
        assert self.process.wait(PATIENCE_S) == 130, self.said
        self._reader.join(PATIENCE_S)
        psutil.wait_procs(below, timeout=30)
        left = [process for process in {*below, *self._marked()} if _lives(process)]
        told = [" ".join(process.cmdline()[:4]) for process in left]
        for process in left:
            process.kill()
        assert told == []
        assert self.process.stdout is not None
        self.printed = self.process.stdout.read()

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def check_lines(self) -> None:
        """One line says it, the others are progress; no result is printed."""
        assert self.printed == ""
        lines = [line.rstrip("\n") for line in self.said]
        assert lines.count(LINE) == 1, lines
        assert lines[-1] == LINE
        assert [line for line in lines[:-1] if not re.fullmatch(r"[\w ./-]+(: \d+/\d+)?", line)] == []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def page(number: int) -> str:
    rooms = (
        f"Room {number}-{i} of the house is painted in colour {7 * number + i}.\n\nIt has {i + 2} windows. " * 6
        for i in range(12)
    )
    return f"# House {number}\n\n" + "\n\n".join(rooms) + "\n"


def write_pages(folder: Path, pages: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(pages):
        (folder / f"house-{number:03}.md").write_text(page(number), encoding="utf-8")


def write_house(folder: Path) -> Path:
    """A repository that is large enough for every stage to take a while with the doubles."""
    folder.mkdir()
    write_pages(folder / "knowledge", PAGES)
    (folder / "golden").mkdir()
    cases = [
        {
            "id": f"room-{n}", "question": f"In which colour is room {n % QUESTIONS}-3 painted?", "answerable": True,
            "must_say": [f"colour {7 * (n % QUESTIONS) + 3}"], "cluster": f"house-{n % QUESTIONS}",
        }
        for n in range(CASES)
    ]  # fmt: skip
    (folder / "golden" / "cases.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cases), encoding="utf-8")
    (folder / "golden" / "gate.toml").write_text(
        'zero_tolerance = ["leaks"]\n[[conditions]]\nmetric = "correctness"\nmargin = 0.5\n', encoding="utf-8"
    )
    for name in ("prompts", "models"):
        shutil.copytree(ROOT / "serving" / name, folder / "serving" / name)
    (folder / "params.toml").write_text(
        '[chunk]\nmax_tokens = 100\n[embed]\nmodel = "hashing"\n[model]\nfile = "serving/models/extractive.toml"\n'
        '[evaluate]\nmetrics = ["correctness", "abstention", "leaks"]\n',
        encoding="utf-8",
    )
    return folder


STAGES = (["read"], ["embed", "--engine", "local"], ["index"], ["answer"], ["evaluate"])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after every stage; each test below takes the results of its stage away and makes them again."""
    folder = write_house(tmp_path_factory.mktemp("house") / "project")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        for stage in STAGES:
            assert main(list(stage)) == 0, stage
    return folder


def results(house: Path) -> dict[str, bytes]:
    """What the stages made, timings apart: they are all that may differ."""
    return {name: data for name, data in published(house / "build").items() if name != "timings.json"}


def forget(house: Path, *names: str) -> None:
    """Take results away."""
    for name in names:
        path = house / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run_again(house: Path, *arguments: str, **environment: str) -> str:
    """Run the same command to its end and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "goldgate.cli", *arguments], cwd=house, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def interrupted(
    house: Path, command: list[str], inside: str, *, kept: tuple[str, ...] = (), group: bool = False
) -> None:
    """Interrupt `command` when a line of its progress matches `inside`. Whole entries in `kept` may have come."""
    store = house / ".goldgate"
    before, built = published(store), published(house / "build")
    with Running(house, *command) as running:
        running.wait_until(lambda: running.tells(inside))
        running.interrupt(group=group)
        running.check_lines()
    after = published(store)
    assert {name: after.get(name) for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} <= set(kept)
    assert list((store / "tmp").iterdir()) == []
    assert published(house / "build") == built


def test_index(house: Path) -> None:
    """The collection is filled by a process of its own, which goes too."""
    made = results(house)
    forget(house, ".goldgate/generations", ".goldgate/collections", "build/generation.json")
    interrupted(house, ["index"], r"index: \d+/", kept=("generations",), group=True)
    run_again(house, "index")
    assert results(house) == made
    assert len(list((house / ".goldgate" / "collections").iterdir())) == 1


@pytest.mark.slow
def test_build_over_ray(house: Path) -> None:
    made = results(house)
    forget(house, ".goldgate/embeddings", "build/chunks.parquet", "build/embeddings.parquet", "build/embed.json")
    interrupted(house, ["build"], "embed texts", kept=("embeddings",), group=True)
    run_again(house, "build")
    assert results(house) == made


@pytest.mark.engine
@pytest.mark.slow
def test_model(tmp_path: Path, session_store: Store) -> None:
    """The real conversion, interrupted while it holds the weights; again, in another process: the same bytes."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "serving" / "models", project / "serving" / "models")
    (project / "params.toml").write_text(f'[model]\nfile = "serving/models/{MODEL}"\n', encoding="utf-8")
    store = project / ".goldgate"
    with Running(project, "model") as running:
        running.wait_until(lambda: running.tells("convert "))
        running.wait_until(lambda: psutil.Process(running.process.pid).memory_info().rss > WEIGHTS_BYTES)
        running.interrupt()
        running.check_lines()
    assert set(published(store)) == {"format.json"}
    assert list((store / "tmp").iterdir()) == []
    assert not (project / "build").exists()
    digest = json.loads(run_again(project, "model", "--json"))["digest"]
    # Most often converted already, for the other tests of this run.
    assert digest == build_model(load_model_spec(ROOT / "serving" / "models" / MODEL), session_store).digest


def test_answer(house: Path) -> None:
    made = results(house)
    forget(house, ".goldgate/answers", "build/answers.jsonl", "build/timings.json")
    interrupted(house, ["answer"], r"answer: \d+/", kept=("answers",))
    finished = len(list((house / ".goldgate" / "answers").glob("*/*.json")))
    assert 0 < finished < QUESTIONS
    assert json.loads(run_again(house, "answer", "--json"))["reused"] >= finished
    assert results(house) == made


def test_evaluate(house: Path) -> None:
    """It begins by taking the earlier report away, which the gate could mistake for its own."""
    made = results(house)
    forget(house, "build/report.json", "build/metrics.json", "build/plots")
    interrupted(house, ["evaluate"], r"evaluate: \d+/")
    run_again(house, "evaluate")
    assert results(house) == made


def test_gate(house: Path) -> None:
    """On a large report; the verdict and its pages before the interruption stay."""
    large = enlarged(Report.model_validate_json((house / "build" / "report.json").read_bytes()), 40)
    folder = house / "large"
    folder.mkdir()
    (folder / "report.json").write_bytes(json_bytes(large))
    command = ["gate", "--build", "large", "--against", "large/report.json"]
    run_again(house, *command)
    made = published(folder)
    assert set(made) == {"report.json", "verdict.json", "report.html", "report.md"}
    (folder / "verdict.json").write_bytes(b"{}")
    with Running(house, *command) as running:
        running.wait_until(lambda: running.tells("compare with"))
        running.interrupt()
        running.check_lines()
    assert published(folder) == made | {"verdict.json": b"{}"}
    assert published(house / "build")
    run_again(house, *command)
    assert published(folder) == made


def enlarged(report: Report, times: int) -> Report:
    """The same cases many times, each under ids of its own."""
    copies = (
        case.model_copy(update={"id": f"{case.id}-{n}", "cluster": f"{case.cluster}-{n}"})
        for n in range(times)
        for case in report.cases
    )
    return report.model_copy(update={"cases": tuple(copies)})


# ---------------------------------------------------------------- somebody else's endpoint


@pytest.fixture
def slow() -> Iterator[tuple[Endpoint, threading.Event]]:
    """An endpoint that answers nothing until the event is set: nobody can wait for it."""
    awake = threading.Event()

    def answer(_: int, body: dict[str, Any]) -> Reply:
        awake.wait(10 * PATIENCE_S)
        return completion("The room is painted in colour 3.")

    with endpoint(answer) as running:
        yield running, awake
        awake.set()


def test_answer_by_an_endpoint_that_does_not_answer(
    house: Path, tmp_path: Path, slow: tuple[Endpoint, threading.Event]
) -> None:
    """Requests under way are not waited for."""
    server, awake = slow
    params = tmp_path / "params.toml"
    shutil.copytree(house / "serving", tmp_path / "serving")
    text = (house / "params.toml").read_text(encoding="utf-8")
    params.write_text(text.replace("extractive.toml", "openai-compatible.toml"), encoding="utf-8")
    shutil.copytree(house / "build", tmp_path / "build")
    command = ["answer", "--params", str(params), "--build", str(tmp_path / "build")]
    before, built = published(house / ".goldgate"), published(tmp_path / "build")
    with Running(house, *command, GOLDGATE_LLM_URL=server.url) as running:
        running.wait_until(lambda: bool(server.seen))
        running.interrupt()
        running.check_lines()
    assert published(house / ".goldgate") == before
    assert published(tmp_path / "build") == built
    awake.set()
    run_again(house, *command, GOLDGATE_LLM_URL=server.url)
    assert published(tmp_path / "build") != built


def test_answer_by_an_application_that_does_not_answer(
    house: Path, tmp_path: Path, slow: tuple[Endpoint, threading.Event]
) -> None:
    server, awake = slow
    system = tmp_path / "system.toml"
    system.write_text(
        f'url = "{server.url}/chat/completions"\nbody = {{ q = "{{question}}" }}\n'
        '[reply]\nanswer = "$.choices[0].message.content"\n',
        encoding="utf-8",
    )
    command = ["answer", "--system", str(system), "--build", str(tmp_path / "build")]
    with Running(house, *command) as running:
        running.wait_until(lambda: bool(server.seen))
        running.interrupt()
        running.check_lines()
    assert list((tmp_path / "build").iterdir()) == []
    awake.set()
    run_again(house, *command)
    assert len((tmp_path / "build" / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == CASES


# ---------------------------------------------------------------- all stages, by dvc


@pytest.mark.slow
def test_repro(tmp_path: Path) -> None:
    """The signal reaches the stage under way once, whoever got it; then dvc ends, then this command."""
    project = write_dvc_project(tmp_path / "project")
    write_pages(project / "knowledge", PAGES)
    scripts = str(Path(sys.executable).parent)
    with Running(project, "repro", "embed", PATH=scripts + os.pathsep + os.environ["PATH"]) as running:
        running.wait_until(lambda: running.tells("chunk documents"))
        running.interrupt(group=True)
    lines = [line.rstrip("\n") for line in running.said]
    assert lines[-1] == LINE
    assert lines.count(LINE) == 2  # the stage's, and this command's
    assert "Traceback" not in "".join(lines)
    assert not (project / "build" / "chunks.parquet").exists()
    assert list((project / ".goldgate" / "tmp").iterdir()) == []
    run_again(project, "repro", "embed")
    assert (project / "build" / "chunks.parquet").is_file()
