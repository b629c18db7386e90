"""handbook -> build, first release, deployment, and five proposals judged against it. Works on copies only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from goldgate.asking import show_stream
from goldgate.console import note, out
from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.schema import Principal, Verdict
from goldgate.workspace import (
    Reporter,
    Workspace,
    answer_step,
    embed_step,
    evaluate_step,
    gate_step,
    index_step,
    model_step,
    promote_step,
    read_step,
    release_step,
    with_files,
)  # fmt: skip

if TYPE_CHECKING:
    from goldgate.serving.generate import Generator

COPIED = ("knowledge", "golden", "serving/prompts", "serving/models", "params.toml", "baseline.json")
QUESTIONS = (
    "Which exit code does INCONCLUSIVE have?",
    "Does a rollback need a judge or the language model?",
)
NEW_FACT_QUESTION = "Where is the log of the demo?"
SERVE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Proposal:
    """A change that somebody proposes."""

    name: str
    story: str
    change: Callable[[Path], None]


def _drop_exit_codes(folder: Path) -> None:
    """Somebody tidies the reference and cuts the table away."""
    page = folder / "knowledge" / "reference" / "exit-codes.md"
    text = page.read_text(encoding="utf-8")
    head, _, _ = text.partition("\n## ")
    page.write_text(head.split("\n|")[0].rstrip() + "\n\nThe codes are being revised.\n", encoding="utf-8")


def _one_passage(folder: Path) -> None:
    """Somebody saves tokens."""
    params = folder / "params.toml"
    lines = params.read_text(encoding="utf-8").splitlines()
    changed = ["top_k = 1" if line.startswith("top_k =") else line for line in lines]
    params.write_text("\n".join(changed) + "\n", encoding="utf-8")


def _no_grounding(folder: Path) -> None:
    """Somebody wants livelier answers."""
    page = folder / "serving" / "prompts" / "grounded.toml"
    lines = page.read_text(encoding="utf-8").splitlines()
    changed = [_LIVELIER.get(line.split(" = ")[0], line) for line in lines]
    page.write_text("\n".join(changed) + "\n", encoding="utf-8")


_LIVELIER = {
    "system": 'system = "You are a witty expert. Always give an answer, in your own words."',
    "passage": 'passage = "{text}"',
}


def _base_model(folder: Path) -> None:
    """Somebody thinks that the adapter is not needed."""
    params = folder / "params.toml"
    text = params.read_text(encoding="utf-8")
    params.write_text(text.replace("smollm2-135m-grounded.toml", "smollm2-135m.toml"), encoding="utf-8")


def _add_log_file(folder: Path) -> None:
    """Somebody answers a question that users ask."""
    page = folder / "knowledge" / "tutorials" / "first-run.md"
    text = page.read_text(encoding="utf-8").rstrip()
    added = "The log of the demo is the file `serve.log` in its folder."
    page.write_text(f"{text}\n\n## Where the log is\n\n{added}\n", encoding="utf-8")


PROPOSALS = (
    Proposal("harmful-document", "a page loses the table that answers its questions", _drop_exit_codes),
    Proposal("harmful-retrieval", "top_k = 1: only one passage is given to the model", _one_passage),
    Proposal("harmful-prompt", "the rule to answer from the passages makes way for wit", _no_grounding),
    Proposal("good-document", "a page gains the answer to a question that users ask", _add_log_file),
    Proposal("base-model", "the model without its grounding adapter", _base_model),
)


def run_demo(keep: Path | None, progress: Reporter) -> None:
    """Run the whole loop in a folder of its own. `keep` names that folder; it must be empty or absent.

    Raises UsageError when the working directory is not a goldgate repository or `keep` is in use, and whatever error
    a step ends with. The deployment it starts is stopped again.
    """
    started = time.monotonic()
    folder = _demo_folder(keep)
    ws = with_files(Workspace(store_url=str(folder / "store")), folder / "production")
    _copy_files(Path.cwd(), folder / "production")
    _title(1, "build the handbook")
    with _Engine(progress) as engine:
        _build(ws, progress)
        _title(2, "answer the gold questions, measure, and make the first release (there is no production yet)")
        live = _first_release(ws, engine, progress)
        _title(3, "serve it on Ray Serve and vLLM, and ask")
        with _served(folder, progress) as url:
            for question in (*QUESTIONS, NEW_FACT_QUESTION):
                _ask(url, question)
            verdicts = {}
            for number, proposal in enumerate(PROPOSALS, 4):
                _title(number, f"proposal {proposal.name}: {proposal.story}")
                verdicts[proposal.name] = _judge(ws, folder, proposal, engine, progress)
            _title(4 + len(PROPOSALS), "promote what passed, while it is served")
            promoted = _promote_passed(folder, verdicts, url, progress)
    _summary(folder, live, promoted, verdicts, time.monotonic() - started)


def _demo_folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="goldgate-demo-"))
    if keep.exists() and any(keep.iterdir()):
        raise UsageError(f"{keep} is not empty", "a new or empty folder", "name another one with --keep")
    keep.mkdir(parents=True, exist_ok=True)
    return keep.resolve()


def _copy_files(source: Path, target: Path) -> None:
    for name in COPIED:
        if not (source / name).exists():
            raise UsageError(f"{name} is not here", "the root of a goldgate repository", "run the demo from there")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copyfile(source / name, target / name)
    # The demo starts with nothing live, whatever is live in this repository.
    (target / "baseline.json").write_text('{"release": null, "dtype": null}\n', encoding="utf-8")


class _Engine:
    """The model that answers: loaded once, and again only when a proposal brings another one."""

    def __init__(self, progress: Reporter) -> None:
        self._progress = progress
        self._loaded: tuple[str, Generator] | None = None

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._loaded is not None:
            self._loaded[1].close()
        self._loaded = None

    def of(self, ws: Workspace) -> Generator:
        """Return the generator for the model of `ws`."""
        from goldgate.serving.generate import load_generator

        model = model_step(ws, self._progress)
        if self._loaded is not None and self._loaded[0] == model.digest:
            return self._loaded[1]
        self.__exit__()  # one at a time: each takes a gigabyte for its cache
        out(f"model {model.digest[:12]}: {model.spec.name}")
        self._progress("loading the model into vLLM", 0, 0)
        self._loaded = (model.digest, load_generator(model, ws.load_params().answer))
        return self._loaded[1]


def _build(ws: Workspace, progress: Reporter) -> None:
    summary = read_step(ws, progress)
    counts = embed_step(ws, progress)
    generation = index_step(ws, progress)
    out(
        f"{summary.documents} documents, {counts.chunks} chunks, {counts.embedded} texts embedded, "
        f"{counts.reused} reused -> generation {generation.digest[:12]}"
    )


def _evaluate(ws: Workspace, engine: _Engine, progress: Reporter) -> Verdict:
    answers = answer_step(ws, progress, engine.of(ws))
    reused = sum(answer.reused for answer in answers)
    out(f"{len(answers)} gold questions: {len(answers) - reused} answered, {reused} unchanged")
    evaluate_step(ws, progress)
    return gate_step(ws, None, progress)


def _first_release(ws: Workspace, engine: _Engine, progress: Reporter) -> str:
    from goldgate.evals.report import render_text

    verdict = _evaluate(ws, engine, progress)
    out(render_text(verdict))
    release = release_step(ws, bootstrap=True)
    promote_step(ws, release.digest, "demo: first release")
    out(f"release {release.digest[:12]} is live (made with --bootstrap: it was compared with nothing)")
    return release.digest


def _judge(ws: Workspace, folder: Path, proposal: Proposal, engine: _Engine, progress: Reporter) -> Verdict:
    from goldgate.evals.report import render_text

    place = folder / "proposals" / proposal.name
    _copy_files(folder / "production", place)
    shutil.copyfile(ws.baseline, place / "baseline.json")
    proposal.change(place)
    candidate = with_files(Workspace(store_url=str(folder / "store")), place)
    _build(candidate, progress)
    verdict = _evaluate(candidate, engine, progress)
    out(render_text(verdict))
    return verdict


def _promote_passed(folder: Path, verdicts: dict[str, Verdict], url: str, progress: Reporter) -> str | None:
    from goldgate.serving.deploy import wait_healthy

    passed = [name for name, verdict in verdicts.items() if verdict.verdict == "PASS"]
    if not passed:
        out("nothing passed, nothing is promoted")
        return None
    place = folder / "proposals" / passed[-1]
    candidate = with_files(Workspace(store_url=str(folder / "store")), place)
    release = release_step(candidate)
    promote_step(candidate, release.digest, f"demo: {passed[-1]}")
    wait_healthy(url, release.digest, timeout_s=120, progress=progress)
    out(f"release {release.digest[:12]} is live and served")
    _ask(url, NEW_FACT_QUESTION)
    return release.digest


# ---------------------------------------------------------------- the deployment


def free_port() -> int:
    """Return a port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _served(folder: Path, progress: Reporter) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log_path = folder / "serve.log"
    command = [sys.executable, "-m", "goldgate.cli", "serve", "--store", str(folder / "store"), "--port", str(port)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))  # noqa: S603
        try:
            health = _wait_started(url, process, progress)
            out(f"healthy at {url}, release {str(health['release'])[:12]}")
            yield url
        except EnvironmentFailure:
            note(log_path.read_text(encoding="utf-8", errors="replace")[-2000:])
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_started(url: str, process: subprocess.Popen[bytes], progress: Reporter) -> dict[str, object]:
    """Wait in short rounds, so that a server that died is told at once and not after the whole time-out."""
    from goldgate.serving.deploy import wait_healthy

    started = time.monotonic()
    while True:
        elapsed = int(time.monotonic() - started)
        progress(f"Ray Serve and vLLM are starting (one to three minutes), {elapsed} s", 0, 0)
        try:
            return wait_healthy(url, None, timeout_s=10)
        except EnvironmentFailure:
            if process.poll() is not None or elapsed > SERVE_TIMEOUT_S:
                raise


