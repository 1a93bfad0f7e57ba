"""One result of ``bench`` as JSON: what the processes of a subject told, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.bench.conditions import Conditions, condition_warnings
from portcall.bench.statistics import percentile, summarize
from portcall.bench.subject import Subject
from portcall.core import Outcome, PortcallError, Workload, outcome_of

GROWTH_BYTES = 1 << 20
"""Growth of the resident size across a timed loop that a warning is due for: the kernel's counters are off by less."""


def result_of(subject: Subject, target: str, workload: Workload) -> dict[str, Any]:
    """Return the object of the JSON contract; ``Subject.extra`` adds keys to it."""
    manifest = subject.manifest
    result: dict[str, Any] = {
        "artifact": subject.spec,
        "backend": subject.artifact.backend,
        "precision": subject.artifact.precision,
        "target": target,
        "outcome": Outcome.MEASUREMENT.value,
        "error_kind": None,
        "reason": None,
        "fix": None,
        "latency": None,
        "cpu": None,
        "device": None,
        "load_ns": None,
        "first_ns": None,
        "throughput_per_s": None,
        "steady": None,
        "deterministic": None,
        "overhead": None,
        "rss_growth_bytes": None,
        "per_process": [],
        "died": len(subject.deaths),
        "finish": subject.finish,
        "memory": subject.memory,
        "energy": None,
        "placement": None,
        "witness": None,
        "environment": None,
        "size_bytes": subject.artifact.path.stat().st_size
        if manifest is None
        else artifacts.model_bytes(manifest),
        "parity": None if manifest is None else manifest["parity"],
        "eval": None if manifest is None else manifest.get("eval"),
        "workload": workload.to_json(),
        "mode": {"name": "latency"},
        "warnings": subject.warnings,
        "raw": None,
        **subject.extra,
    }
    if subject.error is not None:
        result.update(ending(subject.error))
        return result
    answers = subject.answers
    latency, warnings = summarize(subject.wall)
    result["latency"] = latency
    result["cpu"] = {"p50_ns": percentile(np.concatenate(subject.cpu), 0.5)}
    if all(times.size for times in subject.device):  # beside the wall clock's: a GPU's own
        result["device"] = summarize(subject.device)[0]
    result["load_ns"] = float(np.median([a["load_ns"] for a in answers]))
    result["first_ns"] = float(np.median([a["first_ns"] for a in answers]))
    result["throughput_per_s"] = workload.batch * 1e9 / latency["mean_ns"]
    result["environment"] = answers[-1]["environment"]
    result["steady"] = _steady(answers)
    result["deterministic"] = _deterministic(answers)
    result["overhead"] = {
        k: float(np.median([a["overhead"][k] for a in answers])) for k in answers[0]["overhead"]
    }
    growths = [a["rss_growth_bytes"] for a in answers if a["rss_growth_bytes"] is not None]
    result["rss_growth_bytes"] = max(growths, default=None)
    result["per_process"] = [
        _process(a, wall, cpu) for a, wall, cpu in zip(answers, subject.wall, subject.cpu, strict=True)
    ]
    told = [
        *_process_warnings(answers),
        *_steady_warnings(result["steady"], answers),
        *_growth_warnings(growths),
    ]
    artifact = subject.artifact
    conditions = [
        Conditions(a["environment"], artifact.backend, artifact.precision, workload.threads) for a in answers
    ]
    result["warnings"] = [*subject.warnings, *told, *warnings, *condition_warnings(conditions)]
    return result


def ending(error: PortcallError) -> dict[str, Any]:
    """Return the keys that say how a result ended in *error*."""
    return {
        "outcome": outcome_of(error).value,
        "error_kind": error.kind,
        "reason": error.message,
        "fix": error.fix or None,
    }


def _process(
    answer: Mapping[str, Any], wall: np.ndarray[Any, Any], cpu: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Return one process as JSON; its figures are the unit of every interval."""
    steady = answer["steady"]
    return {
        "started_at": answer["started_at"],
        "n": int(wall.size),
        "p50_ns": percentile(wall, 0.5),
        "cpu_p50_ns": percentile(cpu, 0.5),
        "load_ns": answer["load_ns"],
        "first_ns": answer["first_ns"],
        "warmup": answer["warmup"],
        "steady": steady,
        "deterministic": answer["outputs"]["deterministic"],
        "rss_growth_bytes": answer["rss_growth_bytes"],
    }


def _steady(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return whether every process reached a steady series; warmup_ns is the median over processes."""
    found = [a["steady"] for a in answers]
    reached = sum(s["reached"] for s in found)
    changes = [s["change"] for s in found if s["change"] is not None]
    return {
        "reached": reached == len(found),
        "processes": len(found),
        "processes_reached": reached,
        "worst_change": max(changes, key=abs, default=None),
        "warmup_ns": float(np.median([s["warmup_ns"] for s in found])),
    }


def _steady_warnings(steady: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[str]:
    if steady["reached"]:
        return []
    reasons = [a["steady"]["reason"] for a in answers if not a["steady"]["reached"]]
    return [
        f"no steady state in {len(reasons)} of {len(answers)} processes ({reasons[0]}): raise --max-warmup or "
        "--min-time, or find what disturbs this machine"
    ]


def _deterministic(answers: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether all outputs were the same, bit for bit: inside every process, and between processes."""
    found = [a["outputs"] for a in answers]
    return all(o["deterministic"] for o in found) and len({o["sha256"] for o in found}) == 1


def _process_warnings(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what processes warned of, once each; where not all did, with their number."""
    counts = Counter(w for a in answers for w in dict.fromkeys(a["warnings"]))
    total = len(answers)
    warnings = [w if n == total else f"{w} ({n} of {total} processes)" for w, n in counts.items()]
    outputs = [a["outputs"] for a in answers]
    if all(o["deterministic"] for o in outputs) and len({o["sha256"] for o in outputs}) > 1:
        warnings.append(
            "outputs differ between processes on the same inputs: a kernel is chosen per process, or memory is unset; "
            "compare with portcall verify"
        )
    return warnings


def _growth_warnings(growths: Sequence[int]) -> list[str]:
    if max(growths, default=0) <= GROWTH_BYTES:
        return []
    return [
        f"the resident size grew by {max(growths) / 1e6:.1f} MB across a timed loop: the runtime allocates as it runs; "
        "watch it over a longer --min-time"
    ]
