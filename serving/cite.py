"""answer, passages -> Citations: which sentence of which passage supports each sentence of an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from goldgate.pipeline.schema import Citation, Passage
from goldgate.pipeline.sentences import sentence_spans

SUPPORT = 0.6
"""Share of an answer sentence's words that a passage sentence must hold to support it."""

MARKED_SUPPORT = 0.3
"""The same where the answer itself names the passage, as in [2]."""

_MARK = re.compile(r"\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")
_LEADING_MARKS = re.compile(rf"(?:\s*{_MARK.pattern})+")
_WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|\w+(?:['’]\w+)?")
_STOP_TEXT = """
a an and are as at be been but by did do does for from had has have he her his i if in into is it its of on or she so
than that the their them then there these they this those to was we were what when where which who whom why will with
would you your
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())


@dataclass(frozen=True)
class _Candidate:
    """One sentence of a passage; start and end are offsets in its document."""

    passage: int
    document: str
    start: int
    end: int
    quote: str
    words: frozenset[str]


def cite(text: str, passages: Sequence[Passage]) -> tuple[Citation, ...]:
    """Return the supporting sentences of an answer, in the order of its sentences, each once.

    A sentence whose numbers a passage sentence lacks is not supported by it, however many words they share. A mark
    like [2] restricts its sentence to passage 2, unless nothing there supports it: a small model names the wrong
    passage now and then, and the source is then the passage that does hold the sentence. A sentence without support
    gets no citation.
    """
    candidates = list(_candidates(passages))
    found: dict[tuple[str, int, int], Citation] = {}
    for start, end in _marked_sentences(text):
        for best in _support(text[start:end], candidates, len(passages)):
            key = (best.document, best.start, best.end)
            found.setdefault(
                key,
                Citation(
                    document=best.document, start=best.start, end=best.end, passage=best.passage, quote=best.quote
                ),
            )
    return tuple(found.values())


def _marked_sentences(text: str) -> list[tuple[int, int]]:
    """Sentences, each with the marks behind its full stop: `It is 3. [2] It is 4. [1]` is two."""
    spans: list[tuple[int, int]] = []
    for start, end in sentence_spans(text):
        marks = _LEADING_MARKS.match(text, start, end) if spans else None
        if marks:
            spans[-1] = (spans[-1][0], marks.end())
            start = marks.end()  # noqa: PLW2901 - what is left of the sentence
        if text[start:end].strip():
            spans.append((start, end))
    return spans


def body_of(passage: Passage) -> tuple[str, int]:
    """Return the part of a passage's text that is the document's own, and its offset there.

    A passage's text is its heading path, the table header where needed, then text[start:end] of the document.
    """
    length = passage.end - passage.start
    if 0 < length <= len(passage.text):
        return passage.text[-length:], passage.start
    return passage.text, passage.start


def _candidates(passages: Sequence[Passage]) -> Iterator[_Candidate]:
    for number, passage in enumerate(passages, start=1):
        body, offset = body_of(passage)
        for start, end in sentence_spans(body):
            quote = body[start:end]
            yield _Candidate(number, passage.document, offset + start, offset + end, quote, words(quote))


def _support(sentence: str, candidates: Sequence[_Candidate], passages: int) -> list[_Candidate]:
    asked = words(_MARK.sub(" ", sentence))
    if not asked:
        return []
    marked = sorted({int(n) for mark in _MARK.findall(sentence) for n in mark.split(",") if 1 <= int(n) <= passages})
    if marked:
        per_mark = [_best(asked, [c for c in candidates if c.passage == n], MARKED_SUPPORT) for n in marked]
        found = [best for best in per_mark if best is not None]
        if found:
            return found
    best = _best(asked, candidates, SUPPORT)
    return [] if best is None else [best]


def _best(asked: frozenset[str], candidates: Sequence[_Candidate], threshold: float) -> _Candidate | None:
    numbers = {word for word in asked if word[0].isdigit()}
    best, best_rank = None, (threshold, 0.0)
    for candidate in candidates:
        shared = asked & candidate.words
        if not numbers <= candidate.words or not shared:
            continue
        # Of two sentences that hold as much of the answer, the one with less beside it is the closer source.
        rank = (len(shared) / len(asked), len(shared) / len(candidate.words))
        if rank > best_rank:
            best, best_rank = candidate, rank
    return best


def words(text: str) -> frozenset[str]:
    """Return the words that carry meaning, lower case, without the s of a plural or possessive; numbers whole."""
    found = (word.lower().replace("’", "'").removesuffix("'s") for word in _WORD.findall(text))
    return frozenset(
        word if word[0].isdigit() or len(word) < 4 or word.endswith("ss") else word.removesuffix("s")
        for word in found
        if word not in _STOP_WORDS
    )
