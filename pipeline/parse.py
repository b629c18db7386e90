"""source bytes -> Parsed: one maintained library per format, chosen by the file name's extension."""

from __future__ import annotations

import codecs
import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import mammoth
from pypdf import PdfReader
from pypdf.errors import DependencyError, PyPdfError
from pypdf.generic import Destination

from goldgate.pipeline.hypertext import parse_html
from goldgate.pipeline.markdown import parse_markdown
from goldgate.pipeline.metadata import split_front_matter
from goldgate.pipeline.parsed import BlockList, Parsed, UnparsableError, fold, parser_identity
from goldgate.pipeline.restructured import parse_restructured
from goldgate.pipeline.schema import Block

DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
MEDIA_TYPES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".rst": "text/x-rst",
    ".rest": "text/x-rst",
    ".txt": "text/plain",
    ".text": "text/plain",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
    ".docx": DOCX,
}
"""File name extension, in lower case -> media type. Files of other extensions are not documents."""

_PARAGRAPH_END = re.compile(r"(?:\r\n?|\n)[^\S\r\n]*(?:(?:\r\n?|\n)[^\S\r\n]*)+")
_CHARSET = re.compile(rb"""<meta[^>]{0,500}?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"""\A\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]+)""", re.IGNORECASE)
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
                     (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))  # fmt: skip
# What a browser understands by these names.
_WEB_CHARSETS = {
    "iso-8859-1": "cp1252",
    "latin1": "cp1252",
    "latin-1": "cp1252",
    "us-ascii": "cp1252",
    "ascii": "cp1252",
}
_CHARSET_LOOK_AHEAD = 4096  # bytes
_MOST_EXPANSION = 20  # a .docx is a ZIP: it may expand to this many times the largest allowed document
_HEADINGS_IN_DOCX = "p[style-name='Title'] => h1:fresh"


def media_type_of(name: str) -> str | None:
    """The media type by the name's extension; None for a file that is not a document."""
    return MEDIA_TYPES.get(PurePosixPath(name).suffix.lower())


def parse(data: bytes, media_type: str, charset: str = "", max_bytes: int = 20_000_000) -> Parsed:
    """Parse one document. `charset` is what its sidecar declares, if anything.

    Raises UnparsableError with the reason: no text, wrong encoding, NUL bytes, encrypted, damaged.
    """
    if not data.strip():
        raise UnparsableError("is empty")
    parsed = _PARSERS[media_type](data, charset, max_bytes)
    if not parsed.text.strip() or not parsed.blocks:
        raise UnparsableError("has no text")
    return parsed


def _parse_markdown(data: bytes, charset: str, _max_bytes: int) -> Parsed:
    text = _decode(data, charset)
    _, body_start = split_front_matter(text)
    if not text[body_start:].strip():
        raise UnparsableError("has no text after its front matter")
    return _at_least_one_block(parse_markdown(text, body_start), body_start)


def _parse_restructured(data: bytes, charset: str, _max_bytes: int) -> Parsed:
    return _at_least_one_block(parse_restructured(_decode(data, charset)), 0)


def _parse_plain(data: bytes, charset: str, _max_bytes: int) -> Parsed:
    text = _decode(data, charset)
    return Parsed(text, tuple(_paragraphs(text, 0, len(text))), "plain text")


def _parse_html(data: bytes, charset: str, _max_bytes: int) -> Parsed:
    text = _decode(data, charset or _declared_charset(data))
    return parse_html(text.encode())


def _parse_docx(data: bytes, _charset: str, max_bytes: int) -> Parsed:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UnparsableError(f"is not a DOCX file: {error}") from None
    if expanded > _MOST_EXPANSION * max_bytes:
        raise UnparsableError(f"expands to {expanded} bytes, more than {_MOST_EXPANSION} times [read] max_bytes")
    try:
        result = mammoth.convert_to_html(
            io.BytesIO(data),
            style_map=_HEADINGS_IN_DOCX,
            convert_image=mammoth.images.img_element(lambda _: {}),
            external_file_access=False,
        )
    except Exception as error:  # noqa: BLE001  (damaged XML fails anywhere inside mammoth; it becomes a reason)
        raise UnparsableError(f"is damaged: {type(error).__name__}: {error}") from None
    if not result.value.strip():
        raise UnparsableError("has no text")
    # Word users seldom mark the header row, and nearly always write one.
    return parse_html(result.value.encode(), first_row_is_header=True, parser=parser_identity("mammoth", "lxml"))


