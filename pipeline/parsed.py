"""source text -> lines and blocks: what every parser returns, and how its line numbers become character spans."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version

from goldgate.pipeline.schema import Block, BlockKind

_LINE_END = re.compile(r"\r\n?|\n")


class UnparsableError(Exception):
    """Raised by a parser: the bytes are not a document of this type. The message is the reason shown to a person."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """The text that character spans refer to, its blocks in order, and what made them."""

    text: str
    blocks: tuple[Block, ...]
    parser: str
    title: str = ""
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Lines:
    """The lines of a text as the parsers count them (`\\n`, `\\r\\n` or `\\r` ends a line), with their spans."""

    text: str
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Find where each line starts."""
        self.starts = [0, *(end.end() for end in _LINE_END.finditer(self.text))]

    def __len__(self) -> int:
        """Number of lines; the last one may be empty."""
        return len(self.starts)

    def line(self, index: int) -> str:
        """Line `index` (from 0) without its line end."""
        return self.text[self.starts[index] : self._end(index)].rstrip("\r\n")

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Characters of the lines `first` to `last` (from 0, both included) without surrounding whitespace."""
        start, end = self.starts[first], self._end(last)
        while start < end and self.text[start].isspace():
            start += 1
        while end > start and self.text[end - 1].isspace():
            end -= 1
        return start, end

    def _end(self, index: int) -> int:
        return self.starts[index + 1] if index + 1 < len(self.starts) else len(self.text)


@dataclass(slots=True)
class BlockList:
    """Collects blocks in order; an empty one, or one that overlaps the block before it, is cut or left out."""

    blocks: list[Block] = field(default_factory=list)

    def add(self, kind: BlockKind, span: tuple[int, int], level: int = 0, title: str = "") -> None:
        """Append the block when some of `span` lies after the last block."""
        start = max(span[0], self.blocks[-1].end if self.blocks else 0)
        if start < span[1]:
            self.blocks.append(Block(kind=kind, start=start, end=span[1], level=level, title=title))


@cache
def parser_identity(*packages: str) -> str:
    """`name version` of each package, as installed when it was first asked for: looking it up reads files."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


def fold(text: str) -> str:
    """One line: every run of whitespace becomes one space."""
    return " ".join(text.split())
