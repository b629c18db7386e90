"""Ctrl-C: what it must not wait for, and what it must not cut short."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """Yield `function(item)` for each of `items`, in order, `workers` at a time. What it raises is raised here.

    Whoever stops reading (Ctrl-C, an error) goes on at once, and so does the end of the process: a pool of
    concurrent.futures would wait for calls under way, which takes minutes with a slow endpoint.
    """
    futures: list[Future[R]] = [Future() for _ in items]
    work = iter(list(zip(items, futures, strict=True)))  # taking the next of a list is one step for all threads

    def run() -> None:
        for item, future in work:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(item))
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
                future.set_exception(error)

    for number in range(min(workers, len(items))):
        threading.Thread(target=run, daemon=True, name=f"map-{number}").start()
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM during a shutdown that is under way: cut short, it would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not SIG_IGN, which processes that are started meanwhile would inherit.
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(_: int, __: FrameType | None) -> None:
    """Receive a signal and do nothing."""
