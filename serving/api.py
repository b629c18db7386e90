"""HTTP request -> answer, by the one release that a request took at its start.

    POST /v1/answers            {question, history?, principal?, stream?} -> answer, citations, passages, release, ...
    POST /v1/chat/completions   OpenAI-compatible, streaming or not; answers from the knowledge base
    GET  /v1/models             the application as one model
    GET  /healthz               503 with a reason until a warm-up answer was generated, then 200 with the release;
                                503 again while the engine does not answer

* The release decides prompt and sampling. A system message is refused (400); sampling fields are ignored and named in
  `goldgate.ignored`.
* The principal over HTTP is the public one. Another one (`principal`, or the headers X-Goldgate-Tenant and
  X-Goldgate-Labels) is taken only from a loopback peer that no proxy speaks for; from elsewhere it is refused (403).
  A proxy on this machine that forwards strangers must therefore set X-Forwarded-For or strip these headers.
* Every error is `{"error": {"message", "type"}}`: 400 not understood, 403, 404, 413 too large, 422 wrong fields, 503.
* Every reply names its release, in the body and in the header X-Goldgate-Release.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from goldgate.pipeline.schema import PUBLIC, Answer, FailureKind, Message, Principal, Query, Record

MAX_BODY_BYTES = 64 * 1024
MAX_QUESTION_CHARACTERS = 4000
MAX_TURNS = 20
RELEASE_HEADER = "X-Goldgate-Release"
TENANT_HEADER = "X-Goldgate-Tenant"
LABELS_HEADER = "X-Goldgate-Labels"


# ---------------------------------------------------------------- what answers


class Health(Record):
    """What /healthz says."""

    status: Literal["ok", "starting", "failing"]
    reason: str = Field("", description="Why it is not ready yet, or no more; empty when it is.")
    application: str
    release: str = ""
    knowledge_base: str = ""
    model: str = ""
    prompt: str = ""
    restart_needed: str = Field("", description="Promoted release that needs another engine: restart to serve it.")
    switch_failed: str = Field("", description="Release and reason: it could not be loaded and is tried again.")


class ServingFailure(Exception):
    """No answer: the kind and the reason, as in `Failure`."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        """Keep the kind and the reason."""
        super().__init__(message)
        self.kind = kind
        self.message = message


class Snapshot(Protocol):
    """One loaded release; it never changes."""

    @property
    def release(self) -> str:
        """Digest of the release that every answer of this snapshot names."""

    def stream(self, query: Query) -> AsyncGenerator[str | Answer, None]:
        """Yield pieces of text, then the Answer whose text they make up. Raises ServingFailure."""


class Serving(Protocol):
    """What the routes need: its health, and the release to answer with."""

    application: str

    def health(self) -> Health:
        """Return what is served now."""

    def lease(self) -> contextlib.AbstractContextManager[Snapshot]:
        """Hold the current release until the context ends. Raises ServingFailure while there is none."""


# ---------------------------------------------------------------- bodies


class Turn(Record):
    """An earlier turn of the conversation."""

    role: Literal["user", "assistant"]
    content: str = Field(max_length=MAX_QUESTION_CHARACTERS)


class AnswerRequest(Record):
    """Body of POST /v1/answers."""

    question: str = Field(max_length=MAX_QUESTION_CHARACTERS, pattern=r"\S")
    history: tuple[Turn, ...] = Field((), max_length=MAX_TURNS)
    principal: Principal | None = Field(None, description="Loopback peers only; everyone else is public.")
    stream: bool = Field(False, description="Server-sent events: {piece} ..., then {answer}.")


class AnswerReply(Record):
    """Reply of POST /v1/answers."""

    answer: str
    citations: tuple[Any, ...]
    passages: tuple[Any, ...] | None
    abstained: bool | None
    release: str
    usage: Any
    timings: Any


class TextPart(BaseModel):
    """One part of an OpenAI message; only text is understood."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One OpenAI message."""

    model_config = ConfigDict(extra="ignore")
    role: str
    content: str | list[TextPart]

    def plain(self) -> str:
        """Return the text of the message."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. Fields that are not named here land in `ignored`."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_TURNS + 1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None

    def ignored(self) -> list[str]:
        """Return the names of fields that have no effect here: the release decides prompt and sampling."""
        return sorted(name for name, value in (self.model_extra or {}).items() if value is not None)


UNSUPPORTED = (
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "response_format",
    "audio",
    "modalities",
    "logprobs",
)
"""OpenAI fields that change what comes back: refused, because ignoring them would surprise the caller."""


class ApiError(Exception):
    """An error reply."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        """Keep the HTTP status, the error type and the message."""
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message


# ---------------------------------------------------------------- the application


async def _no_trouble() -> str:
    return ""


def build_api(serving: Serving, trouble: Callable[[], Awaitable[str]] = _no_trouble) -> FastAPI:
    """Return the ASGI application. It holds no state of its own: `serving` decides what answers.

    `trouble` says what is wrong with the engine behind it; empty: nothing. /healthz asks it every time.
    """
    # No documentation pages: they load scripts from a third party. The schema itself is at /openapi.json.
    app = FastAPI(title="goldgate", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    _add_error_handlers(app)

    @app.get("/healthz")
    async def healthz() -> Response:
        health = serving.health()
        if health.status == "ok" and (reason := await trouble()):
            health = health.model_copy(update={"status": "failing", "reason": reason})
        body = health.model_dump(exclude_defaults=True)
        if health.status == "ok":
            return JSONResponse(body, headers={RELEASE_HEADER: health.release})
        return JSONResponse(
            {**body, **_error("not_ready", health.reason)}, status_code=503, headers={"Retry-After": "1"}
        )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(serving)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, serving.application)
        return _model_card(serving)

    @app.post("/v1/answers", response_model=AnswerReply)
    async def answers(body: AnswerRequest, request: Request) -> Response:
        history = tuple(Message(role=turn.role, content=turn.content) for turn in body.history)
        query = Query(question=body.question, history=history, principal=principal_of(request, body.principal))
        started = await _start(serving, query)
        if body.stream:
            return _events(started, _answer_events(started))
        return _json(started, answer_reply(await started.rest()))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        query = chat_query(body, serving.application, principal_of(request, None))
        started = await _start(serving, query)
        if body.stream:
            return _events(started, _chat_events(started, body))
        return _json(started, _completion(body, await started.rest()))

    return app


def _model_card(serving: Serving) -> dict[str, Any]:
    health = serving.health()
    parts = health.model_dump(include={"release", "knowledge_base", "model", "prompt"})
    return {"id": serving.application, "object": "model", "created": 0, "owned_by": "goldgate", "goldgate": parts}


def _check_model(name: str, application: str) -> None:
    if name not in {application, "goldgate"}:
        raise ApiError(404, "model_not_found", f"model {name!r} is not served here; expected {application!r}")


# ---------------------------------------------------------------- who asks


def principal_of(request: Request, stated: Principal | None) -> Principal:
    """Return who asks. Raises ApiError 403 when a stranger claims to be someone, 422 for an empty tenant."""
    headers = request.headers
    if stated is None and (TENANT_HEADER in headers or LABELS_HEADER in headers):
        labels = sorted({label.strip() for label in headers.get(LABELS_HEADER, "").split(",") if label.strip()})
        tenant = headers.get(TENANT_HEADER, PUBLIC).strip()
        if not tenant:
            raise ApiError(422, "invalid_request_error", f"{TENANT_HEADER} is empty; expected a tenant or no header")
        stated = Principal(tenant=tenant, labels=tuple(labels))
    public = Principal()
    if stated is None or stated == public:
        return public
    if not is_local(request.client.host if request.client else None, headers):
        raise ApiError(
            403, "principal_refused", "another principal than the public one is taken from this machine only"
        )
    return stated


def is_local(host: str | None, headers: Mapping[str, str]) -> bool:
    """Return whether the peer is on this machine and speaks for itself (no proxy header)."""
    if host is None or any(name in headers for name in ("x-forwarded-for", "forwarded", "x-real-ip", "via")):
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


# ---------------------------------------------------------------- answering


class _Started:
    """An answer whose first piece is there: from here on the reply is 200, and the snapshot is held until it ends."""

    def __init__(self, release: str, first: str | Answer, source: AsyncGenerator[str | Answer, None]) -> None:
        self.release = release
        self._first = first
        self._source = source

    async def items(self) -> AsyncIterator[str | Answer]:
        async with contextlib.aclosing(self._source):
            yield self._first
            async for item in self._source:
                yield item

    async def rest(self) -> Answer:
        async for item in self.items():
            if isinstance(item, Answer):
                return item
        raise ServingFailure("empty", "the stream ended without an answer")


async def _start(serving: Serving, query: Query) -> _Started:
    """Take the current release and wait for the first piece, so that a failure can still be an HTTP error."""
    source = _leased(serving, query)
    release = await anext(source)
    first = await anext(source)
    if not isinstance(release, str):
        raise ServingFailure("crash", "the stream did not start with its release")
    return _Started(release, first, source)


async def _leased(serving: Serving, query: Query) -> AsyncGenerator[str | Answer, None]:
    """Yield the release digest, then what its snapshot streams; the lease ends with this generator."""
    with serving.lease() as snapshot:
        yield snapshot.release
        async with contextlib.aclosing(snapshot.stream(query)) as stream:
            async for item in stream:
                yield item


def answer_reply(answer: Answer) -> dict[str, Any]:
    """Return the JSON of /v1/answers: the record with its text named `answer`."""
    body = answer.model_dump(mode="json")
    return {"answer": body.pop("text"), **body}


def chat_query(body: ChatRequest, application: str, principal: Principal) -> Query:
    """Return the question of an OpenAI chat: the last user message, with the turns before it as history.

    Raises ApiError (400, 404, 422) for what cannot be honoured.
    """
    _check_model(body.model, application)
    for name in UNSUPPORTED:
        value = (body.model_extra or {}).get(name)
        if value not in (None, [], {}, False, "none", ["text"], {"type": "text"}):
            raise ApiError(400, "unsupported_parameter", f"{name} is not supported; leave it out")
    for message in body.messages:
        if message.role in {"system", "developer"}:
            raise ApiError(
                400,
                "system_message_refused",
                "system messages are refused: the released prompt decides; leave them out",
            )
        if message.role not in {"user", "assistant"}:
            raise ApiError(
                400, "unsupported_role", f"role {message.role!r:.40} is not supported; expected user or assistant"
            )
        if len(message.plain()) > MAX_QUESTION_CHARACTERS:
            raise ApiError(
                422, "invalid_request_error", f"a message is longer than {MAX_QUESTION_CHARACTERS} characters"
            )
    last = body.messages[-1]
    if last.role != "user" or not last.plain().strip():
        raise ApiError(422, "invalid_request_error", "the last message must be the user's question")
    history = tuple(Message.model_validate({"role": m.role, "content": m.plain()}) for m in body.messages[:-1])
    return Query(question=last.plain(), history=history, principal=principal)


# ---------------------------------------------------------------- replies


def _json(started: _Started, body: dict[str, Any]) -> Response:
    return JSONResponse(body, headers={RELEASE_HEADER: started.release})


def _events(started: _Started, events: AsyncIterator[str]) -> Response:
    headers = {RELEASE_HEADER: started.release, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _answer_events(started: _Started) -> AsyncIterator[str]:
    try:
        async for item in started.items():
            yield _event({"piece": item} if isinstance(item, str) else answer_reply(item))
    except ServingFailure as failure:
        yield _event(_error(failure.kind, failure.message))


async def _chat_events(started: _Started, body: ChatRequest) -> AsyncIterator[str]:
    """OpenAI chunks: the role, the pieces, the end with the sources, the usage if asked for, [DONE]."""
    base: dict[str, Any] = _chat_base(body, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None, **extra: Any) -> str:  # noqa: ANN401 - JSON
        return _event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **extra})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for item in started.items():
            if isinstance(item, str):
                yield chunk({"content": item})
                continue
            yield chunk({}, "stop", goldgate=_extra(body, item))
            if body.stream_options and body.stream_options.include_usage:
                yield _event({**base, "choices": [], "usage": _usage(item)})
        yield "data: [DONE]\n\n"
    except ServingFailure as failure:
        yield _event(_error(failure.kind, failure.message))


def _completion(body: ChatRequest, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    return {
        **_chat_base(body, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": _usage(answer),
        "goldgate": _extra(body, answer),
    }


def _chat_base(body: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": body.model}


def _extra(body: ChatRequest, answer: Answer) -> dict[str, Any]:
    """Return the field that OpenAI's clients keep beside the answer: where it comes from."""
    details = answer.model_dump(mode="json", exclude={"text", "usage"})
    return {**details, "ignored": body.ignored()}


