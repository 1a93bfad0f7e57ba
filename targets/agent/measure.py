"""The measuring loop: one inference after the other, timed one by one, and nothing else inside."""

from __future__ import annotations

import gc
import math
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns, process_time_ns
from typing import Callable, Iterator, Optional, Tuple

import numpy as np

from portcall.targets.agent.errors import BadInput, CellFailed
from portcall.targets.agent.steady import FEWEST, Steady, judge

_FEWEST = 5
"""Timed inferences that a loop does even past *min_time_s*: below 5 not even a median is reported."""

_SPARE = 65_536
"""Smallest capacity (1 MiB in all): a slow first inference must not make the arrays too small."""

_NEVER = 1 << 63

_SLIDES = 4
"""A timed series that is not stationary loses its first quarter and goes on for as long."""


@dataclass(frozen=True)
class Samples:
    """Raw times of the timed inferences, in order.

    wall_ns, cpu_ns: int64, one entry per inference; CPU time is that of all threads of the process.
    warmup: inferences done before the timed ones. elapsed_ns: wall time of the timed loop, with what slid out of it.
    steady: None where the warm-up was fixed.
    """

    wall_ns: np.ndarray
    cpu_ns: np.ndarray
    warmup: int
    elapsed_ns: int
    steady: Optional[Steady] = None


