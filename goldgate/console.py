"""Progress on stderr, and expected errors as one line."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from goldgate.pipeline.errors import one_line

err = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_EVERY_S = 5.0
"""How often a log (no terminal) gets a progress line."""


class Reporter:
    """Receives progress as (what, done, total): bars on a terminal, a line every few seconds in a log.

    `total` 0 means that the amount is not known.
    """

    def __init__(self) -> None:
        """Draw nothing until the first call."""
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> Self:
        if err.is_terminal:
            self._progress = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
                TimeElapsedColumn(), console=err,
            )  # fmt: skip
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` of `what` are finished."""
        what = one_line(what)
        if self._progress is not None:
            if what not in self._tasks:
                self._tasks[what] = self._progress.add_task(what, total=total or None)
            self._progress.update(self._tasks[what], completed=done, total=total or None)
            return
        now = time.monotonic()
        finished = total > 0 and done >= total
        if finished or now - self._last.get(what, float("-inf")) >= LINE_EVERY_S:
            self._last[what] = now
            note(f"{what}: {done}/{total}" if total else what)


def note(text: str) -> None:
    """Print one line for people on stderr."""
    err.print(text, markup=False)


def out(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
