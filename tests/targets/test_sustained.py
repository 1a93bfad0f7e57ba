"""The series of the sustained mode: continuous, in order, observed between inferences."""

from __future__ import annotations

import time

import numpy as np
import pytest

from portcall.targets.agent import sustained
from portcall.targets.agent.sustained import run_series


def _short() -> None:
    time.sleep(0.002)


def test_windows_are_observed_and_nothing_is_timed_meanwhile() -> None:
    observed: list[int] = []

    def observe(elapsed_ns: int) -> None:
        observed.append(elapsed_ns)
        time.sleep(0.03)

    series = run_series(_short, 0.0, 0.6, 0.1, observe)
    begin, wall, cpu = series.begin_ns, series.wall_ns, series.cpu_ns
    assert not series.full
    assert observed[0] == 0
    assert 3 <= len(observed) <= 7
    assert observed[-1] >= 0.6e9
    assert begin.size == wall.size == cpu.size > 20
    assert (np.diff(begin) > 0).all()
    assert begin[0] < 10e6
    assert np.median(wall) < 25e6, "the 30 ms of observing are in no sample"
    assert (begin[1:] >= begin[:-1] + wall[:-1]).all()
    assert (cpu >= 0).all()


def test_one_inference_longer_than_a_window_is_observed_once() -> None:
    observed: list[int] = []
    series = run_series(lambda: time.sleep(0.05), 0.0, 0.12, 0.01, observed.append)
    assert len(observed) == series.begin_ns.size + 1


def test_a_past_deadline_gives_one_inference() -> None:
    observed: list[int] = []
    series = run_series(_short, 5.0, 60.0, 1.0, observed.append, deadline_ns=0)
    assert series.begin_ns.size == 1
    assert len(observed) == 2


def test_the_warm_up_is_not_in_the_series() -> None:
    calls = [0]

    def count() -> None:
        calls[0] += 1
        time.sleep(0.001)

    series = run_series(count, 0.1, 0.02, 0.01, lambda _: None)
    assert calls[0] > series.begin_ns.size + 5


def test_full_arrays_end_the_series_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sustained, "_LEAST_CAPACITY", 10)
    monkeypatch.setattr(sustained, "_MOST_CAPACITY", 10)
    series = run_series(_short, 0.0, 60.0, 1.0, lambda _: None)
    assert series.full and series.wall_ns.size == 10
