"""reStructuredText -> Parsed: structure by docutils, spans in the file's own text; Sphinx does not have to be there."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.parsers.rst import Directive, Parser, directives, roles
from docutils.statemachine import StringList
from docutils.utils import new_document

from goldgate.pipeline.hypertext import visible_text
from goldgate.pipeline.parsed import BlockList, Lines, Parsed, fold, parser_identity
from goldgate.pipeline.schema import BlockKind

_DIRECTIVE_NAME = re.compile(r"\.\.[ ]+(?:\|[^|\n]+\|[ ]+)?([\w:+.-]+?)[ ]?::")
_ROLE_NAME = re.compile(r":([A-Za-z][\w:+.-]*):`|`:([A-Za-z][\w:+.-]*):")
_OPTION = re.compile(r"\s*:[\w-]+:(?:\s|$)")
# Left to docutils: tables, and what changes how the rest is read. Every other directive is one of the three below.
_DOCUTILS_DIRECTIVES = frozenset(
    {"table", "list-table", "csv-table", "replace", "unicode", "date", "role", "default-role", "class", "title", "meta",
     "sectnum", "section-numbering", "target-notes"}
)  # fmt: skip
_CODE_DIRECTIVES = frozenset(
    {"code", "code-block", "sourcecode", "parsed-literal", "math", "testcode", "testoutput", "testsetup", "testcleanup",
     "doctest", "code-cell", "prompt", "autosummary", "productionlist", "graphviz", "digraph", "mermaid", "highlight"}
)  # fmt: skip
_SILENT_DIRECTIVES = frozenset(
    {"toctree", "include", "literalinclude", "image", "contents", "index", "currentmodule", "module", "bibliography",
     "py:module", "py:currentmodule", "autoclass", "autofunction", "automodule", "automethod", "autoattribute",
     "autodata", "autoexception", "autodecorator", "click", "header", "footer"}
)  # fmt: skip
_ARGUMENT_IS_NO_PROSE = frozenset({"only", "ifconfig", "figure", "container", "raw", "div", "class", "grid", "tab-set"})
# docutils splits lines at these too, the other readers of the file do not: same length, no line end.
_ODD_LINE_ENDS = str.maketrans(dict.fromkeys("\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))
_TABLE_RULE = re.compile(r"[\s|+=-]*")
_FARTHEST_AHEAD = 5_000  # lines that are searched for a leaf whose line number docutils does not tell
_REGISTRY = threading.Lock()


_UNSEEN = (nodes.comment, nodes.substitution_definition, nodes.target, nodes.pending, nodes.field_name)


class _Silent(Directive):
    """A directive that says nothing to a reader: its content is elsewhere, or is for the machine."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return nothing."""
        return []


class _Anything(Directive):
    """Any directive with prose inside: a note, a tab, a card, and those of extensions that are not installed."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return what the directive holds, read as reStructuredText."""
        container = nodes.container()
        content, offset = self.without_options(keep_argument=self.name.lower() not in _ARGUMENT_IS_NO_PROSE)
        self.state.nested_parse(content, offset, container, match_titles=False)
        return [container]

    def without_options(self, keep_argument: bool) -> tuple[StringList, int]:
        """The content and its offset, without the `:option:` lines and, if asked, without the argument."""
        content, offset = self.content, self.content_offset
        argument = 1 if len(content) and offset < self.lineno else 0  # text on the line of the directive itself
        first = argument
        while first < len(content) and _OPTION.match(content[first]):
            first += 1
        if argument and keep_argument:
            for index in range(argument, first):
                content[index] = ""
            return content, offset
        return content[first:], offset + first


class _Code(_Anything):
    """A directive whose content is shown as it stands."""

    def run(self) -> list[nodes.Node]:
        """Return one literal block."""
        text = "\n".join(self.without_options(keep_argument=False)[0])
        if self.name.lower() == "math" and not text.strip():
            text = "\n".join(self.content)
        return [nodes.literal_block(text, text)] if text.strip() else []


class _Raw(_Anything):
    """HTML, LaTeX and so on for the writer; kept where a reader would see text."""

    def run(self) -> list[nodes.Node]:
        """Return one raw node."""
        text = "\n".join(self.without_options(keep_argument=False)[0])
        return [nodes.raw(text, text)] if text.strip() else []


