"""Compares two saved benches: independent fresh processes of either, not pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.environment import difference
from portcall.bench.saved import FILE, ProcessSamples, SavedResult, load_results, names
from portcall.bench.statistics import percentile, student_t_quantile, supported_percentile
from portcall.bench.verdict import METRICS, TAILS, Ratio, check_metric, metric_json, top_verdict
from portcall.core import BadInput

QUANTILES = {"p50": 0.5, **TAILS}
ALIKE = ("batch", "threads", "shapes", "affinity", "priority", "spinning")
"""Settings of the workload that have to be the same on both sides."""


def is_saved(spec: str) -> bool:
    """Tell whether *spec* is a folder that ``bench -o`` wrote, or a JSON file."""
    path = Path(spec)
    return (path / FILE).is_file() or (path.suffix == ".json" and path.is_file())


def compare_saved(base: str, candidate: str, metric: str, margin: float) -> dict[str, Any]:
    """Return the object of ``compare`` for two saved benches that hold one measured result each.

    The interval is Welch's, of the difference of the means of per-process log values: the machine's drift between the
    two benches is in it only as far as it also shows between processes of one. Results of machines that differ, or of
    workloads that differ, are incomparable. Raises BadInput for files that cannot be compared.
    """
    check_metric(metric)
    sides = [_only(base), _only(candidate)]
    workloads = [side.result.get("workload") or {} for side in sides]
    unlike = [k for k in ALIKE if workloads[0].get(k) != workloads[1].get(k)]
    differs = difference(*(side.result["environment"] for side in sides))
    incomparable = bool(unlike) or not differs.is_comparable
    metrics = [_metric(name, sides, margin, incomparable) for name in METRICS]
    warnings = [
        f"the workloads differ in {key}: {workloads[0].get(key)} and {workloads[1].get(key)}"
        for key in unlike
    ]
    warnings += [f"another machine: {row}" for row in differs.machine]
    return {
        "schema": 1,
        "verdict": "incomparable" if incomparable else top_verdict(metrics, metric),
        "metric": metric,
        "margin": margin,
        "target": sides[0].result["target"],
        "metrics": metrics,
        "pairs": 0,
        "seconds": 0.0,
        "stopped": "saved",
        "interval": "fixed-sample, two independent samples",
        "base": _side_json(base, sides[0]),
        "candidate": _side_json(candidate, sides[1]),
        "difference": differs.to_json(),
        "warnings": warnings,
    }


def _only(spec: str) -> SavedResult:
    """Return the one measured result of a saved bench."""
    results = load_results(spec)
    measured = [r for r in results if r.measured]
    if len(measured) != 1:
        raise BadInput(
            f"{spec} holds {len(measured)} measured results: {', '.join(names(measured)) or 'none'}",
            "Save each artifact's bench in a folder of its own",
        )
    return measured[0]


def _metric(name: str, sides: Sequence[SavedResult], margin: float, incomparable: bool) -> dict[str, Any]:
    if name == "memory":
        peaks = [side.number("memory", "peak_bytes") for side in sides]
        if peaks[0] is None or peaks[1] is None:
            return metric_json(name, None, "a side has no peak", margin, incomparable)
        reason = "no interval: a bench saves one peak. Compare the artifacts themselves"
        return metric_json(name, Ratio([math.log(peaks[1] / peaks[0])], None), reason, margin, incomparable)
    if name == "cpu" and (sides[0].get("workload", "threads") or 1) > 1:
        reason = "CPU time of several threads counts their waiting: judged with one thread only"
        return metric_json(name, None, reason, margin, incomparable)
    base, candidate = ([_value(name, p) for p in side.processes] for side in sides)
    if None in [*base, *candidate] or min(len(base), len(candidate)) < 2:
        reason = f"needs 2 --processes on either side, each with enough inferences for {name}: see bench --min-time"
        return metric_json(name, None, reason, margin, incomparable)
    logs = [np.log(np.asarray(values, np.float64)) for values in (base, candidate)]
    return metric_json(name, _welch(*logs), None, margin, incomparable)


def _value(name: str, process: ProcessSamples) -> float | None:
    """Return one process's figure in ns; None where its samples do not support it."""
    samples = process.cpu_ns if name == "cpu" else process.wall_ns
    q = QUANTILES.get(name, 0.5)
    if samples is None or not supported_percentile(q, samples.size):
        return None
    value = percentile(samples, q)
    return value if value > 0 else None


def _welch(base: np.ndarray[Any, Any], candidate: np.ndarray[Any, Any]) -> Ratio:
    """Return the log ratio with the interval of B. L. Welch (Biometrika 34 (1947) 28-35) at 95 %."""
    center = float(candidate.mean() - base.mean())
    parts = [float(x.var(ddof=1)) / x.size for x in (base, candidate)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Ratio([center], (center, center))
    df = sum(parts) ** 2 / sum(v**2 / (x.size - 1) for v, x in zip(parts, (base, candidate), strict=True))
    half = student_t_quantile(0.975, df) * error
    return Ratio([center], (center - half, center + half))


def _side_json(spec: str, side: SavedResult) -> dict[str, Any]:
    return {
        "artifact": spec,
        "backend": side.result["backend"],
        "precision": side.result["precision"],
        "p50_ns": side.number("latency", "p50_ns"),
        "n": side.latency["n"],
        "processes": side.latency["processes"],
        "load_ns": side.number("load_ns"),
        "peak_bytes": side.number("memory", "peak_bytes"),
        "environment": side.result["environment"],
        "slowdown": None,
    }
