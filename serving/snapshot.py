"""production pointer -> the release that answers: loaded beside the old one, warmed, then swapped in one step.

A request takes the current snapshot at its start and keeps it to its end, so no answer mixes two releases. A replaced
snapshot is closed when its last request has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from goldgate.pipeline.errors import GoldgateError, Refused
from goldgate.pipeline.params import load_params
from goldgate.pipeline.schema import Answer, Failure, Principal, Query, Release
from goldgate.pipeline.store import Store
from goldgate.serving.answer import Answerer, Prepared, open_answerer, post_process
from goldgate.serving.api import Health, ServingFailure
from goldgate.serving.generate import Generation, Generator, Renderer, load_generator, load_renderer
from goldgate.serving.model import build_model, load_model_spec
from goldgate.serving.prompt import render
from goldgate.serving.release import load_release, release_folder

WARM_UP = Query(question="What is this about?", principal=Principal())
POLL_S = 1.0
RETRY_S = 10.0
WARM_UP_S = 300.0
LONGEST_LABEL = 12
"""Characters within which `post_process` may still remove a leading label."""


class RestartNeeded(Exception):
    """The promoted release needs an engine that this process did not start."""


class TextEngine(Protocol):
    """What generates, wherever it runs."""

    def stream(self, prepared: Prepared) -> AsyncGenerator[str | Generation | Failure, None]:
        """Yield pieces of raw text, then the Generation or the Failure that ended it."""

    def close(self) -> None:
        """Free what this process holds of it."""


EngineFor = Callable[[Release, Renderer], TextEngine]
"""Returns the started engine for a release whose model is of kind vllm. Raises RestartNeeded."""


# ---------------------------------------------------------------- one release


class LoadedRelease:
    """One release with its open collection, its prompt and its engine. It never changes."""

    def __init__(self, record: Release, answerer: Answerer, engine: TextEngine, timeout_s: float) -> None:
        """Keep the parts; `close` closes them. `timeout_s` bounds one answer."""
        self.record = record
        self.release = record.digest
        self._answerer = answerer
        self._engine = engine
        self._timeout_s = timeout_s
        # One thread: the embedder uses the cores by itself, and a collection handle is then never used twice at once.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retrieve")

    async def stream(self, query: Query) -> AsyncGenerator[str | Answer, None]:
        """Yield pieces of the answer's text, then the Answer; the pieces joined are its text. Raises ServingFailure."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        async with contextlib.aclosing(self._pieces(query)) as pieces:
            while True:
                try:
                    # Around each wait, never around a yield: a stream may be read by another task than began it.
                    async with asyncio.timeout_at(deadline):
                        item = await anext(pieces)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise ServingFailure("timeout", f"no answer within {self._timeout_s:g} s") from None
                except GoldgateError as error:
                    raise ServingFailure("error", str(error)) from error
                yield item

    async def _pieces(self, query: Query) -> AsyncGenerator[str | Answer, None]:
        prepared = await self._prepare(query)
        shown = ShownText()
        generation: Generation | Failure | None = None
        if prepared.settled is None:
            async with contextlib.aclosing(self._engine.stream(prepared)) as pieces:
                async for item in pieces:
                    if not isinstance(item, str):
                        generation = item
                    elif text := shown.add(item):
                        yield text
        done = self._answerer.finish(prepared, generation)
        if isinstance(done, Failure):
            raise ServingFailure(done.kind, done.message)
        if rest := shown.rest(done.text):
            yield rest
        yield done

    async def _prepare(self, query: Query) -> Prepared:
        loop = asyncio.get_running_loop()
        return (await loop.run_in_executor(self._thread, self._answerer.prepare, [query]))[0]

    async def warm(self) -> None:
        """Retrieve once and generate one answer, whatever was found. Raises ServingFailure."""
        prepared = await self._prepare(WARM_UP)
        if prepared.settled is not None:
            messages = render(self._answerer.prompt, WARM_UP, prepared.passages[:1])
            rendered = self._answerer.generator.render(messages)
            prepared = Prepared(WARM_UP, prepared.key, prepared.passages[:1], messages, rendered)
        async for item in self._engine.stream(prepared):
            if isinstance(item, Failure) and item.kind != "empty":
                raise ServingFailure(item.kind, f"the warm-up answer failed: {item.message}")

    def close(self) -> None:
        """Close collection and engine after what is being retrieved."""
        self._thread.shutdown(wait=True)
        self._answerer.close()
        self._engine.close()


