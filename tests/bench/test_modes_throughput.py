"""Rates from overlapping streams, and the knee of a sweep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portcall.bench.modes_throughput import busy_rate, knee, point_figures

MS = 1_000_000


def _stream(start_ms: float, each_ms: float, count: int) -> tuple[Any, Any]:
    begin = ((start_ms + each_ms * np.arange(count)) * MS).astype(np.int64)
    return begin, begin + int(each_ms * MS)


def test_the_rate_of_equal_streams_is_their_sum() -> None:
    streams = [_stream(0, 10, 20), _stream(0, 10, 20)]
    assert busy_rate([b for b, _ in streams], [e for _, e in streams]) == pytest.approx(200)


@pytest.mark.parametrize("start_ms", [0.0, 3.7, 42.0])
def test_neither_start_nor_end_biases_the_rate(start_ms: float) -> None:
    """A counter of whole inferences over the whole time would lose the tails of the longer stream."""
    streams = [_stream(0, 10, 20), _stream(start_ms, 7, 50)]
    rate = busy_rate([b for b, _ in streams], [e for _, e in streams])
    assert rate == pytest.approx(1000 / 10 + 1000 / 7, rel=1e-3)


def test_streams_that_never_run_together_have_no_rate() -> None:
    streams = [_stream(0, 1, 5), _stream(100, 1, 5)]
    assert busy_rate([b for b, _ in streams], [e for _, e in streams]) is None


def _arrays(each_ms: float, streams: int = 2) -> dict[str, Any]:
    found = {}
    for i in range(streams):
        found[f"begin_ns_{i}"], found[f"end_ns_{i}"] = _stream(0, each_ms, 100)
    return found


def test_a_point_counts_samples_with_the_process_as_unit() -> None:
    line, warnings = point_figures(4, 2, 1, 2, [_arrays(10), _arrays(10.2), _arrays(9.8)])
    assert line["samples_per_s"] == pytest.approx(800, rel=0.01)
    low, high = line["ci"]
    assert low < line["samples_per_s"] < high
    assert (line["n"], line["processes"], line["in_flight"]) == (600, 3, 8)
    assert line["oversubscribed"] is False
    assert line["latency"]["p50_ns"] == pytest.approx(10 * MS)
    assert line["latency"]["p99_ns"] is not None
    assert any("no interval for p99" in w and w.startswith("batch 4, 2 streams") for w in warnings)


def test_one_process_has_no_interval_and_short_inferences_a_warning() -> None:
    line, warnings = point_figures(1, 2, 2, 2, [_arrays(0.1)])
    assert line["ci"] is None
    assert line["oversubscribed"] is True
    assert any("interpreter lock" in w for w in warnings)


def _sweep(*rates: float | None, width: float = 0.01) -> list[dict[str, Any]]:
    """Points with 1, 2, 4, ... in flight."""
    return [
        {
            "batch": 1,
            "streams": 1 << i,
            "in_flight": 1 << i,
            "samples_per_s": rate,
            "ci": None if rate is None else [rate * (1 - width), rate * (1 + width)],
            "latency": {"p50_ns": 1.0},
        }
        for i, rate in enumerate(rates)
    ]


def test_the_knee_is_the_least_point_at_95_percent() -> None:
    found = knee(_sweep(100, 190, 290, 300, 296))
    assert (found["best"], found["knee"], found["certain"], found["reason"]) == (3, 2, True, None)


def test_a_knee_within_the_noise_is_not_certain() -> None:
    assert knee(_sweep(100, 280, 290, 300, width=0.05))["certain"] is False
    points = _sweep(100, 280, 290, 300)
    for point in points:
        point["ci"] = None
    assert knee(points)["certain"] is None


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ((100, 200, 400, 800), "still rises"),
        ((100, 101, 99, 100), "more gains nothing"),
        ((100, 200), "needs 3"),
        ((100, None, None, 200), "needs 3"),
        ((None, None, None), "nothing was measured"),
    ],
)
def test_there_is_none_and_it_says_why(rates: tuple[float | None, ...], reason: str) -> None:
    found = knee(_sweep(*rates))
    assert found["knee"] is None
    assert reason in found["reason"]


def test_of_equal_concurrency_the_lower_latency_wins() -> None:
    points = _sweep(100, 300, 301, 302)
    points.insert(1, {**points[1], "batch": 2, "streams": 1, "latency": {"p50_ns": 0.5}})
    assert knee(points)["knee"] == 1
