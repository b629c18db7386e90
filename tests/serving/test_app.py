"""The deployment on real Ray Serve, with the extractive double; the real model is in test_app_engine.py."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.schema import Answer, Principal
from goldgate.pipeline.store import Store
from goldgate.serving import release as releases
from goldgate.serving.app import cause_of, check_port, serve_application
from goldgate.serving.deploy import ask_http, health, wait_healthy
from tests.serving.endpoint import Endpoint, Reply, endpoint, stream
from tests.serving.models import model_folder, write_model_file
from tests.serving.serve_fixture import (
    DOCUMENTS,
    SECRET,
    Deployment,
    free_port,
    make_release,
    serving,
    stop_server,
    wait_for,
)

QUESTION = "On which port does the deployment listen by default?"
USER = [{"role": "user", "content": QUESTION}]
ACME = Principal(tenant="acme", labels=("ops",))
CHANGED = {**DOCUMENTS, "ports.md": "The deployment listens on port 9000 by default."}


def slow_reply(_: int, body: dict[str, object]) -> Reply:
    """The model behind the endpoint takes its time over one question."""
    reply = stream(["Port ", "8000."])
    reply.stall_s = 4 if "slowly" in str(body["messages"]) else 0
    return reply


@pytest.fixture(scope="module")
def model() -> Iterator[Endpoint]:
    with endpoint(slow_reply) as running:
        yield running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Endpoint) -> Iterator[Deployment]:
    """One deployment for this module: release A, made from DOCUMENTS."""
    folder = tmp_path_factory.mktemp("served")
    store = Store.open(folder / "store")
    first = make_release(store, folder / "a")
    releases.promote(store, first.digest, actor="test")
    with serving(store, GOLDGATE_LLM_URL=model.url) as running:
        wait_for(running)
        yield running


@pytest.fixture
def live(served: Deployment) -> Iterator[Deployment]:
    """The deployment with release A live again, whatever the test before promoted."""
    folder = served.store.path("apps", "default")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield served
    for name, data in sorted(before.items()):  # the ledger before the pointer
        served.store.write_bytes(f"apps/default/{name}", data)
    wait_healthy(served.url, served.release, timeout_s=60)


def ask(deployment: Deployment, principal: Principal | None = None, question: str = QUESTION) -> Answer:
    *_, answer = ask_http(deployment.url, question, principal, stream=False)
    assert isinstance(answer, Answer)
    return answer


def openai_of(deployment: Deployment) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0)


def test_health_names_the_release(served: Deployment) -> None:
    body = health(served.url)
    record = releases.load_release(served.store, served.release)
    assert (body["status"], body["release"]) == ("ok", served.release)
    assert (body["knowledge_base"], body["model"], body["prompt"]) == (record.generation, record.model, record.prompt)


def test_an_answer_comes_from_the_documents_with_its_source(served: Deployment) -> None:
    answer = ask(served)
    assert answer.text == "The deployment listens on port 8000 by default."
    assert [c.document for c in answer.citations] == ["ports.md"]
    assert answer.release == served.release
    assert answer.passages


def test_a_streamed_answer_is_the_same_answer(served: Deployment) -> None:
    *pieces, last = ask_http(served.url, QUESTION, stream=True)
    assert isinstance(last, Answer)
    assert len(pieces) > 1
    assert "".join(str(p) for p in pieces) == last.text == ask(served).text


def test_the_official_openai_client(served: Deployment) -> None:
    done = openai_of(served).chat.completions.create(model="default", messages=USER)
    assert done.choices[0].message.content == "The deployment listens on port 8000 by default."
    extra = (done.model_extra or {})["goldgate"]
    assert (extra["release"], extra["citations"][0]["document"]) == (served.release, "ports.md")


def test_the_official_openai_client_streaming(served: Deployment) -> None:
    raw = openai_of(served).chat.completions.with_raw_response.create(model="default", messages=USER, stream=True)
    assert raw.headers["X-Goldgate-Release"] == served.release
    chunks = list(raw.parse())
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == "The deployment listens on port 8000 by default."
    assert sum(bool(c.choices[0].delta.content) for c in chunks) > 1
    assert (chunks[-1].model_extra or {})["goldgate"]["citations"][0]["document"] == "ports.md"


def test_a_chat_cannot_bring_its_own_prompt(served: Deployment) -> None:
    with pytest.raises(openai.BadRequestError, match="system messages are refused"):
        openai_of(served).chat.completions.create(
            model="default", messages=[{"role": "system", "content": "obey"}, *USER]
        )


def test_only_a_principal_sees_its_documents(served: Deployment) -> None:
    question = "What is the vault code of acme?"
    assert SECRET in ask(served, ACME, question).text
    stranger = ask(served, None, question)
    assert "7431" not in stranger.model_dump_json()
    assert "7431" not in ask(served, Principal(tenant="acme"), question).model_dump_json()


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/embeddings", "/tokenize", "/metrics", "/generate_text", "/engine"]
)
def test_the_engine_has_no_door(served: Deployment, path: str) -> None:
    assert httpx.post(served.url + path, json={"model": "extractive", "prompt": "Say hello"}).status_code == 404


def test_serve_routes_to_the_ingress_alone(served: Deployment) -> None:
    assert list(httpx.get(f"{served.url}/-/routes").json()) == ["/"]


def test_a_large_body_is_refused(served: Deployment) -> None:
    assert httpx.post(f"{served.url}/v1/answers", json={"question": "x" * 100_000}).status_code == 413


def test_a_client_that_goes_away_harms_nobody(served: Deployment) -> None:
    for _ in range(5):
        with httpx.stream("POST", f"{served.url}/v1/answers", json={"question": QUESTION, "stream": True}) as reply:
            next(reply.iter_bytes())
    assert ask(served).citations


# ---------------------------------------------------------------- switching


def test_switching_mixes_nothing_and_loses_nothing(live: Deployment, tmp_path: Path) -> None:
    """Hundreds of requests while the pointer moves there and back: each is wholly of the release that it names."""
    second = make_release(live.store, tmp_path / "b", CHANGED)
    port = {live.release: "8000", second.digest: "9000"}
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    stop = threading.Event()

    def load(stream: bool) -> None:
        with httpx.Client(base_url=live.url, timeout=60) as client:
            while not stop.is_set():
                reply = client.post("/v1/answers", json={"question": QUESTION, "stream": stream})
                named = reply.headers.get("X-Goldgate-Release", "")
                body = json.loads(reply.text.strip().splitlines()[-1].removeprefix("data: "))
                text = json.dumps([body.get("answer"), body.get("passages"), body.get("citations")])
                expected, other = port.get(named, "?"), {"8000": "9000", "9000": "8000"}.get(port.get(named, "?"), "?")
                if reply.status_code != 200 or body.get("release") != named or expected not in text or other in text:
                    wrong.append(f"{reply.status_code} {named[:12]} {reply.text[:300]}")
                seen[named] += 1

    workers = [threading.Thread(target=load, args=(i % 2 == 0,)) for i in range(6)]
    for worker in workers:
        worker.start()
    try:
        _wait_until(lambda: seen[live.release] >= 50)
        releases.promote(live.store, second.digest, actor="test")
        wait_healthy(live.url, second.digest, timeout_s=60)
        _wait_until(lambda: seen[second.digest] >= 100)
        before = seen[live.release]
        releases.rollback(live.store, actor="test")
        wait_healthy(live.url, live.release, timeout_s=60)
        _wait_until(lambda: seen[live.release] >= before + 50)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert wrong == []
    assert set(seen) == {live.release, second.digest}
    assert ask(live).text.endswith("8000 by default.")


def _wait_until(true: object, timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until, "not in time"
        time.sleep(0.05)


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_answering(live: Deployment, tmp_path: Path) -> None:
    broken = make_release(live.store, tmp_path / "b", CHANGED, note="broken")
    (releases.release_folder(live.store, broken.digest) / "params.toml").write_text("[retrieve]\ntop_k = 9\n")
    pointer = releases.read_pointer(live.store)
    assert pointer is not None
    # Promoting checks the bytes as well, so the pointer is moved by hand.
    forged = pointer.model_copy(update={"release": broken.digest})
    live.store.write_bytes("apps/default/production.json", forged.model_dump_json().encode())
    with pytest.raises(EnvironmentFailure, match=r"could not load the release.*was changed after it was made"):
        wait_healthy(live.url, broken.digest, timeout_s=60)
    assert ask(live).release == live.release
    assert health(live.url)["status"] == "ok"


def test_another_engine_needs_a_restart_and_says_so(live: Deployment, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "weights")
    text = f'name = "other"\nkind = "vllm"\nsource = "{source}"\n'
    other = make_release(live.store, tmp_path / "b", model=str(write_model_file(tmp_path / "other.toml", text)))
    releases.promote(live.store, other.digest, actor="test")
    with pytest.raises(Refused, match="restart goldgate serve"):
        wait_healthy(live.url, other.digest, timeout_s=60)
    assert health(live.url)["restart_needed"] == other.digest
    assert ask(live).release == live.release


# ---------------------------------------------------------------- what can be wrong before anything starts


def start_here(store: Store, port: int) -> subprocess.CompletedProcess[str]:
    """Run the server in a process of its own and wait for its end."""
    from tests.serving.serve_fixture import ROOT, SERVE

    command = [sys.executable, "-X", "importtime", "-c", SERVE, str(store.root), str(port), "60"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return what was said beside the list of imports, and check that Ray was not even imported."""
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert not any(line.split("|")[-1].strip() == "ray" for line in imports)
    assert done.stdout == ""
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


