"""``python -m benchmarks.memory [ARTIFACT ...]``: is a memory figure repeatable, and does it see what is there?

Repeatability: each artifact measured five times as ``portcall bench`` does (median of its fresh processes); what counts
is the largest difference as a share of the median, for the model (after load less after import) and the peak. Planted:
the first ONNX file again, through a backend that also allocates and touches 50 MB when it loads (seen in the model and
the peak) or in every inference, freed at its end (seen in the peak of inference alone); plain and planted in turn.
Without arguments EfficientNet-Lite0 is exported in float32 to ONNX Runtime, OpenVINO and LiteRT. ``--limits`` adds the
smallest memory limit (``--find-memory-limit``), as often. ``--json`` prints the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import portcall.api
import portcall.exporters
from portcall.bench.report import align
from portcall.core import Workload
from portcall.progress import Reporter

PLANTED = 50 * 1024 * 1024
FIGURES = ("model_bytes", "peak_bytes")

BACKEND = '''
"""ONNX Runtime that also holds PLANTED bytes: from load on, or in each inference (file name *-infer)."""
from contextlib import contextmanager
from dataclasses import replace

from portcall.exporters.onnxruntime import BACKEND as ORT

PLANTED = {size}


def block():
    import numpy
    return numpy.ones(PLANTED, numpy.uint8)


@contextmanager
def load(artifact, workload):
    with ORT.load(artifact, workload) as session:
        held = block() if artifact.path.stem.endswith("-load") else None
        if artifact.path.stem.endswith("-infer"):
            infer = session.infer
            session.infer = lambda: (infer(), block())[0]
        yield session
        del held


BACKEND = replace(ORT, name="planted", load=load, capabilities=replace(ORT.capabilities, suffixes=(".planted",)))
'''


def measure(path: Path, limit: bool = False) -> dict[str, Any]:
    """Return the key "memory" of one bench of *path*."""
    workload = Workload(processes=1, min_time_s=0.001, warmup_s=0.0)
    [result] = portcall.api.benchmark(path, workload=workload, find_memory_limit=limit)["results"]
    if result["outcome"] != "measurement":
        raise SystemExit(f"{path}: {result['reason']}. {result['fix'] or ''}")
    memory: dict[str, Any] = result["memory"]
    return memory


def repeat_row(path: Path, times: int, limit: bool) -> list[dict[str, Any]]:
    """Return a row per figure: how far apart *times* measurements of one artifact are."""
    found = [measure(path, limit) for _ in range(times)]
    series = {key: [m[key] for m in found] for key in FIGURES}
    if limit and all(m["limit"]["available"] for m in found):
        series["limit_bytes"] = [m["limit"]["limit_bytes"] for m in found]
    return [_spread(path.name, key, values) for key, values in series.items()]


def _spread(name: str, key: str, values: Sequence[int]) -> dict[str, Any]:
    middle = statistics.median(values)
    return {
        "artifact": name,
        "figure": key,
        "n": len(values),
        "median_bytes": middle,
        "spread": (max(values) - min(values)) / middle,
        "values": list(values),
    }


def planted_rows(onnx: Path, pairs: int, folder: Path) -> list[dict[str, Any]]:
    """Return a row per figure: what of the planted bytes it saw, as the difference of medians."""
    (folder / "drop-in").mkdir()
    (folder / "drop-in" / "planted.py").write_text(BACKEND.format(size=PLANTED))
    portcall.exporters.__path__.append(str(folder / "drop-in"))
    files = {kind: folder / f"model-{kind}.planted" for kind in ("plain", "load", "infer")}
    for file in files.values():
        shutil.copy(onnx, file)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in files}
    for _ in range(pairs):
        for kind, file in files.items():
            found[kind].append(measure(file))
    rows = []
    for kind, key in (("load", "model_bytes"), ("load", "peak_bytes"), ("infer", "infer_peak_bytes")):
        seen = statistics.median(m[key] for m in found[kind])
        seen -= statistics.median(m[key] for m in found["plain"])
        rows.append(
            {"planted": kind, "figure": key, "n": pairs, "seen_bytes": seen, "error_bytes": seen - PLANTED}
        )
    return rows


def _exported(folder: Path) -> list[Path]:
    answer = portcall.api.export(
        "examples.efficientnet_lite0:model",
        ["onnxruntime:fp32", "openvino:fp32", "tflite:fp32"],
        folder / "exported",
        reporter=Reporter(True),
    )
    return [Path(r["path"]) for r in answer["results"] if r["outcome"] == "artifact"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__)
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = options.artifacts or _exported(folder)
        repeats = [row for path in paths for row in repeat_row(path, options.times, options.limits)]
        onnx = [p if p.suffix == ".onnx" else p / "model.onnx" for p in paths]
        known = [p for p in onnx if p.is_file()]
        planted = planted_rows(known[0], options.times, folder) if known else []
    kernel = (
        f"{os.uname().sysname} {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    )
    if options.json:
        print(json.dumps({"on": kernel, "repeat": repeats, "planted": planted}, indent=2))
        return 0
    print(f"measured on {kernel}\n")
    header = ("artifact", "figure", "median MB", "spread %", "n")
    rows = [
        (r["artifact"], r["figure"], f"{r['median_bytes'] / 1e6:.2f}", f"{r['spread']:.2%}", str(r["n"]))
        for r in repeats
    ]
    print(align(header, rows))
    if planted:
        header = ("planted in", "figure", "seen MiB", "error MiB", "n")
        mib = 1 << 20
        rows = [
            (
                r["planted"],
                r["figure"],
                f"{r['seen_bytes'] / mib:.3f}",
                f"{r['error_bytes'] / mib:+.3f}",
                str(r["n"]),
            )
            for r in planted
        ]
        print(f"\n{PLANTED / mib:.0f} MiB planted into {known[0].name}\n{align(header, rows)}")
    else:
        print("\nno ONNX file among them: nothing was planted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
