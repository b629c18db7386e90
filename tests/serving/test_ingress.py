"""How the ingress drives the engine's handle. The handle is a stand-in here; the real one is in test_app_engine.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from goldgate.pipeline.params import AnswerParams
from goldgate.pipeline.schema import Failure, Principal, Query
from goldgate.pipeline.store import Store
from goldgate.serving.answer import Prepared
from goldgate.serving.generate import Generation, VllmRenderer
from goldgate.serving.handle import EnginePiece, EnginePrompt, piece_of
from goldgate.serving.ingress import HandleEngine
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