def parse_restructured(text: str) -> Parsed:
    """Parse `text`. Unknown directives and roles are read through, never an error; files are never included."""
    source = text.translate(_ODD_LINE_ENDS)
    settings = get_default_settings(Parser)
    settings.report_level = settings.halt_level = 5
    settings.file_insertion_enabled = False
    settings.syntax_highlight = "none"
    settings.line_length_limit = 10**9
    document = new_document("document", settings)
    with _known_names(source):
        Parser().parse(source, document)
    reader = _Reader(Lines(text))
    reader.visit(document.children, level=0, kind="paragraph")
    headings = [block for block in reader.found.blocks if block.kind == "heading"]
    title = headings[0].title if headings else ""
    return Parsed(text, tuple(reader.found.blocks), parser_identity("docutils"), title)


@contextmanager
def _known_names(source: str) -> Iterator[None]:
    """Make every directive and role of this text known while it is parsed.

    The registries of docutils are per process, so they are put back afterwards.
    """
    known = directives._directives  # type: ignore[attr-defined]
    known_roles = roles._roles  # type: ignore[attr-defined]
    with _REGISTRY:
        before, roles_before = dict(known), dict(known_roles)
        try:
            names = {match.lower() for match in _DIRECTIVE_NAME.findall(source)} - _DOCUTILS_DIRECTIVES
            known.update({name: _directive_class(name) for name in names})
            for name in {(a or b).lower() for a, b in _ROLE_NAME.findall(source)}:
                if name not in roles._role_registry:  # type: ignore[attr-defined]
                    known_roles[name] = roles.GenericRole(name, nodes.inline)
            yield
        finally:
            known.clear()
            known.update(before)
            known_roles.clear()
            known_roles.update(roles_before)


def _directive_class(name: str) -> type[Directive]:
    if name in _SILENT_DIRECTIVES:
        return _Silent
    if name in _CODE_DIRECTIVES:
        return _Code
    return _Raw if name == "raw" else _Anything


