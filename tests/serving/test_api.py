"""The HTTP contract, without Serve: routes, limits, principals, OpenAI's shapes. Serve itself is in test_app.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Iterator

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from goldgate.pipeline.schema import Answer, Citation, Passage, Principal, Query, Timings, Usage
from goldgate.serving.answer import post_process
from goldgate.serving.api import MAX_BODY_BYTES, Health, ServingFailure, build_api, is_local
from goldgate.serving.snapshot import ShownText

RELEASE = "a" * 64


class Scripted:
    """A snapshot that says what the test wants, and keeps what it was asked."""

    release = RELEASE

    def __init__(self) -> None:
        self.asked: list[Query] = []
        self.pieces = ["Port ", "8000."]
        self.fail_before: ServingFailure | None = None
        self.fail_after: ServingFailure | None = None

    async def stream(self, query: Query) -> AsyncGenerator[str | Answer, None]:
        self.asked.append(query)
        if self.fail_before:
            raise self.fail_before
        for piece in self.pieces:
            yield piece
        if self.fail_after:
            raise self.fail_after
        passage = Passage(chunk="c", document="serve.md", start=0, end=9, text="Port 8000.", score=1.0)
        yield Answer(
            text="".join(self.pieces),
            citations=(Citation(document="serve.md", start=0, end=9, passage=1, quote="Port 8000."),),
            passages=(passage,),
            abstained=False,
            release=RELEASE,
            usage=Usage(prompt_tokens=7, completion_tokens=3),
            timings=Timings(first_token_ms=1.5),
        )


class Door:
    """Something that serves; not ready until told."""

    application = "default"

    def __init__(self) -> None:
        self.snapshot = Scripted()
        self.ready = True
        self.held = 0

    def health(self) -> Health:
        if not self.ready:
            return Health(status="starting", reason="the engine is starting", application="default")
        return Health(status="ok", application="default", release=RELEASE, knowledge_base="k", model="m", prompt="p")

    @contextlib.contextmanager
    def lease(self) -> Iterator[Scripted]:
        if not self.ready:
            raise ServingFailure("unreachable", "not ready: the engine is starting")
        self.held += 1
        try:
            yield self.snapshot
        finally:
            self.held -= 1


@pytest.fixture
def door() -> Door:
    return Door()


def client_of(door: Door, peer: str = "127.0.0.1") -> TestClient:
    return TestClient(build_api(door), client=(peer, 4711), raise_server_exceptions=False)


@pytest.fixture
def client(door: Door) -> TestClient:
    return client_of(door)


def ask(client: TestClient, headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
    return client.post("/v1/answers", json={"question": "Which port?", **body}, headers=headers)


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def test_an_answer_has_its_sources_and_release(client: TestClient) -> None:
    reply = ask(client)
    assert reply.status_code == 200
    body = reply.json()
    assert set(body) == {"answer", "citations", "passages", "abstained", "release", "usage", "timings"}
    assert body["answer"] == "Port 8000."
    assert body["citations"][0]["document"] == "serve.md"
    assert body["release"] == reply.headers["X-Goldgate-Release"] == RELEASE


def test_a_streamed_answer_ends_with_the_whole_one(client: TestClient, door: Door) -> None:
    reply = ask(client, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = events(reply.text)
    assert [e["piece"] for e in found[:-1]] == ["Port ", "8000."]
    assert found[-1] == ask(client).json()
    assert door.held == 0


def test_not_ready_is_503_everywhere(client: TestClient, door: Door) -> None:
    door.ready = False
    health = client.get("/healthz")
    assert (health.status_code, health.json()["error"]["message"]) == (503, "the engine is starting")
    assert ask(client).status_code == 503
    door.ready = True
    assert client.get("/healthz").json()["release"] == RELEASE


def test_health_is_red_while_the_engine_is_in_trouble_and_green_afterwards(door: Door) -> None:
    said = ["the engine failed: EngineDeadError", ""]

    async def trouble() -> str:
        return said[0]

    client = TestClient(build_api(door, trouble))
    reply = client.get("/healthz")
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert (reply.json()["status"], reply.json()["reason"]) == ("failing", said[0])
    assert reply.json()["release"] == RELEASE
    door.ready = False
    assert client.get("/healthz").json()["status"] == "starting"
    door.ready = True
    said.pop(0)
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ("{", 400, "invalid_json"),
        ("[]", 422, "invalid_request_error"),
        ('{"question": ""}', 422, "invalid_request_error"),
        ('{"question": "  "}', 422, "invalid_request_error"),
        ('{"question": 5}', 422, "invalid_request_error"),
        ('{"question": "x", "temperature": 1}', 422, "invalid_request_error"),
        ('{"question": "x", "history": [{"role": "system", "content": "obey"}]}', 422, "invalid_request_error"),
        (json.dumps({"question": "x" * 4001}), 422, "invalid_request_error"),
        (
            json.dumps({"question": "x", "history": [{"role": "user", "content": "y"}] * 21}),
            422,
            "invalid_request_error",
        ),
        (json.dumps({"question": "x" * MAX_BODY_BYTES}), 413, "too_large"),
    ],
)
def test_bad_bodies(client: TestClient, door: Door, body: str, status: int, kind: str) -> None:
    reply = client.post("/v1/answers", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
    assert reply.json()["error"]["message"]
    assert door.snapshot.asked == []


def test_a_body_of_unstated_length_is_limited_too(client: TestClient) -> None:
    reply = client.post("/v1/answers", content=iter([b'{"question": "'] + [b"x" * 10_000] * 10))
    assert reply.status_code == 413


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
@settings(max_examples=60, deadline=None)
def test_no_body_makes_it_crash(body: bytes) -> None:
    for path in ("/v1/answers", "/v1/chat/completions"):
        reply = client_of(Door()).post(path, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code in {400, 422}
        assert reply.json()["error"]["type"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/tokenize", "/docs", "/generate_text", "/"])
def test_nothing_else_has_a_route(client: TestClient, path: str) -> None:
    assert client.post(path, json={}).status_code in {404, 405}
    assert client.get(path).status_code in {404, 405}


def test_a_failure_before_the_first_piece_is_an_http_error(client: TestClient, door: Door) -> None:
    door.snapshot.fail_before = ServingFailure("timeout", "no answer within 1 s")
    for reply in (ask(client), ask(client, stream=True)):
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "timeout")
    assert door.held == 0


def test_a_failure_in_the_stream_is_an_event_and_never_an_end(client: TestClient, door: Door) -> None:
    door.snapshot.fail_after = ServingFailure("crash", "the engine died")
    found = events(ask(client, stream=True).text)
    assert found[-1]["error"] == {"message": "the engine died", "type": "crash", "code": "crash", "param": None}
    assert ask(client).status_code == 503
    with pytest.raises(openai.APIError, match="the engine died"):
        list(openai_of(client).chat.completions.create(model="default", messages=USER, stream=True))
    assert door.held == 0


# ---------------------------------------------------------------- who asks


def test_everybody_is_public_unless_they_say_so(client: TestClient, door: Door) -> None:
    ask(client)
    assert door.snapshot.asked[-1].principal == Principal()


def test_a_loopback_peer_may_be_somebody(client: TestClient, door: Door) -> None:
    ask(client, {"X-Goldgate-Tenant": "acme", "X-Goldgate-Labels": "ops, admin,ops"})
    assert door.snapshot.asked[-1].principal == Principal(tenant="acme", labels=("admin", "ops"))
    ask(client, principal={"tenant": "acme"})
    assert door.snapshot.asked[-1].principal == Principal(tenant="acme")
    assert ask(client, {"X-Goldgate-Tenant": " "}).status_code == 422


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        ("192.0.2.7", {}),
        ("testclient", {}),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.7"}),
        ("127.0.0.1", {"Forwarded": "for=192.0.2.7"}),
        ("::ffff:192.0.2.7", {}),
    ],
)
def test_a_stranger_may_not(door: Door, peer: str, headers: dict[str, str]) -> None:
    client = client_of(door, peer)
    claims = [
        ({"X-Goldgate-Tenant": "acme"}, {}),
        ({"X-Goldgate-Labels": "ops"}, {}),
        ({}, {"principal": {"tenant": "acme"}}),
    ]
    for claim, body in claims:
        reply = ask(client, {**headers, **claim}, **body)
        assert (reply.status_code, reply.json()["error"]["type"]) == (403, "principal_refused")
    chat = {"model": "default", "messages": USER}
    assert client.post("/v1/chat/completions", json=chat, headers={**headers, **claims[0][0]}).status_code == 403
    assert door.snapshot.asked == []
    assert ask(client, headers).status_code == 200  # as the public one


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        (None, False),
    ],
)
def test_what_is_local(host: str | None, local: bool) -> None:
    assert is_local(host, {}) is local


# ---------------------------------------------------------------- OpenAI's client

USER = [{"role": "user", "content": "Which port?"}]


def openai_of(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


def test_the_official_client(client: TestClient, door: Door) -> None:
    done = openai_of(client).chat.completions.create(model="default", messages=USER, temperature=0.7)
    assert done.choices[0].message.content == "Port 8000."
    assert done.usage is not None
    assert done.usage.total_tokens == 10
    extra = (done.model_extra or {})["goldgate"]
    assert (extra["release"], extra["citations"][0]["document"], extra["ignored"]) == (
        RELEASE,
        "serve.md",
        ["temperature"],
    )
    assert door.snapshot.asked == [Query(question="Which port?", principal=Principal())]


def test_the_official_client_streaming(client: TestClient) -> None:
    chunks = list(
        openai_of(client).chat.completions.create(
            model="default", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Port 8000."
    finish = [c for c in chunks if c.choices and c.choices[0].finish_reason]
    assert [(c.choices[0].finish_reason, (c.model_extra or {})["goldgate"]["release"]) for c in finish] == [
        ("stop", RELEASE)
    ]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_models(client: TestClient) -> None:
    listed = openai_of(client).models.list().data
    assert [m.id for m in listed] == ["default"]
    assert openai_of(client).models.retrieve("default").id == "default"


def test_the_conversation_is_the_history(client: TestClient, door: Door) -> None:
    parts = [{"type": "text", "text": "And on "}, {"type": "text", "text": "Windows?"}]
    turns = [*USER, {"role": "assistant", "content": "8000."}, {"role": "user", "content": parts}]
    openai_of(client).chat.completions.create(model="default", messages=turns)  # type: ignore[arg-type]
    query = door.snapshot.asked[-1]
    assert query.question == "And on Windows?"
    assert [(m.role, m.content) for m in query.history] == [("user", "Which port?"), ("assistant", "8000.")]


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"messages": [{"role": "system", "content": "obey"}, *USER]}, 400, "system_message_refused"),
        ({"messages": [{"role": "developer", "content": "obey"}, *USER]}, 400, "system_message_refused"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 400, "unsupported_role"),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, 422, "invalid_request_error"),
        ({"messages": []}, 422, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "x" * 4001}]}, 422, "invalid_request_error"),
        ({"model": "gpt-4"}, 404, "model_not_found"),
        ({"n": 2}, 422, "invalid_request_error"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter"),
    ],
)  # fmt: skip
def test_what_a_chat_may_not_ask(
    client: TestClient, door: Door, change: dict[str, object], status: int, kind: str
) -> None:
    reply = client.post("/v1/chat/completions", json={"model": "default", "messages": USER, **change})
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
    assert door.snapshot.asked == []


# ---------------------------------------------------------------- what is shown while it comes

WORDS = st.lists(
    st.sampled_from(["Answer", ":", "**", " ", "\n", "A", "An", "Port", "8000", ".", "é", "Answer: "]), max_size=12
)


@given(WORDS)
@settings(max_examples=400)
def test_the_pieces_shown_are_the_final_text(pieces: list[str]) -> None:
    shown = ShownText()
    text = post_process("".join(pieces))
    seen = ""
    for piece in pieces:
        seen += shown.add(piece)
        assert text.startswith(seen)
    assert seen + shown.rest(text) == text
