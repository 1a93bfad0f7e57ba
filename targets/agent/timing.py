"""What the measuring job does around its loop: settings, the harness's own overhead, growth, equal outputs."""

from __future__ import annotations

import contextlib
import hashlib
import time
from datetime import datetime, timezone
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from portcall.targets.agent import memory
from portcall.targets.agent.contract import Session, TensorSpec, Workload
from portcall.targets.agent.errors import UnavailableError
from portcall.targets.agent.measure import Samples, run_loop
from portcall.targets.agent.steady import judge

OVERHEAD_COUNT = 2000


class EmptySession(Session):
    """Does nothing in ``infer``: what is measured on it is the harness."""

    inputs: Tuple[TensorSpec, ...] = ()
    outputs: Tuple[TensorSpec, ...] = ()

    def infer(self) -> None:
        pass


def overhead(count: int = OVERHEAD_COUNT) -> Dict[str, float]:
    """Return what the harness costs per inference on this machine, in ns: medians over *count* empty inferences.

    wall_ns, cpu_ns: what a wall and a CPU sample hold beside the inference. loop_ns: what the loop takes from one
    inference to the next, clocks and storing included; none of it but wall_ns is inside a sample.
    """
    session = EmptySession()
    run_loop(session.infer, 0.0, 60.0, max_count=count // 4)
    samples = run_loop(session.infer, 0.0, 60.0, max_count=count)
    return {
        "wall_ns": float(np.median(samples.wall_ns)),
        "cpu_ns": float(np.median(samples.cpu_ns)),
        "loop_ns": samples.elapsed_ns / samples.wall_ns.size,
    }


def timed(session: Session, workload: Workload, deadline_ns: Optional[int]) -> Tuple[Samples, Optional[int]]:
    """Run the loop of *workload*; return its samples and by how many bytes the resident size grew across it.

    The growth is None where the system does not tell the resident size. The array of samples is in memory before.
    Warming up takes a third of the time to *deadline_ns* at most: something has to be timed.
    """
    budget_s = workload.max_warmup_s
    if deadline_ns is not None:
        budget_s = min(budget_s, max(0.0, (deadline_ns - time.perf_counter_ns()) / 3e9))
    sizes: List[int] = []

    def read_size() -> None:
        with contextlib.suppress(UnavailableError):
            sizes.append(memory.current_rss_bytes())

    judge(np.arange(10_000))  # what its first call allocates is not the model's
    samples = run_loop(
        session.infer,
        workload.warmup_s,
        workload.min_time_s,
        max_warmup_s=budget_s,
        min_count=workload.min_count,
        deadline_ns=deadline_ns,
        on_warm=read_size,
        on_end=read_size,
    )
    return samples, sizes[1] - sizes[0] if len(sizes) == 2 else None


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat()


def compare_outputs(first: Mapping[str, np.ndarray], last: Mapping[str, np.ndarray]) -> Dict[str, Any]:
    """Compare the outputs of two inferences on the same inputs, bit for bit.

    Returns {"deterministic": bool, "largest_difference": float or None, "output": the one that holds it or None,
    "sha256": of the first inference's outputs}. A difference is |x - y| in float64; None where the outputs are equal,
    or where they differ in shape or in a NaN alone.
    """
    digest = hashlib.sha256()
    worst: Optional[float] = None
    output: Optional[str] = None
    same = sorted(first) == sorted(last)
    for name in sorted(first):
        digest.update(name.encode())
        digest.update(first[name].tobytes())
        other = last.get(name)
        if other is None or other.shape != first[name].shape or other.dtype != first[name].dtype:
            same, output = False, output or name
            continue
        if first[name].tobytes() == other.tobytes():
            continue
        same, output = False, output or name
        with np.errstate(all="ignore"):
            away = np.abs(first[name].astype(np.float64) - other.astype(np.float64))
        away = away[np.isfinite(away)]
        if away.size and (worst is None or float(away.max()) > worst):
            worst, output = float(away.max()), name
    return {
        "deterministic": same,
        "largest_difference": worst,
        "output": output,
        "sha256": digest.hexdigest(),
    }


def outputs_warning(found: Mapping[str, Any]) -> Optional[str]:
    """Return the warning on outputs that changed during the loop, None where they are equal."""
    if found["deterministic"]:
        return None
    size = found["largest_difference"]
    by = "" if size is None else " by up to %.3g" % size
    return (
        "outputs differ from run to run on the same inputs: %s%s between the first and the last inference; look for "
        "state, random operators or racing threads in the model" % (found["output"], by)
    )


def seconds_since(start_ns: int) -> float:
    return (time.perf_counter_ns() - start_ns) / 1e9
