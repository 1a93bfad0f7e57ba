"""Energy of one artifact, in a pass of its own: idle and busy windows in turn, joules per inference.

The job ``measure_energy``. The counters are those of the whole package or board: what else runs there counts too, which
is why an idle window (the artifact loaded, nothing running) stands before every busy one.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable, Dict, List, Mapping

from portcall.targets.agent import energy, jobs, opening
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.nvml import Absent

PAIRS = 3
WARMUP_S = 0.25
UPDATES = 50
"""A window lasts this many updates of the slowest counter, so that its resolution is 2 % of the window or finer ..."""
SHORTEST_S, LONGEST_S = 0.5, 10.0
"""... within these limits."""


def measure(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """Return the key ``energy`` of a bench result: see ``summary``, or {"available": False, "reason", "fix"}."""
    artifact = Artifact.from_json(arguments["artifact"])
    counters = energy.find(kinds=energy.kinds_of(artifact.backend))
    if isinstance(counters, Absent):
        return counters.to_json()
    workload = Workload.from_json(arguments["workload"])
    backend, artifact, _ = opening.ready(artifact, workload)
    inputs, _ = opening.read_inputs(arguments["inputs"])
    with backend.load(artifact, workload) as session:
        names = opening.Names(artifact, session)
        names.bind(session, opening.batch_of(session, names, inputs, workload.batch))
        try:
            answer = metered(session.infer, counters, workload.batch)
        except OSError as error:
            return Absent("an energy counter failed: %s" % error).to_json()
        opening.check_outputs(names, session, arguments, limit=1)
    return answer


def metered(
    infer: Callable[[], None],
    counters: List[energy.Counter],
    batch: int,
    sleep: Callable[[float], None] = time.sleep,
) -> Dict[str, Any]:
    """Return joules per inference over ``PAIRS`` pairs of an idle and a busy window. Raises OSError.

    joules_per_inference: all that the counters saw in a busy window; net_joules_per_inference: less what the idle
    windows drew in that time. Both are medians over pairs, "spread" the least and the largest.
    """
    window_s = min(LONGEST_S, max(SHORTEST_S, UPDATES * max(c.update_s for c in counters)))
    _busy(infer, WARMUP_S)
    meter = energy.Meter(counters)
    idle_w, busy_w, gross, net, counts = [], [], [], [], []
    by_counter: Dict[str, List[float]] = {c.name: [] for c in counters}
    for _ in range(PAIRS):
        start = time.perf_counter()
        meter.start()
        sleep(window_s)
        idle_w.append(meter.poll() / (time.perf_counter() - start))
        start = time.perf_counter()
        meter.start()
        count = _busy(infer, window_s)
        joules, seconds = meter.poll(), time.perf_counter() - start
        busy_w.append(joules / seconds)
        gross.append(joules / count)
        net.append((joules - idle_w[-1] * seconds) / count)
        counts.append(count)
        for name, value in meter.joules.items():
            by_counter[name].append(value / count)
    return {
        "available": True,
        "reason": None,
        "fix": None,
        "method": " + ".join(sorted({c.method for c in counters})),
        "joules_per_inference": statistics.median(gross),
        "net_joules_per_inference": statistics.median(net),
        "spread": {
            "joules_per_inference": [min(gross), max(gross)],
            "net_joules_per_inference": [min(net), max(net)],
        },
        "idle_watts": statistics.median(idle_w),
        "busy_watts": statistics.median(busy_w),
        "counters": {name: statistics.median(values) for name, values in by_counter.items()},
        "batch": batch,
        "n": sum(counts),
        "windows": PAIRS,
        "window_s": window_s,
    }


def _busy(infer: Callable[[], None], seconds: float) -> int:
    """Do inferences for *seconds*, at least one; return how many."""
    stop, count = time.perf_counter() + seconds, 0
    while True:
        infer()
        count += 1
        if time.perf_counter() >= stop:
            return count