def _parse_pdf(data: bytes, _charset: str, _max_bytes: int) -> Parsed:
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # its warnings go to stderr, line by line
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnparsableError("is encrypted: a password is needed")
        pages = [_clean(page.extract_text()) for page in reader.pages]
        outline = list(_outline(reader, reader.outline, 1))
        title = fold((reader.metadata.title or "") if reader.metadata else "")
    except UnparsableError:
        raise
    except DependencyError as error:
        raise UnparsableError(f"is encrypted: {error}") from None
    except PyPdfError as error:
        raise UnparsableError(f"is not a sound PDF: {error}") from None
    except Exception as error:  # noqa: BLE001  (a damaged file fails anywhere inside pypdf; it becomes a reason)
        raise UnparsableError(f"is not a sound PDF: {type(error).__name__}: {error}") from None
    empty = sum(not page.strip() for page in pages)
    if empty == len(pages):
        raise UnparsableError(f"has no text on any of its {len(pages)} pages (scanned? run OCR on it first)")
    text, blocks = _pdf_blocks(pages, outline)
    notes = (f"{empty} of {len(pages)} pages have no text",) if empty else ()
    chapters = [block.title for block in blocks if block.level == 1]
    title = title or (chapters[0] if len(chapters) == 1 else "")  # the first of several is no title of the whole
    return Parsed(text, tuple(blocks), parser_identity("pypdf"), title, notes)


_PARSERS: dict[str, Callable[[bytes, str, int], Parsed]] = {
    "text/markdown": _parse_markdown,
    "text/x-rst": _parse_restructured,
    "text/plain": _parse_plain,
    "text/html": _parse_html,
    "application/pdf": _parse_pdf,
    DOCX: _parse_docx,
}


# ---------------------------------------------------------------- text


def _decode(data: bytes, charset: str) -> str:
    """Text of `data` in the charset that a byte order mark or the document declares; otherwise it must be UTF-8."""
    for mark, name in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            data, charset = data[len(mark) :], name
            break
    name = _WEB_CHARSETS.get(charset.lower(), charset.lower()) or "utf-8"
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        declared = f"{charset} as declared" if charset else "UTF-8, and no other charset is declared"
        raise UnparsableError(f"is not {declared}: byte 0x{data[error.start]:02x} at offset {error.start}") from None
    except (LookupError, ValueError):
        raise UnparsableError(f"declares the unknown charset {charset!r}") from None
    if "\0" in text:
        raise UnparsableError(f"holds a NUL byte at character {text.index(chr(0))}: not a text file")
    if not text.strip():
        raise UnparsableError("is empty: whitespace only")
    return text


def _declared_charset(data: bytes) -> str:
    head = data[:_CHARSET_LOOK_AHEAD]
    declared = _XML_ENCODING.search(head) or _CHARSET.search(head)
    return declared.group(1).decode("ascii") if declared else ""


def _at_least_one_block(parsed: Parsed, start: int) -> Parsed:
    """A file that only includes others, or only holds directives, is one paragraph: never a hole."""
    if any(block.kind != "heading" for block in parsed.blocks):
        return parsed
    if parsed.blocks:
        return parsed
    found = BlockList()
    text = parsed.text
    end = len(text.rstrip())
    found.add("paragraph", (end - len(text[start:end].lstrip()), end))
    return Parsed(text, tuple(found.blocks), parsed.parser, parsed.title, parsed.notes)


def _paragraphs(text: str, start: int, end: int) -> Iterator[Block]:
    """Paragraphs are divided by blank lines."""
    begin = start
    for gap in _PARAGRAPH_END.finditer(text, start, end):
        yield from _paragraph(text, begin, gap.start())
        begin = gap.end()
    yield from _paragraph(text, begin, end)


def _paragraph(text: str, start: int, end: int) -> Iterator[Block]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        yield Block(kind="paragraph", start=start, end=end)


# ---------------------------------------------------------------- PDF


def _clean(text: str) -> str:
    """Without NUL bytes and lone surrogates, which damaged fonts produce and which no file could hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _outline(reader: PdfReader, entries: object, level: int) -> Iterator[tuple[int, int, str]]:
    """(page, level, title) of every bookmark."""
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, list):
            yield from _outline(reader, entry, level + 1)
        elif isinstance(entry, Destination) and entry.title:
            page = reader.get_destination_page_number(entry)
            if page is not None and page >= 0:
                yield page, level, fold(str(entry.title))


def _pdf_blocks(pages: list[str], outline: list[tuple[int, int, str]]) -> tuple[str, list[Block]]:
    """The pages as one text; a line that is a bookmark of its page is a heading, the rest are paragraphs."""
    parts: list[tuple[int, int, tuple[int, str] | None]] = []  # start, end, level and title of a heading
    pieces: list[str] = []
    start = 0
    for number, page in enumerate(pages):
        titles = {_key(title): (level, title) for at, level, title in outline if at == number}
        begin = start
        for line in re.finditer(r"[^\n]+", page):
            known = titles.pop(_key(line.group()), None)
            if known is None:
                continue
            at, end = start + line.start(), start + line.end()
            parts += [(begin, at, None), (at, end, known)]
            begin = end
        parts.append((begin, start + len(page), None))
        pieces += [page, "\n\n"]
        start += len(page) + 2
    text = "".join(pieces)
    found = BlockList()
    for begin, end, known in parts:
        for block in _paragraphs(text, begin, end):
            if known is None:
                found.add("paragraph", (block.start, block.end))
            else:
                found.add("heading", (block.start, block.end), level=min(known[0], 6), title=known[1])
    return text, found.blocks


def _key(title: str) -> str:
    return "".join(title.split()).casefold()
