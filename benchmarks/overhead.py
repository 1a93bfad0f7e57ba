"""What the harness costs per inference: ``python -m benchmarks.overhead``.

A tiny convolution chain in ONNX Runtime, OpenVINO and LiteRT, in fresh processes. Each alternates chunks of inferences:
the bare loop of the runtime's own API on the same bound tensors, with no clock inside (one clock pair around the
chunk); and portcall's measuring loop (``run_loop``). Garbage collector off in both. Per pair of chunks:

* in the sample: mean of portcall's wall samples minus the bare time per inference: what a reported latency is too high;
* whole loop: portcall's elapsed time per inference minus the bare one: what an inference waits for the next.

Each process gives the median of its pairs; the table shows the median over processes and Student's t interval.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks.steady_recordings import BACKENDS, SIZES, chain
from portcall import api, artifact
from portcall.bench.report import align
from portcall.bench.statistics import student_t_quantile
from portcall.exporters import get_backend
from portcall.targets.agent.contract import Workload
from portcall.targets.agent.measure import run_loop

LIMIT_US = 2.0


def onnxruntime_loop(session: Any, n: int) -> int:
    """Do *n* inferences through the runtime's own API; return the ns that took. So do the others."""
    run, binding = session._session.run_with_iobinding, session._binding
    start = perf_counter_ns()
    for _ in range(n):
        run(binding)
    return perf_counter_ns() - start


def openvino_loop(session: Any, n: int) -> int:
    infer = session._request.infer
    start = perf_counter_ns()
    for _ in range(n):
        infer(share_outputs=True)
    return perf_counter_ns() - start


def tflite_loop(session: Any, n: int) -> int:
    invoke = session._interpreter.invoke
    start = perf_counter_ns()
    for _ in range(n):
        invoke()
    return perf_counter_ns() - start


BARE: dict[str, Callable[[Any, int], int]] = {
    "onnxruntime": onnxruntime_loop,
    "openvino": openvino_loop,
    "tflite": tflite_loop,
}


def one_process(folder: Path, pairs: int, chunk: int) -> dict[str, float]:
    """Return the medians over *pairs* of chunks, in ns per inference."""
    opened, _ = artifact.open_artifact(folder)
    with get_backend(opened.backend).load(opened, Workload()) as session:
        shapes = {t.name: [d if isinstance(d, int) else 1 for d in t.shape] for t in session.inputs}
        rng = np.random.default_rng(1)
        session.set_inputs({k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()})
        bare_loop = BARE[opened.backend]
        bare_loop(session, 4 * chunk)
        rows = []
        for number in range(pairs):
            gc.collect()
            gc.disable()
            bare = bare_loop(session, chunk) / chunk if number % 2 else math.nan
            samples = run_loop(session.infer, 0.0, 3600.0, max_count=chunk)
            gc.disable()
            if math.isnan(bare):  # the order alternates
                bare = bare_loop(session, chunk) / chunk
            gc.enable()
            wall = float(samples.wall_ns.mean())
            rows.append((bare, wall - bare, samples.elapsed_ns / samples.wall_ns.size - bare))
    bare, in_sample, loop = np.median(np.array(rows), axis=0)
    return {"bare_ns": float(bare), "in_sample_ns": float(in_sample), "loop_ns": float(loop)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's t interval of the mean; infinite for one value."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = student_t_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=10, help="per runtime (default 10)")
    parser.add_argument("--pairs", type=int, default=40, help="of chunks per process (default 40)")
    parser.add_argument("--chunk", type=int, default=500, help="inferences per chunk (default 500)")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=Path, metavar="ARTIFACT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(one_process(options.one, options.pairs, options.chunk)))
        return
    found: dict[str, list[dict[str, float]]] = {b: [] for b in options.backends}
    with tempfile.TemporaryDirectory() as name:
        chain(Path(name) / "tiny.onnx", *SIZES["s"])
        api.export(Path(name) / "tiny.onnx", [f"{b}:fp32" for b in options.backends], Path(name) / "out")
        for _ in range(options.processes):
            for backend in options.backends:
                command = [sys.executable, "-m", "benchmarks.overhead", "--one", f"{name}/out/{backend}-fp32"]
                command += ["--pairs", str(options.pairs), "--chunk", str(options.chunk)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[backend].append(json.loads(done.stdout.splitlines()[-1]))
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        print()
        return
    rows = []
    for backend, processes in found.items():
        cells = [f"{np.median([p['bare_ns'] for p in processes]) / 1e3:.2f}"]
        for key in ("in_sample_ns", "loop_ns"):
            values = [p[key] / 1e3 for p in processes]
            low, high = interval(values)
            cells.append(f"{np.median(values):.2f} [{low:.2f}, {high:.2f}]")
        within = np.median([p["in_sample_ns"] for p in processes]) <= 1e3 * LIMIT_US
        rows.append([backend, *cells, str(len(processes)), "yes" if within else "no"])
    header = [
        "runtime",
        "bare us",
        "in the sample us [95 %]",
        "whole loop us [95 %]",
        "processes",
        f"sample <= {LIMIT_US:g} us",
    ]
    print(align(header, rows, left=1))
    print(
        f"\n{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
