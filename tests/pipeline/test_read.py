"""folder or URL -> documents: every format, who may read what, and one line for each thing that cannot be read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docx import Document as WordDocument
from fpdf import FPDF

from goldgate.pipeline.errors import EnvironmentFailure, UnreadableDocument, UsageError
from goldgate.pipeline.params import ReadParams
from goldgate.pipeline.parquet import write_records
from goldgate.pipeline.parse import parse
from goldgate.pipeline.parsed import Parsed
from goldgate.pipeline.read import read_documents
from goldgate.pipeline.reuse import ReadBefore
from goldgate.pipeline.schema import Block, Document, Unreadable
from goldgate.pipeline.store import Store, digest_file

SKIP = ReadParams(skip_unreadable=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that no test run's own hidden or linked parents can disturb."""
    root = tmp_path / "knowledge"
    root.mkdir()
    return root


def read_one(folder: Path, name: str, content: str | bytes, params: ReadParams | None = None) -> Document:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (document,) = read_documents(str(folder), params or ReadParams())[0]
    return document


def reasons(folder: Path, params: ReadParams = SKIP) -> dict[str, str]:
    """What cannot be read and why, next to one document that can."""
    (folder / "zz-sound.md").write_text("# Sound\n\nText.\n")
    documents, unreadable = read_documents(str(folder), params)
    assert [document.id for document in documents] == ["zz-sound.md"]
    return {each.id: each.reason for each in unreadable}


def texts(document: Document, kind: str) -> list[str]:
    return [document.text[b.start : b.end] for b in document.blocks if b.kind == kind]


def headings(document: Document) -> list[tuple[int, str]]:
    return [(b.level, b.title) for b in document.blocks if b.kind == "heading"]


def pdf(*pages: str, bookmarks: tuple[str, ...] = (), password: str = "") -> bytes:
    writer = FPDF()
    writer.set_font("Helvetica", size=12)
    for index, page in enumerate(pages):
        writer.add_page()
        if index < len(bookmarks):
            writer.start_section(bookmarks[index])
        if page:
            writer.multi_cell(0, text=page)
    if password:
        writer.set_encryption(owner_password="owner", user_password=password)
    return bytes(writer.output())


# ---------------------------------------------------------------- Markdown


def test_markdown_is_the_file_itself_with_spans_into_it(folder: Path) -> None:
    """Offsets are code points of the file, whatever its line ends and whatever stands before."""
    text = "---\r\nversion: 1.10\r\n---\r\n# Ünïcode 😀 `x`\r\n\r\nText *here*.\r\n\r\n- one\r\n- two\r\n\r\n> said\r\n"
    document = read_one(folder, "a/guide.md", text)
    assert document.id == "a/guide.md"
    assert document.text == text
    assert document.title == "Ünïcode 😀 x"
    assert [(b.kind, text[b.start : b.end]) for b in document.blocks] == [
        ("heading", "# Ünïcode 😀 `x`"), ("paragraph", "Text *here*."), ("list", "- one"), ("list", "- two"),
        ("quote", "> said"),
    ]  # fmt: skip
    assert (document.media_type, document.parser.split()[0]) == ("text/markdown", "markdown-it-py")


def test_markdown_tables_code_and_headings(folder: Path) -> None:
    """A header row is told from rows; a heading in a list or a code block is none; Setext headings count."""
    text = (
        "Title\n=====\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\n```sh\n# not a heading\nls\n```\n\n"
        "    indented\n\n- # item\n\nSub {#anchor}\n---\n\n###### Six\n"
    )
    document = read_one(folder, "t.md", text)
    assert headings(document) == [(1, "Title"), (2, "Sub"), (6, "Six")]
    assert texts(document, "table_header") == ["| a | b |"]
    assert texts(document, "table_row") == ["| 1 | 2 |", "| 3 | 4 |"]
    assert texts(document, "code") == ["```sh\n# not a heading\nls\n```", "indented"]


def test_directives_of_myst_are_read_through(folder: Path) -> None:
    """A note's text is text; a target, a table of contents and an included file are nothing to read."""
    note = "```{note}\n:class: x\nRead *this*.\n```"
    text = f"(target)=\n# T\n\n```{{toctree}}\nother\n```\n\n{note}\n\n```{{literalinclude}} a.py\n```\n"
    document = read_one(folder, "t.md", text)
    assert [(b.kind, text[b.start : b.end]) for b in document.blocks] == [
        ("heading", "# T"),
        ("paragraph", "Read *this*."),
    ]