@dataclass(slots=True)
class _Reader:
    """Walks the tree and finds each leaf's lines in the file, from the end of the leaf before."""

    lines: Lines
    found: BlockList = field(default_factory=BlockList)
    cursor: int = 0  # first line (from 0) that no block has taken

    def visit(self, children: Iterable[nodes.Node], level: int, kind: BlockKind) -> None:
        """Read the nodes in order; `level` is that of the section they are in, `kind` that of prose there."""
        for node in children:
            if isinstance(node, nodes.section):
                self.section(node, level + 1)
            elif isinstance(node, nodes.table):
                self.table(node)
            elif isinstance(node, nodes.definition_list_item):
                self.definition(node, level)
            elif isinstance(node, nodes.system_message):
                self.visit([n for n in node.children if isinstance(n, nodes.literal_block)], level, kind)
            elif isinstance(node, nodes.TextElement | nodes.raw):
                leaf_kind = _leaf_kind(node, kind)
                if leaf_kind:
                    self.leaf(node, leaf_kind)
            elif isinstance(node, nodes.Element):
                self.visit(node.children, level, _kind_inside(node, kind))

    def definition(self, node: nodes.definition_list_item, level: int) -> None:
        """A term and the start of its definition are one block."""
        before = len(self.found.blocks)
        self.visit([child for child in node.children if not isinstance(child, nodes.classifier)], level, "list")
        if len(self.found.blocks) > before + 1:
            term, start = self.found.blocks[before : before + 2]
            if start.kind == "list":
                self.found.blocks[before : before + 2] = [start.model_copy(update={"start": term.start})]

    def section(self, node: nodes.section, level: int) -> None:
        title = node.children[0]
        assert isinstance(title, nodes.title)  # noqa: S101  (docutils makes every section so)
        at = self.find([title.rawsource or title.astext()], (title.line or 0) - 2)
        if at is not None:
            name = fold(title.astext()) or "untitled"
            self.found.add("heading", self.lines.span(at, at), level=min(level, 6), title=name)
            self.cursor = at + 1
        self.visit(node.children[1:], level, "paragraph")

    def leaf(self, node: nodes.Element, kind: BlockKind) -> None:
        source = node.rawsource or node.astext()
        content = [line for line in source.splitlines() if line.strip()]
        if not content:
            return
        at = self.find(content, (getattr(node, "line", None) or 0) - 1)
        if at is None:
            return
        last = self.last_line(at, content)
        self.found.add(kind, self.lines.span(at, last))
        self.cursor = last + 1

    def table(self, node: nodes.table) -> None:
        starts: list[tuple[int, BlockKind]] = []
        for row in node.findall(nodes.row):
            cells = [leaf for leaf in row.findall(nodes.paragraph) if leaf.rawsource.strip()]
            at = self.row_line(cells)
            if at is not None:
                header = isinstance(row.parent, nodes.thead)
                starts.append((at, "table_header" if header else "table_row"))
                self.cursor = at
        end = self.table_end(node, starts[-1][0]) if starts else self.cursor
        for index, (at, kind) in enumerate(starts):
            last = starts[index + 1][0] - 1 if index + 1 < len(starts) else end
            while last > at and _TABLE_RULE.fullmatch(self.lines.line(last)):
                last -= 1
            self.found.add(kind, self.lines.span(at, max(at, last)))
            self.cursor = max(self.cursor, last + 1)

    def row_line(self, cells: Sequence[nodes.paragraph]) -> int | None:
        """The line where a table row starts: that of its first cell."""
        for cell in cells:
            text: str = cell.rawsource.splitlines()[0].strip()
            hint = (cell.line or 0) - 1
            for at in itertools.chain([hint], self.ahead()):
                if self.cursor <= at < len(self.lines) and text in self.lines.line(at):
                    return at
        return None

    def table_end(self, node: nodes.table, start: int) -> int:
        """The last line of the table's last row: up to the last line that one of its cells is found on."""
        last = start
        for cell in list(node.findall(nodes.row))[-1].findall(nodes.paragraph):
            count = len(cell.rawsource.splitlines())
            hint = (cell.line or 0) - 1
            if start <= hint < len(self.lines):
                last = max(last, min(hint + count - 1, len(self.lines) - 1))
        return last

    def find(self, content: Sequence[str], hint: int) -> int | None:
        """The first line at or after the cursor where `content` starts; the parser's own line number goes first."""
        if self.cursor <= hint < len(self.lines) and self.matches(hint, content):
            return hint
        return next((at for at in self.ahead() if self.matches(at, content)), None)

    def ahead(self) -> range:
        return range(self.cursor, min(len(self.lines), self.cursor + _FARTHEST_AHEAD))

    def matches(self, at: int, content: Sequence[str]) -> bool:
        """A marker may stand before the first line (`* `, `:field:`), nothing but indentation before the others."""
        if not _normal(self.lines.line(at)).endswith(_normal(content[0])):
            return False
        wanted = iter(content[1:])
        expected = next(wanted, None)
        for index in range(at + 1, len(self.lines)):
            if expected is None:
                return True
            line = self.lines.line(index)
            if not line.strip():
                continue
            if _normal(line) != _normal(expected):
                return False
            expected = next(wanted, None)
        return expected is None

    def last_line(self, at: int, content: Sequence[str]) -> int:
        """The line of the last of the `content` lines that start at line `at`."""
        left = len(content) - 1
        while left > 0:
            at += 1
            left -= bool(self.lines.line(at).strip())
        return at


def _normal(line: str) -> str:
    """A line without indentation, and without the backslashes and the `::` that docutils takes away."""
    return " ".join(line.translate(_ODD_LINE_ENDS).replace("\\", "").split()).removesuffix("::").rstrip(" :")


def _leaf_kind(node: nodes.Element, kind: BlockKind) -> BlockKind | None:
    """The kind of a leaf, or None for what a reader does not see."""
    if isinstance(
        node, nodes.comment | nodes.substitution_definition | nodes.target | nodes.pending | nodes.field_name
    ):
        return None
    if isinstance(node, nodes.raw):
        return "paragraph" if visible_text(node.astext()) else None
    if isinstance(node, nodes.literal_block | nodes.doctest_block | nodes.math_block):
        return "code"
    return kind


def _kind_inside(node: nodes.Element, kind: BlockKind) -> BlockKind:
    if isinstance(node, nodes.list_item | nodes.field | nodes.option_list_item):
        return "list"
    if isinstance(node, nodes.block_quote) and kind == "paragraph":
        return "quote"
    return kind