def run_loop(
    infer: Callable[[], None],
    warmup_s: float,
    min_time_s: float,
    *,
    max_warmup_s: Optional[float] = None,
    min_count: int = _FEWEST,
    deadline_ns: Optional[int] = None,
    max_count: int = 1_000_000,
    on_warm: Optional[Callable[[], None]] = None,
    on_end: Optional[Callable[[], None]] = None,
) -> Samples:
    """Warm up, then time *infer* call by call until *min_time_s* has passed and *min_count* inferences are done.

    The warm-up does at least one inference; it starts another only if that should end within *warmup_s*. With
    *max_warmup_s* it goes on, piece by piece, until a piece is stationary (see ``steady``); then the timed series has
    to be stationary too: while it is not, its first quarter becomes warm-up and the loop goes on for as long. Where all
    warm-up together would exceed *max_warmup_s*, the series stays as it is and ``steady.reached`` is False.
    Series are judged between inferences, outside the timed region.

    The timed loop also ends at *deadline_ns* (of ``perf_counter_ns``), after *max_count* inferences or when the arrays
    are full. These are allocated and touched before the loop and never grow: they hold twice what the fastest warm-up
    inference predicts, and at least 65 536. At least 5 inferences are timed (fewer only if *max_count* says so), or 1
    if the deadline has passed. The garbage collector is off from the warm-up to the end and then as it was before.
    on_warm: called once between the warm-up and the timed loop; on_end: right after that.

    Overhead: a wall sample holds, beside the inference, one Python call and one clock read (about 0.1 us on a
    desktop CPU); a CPU sample also holds the wall clock's reads and most of a system call (about 1 us).
    ``overhead_ns`` tells what they are on this machine. Nothing is subtracted.
    Raises CellFailed if a clock goes backwards, and whatever *infer* raises.
    """
    times = [warmup_s, min_time_s, 0.0 if max_warmup_s is None else max_warmup_s]
    if not all(math.isfinite(t) and t >= 0 for t in times):
        raise BadInput(f"warm-up and minimum time must be finite and not negative: {warmup_s}, {min_time_s}")
    if max_count < 1 or min_count < 1:
        raise BadInput(f"max_count must be at least 1: {max_count}, and min_count: {min_count}")
    deadline = _NEVER if deadline_ns is None else deadline_ns
    budget_ns = 0 if max_warmup_s is None else int(max_warmup_s * 1e9)
    least_ns = int(warmup_s * 1e9) if max_warmup_s is None else min(int(warmup_s * 1e9), budget_ns)
    with collector_off():
        warmup = _warm_up(infer, least_ns, max(budget_ns, least_ns), deadline, max_warmup_s is not None)
        min_time_ns = int(min_time_s * 1e9)
        spare_ns = max(0, budget_ns - warmup.took_ns)
        predicted = 2 * (min_time_ns + min(spare_ns, 2 * min_time_ns)) // warmup.fastest_ns
        capacity = min(max_count, max(_SPARE, 2 * min_count, predicted + _FEWEST))
        wall_ns = touched(capacity)
        cpu_ns = touched(capacity)
        if on_warm is not None:
            on_warm()
            infer()  # what on_warm() did to the caches is not for a sample
        first, count, elapsed_ns = 0, 0, 0
        least = min(max(min_count, _FEWEST), capacity)
        # Judging takes time too, which no sample tells.
        give_up = 0 if max_warmup_s is None else min(deadline, perf_counter_ns() + min_time_ns + spare_ns)
        while True:
            left_ns = max(0, min_time_ns - int(wall_ns[first:count].sum()))
            count, took_ns = _timed(infer, count, left_ns, first + least, deadline, wall_ns, cpu_ns)
            elapsed_ns += took_ns
            if max_warmup_s is None:
                break
            found = judge(wall_ns[first:count])
            slide = max(1, (count - first) // _SLIDES)
            slide_ns = int(wall_ns[first : first + slide].sum())
            if found.stationary is not False or slide_ns > spare_ns or count == capacity:
                break
            if perf_counter_ns() + slide_ns >= give_up:
                break
            first, spare_ns = first + slide, spare_ns - slide_ns
        if on_end is not None:
            on_end()
    if int(cpu_ns[:count].min()) < 0:
        raise CellFailed(
            "the process CPU clock went backwards", "Measure on another kernel or outside the VM"
        )
    steady = None
    if max_warmup_s is not None:
        before_ns = warmup.took_ns + int(wall_ns[:first].sum())
        steady = Steady(bool(found.stationary), found.reason, found.change, before_ns)
    done = warmup.count + first + (on_warm is not None)
    return Samples(wall_ns[first:count].copy(), cpu_ns[first:count].copy(), done, elapsed_ns, steady)


def overhead_ns(count: int = 1000) -> Tuple[int, int]:
    """Return the median (wall, CPU) time in ns that the loop reports for an inference that does nothing."""
    samples = run_loop(_nothing, 0.0, 60.0, max_count=count)
    return int(np.median(samples.wall_ns)), int(np.median(samples.cpu_ns))


def _timed(
    infer: Callable[[], None],
    count: int,
    time_ns: int,
    fewest: int,
    deadline: int,
    wall_ns: np.ndarray,
    cpu_ns: np.ndarray,
) -> Tuple[int, int]:
    """Fill the arrays from *count* on; return how many samples they hold then and what the loop took."""
    wall_clock, cpu_clock = perf_counter_ns, process_time_ns
    # A memoryview takes a Python int in half the time that an ndarray does.
    wall, cpu = wall_ns.data, cpu_ns.data
    capacity = len(wall)
    fewest = min(fewest, capacity)
    start = last = wall_clock()
    stop = min(start + time_ns, deadline)
    while True:
        c0 = cpu_clock()
        t0 = wall_clock()
        infer()
        t1 = wall_clock()
        c1 = cpu_clock()
        if t0 < last or t1 < t0:
            raise _backwards(min(t0 - last, t1 - t0))
        last = t1
        wall[count] = t1 - t0
        cpu[count] = c1 - c0
        count += 1
        if (t1 >= stop and (count >= fewest or t1 >= deadline)) or count == capacity:
            return count, last - start


@dataclass(frozen=True)
class _Warmup:
    """How many inferences, the fastest one's time (at least 1), and what all took."""

    count: int
    fastest_ns: int
    took_ns: int


def _warm_up(
    infer: Callable[[], None], least_ns: int, budget_ns: int, deadline: int, until_steady: bool
) -> _Warmup:
    """Warm up for *least_ns*; with *until_steady*, until a piece is stationary or *budget_ns* is over."""
    times_ns = touched(_SPARE)
    count, fastest, took = 0, _NEVER, 0
    piece_ns = least_ns
    while True:
        fewest = FEWEST if until_steady else 1
        n, piece_took = _piece(infer, piece_ns, budget_ns - took, fewest, deadline, times_ns)
        count, took = count + n, took + piece_took
        fastest = min(fastest, int(times_ns[:n].min()))
        if n == _SPARE and took < least_ns:
            piece_ns = least_ns - took  # the array was full before the time was up
            continue
        now = perf_counter_ns() if until_steady else 0
        if not until_steady or judge(times_ns[:n]).stationary or took >= budget_ns or now >= deadline:
            return _Warmup(count, max(fastest, 1), took)
        if took + fastest > budget_ns:
            return _Warmup(count, max(fastest, 1), took)
        piece_ns = min(max(piece_ns, piece_took), budget_ns - took)


def _piece(
    infer: Callable[[], None], time_ns: int, budget_ns: int, fewest: int, deadline: int, times_ns: np.ndarray
) -> Tuple[int, int]:
    """Fill *times_ns* for *time_ns*, and up to *fewest* inferences within *budget_ns*; return count and elapsed ns."""
    clock, times = perf_counter_ns, times_ns.data
    start = now = clock()
    stop, end = min(start + time_ns, deadline), min(start + budget_ns, deadline)
    count = 0
    while True:
        infer()
        before, now = now, clock()
        took = now - before
        if took < 0:
            raise _backwards(took)
        times[count] = took
        count += 1
        limit = stop if count >= fewest else end
        if now + took > limit or now >= limit or count == _SPARE:
            return count, now - start


def touched(capacity: int) -> np.ndarray:
    """Return an int64 array whose pages are in memory (numpy.zeros would leave that to the timed loop)."""
    array = np.empty(capacity, dtype=np.int64)
    array.fill(-1)
    return array


@contextmanager
def collector_off() -> Iterator[None]:
    """Collect once, then keep the garbage collector off; afterwards it is as it was."""
    was_enabled = gc.isenabled()
    gc.collect()
    # unfreeze() knows only "everything": leave objects alone that the host froze itself.
    freeze = gc.get_freeze_count() == 0
    gc.disable()
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def _backwards(step_ns: int) -> CellFailed:
    return CellFailed(f"the wall clock went backwards by {-step_ns} ns", "Check the machine's clock source")


def _nothing() -> None:
    return None