def test_a_comment_is_not_text_and_html_with_text_is(folder: Path) -> None:
    """Markdown may hold HTML; what a reader sees of it stays."""
    document = read_one(folder, "t.md", "<!-- secret -->\n\n<div><b>Seen</b></div>\n\n<img src='x.png'>\n")
    assert texts(document, "paragraph") == ["<div><b>Seen</b></div>"]


def test_a_file_of_directives_only_is_not_a_hole(folder: Path) -> None:
    """It becomes one paragraph."""
    assert texts(read_one(folder, "t.rst", ".. include:: other.rst\n"), "paragraph") == [".. include:: other.rst"]


# ---------------------------------------------------------------- reStructuredText

RST = """\
.. _label:

=====
Title
=====

First *paragraph*
on two lines with :ref:`a role <x>`.

.. unknown-directive:: argument
   :option: value

   Content of it.

Section
-------

.. code-block:: python
   :emphasize-lines: 1

   def f():
       return 1

* one
* two

  still two

term
    its definition

Example::

    $ ls

Sub
~~~

.. list-table::
   :header-rows: 1

   * - Name
     - Value
   * - alpha
     - 1

===== =====
Left  Right
===== =====
a     b
c     d
===== =====

Section two
-----------

.. toctree::

   other
"""


def test_restructured_text_without_sphinx(folder: Path) -> None:
    """Levels are right, unknown directives and roles are read through, spans are of the file itself."""
    document = read_one(folder, "t.rst", RST)
    assert document.text == RST
    assert headings(document) == [(1, "Title"), (2, "Section"), (3, "Sub"), (2, "Section two")]
    assert texts(document, "heading")[0] == "Title"
    paragraphs = texts(document, "paragraph")
    assert "First *paragraph*\non two lines with :ref:`a role <x>`." in paragraphs
    assert "Content of it." in paragraphs
    assert texts(document, "code") == ["def f():\n       return 1", "$ ls"]
    assert texts(document, "list") == ["* one", "* two", "still two", "term\n    its definition"]
    assert [" ".join(row.split()) for row in texts(document, "table_header")] == ["* - Name - Value", "Left Right"]
    assert [" ".join(row.split()) for row in texts(document, "table_row")] == ["* - alpha - 1", "a b", "c d"]
    assert "other" not in " ".join(paragraphs)


def test_docutils_is_left_as_it_was(folder: Path) -> None:
    """Names that were made known for one document are unknown again."""
    from docutils.parsers.rst import directives, roles

    before = dict(directives._directives), dict(roles._roles)
    read_one(folder, "t.rst", RST)
    assert (dict(directives._directives), dict(roles._roles)) == before


def test_restructured_text_never_reads_other_files(folder: Path) -> None:
    """`include`, `raw` and `csv-table` could read any file of the machine."""
    (folder.parent / "secret.txt").write_text("the secret")
    file = "\n   :file: ../secret.txt\n\n"
    text = f"T\n=\n\nText.\n\n.. include:: ../secret.txt\n\n.. raw:: html{file}.. csv-table::{file}.. math::{file}"
    document = read_one(folder, "t.rst", text)
    assert "the secret" not in document.model_dump_json()


def test_gold_spans_of_real_documents_start_at_headings(data: Path) -> None:
    """132 sections of the Ray documentation, located by other people: a heading starts exactly where each does."""
    documents, _ = read_documents(str(data / "ray_docs" / "2023-08-16" / "docs"), SKIP)
    known = {document.id: document for document in documents}
    lines = (data / "ray_docs" / "eval" / "gold_map.eval-dataset-v1.jsonl").read_text().splitlines()
    gold = [
        each for line in lines if (each := json.loads(line)["gold"].get("2023-08-16")) and each.get("start") is not None
    ]
    assert len(gold) == 132
    for each in gold:
        starts = {b.start: b.title for b in known[each["doc"]].blocks if b.kind == "heading"}
        assert starts[each["start"]] == each["heading"].replace("`", "")


# ---------------------------------------------------------------- text, HTML, PDF, DOCX


def test_text_is_divided_at_blank_lines(folder: Path) -> None:
    """Nothing else is structure in a text file."""
    document = read_one(folder, "t.txt", "\n# no heading\nsame\r\n\r\n \r\nnext\n")
    assert texts(document, "paragraph") == ["# no heading\nsame", "next"]
    assert document.parser == "plain text"


