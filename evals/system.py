"""gold questions -> answers of an application that goldgate neither built nor serves, over HTTP.

A TOML file says how to ask it and where its reply keeps what:

    url = "http://127.0.0.1:8000/ask"          # or url_env = "APP_URL"
    headers_env = { Authorization = "APP_TOKEN" }   # header -> environment variable; never a secret in the file
    body = { question = "{question}", messages = "{messages}" }
    [reply]
    answer = "$.answer"
    contexts = "$.sources[*].text"             # left out: retrieval is not measured, by name

A failure is data: 5xx, 429, a time-out, an empty or malformed reply is a Failure and never a score.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import jsonpath
from pydantic import Field, JsonValue

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.interrupts import map_in_threads
from goldgate.pipeline.params import load_toml
from goldgate.pipeline.schema import (
    PUBLIC,
    Answer,
    CaseAnswer,
    Failure,
    FailureKind,
    GoldCase,
    Passage,
    Query,
    Record,
    Timings,
)
from goldgate.pipeline.store import digest_file, digest_json

Progress = Callable[[str, int, int], None]
PLACEHOLDERS = ("question", "messages", "history", "tenant", "labels")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class ReplyPaths(Record):
    """Where the JSON reply keeps what, as JSONPath."""

    answer: str = Field(description="The answer's text; must match exactly one string.")
    contexts: str | None = Field(None, description="Texts of the passages, best first. Left out: not told.")
    documents: str | None = Field(None, description="Document ids of the passages, one for each context.")
    scores: str | None = Field(None, description="Scores of the passages, one for each context.")
    abstained: str | None = Field(None, description="The application's own flag that it refused.")
    release: str | None = Field(None, description="The application's version.")


class HttpSystemFile(Record):
    """The TOML file of an application under test."""

    url: str = Field("", description="Where to ask; or url_env.")
    url_env: str = Field("", description="Environment variable that holds the URL.")
    method: Literal["POST", "GET"] = Field("POST", description="GET sends the body as query parameters.")
    headers: dict[str, str] = Field({}, description="Headers that are no secret.")
    headers_env: dict[str, str] = Field({}, description="Header -> environment variable that holds its value.")
    body: dict[str, JsonValue] = Field(
        description="JSON body with {question}, {messages}, {history}, {tenant}, {labels}."
    )
    reply: ReplyPaths
    timeout_s: float = Field(60.0, gt=0, le=3600, description="Longest wait for one reply, from first to last byte.")
    retries: int = Field(2, ge=0, le=10, description="Further tries after 429, 5xx, a time-out or a lost connection.")
    retry_wait_s: float = Field(1.0, ge=0, le=60, description="Wait before a retry, doubled each time.")
    retry_after_max_s: float = Field(30.0, ge=0, le=600, description="Longest Retry-After that is obeyed.")
    parallel: int = Field(1, ge=1, le=64, description="Questions asked at the same time.")
    max_reply_bytes: int = Field(5_000_000, gt=0, description="A longer reply is malformed.")


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _TooLate(Exception):
    """The reply was not complete in time."""


class HttpSystem:
    """An application behind a URL. `answer_many` never raises for what the application does."""

    kind = "http"

    def __init__(self, file: HttpSystemFile, digest: str, sleep: Callable[[float], None] = time.sleep) -> None:
        """Check the file's paths, template and environment. Raises UsageError; asks nothing yet."""
        self._file = file
        self.digest = digest
        self._sleep = sleep
        self._url = _from_environment(file.url, file.url_env)
        self._headers = dict(file.headers) | {name: _secret(name, env) for name, env in file.headers_env.items()}
        self._paths = {name: _compile(name, path) for name, path in file.reply.model_dump().items() if path}
        used = _placeholders(file.body)
        if not used & {"question", "messages"}:
            raise UsageError("body never names the question", "{question} or {messages} in a value")
        self._tells_tenant = "tenant" in used
        self._tells_labels = "labels" in used
        self._tells_history = bool(used & {"messages", "history"})

    @classmethod
    def load(cls, path: Path) -> HttpSystem:
        """Read the TOML file at `path`. Raises UsageError for an unknown field, placeholder, JSONPath or variable."""
        try:
            return cls(load_toml(path, HttpSystemFile), digest_file(path))
        except UsageError as error:
            if str(path) in error.what:
                raise
            raise UsageError(f"{path}: {error.what}", error.expected, error.do) from None

    def answer_many(self, queries: Sequence[Query], progress: Progress | None = None) -> list[Answer | Failure]:
        """Ask every query, in order; one Answer or Failure each."""
        results: list[Answer | Failure] = []
        timeout_s, proxies = self._file.timeout_s, self._uses_proxies()
        with httpx.Client(headers=self._headers, timeout=timeout_s, trust_env=proxies) as client:
            for result in map_in_threads(partial(self._answer, client), queries, self._file.parallel):
                results.append(result)
                if progress:
                    progress("answer", len(results), len(queries))
        return results

    def _uses_proxies(self) -> bool:
        return urlsplit(self._url).hostname not in {"127.0.0.1", "localhost", "::1"}

    def _answer(self, client: httpx.Client, query: Query) -> Answer | Failure:
        cannot = self._cannot_ask(query)
        if cannot:
            return Failure(kind="error", message=cannot)
        started = time.monotonic()
        reply = self._ask(client, _fill(self._file.body, query))
        if isinstance(reply, Failure):
            return reply
        return self._read(reply, (time.monotonic() - started) * 1000)

    def _cannot_ask(self, query: Query) -> str:
        """A query is never sent without its principal or its conversation."""
        if query.principal.tenant != PUBLIC and not self._tells_tenant:
            return f"the body has no {{tenant}}, so tenant {query.principal.tenant} cannot ask"
        if query.principal.labels and not self._tells_labels:
            return "the body has no {labels}, so the principal's access labels cannot be sent"
        if query.history and not self._tells_history:
            return "the body has no {messages} or {history}, so a conversation cannot be sent"
        return ""

    # ------------------------------------------------------------ ask

    def _ask(self, client: httpx.Client, body: Any) -> _Reply | Failure:  # noqa: ANN401 (JSON)
        failure = Failure(kind="error", message="not asked")
        for attempt in range(self._file.retries + 1):
            outcome = self._try(client, body)
            if isinstance(outcome, _Reply) and outcome.status == 200:
                return outcome
            failure, again = _failure_of(outcome)
            if not again or attempt == self._file.retries:
                break
            wait = self._wait_s(outcome, attempt)
            if wait is None:
                break
            self._sleep(wait)
        return failure

    def _try(self, client: httpx.Client, body: Any) -> _Reply | Failure:  # noqa: ANN401 (JSON)
        try:
            return self._send(client, body)
        except (httpx.TimeoutException, _TooLate):
            return Failure(kind="timeout", message=f"no complete reply within {self._file.timeout_s:g} s")
        except httpx.TransportError as error:
            return Failure(kind="unreachable", message=_brief(f"{type(error).__name__}: {error}"))
        except httpx.HTTPError as error:
            return Failure(kind="malformed", message=_brief(f"{type(error).__name__}: {error}"))

    def _send(self, client: httpx.Client, body: Any) -> _Reply:  # noqa: ANN401 (JSON)
        deadline = time.monotonic() + self._file.timeout_s
        ask: dict[str, Any] = {"params": _flat(body)} if self._file.method == "GET" else {"json": body}
        with client.stream(self._file.method, self._url, **ask) as response:
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if len(data) > self._file.max_reply_bytes:
                    raise httpx.DecodingError(f"the reply is longer than {self._file.max_reply_bytes} bytes")
                if time.monotonic() > deadline:  # a server that drips bytes never trips the client's own time-out
                    raise _TooLate
            return _Reply(response.status_code, dict(response.headers), bytes(data))

    def _wait_s(self, outcome: _Reply | Failure, attempt: int) -> float | None:
        """Seconds before the next try; None when the application asks for more than is allowed."""
        asked = _retry_after(outcome.headers) if isinstance(outcome, _Reply) else None
        if asked is not None:
            return asked if asked <= self._file.retry_after_max_s else None
        return min(self._file.retry_wait_s * 2.0**attempt, self._file.retry_after_max_s)

    # ------------------------------------------------------------ read

    def _read(self, reply: _Reply, total_ms: float) -> Answer | Failure:
        try:
            data = json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            return _malformed(f"the reply is not JSON: {error}")
        texts = self._find("answer", data)
        if len(texts) != 1 or not (texts[0] is None or isinstance(texts[0], str)):
            return _malformed(f"{self._file.reply.answer} matched {len(texts)} values, expected one text")
        text = texts[0]
        if text is None or not text.strip():
            return Failure(kind="empty", message="the answer is empty")
        passages = self._passages(data)
        if isinstance(passages, Failure):
            return passages
        flag, release = self._find("abstained", data), self._find("release", data)
        if flag and not isinstance(flag[0], bool):
            return _malformed(f"{self._file.reply.abstained} is {flag[0]!r:.40}, expected true or false")
        return Answer(
            text=text.strip(),
            passages=passages,
            abstained=flag[0] if flag else None,
            release=str(release[0]) if release else "",
            timings=Timings(total_ms=round(total_ms, 3)),
        )

    def _find(self, name: str, data: Any) -> list[Any]:  # noqa: ANN401 (JSON)
        path = self._paths.get(name)
        return path.findall(data) if path else []

    def _passages(self, data: Any) -> tuple[Passage, ...] | Failure | None:  # noqa: ANN401 (JSON)
        if "contexts" not in self._paths:
            return None
        texts = self._find("contexts", data)
        if not all(isinstance(text, str) for text in texts):
            return _malformed(f"{self._file.reply.contexts} holds something else than texts")
        names, scores = self._find("documents", data), self._find("scores", data)
        for path, found in (("documents", names), ("scores", scores)):
            if path in self._paths and len(found) != len(texts):
                return _malformed(f"{len(texts)} contexts, but {len(found)} {path}")
        if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
            return _malformed(f"{self._file.reply.scores} holds something else than numbers")
        return tuple(
            Passage(
                chunk="",
                document=str(names[i]) if names else "",
                start=0,
                end=0,
                text=text,
                score=float(scores[i]) if scores else 1 / (1 + i),
            )
            for i, text in enumerate(texts)
        )


