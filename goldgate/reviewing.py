"""changed answers -> labels: a person at a terminal judges pairs of answers, blind, one key for each pair."""

from __future__ import annotations

import datetime
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from goldgate.console import note
from goldgate.evals.review import Item, Label, label_lines
from goldgate.pipeline.errors import EnvironmentFailure, UsageError, one_line
from goldgate.pipeline.schema import GoldCase

CHOICES: Mapping[str, tuple[bool, bool]] = {
    "1": (True, False), "2": (False, True), "b": (True, True), "n": (False, False),
}  # fmt: skip
WORDS: Mapping[str, str] = {"both": "b", "neither": "n", "skip": "s", "quit": "q"}
MOST_NAME = 100
PROMPT = "right: [1], [2], [b]oth, [n]either; [s]kip, [q]uit > "
WIDTH = 96


def ask_person(items: Sequence[Item], cases: Mapping[str, GoldCase], path: Path, by: str) -> int:
    """Ask about each pair on stderr, read keys from stdin, append labels to `path` as they come; return how many pairs.

    What was said is on the disk before the next pair is shown. The end of the input ends the review.
    """
    if not by.strip() or len(by) > MOST_NAME or not by.isprintable():
        raise UsageError(f"--by {by[:MOST_NAME]!r} is no name", f"1 to {MOST_NAME} printable characters")
    done = 0
    for number, item in enumerate(items, start=1):
        _show(f"{number} of {len(items)}", item, cases.get(item.case.id))
        said = _choice()
        if said == "q":
            break
        if said == "s":
            continue
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        _append(path, [
            Label(case=item.case.id, case_digest=digest, answer=answer, right=right, by=by, date=date)
            for (digest, answer), right in zip(item.about(), CHOICES[said], strict=True)
        ])  # fmt: skip
        done += 1
    return done


def _show(count: str, item: Item, case: GoldCase | None) -> None:
    note("")
    for message in case.messages[:-1] if case is not None else ():
        note(f"  {message.role}: {one_line(message.content)}")
    note(f"{count}: {one_line(item.case.question)}")
    if case is not None and case.must_say:
        note(f"  must say: {one_line('; '.join(case.must_say))}")
    if case is not None and case.expected_answer:
        note(f"  expected: {one_line(case.expected_answer)}")
    for key, text in zip("12", item.answers, strict=True):
        lines = textwrap.wrap(one_line(text), WIDTH - 6) or ["(empty)"]
        note("\n".join([f"  [{key}] {lines[0]}", *(f"      {line}" for line in lines[1:])]))


def _choice() -> str:
    """Return the key of the next line that is one, or its word; anything else is asked again."""
    while True:
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return "q"
        said = line.strip().lower()
        said = WORDS.get(said, said)
        if said in CHOICES or said in {"s", "q"}:
            return said


def _append(path: Path, labels: Sequence[Label]) -> None:
    """Append whole lines, on the disk when this returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")  # an editor, or a crash within a line
            file.write(label_lines(labels).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EnvironmentFailure(f"{path} cannot be written: {error.strerror}", "a writable folder") from None


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
