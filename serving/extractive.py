"""Messages -> Generation without a model: the shipped double for tests and first steps."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence

from goldgate.pipeline.schema import Failure
from goldgate.serving.rendering import Generation, Messages, PlainRenderer, since

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_DOUBLE_SHARE = 0.5
_DOUBLE_REFUSAL = "I don't know."


class ExtractiveGenerator(PlainRenderer):
    """Answers with the sentence of the prompt that shares most words with the question. Quick and deterministic.

    The last line of the last user turn that begins with "Question:", else its last line, is the question; what stands
    before it in that turn is the passages.
    """

    def generate(self, batch: Sequence[Messages]) -> list[Generation | Failure]:
        """Return one Generation for each prompt, in order."""
        return [self._answer(messages) for messages in batch]

    def stream(self, messages: Messages) -> Iterator[str | Generation | Failure]:
        """Yield the answer word by word, then the Generation."""
        generation = self._answer(messages)
        yield from re.findall(r"\S+\s*", generation.text)
        yield generation

    def close(self) -> None:
        """Nothing to free."""

    def _answer(self, messages: Messages) -> Generation:
        started = time.monotonic()
        turn = next(m.content for m in reversed(messages) if m.role == "user").rstrip()
        passages, marked, rest = turn.rpartition("\nQuestion:")
        if not marked:
            passages, _, rest = turn.rpartition("\n")
        asked = _content_words(rest.split("\n")[0])
        sentences = [s.strip() for s in _SENTENCE_END.split(passages) if s.strip()]
        best, share = "", 0.0
        for sentence in sentences:
            found = len(asked & _content_words(sentence)) / len(asked) if asked else 0.0
            if found > share:
                best, share = re.sub(r"^\[\d+\]\s*", "", sentence), found
        text = best if share >= _DOUBLE_SHARE else _DOUBLE_REFUSAL
        prompt_tokens = self.count_tokens(self.render(messages))
        return Generation(
            text=text,
            prompt_tokens=prompt_tokens,
            completion_tokens=self.count_tokens(text),
            first_token_ms=since(started),
            total_ms=since(started),
        )


def _content_words(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.lower()) if len(word) > 3 or word.isdigit()}
