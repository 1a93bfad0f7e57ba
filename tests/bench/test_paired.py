"""Paired intervals: against independent implementations, at their limits, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.intervals import binary_rows, real_rows
from portcall.bench.paired import (
    exact_mcnemar,
    mean_interval,
    samples_for,
    score_interval,
    wilson_interval,
)
from portcall.bench.statistics import student_t_quantile

Z = 1.959963984540054


def _constrained(lost: int, gained: int, n: int, delta: float) -> float:
    """Return Tango's statistic with the nuisance share found on a grid: the likelihood at a fixed difference."""
    least = max(0.0, -delta)
    q = np.linspace(least, (1 - delta) / 2, 2_000_001)[1:-1]  # share lost; gained = q + delta
    p, rest = q + delta, 1 - 2 * q - delta
    inside = (p > 0) & (rest > 0)
    q, p, rest = q[inside], p[inside], rest[inside]
    likelihood = lost * np.log(q) + gained * np.log(p) + (n - lost - gained) * np.log(rest)
    best = float(q[likelihood.argmax()])
    return (gained - lost - n * delta) / math.sqrt(n * (2 * best + delta * (1 - delta)))


@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 4, 100), (1, 0, 44), (30, 55, 1000), (3, 3, 20)])
def test_the_ends_of_the_score_interval_are_where_the_statistic_is_z(lost: int, gained: int, n: int) -> None:
    low, high = score_interval(lost, gained, n)
    assert low < (gained - lost) / n < high
    assert _constrained(lost, gained, n, low) == pytest.approx(Z, abs=2e-3)
    assert _constrained(lost, gained, n, high) == pytest.approx(-Z, abs=2e-3)


def test_the_score_interval_without_discordant_samples_and_mirrored() -> None:
    low, high = score_interval(0, 0, 100)
    assert high == pytest.approx(Z * Z / (100 + Z * Z), abs=1e-9) and low == pytest.approx(-high, abs=1e-9)
    assert score_interval(9, 2, 50) == pytest.approx(tuple(-x for x in reversed(score_interval(2, 9, 50))))
    assert score_interval(1, 0, 1)[0] >= -1 and score_interval(0, 1, 1)[1] <= 1


@pytest.mark.parametrize("counts", [(1, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no paired outcomes"):
        score_interval(*counts)


def test_mcnemar_and_wilson_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for lost, gained in [(0, 0), (1, 0), (5, 1), (12, 30), (400, 460)]:
        expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert exact_mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    for successes, n in [(0, 10), (10, 10), (97, 100), (5, 1000)]:
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_a_mean_is_students_with_one_made_up_pair() -> None:
    differences = np.random.default_rng(0).normal(-0.1, 0.02, 5000)
    interval = mean_interval(differences, 1.0)
    assert interval is not None
    half = student_t_quantile(0.975, 4999) * differences.std(ddof=1) / math.sqrt(5000)
    assert interval == pytest.approx((differences.mean() - half, differences.mean() + half), abs=1e-4)
    assert mean_interval(np.array([0.3]), 1.0) is None and mean_interval(np.empty(0), 1.0) is None
    low, high = mean_interval(np.zeros(100), 0.5) or (0, 0)
    assert low == -high and 0.01 < high < 0.02  # no sample differs, and that is no proof that none ever will
    assert mean_interval(np.zeros(100), 0.0) == (0.0, 0.0)


def test_so_many_samples_decide() -> None:
    def at(n: int) -> tuple[float, float]:
        return score_interval(round(0.01 * n), round(0.01 * n), n)

    needed = samples_for(100, at, lambda i: i[1] - i[0] <= 0.02)
    assert needed is not None and at(needed)[1] <= 0.0101 and at(round(0.9 * needed))[1] > 0.01
    assert samples_for(100, at, lambda i: False) is None


def test_coverage_of_both_intervals() -> None:
    """Where the textbook intervals fail; the whole table: ``python -m benchmarks.intervals``."""
    binary = list(binary_rows((100,)))
    assert min(r["score"] for r in binary) >= 0.93
    assert min(r["wald"] for r in binary) < 0.80  # so the check can fail
    real = list(real_rows((100,), 400))
    assert min(r["adjusted t"] for r in real) >= 0.92  # 400 simulations of 95 %: standard error 1.1 points
    assert min(r["plain t"] for r in real) < 0.85
