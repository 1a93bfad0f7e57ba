"""What a profile is worth: coverage, the profiler's cost, and how far shares of time move between processes.

Run: python -m benchmarks.placement [--repeats 5] [--min-time 1] [ARTIFACT|FILE ...]. Without artifacts, exports
the digits network of examples/ to onnxruntime, openvino and tflite. Each repeat is two fresh processes per artifact,
one without and one with the profiler, and the artifacts take turns.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import portcall.api
from portcall.bench.report import align
from portcall.core import Workload

CELLS = "onnxruntime:fp32,int8,openvino:fp32,int8,tflite:fp32,int8"


def _exported(folder: Path) -> list[Path]:
    answer = portcall.api.export("examples.digits:model", CELLS, folder, data="examples.digits:calibration")
    return [Path(r["path"]) for r in answer["results"] if r["outcome"] == "artifact"]


def _spread(values: Sequence[float | None], digits: int = 3) -> str:
    """``0.912 (0.900-0.921)``: median and range."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return f"{np.median(known):.{digits}f} ({min(known):.{digits}f}-{max(known):.{digits}f})"


def _row(answers: Sequence[dict[str, Any]]) -> list[str]:
    first = answers[0]
    shares = {a["placement"]["share"] for a in answers}
    return [
        f"{first['backend']}:{first['precision']}",
        f"{np.median([a['p50_ns'] for a in answers]) / 1e6:.3f}",
        _spread([a["coverage"] for a in answers]),
        _spread([a["coverage_of_p50"] for a in answers]),
        _spread([a["overhead"] for a in answers]),
        _spread([a["placement"]["time_share"] for a in answers]),
        f"{first['placement']['on_unit']}/{first['placement']['operators']}"
        + ("" if len(shares) == 1 else " MOVES"),
        ", ".join(dict.fromkeys(r["operator"] for r in first["placement"]["rest"])) or "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--min-time", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = options.artifacts or _exported(Path(folder) / "out")
        answers: dict[Path, list[dict[str, Any]]] = {p: [] for p in paths}
        for _ in range(options.repeats):
            for path in paths:
                answers[path].append(
                    portcall.api.profile(path, workload=Workload(min_time_s=options.min_time))
                )
    header = [
        "artifact", "P50 ms", "sum / profiled", "sum / P50", "profiled / P50", "time on unit", "operators", "rest",
    ]  # fmt: skip
    print(align(header, [_row(a) for a in answers.values()], left=1))
    print(
        f"\nmedian (range) of n={options.repeats} pairs of processes, 1 thread, {platform.machine()}, "
        f"{platform.platform()}"
    )


if __name__ == "__main__":
    main()
