"""Saved benches with known samples, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.statistics import percentile, summarize

Arrays = list[np.ndarray[Any, Any]]

MACHINE = {"cpu_model": "Some CPU", "logical_cpus": 4, "governor": None, "absent": {"governor": "no cpufreq"}}


def samples(processes: int = 3, n: int = 400, base_ns: int = 1_000_000, seed: int = 0) -> Arrays:
    """Return int64[n] per process, with a heavy tail."""
    rng = np.random.default_rng(seed)
    return [(base_ns * (1 + 0.02 * rng.standard_exponential(n))).astype(np.int64) for _ in range(processes)]


def measured(wall: Arrays, cpu: Arrays | None = None, **changes: Any) -> dict[str, Any]:
    """Return a cell of ``bench.json`` that belongs to *wall*, in the shape that ``bench`` writes."""
    latency, warnings = summarize(wall)
    return {
        "artifact": "out/onnxruntime-int8",
        "backend": "onnxruntime",
        "precision": "int8",
        "target": "local",
        "outcome": "measurement",
        "error_kind": None,
        "reason": None,
        "fix": None,
        "latency": latency,
        "cpu": {"p50_ns": percentile(np.concatenate(cpu or wall), 0.5)},
        "device": None,
        "load_ns": 5e6,
        "first_ns": 2e6,
        "throughput_per_s": 1e9 / latency["mean_ns"],
        "finish": None,
        "memory": {"method": "VmHWM", "baseline_bytes": 50e6, "model_bytes": 5e6, "peak_bytes": 60e6},
        "environment": {
            "machine": MACHINE,
            "stack": {"python": "3.11.7", "runtime": "onnxruntime 1.31.1"},
            "state": {"after": {"time": "2026-11-22T10:00:00+00:00", "load_average": [0.5, 0.4, 0.3]}},
        },
        "size_bytes": 1_500_000,
        "parity": {"n": 64, "samples": "eval", "sqnr_db": 38.4, "agreement": 0.98, "interpreted": False},
        "eval": None,
        "workload": {"batch": 1, "threads": 1, "processes": len(wall)},
        "warnings": warnings,
        **changes,
    }


def unavailable(**changes: Any) -> dict[str, Any]:
    """Return a cell that could not run."""
    keys = (
        "latency",
        "cpu",
        "device",
        "load_ns",
        "first_ns",
        "throughput_per_s",
        "memory",
        "environment",
        "parity",
    )
    return {
        "artifact": "out/tflite-int8",
        "backend": "tflite",
        "precision": "int8",
        "target": "local",
        "outcome": "unavailable",
        "error_kind": "unavailable",
        "reason": "ai-edge-litert is not installed",
        "fix": "Run: pip install 'portcall[tflite]'",
        **dict.fromkeys(keys),
        "size_bytes": 900_000,
        "warnings": [],
        **changes,
    }


def save(folder: Path, cells: list[tuple[dict[str, Any], Arrays]], cpu: Arrays | None = None) -> Path:
    """Write ``bench.json`` and the raw samples as ``bench -o`` does; return the folder. cpu: of every cell."""
    (folder / "raw").mkdir(parents=True)
    entries = []
    for number, (cell, wall) in enumerate(cells):
        name = f"raw/{number:03d}-{cell['backend']}-{cell['precision']}.npz"
        arrays: dict[str, Any] = {f"wall_ns_{i}": a for i, a in enumerate(wall)}
        arrays |= {f"cpu_ns_{i}": a for i, a in enumerate(cpu or wall)} if wall else {}
        np.savez_compressed(folder / name, **arrays)
        entries.append({**cell, "raw": name})
    (folder / "bench.json").write_text(json.dumps({"schema": 1, "results": entries}))
    return folder