def _usage(answer: Answer) -> dict[str, int] | None:
    if answer.usage is None:
        return None
    prompt, completion = answer.usage.prompt_tokens, answer.usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# ---------------------------------------------------------------- errors and limits


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": kind, "param": None}}


def _add_error_handlers(app: FastAPI) -> None:
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(_error(error.kind, error.message), status_code=error.status)

    async def failure(_: Request, error: ServingFailure) -> Response:
        return JSONResponse(_error(error.kind, error.message), status_code=503, headers={"Retry-After": "1"})

    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return JSONResponse(_error("invalid_json", "the body is not JSON"), status_code=400)
        return JSONResponse(_error("invalid_request_error", f"{where or 'the body'}: {first['msg']}"), status_code=422)

    async def record(_: Request, error: ValidationError) -> Response:
        return JSONResponse(_error("invalid_request_error", error.errors()[0]["msg"]), status_code=422)

    async def http(_: Request, error: HTTPException) -> Response:
        return JSONResponse(_error("http_error", str(error.detail)), status_code=error.status_code)

    async def bug(_: Request, error: Exception) -> Response:
        return JSONResponse(_error("internal_error", type(error).__name__), status_code=500)

    handlers: list[tuple[Any, Callable[[Request, Any], Awaitable[Response]]]] = [
        (ApiError, api_error), (ServingFailure, failure), (RequestValidationError, validation),
        (ValidationError, record), (HTTPException, http), (Exception, bug),
    ]  # fmt: skip
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


class BodyLimit:
    """Refuse a body above MAX_BODY_BYTES with 413, whether or not its length was stated, before it is kept."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then hand it on in one piece."""
        if scope["type"] != "http" or scope["method"] not in {"POST", "PUT", "PATCH"}:
            await self.app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                reply = JSONResponse(_error("too_large", f"the body exceeds {MAX_BODY_BYTES} bytes"), status_code=413)
                await reply(scope, receive, send)
                return
        rest: list[AsgiMessage] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> AsgiMessage:
            return rest.pop() if rest else await receive()

        await self.app(scope, replay, send)
