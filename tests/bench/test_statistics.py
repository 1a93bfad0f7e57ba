from __future__ import annotations

import math

import numpy as np
import pytest

from portcall.bench.statistics import (
    percentile,
    process_interval,
    samples_needed,
    student_t_quantile,
    summarize,
    supported_percentile,
)


@pytest.mark.parametrize(("q", "n"), [(0.5, 5), (0.9, 29), (0.95, 59), (0.99, 299), (0.999, 2995)])
def test_a_percentile_needs_enough_samples(q: float, n: int) -> None:
    assert supported_percentile(q, n)
    assert not supported_percentile(q, n - 1)
    assert samples_needed(q) == n


@pytest.mark.parametrize("q", [0.0, 1.0, 50.0, -0.5, math.nan])
def test_a_percentile_is_a_fraction(q: float) -> None:
    with pytest.raises(ValueError, match="fraction between 0 and 1"):
        supported_percentile(q, 10)
    with pytest.raises(ValueError, match="fraction between 0 and 1"):
        percentile(np.ones(3), q)


def test_percentile_interpolates_linearly() -> None:
    assert percentile(np.array([4, 1, 3, 2]), 0.5) == 2.5
    assert percentile(np.array([10]), 0.99) == 10.0
    assert percentile(np.arange(101), 0.95) == pytest.approx(95.0)
    with pytest.raises(ValueError, match="no samples"):
        percentile(np.array([]), 0.5)


def test_percentiles_of_a_known_distribution() -> None:
    samples = np.random.default_rng(3).exponential(1.0, 200_000)
    for q in (0.5, 0.9, 0.99):
        assert percentile(samples, q) == pytest.approx(-math.log(1 - q), rel=0.02)


def test_student_t_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed; portcall[dev] brings it")
    for p in (1e-12, 1e-6, 0.005, 0.025, 0.1, 0.4, 0.6, 0.9, 0.975, 0.995, 0.99999):
        for df in (0.5, *range(1, 201)):
            assert student_t_quantile(p, df) == pytest.approx(float(stats.t.ppf(p, df)), rel=1e-10)


def test_student_t_against_closed_forms() -> None:
    for p in (0.5, 0.5000001, 0.75, 0.975, 0.9999):
        assert student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-8, abs=1e-300)
        two = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
        assert student_t_quantile(p, 2) == pytest.approx(two, rel=1e-8, abs=1e-300)
        assert student_t_quantile(1 - p, 2) == pytest.approx(-two, rel=1e-8, abs=1e-300)
    assert student_t_quantile(0.975, 4) == pytest.approx(2.7764451051978)
    assert student_t_quantile(0.975, 1e6) == pytest.approx(1.959966, rel=1e-6)
    for p, df in ((0.0, 3), (1.0, 3), (0.5, 0), (math.nan, 3)):
        with pytest.raises(ValueError, match="need 0 < p < 1"):
            student_t_quantile(p, df)


def test_process_interval_of_few_processes() -> None:
    assert process_interval([]) is None
    assert process_interval([5.0]) is None
    assert process_interval([4.0, 4.0, 4.0]) == pytest.approx((4.0, 4.0))
    interval = process_interval([1.0, math.e])
    assert interval is not None
    half = 12.706204736432 * math.sqrt(0.5) / math.sqrt(2)
    assert interval == pytest.approx((math.exp(0.5 - half), math.exp(0.5 + half)))
    with pytest.raises(ValueError, match="finite values above 0"):
        process_interval([1.0, 0.0])
    with pytest.raises(ValueError, match="finite values above 0"):
        process_interval([math.inf, 1.0])


def test_the_t_interval_covers_where_a_bootstrap_does_not() -> None:
    """5 fresh processes with 5 % spread, as measured: nominal 95 % intervals of the typical process's P50."""
    rng = np.random.default_rng(20)
    runs, processes, typical = 4000, 5, 4.5e6
    values = typical * np.exp(rng.normal(0.0, 0.05, (runs, processes)))
    covered = 0
    for row in values:
        interval = process_interval(row)
        assert interval is not None
        covered += interval[0] <= typical <= interval[1]
    t_coverage = covered / runs

    resampled = np.take_along_axis(
        np.log(values)[:, None, :], rng.integers(0, processes, (runs, 300, processes)), axis=2
    ).mean(axis=2)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    bootstrap = float(np.mean((low <= math.log(typical)) & (math.log(typical) <= high)))

    # The standard error of a coverage of 95 % over 4000 runs is 0.34 %.
    assert 0.94 <= t_coverage <= 0.96
    assert bootstrap < 0.88


