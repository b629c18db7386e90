"""The one error tree, and the exit codes that belong to it.

    GoldgateError                 an expected error: one line, no traceback
    ├── UsageError            2   bad input: a file, a parameter, a gold case, an option
    │   └── UnreadableDocument    one document that no parser could read (read --skip-unreadable records it)
    ├── NotComputed           4   something that the verdict needs was not measured
    ├── Refused               5   the action was refused: busy, lost race, unknown digest, verdict not PASS
    └── EnvironmentFailure    6   store, network, engine, disk or memory

A message says which thing, what was expected, and what to do next.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from goldgate.pipeline.schema import Unreadable


class ExitCode(IntEnum):
    """What a `goldgate` command returns to the shell."""

    PASS = 0
    FAIL = 1
    USAGE = 2
    INCONCLUSIVE = 3
    NOT_COMPUTED = 4
    REFUSED = 5
    ENVIRONMENT = 6
    BUG = 70
    INTERRUPTED = 130


class GoldgateError(Exception):
    """An expected error, shown as one line. Subclasses differ only where a caller treats them differently."""

    exit_code = ExitCode.BUG

    def __init__(self, what: str, expected: str = "", do: str = "") -> None:
        """Keep the three parts of the message: `what` went wrong, what was `expected`, what to `do` next."""
        self.what = one_line(what)
        self.expected = one_line(expected)
        self.do = one_line(do)
        parts = [self.what]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.do:
            parts.append(self.do)
        super().__init__("; ".join(parts))


class UsageError(GoldgateError):
    """Bad input from a person or a file."""

    exit_code = ExitCode.USAGE


class UnreadableDocument(UsageError):
    """Documents that no parser could read, each in `unreadable`."""

    unreadable: tuple[Unreadable, ...] = ()


class NotComputed(GoldgateError):
    """Something that the verdict needs was not measured."""

    exit_code = ExitCode.NOT_COMPUTED


class Refused(GoldgateError):
    """The action was refused and nothing was changed."""

    exit_code = ExitCode.REFUSED


class EnvironmentFailure(GoldgateError):
    """The store, the network, the engine or the machine failed."""

    exit_code = ExitCode.ENVIRONMENT


def one_line(text: str) -> str:
    """Fold text onto one printable line, so that a hostile file name cannot forge a second line of output."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
