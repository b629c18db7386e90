"""Small real records that the tests of evals/ share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from goldgate.pipeline.parquet import write_records
from goldgate.pipeline.schema import Answer, Block, CaseAnswer, Document, GoldCase, Passage

GUIDE = """# Gate

The gate compares a candidate with production.

## Exit codes

PASS is 0 and FAIL is 1. INCONCLUSIVE is 3.

### Rare codes

A bug is 70.

## Margins

The default margin is 5 points.
"""


def document(name: str, text: str, **fields: Any) -> Document:
    """A Markdown document with its headings as blocks."""
    blocks, at = [], 0
    for line in text.splitlines(keepends=True):
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            title = line.strip("# \n")
            blocks.append(Block(kind="heading", start=at, end=at + len(line.rstrip()), level=level, title=title))
        at += len(line)
    return Document(
        id=name, text=text, title=name, blocks=tuple(blocks), media_type="text/markdown", parser="test 1",
        digest="0" * 64, **fields,
    )  # fmt: skip


def case(name: str = "c1", **fields: Any) -> GoldCase:
    """A gold case; a question is filled in."""
    if "messages" not in fields:
        fields.setdefault("question", f"What is {name}?")
    return GoldCase.model_validate({"id": name, **fields})


def passage(doc: Document, quote: str, **fields: Any) -> Passage:
    """A passage that covers `quote`."""
    start = doc.text.index(quote)
    return Passage(
        chunk=f"{doc.id}-{start}", document=doc.id, start=start, end=start + len(quote), text=quote, score=1.0,
        tenant=doc.tenant, **fields,
    )  # fmt: skip


def answered(name: str, text: str, *passages: Passage, known: bool = True, **fields: Any) -> CaseAnswer:
    """A line of answers.jsonl."""
    answer = Answer(text=text, passages=passages if known else None, **fields)
    return CaseAnswer(case=name, key=f"key-{name}", answer=answer)


def write_build(folder: Path, documents: list[Document], answers: list[CaseAnswer]) -> Path:
    """A build folder with documents.parquet and answers.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "documents.parquet", documents, Document)
    lines = [json.dumps(answer.model_dump(mode="json")) for answer in answers]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_gold(path: Path, cases: list[GoldCase]) -> Path:
    """A gold file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(c.model_dump(mode="json", exclude_defaults=True)) for c in cases]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