PAGE = """\
<html><head><title>Site | Page</title><style>p {}</style></head><body>
<header><a href="/">Home</a></header><nav>Menu</nav><div class="navheader"><table><tr><td>Prev</td></tr></table></div>
<main><header><h1>The <em>page</em><a class="headerlink">¶</a></h1></header>
<p>First   line<br>second&nbsp;line.</p><div hidden>hidden</div><p style="display: none">invisible</p>
<div class="note"><h3>Note</h3><p>Mind this.</p></div>
<ul><li>one<ul><li>deep</li></ul></li><li><p>two</p></li></ul><ol><li>first</li><li>second</li></ol>
<dl><dt>term</dt><dd><p>definition</p></dd></dl>
<pre>def f():
    return 1
</pre>
<h2>Table</h2>
<table><caption>Codes</caption><thead><tr><th>Code</th><th>Meaning</th></tr></thead>
<tbody><tr><td rowspan="2">0</td><td><p>done</p><p>well</p></td></tr><tr><td>so</td></tr></tbody></table>
<table><tr><td>x</td><td>y</td></tr></table>
<script>alert(1)</script><noscript>Enable it</noscript></main><footer>Imprint</footer></body></html>"""


def test_html_is_what_a_reader_sees(folder: Path) -> None:
    """Navigation, scripts and hidden text are gone; a heading in a box is no section; a row says all it means."""
    document = read_one(folder, "p.html", PAGE)
    assert document.title == "The page"
    assert document.text == (
        "The page\n\nFirst line\nsecond line.\n\nNote\n\nMind this.\n\n- one\n  - deep\n- two\n1. first\n2. second\n"
        "term\ndefinition\n\ndef f():\n    return 1\n\nTable\n\nCodes\n\nCode | Meaning\n0 | done well\n0 | so\n\nx | y"
    )
    assert headings(document) == [(1, "The page"), (2, "Table")]
    assert texts(document, "table_header") == ["Code | Meaning"]
    assert texts(document, "table_row") == ["0 | done well", "0 | so"]
    assert texts(document, "code") == ["def f():\n    return 1"]
    assert texts(document, "list")[-1] == "x | y"  # rows without a header, right after a table, are not its rows


def test_a_page_that_is_only_navigation_keeps_it(folder: Path) -> None:
    """A table of contents is better than a hole."""
    assert read_one(folder, "i.html", "<body><nav><a>One</a> <a>Two</a></nav></body>").text == "One Two"


