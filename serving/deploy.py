"""url -> what is served there: wait for a deployment, and ask it.

The client side of serving/app.py, for `goldgate ask --url`, `goldgate promote --url` and smoke tests. It needs httpx
and nothing of the engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from pydantic import ValidationError

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.schema import Answer, Principal

Progress = Callable[[str, int, int], None]

POLL_S = 0.5
ANSWER_TIMEOUT_S = 300.0


def health(url: str) -> dict[str, Any]:
    """Return what /healthz says, ready or not. Raises EnvironmentFailure when nothing goldgate-like answers there."""
    try:
        reply = httpx.get(f"{_base(url)}/healthz", timeout=10)
        body = reply.json()
    except httpx.HTTPError as error:
        raise EnvironmentFailure(
            f"{url} cannot be reached ({type(error).__name__})", "a running deployment", "run goldgate serve"
        ) from error
    except ValueError:
        body = None
    if not isinstance(body, dict) or "status" not in body:
        raise EnvironmentFailure(f"{url} is not a goldgate deployment (HTTP {reply.status_code})", "its /healthz")
    return body


def wait_healthy(
    url: str, release: str | None = None, timeout_s: float = 600.0, progress: Progress | None = None
) -> dict[str, Any]:
    """Wait until the deployment answers from `release` (None: from any) and return its health.

    Raises EnvironmentFailure when it is not there in time or could not load the release, and Refused when the release
    needs a restart of the deployment.
    """
    started = time.monotonic()
    last = "no answer yet"
    while True:
        body: dict[str, Any] = {}
        try:
            body = health(url)
            last = _state(body)
        except EnvironmentFailure as error:
            last = str(error)
        if body.get("status") == "ok" and release in (None, body.get("release")):
            return body
        if release is not None and body.get("restart_needed") == release:
            raise Refused(
                f"release {release[:12]} needs another engine than {url} runs", "", "restart goldgate serve to serve it"
            )
        failed = str(body.get("switch_failed", ""))
        if failed and (failed.startswith(release[:12]) if release else body["status"] != "ok"):
            raise EnvironmentFailure(f"{url} could not load the release: {failed}")
        waited = time.monotonic() - started
        if waited >= timeout_s:
            wanted = f"release {release[:12]}" if release else "a healthy deployment"
            raise EnvironmentFailure(f"{url} does not serve {wanted} after {timeout_s:g} s: {last}")
        if progress is not None:
            progress(last, int(waited), int(timeout_s))
        time.sleep(POLL_S)


def _state(body: dict[str, Any]) -> str:
    if body["status"] != "ok":
        return str(body.get("reason") or body["status"])
    trouble = body.get("switch_failed")
    return f"serving {str(body.get('release'))[:12]}" + (f" ({trouble})" if trouble else "")


def ask_http(
    url: str, question: str, principal: Principal | None = None, stream: bool = True
) -> Iterator[str | Answer]:
    """Ask a deployment; yields pieces of text as they come (one piece without `stream`), then the Answer.

    Another principal than the public one is taken by a deployment on the same machine only. Raises UsageError for a
    question or principal that it refuses, EnvironmentFailure when it does not answer.
    """
    body: dict[str, Any] = {"question": question, "stream": stream}
    if principal is not None:
        body["principal"] = principal.model_dump(mode="json")
    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=10)
    try:
        with httpx.stream("POST", f"{_base(url)}/v1/answers", json=body, timeout=timeout) as reply:
            if reply.status_code != 200:
                reply.read()
                raise _refusal(url, reply.status_code, _json(reply.text))
            yield from _events(reply, url) if stream else _whole(reply, url)
    except httpx.HTTPError as error:
        raise EnvironmentFailure(
            f"{url} did not answer ({type(error).__name__})", "a running deployment", "run goldgate serve"
        ) from error


def _events(reply: httpx.Response, url: str) -> Iterator[str | Answer]:
    ended = False
    for line in reply.iter_lines():
        if not line.startswith("data:"):
            continue
        event = _json(line.removeprefix("data:"))
        if "error" in event:
            raise _refusal(url, 503, event)
        if "piece" in event:
            yield str(event["piece"])
        else:
            ended = True
            yield _answer(event, url)
    if not ended:
        raise EnvironmentFailure(f"{url} ended the stream in the middle of an answer")


def _whole(reply: httpx.Response, url: str) -> Iterator[str | Answer]:
    reply.read()
    answer = _answer(_json(reply.text), url)
    yield answer.text
    yield answer


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _answer(event: dict[str, Any], url: str) -> Answer:
    fields = dict(event)
    try:
        return Answer.model_validate({"text": fields.pop("answer", None), **fields})
    except ValidationError as error:
        raise EnvironmentFailure(f"{url} answered in another format: {error.errors()[0]['msg']}") from error


def _refusal(url: str, status: int, body: dict[str, Any]) -> UsageError | EnvironmentFailure:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    what = f"{url} refused the question (HTTP {status}): {message or 'no reason given'}"
    return UsageError(what) if 400 <= status < 500 else EnvironmentFailure(what)


def _base(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url!r} is no address", "http://host:port")
    return url.rstrip("/")
