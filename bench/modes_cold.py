"""The figures of the cold-start mode: every part of the way to the first result, per state of the page cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portcall.bench.statistics import PERCENTILES, percentile, process_interval, supported_percentile

PARTS = ("interpreter_ns", "import_ns", "load_ns", "bind_ns", "first_ns")
KEYS = (*PARTS, "total_ns", "harness_ns", "wall_ns")

MEANING = {
    "warm": "files in the page cache, as an earlier start left them",
    "artifact": "the artifact's files dropped from the page cache before each start",
    "runtime": "the artifact's and the runtime's files dropped before each start",
    "system": "the whole page cache dropped before each start",
}


def distribution(values: Sequence[float]) -> dict[str, Any]:
    """Return n, min, max, geometric mean and its 95 % t interval, and the percentiles that n supports, of processes."""
    array = np.asarray(values, dtype=np.float64)
    positive = bool(array.size) and float(array.min()) > 0
    ci = process_interval(list(values)) if positive else None
    found: dict[str, Any] = {
        "n": int(array.size),
        "min_ns": float(array.min()) if array.size else None,
        "max_ns": float(array.max()) if array.size else None,
        "geomean_ns": float(np.exp(np.log(array).mean())) if positive else None,
        "ci": None if ci is None else list(ci),
    }
    for key, q in PERCENTILES.items():
        found[key] = percentile(array, q) if supported_percentile(q, array.size) else None
    return found


def cold_figures(
    caches: Sequence[str],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    drops: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, Any], list[str]]:
    """Return the "cold" object of a result, and warnings.

    answers, drops: per state of the page cache, what each process answered and what was dropped before it. A state that
    could not be made has "parts": None and the reason. "ratio" is the geometric mean of total_ns to warm's.
    """
    entries, warnings = [], []
    warm = distribution([a["total_ns"] for a in answers.get("warm", ())])["geomean_ns"]
    for cache in caches:
        found = answers.get(cache, ())
        dropped = list(drops.get(cache, ()))
        failed = next((d for d in dropped if d["method"] is None), None)
        entry: dict[str, Any] = {
            "cache": cache,
            "meaning": MEANING[cache],
            "method": None if failed or not dropped else dropped[0]["method"],
            "reason": failed["reason"] if failed else None,
            "n": len(found),
            "parts": None,
            "ratio": None,
            "dropped": None,
        }
        if failed:
            warnings.append(f"page cache {cache}: {failed['reason']}")
        if dropped and not failed:
            entry["dropped"] = {
                key: dropped[-1][key]
                for key in ("files", "bytes", "resident_before_bytes", "resident_after_bytes")
            }
            left = [d["resident_after_bytes"] for d in dropped]
            if any(size for size in left if size is not None):
                most = max(size for size in left if size is not None)
                warnings.append(
                    f"page cache {cache}: up to {most / 1e6:.1f} MB stayed: mapped by other processes, or in tmpfs"
                )
            if cache != "system" and all(size is None for size in left):
                warnings.append(f"page cache {cache}: this system does not tell whether it was dropped")
        if found and not failed:
            entry["parts"] = {key: distribution([a[key] for a in found]) for key in KEYS}
            total = entry["parts"]["total_ns"]["geomean_ns"]
            entry["ratio"] = total / warm if warm and total and cache != "warm" else None
            if len(found) < 2:
                warnings.append(f"page cache {cache}: 1 process, no interval; rerun with --processes 5")
        entries.append(entry)
    return {
        "method": "monotonic clock of the system, from the parent's spawn to the end of the first inference; total is "
        "the sum of its parts, without what portcall does between them (harness)",
        "caches": entries,
    }, warnings
