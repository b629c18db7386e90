"""An application that goldgate knows nothing about, over real HTTP: a failure is a failure and never an answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from goldgate.evals.system import HttpSystem, answer_http
from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.schema import Answer, Failure, Message, Principal, Query
from tests.evals.samples import case

Handler = Callable[["Application"], None]


class Application(BaseHTTPRequestHandler):
    """A foreign application; each test plugs in how it replies."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_POST(self) -> None:
        """Record what came and let the test reply."""
        length = int(self.headers.get("Content-Length", 0))
        self.received = json.loads(self.rfile.read(length) or b"null")
        self.server.seen.append((dict(self.headers), self.received))  # type: ignore[attr-defined]
        self.server.behaviour(self)  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        """As POST."""
        self.do_POST()

    def reply(self, body: Any, status: int = 200, **headers: str) -> None:
        """Send JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Foreign:
    """The running application, its system file and what it was asked."""

    def __init__(self, server: ThreadingHTTPServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.slept: list[float] = []
        server.seen = []  # type: ignore[attr-defined]

    @property
    def seen(self) -> list[tuple[dict[str, str], Any]]:
        return self.server.seen  # type: ignore[attr-defined, no-any-return]

    def behaves(self, behaviour: Handler) -> None:
        self.server.behaviour = behaviour  # type: ignore[attr-defined]

    def file(self, extra: str = "", reply: str = 'answer = "$.result.text"', body: str = "") -> Path:
        path = self.folder / "system.toml"
        host, port = self.server.server_address[:2]
        body = body or 'body = { q = "{question}" }'
        path.write_text(f'url = "http://{host!s}:{port}/ask"\n{body}\nretry_wait_s = 0.25\n{extra}\n[reply]\n{reply}\n')
        return path

    def ask(self, *queries: Query, **options: str) -> list[Answer | Failure]:
        system = HttpSystem.load(self.file(**options))
        system._sleep = self.slept.append
        return system.answer_many(list(queries) or [QUERY])


QUERY = Query(question='What is "5 {tenant}"?', principal=Principal())


@contextmanager
def running(folder: Path) -> Iterator[Foreign]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Application)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up is no news
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Foreign(server, folder)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Foreign]:
    with running(tmp_path) as application:
        yield application


def failure(results: list[Answer | Failure]) -> Failure:
    (result,) = results
    assert isinstance(result, Failure), result
    return result


def answer(results: list[Answer | Failure]) -> Answer:
    (result,) = results
    assert isinstance(result, Answer), result
    return result


# ---------------------------------------------------------------- answers


def test_a_foreign_shape_without_contexts(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({"result": {"text": f" to {app.received['q']} "}}))
    said = answer(foreign.ask())
    assert said.text == f"to {QUERY.question}"
    assert said.passages is None
    assert said.abstained is None
    assert said.timings.total_ms is not None


def test_contexts_documents_scores_flag_and_release(foreign: Foreign) -> None:
    body = {
        "a": "Yes.",
        "s": [{"t": "one", "d": "a.md", "x": 0.9}, {"t": "two", "d": "b.md", "x": 1}],
        "n": True,
        "v": 7,
    }
    foreign.behaves(lambda app: app.reply(body))
    reply = (
        'answer = "$.a"\ncontexts = "$.s[*].t"\ndocuments = "$.s[*].d"\nscores = "$.s[*].x"\n'
        'abstained = "$.n"\nrelease = "$.v"'
    )
    said = answer(foreign.ask(reply=reply))
    assert [(p.document, p.text, p.score) for p in said.passages or ()] == [("a.md", "one", 0.9), ("b.md", "two", 1.0)]
    assert (said.abstained, said.release) == (True, "7")


def test_retrieved_nothing_is_not_the_same_as_not_told(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({"a": "Yes.", "s": []}))
    assert answer(foreign.ask(reply='answer = "$.a"\ncontexts = "$.s[*].t"')).passages == ()


def test_conversation_and_principal_are_sent(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({"result": {"text": "ok"}}))
    query = Query(
        question="And now?", history=(Message(role="user", content="Hi"), Message(role="assistant", content="Ho")),
        principal=Principal(tenant="acme", labels=("ops",)),
    )  # fmt: skip
    body = 'body = { messages = "{messages}", who = "tenant:{tenant}", labels = "{labels}", k = 3 }'
    answer(foreign.ask(query, body=body))
    assert foreign.seen[0][1] == {
        "messages": [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "And now?"},
        ],
        "who": "tenant:acme", "labels": ["ops"], "k": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(question="q", principal=Principal(tenant="acme")), "tenant acme cannot ask"),
        (Query(question="q", principal=Principal(labels=("ops",))), "access labels cannot be sent"),
        (Query(question="q", history=(Message(role="user", content="x"),), principal=Principal()), "conversation"),
    ],
)
def test_a_query_is_never_sent_without_its_principal_or_history(foreign: Foreign, query: Query, message: str) -> None:
    foreign.behaves(lambda app: app.reply({"result": {"text": "ok"}}))
    assert message in failure(foreign.ask(query)).message
    assert foreign.seen == []


def test_secrets_come_from_the_environment_and_stay_out_of_messages(
    foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APP_TOKEN", "s3cret")
    foreign.behaves(lambda app: app.reply({"error": "denied"}, 403))
    broken = failure(foreign.ask(extra='headers_env = { Authorization = "APP_TOKEN" }'))
    assert foreign.seen[0][0]["Authorization"] == "s3cret"
    assert broken.kind == "http"
    assert "s3cret" not in broken.message


def test_answers_keep_their_order_in_parallel(foreign: Foreign) -> None:
    def slow(app: Application) -> None:
        time.sleep(0.05 if app.received["q"] == "q0" else 0)
        app.reply({"result": {"text": app.received["q"]}})

    foreign.behaves(slow)
    queries = [Query(question=f"q{i}", principal=Principal()) for i in range(12)]
    results = foreign.ask(*queries, extra="parallel = 4")
    assert [r.text for r in results if isinstance(r, Answer)] == [q.question for q in queries]


# ---------------------------------------------------------------- failures


def test_5xx_is_retried_a_bounded_number_of_times(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({"result": {"text": "looks like an answer"}}, 503))
    broken = failure(foreign.ask())
    assert (broken.kind, len(foreign.seen)) == ("http", 3)
    assert "503" in broken.message
    assert foreign.slept == [0.25, 0.5]


def test_a_5xx_that_passes_is_answered(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({"result": {"text": "ok"}}, 500 if len(foreign.seen) == 1 else 200))
    assert answer(foreign.ask()).text == "ok"


def test_429_obeys_retry_after(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({}, 429, Retry_After="7"))
    assert failure(foreign.ask(extra="retries = 1")).kind == "rate_limited"
    assert (foreign.slept, len(foreign.seen)) == ([7.0], 2)


def test_429_with_a_wait_beyond_the_limit_is_not_waited_for(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({}, 429, Retry_After="86400"))
    assert failure(foreign.ask()).kind == "rate_limited"
    assert (foreign.slept, len(foreign.seen)) == ([], 1)


def test_429_with_a_date_or_nonsense(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({}, 429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"))
    failure(foreign.ask(extra="retries = 1"))
    assert foreign.slept == [0.0]
    foreign.behaves(lambda app: app.reply({}, 429, Retry_After="soon"))
    failure(foreign.ask(extra="retries = 1"))
    assert foreign.slept == [0.0, 0.25]


@pytest.mark.parametrize("status", [400, 401, 404, 302, 204])
def test_other_statuses_are_failures_without_a_retry(foreign: Foreign, status: int) -> None:
    foreign.behaves(lambda app: app.reply(b"", status, Location="/elsewhere"))
    assert failure(foreign.ask()).kind == "http"
    assert len(foreign.seen) == 1


def test_time_out(foreign: Foreign) -> None:
    release = threading.Event()
    foreign.behaves(lambda app: release.wait(20) and None)
    broken = failure(foreign.ask(extra="timeout_s = 0.2\nretries = 1"))
    release.set()
    assert (broken.kind, len(foreign.seen)) == ("timeout", 2)


def test_a_reply_that_drips_is_a_time_out(foreign: Foreign) -> None:
    def drip(app: Application) -> None:
        app.send_response(200)
        app.send_header("Content-Length", "100000")
        app.end_headers()
        try:
            for _ in range(60):
                app.wfile.write(b" ")
                app.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass
        app.close_connection = True  # a client that only watches the pauses sees a broken connection

    foreign.behaves(drip)
    assert failure(foreign.ask(extra="timeout_s = 0.4\nretries = 0")).kind == "timeout"


def test_connection_refused(foreign: Foreign) -> None:
    with running(foreign.folder) as gone:
        path = gone.file()
    system = HttpSystem.load(path)
    system._sleep = foreign.slept.append
    assert failure(system.answer_many([QUERY])).kind == "unreachable"


def test_a_connection_that_breaks_off(foreign: Foreign) -> None:
    def cut(app: Application) -> None:
        app.send_response(200)
        app.send_header("Content-Length", "500")
        app.end_headers()
        app.wfile.write(b'{"result"')
        app.close_connection = True

    foreign.behaves(cut)
    assert failure(foreign.ask()).kind == "unreachable"


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_answer_is_a_failure(foreign: Foreign, text: str | None) -> None:
    foreign.behaves(lambda app: app.reply({"result": {"text": text}}))
    assert failure(foreign.ask()).kind == "empty"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>sorry</html>",
        b"\xff\xfe",
        b"[" * 100_000,
        {"result": {}},
        {"result": {"text": 5}},
        {"result": 1},
        [],
    ],
)
def test_a_malformed_reply(foreign: Foreign, body: Any) -> None:
    foreign.behaves(lambda app: app.reply(body))
    assert failure(foreign.ask()).kind == "malformed"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"a": "x", "s": [{"t": 5}]}, "something else than texts"),
        ({"a": "x", "s": [{"t": "one"}, {"t": "two", "d": "b"}]}, "2 contexts, but 1 documents"),
        ({"a": "x", "s": [], "n": "yes"}, "expected true or false"),
    ],
)
def test_malformed_parts(foreign: Foreign, body: Any, message: str) -> None:
    foreign.behaves(lambda app: app.reply(body))
    reply = 'answer = "$.a"\ncontexts = "$.s[*].t"\ndocuments = "$.s[*].d"\nabstained = "$.n"'
    broken = failure(foreign.ask(reply=reply))
    assert broken.kind == "malformed"
    assert message in broken.message


def test_an_endless_reply_is_cut(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply(b" " * 3_000_000))
    assert failure(foreign.ask(extra="max_reply_bytes = 100000")).kind == "malformed"


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": "timeot_s = 5"}, "system.toml: timeot_s is unknown; did you mean timeout_s"),
        ({"body": 'body = { q = "{qestion}" }'}, "{qestion} is unknown; did you mean {question}"),
        ({"body": 'body = { q = "hello" }'}, "body never names the question"),
        ({"reply": 'answer = "$.["'}, "reply.answer: '$.[' is not a JSONPath"),
        ({"reply": 'contexts = "$.a"'}, "reply.answer: Field required"),
        ({"extra": 'headers_env = { Authorization = "GOLDGATE_NO_SUCH" }'}, "GOLDGATE_NO_SUCH is not set"),
        ({"extra": 'url_env = "X"'}, "needs url or url_env"),
        ({"extra": "retries = -1"}, "retries"),
    ],
)
def test_a_bad_system_file_is_one_line(foreign: Foreign, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        HttpSystem.load(foreign.file(**options))
    assert message in str(caught.value)
    assert "system.toml" in str(caught.value)


def test_answers_of_two_runs_never_count_as_identical(foreign: Foreign) -> None:
    foreign.behaves(lambda app: app.reply({"result": {"text": "same"}}, 500 if app.received["q"] == "boom" else 200))
    cases = [case("c1", answerable=True), case("c2", question="boom", answerable=True)]
    system = HttpSystem.load(foreign.file(extra="retries = 0"))
    first, second = answer_http(cases, system), answer_http(cases, system)
    assert [line.case for line in first] == ["c1", "c2"]
    assert first[0].answer is not None
    assert first[1].failure is not None
    assert len({line.key for line in (*first, *second)}) == 4
