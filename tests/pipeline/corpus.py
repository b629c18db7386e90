"""Small corpora of documents in memory, parsed as `read` parses them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from goldgate.pipeline.parse import parse
from goldgate.pipeline.schema import Document

TOPICS = {
    "gate.md": "The gate compares every candidate with the release in production today.\n\n"
    "It never passes a thing that was not measured on both sides.",
    "release.md": "A release is immutable and production is only a pointer to one.\n\n"
    "Rolling back moves that pointer and needs no judge and no model.",
    "embed.md": "A vector depends only on its text and on nothing around it.\n\n"
    "Only text that nobody embedded before is ever embedded again here.",
    "shared.md": "Only text that nobody embedded before is ever embedded again here.\n\n"
    "This last sentence stands in one single document and nowhere else.",
}
"""Four documents of two passages each at 16 tokens; one passage stands in two of them."""


def document(name: str, text: str) -> Document:
    """A Markdown document of the public tenant."""
    parsed = parse(text.encode(), "text/markdown")
    return Document(
        id=name,
        text=parsed.text,
        title=parsed.title,
        blocks=parsed.blocks,
        media_type="text/markdown",
        parser=parsed.parser,
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def documents(texts: Mapping[str, str] = TOPICS) -> list[Document]:
    """The documents in the order of `texts`."""
    return [document(name, text) for name, text in texts.items()]
