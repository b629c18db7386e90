"""Messages -> Generation: vLLM in this process; an OpenAI-compatible endpoint and the double lie in their own modules.

A `Renderer` (rendering.py) turns messages into the exact prompt text and names everything that decides the answer; a
`Generator` is a renderer that can also generate.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from goldgate.pipeline.errors import EnvironmentFailure
from goldgate.pipeline.params import AnswerParams
from goldgate.pipeline.schema import Failure
from goldgate.serving.model import OFFLINE, Model, ModelSpec, environment, verify_files
from goldgate.serving.rendering import (
    Generation,
    Messages,
    PlainRenderer,
    Renderer,
    VllmRenderer,
    engine_arguments,
    load_renderer,
    sampling_arguments,
    since,
)

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

__all__ = [
    "Generation",
    "Generator",
    "Messages",
    "PlainRenderer",
    "Renderer",
    "VllmGenerator",
    "VllmRenderer",
    "engine_arguments",
    "load_generator",
    "load_renderer",
    "sampling_arguments",
]

_ENVIRONMENT = {
    **OFFLINE,
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # A separate engine process would start on the first prompt before it has seen the others: batches would differ from
    # run to run, and with them bf16 results.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Generator(Renderer, Protocol):
    """A renderer that generates. Use as a context manager or call `close`."""

    def generate(self, batch: Sequence[Messages]) -> list[Generation | Failure]:
        """Return one result for each prompt, in order; prompts are taken `self.batch` at a time."""

    def stream(self, messages: Messages) -> Iterator[str | Generation | Failure]:
        """Yield pieces of text as they come, then the whole Generation, or the Failure that ended it."""

    def close(self) -> None:
        """Free the engine. Calling it twice is allowed."""


def load_generator(model: Model, params: AnswerParams) -> Generator:
    """Return `model` ready to generate.

    Raises UsageError (address not set), EnvironmentFailure (files damaged, engine not installed or not starting).
    """
    from goldgate.serving.endpoint import OpenAIGenerator
    from goldgate.serving.extractive import ExtractiveGenerator

    if model.spec.kind == "vllm":
        return VllmGenerator(model, params)
    if model.spec.kind == "openai":
        return OpenAIGenerator(model, params)
    return ExtractiveGenerator(model, params)


# ---------------------------------------------------------------- vLLM in this process


class VllmGenerator(VllmRenderer):
    """vLLM in this process: greedy, fixed order and batch size, nothing on stdout."""

    def __init__(self, model: Model, params: AnswerParams) -> None:
        """Verify the files and start the engine (about 30 s). Raises EnvironmentFailure in one line."""
        super().__init__(model, params)
        verify_files(self.path)
        self._timeout_s = params.timeout_s
        self._requests = itertools.count()
        # Only while it starts: Ray's workers inherit our environment, and they are to start the engine their own way.
        settings = {**_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(self.spec.engine.kv_cache_gib)}
        try:
            with environment(settings):
                self._llm: Any = self._start()
        except ImportError as error:
            raise EnvironmentFailure(
                f"the engine of model {self.spec.name} is not installed ({error.name})", "", "install goldgate[cpu]"
            ) from error
        except Exception as error:  # an engine that does not start raises anything
            raise EnvironmentFailure(
                f"vLLM does not start with model {self.spec.name}: {type(error).__name__}: {str(error)[:300]}",
                "",
                "check the [engine] table of the model file and the free memory (goldgate doctor)",
            ) from error

    def _start(self) -> object:
        import torch

        self._set_num_threads = torch.set_num_threads  # the CPU worker replaces it by a warning
        from vllm import LLM

        return LLM(model=str(self.path), seed=self.spec.sampling.seed, **engine_arguments(self.spec, self.batch))

    def generate(self, batch: Sequence[Messages]) -> list[Generation | Failure]:
        """Return one result for each prompt; a prompt that is too long, a time-out or a crash is a Failure."""
        results: list[Generation | Failure] = []
        for start in range(0, len(batch), self.batch):
            rendered = [self.render(messages) for messages in batch[start : start + self.batch]]
            last = {number: item for number, item in self._run(rendered) if not isinstance(item, str)}
            results.extend(last[number] for number in range(len(rendered)))
        return results

    def stream(self, messages: Messages) -> Iterator[str | Generation | Failure]:
        """Yield pieces of text, then the Generation or Failure."""
        for _, item in self._run([self.render(messages)]):
            yield item

    def close(self) -> None:
        """Free the engine's memory and put back what it replaced in this process."""
        if self._llm is None:
            return
        import gc

        import torch
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()
        torch.set_num_threads = self._set_num_threads
        gc.collect()

    def _run(self, rendered: Sequence[str]) -> Iterator[tuple[int, str | Generation | Failure]]:
        """Generate `rendered` together; yields (number, piece of text) and, once for each, (number, result)."""
        engine = self._llm.llm_engine
        started = time.monotonic()
        numbers: dict[str, int] = {}
        state = [_Progress() for _ in rendered]
        try:
            for number, text in enumerate(rendered):
                ids = self.encode(text)
                if len(ids) + self.spec.sampling.max_tokens > self.spec.engine.max_model_len:
                    yield number, Failure(kind="budget", message=_too_long(len(ids), self.spec))
                    continue
                request = str(next(self._requests))
                engine.add_request(request, {"prompt_token_ids": ids}, self._sampling())
                numbers[request] = number
            while numbers and time.monotonic() - started < self._timeout_s:
                for output in engine.step():
                    number = numbers[output.request_id]
                    yield from ((number, piece) for piece in state[number].advance(output, started))
                    if output.finished:
                        del numbers[output.request_id]
                        yield number, state[number].result(output, started)
        except Exception as error:  # noqa: BLE001 - a crash of the engine is data, for the questions it had in hand
            for number in numbers.values():
                yield number, Failure(kind="crash", message=f"{type(error).__name__}: {str(error)[:300]}")
            self._abort(numbers)
            numbers = {}
        finally:
            # Also when the reader of a stream goes away, or on Ctrl-C: nothing may stay behind in the engine.
            self._abort(numbers)
        for number in numbers.values():
            yield number, Failure(kind="timeout", message=f"no answer within {self._timeout_s:g} s")

    def _abort(self, numbers: dict[str, int]) -> None:
        if numbers and self._llm is not None:
            with contextlib.suppress(Exception):
                self._llm.llm_engine.abort_request(list(numbers))

    def _sampling(self) -> object:
        from vllm import SamplingParams

        arguments = sampling_arguments(self.spec)
        if "logit_bias" in arguments:  # the endpoint takes the ids as text, as JSON must have them
            arguments["logit_bias"] = {int(token): bias for token, bias in arguments["logit_bias"].items()}
        return SamplingParams(**arguments)


class _Progress:
    """What was seen of one request so far."""

    def __init__(self) -> None:
        self.text = ""
        self.first_token_ms: float | None = None

    def advance(self, output: RequestOutput, started: float) -> list[str]:
        if self.first_token_ms is None and output.outputs[0].token_ids:
            self.first_token_ms = since(started)
        piece = output.outputs[0].text[len(self.text) :]
        self.text += piece
        return [piece] if piece else []

    def result(self, output: RequestOutput, started: float) -> Generation:
        return Generation(
            text=output.outputs[0].text,
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(output.outputs[0].token_ids),
            first_token_ms=self.first_token_ms,
            total_ms=since(started),
        )


def _too_long(tokens: int, spec: ModelSpec) -> str:
    room = spec.engine.max_model_len - spec.sampling.max_tokens
    return f"the prompt has {tokens} tokens, the model {spec.name} takes {room} beside its answer"
