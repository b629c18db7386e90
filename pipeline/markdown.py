"""Markdown text -> Parsed: CommonMark and tables by markdown-it-py; the text stays the file's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token

from goldgate.pipeline.hypertext import visible_text
from goldgate.pipeline.parsed import BlockList, Lines, Parsed, fold, parser_identity
from goldgate.pipeline.schema import BlockKind

# MyST, the Markdown of Sphinx: a fence whose info is `{name} argument` is a directive.
_DIRECTIVE = re.compile(r"\{([\w:.+-]+)\}")
_CODE_DIRECTIVES = frozenset(
    {"code", "code-block", "code-cell", "sourcecode", "testcode", "testoutput", "doctest", "parsed-literal", "prompt",
     "math", "mermaid", "highlight", "csv-table", "autosummary"}
)  # fmt: skip
_SILENT_DIRECTIVES = frozenset(
    {"literalinclude", "include", "toctree", "tableofcontents", "contents", "image", "raw", "bibliography", "index",
     "currentmodule", "module", "meta"}
)  # fmt: skip
_OPTION = re.compile(r"\s*:[\w-]+:")
_TARGET = re.compile(r"\([^()\s][^()]*\)=")
_ATTRIBUTES = re.compile(r"\s*\{[#.:][^{}]*\}\s*$")
_DEEPEST_DIRECTIVE = 8


def parse_markdown(text: str, body_start: int = 0) -> Parsed:
    """Parse `text` from character `body_start`, which is where the front matter ends.

    Blocks hold offsets of the whole `text`. A heading counts as one only at the top level; a paragraph inside a list
    item is a `list` block and starts at the item's marker.
    """
    lines = Lines(text)
    first = lines.starts.index(body_start) if body_start in lines.starts else 0
    found = BlockList()
    _walk(_tokens(text[body_start:]), lines, first, found, depth=0)
    headings = [block for block in found.blocks if block.kind == "heading"]
    title = headings[0].title if headings else ""
    return Parsed(text, tuple(found.blocks), parser_identity("markdown-it-py"), title)


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table")


def _tokens(text: str) -> list[Token]:
    return _parser().parse(text)


def _walk(tokens: Sequence[Token], lines: Lines, offset: int, found: BlockList, depth: int) -> None:
    containers: list[str] = []
    for index, token in enumerate(tokens):
        if token.type in {"list_item_open", "blockquote_open"}:
            containers.append(token.type)
        elif token.type in {"list_item_close", "blockquote_close"}:
            containers.pop()
        if token.map is None or token.map[0] >= token.map[1]:
            continue
        span = lines.span(offset + token.map[0], offset + token.map[1] - 1)
        if token.type == "heading_open":
            _heading(token, tokens[index + 1], span, bool(containers) or depth > 0, found)
        elif token.type == "fence":
            _fence(token, lines, offset, found, depth)
        elif kind := _kind(tokens, index, containers):
            found.add(kind, span)


def _kind(tokens: Sequence[Token], index: int, containers: Sequence[str]) -> BlockKind | None:
    """The kind of the block that opens here, if one does that a reader sees."""
    token = tokens[index]
    if token.type == "paragraph_open" and not _TARGET.fullmatch(tokens[index + 1].content):
        if "list_item_open" in containers:
            return "list"
        return "quote" if containers else "paragraph"
    if token.type == "tr_open":
        return "table_header" if tokens[index - 1].type == "thead_open" else "table_row"
    if token.type == "code_block":
        return "code"
    if token.type == "html_block" and visible_text(token.content):
        return "paragraph"
    return None


def _heading(opening: Token, inline: Token, span: tuple[int, int], nested: bool, found: BlockList) -> None:
    title = fold(_ATTRIBUTES.sub("", "".join(_plain(inline.children or ()))))
    if nested or not title:
        found.add("paragraph", span)
    else:
        found.add("heading", span, level=int(opening.tag[1]), title=title)


def _plain(tokens: Sequence[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type in {"text", "code_inline"}:
            yield token.content
        elif token.type in {"softbreak", "hardbreak"}:
            yield " "
        elif token.type == "image":
            yield from _plain(token.children or ())


def _fence(token: Token, lines: Lines, offset: int, found: BlockList, depth: int) -> None:
    assert token.map is not None  # noqa: S101  (a fence always has one)
    first, last = offset + token.map[0], offset + token.map[1] - 1
    body = token.content.splitlines()
    directive = _DIRECTIVE.match(token.info.strip())
    name = directive.group(1).lower() if directive else ""
    skipped = _option_lines(body) if directive else 0
    if name in _SILENT_DIRECTIVES or not any(line.strip() for line in body[skipped:]):
        return
    if not directive or name in _CODE_DIRECTIVES or depth >= _DEEPEST_DIRECTIVE:
        found.add("code", lines.span(first, last))
    else:  # a note, a tab, a card: Markdown inside
        _walk(_tokens("\n".join(body[skipped:])), lines, first + 1 + skipped, found, depth + 1)


def _option_lines(body: Sequence[str]) -> int:
    """How many lines at the start of a directive are options: `:key: value` lines or a `---` YAML block."""
    if body and body[0].strip() == "---":
        closing = next((i for i, line in enumerate(body[1:], 1) if line.strip() == "---"), None)
        return 0 if closing is None else closing + 1
    count = 0
    while count < len(body) and _OPTION.match(body[count]):
        count += 1
    return count
