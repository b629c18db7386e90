"""text -> sentences: spans of sentences, one rule for chunking, citing and judging."""

from __future__ import annotations

import re

_STOP = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’»)\]]*+(?=\s) | [。！？｡]+["'”’」』）]* | \n[^\S\n]*(?=\n)""",
    re.VERBOSE,
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'])(?:e\.g|i\.e|cf|vs|etc|approx|resp|incl|esp|viz|al|Mr|Mrs|Ms|Dr|Prof|St|Fig|Figs|Eq|No|Nos|Vol|pp?|[A-Z])\.$"
)
_MARKER_ONLY = re.compile(r"[\s>|]*(?:[-*+•#>|]+|[(\[]?(?:\d{1,3}|[A-Za-z])[.)\]]+)?[\s.…]*\Z")

_LONGEST_MARKER = 16  # characters; also keeps the look back short on hostile text


def sentence_spans(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Half-open spans of the sentences of `text[start:end]`, in order, without surrounding whitespace.

    Together they hold every character that is not whitespace. A stop ends a sentence when whitespace and no
    lower-case letter follows; an abbreviation, an initial or a list marker does not. A blank line always ends one.
    """
    end = len(text) if end is None else end
    spans: list[tuple[int, int]] = []
    begin = start
    for stop in _STOP.finditer(text, start, end):
        if stop.end() > begin and _ends_sentence(text, begin, stop, end):
            _append(spans, text, begin, stop.end())
            begin = stop.end()
    _append(spans, text, begin, end)
    return spans


def _ends_sentence(text: str, begin: int, stop: re.Match[str], end: int) -> bool:
    mark = stop.group()
    if mark[0] == "\n" or mark[0] in "。！？｡":
        return True
    if stop.end() - begin <= _LONGEST_MARKER and _MARKER_ONLY.match(text, begin, stop.end()):
        return False
    following = _next_visible(text, stop.end(), end)
    if following.islower():
        return False
    return not (mark == "." and _ABBREVIATION.search(text, max(begin, stop.end() - _LONGEST_MARKER), stop.end()))


def _next_visible(text: str, position: int, end: int) -> str:
    while position < end and text[position].isspace():
        position += 1
    return text[position] if position < end else ""


def _append(spans: list[tuple[int, int]], text: str, begin: int, end: int) -> None:
    while begin < end and text[begin].isspace():
        begin += 1
    while end > begin and text[end - 1].isspace():
        end -= 1
    if begin < end:
        spans.append((begin, end))