def test_a_taken_port_is_one_line_before_anything_starts(store: Store, tmp_path: Path) -> None:
    releases.promote(store, make_release(store, tmp_path / "a").digest, actor="test")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = start_here(store, port)
    assert done.returncode == 6
    assert said(done) == f"port {port} of 127.0.0.1 is taken; expected a free port; choose another with --port"


@pytest.mark.parametrize(
    ("host", "port", "error"),
    [
        ("127.0.0.1", 0, UsageError),
        ("127.0.0.1", 70000, UsageError),
        ("no.such.host.invalid", 8000, UsageError),
        ("192.0.2.1", 8000, EnvironmentFailure),
    ],
)
def test_an_address_that_is_none(host: str, port: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_port(host, port)
    check_port("127.0.0.1", free_port())


def test_nothing_promoted(store: Store) -> None:
    with pytest.raises(UsageError, match="nothing is promoted"):
        serve_application(store, port=free_port())


def test_a_release_whose_bytes_changed_is_not_served(store: Store, tmp_path: Path) -> None:
    made = make_release(store, tmp_path / "a")
    releases.promote(store, made.digest, actor="test")
    (releases.release_folder(store, made.digest) / "prompt.toml").write_text("system = 'obey'")
    with pytest.raises(Refused, match=r"was changed after it was made: prompt\.toml"):
        serve_application(store, port=free_port())


def test_a_truncated_model_file_is_one_line(store: Store, tmp_path: Path) -> None:
    text = f'name = "other"\nkind = "vllm"\nsource = "{model_folder(tmp_path / "weights")}"\n'
    made = make_release(store, tmp_path / "a", model=str(write_model_file(tmp_path / "other.toml", text)))
    releases.promote(store, made.digest, actor="test")
    (weights,) = store.path("models").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    done = start_here(store, free_port())
    assert done.returncode == 6
    line = said(done)
    assert "\n" not in line
    assert str(weights) in line


def test_the_cause_of_a_long_traceback_is_its_last_exception() -> None:
    text = (
        "The deployment failed to start 1 times. Error:\n\x1b[36mray::Replica\x1b[39m\n  File x\nKeyError: 'a'\n\n"
        "During handling ...\n  File y, line 2\nRuntimeError: Failed to create the config: 1 error\n"
        "  Value error, max_model_len (9) is greater than 8\n"
    )
    assert cause_of(text) == (
        "RuntimeError: Failed to create the config: 1 error Value error, max_model_len (9) is greater than 8"
    )
    assert cause_of("something\n  else") == "something else"
    assert len(cause_of("ValueError: " + "x" * 9999)) == 400


# ---------------------------------------------------------------- the end


def test_stopping_lets_an_answer_end_and_leaves_no_process_behind(
    served: Deployment, model: Endpoint, tmp_path: Path
) -> None:
    """The last test of this module: it ends the deployment while an answer is under way."""
    other = make_release(served.store, tmp_path / "b", model="openai-compatible.toml")
    releases.promote(served.store, other.digest, actor="test")
    wait_healthy(served.url, other.digest, timeout_s=60)
    started = psutil.Process(served.process.pid).children(recursive=True)
    assert len(started) > 5
    answers: list[Answer] = []
    question = "Say slowly on which port the deployment listens"
    asking = threading.Thread(target=lambda: answers.append(ask(served, question=question)))
    asking.start()
    _wait_until(lambda: any("slowly" in str(body["messages"]) for body in model.seen))
    assert stop_server(served.process) == 0
    asking.join()
    assert [(answer.text, answer.release) for answer in answers] == [("Port 8000.", other.digest)]
    _, left = psutil.wait_procs(started, timeout=20)
    assert [p.cmdline()[:3] for p in left] == []
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{served.url}/healthz", timeout=2)
    assert "Traceback" not in served.log.read_text(errors="replace")
