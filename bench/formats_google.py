"""google-benchmark's JSON: one benchmark per artifact, one repetition per fresh process.

Its ``tools/compare.py`` then tests medians over processes, which is the right unit. Source of the format:
google/benchmark, src/json_reporter.cc, and what its release 1.9.5 prints (json_schema_version 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from portcall import __version__
from portcall.bench.saved import ProcessSamples, SavedResult, names
from portcall.bench.statistics import PERCENTILES, percentile, supported_percentile
from portcall.core import BadInput
from portcall.targets.agent.fingerprint import identity


def google_benchmark(results: Sequence[SavedResult]) -> dict[str, Any]:
    """Return the JSON object: {"context", "benchmarks"}; times in ns.

    real_time and cpu_time of a repetition are means over one process's inferences, as google-benchmark defines them;
    the benchmark NAME/p50 has medians in their place, which a noisy machine moves less. Percentiles of that process
    stand beside them as user counters. Aggregates (mean, median, stddev, cv) are over processes, from two of them on.
    A cell without a measurement is an aggregate named after its outcome, with "error_occurred", "error_message" and
    no times: 0 would be read as one. What the system does not tell is left out of "context", except "caches", which
    readers insist on. Raises BadInput for results of several machines: the format has one context.
    """
    families: list[list[dict[str, Any]]] = []
    for name, result in zip(names(results), results, strict=True):
        if not result.measured:
            families.append([_unmeasured(name, result)])
            continue
        families.append(_family(name, result, np.mean))
        if all(supported_percentile(0.5, p.wall_ns.size) for p in _processes(result)):
            families.append(_family(f"{name}/p50", result, np.median))
    benchmarks = [
        {"name": entry.pop("name"), "family_index": i, "per_family_instance_index": 0, **entry}
        for i, family in enumerate(families)
        for entry in family
    ]
    return {"context": _context(results), "benchmarks": benchmarks}


def _context(results: Sequence[SavedResult]) -> dict[str, Any]:
    measured = [r for r in results if r.measured]
    machines = {identity(r.get("environment", "machine") or {}) for r in measured}
    if len(machines) > 1:
        raise BadInput(
            f"these results are of {len(machines)} machines, google-benchmark's JSON has one context",
            "Write one file per machine",
        )
    context: dict[str, Any] = {}
    if measured:
        first = measured[0]
        machine = first.get("environment", "machine") or {}
        state = first.get("environment", "state", "after") or {}
        governor = machine.get("governor")
        told = {
            "date": state.get("time"),
            "num_cpus": machine.get("logical_cpus"),
            "mhz_per_cpu": _mhz(machine),
            "cpu_scaling_enabled": None
            if governor is None
            else governor not in ("performance", ["performance"]),
            "load_avg": state.get("load_average"),
            "cpu_model": machine.get("cpu_model"),
            "machine": identity(machine) if machine else None,
        }
        context = {key: value for key, value in told.items() if value is not None}
    return {
        **context,
        "executable": "portcall bench",
        "caches": [],
        "library_version": f"portcall {__version__}",
        "library_build_type": "release",
        "json_schema_version": 1,
    }


def _mhz(machine: Any) -> int | None:
    khz = machine.get("max_frequency_khz")
    values = khz if isinstance(khz, list) else [khz]
    numbers = [v for v in values if isinstance(v, int | float)]
    return round(max(numbers) / 1000) if numbers else None


def _processes(result: SavedResult) -> list[ProcessSamples]:
    return [p for p in result.processes if p.wall_ns.size]


def _unmeasured(name: str, result: SavedResult) -> dict[str, Any]:
    outcome, reason, fix = (result.get(key) for key in ("outcome", "reason", "fix"))
    return {
        "name": f"{name}_{outcome}",
        "run_name": name,
        "run_type": "aggregate",  # compare.py takes for granted that every other entry has times
        "repetitions": 0,
        "threads": 1,
        "aggregate_name": outcome,
        "error_occurred": True,
        "error_message": f"{outcome}: {reason or 'no samples'}" + (f"; fix: {fix}" if fix else ""),
    }


def _family(name: str, result: SavedResult, statistic: Callable[..., Any]) -> list[dict[str, Any]]:
    processes = _processes(result)
    common = {
        "name": name,
        "run_name": name,
        "run_type": "iteration",
        "repetitions": len(processes),
        "threads": 1,  # of the benchmark; those of the runtime are in the name
    }
    label = f"{result.result['backend']} {result.result['precision']} on {result.result['target']}"
    batch = result.number("workload", "batch") or 1
    entries = [
        {
            **common,
            "repetition_index": i,
            **_repetition(p, batch, statistic),
            "label": f"{label}, n={p.wall_ns.size}",
        }
        for i, p in enumerate(processes)
    ]
    if len(entries) < 2:
        return entries
    aggregate = {**common, "run_type": "aggregate"}
    return [*entries, *(_aggregate(aggregate, kind, entries) for kind in _AGGREGATES)]


def _repetition(process: ProcessSamples, batch: float, statistic: Callable[..., Any]) -> dict[str, Any]:
    wall = process.wall_ns
    times: dict[str, Any] = {"iterations": wall.size, "real_time": float(statistic(wall))}
    if process.cpu_ns is not None:
        times["cpu_time"] = float(statistic(process.cpu_ns))
    times["time_unit"] = "ns"
    if times["real_time"] > 0:
        times["items_per_second"] = batch * 1e9 / times["real_time"]
    counters = {k: percentile(wall, q) for k, q in PERCENTILES.items() if supported_percentile(q, wall.size)}
    return {**times, **counters}


def _variation(values: np.ndarray[Any, Any]) -> float:
    return float(values.std(ddof=1) / values.mean())


_AGGREGATES: dict[str, tuple[str, Callable[[np.ndarray[Any, Any]], Any]]] = {
    "mean": ("time", np.mean),
    "median": ("time", np.median),
    "stddev": ("time", lambda values: values.std(ddof=1)),
    "cv": ("percentage", _variation),
}


def _aggregate(common: dict[str, Any], kind: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    unit, function = _AGGREGATES[kind]
    found = {
        **common,
        "name": f"{common['name']}_{kind}",
        "aggregate_name": kind,
        "aggregate_unit": unit,
        "iterations": len(entries),
    }
    for key in ("real_time", "cpu_time"):
        values = np.array([e[key] for e in entries if key in e])
        if values.size == len(entries) and values.mean() > 0:
            found[key] = float(function(values))
    return {**found, "time_unit": "ns"}
