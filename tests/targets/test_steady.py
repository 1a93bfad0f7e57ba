"""The judgement of series of every kind that a warm-up can be, and what the loop makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from portcall.targets.agent import measure
from portcall.targets.agent.measure import Samples, run_loop
from portcall.targets.agent.steady import FEWEST, judge

Array = np.ndarray


def noise(seed: int, n: int, level: float = 1e6) -> Array:
    """Latencies around *level* ns: 1 % of spread, and one in fifty up to ten times as slow."""
    rng = np.random.default_rng(seed)
    values = level * rng.lognormal(0.0, 0.01, n)
    slow = rng.random(n) < 0.02
    return np.where(slow, values * rng.uniform(1, 10, n), values).astype(np.int64)


@pytest.mark.parametrize("level", [5e3, 1e6, 2e9])
@pytest.mark.parametrize("n", [FEWEST, 8, 19, 20, 200, 20_000])
def test_flat_series_with_a_heavy_tail_are_stationary(n: int, level: float) -> None:
    right = [judge(noise(seed, n, level)).stationary for seed in range(40)]
    assert right.count(True) >= 37


@pytest.mark.parametrize("n", [20, 200, 20_000])
@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("size", [0.9, 1.1, 3.0])
def test_a_step_is_seen(n: int, at: float, size: float) -> None:
    series = noise(1, n)
    series[: int(at * n)] = (series[: int(at * n)] * size).astype(np.int64)
    found = judge(series)
    assert found.stationary is False
    assert found.change == pytest.approx(1 / size - 1, abs=0.03)
    assert found.reason is not None and "%" in found.reason


@pytest.mark.parametrize("n", [40, 20_000])
def test_ramps_decays_and_drifts_are_seen(n: int) -> None:
    place = np.arange(n) / n
    shapes = {
        "ramp": 1 + 0.3 * np.clip(1 - 3 * place, 0, None),
        "decay": 1 + np.exp(-place / 0.1),
        "slow drift": 1 + 0.08 * place,
        "speeding up": 1 / (1 + 0.08 * place),
    }
    for name, shape in shapes.items():
        assert judge((noise(2, n) * shape).astype(np.int64)).stationary is False, name


@pytest.mark.parametrize("period", [7, 60, 400])
def test_what_repeats_is_stationary(period: int) -> None:
    place = np.arange(4000)
    series = noise(3, 4000) * (1 + 0.2 * (place % period < period // 3))
    assert judge(series.astype(np.int64)).stationary is True


def test_a_single_slow_first_inference_is_no_change_of_level() -> None:
    series = noise(4, 200)
    series[0] *= 50
    assert judge(series).stationary is True


def test_a_change_that_nobody_minds_is_left_alone() -> None:
    series = np.full(1000, 1_000_000)
    series[500:] = 1_015_000
    assert judge(series).stationary is True
    series[500:] = 1_040_000
    assert judge(series).stationary is False


@pytest.mark.parametrize("n", range(FEWEST))
def test_too_few_inferences_are_not_judged(n: int) -> None:
    found = judge(np.full(n, 1000))
    assert found.stationary is None and found.change is None
    assert found.reason == f"n={n}: too few inferences to tell (needs 5)"


def test_latencies_of_zero_do_no_harm() -> None:
    assert judge(np.zeros(100, np.int64)).stationary is True


class Clock:
    """A clock that every inference advances by the next latency of a series."""

    def __init__(self, series: Array) -> None:
        self.times = [int(t) for t in series]
        self.now = self.done = 0

    def infer(self) -> None:
        self.now += self.times[self.done]
        self.done += 1

    def read(self) -> int:
        return self.now


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def run(series: Array, **options: float) -> tuple[Samples, int]:
        clock = Clock(series)
        monkeypatch.setattr(measure, "perf_counter_ns", clock.read)
        monkeypatch.setattr(measure, "process_time_ns", clock.read)
        samples = run_loop(clock.infer, 0.25, 1.0, **{"max_warmup_s": 3.0, **options})  # type: ignore[arg-type]
        assert clock.done == samples.warmup + samples.wall_ns.size
        return samples, clock.done

    yield run
    monkeypatch.undo()


def test_a_flat_series_is_timed_right_after_the_least_warm_up(replayed: object) -> None:
    samples, _ = replayed(noise(5, 20_000))  # type: ignore[operator]
    assert samples.steady is not None and samples.steady.reached
    assert 0.2e9 < samples.steady.warmup_ns < 0.35e9
    assert 0.95e9 < samples.wall_ns.sum() < 1.1e9


def test_a_late_step_slides_out_of_the_timed_series(replayed: object) -> None:
    series = noise(6, 20_000)
    series[:600] *= 2  # until about 1.2 s, 0.95 s into the timed series
    samples, _ = replayed(series)  # type: ignore[operator]
    assert samples.steady is not None and samples.steady.reached
    assert samples.warmup >= 540, "a tenth of what is timed at most may be from before the step"
    assert np.median(samples.wall_ns) < 1.05e6
    assert samples.wall_ns.sum() > 0.9e9, "still the whole minimum time"


def test_a_drift_that_never_ends_is_timed_and_flagged(replayed: object) -> None:
    series = (noise(7, 20_000) * (1 + 0.0001 * np.arange(20_000))).astype(np.int64)
    samples, _ = replayed(series)  # type: ignore[operator]
    assert samples.steady is not None and not samples.steady.reached
    assert samples.steady.reason is not None and "P50 moved by +" in samples.steady.reason
    assert samples.steady.warmup_ns < 3.1e9
    assert samples.wall_ns.sum() > 0.9e9


def test_slow_inferences_keep_to_the_budget(replayed: object) -> None:
    """One second each: three fit into the warm-up's budget, and five are timed."""
    samples, done = replayed(np.full(50, 1_000_000_000))  # type: ignore[operator]
    assert samples.wall_ns.size == 5
    assert done <= 9
    assert samples.steady is not None and samples.steady.reached


def test_no_budget_means_no_more_than_the_least(replayed: object) -> None:
    samples, _ = replayed(noise(8, 20_000) * 2, max_warmup_s=0.0)  # type: ignore[operator]
    assert samples.warmup == 1
    assert samples.steady is not None and samples.steady.reached


def test_a_minimum_count_outlasts_the_minimum_time(replayed: object) -> None:
    samples, _ = replayed(noise(9, 20_000), min_count=3000)  # type: ignore[operator]
    assert samples.wall_ns.size == 3000
