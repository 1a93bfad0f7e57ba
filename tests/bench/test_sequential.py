"""Intervals that may be looked at after every value: what they promise, simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from portcall.bench.sequential import fixed_interval, sequential_half_width, sequential_interval


def test_too_few_values_have_no_interval() -> None:
    assert sequential_interval([]) is None
    assert sequential_interval([1.0]) is None
    assert sequential_interval([1.0, 2.0]) is None
    assert fixed_interval([]) is None
    assert fixed_interval([1.0]) is None


def test_the_half_width_solves_for_the_threshold_of_the_bayes_factor() -> None:
    """At the edge of the interval the Bayes factor of the t test is exactly 1 / (1 - level)."""
    for n in (5, 12, 60):
        for prior in (1.0, 5.0):
            t = sequential_half_width(n, 0.95, prior) * math.sqrt(n)
            df, scale = n - 1, 1 + n * prior
            factor = scale**-0.5 * ((1 + t * t / (df * scale)) / (1 + t * t / df)) ** (-n / 2)
            assert factor == pytest.approx(20.0, rel=1e-9)


def test_it_is_wider_than_a_fixed_interval_and_narrows() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200)
    for n in (5, 20, 200):
        low, high = sequential_interval(values[:n]) or (0.0, 0.0)
        fixed_low, fixed_high = fixed_interval(values[:n]) or (0.0, 0.0)
        assert low < fixed_low < fixed_high < high
    widths = [sequential_half_width(n) for n in range(3, 300)]
    assert widths == sorted(widths, reverse=True)


def test_equal_values_have_an_interval_of_width_zero() -> None:
    assert sequential_interval([0.5] * 10) == (0.5, 0.5)


@pytest.mark.parametrize("spread", [0.001, 7.0])
def test_looking_after_every_value_misses_in_at_most_one_of_twenty_runs(spread: float) -> None:
    rng = np.random.default_rng(1)
    runs, longest = 600, 60
    missed_sequential = missed_fixed = 0
    for _ in range(runs):
        values = 0.2 + spread * rng.standard_normal(longest)
        looks = range(3, longest + 1)
        found = [sequential_interval(values[:n]) for n in looks]
        fixed = [fixed_interval(values[:n]) for n in looks]
        missed_sequential += any(f is not None and not f[0] <= 0.2 <= f[1] for f in found)
        missed_fixed += any(f is not None and not f[0] <= 0.2 <= f[1] for f in fixed)
    assert missed_sequential / runs <= 0.05
    assert missed_fixed / runs > 0.15  # what looking again and again does to the other kind
