"""One loaded release, and how the release that answers changes: without Serve, on a real store and collection."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from goldgate.pipeline.errors import EnvironmentFailure
from goldgate.pipeline.schema import Answer, Failure, Principal, Query
from goldgate.pipeline.store import Store
from goldgate.serving import release as releases
from goldgate.serving.answer import Prepared
from goldgate.serving.api import ServingFailure, build_api
from goldgate.serving.generate import Generation
from goldgate.serving.snapshot import Live, LoadedRelease, RestartNeeded, load_snapshot
from tests.serving.serve_fixture import DOCUMENTS, make_release

QUERY = Query(question="On which port does the deployment listen by default?", principal=Principal())
CHANGED = {**DOCUMENTS, "ports.md": "The deployment listens on port 9000 by default."}


class Said:
    """An engine that says what the test wants, when the test wants."""

    def __init__(self, *items: str | Generation | Failure, wait: asyncio.Event | None = None) -> None:
        self.items = items
        self.wait = wait
        self.left_early = False
        self.closed = False

    async def stream(self, prepared: Prepared) -> AsyncGenerator[str | Generation | Failure, None]:
        done = False
        try:
            for item in self.items:
                yield item
                if self.wait is not None:
                    await self.wait.wait()
            done = True
        finally:
            self.left_early = not done

    def close(self) -> None:
        self.closed = True


class Pointer:
    """The production pointer as the store holds it, and the loads that it caused."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.loads: list[str] = []
        self.opened: list[LoadedRelease] = []
        self.before: Callable[[str], None] = lambda digest: None

    def load(self, digest: str) -> LoadedRelease:
        self.loads.append(digest)
        self.before(digest)
        snapshot = load_snapshot(self.store, digest, self._no_engine)
        self.opened.append(snapshot)
        return snapshot

    def _no_engine(self, release: object, renderer: object) -> Said:
        raise RestartNeeded

    def live(self) -> Live:
        return Live("default", lambda: releases.production(self.store), self.load, poll_s=0.01)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A store in which release A is live and release B waits: built once, copied for each test."""
    folder = tmp_path_factory.mktemp("template")
    store = Store.open(folder / "store")
    first = make_release(store, folder / "a")
    releases.promote(store, first.digest, actor="test")
    return store.root, first.digest, make_release(store, folder / "b", CHANGED).digest


@pytest.fixture
def store(template: tuple[Path, str, str], tmp_path: Path) -> Store:
    shutil.copytree(template[0], tmp_path / "store")
    return Store.open(tmp_path / "store")


@pytest.fixture
def two(template: tuple[Path, str, str]) -> tuple[str, str]:
    """Release A is live, release B waits."""
    return template[1], template[2]


async def answer_of(live: Live) -> Answer:
    with live.lease() as snapshot:
        *pieces, last = [item async for item in snapshot.stream(QUERY)]
    assert isinstance(last, Answer)
    assert "".join(str(p) for p in pieces) == last.text
    return last


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(10)


def with_engine(snapshot: LoadedRelease, engine: Said, timeout_s: float = 30) -> LoadedRelease:
    """The same release with another engine."""
    return LoadedRelease(snapshot.record, snapshot._answerer, engine, timeout_s)


# ---------------------------------------------------------------- which release answers


def test_not_ready_until_the_warm_up_answer(store: Store, two: tuple[str, str]) -> None:
    pointer = Pointer(store)
    gate = threading.Event()
    pointer.before = lambda _: assert_set(gate)
    live = pointer.live()
    client = TestClient(build_api(live))
    assert client.get("/healthz").status_code == 503
    assert client.post("/v1/answers", json={"question": "x"}).status_code == 503

    async def run() -> None:
        switching = asyncio.create_task(live.follow())
        await asyncio.sleep(0.05)
        assert live.health().status == "starting"
        gate.set()
        await switching

    asyncio.run(run())
    assert client.get("/healthz").json()["release"] == two[0]
    assert client.post("/v1/answers", json={"question": QUERY.question}).json()["release"] == two[0]
    live.close()


def test_a_request_keeps_its_release_and_the_old_one_is_closed_after_it(store: Store, two: tuple[str, str]) -> None:
    pointer = Pointer(store)
    live = pointer.live()

    async def run() -> None:
        await live.follow()
        with live.lease() as old:
            releases.promote(store, two[1], actor="test")
            await live.follow()
            assert live.health().release == two[1]
            assert (await answer_of(live)).text.endswith("9000 by default.")
            late = [item async for item in old.stream(QUERY)][-1]
            assert isinstance(late, Answer)
            assert (late.release, late.text[-16:]) == (two[0], "8000 by default.")
        await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError):  # its thread is gone: the drained release was closed
            [item async for item in old.stream(QUERY)]
        assert (await answer_of(live)).release == two[1]

    asyncio.run(run())
    assert pointer.loads == list(two)
    live.close()


def test_a_release_that_cannot_be_loaded_is_tried_again_later_and_says_why(store: Store, two: tuple[str, str]) -> None:
    pointer = Pointer(store)
    live = pointer.live()

    def fail(digest: str) -> None:
        if digest == two[1]:
            raise EnvironmentFailure("the disk is on fire")

    pointer.before = fail

    async def run() -> None:
        await live.follow()
        releases.promote(store, two[1], actor="test")
        for _ in range(3):
            await live.follow()
        assert live.health().switch_failed == f"{two[1][:12]}: the disk is on fire"
        assert (await answer_of(live)).release == two[0]
        releases.rollback(store, actor="test")
        await live.follow()
        assert (live.health().switch_failed, live.health().release) == ("", two[0])

    asyncio.run(run())
    assert pointer.loads == list(two)  # not at every look: the failed one waits
    live.close()


def test_a_bug_while_loading_leaves_the_old_release_answering(store: Store, two: tuple[str, str]) -> None:
    pointer = Pointer(store)
    live = pointer.live()

    async def run() -> None:
        await live.follow()
        pointer.before = lambda _: {}["missing"]  # type: ignore[index]
        releases.promote(store, two[1], actor="test")
        await live.follow()
        assert "KeyError" in live.health().switch_failed
        assert (await answer_of(live)).release == two[0]

    asyncio.run(run())
    live.close()


def test_a_damaged_pointer_leaves_the_release_answering(store: Store, two: tuple[str, str]) -> None:
    live = Pointer(store).live()

    async def run() -> None:
        await live.follow()
        store.path("apps", "default", "production.json").write_text("{")
        await live.follow()
        assert "pointer" in live.health().switch_failed
        assert (await answer_of(live)).release == two[0]

    asyncio.run(run())
    live.close()


def test_an_engine_that_fails_its_warm_up_is_never_switched_to(store: Store, two: tuple[str, str]) -> None:
    pointer = Pointer(store)
    engine = Said(Failure(kind="crash", message="no memory"))
    live = Live("default", lambda: two[0], lambda digest: with_engine(pointer.load(digest), engine))

    async def run() -> None:
        await live.follow()
        assert live.health().status == "starting"
        assert "no memory" in live.health().reason
        assert engine.closed

    asyncio.run(run())


# ---------------------------------------------------------------- one answer


def run_one(store: Store, digest: str, engine: Said, timeout_s: float = 30) -> list[str | Answer]:
    snapshot = with_engine(Pointer(store).load(digest), engine, timeout_s)

    async def run() -> list[str | Answer]:
        try:
            return [item async for item in snapshot.stream(QUERY)]
        finally:
            await asyncio.to_thread(snapshot.close)

    return asyncio.run(run())


def test_pieces_are_cleaned_as_the_answer_is(store: Store, two: tuple[str, str]) -> None:
    said = ("\n Ans", "wer: ", "Port ", "8000", ". ", "\n")
    *pieces, last = run_one(store, two[0], Said(*said, Generation(text="".join(said))))
    assert isinstance(last, Answer)
    assert "".join(str(p) for p in pieces) == last.text == "Port 8000."


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        (("Port", Failure(kind="crash", message="it died")), "crash"),
        ((Generation(text="  "),), "empty"),
        ((), "error"),
    ],
)
def test_no_answer_is_a_failure_and_never_an_empty_text(
    store: Store, two: tuple[str, str], items: tuple[str | Generation | Failure, ...], kind: str
) -> None:
    with pytest.raises(ServingFailure) as failed:
        run_one(store, two[0], Said(*items))
    assert failed.value.kind == kind


def test_an_answer_that_takes_too_long_is_a_timeout(store: Store, two: tuple[str, str]) -> None:
    async def make() -> Said:
        return Said("Port 8000 is it, ", "no", wait=asyncio.Event())

    engine = asyncio.run(make())
    with pytest.raises(ServingFailure) as failed:
        run_one(store, two[0], engine, timeout_s=0.2)
    assert failed.value.kind == "timeout"
    assert engine.left_early


def test_a_reader_that_goes_away_ends_the_generation(store: Store, two: tuple[str, str]) -> None:
    async def run() -> Said:
        engine = Said("Port 8000 is it, ", "and more", wait=asyncio.Event())
        snapshot = with_engine(Pointer(store).load(two[0]), engine)
        stream = snapshot.stream(QUERY)
        assert await anext(stream) == "Port 8000 is it,"
        await stream.aclose()
        await asyncio.to_thread(snapshot.close)
        return engine

    assert asyncio.run(run()).left_early


def test_a_stream_that_takes_too_long_ends_with_an_error_event(store: Store, two: tuple[str, str]) -> None:
    """Over HTTP another task reads the stream than the one that began it."""

    class SlowAfterWarmUp(Said):
        async def stream(self, prepared: Prepared) -> AsyncGenerator[str | Generation | Failure, None]:
            yield "Port 8000 is it, "
            if prepared.query == QUERY:
                await asyncio.sleep(60)
            yield Generation(text="Port 8000 is it, ")

    live = Live(
        "default", lambda: two[0], lambda digest: with_engine(Pointer(store).load(digest), SlowAfterWarmUp(), 1)
    )
    asyncio.run(live.follow())
    body = {"question": QUERY.question, "stream": True}
    reply = TestClient(build_api(live)).post("/v1/answers", json=body)
    *_, last = reply.text.strip().splitlines()
    assert reply.status_code == 200
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout"
    assert '"piece":"Port 8000 is it,"' in reply.text
    live.close()
