"""Query, passages -> Messages, by a versioned prompt file with static text first and variable text last."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from goldgate.pipeline.params import load_toml
from goldgate.pipeline.schema import FORMAT_VERSION, Message, Passage, Query, Record
from goldgate.pipeline.store import digest_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Prompt(Record):
    """A file in serving/prompts/. `passage` and `turn` are templates; inserted text is never formatted again."""

    format_version: int = FORMAT_VERSION
    name: str = Field(min_length=1)
    version: str = Field(
        min_length=1, description="Raised by whoever edits the file; the digest tells versions apart anyway."
    )
    system: str = Field("", description="The static rules. Nothing of one request may stand here.")
    passage: str = Field("[{number}] {text}", description="One passage: {number}, {text}, {document}, {heading}.")
    separator: str = Field("\n\n", description="Between two passages.")
    turn: str = Field(
        "{passages}\n\nQuestion: {question}", description="The last user turn: {passages}, then {question}."
    )
    refusal: str = Field(
        "I don't know.", min_length=1, description="Said without asking the model when nothing was found."
    )

    @model_validator(mode="after")
    def _templates(self) -> Prompt:
        _check_fields("passage", self.passage, known={"number", "text", "document", "heading"}, needed=("text",))
        _check_fields("turn", self.turn, known={"passages", "question"}, needed=("passages", "question"))
        if self.turn.index("{passages}") > self.turn.index("{question}"):
            raise ValueError("turn must name {passages} before {question}, so that the question comes last")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(f"format_version {self.format_version} is newer than this goldgate ({FORMAT_VERSION})")
        return self

    @property
    def digest(self) -> str:
        """Content address of everything that the file says."""
        return digest_json(self.model_dump(mode="json"))


def load_prompt(path: Path) -> Prompt:
    """Read a prompt file. Raises UsageError naming the file and the field."""
    return load_toml(path, Prompt)


def render(prompt: Prompt, query: Query, passages: Sequence[Passage]) -> tuple[Message, ...]:
    """Return system rules, the conversation before, and one user turn with numbered passages and the question last.

    System turns of the conversation are left out: the rules come from the reviewed prompt file alone.
    """
    shown = prompt.separator.join(
        prompt.passage.format(
            number=number, text=passage.text, document=passage.document, heading=" > ".join(passage.heading)
        )
        for number, passage in enumerate(passages, start=1)
    )
    system = (Message(role="system", content=prompt.system),) if prompt.system else ()
    turn = Message(role="user", content=prompt.turn.format(passages=shown, question=query.question))
    history = tuple(message for message in query.history if message.role != "system")
    return (*system, *history, turn)


def shared_prefix_share(rendered: Sequence[str], tokenizer: Tokenizer) -> float | None:
    """Return the share (0..1) of all prompt tokens that lie in the prefix common to all; None for fewer than two.

    That part is computed once by an engine with prefix caching, as far as it fills whole cache blocks.
    """
    if len(rendered) < 2:
        return None
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(rendered), add_special_tokens=False)]
    total = sum(len(ids) for ids in tokens)
    if total == 0:
        return None
    common = 0
    for column in zip(*tokens, strict=False):
        if len(set(column)) > 1:
            break
        common += 1
    return common * len(tokens) / total


def _check_fields(name: str, template: str, known: set[str], needed: tuple[str, ...]) -> None:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{name} is not a template: {error}") from None
    fields = [field for _, field, _, _ in parsed if field is not None]
    for _, field, spec, conversion in parsed:
        if field is not None and (field not in known or spec or conversion):
            raise ValueError(f"{name} has {{{field}}}; known: {', '.join(sorted(known))} (write {{{{ for a brace)")
    for field in needed:
        if fields.count(field) != 1:
            raise ValueError(f"{name} must name {{{field}}} exactly once")
