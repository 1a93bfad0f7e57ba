"""optimum-benchmark's report: ``benchmark_report.json`` and ``benchmark_config.json`` in one folder per artifact.

Source of the format: the package optimum-benchmark 0.6.0, optimum_benchmark/benchmark/report.py and
optimum_benchmark/trackers/{latency,memory}.py; the names of the targets are those of its inference scenario.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portcall import __version__
from portcall.bench.saved import SavedResult
from portcall.bench.statistics import percentile

REPORT, CONFIG = "benchmark_report.json", "benchmark_config.json"
_J_PER_KWH = 3.6e6
_FIELDS = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def optimum_report(result: SavedResult) -> dict[str, Any]:
    """Return one artifact's report: {"load_model", "first_forward", "forward"}, each with its sections or null.

    Latencies in s, as that tool defines them: "values" pools all processes in order; percentiles are those of the
    values, whatever their count: the format has no place for an absent one, and its reader stops at null (the warnings
    in the configuration say which of them n does not support); stdev divides by n, stdev_ is in percent of the mean.
    Memory in MB of 1e6 bytes; the parts that other devices have are null. Energy in kWh per inference, idle power
    included as that tool has it; a component that no counter sees is 0 in it, and its counters are in the
    configuration. Without any counter, energy and efficiency are null.
    """
    wall = np.concatenate([p.wall_ns for p in result.processes])
    forward = {
        "memory": _memory(result),
        "latency": _latency(wall / 1e9),
        "throughput": {"unit": "samples/s", "value": result.number("throughput_per_s")},
        **_energy(result),
    }
    return {
        "load_model": _once(result, "load_ns"),
        "first_forward": _once(result, "first_ns"),
        "forward": forward,
    }


def optimum_config(result: SavedResult, name: str) -> dict[str, Any]:
    """Return what was measured, how and where, in the shape of that tool's configuration."""
    entry = result.result
    return {
        "name": name,
        "backend": {"name": entry["backend"], "model": entry["artifact"], "precision": entry["precision"]},
        "scenario": {
            "name": "inference",
            **(entry.get("workload") or {}),
            "warnings": entry.get("warnings") or [],
            "energy": entry.get("energy"),
        },
        "launcher": {"name": "process", "tool": f"portcall {__version__}", "target": entry["target"]},
        "environment": entry.get("environment"),
        "print_report": False,
        "log_report": False,
    }


def _latency(values_s: np.ndarray[Any, Any]) -> dict[str, Any]:
    mean, stdev = float(values_s.mean()), float(values_s.std())
    return {
        "unit": "s",
        "values": values_s.tolist(),
        "count": values_s.size,
        "total": float(values_s.sum()),
        "mean": mean,
        **{k: percentile(values_s, q) for k, q in _FIELDS.items()},
        "stdev": stdev,
        "stdev_": 100 * stdev / mean if mean > 0 else 0.0,
    }


def _memory(result: SavedResult) -> dict[str, Any] | None:
    peak = result.number("memory", "peak_bytes")
    if peak is None:
        return None
    absent = ("max_global_vram", "max_process_vram", "max_reserved", "max_allocated")
    return {"unit": "MB", "max_ram": peak / 1e6, **dict.fromkeys(absent)}


def _energy(result: SavedResult) -> dict[str, Any]:
    """Return the sections "energy" and "efficiency"; counters are named as ``targets.agent`` names them."""
    total, counters = result.number("energy", "joules_per_inference"), result.get("energy", "counters")
    if total is None or total <= 0 or not isinstance(counters, Mapping):
        return {"energy": None, "efficiency": None}
    kwh = {"cpu": 0.0, "ram": 0.0, "gpu": 0.0}
    for name, joules in counters.items():
        kwh["gpu" if name.startswith("gpu") else "ram" if "dram" in name else "cpu"] += joules / _J_PER_KWH
    batch = result.number("workload", "batch") or 1
    return {
        "energy": {"unit": "kWh", **kwh, "total": total / _J_PER_KWH},
        "efficiency": {"unit": "samples/kWh", "value": batch * _J_PER_KWH / total},
    }


def _once(result: SavedResult, key: str) -> dict[str, Any] | None:
    """Return what happens once per process; where only the median of several was kept, there is no list to give."""
    kept = result.get("per_process") or []
    values = [p[key] for p in kept if isinstance(p, dict) and isinstance(p.get(key), int | float)]
    median = result.number(key)
    if not values and result.latency["processes"] == 1 and median is not None:
        values = [median]
    if not values:
        return None
    sections: Sequence[str] = ("memory", "throughput", "energy", "efficiency")
    return {"latency": _latency(np.array(values, dtype=np.float64) / 1e9), **dict.fromkeys(sections)}