def answer_http(cases: Sequence[GoldCase], system: HttpSystem, progress: Progress | None = None) -> list[CaseAnswer]:
    """Ask every case once. Each key is new: an application that goldgate does not hold can answer the same by chance,
    so equal answers of two runs are an observed zero and never a known one."""
    run = uuid.uuid4().hex
    answers = system.answer_many([case.query() for case in cases], progress)
    lines = []
    for case, result in zip(cases, answers, strict=True):
        key = digest_json(["http", run, system.digest, case.query().model_dump(mode="json")])
        answer, failure = (result, None) if isinstance(result, Answer) else (None, result)
        lines.append(CaseAnswer(case=case.id, key=key, answer=answer, failure=failure))
    return lines


# ---------------------------------------------------------------- the file


def _from_environment(url: str, variable: str) -> str:
    if bool(url) == bool(variable):
        raise UsageError("the system file needs url or url_env", "one of the two")
    value = url or os.environ.get(variable, "")
    if not value:
        raise UsageError(f"the environment variable {variable} is not set", "the application's URL")
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError("url is not an http or https URL", "http://host:port/path")
    return value


def _secret(header: str, variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise UsageError(f"the environment variable {variable} is not set", f"the value of the header {header}")
    return value


def _compile(name: str, path: str) -> Any:  # noqa: ANN401 (jsonpath.JSONPath | CompoundJSONPath)
    try:
        return jsonpath.compile(path)
    except (jsonpath.JSONPathError, ValueError) as error:
        raise UsageError(f"reply.{name}: {path!r} is not a JSONPath: {error}", "for example $.answer") from None


def _placeholders(value: JsonValue) -> set[str]:
    if isinstance(value, dict):
        return set().union(*(_placeholders(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_placeholders(item) for item in value))
    names = set(_PLACEHOLDER.findall(value)) if isinstance(value, str) else set()
    for name in sorted(names - set(PLACEHOLDERS)):
        near = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
        raise UsageError(f"body: {{{name}}} is unknown", "", f"did you mean {{{near[0] if near else 'question'}}}?")
    return names


def _fill(value: JsonValue, query: Query) -> Any:  # noqa: ANN401 (JSON)
    """Put the query into the template. A text that is one placeholder alone becomes the value itself."""
    history = [message.model_dump() for message in query.history]
    values: dict[str, Any] = {
        "question": query.question,
        "messages": [*history, {"role": "user", "content": query.question}],
        "history": history,
        "tenant": query.principal.tenant,
        "labels": list(query.principal.labels),
    }
    return _fill_with(value, values)


def _fill_with(value: JsonValue, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return {name: _fill_with(item, values) for name, item in value.items()}
    if isinstance(value, list):
        return [_fill_with(item, values) for item in value]
    if not isinstance(value, str):
        return value
    whole = _PLACEHOLDER.fullmatch(value)
    if whole:
        return values[whole[1]]
    return _PLACEHOLDER.sub(lambda m: _text(values[m[1]]), value)


def _text(value: Any) -> str:  # noqa: ANN401 (JSON)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(body: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in body.items()}


# ---------------------------------------------------------------- failures


def _failure_of(outcome: _Reply | Failure) -> tuple[Failure, bool]:
    """Return the failure, and whether asking again can help."""
    if isinstance(outcome, Failure):
        return outcome, outcome.kind in {"timeout", "unreachable"}
    kind: FailureKind = "rate_limited" if outcome.status == 429 else "http"
    text = " ".join(outcome.body[:300].decode("utf-8", errors="replace").split())
    failure = Failure(kind=kind, message=_brief(f"HTTP {outcome.status}: {text}"))
    return failure, outcome.status == 429 or outcome.status >= 500


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header: a number or a date; None when absent or senseless."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _malformed(message: str) -> Failure:
    return Failure(kind="malformed", message=_brief(message))


def _brief(message: str) -> str:
    return " ".join(message.split())[:200]
