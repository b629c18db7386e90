"""DeepEval's LLM metrics against a loopback judge: what the judge did not do properly is not measured."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from goldgate.evals.llm_judge import llm_scorer
from goldgate.evals.scores import CaseContext, compute
from goldgate.pipeline.schema import Answer, Score
from tests.evals.samples import GUIDE, case, document, passage

DOC = document("gate.md", GUIDE)
Replies = Callable[[str], Any]


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint whose replies the test decides by what the prompt asks for."""

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_POST(self) -> None:
        """Reply with the test's JSON, or with a status."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        said = self.server.replies(body["messages"][0]["content"])  # type: ignore[attr-defined]
        status, content = (
            (said, "") if isinstance(said, int) else (200, said if isinstance(said, str) else json.dumps(said))
        )
        data = json.dumps({
            "id": "1", "object": "chat.completion", "created": 0, "model": "stub",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        }).encode()  # fmt: skip
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("x-should-retry", "false")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    running.daemon_threads = True
    running.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def measure(server: ThreadingHTTPServer, name: str, replies: Replies, text: str = "FAIL is 1. PASS is 0.") -> Score:
    server.replies = replies  # type: ignore[attr-defined]
    llm = llm_scorer(f"http://127.0.0.1:{server.server_address[1]}/v1", "stub")
    answer = Answer(text=text, passages=(passage(DOC, "PASS is 0 and FAIL is 1."), passage(DOC, "A bug is 70.")))
    score = compute(name, CaseContext(case("c1", answerable=True), answer, documents={"gate.md": DOC}, llm=llm))
    assert score is not None
    return score


def faithful(claims: list[str], verdicts: list[str]) -> Replies:
    def reply(prompt: str) -> Any:
        if "'verdicts'" in prompt or '"verdicts"' in prompt:
            return {"verdicts": [{"verdict": verdict, "reason": "r"} for verdict in verdicts]}
        return {"claims": claims, "truths": ["FAIL is 1"]}  # each prompt takes its own

    return reply


def relevant(statements: list[str], verdicts: list[str]) -> Replies:
    def reply(prompt: str) -> Any:
        if "'verdicts'" in prompt or '"verdicts"' in prompt:
            return {"verdicts": [{"verdict": v, "reason": "r", "statement": "s"} for v in verdicts]}
        return {"statements": statements}

    return reply


def test_scores_and_key(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDGATE_JUDGE_KEY", "k3y")
    assert measure(server, "llm_faithfulness", faithful(["a", "b"], ["yes", "no"])).value == 0.5
    assert measure(server, "llm_answer_relevancy", relevant(["a", "b"], ["yes", "yes"])).value == 1
    assert measure(server, "llm_contextual_relevancy", relevant([], ["yes", "no"])).value == 0.5
    seen = server.seen  # type: ignore[attr-defined]
    assert {key for key, _ in seen} == {"Bearer k3y"}
    assert {body["temperature"] for _, body in seen} == {0}


def test_an_ambiguous_claim_is_not_faithful(server: ThreadingHTTPServer) -> None:
    assert measure(server, "llm_faithfulness", faithful(["a", "b"], ["yes", "borderline"])).value == 0.5


@pytest.mark.parametrize(
    ("name", "replies", "reason"),
    [
        ("llm_faithfulness", faithful([], []), "no claims"),
        ("llm_faithfulness", faithful(["a", "b"], ["yes"]), "1 verdicts on 2 claims"),
        ("llm_faithfulness", faithful(["a"], ["yes", "yes"]), "2 verdicts on 1 claims"),
        ("llm_faithfulness", faithful(["a"], ["maybe"]), "not Verdicts"),
        ("llm_faithfulness", lambda _: "I would rather not.", "the judge's reply is not"),
        ("llm_faithfulness", lambda _: "", "the judge's reply is not"),
        ("llm_answer_relevancy", relevant([], []), "no statements"),
        ("llm_answer_relevancy", relevant(["a", "b"], ["yes"]), "1 verdicts on 2 statements"),
        ("llm_contextual_relevancy", relevant([], []), "verdicts on 0 of 2 passages"),
        ("llm_contextual_relevancy", lambda _: 500, "HTTP 500"),
        ("llm_faithfulness", lambda _: 429, "too many requests"),
        ("llm_answer_relevancy", lambda _: 401, "HTTP 401"),
    ],
)
def test_what_the_judge_did_not_do_properly_is_not_measured(
    server: ThreadingHTTPServer, name: str, replies: Replies, reason: str
) -> None:
    score = measure(server, name, replies)
    assert score.value is None
    assert reason in score.reason


def test_a_dead_judge_is_not_measured(server: ThreadingHTTPServer) -> None:
    llm = llm_scorer("http://127.0.0.1:9/v1", "stub")
    llm_case = CaseContext(case("c1", answerable=True), Answer(text="FAIL is 1.", passages=()), llm=llm)
    score = compute("llm_answer_relevancy", llm_case)
    assert score is not None
    assert score.value is None
    assert score.failure is not None
    assert score.failure.kind == "unreachable"


def test_without_an_endpoint_it_is_not_measured() -> None:
    score = compute(
        "llm_faithfulness", CaseContext(case("c1", answerable=True), Answer(text="FAIL is 1.", passages=()))
    )
    assert score is not None
    assert "no judge endpoint" in score.reason
