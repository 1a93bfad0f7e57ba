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

_FEWEST = 5
"""Timed inferences that a loop does even past *min_time_s*: below 5 not even a median is reported."""

_SPARE = 65_536
"""Smallest capacity (1 MiB in all): a slow first inference must not make the arrays too small."""

_NEVER = 1 << 63


@dataclass(frozen=True)
class Samples:
    """Raw times of the timed inferences, in order.

    wall_ns, cpu_ns: int64, one entry per inference; CPU time is that of all threads of the process.
    warmup: inferences done before the timed ones. elapsed_ns: wall time of the whole timed loop.
    """

    wall_ns: np.ndarray
    cpu_ns: np.ndarray
    warmup: int
    elapsed_ns: int


def run_loop(
    infer: Callable[[], None],
    warmup_s: float,
    min_time_s: float,
    *,
    deadline_ns: Optional[int] = None,
    max_count: int = 1_000_000,
) -> Samples:
    """Warm up, then time *infer* call by call until *min_time_s* has passed.

    The warm-up does at least one inference; it starts another only if that should end within *warmup_s*.
    The timed loop ends at *min_time_s*, at *deadline_ns* (of ``perf_counter_ns``), after *max_count*
    inferences or when the arrays are full. These are allocated and touched before the loop and never grow:
    they hold twice what the fastest warm-up inference predicts, and at least 65 536. At least 5 inferences
    are timed (fewer only if *max_count* says so), or 1 if the deadline has passed.
    The garbage collector is off from the warm-up to the end and then as it was before.

    Overhead: a wall sample holds, beside the inference, one Python call and one clock read (about 0.1 us on a
    desktop CPU); a CPU sample also holds the wall clock's reads and most of a system call (about 1 us).
    ``overhead_ns`` tells what they are on this machine. Nothing is subtracted.
    Raises CellFailed if a clock goes backwards, and whatever *infer* raises.
    """
    if not (math.isfinite(warmup_s) and warmup_s >= 0 and math.isfinite(min_time_s) and min_time_s >= 0):
        raise BadInput(f"warm-up and minimum time must be finite and not negative: {warmup_s}, {min_time_s}")
    if max_count < 1:
        raise BadInput(f"max_count must be at least 1: {max_count}")
    deadline = _NEVER if deadline_ns is None else deadline_ns
    with _collector_off():
        warmup, fastest_ns = _warm_up(infer, int(warmup_s * 1e9), deadline)
        min_time_ns = int(min_time_s * 1e9)
        capacity = min(max_count, max(_SPARE, 2 * min_time_ns // fastest_ns + _FEWEST))
        wall_ns = _touched(capacity)
        cpu_ns = _touched(capacity)
        count, elapsed_ns = _timed(infer, min_time_ns, deadline, wall_ns, cpu_ns)
    if int(cpu_ns[:count].min()) < 0:
        raise CellFailed(
            "the process CPU clock went backwards", "Measure on another kernel or outside the VM"
        )
    return Samples(wall_ns[:count].copy(), cpu_ns[:count].copy(), warmup, elapsed_ns)


def overhead_ns(count: int = 1000) -> Tuple[int, int]:
    """Return the median (wall, CPU) time in ns that the loop reports for an inference that does nothing."""
    samples = run_loop(_nothing, 0.0, 60.0, max_count=count)
    return int(np.median(samples.wall_ns)), int(np.median(samples.cpu_ns))


def _timed(
    infer: Callable[[], None], min_time_ns: int, deadline: int, wall_ns: np.ndarray, cpu_ns: np.ndarray
) -> Tuple[int, int]:
    """Fill the arrays; return how many samples they hold and what the loop took."""
    wall_clock, cpu_clock = perf_counter_ns, process_time_ns
    # A memoryview takes a Python int in half the time that an ndarray does.
    wall, cpu = wall_ns.data, cpu_ns.data
    capacity, fewest = len(wall), min(_FEWEST, len(wall))
    count = 0
    start = last = wall_clock()
    stop = min(start + min_time_ns, deadline)
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


def _warm_up(infer: Callable[[], None], warmup_ns: int, deadline: int) -> Tuple[int, int]:
    """Return how many inferences were done and the fastest one's time in ns (at least 1)."""
    clock = perf_counter_ns
    now = clock()
    stop = min(now + warmup_ns, deadline)
    count, fastest = 0, _NEVER
    while True:
        infer()
        before, now = now, clock()
        took = now - before
        if took < 0:
            raise _backwards(took)
        count += 1
        fastest = min(fastest, took)
        if now + took > stop or now >= stop:
            return count, max(fastest, 1)


def _touched(capacity: int) -> np.ndarray:
    """Return an int64 array whose pages are in memory (numpy.zeros would leave that to the timed loop)."""
    array = np.empty(capacity, dtype=np.int64)
    array.fill(-1)
    return array


@contextmanager
def _collector_off() -> Iterator[None]:
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
