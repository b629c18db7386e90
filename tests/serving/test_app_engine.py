"""The deployment with the real model on ray.serve.llm. One Serve start, shared by the whole run (`deployment`)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from goldgate.pipeline.index import load_generation
from goldgate.pipeline.params import load_params
from goldgate.pipeline.schema import Answer, Principal, Query
from goldgate.pipeline.store import Store
from goldgate.serving import release as releases
from goldgate.serving.answer import open_answerer
from goldgate.serving.deploy import ask_http, wait_healthy
from goldgate.serving.generate import Generator
from tests.serving.serve_fixture import MODELS, PAGES, ROOT, SERVE, Deployment, free_port, make_release

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QUESTIONS = (
    "On which port does the deployment listen by default?",
    "What does the command goldgate rollback do?",
    "How is a release named?",
)


def test_the_warm_deployment_answers_with_sources(deployment: Deployment) -> None:
    assert wait_healthy(deployment.url, deployment.release, timeout_s=10)["status"] == "ok"
    *pieces, answer = ask_http(deployment.url, QUESTIONS[0])
    assert isinstance(answer, Answer)
    assert len(pieces) > 1
    assert "8000" in answer.text
    assert answer.citations[0].document == "ports.md"
    cited = PAGES["ports.md"][answer.citations[0].start : answer.citations[0].end]
    assert cited
    assert cited in answer.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 1
    assert answer.timings.first_token_ms is not None


def test_the_official_client_streams_from_the_real_model(deployment: Deployment) -> None:
    client = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0)
    question = [{"role": "user", "content": QUESTIONS[0]}]
    whole = client.chat.completions.create(model="default", messages=question)
    chunks = list(client.chat.completions.create(model="default", messages=question, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert (chunks[-1].model_extra or {})["goldgate"]["release"] == deployment.release


def test_production_says_what_the_gate_judged(deployment: Deployment, generator: Generator) -> None:
    """The same release answered by the engine in this process: the same prompts, and the same greedy text."""
    record = releases.load_release(deployment.store, deployment.release)
    folder = releases.release_folder(deployment.store, deployment.release)
    params = load_params(folder / "params.toml")
    here = open_answerer(
        load_generation(record.generation, deployment.store),
        params.embed,
        params.retrieve,
        folder / "prompt.toml",
        folder / "model.toml",
        params.answer,
        deployment.store,
        generator=generator,
        release=record.digest,
    )
    judged = here.answer_many([Query(question=question, principal=Principal()) for question in QUESTIONS])
    here.close()
    equal = 0
    for question, expected in zip(QUESTIONS, judged, strict=True):
        *_, served = ask_http(deployment.url, question, stream=False)
        assert isinstance(served, Answer)
        assert isinstance(expected, Answer)
        assert served.passages == expected.passages
        assert served.usage is not None
        assert expected.usage is not None
        assert served.usage.prompt_tokens == expected.usage.prompt_tokens
        equal += served.text == expected.text
    # bf16 results may depend on the shape of the batch (about 1 answer in 100): one of three may differ.
    assert equal >= len(QUESTIONS) - 1


def test_the_engine_has_no_door_and_no_telemetry(deployment: Deployment) -> None:
    for path in ("/v1/completions", "/v1/embeddings", "/tokenize", "/generate_text"):
        body = {"model": "smollm2-135m-grounded", "prompt": "Say hello"}
        assert httpx.post(deployment.url + path, json=body).status_code == 404
    assert list(httpx.get(f"{deployment.url}/-/routes").json()) == ["/"]
    import psutil

    names = [" ".join(p.cmdline()) for p in psutil.Process(deployment.process.pid).children(recursive=True)]
    assert any("EngineCore" in name for name in names)
    assert not any("TelemetryAgent" in name for name in names)


def test_clients_that_go_away_harm_nobody(deployment: Deployment) -> None:
    for _ in range(16):
        body = {"question": QUESTIONS[1], "stream": True}
        with httpx.stream("POST", f"{deployment.url}/v1/answers", json=body, timeout=60) as reply:
            next(reply.iter_bytes())
    *_, answer = ask_http(deployment.url, QUESTIONS[0], stream=False)
    assert isinstance(answer, Answer)


def test_an_engine_that_does_not_start_is_one_line_in_bounded_time(
    session_store: Store, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Serve by itself would try for ever."""
    store = Store.open(tmp_path_factory.mktemp("broken") / "store")
    store.path("models").symlink_to(session_store.path("models"), target_is_directory=True)
    shipped = (MODELS / "smollm2-135m-grounded.toml").read_text(encoding="utf-8")
    model = tmp_path / "huge.toml"
    model.write_text(shipped.replace("max_model_len = 2048", "max_model_len = 999999"), encoding="utf-8")
    releases.promote(store, make_release(store, tmp_path / "a", model=str(model)).digest, actor="test")
    command = [sys.executable, "-c", SERVE, str(store.root), str(free_port()), "300"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400, check=False)
    assert time.monotonic() - started < 290
    assert done.returncode == 6
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("the engine does not start: ")
    assert "max_model_len" in last
