from __future__ import annotations

import math

import numpy as np
import pytest

from portcall.bench.statistics import (
    percentile,
    process_interval,
    processes_for_width,
    relative_width,
    samples_needed,
    student_t_quantile,
    summarize,
    supported_percentile,
    trimmed_mean,
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
    assert set(latency["ci"]) == {"mean_ns", "trimmed_mean_ns", "p50_ns"}


def test_summarize_pools_processes_and_gives_intervals() -> None:
    rng = np.random.default_rng(11)
    processes = [
        (4.5e6 * factor * rng.lognormal(0.0, 0.01, 400)).astype(np.int64)
        for factor in (0.98, 0.99, 1, 1.01, 1.02)
    ]
    latency, warnings = summarize(processes)
    pooled = np.concatenate(processes)
    assert warnings == ["n=2000: no p99.9 (needs 2995)"]
    assert latency["p999_ns"] is None
    assert (latency["n"], latency["processes"]) == (2000, 5)
    assert isinstance(latency["min_ns"], int)
    assert latency["min_ns"] == pooled.min()
    assert latency["p99_ns"] == pytest.approx(np.quantile(pooled, 0.99))
    assert latency["stdev_ns"] == pytest.approx(pooled.std(ddof=1))
    assert latency["ci"]["p50_ns"] == list(process_interval([float(np.median(p)) for p in processes]) or ())
    assert set(latency["ci"]) == {"mean_ns", "trimmed_mean_ns", "p50_ns", "p90_ns", "p95_ns", "p99_ns"}
    for key, (low, high) in latency["ci"].items():
        assert low <= latency[key] <= high


def test_summarize_warns_when_processes_differ() -> None:
    processes = [np.full(3000, v) for v in (1000, 1080)]
    _, warnings = summarize(processes)
    assert warnings == ["P50 varies 5.4 % between processes: rerun with --processes 10, or pin clocks"]
    _, warnings = summarize(processes * 5)
    assert warnings == []
    _, warnings = summarize([np.full(3000, v) for v in (1000, 1300)] * 5)
    assert warnings == ["P50 varies 13.7 % between processes: rerun with --processes 20, or pin clocks"]


def test_summarize_tells_empty_processes_and_a_coarse_clock() -> None:
    latency, warnings = summarize([np.full(3000, 5), np.full(3000, 5), np.array([])])
    assert latency["processes"] == 2
    assert warnings == ["1 of 3 processes gave no samples"]
    latency, warnings = summarize([np.zeros(3000), np.full(3000, 5)])
    assert latency["ci"] == {}
    assert warnings == [
        "some latencies are 0 ns: no interval; the clock is too coarse, measure a larger batch"
    ]


def test_trimmed_mean_leaves_out_a_tenth_at_each_end() -> None:
    assert trimmed_mean(np.arange(10)) == 4.5
    assert trimmed_mean(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 1e9])) == 4.5
    assert trimmed_mean(np.array([7.0])) == 7.0
    assert trimmed_mean(np.array([1.0, 3.0])) == 2.0
    scipy = pytest.importorskip("scipy.stats", reason="SciPy is not installed; portcall[dev] brings it")
    values = np.random.default_rng(7).exponential(1.0, 997)
    assert trimmed_mean(values) == pytest.approx(scipy.trim_mean(values, 0.1))
    with pytest.raises(ValueError, match="no samples"):
        trimmed_mean(np.array([]))


def test_p999_needs_2995_samples() -> None:
    samples = np.random.default_rng(2).exponential(1e6, 6000)
    latency, warnings = summarize([samples[:3000], samples[3000:]])
    assert latency["p999_ns"] == pytest.approx(np.quantile(samples, 0.999))
    assert "p999_ns" in latency["ci"]
    assert not any("p99.9" in w for w in warnings)


def test_processes_for_width_is_enough_and_not_much_more() -> None:
    rng = np.random.default_rng(4)
    values = 1e6 * np.exp(rng.normal(0.0, 0.05, 12))
    for width in (0.2, 0.1, 0.05, 0.02):
        n = processes_for_width(list(values), width)
        assert n is not None
        spread = float(np.log(values).std(ddof=1))

        def width_with(count: int, spread: float = spread) -> float:
            half = student_t_quantile(0.975, count - 1) * spread / math.sqrt(count)
            return 2 * math.sinh(half)

        assert width_with(n) <= width * 1.0001
        assert n <= 3 or width_with(max(2, int(n * 0.9) - 1)) > width
    assert processes_for_width([1.0], 0.1) is None
    assert processes_for_width([5.0, 5.0], 0.1) == 2
    assert relative_width((98.0, 103.0), 100.0) == pytest.approx(0.05)


def test_from_20_processes_on_t_still_covers_at_least_what_a_bootstrap_does() -> None:
    """Spread of one process in ten up to a third slower than the others, and exponential logs."""
    rng = np.random.default_rng(8)
    runs, processes = 1500, 20

    def outliers(shape: tuple[int, int]) -> np.ndarray:
        return rng.normal(0, 0.03, shape) + np.where(rng.random(shape) < 0.1, 0.3 * rng.random(shape), 0)

    shape = (runs, processes)
    for logs, mean in ((outliers(shape), 0.015), (np.asarray(rng.exponential(0.05, shape)), 0.05)):
        covered = 0
        for row in logs:
            interval = process_interval(list(np.exp(row)))
            assert interval is not None
            covered += interval[0] <= math.exp(mean) <= interval[1]
        means = np.stack([logs[:, rng.integers(0, processes, processes)].mean(axis=1) for _ in range(200)])
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        assert covered / runs >= float(np.mean((low <= mean) & (mean <= high))) - 0.01
        assert covered / runs >= 0.86
