"""The ingress deployment of Ray Serve: the HTTP application over the release that answers.

It imports neither vllm nor ray.serve.llm: the engine is a deployment handle here. /healthz asks the engine through the
same handle as a question would, so that it turns red when the engine dies and green again when Serve has restarted it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError

from goldgate.pipeline.schema import Failure, Release
from goldgate.pipeline.store import Store
from goldgate.serving.answer import Prepared
from goldgate.serving.api import build_api
from goldgate.serving.generate import Generation, Renderer, VllmRenderer, sampling_arguments
from goldgate.serving.handle import EnginePrompt
from goldgate.serving.release import production
from goldgate.serving.snapshot import Live, RestartNeeded, TextEngine, load_snapshot

PROBE = EnginePrompt("alive?", (), {})
FRESH_S = 1.0
"""For so long after a sign of life, and after a check, the engine is not asked again."""

ALIVE_S = 3.0
"""An engine that says nothing for so long is not healthy."""


class EnginePulse:
    """Whether the engine lives: what it generates is a sign of life, and without one it is asked."""

    def __init__(self, handle: Any, fresh_s: float = FRESH_S, alive_s: float = ALIVE_S) -> None:  # noqa: ANN401
        """Ask through `handle`, at most once in `fresh_s` seconds, and wait `alive_s` seconds for its word."""
        self._alive = handle.options(stream=False).alive
        self._fresh_s, self._alive_s = fresh_s, alive_s
        self._looked = float("-inf")
        self._trouble = ""
        self._asking: asyncio.Task[str] | None = None

    def seen(self) -> None:
        """The engine generated something. A busy engine is never asked: the question would wait behind the others."""
        self._looked, self._trouble = time.monotonic(), ""

    async def trouble(self) -> str:
        """Return what is wrong with the engine; empty: nothing. Callers at the same time share one question."""
        if self._asking is None and time.monotonic() - self._looked >= self._fresh_s:
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None:
            return await asyncio.shield(self._asking)
        return self._trouble

    async def _ask(self) -> str:
        started = time.monotonic()
        trouble, response = "", None
        try:
            async with asyncio.timeout(self._alive_s):
                response = self._alive.remote(PROBE)
                await response
        except TimeoutError:
            if response is not None:
                response.cancel()  # else it would wait for the next replica, and so would all that follow
            trouble = f"the engine says nothing for {self._alive_s:g} s"
        except Exception as error:  # noqa: BLE001 - whatever it raises, it is not healthy
            trouble = f"the engine failed: {_last_line(error)}"
        finally:
            self._asking = None
        if self._looked < started:  # else it generated something meanwhile
            self._looked, self._trouble = time.monotonic(), trouble
        return self._trouble


class HandleEngine:
    """The engine deployment, reached by its handle."""

    def __init__(self, handle: Any, renderer: VllmRenderer, pulse: EnginePulse | None = None) -> None:  # noqa: ANN401
        """Stream through `handle` what `renderer` tokenizes; `pulse` is told of every piece."""
        self._generate = handle.options(stream=True).generate_text
        self._renderer = renderer
        self._pulse = pulse

    async def stream(self, prepared: Prepared) -> AsyncGenerator[str | Generation | Failure, None]:
        """Yield pieces of text, then the Generation or Failure. Leaving early cancels the request in the engine."""
        started = time.monotonic()
        text, first, counts = "", None, (None, None)
        ids = tuple(self._renderer.encode(prepared.rendered))
        response = self._generate.remote(EnginePrompt(prepared.rendered, ids, sampling_arguments(self._renderer.spec)))
        ended = False
        try:
            async for piece in response:
                if self._pulse is not None:
                    self._pulse.seen()
                if piece.prompt_tokens is not None:
                    counts = (piece.prompt_tokens, piece.completion_tokens)
                if piece.text:
                    first = _since(started) if first is None else first
                    text += piece.text
                    yield piece.text
            ended = True
        except (RayError, ValueError) as error:
            ended = True
            yield Failure(kind="crash", message=f"the engine failed: {_last_line(error)}")
            return
        finally:
            if not ended:
                response.cancel()
        yield Generation(
            text=text,
            prompt_tokens=counts[0],
            completion_tokens=counts[1],
            first_token_ms=first,
            total_ms=_since(started),
        )

    def close(self) -> None:
        """Nothing: the deployment belongs to the application."""


def _since(started: float) -> float:
    return (time.monotonic() - started) * 1000


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@serve.ingress()
class Ingress:
    """Answers over HTTP from one application of one store."""

    def __init__(self, store: str, application: str, model: str, engine: Any = None) -> None:  # noqa: ANN401
        """`engine` is the handle of the deployment that runs the model with digest `model`; None: there is none."""
        self._store = Store.open(Path(store))
        self._model = model
        self._engine = engine
        self._pulse = None if engine is None else EnginePulse(engine)
        self._live = Live(
            application,
            lambda: production(self._store, application),
            lambda digest: load_snapshot(self._store, digest, self._engine_for),
        )
        self._watcher: asyncio.Task[None] | None = None

    def _engine_for(self, release: Release, renderer: Renderer) -> TextEngine:
        if self._engine is None or release.model != self._model or not isinstance(renderer, VllmRenderer):
            raise RestartNeeded(release.digest)
        return HandleEngine(self._engine, renderer, self._pulse)

    async def _trouble(self) -> str:
        # A release with a model of another kind does not need the engine.
        if self._pulse is None or self._live.health().model != self._model:
            return ""
        return await self._pulse.trouble()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Start following the pointer; Serve calls this once, on the replica's event loop."""
        self._watcher = asyncio.get_running_loop().create_task(self._live.watch())
        return build_api(self._live, self._trouble)

    async def __del__(self) -> None:
        """Serve awaits this when the replica stops, after its requests have ended."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await asyncio.to_thread(self._live.close)
