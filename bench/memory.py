"""Peak memory of building a knowledge base and, with --serving, of serving a release.

    .venv/bin/python -m bench.memory [--documents 1000] [--few 100] [--serving STORE]

Builds are `goldgate build` as anyone runs it (Ray Data, the default embedder, an empty store), of as many documents as
asked for and of few, each in a process of its own. Twice a second the memory of the command and all its descendants is
added up, once as resident sets (RSS: what processes share counts in each of them) and once as proportional sets (PSS:
shared pages are divided among those who share them, so this is what the machine gives). The last number is the peak of
the large build divided by the small one's, by PSS: target at most 2, since documents stream.

`--serving STORE` also serves the live release of that store (`goldgate demo --keep FOLDER` leaves one in FOLDER/store)
with `goldgate serve`, asks it questions, and stops it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from bench.measure import ROOT, documents, finish, machine, not_measured, parser, positive, say, seconds, show
from goldgate.pipeline.errors import EnvironmentFailure, GoldgateError

MOST_RATIO = 2.0
EVERY_S = 0.5
GIB = 1 << 30
ASKED = 5
START_S = 600


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    options = parser(__doc__)
    options.add_argument("--documents", type=positive, default=1000, help="documents of the build (default: 1000)")
    options.add_argument("--few", type=positive, default=100, help="documents of the small build (default: 100)")
    options.add_argument("--serving", type=Path, metavar="STORE", help="a store with a live release to serve")
    options.add_argument("--params", type=Path, default=ROOT / "params.toml", help="default: the repository's")
    chosen = options.parse_args(arguments)
    if chosen.serving and not (chosen.serving / "apps").is_dir():
        not_measured(f"{chosen.serving} is no store with a release; `goldgate demo --keep FOLDER` leaves one")
    show(machine("ray", "torch"))
    peaks = {count: _build(chosen.data, count, chosen.params) for count in (chosen.few, chosen.documents)}
    if chosen.serving:
        peak, answered = _serve(chosen.serving)
        show(f"serving, {answered} questions asked: {peak}")
    compared = f"peak PSS of building {chosen.documents} documents ÷ of {chosen.few}"
    return finish("memory", compared, peaks[chosen.documents].pss / peaks[chosen.few].pss, most=MOST_RATIO)


# ---------------------------------------------------------------- building


def _build(data: Path, count: int, params: Path) -> Peak:
    with tempfile.TemporaryDirectory(prefix="goldgate-bench-") as name:
        folder = Path(name)
        what, written = _knowledge(data, count, folder / "knowledge")
        command = [
            sys.executable, "-m", "goldgate.cli", "build", "--params", str(params), "--build", str(folder / "build"),
            "--knowledge", str(folder / "knowledge"), "--store", str(folder / "store"), "--skip-unreadable",
        ]  # fmt: skip
        say(f"building {written} documents of {what}")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            watch = Watch(child.pid)
            output: list[str] = []
            spent = seconds(lambda: output.extend(child.stdout or ()))
            code = child.wait()
        peak = watch.stop()
    if code:
        raise SystemExit(f"goldgate build ended with {code}")
    show(f"build, {written} documents of {what}: {peak}; {spent:.0f} s; {output[-1].strip() if output else ''}")
    return peak


def _knowledge(data: Path, count: int, target: Path) -> tuple[str, int]:
    """Copies of `count` documents, picked by a fixed seed."""
    folder = data / "ray_docs" / "2023-08-16" / "docs"
    folder = folder if folder.is_dir() else ROOT / "knowledge"
    name, found = documents(data)
    if len(found) < count:
        not_measured(f"{name} has {len(found)} documents; {count} are wanted, see --documents and --few")
    for document in found[:count]:
        (target / document.id).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / document.id, target / document.id)
    return name, count


# ---------------------------------------------------------------- serving


def _serve(store: Path) -> tuple[Peak, int]:
    """Start `goldgate serve`, wait until it is healthy, ask, stop; the peak is over all of that."""
    from goldgate.pipeline.schema import Principal
    from goldgate.serving.deploy import ask_http

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "goldgate.cli", "serve"]
    say("serving; Ray Serve and the model start first")
    with _running([*command, "--store", str(store.resolve()), "--port", str(port)]) as child:
        watch = Watch(child.pid)
        try:
            _wait(url, child)
            for question in QUESTIONS[:ASKED]:
                for _ in ask_http(url, question, Principal()):
                    pass
        finally:
            peak = watch.stop()
    return peak, ASKED


QUESTIONS = (
    "What does the gate decide?", "How are the two rankings combined?", "What is a generation?",
    "Which exit code means that the verdict is FAIL?", "How is a release rolled back?",
)  # fmt: skip


def _wait(url: str, child: subprocess.Popen[bytes]) -> None:
    """Wait in short rounds, so that a server that died is told at once."""
    from goldgate.serving.deploy import wait_healthy

    for _ in range(START_S // 10):
        with contextlib.suppress(EnvironmentFailure):
            wait_healthy(url, None, timeout_s=10)
            return
        if child.poll() is not None:
            break
    not_measured("goldgate serve did not become healthy")


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=dict(os.environ)
    ) as child:
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()


# ---------------------------------------------------------------- memory


@dataclass
class Peak:
    """The most bytes that a process and its descendants held together, and how many processes that were."""

    rss: int = 0
    pss: int = 0
    processes: int = 0

    def __str__(self) -> str:
        """GiB, for people."""
        return f"peak {self.rss / GIB:.2f} GiB RSS, {self.pss / GIB:.2f} GiB PSS, {self.processes} processes"


class Watch:
    """Samples a process tree until it is told to stop."""

    def __init__(self, pid: int) -> None:
        """Start."""
        self._process = psutil.Process(pid)
        self._peak = Peak()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> Peak:
        """Stop and return the peak. Raises SystemExit when nothing was seen: then nothing was measured."""
        self._stop.set()
        self._thread.join()
        if not self._peak.pss:
            not_measured("this system does not tell the memory of processes")
        return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            sets = [held for held in map(_held, family) if held is not None]
            self._peak.rss = max(self._peak.rss, sum(rss for rss, _ in sets))
            self._peak.pss = max(self._peak.pss, sum(pss for _, pss in sets))
            self._peak.processes = max(self._peak.processes, len(sets))


def _held(process: psutil.Process) -> tuple[int, int] | None:
    """(RSS, PSS) of one process in bytes; None when it has just ended."""
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return None
    return int(info.rss), int(info.pss)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except GoldgateError as error:
        raise SystemExit(f"not measured: {error}") from None
