"""The arrival mode on a device: requests arrive when a Poisson process says so, whether the server is free or not."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from portcall.targets.agent.loaded import check_clock, loaded
from portcall.targets.agent.measure import collector_off, touched

_SPIN_NS = 1_000_000
"""The server sleeps until this long before a request is due, then spins: a sleep alone wakes 0.1 ms late."""


def measure(arguments: Mapping[str, Any], progress: Callable[[int, Optional[int]], None]) -> Dict[str, Any]:
    """Serve the arrivals of one process; raw times go to the npz *samples* (due_ns, begin_ns, end_ns).

    arguments: see ``loaded``; rate_per_s, duration_s (of the arrivals), drain_s (for what still waits then), seed (a
    list of integers). ``due_ns`` has every arrival, the others the served ones, all from the start of the arrivals.
    """
    due = poisson_arrivals(arguments["rate_per_s"], arguments["duration_s"], arguments["seed"])
    with loaded(arguments) as found:
        infer = found.sessions[0].infer
        stop = time.perf_counter_ns() + int(found.workload.warmup_s * 1e9)
        infer()
        while time.perf_counter_ns() < min(stop, found.deadline_ns or stop):
            infer()
        stop_ns = int((arguments["duration_s"] + arguments["drain_s"]) * 1e9)
        if found.deadline_ns is not None:
            stop_ns = max(0, min(stop_ns, found.deadline_ns - time.perf_counter_ns()))
        begin, end = serve(infer, due, stop_ns)
        check_clock(begin, end)
        answer = found.answer()
    # Where the budget ends first, what had not arrived by then is nobody's request.
    due = due[: max(begin.size, int(np.searchsorted(due, stop_ns)))]
    np.savez(arguments["samples"], due_ns=due, begin_ns=begin, end_ns=end)
    return {**answer, "n": int(end.size)}


def poisson_arrivals(rate_per_s: float, duration_s: float, seed: Any) -> np.ndarray:
    """Return the arrival times of a Poisson process, int64 ns, within *duration_s*; at least one.

    Gaps are exponential with mean 1 / rate. seed: of NumPy's PCG64, an integer or a list of them.
    """
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate_per_s, max(1, int(rate_per_s * duration_s * 1.2) + 100)))
    while times[-1] < duration_s:
        more = rng.exponential(1 / rate_per_s, times.size)
        times = np.concatenate([times, times[-1] + np.cumsum(more)])
    count = max(1, int(np.searchsorted(times, duration_s)))
    return (times[:count] * 1e9).astype(np.int64)


def serve(
    infer: Callable[[], None],
    due_ns: np.ndarray,
    stop_ns: int,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
    spin_ns: int = _SPIN_NS,
) -> Tuple[np.ndarray, np.ndarray]:
    """Serve requests one by one in order of arrival; return begin and end of each served one, int64 ns.

    due_ns: intended arrivals, ascending. All times count from the call. A request that is due while another is served
    waits, and begins right after it: nothing is left out because the server was slow. No request begins after
    *stop_ns*, but for the first. clock and sleep: those of a simulation, in tests.
    """
    due = due_ns.data
    begin, end = touched(len(due_ns)), touched(len(due_ns))
    begins, ends = begin.data, end.data
    count = 0
    with collector_off():
        origin = now = clock()
        for number in range(len(due)):
            if due[number] >= stop_ns and count:
                break
            arrives = origin + due[number]
            now = clock()
            while now < arrives:
                if arrives - now > spin_ns:
                    sleep((arrives - now - spin_ns) / 1e9)
                now = clock()
            if now - origin >= stop_ns and count:
                break
            infer()
            ends[count] = clock() - origin
            begins[count] = now - origin
            count += 1
    return begin[:count].copy(), end[:count].copy()
