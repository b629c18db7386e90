from __future__ import annotations

import os
import signal
import threading

import pytest

from goldgate.pipeline.interrupts import map_in_threads, undisturbed


def test_results_keep_the_order_of_the_items() -> None:
    first_may_end = threading.Event()

    def double(number: int) -> int:
        if number == 0:
            assert first_may_end.wait(60)
        if number == 3:
            first_may_end.set()
        return 2 * number

    assert list(map_in_threads(double, range(5), workers=2)) == [0, 2, 4, 6, 8]
    assert list(map_in_threads(double, [], workers=2)) == []


def test_no_more_workers_than_asked_for() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1

    list(map_in_threads(count, range(200), workers=3))
    assert 1 <= most <= 3


def test_what_a_call_raises_is_raised_at_its_place() -> None:
    results = map_in_threads(lambda number: 1 // number, [1, 0, 1], workers=3)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_who_stops_reading_waits_for_nobody_and_starts_nothing_more() -> None:
    stuck, started = threading.Event(), []

    def call(number: int) -> int:
        started.append(number)
        if number:
            assert stuck.wait(60)
        return number

    results = map_in_threads(call, range(9), workers=2)
    assert next(results) == 0
    results.close()
    before = threading.active_count()
    stuck.set()
    for thread in threading.enumerate():
        if thread.name.startswith("map-"):
            thread.join(60)
    assert len(started) <= 3
    assert threading.active_count() <= before


def test_a_shutdown_is_not_cut_short() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = False
    with undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        done = True
    assert done
    assert signal.getsignal(signal.SIGINT) == before


def test_another_thread_shuts_down_as_it_can() -> None:
    ended = []

    def shut_down() -> None:
        with undisturbed():
            ended.append(True)

    thread = threading.Thread(target=shut_down)
    thread.start()
    thread.join()
    assert ended == [True]
