"""Messages -> Generation by an OpenAI-compatible endpoint, through the official client."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from goldgate.pipeline.errors import UsageError
from goldgate.pipeline.interrupts import map_in_threads
from goldgate.pipeline.params import AnswerParams
from goldgate.pipeline.schema import Failure
from goldgate.serving.model import Model
from goldgate.serving.rendering import Generation, Messages, PlainRenderer, sampling_arguments, since

if TYPE_CHECKING:
    from openai.types import CompletionUsage


class OpenAIGenerator(PlainRenderer):
    """Any OpenAI-compatible endpoint, by the official client. The environment names its address and key."""

    def __init__(self, model: Model, params: AnswerParams) -> None:
        """Make the client; nothing is sent yet. Raises UsageError when the address is not set."""
        super().__init__(model, params)
        import openai

        url = os.environ.get(self.spec.url_env, "")
        if not re.match(r"^https?://", url):
            raise UsageError(
                f"the environment variable {self.spec.url_env} holds no address for model {self.spec.name}",
                "a base URL such as http://localhost:8000/v1",
                f"set {self.spec.url_env}",
            )
        key = os.environ.get(self.spec.key_env, "") if self.spec.key_env else ""
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=url, api_key=key or "none", max_retries=self.spec.retries, timeout=params.timeout_s
        )

    def generate(self, batch: Sequence[Messages]) -> list[Generation | Failure]:
        """Return one result for each prompt, in order; `self.batch` requests are under way at a time."""
        return list(map_in_threads(self._ask, batch, self.batch))

    def stream(self, messages: Messages) -> Iterator[str | Generation | Failure]:
        """Yield pieces of text, then the Generation or Failure."""
        started = time.monotonic()
        text, first, usage = "", None, None
        try:
            for chunk in self._client.chat.completions.create(
                **self._arguments(messages), stream=True, stream_options={"include_usage": True}
            ):
                usage = getattr(chunk, "usage", None) or usage
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece:
                    first = since(started) if first is None else first
                    text += piece
                    yield piece
        except Exception as error:  # noqa: BLE001 - whatever an endpoint does is data
            yield self._failure(error)
            return
        yield self._generation(text, usage, first, started)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, messages: Messages) -> Generation | Failure:
        started = time.monotonic()
        try:
            reply = self._client.chat.completions.create(**self._arguments(messages))
            text = reply.choices[0].message.content or ""
            return self._generation(text, reply.usage, None, started)
        except Exception as error:  # noqa: BLE001 - whatever an endpoint does is data
            return self._failure(error)

    def _arguments(self, messages: Messages) -> dict[str, Any]:
        sampling = sampling_arguments(self.spec)
        penalty = sampling.pop("repetition_penalty", None)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        extra = {} if penalty is None else {"extra_body": {"repetition_penalty": penalty}}
        return {"model": self.spec.model, "messages": turns, **sampling, **extra}

    def _generation(
        self, text: str, usage: CompletionUsage | None, first: float | None, started: float
    ) -> Generation | Failure:
        if not text.strip():
            return Failure(kind="empty", message=f"the endpoint of {self.spec.name} answered with nothing")
        return Generation(
            text=text,
            prompt_tokens=getattr(usage, "prompt_tokens", None),
            completion_tokens=getattr(usage, "completion_tokens", None),
            first_token_ms=first,
            total_ms=since(started),
        )

    def _failure(self, error: Exception) -> Failure:
        """Name what went wrong, without the reply's body: an endpoint may echo a key in it."""
        client, name = self._openai, self.spec.name
        if isinstance(error, client.RateLimitError):
            return Failure(kind="rate_limited", message=f"the endpoint of {name} answered 429 too often")
        if isinstance(error, client.APITimeoutError):
            return Failure(kind="timeout", message=f"the endpoint of {name} did not answer in time")
        if isinstance(error, client.APIConnectionError):
            return Failure(kind="unreachable", message=f"the endpoint of {name} cannot be reached")
        if isinstance(error, client.APIStatusError):
            return Failure(kind="http", message=f"the endpoint of {name} answered {error.status_code}")
        return Failure(
            kind="malformed", message=f"the endpoint of {name} sent no chat completion ({type(error).__name__})"
        )
