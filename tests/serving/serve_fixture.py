"""Small releases and a real deployment of them, for tests. The deployment runs in a process of its own: ending that
process ends Ray with it, whatever a test did."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from goldgate.pipeline.embedder import load_embedder
from goldgate.pipeline.index import index
from goldgate.pipeline.params import EmbedParams, IndexParams
from goldgate.pipeline.schema import Release
from goldgate.pipeline.store import Store, digest_bytes
from goldgate.serving import release as releases
from goldgate.serving.model import build_model, load_model_spec
from goldgate.serving.prompt import load_prompt
from tests.pipeline.builds import document, write_build

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "serving" / "models"
PROMPT = ROOT / "serving" / "prompts" / "grounded.toml"

DOCUMENTS = {
    "ports.md": "The deployment listens on port 8000 by default.\n\nThe option --port chooses another port.",
    "rollback.md": "The command goldgate rollback makes the release before the live one live again.",
    "releases.md": "A release is immutable and named by its digest.\n\nThe pointer names the live release.",
}
PAGES = {
    "ports.md": (
        "Requests come over HTTP. The deployment listens on port 8000 by default, and the option --port chooses "
        "another one."
    ),
    "rollback.md": (
        "The command goldgate rollback makes the release before the live one live again. It needs no judge and no "
        "language model, and it writes an event to the ledger."
    ),
    "releases.md": (
        "A release is immutable and named by its digest, which is 64 hexadecimal digits long. The pointer of the "
        "application names the live release."
    ),
}
"""As long as real passages are: the real model was trained with such."""

SECRET = "The vault code of acme is 7431."
"""Told by a document of the tenant acme only."""

SERVE = (
    "import sys; from goldgate.pipeline.store import Store; from goldgate.serving.app import serve_application; "
    "from goldgate.pipeline.errors import GoldgateError\n"
    "try: serve_application(Store.open(sys.argv[1]), port=int(sys.argv[2]), timeout_s=float(sys.argv[3]))\n"
    "except GoldgateError as error: print(error, file=sys.stderr); sys.exit(int(error.exit_code))"
)


@dataclass(frozen=True)
class Deployment:
    """A running deployment, its store and its process."""

    url: str
    store: Store
    release: str
    process: subprocess.Popen[bytes]
    log: Path


def make_release(
    store: Store,
    folder: Path,
    documents: Mapping[str, str] | None = None,
    *,
    model: str = "extractive.toml",
    embedder: str = "hashing",
    note: str = "",
    retrieve: str = "",
) -> Release:
    """Build and release documents (name -> text); `note` makes a release of its own from the same parts.

    The verdict and the report are stand-ins: serving never reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    embed = EmbedParams(model=embedder, dtype="float32")
    found = [document(name, text) for name, text in (documents or DOCUMENTS).items()]
    found.append(document("vault.md", SECRET, tenant="acme", access=("ops",)))
    build = write_build(folder / "build", found, embedder=load_embedder(embed, "float32"))
    generation = index(build, IndexParams(), store)
    model_file = MODELS / model if (MODELS / model).is_file() else Path(model)
    built = build_model(load_model_spec(model_file), store)
    files = {}
    for name in releases.RELEASE_FILES:
        files[name] = folder / name
        files[name].write_text(f"{name} {note}\n", encoding="utf-8")
    params = f'[embed]\nmodel = "{embedder}"\ndtype = "float32"\n[retrieve]\ntop_k = 2\n{retrieve}'
    files["params.toml"].write_text(params, encoding="utf-8")
    files["prompt.toml"] = PROMPT
    files["model.toml"] = model_file
    stand_in = digest_bytes(note.encode())
    live = releases.production(store)
    fields = {
        "generation": generation.digest, "model": built.digest, "prompt": load_prompt(PROMPT).digest,
        "retrieval": stand_in, "embedder": generation.embedder, "code": stand_in, "gold": stand_in, "policy": stand_in,
        "report": stand_in, "verdict": stand_in, "actor": "test", "baseline": live,
        "verdict_word": None if live is None else "PASS",
    }  # fmt: skip
    return releases.make_release(store, files, fields, application="default", bootstrap=live is None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(store: Store, timeout_s: float = 300, **environment: str) -> Iterator[Deployment]:
    """Serve the production release of `store` on a free port, in a process of its own; not yet healthy."""
    port = free_port()
    release = releases.production(store)
    with tempfile.NamedTemporaryFile(suffix=".serve.log", delete=False) as log:
        process = start_server(store, port, timeout_s, log, environment)
    try:
        yield Deployment(f"http://127.0.0.1:{port}", store, release or "", process, Path(log.name))
    finally:
        stop_server(process)
        Path(log.name).unlink(missing_ok=True)


def start_server(
    store: Store, port: int, timeout_s: float, log: object, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SERVE, str(store.root), str(port), str(timeout_s)]
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        command,
        stdout=log,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**inherited, **environment},
        start_new_session=True,
    )


def stop_server(process: subprocess.Popen[bytes], patience_s: float = 60) -> int:
    """Ask the server to stop and return its exit status; a server that does not listen is killed with its children."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes are in it
    return process.wait()


def wait_for(deployment: Deployment, timeout_s: float = 300) -> dict[str, object]:
    """Wait until the deployment is healthy. Fails with the server's own words when it ended."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if deployment.process.poll() is not None:
            raise AssertionError(f"the server ended: {deployment.log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(httpx.HTTPError, ValueError):
            reply = httpx.get(f"{deployment.url}/healthz", timeout=5)
            if reply.status_code == 200:
                return dict(reply.json())
        time.sleep(0.3)
    raise AssertionError("not healthy in time")


@contextlib.contextmanager
def deployment_of_the_real_model(store: Store, folder: Path) -> Iterator[Deployment]:
    """The real model on Ray Serve and vLLM over PAGES with the real embedder: about two minutes to start.

    The integrator's session fixture `deployment` yields this once per test run.
    """
    release = make_release(store, folder, PAGES, model="smollm2-135m-grounded.toml", embedder="all-MiniLM-L6-v2")
    releases.promote(store, release.digest, actor="test")
    with serving(store, timeout_s=600) as running:
        wait_for(running, timeout_s=600)
        yield running
