"""``python -m benchmarks.witness``: our P50 beside that of OpenVINO's and LiteRT's own benchmark tools.

EfficientNet-Lite0 at 224 and 448 pixels (so that int8, too, takes the 4 ms from which the ratio is judged) and the
digits network of the examples, fp32 and int8. Interleaved pairs of one fresh process each, in swapped order, one
thread, the same file, precision and kind of inputs: see docs/witness.md. The ratio is ours / theirs, as geometric mean
over pairs with its 95 % t interval. Asked for: within 1.00 +- 0.03 from 4 ms on; below, it is reported, not judged.
Take final figures on a quiet machine: the load average stands below the table.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import portcall
from examples import efficientnet_lite0
from portcall.artifact import write_json
from portcall.bench.report import align
from portcall.core import Workload
from portcall.progress import Reporter

Sample = dict[str, "np.ndarray[Any, Any]"]

MODELS: Mapping[str, tuple[str, str]] = {
    "efficientnet-lite0": ("examples.efficientnet_lite0:model", "benchmarks.witness:crops"),
    "efficientnet-lite0-448": ("benchmarks.witness:large", "benchmarks.witness:large_crops"),
    "digits": ("examples.digits:model", "examples.digits:calibration"),
}
"""Name -> its factory and its calibration data."""

BACKENDS = ("openvino", "tflite")
PRECISIONS = ("fp32", "int8")

HEADER = (
    "model", "backend", "precision", "tool", "version", "ours ms", "theirs ms", "ratio", "95 % CI", "pairs", "verdict",
)  # fmt: skip


def crops() -> Iterator[Sample]:
    """Yield 16 crops of photographs, float32[1, 3, 224, 224]."""
    return itertools.islice(efficientnet_lite0.calibration(), 16)


def large_crops() -> Iterator[Sample]:
    """Yield the same, every pixel twice in both directions."""
    for sample in crops():
        yield {"inputs": sample["inputs"].repeat(2, axis=2).repeat(2, axis=3)}


def large() -> tuple[Any, ...]:
    """Return EfficientNet-Lite0 for 448 x 448 pixels."""
    module, (example,), dynamic = efficientnet_lite0.model()
    return module, (example.repeat_interleave(2, 2).repeat_interleave(2, 3),), dynamic


def main() -> None:
    """Print the table; see the top of this file. Exit code 1 where a judged ratio is off by more than 3 %."""
    parser = argparse.ArgumentParser(description="our latency beside that of the runtimes' own tools")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=20, help="per file (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed per process (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-witness"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    cells = [f"{b}:{p}" for b in arguments.backends.split(",") for p in arguments.precisions.split(",")]
    paths: dict[Path, str] = {}
    for model in arguments.models.split(","):
        if model not in MODELS:
            sys.exit(f"error: no model {model!r}; there are: {', '.join(MODELS)}")
        for cell in cells:
            paths[artifact(model, cell, arguments.folder)] = model
    workload = Workload(processes=1, min_time_s=arguments.seconds)
    results = portcall.benchmark(
        list(paths), workload=workload, witness_pairs=arguments.pairs, reporter=Reporter(True)
    )["results"]
    rows = [{"model": model, **result} for model, result in zip(paths.values(), results, strict=True)]
    print(align(HEADER, [line(row) for row in rows], left=5))
    for environment in (r["environment"] for r in rows[-1:] if r["environment"]):
        print(f"\nmachine: {environment['machine']}\nstate: {environment['state']['after']}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"schema": 1, "results": rows})
    if any(is_off(row) for row in rows):
        sys.exit(1)


def artifact(model: str, cell: str, folder: Path) -> Path:
    """Return the artifact of *cell*, exported unless an earlier run left it."""
    place = folder / model / cell.replace(":", "-")
    path = place / cell.replace(":", "-")
    if not (path / "manifest.json").is_file():
        factory, data = MODELS[model]
        [result] = portcall.export(factory, cell, place, data=data, reporter=Reporter(True))["results"]
        if result["path"] is None:
            sys.exit(f"error: {model} {cell}: {result['reason']}")
    return path


def is_off(row: Mapping[str, Any]) -> bool:
    """Tell whether a ratio that is judged lies outside 1.00 +- 0.03."""
    found = row["witness"] or {}
    ratio = found.get("p50_ratio")
    return ratio is not None and found["verdict"] != "not judged" and abs(ratio - 1) > 0.03


def line(row: Mapping[str, Any]) -> list[str]:
    found = row["witness"]
    head = [row["model"], row["backend"], row["precision"]]
    if found is None or found["outcome"] != "compared":
        reason = row["reason"] if found is None else found["reason"]
        return [*head, *["-"] * (len(HEADER) - len(head) - 1), str(reason)]
    interval = found["ci"]
    return [
        *head,
        found["tool"],
        found["version"] or "not told",
        f"{found['ours']['p50_ns'] / 1e6:.3f}",
        f"{found['theirs']['p50_ns'] / 1e6:.3f}",
        f"{found['p50_ratio']:.3f}",
        "-" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
        str(found["pairs"]),
        found["verdict"],
    ]


if __name__ == "__main__":
    main()