def load_snapshot(store: Store, digest: str, engine_for: EngineFor) -> LoadedRelease:
    """Verify a release's bytes and open its parts.

    Raises Refused (changed bytes, another model than was released), the errors of each part, and RestartNeeded.
    """
    from goldgate.pipeline.index import load_generation

    record = load_release(store, digest)
    folder = release_folder(store, digest)
    params = load_params(folder / "params.toml")
    model = build_model(load_model_spec(folder / "model.toml"), store)
    if model.digest != record.model:
        raise Refused(f"the model of release {digest[:12]} is not the one that was judged", record.model[:12])
    if model.spec.kind == "vllm":
        renderer: Renderer = load_renderer(model, params.answer)
        engine = engine_for(record, renderer)
    else:
        renderer = load_generator(model, params.answer)
        engine = ThreadEngine(renderer)
    try:
        answerer = open_answerer(
            load_generation(record.generation, store), params.embed, params.retrieve, folder / "prompt.toml",
            folder / "model.toml", params.answer, store, generator=renderer, release=digest,
        )  # fmt: skip
    except BaseException:
        engine.close()
        raise
    return LoadedRelease(record, answerer, engine, params.answer.timeout_s)


class ShownText:
    """Raw pieces -> shown pieces: cleaned as `post_process` does, holding back what it could still remove."""

    def __init__(self) -> None:
        """Nothing was shown yet."""
        self._raw = ""
        self._shown = ""

    def add(self, piece: str) -> str:
        """Return what can be shown after `piece`; empty while that is not settled."""
        self._raw += piece
        start = self._raw.lstrip()
        if len(start) < LONGEST_LABEL and start[:1] in {"", "A", "*"}:
            return ""
        return self._show(post_process(self._raw))

    def rest(self, text: str) -> str:
        """Return what of the final `text` was not shown yet."""
        return self._show(text)

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new


class ThreadEngine:
    """A Generator of this process (an endpoint's client or the double), one thread for each answer."""

    def __init__(self, generator: Generator) -> None:
        """Use `generator`; `close` closes it."""
        self._generator = generator

    async def stream(self, prepared: Prepared) -> AsyncGenerator[str | Generation | Failure, None]:
        """Yield what the generator yields; leaving early stops it after its next piece."""
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[str | Generation | Failure | None] = asyncio.Queue()
        stop = threading.Event()

        def run() -> None:
            try:
                for item in self._generator.stream(prepared.messages):
                    loop.call_soon_threadsafe(items.put_nowait, item)
                    if stop.is_set():
                        break
            finally:
                loop.call_soon_threadsafe(items.put_nowait, None)

        work = asyncio.ensure_future(asyncio.to_thread(run))
        try:
            while (item := await items.get()) is not None:
                yield item
            await work
        finally:
            stop.set()

    def close(self) -> None:
        """Close the generator."""
        self._generator.close()


# ---------------------------------------------------------------- the release that answers now


class _Held:
    """A snapshot and how many requests use it. Touched by the event loop only."""

    def __init__(self, snapshot: LoadedRelease) -> None:
        self.snapshot = snapshot
        self.users = 0
        self.retired = False


