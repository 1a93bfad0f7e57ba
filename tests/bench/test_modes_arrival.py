"""Response times, utilization and saturation, from simulated queues whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portcall.bench.modes_arrival import arrival_figures, drained, greatest_queue, lateness_ns, response_times
from portcall.targets.agent.arrival import poisson_arrivals

S = 1_000_000_000


def queue(
    rate: float, service_s: float, duration_s: float, seed: int, drain_s: float = 1e9
) -> dict[str, Any]:
    """A queue with a constant service time, by Lindley's recursion."""
    due = poisson_arrivals(rate, duration_s, seed)
    begin, free = [], 0
    for arrives in due.tolist():
        start = max(arrives, free)
        if start >= (duration_s + drain_s) * S:
            break
        begin.append(start)
        free = start + int(service_s * S)
    begins = np.array(begin, np.int64)
    return {"due_ns": due, "begin_ns": begins, "end_ns": begins + int(service_s * S)}


def test_figures_agree_with_m_d_1() -> None:
    rate, service_s = 100.0, 0.006
    found, warnings = arrival_figures([queue(rate, service_s, 200, s) for s in range(5)], rate, 0)
    wait_s = 0.6 * service_s / (2 * 0.4)
    assert found["mean_wait_ns"] == pytest.approx(wait_s * S, rel=0.05)
    assert found["mg1_wait_ns"] == pytest.approx(wait_s * S, rel=1e-3)
    assert found["offered_load"]["mean"] == pytest.approx(0.6, rel=1e-3)
    assert found["utilization"]["mean"] == pytest.approx(0.6, rel=0.03)
    assert found["saturated"] is False
    assert found["unfinished"] == 0
    assert found["response"]["p50_ns"] < found["response"]["p99_ns"]
    assert found["service"]["p99_ns"] == pytest.approx(service_s * S)
    assert found["served_per_s"] == pytest.approx(rate, rel=0.03)
    assert not warnings


def test_a_queue_that_never_drains_is_saturated() -> None:
    found, warnings = arrival_figures([queue(100, 0.012, 20, s, drain_s=0) for s in range(3)], 100, 0)
    assert found["saturated"] is True
    assert found["offered_load"]["mean"] == pytest.approx(1.2)
    assert found["utilization"]["mean"] == pytest.approx(1, abs=0.01)
    assert found["unfinished"] > 500
    assert found["mg1_wait_ns"] is None
    assert found["greatest_queue"] > 100
    assert found["served_per_s"] == pytest.approx(1 / 0.012, rel=0.02)
    assert any(w.startswith("saturated") and "lower --rate than 83.3" in w for w in warnings)
    response = found["response"]
    assert response["p50_ns"] is not None and response["p99_ns"] is None and response["mean_ns"] is None
    assert response["ci"] == {}
    assert any("never served" in w for w in warnings)


def test_the_response_counts_from_the_intended_arrival() -> None:
    arrays = {
        "due_ns": np.array([0, 10, 20, 30], np.int64),
        "begin_ns": np.array([0, 100, 200], np.int64),
        "end_ns": np.array([100, 200, 300], np.int64),
    }
    response, service = response_times(arrays)
    assert response.tolist() == [100, 190, 280, np.inf]
    assert service.tolist() == [100, 100, 100]
    assert greatest_queue(arrays) == 3 - 1, "as the fourth arrives, the second and the third wait"
    assert lateness_ns(arrays).tolist() == [0, 0, 0]
    late = {**arrays, "begin_ns": np.array([5, 100, 203], np.int64)}
    assert lateness_ns(late).tolist() == [5, 0, 3]


def test_the_first_tenth_is_not_counted() -> None:
    arrays = queue(100, 0.001, 10, 1)
    n = arrays["due_ns"].size
    assert response_times(arrays)[0].size == n - n // 10


def test_too_few_requests_say_nothing_about_saturation() -> None:
    arrays = queue(10, 0.001, 2, 1)
    assert drained(arrays) is None
    found, warnings = arrival_figures([arrays], 10, 0)
    assert found["saturated"] is None
    assert any("saturation unknown" in w for w in warnings)
    assert found["response"]["p99_ns"] is None


@pytest.mark.parametrize(("load", "expected"), [(0.5, True), (0.8, True), (1.1, False)])
def test_drained_tells_overload_from_load(load: float, expected: bool) -> None:
    found = [drained(queue(100 * load, 0.01, 30, seed)) for seed in range(20)]
    assert sum(d is expected for d in found) >= 19


def test_a_server_that_is_woken_late_is_said() -> None:
    arrays = queue(50, 0.001, 10, 1)
    late = {**arrays, "begin_ns": arrays["begin_ns"] + 400_000, "end_ns": arrays["end_ns"] + 400_000}
    found, warnings = arrival_figures([late], 50, 0)
    assert found["lateness"]["p50_ns"] == pytest.approx(400_000)
    assert any("P95 of lateness is 400 us" in w for w in warnings)