def _ask(url: str, question: str) -> None:
    from goldgate.serving.deploy import ask_http

    out(f"\n> {question}")
    show_stream(ask_http(url, question, Principal()))


# ---------------------------------------------------------------- what is said


def _title(number: int, text: str) -> None:
    out(f"\n=== {number}. {text} ===")


def _summary(folder: Path, first: str, promoted: str | None, verdicts: dict[str, Verdict], seconds: float) -> None:
    _title(5 + len(PROPOSALS), "what happened")
    for proposal in PROPOSALS:
        out(f"{proposal.name:18} {verdicts[proposal.name].verdict or 'no verdict':13} {proposal.story}")
    out(f"first release      {first[:12]}")
    out(f"live now           {(promoted or first)[:12]}")
    out(f"took               {seconds / 60:.1f} minutes")
    out(f"files              {folder}")
    for proposal in PROPOSALS:
        out(f"report             {folder / 'proposals' / proposal.name / 'build' / 'report.html'}")
    out(
        "\nDo it yourself, in this repository:\n"
        "  goldgate repro                 build, answer, evaluate and gate what you changed\n"
        "  goldgate release --bootstrap   the first release; later ones need a PASS\n"
        "  goldgate promote DIGEST        make it live\n"
        "  goldgate serve                 serve what is live\n"
        "  goldgate ask 'your question'   ask it"
    )