@pytest.mark.parametrize(
    ("head", "codec"),
    [
        ('<meta charset="windows-1252">', "cp1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-15">', "iso-8859-15"),
        ('<?xml version="1.0" encoding="shift_jis"?>', "shift_jis"),
        ("", "utf-8"),
        ("", "utf-8-sig"),
        ("", "utf-16"),
    ],
)
def test_html_in_the_charset_that_it_declares(folder: Path, head: str, codec: str) -> None:
    """A declaration, a byte order mark, or UTF-8."""
    text = "日本" if codec == "shift_jis" else "Größe"
    assert read_one(folder, "p.html", f"{head}<p>{text}</p>".encode(codec)).text == text


def test_html_of_any_depth(folder: Path) -> None:
    """Deep nesting is no recursion error, and where libxml2 would cut the page off it is said."""
    assert read_one(folder, "p.html", "<div>" * 2000 + "deep" + "</div>" * 2000).text == "deep"
    (folder / "p.html").write_text("<p>start</p>" + "<div>" * 3000 + "deep")
    assert "nested too deep" in reasons(folder)["p.html"]


def test_pdf_text_pages_and_bookmarks(folder: Path) -> None:
    """A bookmark's line on its page is a heading."""
    document = read_one(folder, "p.pdf", pdf("Intro\nFirst page text.", "Second page text.", bookmarks=("Intro",)))
    assert headings(document) == [(1, "Intro")]
    assert texts(document, "paragraph") == ["First page text.", "Second page text."]
    assert (document.media_type, document.parser.split()[0]) == ("application/pdf", "pypdf")
    assert document.title == "Intro"
    assert read_one(folder, "p.pdf", pdf("One\nText.", "Two\nText.", bookmarks=("One", "Two"))).title == ""


def test_docx_headings_lists_and_tables(folder: Path) -> None:
    """The first row of a Word table is its header, as people write them."""
    word = WordDocument()
    word.add_heading("Guide", 0)
    word.add_heading("Part", 1)
    word.add_paragraph("Some text.")
    word.add_paragraph("point", style="List Bullet")
    table = word.add_table(rows=2, cols=2)
    for cell, text in zip((c for row in table.rows for c in row.cells), ("Code", "Meaning", "0", "done"), strict=True):
        cell.text = text
    buffer = io.BytesIO()
    word.save(buffer)
    document = read_one(folder, "w.docx", buffer.getvalue())
    assert document.title == "Guide"
    assert [title for _, title in headings(document)] == ["Guide", "Part"]
    assert texts(document, "paragraph") == ["Some text."]
    assert texts(document, "list") == ["- point"]
    assert texts(document, "table_header") == ["Code | Meaning"]
    assert texts(document, "table_row") == ["0 | done"]
    assert document.parser.startswith("mammoth ")


# ---------------------------------------------------------------- who may read it

SIDECAR = "tenant: acme\naccess: [legal, board]\nversion: 1.10\ndate: 2024-05-31\n"


@pytest.mark.parametrize("where", ["front matter", "sidecar"])
def test_tenant_labels_version_and_date(folder: Path, where: str) -> None:
    """From front matter or a sidecar; a version is what is written, not the number that YAML sees in it."""
    if where == "sidecar":
        (folder / "d.md.meta.yaml").write_text(SIDECAR)
    document = read_one(folder, "d.md", "Text." if where == "sidecar" else f"---\n{SIDECAR}title: free\n---\nText.")
    assert (document.tenant, document.access) == ("acme", ("board", "legal"))
    assert (document.version, document.date) == ("1.10", "2024-05-31")


def test_front_matter_is_never_text(folder: Path) -> None:
    """It stays in the file, and in no block."""
    document = read_one(folder, "d.md", "---\ntenant: acme\n---\n\n# T\n\nText.\n")
    assert [document.text[b.start : b.end] for b in document.blocks] == ["# T", "Text."]


def test_two_rules_are_not_front_matter(folder: Path) -> None:
    """Prose between thematic breaks is prose."""
    document = read_one(folder, "d.md", "---\nJust some text\n\n---\nMore.\n")
    assert "Just some text" in " ".join(document.text[b.start : b.end] for b in document.blocks)


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        ("tennant: acme", "tennant is unknown; did you mean tenant?"),
        ("acces: [a]", "acces is unknown; did you mean access?"),
        ("Access: [a]", "Access is unknown; did you mean access?"),
        ("access: legal", "access is 'legal', expected a list of labels"),
        ("access: [1]", "access is 1, expected a list"),
        ("access:", "access is None, expected a list"),
        ('access: ["*"]', "reserved"),
        ("tenant: ''", "tenant is '', expected a name"),
        ("tenant: [acme]", "tenant is ['acme'], expected a name"),
        ("version: [1]", "version is [1], expected text"),
        ("date: soon", "date is 'soon', expected ISO 8601"),
        ("date: 2024-13-01", "month must be in 1..12"),
        ("access: [a]\naccess: [b]", "access is given twice"),
        ("access: [a", "not valid YAML"),
    ],
)
def test_a_mistake_about_who_may_read_is_never_passed_over(folder: Path, yaml: str, reason: str) -> None:
    """In front matter and in a sidecar alike, because it would show the document to the wrong people."""
    (folder / "front.md").write_text(f"---\n{yaml}\n---\nText.")
    (folder / "beside.md").write_text("Text.")
    (folder / "beside.md.meta.yaml").write_text(yaml)
    found = reasons(folder)
    assert set(found) == {"front.md", "beside.md"}
    assert all(reason in each for each in found.values()), found


@pytest.mark.parametrize("key", ["title", "author", "accessed", "conversion", "data", "tags"])
def test_other_keys_of_front_matter_are_left_alone(folder: Path, key: str) -> None:
    """Other programs keep theirs there too."""
    assert read_one(folder, "d.md", f"---\n{key}: x\n---\nText.").access == ()


