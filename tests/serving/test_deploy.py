"""The client side against a real HTTP server that behaves well, or does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.schema import Answer, Principal
from goldgate.serving.api import answer_reply
from goldgate.serving.deploy import ask_http, health, wait_healthy
from tests.serving.serve_fixture import free_port

RELEASE, OTHER = "a" * 64, "b" * 64
ANSWER = Answer(text="Port 8000.", release=RELEASE)
Canned = tuple[int, bytes]


def said(body: object, status: int = 200) -> Canned:
    return status, json.dumps(body).encode()


def events(*bodies: object) -> Canned:
    return 200, "".join(f"data: {json.dumps(body)}\n\n" for body in bodies).encode()


@contextmanager
def server(answer: Callable[[int, dict[str, object]], Canned]) -> Iterator[str]:
    """Serve what `answer` returns for (number of the request, its body)."""
    counts = iter(range(10_000))

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            status, data = answer(next(counts), json.loads(self.rfile.read(length) or b"{}"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = reply  # noqa: N815 - the base class names them so

        def log_message(self, *_: object) -> None:
            return

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def ok(release: str = RELEASE, **more: str) -> Canned:
    return said({"status": "ok", "release": release, **more})


# ---------------------------------------------------------------- health


def test_it_waits_until_the_release_is_there() -> None:
    script = [
        said({"status": "starting", "reason": "the engine is starting"}, 503),
        (404, b"no route"),
        ok(OTHER),
        ok(),
    ]
    told: list[str] = []
    with server(lambda number, _: script[min(number, 3)]) as url:
        body = wait_healthy(url, RELEASE, timeout_s=30, progress=lambda what, done, total: told.append(what))
    assert body["release"] == RELEASE
    assert told[0] == "the engine is starting"
    assert told[-1] == f"serving {OTHER[:12]}"


def test_any_release_will_do_when_none_is_named() -> None:
    with server(lambda *_: ok(OTHER)) as url:
        assert wait_healthy(url, timeout_s=5)["release"] == OTHER


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (ok(OTHER), EnvironmentFailure, "serving bbbbbbbbbbbb"),
        (ok(OTHER, restart_needed=RELEASE), Refused, "restart goldgate serve"),
        (ok(OTHER, switch_failed=f"{RELEASE[:12]}: no memory"), EnvironmentFailure, "no memory"),
        (ok(OTHER, switch_failed="cccccccccccc: an older trouble"), EnvironmentFailure, "after 0.1 s"),
        ((200, b"<html>"), EnvironmentFailure, "not a goldgate deployment"),
        ((200, b'["status"]'), EnvironmentFailure, "not a goldgate deployment"),
    ],
)
def test_why_it_is_not_served(answer: Canned, error: type[Exception], words: str) -> None:
    with server(lambda *_: answer) as url, pytest.raises(error, match=words):
        wait_healthy(url, RELEASE, timeout_s=0.1)


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EnvironmentFailure, match="cannot be reached"):
        health(url)
    with pytest.raises(EnvironmentFailure, match="cannot be reached"):
        wait_healthy(url, timeout_s=0.1)
    with pytest.raises(EnvironmentFailure, match="did not answer"):
        list(ask_http(url, "Which port?"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", ""])
def test_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        health(url)


# ---------------------------------------------------------------- questions


def test_pieces_then_the_answer() -> None:
    asked: list[dict[str, object]] = []

    def answer(_: int, body: dict[str, object]) -> Canned:
        asked.append(body)
        return (
            events({"piece": "Port "}, {"piece": "8000."}, answer_reply(ANSWER))
            if body["stream"]
            else said(answer_reply(ANSWER))
        )

    with server(answer) as url:
        assert list(ask_http(url, "Which port?")) == ["Port ", "8000.", ANSWER]
        assert list(ask_http(url + "/", "Which port?", Principal(tenant="acme"), stream=False)) == [
            "Port 8000.",
            ANSWER,
        ]
    assert asked[0] == {"question": "Which port?", "stream": True}
    assert asked[1]["principal"] == {"tenant": "acme", "labels": []}


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (said({"error": {"message": "the question is too long", "type": "x"}}, 422), UsageError, "too long"),
        (said({"error": {"message": "not yours", "type": "x"}}, 403), UsageError, "not yours"),
        (said({"error": {"message": "not ready", "type": "x"}}, 503), EnvironmentFailure, "not ready"),
        ((500, b"Internal Server Error"), EnvironmentFailure, "HTTP 500"),
        ((502, b"[]"), EnvironmentFailure, "HTTP 502"),
        (
            events({"piece": "Port "}, {"error": {"message": "the engine died", "type": "crash"}}),
            EnvironmentFailure,
            "died",
        ),
        (events({"piece": "Port "}), EnvironmentFailure, "in the middle of an answer"),
        ((200, b""), EnvironmentFailure, "in the middle of an answer"),
        ((200, b"data: nonsense\n\n"), EnvironmentFailure, "another format"),
        (events({"answer": ""}), EnvironmentFailure, "another format"),
    ],
)
def test_no_answer_is_an_error_and_never_a_short_answer(answer: Canned, error: type[Exception], words: str) -> None:
    with server(lambda *_: answer) as url, pytest.raises(error, match=words):
        list(ask_http(url, "Which port?"))