def test_summarize_nothing() -> None:
    for nothing in ([], [np.array([], dtype=np.int64)]):
        latency, warnings = summarize(nothing)
        assert latency["n"] == latency["processes"] == 0
        for key in ("min_ns", "p50_ns", "p90_ns", "p95_ns", "p99_ns", "mean_ns", "stdev_ns"):
            assert latency[key] is None
        assert latency["ci"] == {}
        assert "n=0: no p50 (needs 5)" in warnings


@pytest.mark.parametrize("n", [1, 2])
def test_summarize_one_or_two_samples(n: int) -> None:
    latency, warnings = summarize([np.array([100, 200][:n])])
    assert (latency["n"], latency["processes"], latency["min_ns"]) == (n, 1, 100)
    assert latency["mean_ns"] == (100.0 if n == 1 else 150.0)
    assert latency["stdev_ns"] == (None if n == 1 else pytest.approx(math.sqrt(5000)))
    assert latency["p50_ns"] is None
    assert f"n={n}: no p50 (needs 5)" in warnings
    assert "1 process: no interval; rerun with --processes 5" in warnings


def test_summarize_says_what_n_does_not_support() -> None:
    latency, warnings = summarize([np.arange(1, 21), np.arange(1, 21)])
    assert latency["p90_ns"] is not None
    assert latency["p95_ns"] is latency["p99_ns"] is None
    assert "n=40: no p99 (needs 299)" in warnings
    assert "n=40: no p95 (needs 59)" in warnings
    assert "no interval for p90: a process has n=20 (needs 29)" in warnings
    assert set(latency["ci"]) == {"mean_ns", "p50_ns"}


def test_summarize_pools_processes_and_gives_intervals() -> None:
    rng = np.random.default_rng(11)
    processes = [
        (4.5e6 * factor * rng.lognormal(0.0, 0.01, 400)).astype(np.int64)
        for factor in (0.98, 0.99, 1, 1.01, 1.02)
    ]
    latency, warnings = summarize(processes)
    pooled = np.concatenate(processes)
    assert warnings == []
    assert (latency["n"], latency["processes"]) == (2000, 5)
    assert isinstance(latency["min_ns"], int)
    assert latency["min_ns"] == pooled.min()
    assert latency["p99_ns"] == pytest.approx(np.quantile(pooled, 0.99))
    assert latency["stdev_ns"] == pytest.approx(pooled.std(ddof=1))
    assert latency["ci"]["p50_ns"] == list(process_interval([float(np.median(p)) for p in processes]) or ())
    assert set(latency["ci"]) == {"mean_ns", "p50_ns", "p90_ns", "p95_ns", "p99_ns"}
    for key, (low, high) in latency["ci"].items():
        assert low <= latency[key] <= high


def test_summarize_warns_when_processes_differ() -> None:
    processes = [np.full(400, v) for v in (1000, 1080)]
    _, warnings = summarize(processes)
    assert warnings == ["P50 varies 5.4 % between processes: rerun with --processes 10, or pin clocks"]
    _, warnings = summarize(processes * 5)
    assert warnings == []
    _, warnings = summarize([np.full(400, v) for v in (1000, 1300)] * 5)
    assert warnings == ["P50 varies 13.7 % between processes: rerun with --processes 20, or pin clocks"]


def test_summarize_tells_empty_processes_and_a_coarse_clock() -> None:
    latency, warnings = summarize([np.full(400, 5), np.full(400, 5), np.array([])])
    assert latency["processes"] == 2
    assert warnings == ["1 of 3 processes gave no samples"]
    latency, warnings = summarize([np.zeros(400), np.full(400, 5)])
    assert latency["ci"] == {}
    assert warnings == [
        "some latencies are 0 ns: no interval; the clock is too coarse, measure a larger batch"
    ]
