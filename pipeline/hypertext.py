"""HTML bytes -> Parsed: what a reader sees, as text, with headings, lists, tables and code as blocks.

The tree comes from lxml. inscriptis was tried for the text: it lays the cells of a row side by side, so that cells of
several lines interleave and their spans are wrong; here a row is one line of cells.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from lxml import etree, html

from goldgate.pipeline.parsed import Parsed, UnparsableError, fold, parser_identity
from goldgate.pipeline.schema import Block, BlockKind

_DROPPED = frozenset(
    {"script", "style", "noscript", "template", "nav", "svg", "iframe", "object", "canvas", "audio", "video", "map",
     "button", "select", "textarea", "input", "datalist", "dialog", "head", "link", "meta"}
)  # fmt: skip
_DROPPED_ROLES = frozenset({"navigation", "banner", "contentinfo", "search", "menu", "menubar", "toolbar", "dialog"})
# Class names by which documentation generators (DocBook, Sphinx, Doxygen, MkDocs) mark what is around the page.
_DROPPED_CLASSES = frozenset(
    {"navheader", "navfooter", "navbar", "nav", "sidebar", "sphinxsidebar", "related", "breadcrumb", "breadcrumbs",
     "headerlink", "toc", "site-header", "site-footer", "skip-link", "cookie-banner", "pagination"}
)  # fmt: skip
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt",
     "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr",
     "html", "legend", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th",
     "thead", "tr", "ul"}
)  # fmt: skip
# A heading in one of these names the box, not what follows it.
_BOXES = frozenset({"aside", "blockquote", "td", "th", "li", "dd", "figure", "details"})
_BOX_CLASSES = frozenset({"note", "tip", "warning", "caution", "important", "admonition", "sidebar-box", "callout"})
_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
_COUNTED = frozenset({"pre", "blockquote", "main", "article"})
_LISTS = frozenset({"ul", "ol", "dl"})
_HIDDEN_STYLE = re.compile(r"(?:display\s*:\s*none|visibility\s*:\s*hidden)")
_MOST_SPANNED_ROWS = 100


def parse_html(data: bytes, first_row_is_header: bool = False, parser: str = "") -> Parsed:
    """Parse UTF-8 `data`. Raises UnparsableError when there is no element in it.

    Navigation, scripts, styles, hidden elements and the page's own header and footer are left out; a page that has
    nothing else keeps them. `first_row_is_header` treats the first row of a table without header cells as its header.
    """
    root = parse_tree(data)
    page = _Page(first_row_is_header)
    page.read(root, keep_boilerplate=False)
    if not any(block.kind != "heading" for block in page.blocks):
        page = _Page(first_row_is_header)
        page.read(root, keep_boilerplate=True)
    title = fold(" ".join(root.xpath("//head/title[1]//text()")))
    first = [block for block in page.blocks if block.kind == "heading"]
    main = next((block.title for block in first if block.level == 1), "")
    title = main or title or (first[0].title if first else "")
    return Parsed("".join(page.pieces), tuple(page.blocks), parser or parser_identity("lxml"), title)


def parse_tree(data: bytes) -> etree._Element:
    """The element tree of UTF-8 `data`; whatever charset it declares has been honoured before."""
    parser = html.HTMLParser(encoding="utf-8", huge_tree=True)
    try:
        root = html.document_fromstring(data, parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError) as error:
        raise UnparsableError(f"is not HTML: {error}") from None
    if any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in parser.error_log):  # the rest was dropped
        raise UnparsableError("is HTML that is nested too deep, or otherwise beyond the limits of libxml2")
    return root


def visible_text(fragment: str) -> str:
    """What a reader sees of an HTML fragment inside another format, on one line; empty for a comment or an image."""
    try:
        page = _Page(first_row_is_header=False)
        page.read(parse_tree(fragment.encode()), keep_boilerplate=False)
    except UnparsableError:
        return ""
    return fold("".join(page.pieces))


@dataclass(slots=True)
class _Table:
    """A table while it is read."""

    layout: bool
    rows: int = 0
    header: bool = False
    headed: bool = False  # a header row has been written
    cells: list[str] = field(default_factory=list)
    spanning: dict[int, tuple[int, str]] = field(default_factory=dict)  # column -> rows left, text
    span: int = 1
    in_cell: bool = False


@dataclass(slots=True)
class _Page:
    """Writes the text and the blocks while the tree is walked, without recursion."""

    first_row_is_header: bool
    pieces: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    length: int = 0
    inline: list[str] = field(default_factory=list)
    lists: list[tuple[str, int]] = field(default_factory=list)  # ("ul" | "ol" | "dl", items so far)
    marker: str = ""
    tables: list[_Table] = field(default_factory=list)
    inside: Counter[str] = field(default_factory=Counter)  # how many of these elements are open
    term: bool = False  # inside <dt>
    boxes: list[etree._Element] = field(default_factory=list)

    def read(self, root: etree._Element, keep_boilerplate: bool) -> None:
        walk = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
        dropped = None
        for event, element in walk:
            if event == "start" and dropped is None:
                if self.is_dropped(element, keep_boilerplate):
                    dropped = element
                    walk.skip_subtree()
                else:
                    self.open(element)
            elif event == "end":
                if dropped is element:
                    dropped = None
                elif dropped is None:
                    self.close(element)
                self.text(element.tail)
            elif event in {"comment", "pi"}:
                self.text(element.tail)
        self.flush()

    def is_dropped(self, element: etree._Element, keep_boilerplate: bool) -> bool:
        tag = element.tag
        if not isinstance(tag, str) or (tag in _DROPPED and not (keep_boilerplate and tag == "nav")):
            return True
        if _is_hidden(element):
            return True
        if keep_boilerplate or tag in {"html", "body"}:
            return False
        if tag in {"header", "footer"} and not (self.inside["main"] or self.inside["article"]):
            return True
        return element.get("role", "").lower() in _DROPPED_ROLES or not _DROPPED_CLASSES.isdisjoint(_classes(element))

    def open(self, element: etree._Element) -> None:
        tag = element.tag
        if tag == "br":
            self.inline.append("\n" if self.inside["pre"] else "\v")
        if tag in _BLOCKS:
            self.flush()
        if tag in _BOXES or not _BOX_CLASSES.isdisjoint(_classes(element)):
            self.boxes.append(element)
        if tag == "pre":
            self.write_marker()
        if tag in _COUNTED:
            self.inside[tag] += 1
        elif tag in _LISTS:
            self.lists.append((tag, 0))
        elif tag in {"li", "dt"} and self.lists:
            self.start_item(tag)
        else:
            self.open_in_table(element)
        self.text(element.text)

    def close(self, element: etree._Element) -> None:
        tag = element.tag
        if tag in _HEADINGS and not self.boxes:
            self.flush(level=_HEADINGS[tag])
        elif tag in _BLOCKS:
            self.flush()
        if self.boxes and self.boxes[-1] is element:
            self.boxes.pop()
        if tag in _COUNTED:
            self.inside[tag] -= 1
        elif tag == "dt":
            self.term = False
        elif tag in _LISTS and self.lists:
            self.write_marker()
            self.lists.pop()
        else:
            self.close_in_table(tag)

    def text(self, text: str | None) -> None:
        if text:
            self.inline.append(text)

    def start_item(self, tag: str) -> None:
        """Begin a list item: its bullet or number, or the term that its definition follows, goes before its text."""
        self.write_marker()
        kind, count = self.lists[-1]
        self.lists[-1] = (kind, count + 1)
        self.term = tag == "dt"
        if tag == "li":
            self.marker = "  " * (len(self.lists) - 1) + (f"{count + 1}. " if kind == "ol" else "- ")

    def write_marker(self) -> None:
        """Write a term that has no definition; a bullet without text is left out."""
        marker, self.marker = self.marker, ""
        if marker.endswith("\n"):
            self.write(marker.rstrip(), "list", separator=self.list_separator())

    def list_separator(self) -> str:
        return "\n" if self.blocks and self.blocks[-1].kind == "list" else "\n\n"

    def open_in_table(self, element: etree._Element) -> None:
        if element.tag == "table":
            self.write_marker()
            self.tables.append(_Table(layout=_is_layout(element)))
        table = self.data_table()
        if table is None:
            return
        if element.tag == "tr":
            table.cells, table.header = [], _is_header_row(element)
        elif element.tag in {"td", "th"}:
            table.in_cell = True
            table.span = _number(element.get("rowspan"))
            _fill_spanned(table)
            table.cells.append("")

    def close_in_table(self, tag: str) -> None:
        table = self.data_table()
        if tag == "table" and self.tables:
            self.tables.pop()
        elif table is not None and tag == "tr":
            self.write_row(table)
        elif table is not None and tag in {"td", "th"} and table.cells:
            table.in_cell = False
            if table.span > 1:
                table.spanning[len(table.cells) - 1] = (table.span - 1, table.cells[-1])

    def data_table(self) -> _Table | None:
        return self.tables[-1] if self.tables and not self.tables[-1].layout else None

    def write_row(self, table: _Table) -> None:
        _fill_spanned(table)
        cells, table.cells = table.cells, []
        if not any(cells):
            return
        table.rows += 1
        header = table.header or (self.first_row_is_header and table.rows == 1)
        table.headed |= header
        # Rows without a header right after another table must not be taken for rows of that table.
        after_table = table.rows == 1 and bool(self.blocks) and self.blocks[-1].kind in {"table_row", "table_header"}
        kind: BlockKind = "table_header" if header else "table_row"
        if not table.headed and (after_table or (table.rows > 1 and self.blocks and self.blocks[-1].kind == "list")):
            kind = "list"
        text = " | ".join(" ".join(cell.split()) for cell in cells) if len(cells) > 1 else cells[0]
        self.write(text, kind, separator="\n" if table.rows > 1 else "\n\n")

    def flush(self, level: int = 0) -> None:
        """Write the inline text so far as one block, or hand it to the table cell that it stands in."""
        raw, self.inline = "".join(self.inline), []
        if self.inside["pre"]:
            text = raw.expandtabs(4).strip("\n").rstrip()
        else:
            text = "\n".join(filter(None, map(fold, raw.split("\v"))))
        if not text.strip():
            return
        table = self.data_table()
        if table is not None and table.in_cell and table.cells:
            table.cells[-1] = f"{table.cells[-1]}\n{text}" if table.cells[-1] else text
        elif level:
            self.write_marker()
            self.write(fold(text), "heading", level=level)
        elif self.term:
            self.marker = f"{self.marker}{text}\n"
        else:
            marker, self.marker = self.marker, ""
            self.write(marker + text, self.kind(), separator=self.list_separator() if self.lists else "\n\n")

    def kind(self) -> BlockKind:
        if self.inside["pre"]:
            return "code"
        if self.lists:
            return "list"
        return "quote" if self.inside["blockquote"] else "paragraph"

    def write(self, text: str, kind: BlockKind, level: int = 0, separator: str = "\n\n") -> None:
        if self.blocks:
            self.pieces.append(separator)
            self.length += len(separator)
        indent = len(text) - len(text.lstrip())
        title = text if kind == "heading" else ""
        start, end = self.length + indent, self.length + len(text)
        self.blocks.append(Block(kind=kind, start=start, end=end, level=level, title=title))
        self.pieces.append(text)
        self.length = end


def _classes(element: etree._Element) -> list[str]:
    return element.get("class", "").lower().split()  # type: ignore[no-any-return]


def _is_hidden(element: etree._Element) -> bool:
    if element.get("hidden") is not None or element.get("aria-hidden") == "true":
        return True
    return _HIDDEN_STYLE.search(element.get("style", "").lower()) is not None


def _is_layout(table: etree._Element) -> bool:
    """A table that only places things: marked so, holding headings or other tables, or of one cell."""
    if table.get("role", "").lower() in {"presentation", "none"}:
        return True
    if next(table.iterdescendants("table", "h1", "h2", "h3", "h4", "h5", "h6"), None) is not None:
        return True
    cells = table.iterdescendants("td", "th")
    return next(cells, None) is not None and next(cells, None) is None


def _is_header_row(row: etree._Element) -> bool:
    parent = row.getparent()
    if parent is not None and parent.tag == "thead":
        return True
    cells = [cell.tag for cell in row if cell.tag in {"td", "th"}]
    first = not any(sibling.tag == "tr" for sibling in row.itersiblings(preceding=True))
    return bool(cells) and first and set(cells) == {"th"}


def _fill_spanned(table: _Table) -> None:
    """Repeat a cell that spans several rows in each of them, so that every row says all it means."""
    while (column := len(table.cells)) in table.spanning:
        left, text = table.spanning.pop(column)
        if left > 1:
            table.spanning[column] = (left - 1, text)
        table.cells.append(text)


def _number(value: str | None) -> int:
    return min(int(value), _MOST_SPANNED_ROWS) if value and value.isdecimal() and len(value) < 6 else 1
