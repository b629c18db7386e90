"""prompt -> pieces of text, as they cross from the ingress to the engine. Light on purpose: no ray, no vllm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EnginePrompt:
    """A rendered prompt. `prompt` is what the prefix-affinity router compares, `token_ids` what the engine takes."""

    prompt: str
    token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class EnginePiece:
    """A piece of text; the last one carries the token counts."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
