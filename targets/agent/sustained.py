"""The sustained mode on a device: minutes at full load, with clock and temperatures read between windows."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns, process_time_ns
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from portcall.targets.agent import fingerprint
from portcall.targets.agent.loaded import check_clock, loaded
from portcall.targets.agent.measure import collector_off, touched

_LEAST_CAPACITY, _MOST_CAPACITY = 1 << 18, 1 << 22
_FEWEST_WARMUP = 3
_STATE = ("cpu_mhz", "cpu_mhz_method", "temperatures_c", "load_average")


@dataclass(frozen=True)
class Series:
    """Begin, wall and CPU time of every inference in order, int64 ns.

    full: the arrays were, before the time was over.
    """

    begin_ns: np.ndarray
    wall_ns: np.ndarray
    cpu_ns: np.ndarray
    full: bool


Progress = Callable[[int, Optional[int]], None]


def measure(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Load the CPU for *duration_s*; the raw series goes to the npz *samples* (begin_ns, wall_ns, cpu_ns).

    arguments: see ``loaded``; window_s: how often clock and temperatures are read, outside of any inference. Answers
    with "observed": [{"t_s", "cpu_mhz", "cpu_mhz_method", "temperatures_c", "load_average", "absent"}], the first one
    before the series.
    """
    duration_s, window_s = float(arguments["duration_s"]), float(arguments["window_s"])
    windows = max(1, round(duration_s / window_s))
    observed: List[Dict[str, Any]] = []

    def observe(elapsed_ns: int) -> None:
        state = fingerprint.state()
        absent = {k: v for k, v in state.get("absent", {}).items() if k in _STATE}
        observed.append({"t_s": elapsed_ns / 1e9, **{k: state.get(k) for k in _STATE}, "absent": absent})
        progress(min(len(observed) - 1, windows), windows)

    with loaded(arguments) as found:
        series = run_series(
            found.sessions[0].infer,
            found.workload.warmup_s,
            duration_s,
            window_s,
            observe,
            deadline_ns=found.deadline_ns,
        )
        check_clock(series.begin_ns, series.begin_ns + series.wall_ns)
        answer = found.answer()
    np.savez(arguments["samples"], begin_ns=series.begin_ns, wall_ns=series.wall_ns, cpu_ns=series.cpu_ns)
    return {**answer, "n": int(series.wall_ns.size), "observed": observed, "full": series.full}


def run_series(
    infer: Callable[[], None],
    warmup_s: float,
    duration_s: float,
    window_s: float,
    observe: Callable[[int], None],
    *,
    deadline_ns: Optional[int] = None,
) -> Series:
    """Infer without a pause for *duration_s*, after a warm-up of at least 3 inferences.

    *observe* gets the ns since the start, before the series and then at the end of every window; nothing is timed
    meanwhile. The series ends early at *deadline_ns* (after at least one inference) or after 2^22 inferences: the
    arrays are allocated and touched before, and never grow.
    """
    deadline = 1 << 63 if deadline_ns is None else deadline_ns
    with collector_off():
        start = now = perf_counter_ns()
        stop, fastest, calls = min(start + int(warmup_s * 1e9), deadline), 1 << 63, 0
        while True:
            infer()
            before, now = now, perf_counter_ns()
            fastest = min(fastest, max(1, now - before))
            calls += 1
            if now >= stop and (calls >= _FEWEST_WARMUP or now >= deadline):
                break
        capacity = min(_MOST_CAPACITY, max(_LEAST_CAPACITY, 2 * int(duration_s * 1e9) // fastest + 1))
        arrays = touched(capacity), touched(capacity), touched(capacity)
        observe(0)
        count, elapsed_ns = _timed(
            infer,
            arrays,
            min(int(duration_s * 1e9), deadline - perf_counter_ns()),
            int(window_s * 1e9),
            observe,
        )
    begin, wall, cpu = (array[:count] for array in arrays)
    return Series(begin, wall, cpu, count == capacity and elapsed_ns < int(duration_s * 1e9))


def _timed(
    infer: Callable[[], None],
    arrays: Tuple[np.ndarray, np.ndarray, np.ndarray],
    duration_ns: int,
    window_ns: int,
    observe: Callable[[int], None],
) -> Tuple[int, int]:
    """Fill the arrays; return how many samples they hold and the ns that it took."""
    begins, walls, cpus = (array.data for array in arrays)
    wall_clock, cpu_clock = perf_counter_ns, process_time_ns
    capacity, count, window = len(begins), 0, window_ns
    start = wall_clock()
    while True:
        c0 = cpu_clock()
        t0 = wall_clock()
        infer()
        t1 = wall_clock()
        c1 = cpu_clock()
        begins[count] = t0 - start
        walls[count] = t1 - t0
        cpus[count] = c1 - c0
        count += 1
        elapsed = t1 - start
        if elapsed >= window or elapsed >= duration_ns or count == capacity:
            observe(elapsed)
            if elapsed >= duration_ns or count == capacity:
                return count, elapsed
            window += window_ns * (1 + (elapsed - window) // window_ns)  # one slow inference may span windows
