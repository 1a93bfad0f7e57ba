"""Memory of one artifact, read in a process of its own: after importing the runtime, after load, while it infers.

The job ``measure_memory``. What this process allocates for itself must not count: samples are read and freed heap is
given back before the baseline, and outputs are checked after the last reading.

Where the C library puts what a runtime allocates depends on the addresses that the kernel draws for a process, and so
does how much of the heap that loading freed goes back to the system: the same file peaked at 107 to 125 MB. So the
figures come from a process at fixed addresses ("layout"), where the system allows it; others say how much they vary.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

from portcall.targets.agent import child, jobs, memory, nvml, opening, settings
from portcall.targets.agent.available import available_bytes
from portcall.targets.agent.contract import Artifact, Session, Workload
from portcall.targets.agent.errors import error_from_kind

INFERENCES = 5
"""The first allocates, some runtimes pack weights or fill caches in the second."""


def measure(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """Return the figures of one process, in bytes: see ``read_process`` and docs/memory.md.

    layout: "fixed" or "random" addresses; the answer says which it was. held: give freed heap back after load, so that
    what the loaded model holds is seen.
    """
    if arguments["layout"] == "random" or child.has_fixed_addresses():
        return read_process(arguments, progress)
    ended = child.run("portcall.targets.agent.memory_pass:read_process", arguments, child.at_fixed_addresses)
    if ended.answer is None:
        child.end_like(ended)
    if "error" in ended.answer:
        error = ended.answer["error"]
        raise error_from_kind(error["kind"], error["message"], error["fix"])
    answer: Dict[str, Any] = ended.answer["value"]
    return answer


def read_process(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """Load and infer in this process, and read its memory. What is not told is None, with the reason in "absent"."""
    artifact = Artifact.from_json(arguments["artifact"])
    workload = Workload.from_json(arguments["workload"])
    settings.apply(workload)
    backend, artifact, _ = opening.ready(artifact, workload)
    inputs, _ = opening.read_inputs(arguments["inputs"])
    inputs = {k: v[: workload.batch].copy() for k, v in inputs.items()}
    memory.settle()
    can_reset = memory.reset_peak()
    baseline = memory.read()
    with backend.load(artifact, workload) as session:
        loaded = memory.read()
        load_peak = max(memory.peak_rss_bytes(), loaded.rss_bytes)
        held = memory.read() if arguments["held"] and memory.settle() else None
        names = opening.Names(artifact, session)
        names.bind(session, opening.batch_of(session, names, inputs, workload.batch))
        memory.reset_peak()
        for _ in range(INFERENCES):
            session.infer()
        inferred = memory.read()
        # The counters may lag behind the exact figures: a peak is at least what was seen at any moment.
        peak = max(memory.peak_rss_bytes(), inferred.rss_bytes)
        trimmed = memory.read() if memory.settle() else None
        runtime = dict(session.memory_figures()) or None
        gpu = nvml.process_memory()
        opening.check_outputs(names, session, arguments, limit=None)
        left = available_bytes()  # beside what this process holds
    answer: Dict[str, Any] = {
        "method": memory.METHOD,
        "current_method": baseline.method,
        "layout": "fixed" if child.has_fixed_addresses() else "random",
        "peak_since": "load" if can_reset else "process start",
        "baseline_bytes": baseline.rss_bytes,
        "model_bytes": (held or loaded).rss_bytes - baseline.rss_bytes,
        "loaded_bytes": loaded.rss_bytes,
        "freed_bytes": None if held is None else loaded.rss_bytes - held.rss_bytes,
        "peak_bytes": max(peak, load_peak),
        "load_peak_bytes": load_peak if can_reset else None,
        "infer_peak_bytes": peak if can_reset else None,
        "inferred_bytes": inferred.rss_bytes,
        "trimmed_bytes": None if trimmed is None else trimmed.rss_bytes,
        "pss_bytes": inferred.pss_bytes,
        "private_bytes": inferred.private_bytes,
        "counter_error_bytes": inferred.counter_error_bytes,
        "available_bytes": None if left is None else left + inferred.rss_bytes,
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
    "freed_bytes": "this C library has no malloc_trim, so that model_bytes holds what loading freed",
    "available_bytes": "neither /proc/meminfo nor a cgroup tells it",
    "trimmed_bytes": "this C library has no malloc_trim",
}


def _reasons(answer: Mapping[str, Any], session: Session, gpu: Any) -> Dict[str, str]:
    absent: List[str] = [key for key, value in answer.items() if value is None]
    said = {**_ALWAYS, "runtime": session.no_memory_figures}
    if isinstance(gpu, nvml.Absent):
        said["gpu_bytes"] = gpu.reason
    return {key: said[key] for key in absent}
