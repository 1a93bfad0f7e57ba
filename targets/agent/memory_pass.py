"""Memory of one artifact, read in a process of its own: after importing the runtime, after load, while it infers.

The job ``measure_memory``. What this process allocates for itself must not count: samples are read and freed heap is
given back before the baseline, and outputs are checked after the last reading.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

from portcall.targets.agent import jobs, memory, nvml
from portcall.targets.agent.contract import Artifact, Session, Workload

INFERENCES = 5
"""The first allocates, some runtimes pack weights or fill caches in the second."""


def measure(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """Return the figures of one process, in bytes: the key ``memory`` of a bench result (docs/memory.md).

    What cannot be told is None, with the reason under its key in "absent".
    """
    artifact = Artifact.from_json(arguments["artifact"])
    workload = Workload.from_json(arguments["workload"])
    backend, artifact, _ = jobs.ready(artifact, workload)
    inputs, _ = jobs._inputs(arguments["inputs"])
    inputs = {k: v[: workload.batch].copy() for k, v in inputs.items()}
    memory.settle()
    can_reset = memory.reset_peak()
    baseline = memory.read()
    with backend.load(artifact, workload) as session:
        loaded = memory.read()
        load_peak = memory.peak_rss_bytes()
        names = jobs._Names(artifact, session)
        names.bind(session, jobs._batch(session, names, inputs, workload.batch))
        memory.reset_peak()
        for _ in range(INFERENCES):
            session.infer()
        peak = memory.peak_rss_bytes()
        inferred = memory.read()
        trimmed = memory.read() if memory.settle() else None
        runtime = dict(session.memory_figures()) or None
        gpu = nvml.process_memory()
        jobs._check(names, session, arguments, limit=None)
    # The counters may lag behind the exact figures: a peak is at least what was seen at any moment.
    peak = max(peak, inferred.rss_bytes)
    load_peak = max(load_peak, loaded.rss_bytes)
    answer: Dict[str, Any] = {
        "method": memory.METHOD,
        "current_method": baseline.method,
        "peak_since": "load" if can_reset else "process start",
        "baseline_bytes": baseline.rss_bytes,
        "model_bytes": loaded.rss_bytes - baseline.rss_bytes,
        "loaded_bytes": loaded.rss_bytes,
        "peak_bytes": max(peak, load_peak),
        "load_peak_bytes": load_peak if can_reset else None,
        "infer_peak_bytes": peak if can_reset else None,
        "inferred_bytes": inferred.rss_bytes,
        "trimmed_bytes": None if trimmed is None else trimmed.rss_bytes,
        "pss_bytes": inferred.pss_bytes,
        "private_bytes": inferred.private_bytes,
        "counter_error_bytes": inferred.counter_error_bytes,
        "gpu_bytes": None if isinstance(gpu, nvml.Absent) else gpu,
        "runtime": runtime,
        "inferences": INFERENCES,
    }
    answer["absent"] = _reasons(answer, session, gpu)
    return answer


_NO_RESET = "the high-water mark cannot be reset here (/proc/self/clear_refs): peak_bytes is that of the whole process"
_NO_SMAPS = "/proc/self/smaps_rollup cannot be read here"
_ALWAYS: Mapping[str, str] = {
    "load_peak_bytes": _NO_RESET,
    "infer_peak_bytes": _NO_RESET,
    "pss_bytes": _NO_SMAPS,
    "private_bytes": _NO_SMAPS,
    "counter_error_bytes": _NO_SMAPS,
    "trimmed_bytes": "this C library has no malloc_trim",
}


def _reasons(answer: Mapping[str, Any], session: Session, gpu: Any) -> Dict[str, str]:
    absent: List[str] = [key for key, value in answer.items() if value is None]
    said = {**_ALWAYS, "runtime": session.no_memory_figures}
    if isinstance(gpu, nvml.Absent):
        said["gpu_bytes"] = gpu.reason
    return {key: said[key] for key in absent}
