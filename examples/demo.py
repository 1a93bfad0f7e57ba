"""``make demo``: EfficientNet-Lite0 through three runtimes at every precision, checked and measured on this machine.

The same with the command line::

    portcall export examples.efficientnet_lite0:model --to onnxruntime:all,tflite:all,openvino:all \\
        --data examples.efficientnet_lite0:calibration --eval examples.efficientnet_lite0:evaluation -o build/demo
    portcall bench build/demo --min-time 12 --max-time 12 -o build/demo-bench
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import portcall
from portcall.artifact import write_json
from portcall.bench.report import bench_table
from portcall.core import Workload
from portcall.progress import Reporter

CELLS = (
    "onnxruntime:fp32,fp16,int8-dynamic,int8",
    "tflite:fp32,fp16,int8-dynamic,int8,int16x8",
    "openvino:fp32,fp16,int8",
)


def main(output: Path, seconds: float) -> int:
    """Run the demo into *output*, *seconds* of measuring per cell; return 0 if every cell was measured."""
    start = time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    reporter = Reporter(True)
    exported = portcall.export(
        "examples.efficientnet_lite0:model",
        CELLS,
        output / "artifacts",
        data="examples.efficientnet_lite0:calibration",
        evaluation="examples.efficientnet_lite0:evaluation",
        reporter=reporter,
    )["results"]
    print(f"exported and verified in {time.monotonic() - start:.0f} s; measuring ...", file=sys.stderr)
    paths = [r["path"] for r in exported if r["path"] is not None]
    workload = Workload(processes=5, min_time_s=seconds, max_time_s=seconds)
    measured = {}
    if paths:
        answer = portcall.benchmark(paths, workload=workload, output=output / "bench", reporter=reporter)
        measured = {r["artifact"]: r for r in answer["results"]}
    rows: list[dict[str, Any]] = [measured.get(r["path"], r) for r in exported]
    write_json(output / "demo.json", {"schema": 1, "export": exported, "bench": list(measured.values())})
    print(bench_table(rows))
    print(f"\n{time.monotonic() - start:.0f} s; artifacts, demo.json and raw samples are in {output}")
    return 0 if all(r["outcome"] == "measurement" for r in rows) else 4


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="cap per cell over 5 processes (default 12)"
    )
    sys.exit(main(Path("build/demo"), parser.parse_args().seconds))
