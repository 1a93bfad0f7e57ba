"""The throughput mode on a device: several streams infer at the same time, each from a thread of its own."""

from __future__ import annotations

import threading
from time import perf_counter_ns
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from portcall.targets.agent.loaded import check_clock, loaded
from portcall.targets.agent.measure import collector_off, touched

_FEWEST = 5
_LEAST_CAPACITY, _MOST_CAPACITY = 1 << 16, 1 << 20
_NEVER = 1 << 63

Stream = Tuple[np.ndarray, np.ndarray]
"""Begin and end of every inference of one stream, int64 ns of one clock."""


def measure(arguments: Mapping[str, Any], progress: Callable[[int, Optional[int]], None]) -> Dict[str, Any]:
    """Measure one point of the sweep in this process; raw times go to the npz *samples*.

    arguments: see ``loaded``; streams: how many. The npz holds ``begin_ns_I`` and ``end_ns_I`` of stream I, from the
    first begin on.
    """
    with loaded(arguments, arguments["streams"]) as found:
        workload = found.workload
        infers = [session.infer for session in found.sessions]
        streams = run_streams(infers, workload.warmup_s, workload.min_time_s, deadline_ns=found.deadline_ns)
        answer = found.answer()
    origin = min(int(begin[0]) for begin, _ in streams)
    arrays: Dict[str, Any] = {}
    for number, (begin, end) in enumerate(streams):
        check_clock(begin, end)
        arrays[f"begin_ns_{number}"], arrays[f"end_ns_{number}"] = begin - origin, end - origin
    np.savez(arguments["samples"], **arrays)
    return {**answer, "n": sum(begin.size for begin, _ in streams)}


def run_streams(
    infers: Sequence[Callable[[], None]],
    warmup_s: float,
    min_time_s: float,
    *,
    deadline_ns: Optional[int] = None,
) -> List[Stream]:
    """Call every *infer* in a thread of its own, one call after the other; return the begin and end of each call.

    All streams warm up together (at least one call each), then start together at a barrier. Each does at least 5
    calls and ends after *min_time_s*, at *deadline_ns* (then 1 call is enough) or when its arrays (at most 2^20 calls)
    are full. The garbage collector is off. Python's interpreter lock is held between two calls, never inside a call
    that releases it, as the runtimes' do. Raises what an *infer* raises.
    """
    deadline = _NEVER if deadline_ns is None else deadline_ns
    stop = [0]

    def release() -> None:
        stop[0] = perf_counter_ns() + int(min_time_s * 1e9)

    barrier = threading.Barrier(len(infers), action=release)
    found: List[Optional[Stream]] = [None] * len(infers)
    errors: List[BaseException] = []

    def work(number: int) -> None:
        try:
            fastest = _warm_up(infers[number], int(warmup_s * 1e9), deadline)
            capacity = 2 * int(min_time_s * 1e9) // fastest + _FEWEST
            capacity = min(_MOST_CAPACITY, max(_LEAST_CAPACITY, capacity))
            begin, end = touched(capacity), touched(capacity)
            barrier.wait()
            found[number] = _timed(infers[number], begin, end, stop[0], deadline)
        except threading.BrokenBarrierError:  # another stream failed
            pass
        except BaseException as error:  # raised below, in the caller's thread
            errors.append(error)
            barrier.abort()

    with collector_off():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(infers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return [stream for stream in found if stream is not None]


def _warm_up(infer: Callable[[], None], warmup_ns: int, deadline: int) -> int:
    """Infer until the time is over; return the fastest call's ns (at least 1)."""
    start = now = perf_counter_ns()
    stop, fastest = min(start + warmup_ns, deadline), _NEVER
    while True:
        infer()
        before, now = now, perf_counter_ns()
        fastest = min(fastest, now - before)
        if now >= stop:
            return max(fastest, 1)


def _timed(infer: Callable[[], None], begin: np.ndarray, end: np.ndarray, stop: int, deadline: int) -> Stream:
    begins, ends, clock = begin.data, end.data, perf_counter_ns
    capacity, count = len(begins), 0
    stop = min(stop, deadline)
    while True:
        t0 = clock()
        infer()
        t1 = clock()
        begins[count] = t0
        ends[count] = t1
        count += 1
        if (t1 >= stop and (count >= _FEWEST or t1 >= deadline)) or count == capacity:
            return begin[:count].copy(), end[:count].copy()
