"""prompt -> pieces of text, as they cross from the ingress to the engine. Light on purpose: no ray, no vllm."""

from __future__ import annotations

import json
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


def piece_of(event: object) -> EnginePiece | None:
    """Return what one server-sent event of vLLM's completions endpoint says. Raises ValueError for an error."""
    if not isinstance(event, str):
        error = getattr(event, "error", event)
        raise ValueError(str(getattr(error, "message", error)))
    data = event.strip().removeprefix("data:").strip()
    if not data or data == "[DONE]":
        return None
    reply: dict[str, Any] = json.loads(data)
    if "error" in reply:
        raise ValueError(str(reply["error"].get("message", reply["error"])))
    usage = reply.get("usage") or {}
    text = "".join(choice.get("text") or "" for choice in reply.get("choices", []))
    return EnginePiece(text, usage.get("prompt_tokens"), usage.get("completion_tokens"))