def test_front_matter_and_sidecar_that_disagree(folder: Path) -> None:
    """Which of them was meant is not guessed; saying the same twice is fine."""
    (folder / "d.md").write_text("---\ntenant: acme\n---\nText.")
    (folder / "d.md.meta.yaml").write_text("tenant: other")
    assert "tenant is 'acme' in the front matter and 'other' in the sidecar" in reasons(folder)["d.md"]
    (folder / "d.md.meta.yaml").write_text("tenant: acme\nversion: '2'")
    documents, _ = read_documents(str(folder), ReadParams())
    assert (documents[0].tenant, documents[0].version) == ("acme", "2")


def test_a_sidecar_of_nothing_is_an_error(folder: Path) -> None:
    """`guide.meta.yaml` instead of `guide.md.meta.yaml` would leave the guide open to everyone."""
    (folder / "guide.meta.yaml").write_text("access: [legal]")
    assert "belongs to no document" in reasons(folder)["guide.meta.yaml"]


def test_a_sidecar_counts_although_include_does_not_name_it(folder: Path) -> None:
    """Patterns choose documents, not protection."""
    (folder / "d.txt.meta.yaml").write_text("access: [legal]")
    assert read_one(folder, "d.txt", "Text.", ReadParams(include=("*.txt",))).access == ("legal",)


def test_a_sidecar_may_declare_the_charset(folder: Path) -> None:
    """Text has no other place for it."""
    (folder / "d.txt.meta.yaml").write_text("charset: windows-1252")
    assert read_one(folder, "d.txt", "Größe".encode("cp1252")).text == "Größe"


def test_the_digest_is_of_the_bytes_and_of_the_sidecar(folder: Path) -> None:
    """A change of either is a change of the document."""
    plain = read_one(folder, "d.txt", "Text.")
    assert plain.digest == hashlib.sha256(b"Text.").hexdigest()
    digests = {plain.digest}
    for label in ("a", "b"):
        (folder / "d.txt.meta.yaml").write_text(f"access: [{label}]")
        digests.add(read_one(folder, "d.txt", "Text.").digest)
    assert len(digests) == 3


# ---------------------------------------------------------------- what is a document


def test_order_hidden_files_and_unknown_extensions(folder: Path) -> None:
    """Sorted by id; hidden files and folders are not there; the ignored are counted, by extension."""
    for name in ("b.md", "a/z.md", "a.md", "a-b.md", "UP.MD", ".hidden.md", ".git/x.md", "x.png", "y.png", "Makefile"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"Text of {name}")
    seen: list[tuple[str, int, int]] = []
    documents, _ = read_documents(str(folder), ReadParams(), lambda *event: seen.append(event))
    assert [d.id for d in documents] == sorted(["UP.MD", "a-b.md", "a.md", "a/z.md", "b.md"])
    assert seen[0][0] == "ignored 3 files of unknown extension (.png 2, none 1)"
    assert seen[-1] == ("read", 5, 5)


