"""How the ingress drives the engine's handle. The handle is a stand-in here; the real one is in test_app_engine.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import pytest

from goldgate.pipeline.params import AnswerParams
from goldgate.pipeline.schema import Failure, Principal, Query
from goldgate.pipeline.store import Store
from goldgate.serving.answer import Prepared
from goldgate.serving.generate import Generation, VllmRenderer
from goldgate.serving.handle import EnginePiece, EnginePrompt, piece_of
from goldgate.serving.ingress import EnginePulse, HandleEngine
from goldgate.serving.model import ModelSpec, build_model
from tests.serving.models import model_folder

PROMPT = "<|im_start|>user\nWhich port?<|im_end|>\n<|im_start|>assistant\n"
PREPARED = Prepared(Query(question="Which port?", principal=Principal()), "key", (), (), PROMPT)


class Response:
    """What a streaming handle returns: an iterator that can be cancelled."""

    def __init__(self, *items: EnginePiece | Exception) -> None:
        self.items = items
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[EnginePiece]:
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle that answers with one response and keeps what it was sent."""

    def __init__(self, response: Response) -> None:
        self.response = response
        self.sent: list[EnginePrompt] = []

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    @property
    def generate_text(self) -> Handle:
        return self

    def remote(self, prompt: EnginePrompt) -> Response:
        self.sent.append(prompt)
        return self.response


@pytest.fixture
def renderer(store: Store, tmp_path: Path) -> VllmRenderer:
    sampling = {"max_tokens": 12, "stop": ["\n"]}
    source = str(model_folder(tmp_path / "weights"))
    spec = ModelSpec.model_validate({"name": "m", "kind": "vllm", "source": source, "sampling": sampling})
    return VllmRenderer(build_model(spec, store), AnswerParams())


def collect(engine: HandleEngine) -> list[str | Generation | Failure]:
    async def run() -> list[str | Generation | Failure]:
        return [item async for item in engine.stream(PREPARED)]

    return asyncio.run(run())


def test_the_engine_gets_the_judged_prompt_and_sampling(renderer: VllmRenderer) -> None:
    handle = Handle(Response(EnginePiece("Port "), EnginePiece("8000."), EnginePiece("", 7, 3)))
    *pieces, last = collect(HandleEngine(handle, renderer))
    assert pieces == ["Port ", "8000."]
    assert isinstance(last, Generation)
    assert (last.text, last.prompt_tokens, last.completion_tokens) == ("Port 8000.", 7, 3)
    (sent,) = handle.sent
    assert sent.prompt == PROMPT
    assert list(sent.token_ids) == renderer.encode(PROMPT)
    assert sent.sampling == {"temperature": 0.0, "max_tokens": 12, "stop": ["\n"]}
    assert not handle.response.cancelled


def test_an_engine_that_fails_is_a_failure(renderer: VllmRenderer) -> None:
    handle = Handle(Response(EnginePiece("Port "), ValueError("trace\nValueError: out of blocks")))
    assert collect(HandleEngine(handle, renderer)) == [
        "Port ",
        Failure(kind="crash", message="the engine failed: ValueError: out of blocks"),
    ]


def test_a_reader_that_goes_away_cancels_the_request_in_the_engine(renderer: VllmRenderer) -> None:
    handle = Handle(Response(EnginePiece("Port "), EnginePiece("8000.")))

    async def run() -> None:
        stream = HandleEngine(handle, renderer).stream(PREPARED)
        assert await anext(stream) == "Port "
        await stream.aclose()

    asyncio.run(run())
    assert handle.response.cancelled


class Alive:
    """The handle's method `alive`: what it says next, and how often it was asked."""

    def __init__(self, *said: object) -> None:
        self.said = list(said)
        self.sent: list[EnginePrompt] = []
        self.cancelled = 0

    def options(self, stream: bool) -> Alive:
        assert not stream
        return self

    @property
    def alive(self) -> Alive:
        return self

    def remote(self, probe: EnginePrompt) -> Alive:
        self.sent.append(probe)
        return self

    def __await__(self) -> Generator[Any, None, None]:
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        yield from asyncio.sleep(float(str(said))).__await__()

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_dead_engine_is_told_and_a_restarted_one_too() -> None:
    handle = Alive(RuntimeError("trace\nEngineDeadError: the core died"), 0)

    async def run() -> list[str]:
        pulse = EnginePulse(handle, fresh_s=0)
        return [await pulse.trouble(), await pulse.trouble()]

    assert asyncio.run(run()) == ["the engine failed: EngineDeadError: the core died", ""]
    assert handle.sent[0].prompt  # the router looks for a prompt, and divides by its length


def test_an_engine_that_says_nothing_is_not_waited_for() -> None:
    handle = Alive(3600)

    async def run() -> str:
        return await EnginePulse(handle, alive_s=0.01).trouble()

    assert asyncio.run(run()) == "the engine says nothing for 0.01 s"
    assert handle.cancelled == 1


def test_many_callers_ask_once_and_not_again_at_once() -> None:
    handle = Alive(ValueError("no"))

    async def run() -> set[str]:
        pulse = EnginePulse(handle, fresh_s=3600)
        first = await asyncio.gather(*(pulse.trouble() for _ in range(20)))
        return {*first, await pulse.trouble()}

    assert asyncio.run(run()) == {"the engine failed: no"}
    assert len(handle.sent) == 1


def test_a_caller_that_goes_away_ends_no_question_of_others() -> None:
    handle = Alive(0.05)

    async def run() -> str:
        pulse = EnginePulse(handle)
        gone = asyncio.create_task(pulse.trouble())
        stays = asyncio.create_task(pulse.trouble())
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert asyncio.run(run()) == ""
    assert len(handle.sent) == 1


def test_what_the_engine_generates_is_a_sign_of_life(renderer: VllmRenderer) -> None:
    """A busy engine is not asked: the question would wait behind all the others and be taken for silence."""
    asked = Alive(ValueError("never asked"))
    handle = Handle(Response(EnginePiece("Port "), EnginePiece("8000.", 7, 3)))

    async def run() -> str:
        pulse = EnginePulse(asked, fresh_s=3600)
        async for _ in HandleEngine(handle, renderer, pulse).stream(PREPARED):
            pass
        return await pulse.trouble()

    assert asyncio.run(run()) == ""
    assert asked.sent == []


def test_what_vllm_sends() -> None:
    event = {"choices": [{"text": "Port "}], "usage": None}
    assert piece_of(f"data: {json.dumps(event)}\n\n") == EnginePiece("Port ")
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    assert piece_of(f"data: {json.dumps(usage)}\n\n") == EnginePiece("", 7, 3)
    assert piece_of("data: [DONE]\n\n") is None
    with pytest.raises(ValueError, match="too long"):
        piece_of('data: {"error": {"message": "the prompt is too long"}}\n\n')
    with pytest.raises(ValueError, match="no"):
        piece_of(Failure(kind="error", message="no"))