class Live:
    """The release that answers, kept equal to the production pointer."""

    def __init__(
        self,
        application: str,
        pointer: Callable[[], str | None],
        load: Callable[[str], LoadedRelease],
        poll_s: float = POLL_S,
    ) -> None:
        """`pointer` returns the promoted digest and `load` opens a release; both run in a thread and may raise."""
        self.application = application
        self._pointer = pointer
        self._load = load
        self._poll_s = poll_s
        self._current: _Held | None = None
        self._reason = "the release is being loaded"
        self._restart_needed = ""
        self._switch_failed = ""
        self._failed: tuple[str, float] = ("", 0.0)

    def health(self) -> Health:
        """Return what is served now."""
        if self._current is None:
            return Health(
                status="starting", reason=self._reason, application=self.application, switch_failed=self._switch_failed
            )
        record = self._current.snapshot.record
        return Health(
            status="ok",
            application=self.application,
            release=record.digest,
            knowledge_base=record.generation,
            model=record.model,
            prompt=record.prompt,
            restart_needed=self._restart_needed,
            switch_failed=self._switch_failed,
        )

    @contextlib.contextmanager
    def lease(self) -> Iterator[LoadedRelease]:
        """Hold the current release. Raises ServingFailure while there is none."""
        held = self._current
        if held is None:
            raise ServingFailure("unreachable", f"not ready: {self._reason}")
        held.users += 1
        try:
            yield held.snapshot
        finally:
            held.users -= 1
            self._close_unused(held)

    async def watch(self) -> None:
        """Follow the pointer until cancelled. A release that cannot be loaded leaves the old one answering."""
        while True:
            await self.follow()
            await asyncio.sleep(self._poll_s)

    async def follow(self) -> None:
        """Look at the pointer once and switch if it names another release."""
        try:
            digest = await asyncio.to_thread(self._pointer)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the pointer, the watch must go on
            self._fail("", str(error) or type(error).__name__)
            return
        current = self._current.snapshot.release if self._current else ""
        if digest is None or digest == current:
            self._restart_needed = self._switch_failed = ""
            if digest is None:
                self._reason = "nothing is promoted"
            return
        failed, at = self._failed
        if digest != failed:
            self._restart_needed = self._switch_failed = ""  # what they say is about another release
        elif time.monotonic() - at < RETRY_S:
            return
        await self._switch(digest)

    async def _switch(self, digest: str) -> None:
        try:
            snapshot = await asyncio.to_thread(self._load, digest)
            self._reason = "the engine is starting"
            try:
                # The first warm-up waits for the engine to start, which the starting process bounds.
                async with asyncio.timeout(WARM_UP_S if self._current else None):
                    await snapshot.warm()
            except BaseException:
                await asyncio.to_thread(snapshot.close)
                raise
        except RestartNeeded:
            if self._current is None:  # promoted while this deployment was starting
                self._fail(digest, "it needs another engine, start the deployment again")
            else:
                self._restart_needed, self._failed = digest, (digest, time.monotonic())
            return
        except (GoldgateError, ServingFailure) as error:
            self._fail(digest, str(error))
            return
        except Exception as error:  # noqa: BLE001 - the old release goes on answering, whatever is wrong with the new
            self._fail(digest, f"{type(error).__name__}: {error}")
            return
        old, self._current = self._current, _Held(snapshot)
        self._restart_needed = self._switch_failed = ""
        self._failed = ("", 0.0)
        if old is not None:
            old.retired = True
            self._close_unused(old)

    def _fail(self, digest: str, reason: str) -> None:
        self._failed = (digest, time.monotonic())
        self._reason = reason
        self._switch_failed = f"{digest[:12]}: {reason}" if digest else reason

    def _close_unused(self, held: _Held) -> None:
        if held.retired and held.users == 0:
            held.retired = False
            # Off the event loop: closing waits for the retrieval thread.
            threading.Thread(target=held.snapshot.close, name="close-release", daemon=True).start()

    def close(self) -> None:
        """Close the current release at the end of the process."""
        held, self._current = self._current, None
        if held is not None:
            held.snapshot.close()