def test_include_and_exclude(folder: Path) -> None:
    """Glob patterns below the root; a folder that is excluded is not even entered."""
    for name in ("a.md", "b/c.md", "b/d.txt", "e/f.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("Text")

    def ids(**more: tuple[str, ...]) -> list[str]:
        return [d.id for d in read_documents(str(folder), ReadParams(**more))[0]]

    assert ids(include=("**/*.md",)) == ["a.md", "b/c.md", "e/f.md"]
    assert ids(include=("*.md",)) == ["a.md"]
    assert ids(exclude=("b/**",)) == ["a.md", "e/f.md"]
    assert ids(include=("b/*",), exclude=("**/*.txt",)) == ["b/c.md"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no document; expected files that end in .md"),
        ({"a.png": b"x", "b.bin": b"y"}, "ignored 2 files of unknown extension"),
        ({"a.md": b""}, "1 document cannot be read, first a.md is empty"),
    ],
)
def test_nothing_left_to_read(folder: Path, files: dict[str, bytes], message: str) -> None:
    """An empty knowledge base is an error even where the unreadable are skipped."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match="holds no document") as caught:
        read_documents(str(folder), SKIP)
    assert message in str(caught.value)


def test_a_source_that_is_not_there(folder: Path) -> None:
    """A missing folder, a file, and a URL of an unknown kind."""
    (folder / "f.md").write_text("Text")
    for source, message in [("missing", "does not exist"), ("f.md", "is a file")]:
        with pytest.raises(UsageError, match=message):
            read_documents(str(folder / source), ReadParams())
    with pytest.raises(UsageError, match="nosuch://x cannot be opened"):
        read_documents("nosuch://x", ReadParams())


# ---------------------------------------------------------------- what cannot be read

UNREADABLE = {
    "empty.md": (b"", "is empty"),
    "blank.txt": (b" \n\t\n", "is empty"),
    "blank.html": (b"<html><body><img src='x'></body></html>", "has no text"),
    "only-front.md": (b"---\ntitle: x\n---\n\n", "no text after its front matter"),
    "latin.md": ("Größe".encode("latin-1"), "is not UTF-8, and no other charset is declared: byte 0xf6 at offset 2"),
    "latin.html": ("<p>Größe".encode("latin-1"), "is not UTF-8"),
    "lies.html": (b'<meta charset="utf-8"><p>\xff', "is not utf-8 as declared"),
    "odd.html": (b'<meta charset="klingon"><p>x', "unknown charset 'klingon'"),
    "codec.html": (b'<meta charset="hex"><p>00', "unknown charset 'hex'"),
    "nul.md": (b"text\0more", "holds a NUL byte at character 4"),
    "torn.pdf": (pdf("Some text")[:300], "is not a sound PDF"),
    "noise.pdf": (b"%PDF-1.7\n" + bytes(range(256)) * 4, "is not a sound PDF"),
    "text.pdf": (b"not a PDF at all", "is not a sound PDF"),
    "locked.pdf": (pdf("Some text", password="secret"), "is encrypted"),
    "scan.pdf": (pdf("", ""), "has no text on any of its 2 pages"),
    "torn.docx": (b"PK\x03\x04 torn", "is not a DOCX file"),
    "zip.docx": (None, "is damaged"),
    "large.txt": (b"x" * 5000, "is 5000 bytes, larger than [read] max_bytes = 4000"),
    "line\nbreak.md": (b"text", "control character"),
    "bell\a.md": (b"text", "control character"),
}


def test_each_unreadable_document_is_one_line(folder: Path) -> None:
    """All of them in one go, each named on one line; nothing is left out quietly."""
    for name, (content, _) in UNREADABLE.items():
        (folder / name).write_bytes(_plain_zip() if content is None else content)
    with pytest.raises(UnreadableDocument) as caught:
        read_documents(str(folder), ReadParams(max_bytes=4000))
    found = {each.id: each.reason for each in caught.value.unreadable}
    names = {name.replace("\n", "\\n").replace("\a", "\\x07"): reason for name, (_, reason) in UNREADABLE.items()}
    assert set(found) == set(names)
    for name, reason in names.items():
        assert reason in found[name], name
        assert found[name].isprintable()
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{len(names)} documents cannot be read: bell\\x07.md ")
    assert reasons(folder, ReadParams(max_bytes=4000, skip_unreadable=True)) == found


def test_links_that_loop_leave_or_lead_nowhere(folder: Path) -> None:
    """A link inside the folder is followed; the folder itself may be a link."""
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "secret.md").write_text("secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "real.md").write_text("Text")
    (folder / "alias.md").symlink_to("sub/real.md")
    (folder / "out.md").symlink_to("../outside/secret.md")
    (folder / "outdir").symlink_to("../outside")
    (folder / "self.md").symlink_to("self.md")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "gone.md").symlink_to("nothing.md")
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    documents, unreadable = read_documents(str(linked), SKIP)
    assert [d.id for d in documents] == ["alias.md", "sub/real.md"]
    assert {each.id: each.reason for each in unreadable} == {
        "gone.md": "is a link that points to nothing",
        "out.md": "is a link that leaves the knowledge folder",
        "outdir": "is a link that leaves the knowledge folder",
        "self.md": "cannot be read: Too many levels of symbolic links",
        "sub/up": "is a link to a folder that it is in: a loop",
    }
    assert not read_documents(str(folder), ReadParams(exclude=("out*", "self.md", "sub/up", "gone.md")))[1]


def test_a_bad_link_matters_only_where_a_document_would_be(folder: Path) -> None:
    """Packages link scripts and pictures to other folders; a sidecar that leads out would open its document."""
    for name in ("jquery.js", "logo.svg", "manual", "guide.md", "d.md.meta.yaml"):
        (folder / name).symlink_to("/nowhere/else")
    (folder / "d.md").write_text("Text")
    assert reasons(folder) == {
        "d.md": "its sidecar is a link that points to nothing",
        "guide.md": "is a link that points to nothing",
        "manual": "is a link that points to nothing",
    }
    assert [d.id for d in read_documents(str(folder), ReadParams(include=("zz*",)))[0]] == ["zz-sound.md"]


def test_what_is_not_a_regular_file(folder: Path) -> None:
    """Opening a pipe would wait for ever."""
    os.mkfifo(folder / "pipe.md")
    assert reasons(folder) == {"pipe.md": "is not a regular file"}


def test_a_name_that_is_not_utf8(folder: Path) -> None:
    """It could not be written to any record."""
    (folder / os.fsdecode(b"caf\xe9.md")).write_text("text")
    assert reasons(folder) == {"caf\\udce9.md": "has a name that is not UTF-8"}


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder, and this process without the rights of root, which may read everything."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "shut").mkdir()
        for path in ("shut/in.md", "locked.md", "zz-sound.md"):
            (root / path).write_text("Text")
        (root / "locked.md").chmod(0)
        (root / "shut").chmod(0)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            yield root
        finally:
            os.seteuid(was)
            (root / "shut").chmod(0o755)


def test_files_and_folders_without_permission(unprivileged: Path) -> None:
    """Both are named."""
    documents, unreadable = read_documents(str(unprivileged), SKIP)
    assert [d.id for d in documents] == ["zz-sound.md"]
    assert unreadable == [
        Unreadable(id="locked.md", reason="may not be read: no permission"),
        Unreadable(id="shut", reason="may not be read: no permission"),
    ]


def test_a_docx_that_expands_without_end(folder: Path) -> None:
    """A small ZIP of a great many zeros is not unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b"0" * 3_000_000)
    (folder / "bomb.docx").write_bytes(buffer.getvalue())
    assert (
        "expands to 3000000 bytes" in reasons(folder, ReadParams(max_bytes=100_000, skip_unreadable=True))["bomb.docx"]
    )


