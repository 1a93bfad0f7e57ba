"""What a runtime tells about its operators: which kernel each one got, on which unit, and what it took.

``Profiler`` is the hook of a backend (``Backend.profile``), ``profile`` the job that an agent does with it, in a
process of its own, never in one whose latencies are reported: profiling costs time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Artifact, Session, Workload
from portcall.targets.agent.errors import UnsupportedError

FEWEST, MOST = 10, 200
"""Profiled inferences; fewer than the first only where they take longer than ``PATIENCE_S``."""
LONGEST_S, PATIENCE_S = 2.0, 60.0
QUANTIZER_SUFFIXES = ("_quantized", "_DequantizeLinear", "_QuantizeLinear", "_DequantizeLinear_Output")
"""What ONNX Runtime's quantizer appends to the names of weights and of the operators around them."""


@dataclass(frozen=True)
class Operator:
    """One operator as the runtime executes it: a kernel, which may hold several operators of the file.

    name: in the executed graph. operator: its type there; kernel: the runtime's name of its implementation, None where
    it does not tell. unit: what ran it. on_unit: whether that is the intended unit; reason: why not. layers: names of
    the source's operators that it holds. time_ns: of one inference, None where the runtime does not tell.
    """

    name: str
    operator: str
    kernel: Optional[str]
    unit: str
    on_unit: bool
    reason: Optional[str] = None
    layers: Tuple[str, ...] = ()
    time_ns: Optional[float] = None

    def to_json(self) -> Dict[str, Any]:
        return {
            "name": self.name,
            "operator": self.operator,
            "kernel": self.kernel,
            "unit": self.unit,
            "on_unit": self.on_unit,
            "reason": self.reason,
            "layers": list(self.layers),
            "time_ns": self.time_ns,
        }


@dataclass(frozen=True)
class Placed:
    """Where the operators of an artifact run.

    unit: the intended one. operators: as executed. counted: (all, on the unit) operators of the *file*, where a
    delegate merges them into kernels of its own; None to count *operators*. untimed: why there are no times.
    """

    unit: str
    operators: Tuple[Operator, ...]
    method: str
    counted: Optional[Tuple[int, int]] = None
    notes: Tuple[str, ...] = ()
    untimed: Optional[str] = None


class Profiler(Session):
    """A Session whose runtime tells what its operators take. The caller does ``infer`` and ``collect`` in turn."""

    def forget(self) -> None:
        """Drop what was collected so far (of the warm-up)."""
        raise NotImplementedError

    def collect(self) -> None:
        """Keep what the last inference told; called outside of what is timed."""
        raise NotImplementedError

    def placed(self, numbers: Sequence[int]) -> Placed:
        """Return the operators, their times means over the inferences *numbers* since ``forget``. Called once."""
        raise NotImplementedError


def undisturbed(took_ns: Sequence[float]) -> List[int]:
    """Return the numbers of the faster half of the inferences (rounded up), in order.

    Figures of operators are means over these. A mean, since profilers count in whole microseconds and a median would
    round small operators to 0 or 1; over the faster half, since one preempted operator must not carry the profile, and
    the same inferences for all operators, so that they add up to a whole.
    """
    order = sorted(range(len(took_ns)), key=took_ns.__getitem__)
    return sorted(order[: (len(took_ns) + 1) // 2])


def owner(constant: str) -> Optional[str]:
    """Return the module that a constant belongs to by its name ("stem.0" of "stem.0.weight_quantized"), or None."""
    name = constant
    for suffix in QUANTIZER_SUFFIXES:
        name = name[: -len(suffix)] if name.endswith(suffix) else name
    module, dot, last = name.rpartition(".")
    return module if dot and last in ("weight", "bias", "weight_bias") else None


@dataclass
class Times:
    """Times of operators in ns by key, one list entry per inference; an operator that an inference skips took 0."""

    rows: List[Mapping[Any, float]] = field(default_factory=list)

    def mean(self, key: Any, numbers: Sequence[int]) -> float:
        """Return the mean over the inferences *numbers*, of which there is one."""
        return sum(self.rows[i].get(key, 0.0) for i in numbers) / len(numbers)


def profile(arguments: Mapping[str, Any], progress: Callable[[int, Optional[int]], None]) -> Dict[str, Any]:
    """Profile one process: load with the runtime's profiler on, warm up, at least 10 inferences.

    arguments: artifact, workload, inputs, as for ``measure``. Returns {"unit", "method", "inferences", "p50_ns": of
    the whole inference with profiling on, "mean_ns": of the faster half of them, over which the operators' times are
    means, "operators": [Operator as JSON], "counted", "notes", "untimed", "environment"}. Raises UnsupportedError where
    the backend tells nothing of its operators.
    """
    from portcall.targets.agent.opening import Names, batch_of, read_inputs, ready

    artifact = Artifact.from_json(arguments["artifact"])
    workload = Workload.from_json(arguments["workload"])
    backend, artifact, _ = ready(artifact, workload)
    if backend.profile is None:
        raise UnsupportedError(
            f"portcall has no profile of {artifact.backend}: nothing tells which unit ran which operator",
            "Use the vendor's own profiler",
        )
    with backend.profile(artifact, workload) as session:
        names = Names(artifact, session)
        inputs, _ = read_inputs(arguments["inputs"])
        names.bind(session, batch_of(session, names, inputs, workload.batch))
        _run(session, 2, 2, workload.warmup_s)
        session.forget()
        took_ns = _run(session, FEWEST, MOST, min(workload.min_time_s, LONGEST_S))
        kept = undisturbed(took_ns)
        placed = session.placed(kept)
        environment = session.environment
    return {
        "unit": placed.unit,
        "method": placed.method,
        "inferences": len(took_ns),
        "p50_ns": float(median(took_ns)),
        "mean_ns": fmean(took_ns[i] for i in kept),
        "operators": [o.to_json() for o in placed.operators],
        "counted": None if placed.counted is None else list(placed.counted),
        "notes": list(placed.notes),
        "untimed": placed.untimed,
        "environment": environment,
    }


def _run(session: Profiler, fewest: int, most: int, least_s: float) -> List[int]:
    """Return the wall time in ns of each inference: *fewest* to *most* of them, for about *least_s*."""
    took: List[int] = []
    clock = time.perf_counter_ns
    begun = clock()
    stop, give_up = begun + int(least_s * 1e9), begun + int(PATIENCE_S * 1e9)
    while not took or (len(took) < fewest and clock() < give_up) or (len(took) < most and clock() < stop):
        start = clock()
        session.infer()
        took.append(clock() - start)
        session.collect()
    return took
