"""What services that follow figures over time read: Bencher's metric format, and github-action-benchmark's list.

Neither can say that a cell was not measured; who writes the file says so beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portcall.bench.saved import SavedResult, names

_MEASURES = {
    "latency": ("latency", "p50_ns"),
    "latency-p95": ("latency", "p95_ns"),
    "latency-p99": ("latency", "p99_ns"),
    "cpu-time": ("cpu", "p50_ns"),
    "throughput": ("throughput_per_s",),
    "load-time": ("load_ns",),
    "first-inference": ("first_ns",),
    "peak-memory": ("memory", "peak_bytes"),
    "file-size": ("size_bytes",),
}
"""Measure -> where it is in a result. latency (ns), throughput (per s) and file-size (bytes) are Bencher's own; the
others are made by it at first sight: give them their unit there (ns, ns, ns, ns, ns, bytes)."""


def bencher_metrics(results: Sequence[SavedResult]) -> dict[str, Any]:
    """Return Bencher Metric Format: {benchmark: {measure: {"value", "lower_value", "upper_value"}}}.

    latency is P50 over all processes, its bounds the 95 % interval over processes (of a typical process: unequal
    ones can lie on one side of the pooled value). A figure that is absent has no measure.
    Source: https://bencher.dev/bmf.json and https://bencher.dev/docs/reference/bencher-metric-format (a name has at
    most 1024 characters).
    """
    metrics: dict[str, Any] = {}
    for name, result in _measured(results):
        found = {}
        for measure, path in _MEASURES.items():
            value = result.number(*path)
            if value is None:
                continue
            found[measure] = {"value": value}
            interval = result.interval(path[-1]) if path[0] == "latency" else None
            if interval is not None:
                found[measure] |= {"lower_value": interval[0], "upper_value": interval[1]}
        metrics[name[:1024]] = found
    return metrics


def github_action(results: Sequence[SavedResult]) -> list[dict[str, Any]]:
    """Return what github-action-benchmark reads as ``customSmallerIsBetter``: latency and memory, one entry each.

    Source: benchmark-action/github-action-benchmark, src/extract.ts: {"name", "unit", "value", "range"?, "extra"?}.
    """
    entries = []
    for name, result in _measured(results):
        latency = result.latency
        model = result.get("environment", "machine", "cpu_model")
        extra = f"n={latency['n']}, {latency['processes']} processes" + (f"\n{model}" if model else "")
        for title, key in (("P50", "p50_ns"), ("P95", "p95_ns"), ("P99", "p99_ns")):
            value = result.number("latency", key)
            if value is None:
                continue
            entry: dict[str, Any] = {"name": f"{name} {title}", "unit": "ns", "value": value}
            interval = result.interval(key)
            if interval is not None:
                entry["range"] = f"95 % CI {interval[0]:.0f} to {interval[1]:.0f}"
            entries.append({**entry, "extra": extra})
        peak = result.number("memory", "peak_bytes")
        if peak is not None:
            method = result.get("memory", "method")
            entries.append(
                {"name": f"{name} peak memory", "unit": "bytes", "value": peak, "extra": str(method)}
            )
    return entries


def _measured(results: Sequence[SavedResult]) -> list[tuple[str, SavedResult]]:
    return [(name, r) for name, r in zip(names(results), results, strict=True) if r.measured]