def _plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "no document in here")
    return buffer.getvalue()


# ---------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 server on the loopback device, reached through the environment as a user would."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="docs")
        yield "docs"
    server.stop()


def test_a_bucket_reads_like_a_folder(s3: str, folder: Path) -> None:
    """The same documents byte for byte, sidecars and all."""
    import boto3

    client = boto3.client("s3")
    names = {
        "a.md": "# A\n\nText.",
        "b/c.md": "---\nversion: '2'\n---\nMore.",
        "b/d.txt": "Words",
        "b/d.txt.meta.yaml": SIDECAR,
        ".hidden/x.md": "no",
        "e.png": "no",
        "ü 1.md": "Umlaut",
    }
    for name, content in names.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        client.put_object(Bucket=s3, Key=f"kb/{name}", Body=content.encode())
    for index in range(150):  # more than one batch
        name = f"many/{index:03}.txt"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"Number {index}")
        client.put_object(Bucket=s3, Key=f"kb/{name}", Body=f"Number {index}".encode())
    remote = read_documents(f"s3://{s3}/kb", ReadParams())
    assert remote == read_documents(str(folder), ReadParams())
    assert len(remote[0]) == 154
    assert remote == read_documents(f"s3://{s3}/kb/", ReadParams())


def test_what_cannot_be_read_in_a_bucket(s3: str) -> None:
    """Size is known before anything is fetched; a missing bucket is said."""
    import boto3

    client = boto3.client("s3")
    client.put_object(Bucket=s3, Key="bad/large.txt", Body=b"x" * 5000)
    client.put_object(Bucket=s3, Key="bad/ok.txt", Body=b"Text")
    client.put_object(Bucket=s3, Key="bad/torn.pdf", Body=b"%PDF-1.4 torn")
    with pytest.raises(UnreadableDocument) as caught:
        read_documents(f"s3://{s3}/bad", ReadParams(max_bytes=4000))
    assert [each.id for each in caught.value.unreadable] == ["large.txt", "torn.pdf"]
    with pytest.raises(UsageError, match=r"holds no document|does not exist"):
        read_documents(f"s3://{s3}/nothing-here", ReadParams())
    with pytest.raises(UsageError, match=r"holds no document|does not exist"):
        read_documents("s3://no-such-bucket/x", ReadParams())


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    """That is the environment's failure, not a document's."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(EnvironmentFailure, match="cannot be listed"):
        read_documents(f"s3://{s3}/kb", ReadParams())
    s3fs.S3FileSystem.clear_instance_cache()


def test_blocks_are_in_order_and_hold_text(data: Path) -> None:
    """On 800 real pages: no overlap, nothing empty, headings named."""
    for date in ("2023-10-25",):
        for document in read_documents(str(data / "ray_docs" / date / "docs"), SKIP)[0]:
            end = 0
            for block in document.blocks:
                assert end <= block.start < block.end <= len(document.text)
                assert document.text[block.start : block.end].strip()
                assert (block.kind == "heading") == bool(block.title) == (block.level > 0)
                end = block.end
            assert isinstance(document.blocks[0], Block)


# ---------------------------------------------------------------- what was read before


class Reading:
    """Reads a folder as `goldgate read` does, and publishes a generation of what was read."""

    def __init__(self, folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.store = folder, store
        self.parsed: list[bytes] = []

        def parse_and_note(data: bytes, *more: Any) -> Parsed:
            self.parsed.append(data)
            return parse(data, *more)

        monkeypatch.setattr("goldgate.pipeline.read.parse", parse_and_note)

    def __call__(self, params: ReadParams = SKIP) -> tuple[int, list[str]]:
        """How many documents were parsed, and what was reported; what was read is compared with a plain read."""
        self.parsed.clear()
        said: list[str] = []
        before = ReadBefore(self.store, params)
        read = read_documents(str(self.folder), params, lambda what, done, total: said.append(what), before)
        count = len(self.parsed)
        assert read == read_documents(str(self.folder), params)
        self.publish(read[0], before)
        return count, [what for what in said if what != "read"]

    def publish(self, documents: list[Document], before: ReadBefore) -> Path:
        path = self.folder.parent / "documents.parquet"
        write_records(path, documents, Document)
        before.remember(path)
        digest = digest_file(path)
        generation = self.store.path("generations", digest)
        generation.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, generation / "documents.parquet")
        (generation / "manifest.json").write_text(json.dumps({"files": {"documents.parquet": digest}}))
        return generation


@pytest.fixture
def reading(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Reading:
    (folder / "a.md").write_text("# A\n\nText.")
    (folder / "b.rst").write_text("B\n=\n\nText.")
    (folder / "c.pdf").write_bytes(pdf("one", ""))
    (folder / "c.pdf.meta.yaml").write_text("tenant: acme\n")
    (folder / "z.md").write_text("")
    return Reading(folder, store, monkeypatch)


def test_a_file_with_the_same_bytes_is_not_parsed_again(reading: Reading, folder: Path) -> None:
    notes = ["c.pdf: 1 of 2 pages have no text"]
    assert reading() == (4, notes)
    assert reading() == (1, notes)  # what cannot be read is tried again, and what there is to tell is told again
    (folder / "a.md").write_text("# A\n\nOther text.")
    assert reading() == (2, notes)
    (folder / "b.rst").rename(folder / "renamed.rst")
    assert reading() == (2, notes)
    (folder / "c.pdf.meta.yaml").write_text("tenant: other\n")
    assert reading() == (2, notes)
    (folder / "c.pdf.meta.yaml").unlink()
    assert reading() == (2, notes)
    (folder / "a.md").write_text("# A\n\nText.")
    assert reading()[0] in {1, 2}  # an earlier generation may have it, and share as many others


def test_other_code_libraries_or_limits_parse_again(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading()[0] == 4
    assert reading(ReadParams(skip_unreadable=True, max_bytes=1_000_000))[0] == 4
    assert reading(ReadParams(skip_unreadable=True, include=("*.md",)))[0] == 1  # chooses files and changes none
    monkeypatch.setattr("goldgate.pipeline.reuse.version", lambda name: "99")
    assert reading()[0] == 4
    monkeypatch.setattr("goldgate.pipeline.reuse._READ_CODE", ("parse.py",))
    assert reading()[0] == 4


@pytest.mark.parametrize("damage", ["documents", "manifest", "record", "no record"])
def test_damaged_memories_are_none(reading: Reading, store: Store, damage: str) -> None:
    assert reading()[0] == 4
    generation = next(store.path("generations").iterdir())
    record = next(store.path("made").iterdir())
    match damage:
        case "documents":
            path = generation / "documents.parquet"
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        case "manifest":
            (generation / "manifest.json").write_text('{"files": {"documents.parquet": "../x"}}')
        case "record":
            record.write_text("[]")
        case _:
            record.unlink()
    assert reading()[0] == 4
