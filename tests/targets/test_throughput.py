"""Streams that infer at the same time: what is timed, how it ends, what happens to an error."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from portcall.targets.agent.errors import CellFailed
from portcall.targets.agent.loaded import check_clock
from portcall.targets.agent.throughput import run_streams


def _sleep() -> None:
    time.sleep(0.004)


def test_streams_overlap_in_time() -> None:
    streams = run_streams([_sleep] * 3, 0.0, 0.15)
    assert len(streams) == 3
    opened, closed = max(b[0] for b, _ in streams), min(e[-1] for _, e in streams)
    assert closed - opened > 100e6, "all of them run for most of the time"
    for begin, end in streams:
        assert begin.dtype == end.dtype == np.int64
        assert (end > begin).all()
        assert (begin[1:] >= end[:-1]).all(), "one call after the other within a stream"


def test_every_stream_has_a_thread_of_its_own() -> None:
    seen: list[set[int]] = [set(), set()]

    def note(number: int) -> None:
        seen[number].add(threading.get_ident())
        time.sleep(0.001)

    run_streams([lambda: note(0), lambda: note(1)], 0.0, 0.02)
    assert len(seen[0]) == len(seen[1]) == 1
    assert seen[0] != seen[1]
    assert threading.get_ident() not in seen[0] | seen[1]


def test_no_time_still_gives_five_calls_and_a_past_deadline_one() -> None:
    assert [b.size for b, _ in run_streams([_sleep] * 2, 0.0, 0.0)] == [5, 5]
    assert [b.size for b, _ in run_streams([_sleep] * 2, 9.0, 9.0, deadline_ns=0)] == [1, 1]


def test_the_warm_up_is_not_recorded() -> None:
    calls = [0]

    def count() -> None:
        calls[0] += 1
        time.sleep(0.001)

    [(begin, _)] = run_streams([count], 0.05, 0.0)
    assert begin.size == 5
    assert calls[0] > 10


def test_an_error_in_one_stream_ends_all_and_is_raised() -> None:
    def fail() -> None:
        raise RuntimeError("out of device memory")

    start = time.monotonic()
    with pytest.raises(RuntimeError, match="out of device memory"):
        run_streams([_sleep, fail], 0.01, 60.0)
    assert time.monotonic() - start < 30


def test_an_error_inside_the_timed_loop_is_raised() -> None:
    calls = [0]

    def later() -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("lost the device")

    with pytest.raises(RuntimeError, match="lost the device"):
        run_streams([later], 0.0, 0.0)


def test_a_clock_that_goes_backwards_is_refused() -> None:
    check_clock(np.array([0, 10, 20]), np.array([10, 20, 30]))
    with pytest.raises(CellFailed, match="backwards"):
        check_clock(np.array([0, 10]), np.array([5, 9]))
    with pytest.raises(CellFailed, match="backwards"):
        check_clock(np.array([0, 10, 14]), np.array([5, 15, 30]))
