"""``python -m benchmarks.modes``: the modes of ``portcall bench`` beside theory and beside other programs.

arrival: a server of constant service time at several loads; the mean wait to that of Lindley's recursion on the same
arrivals and the service times as they were, and to Pollaczek and Khinchine's formula.
cold: ``--mode cold`` (its total) to a script that imports ONNX Runtime, loads the same file and infers once;
both from the parent's spawn, interleaved.
streams: ``--mode throughput`` on OpenVINO to ``benchmark_app`` with the same file, streams, requests, threads, type
and shape; interleaved pairs of fresh processes.
drift: coverage of the slope's 95 % interval over simulated series with autocorrelation, beside plain least squares.

Ratios have 95 % t intervals on log values over pairs. Timings need a quiet machine: the load average is printed.
``--quick`` shows that it works; its figures mean little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import portcall
from portcall.bench.modes import Cold, Throughput
from portcall.bench.modes_sustained import slope
from portcall.bench.report import align
from portcall.bench.statistics import process_interval, student_t_quantile
from portcall.core import Workload
from portcall.targets.agent.arrival import poisson_arrivals, serve

PARTS = ("arrival", "cold", "streams", "drift")
LOADS = (0.3, 0.5, 0.7, 0.9)
SERVICE_S = 0.005

OWN = """
import sys, time
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.zeros((1, 3, 112, 112), numpy.float32)})
print(time.monotonic_ns() - int(sys.argv[2]))
"""


def model(path: Path) -> None:
    """Write a CNN of about 0.35 GMAC: input "x" float32[1, 3, 112, 112], random weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, value, channels = [], [], "x", 3
    for number, (out, stride) in enumerate(((32, 2), (64, 1), (128, 2), (128, 1))):
        array = (rng.standard_normal((out, channels, 3, 3)) / math.sqrt(9 * channels)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{number}"))
        options = {"strides": [stride, stride], "pads": [1, 1, 1, 1]}
        nodes.append(helper.make_node("Conv", [value, f"w{number}"], [f"c{number}"], **options))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        value, channels = f"r{number}", out
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["y"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 112, 112])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, 1, 1])]
    graph = helper.make_graph(nodes, "cnn", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def _ratio(values: Sequence[float]) -> list[str]:
    ci = process_interval(values)
    center = math.exp(float(np.mean(np.log(values))))
    return [f"{center:.3f}", "-" if ci is None else f"{ci[0]:.3f}..{ci[1]:.3f}", str(len(values))]


def arrival(seconds: float) -> str:
    """Return the table of mean waits, measured and by theory."""

    def spin() -> None:
        until = time.perf_counter_ns() + int(SERVICE_S * 1e9)
        while time.perf_counter_ns() < until:
            pass

    rows = []
    for load in LOADS:
        rate = load / SERVICE_S
        due = poisson_arrivals(rate, seconds, [1, int(100 * load)])
        begin, end = serve(spin, due, 1 << 62)
        service = (end - begin).astype(np.float64)
        free, expected = 0.0, np.empty(due.size)
        for i, (arrives, took) in enumerate(zip(due.tolist(), service.tolist(), strict=True)):
            expected[i] = max(0.0, free - arrives)
            free = max(arrives, free) + took
        first = due.size // 10
        found = float((begin - due)[first:].mean())
        lindley = float(expected[first:].mean())
        busy = rate * service.mean() / 1e9
        formula = rate / 1e9 * float((service**2).mean()) / (2 * (1 - busy)) if busy < 1 else math.nan
        figures = [f"{found / 1e6:.3f}", f"{found / lindley:.3f}", f"{found / formula:.3f}"]
        rows.append([f"{load:g}", f"{busy:.3f}", str(due.size), *figures])
    header = ["load", "as measured", "n", "mean wait ms", "to Lindley", "to Pollaczek-Khinchine"]
    return align(header, rows, left=1)


def cold(folder: Path, pairs: int) -> str:
    """Return the table of cold-start totals beside a script's own."""
    path = folder / "model.onnx"
    model(path)
    ratios: list[float] = []
    for _ in range(pairs):
        [result] = portcall.benchmark(path, mode=Cold(caches=("warm",)), workload=Workload(processes=1))[
            "results"
        ]
        ours = result["cold"]["caches"][0]["parts"]["total_ns"]["geomean_ns"]
        command = [sys.executable, "-P", "-c", OWN, str(path), str(time.monotonic_ns())]
        own = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        ratios.append(ours / own)
    row = ["portcall's total / the script's", *_ratio(ratios)]
    return align(["onnxruntime, page cache warm", "ratio", "95 % CI", "pairs"], [row], left=1)


def streams(folder: Path, pairs: int, seconds: float) -> str:
    """Return the table of throughputs beside benchmark_app's."""
    tool = shutil.which("benchmark_app") or shutil.which(
        "benchmark_app", path=str(Path(sys.executable).parent)
    )
    if tool is None:
        return "streams: no benchmark_app here: pip install openvino"
    model(folder / "model.onnx")
    if not (folder / "out").exists():
        portcall.export(folder / "model.onnx", "openvino:fp32", folder / "out")
    artifact = folder / "out" / "openvino-fp32"
    rows = []
    for count in sorted({1, 2, os.cpu_count() or 1}):
        ratios = []
        for _ in range(pairs):
            mode = Throughput(batches=(1,), streams=(count,))
            workload = Workload(processes=1, min_time_s=seconds)
            [result] = portcall.benchmark(artifact, mode=mode, workload=workload)["results"]
            ours = result["throughput"]["points"][0]["samples_per_s"]
            ratios.append(ours / _benchmark_app(tool, artifact / "model.xml", count, seconds))
        rows.append([str(count), *_ratio(ratios)])
    return align(["streams", "samples/s to benchmark_app", "95 % CI", "pairs"], rows, left=1)


def _benchmark_app(tool: str, path: Path, count: int, seconds: float) -> float:
    """Return the frames per second that benchmark_app prints."""
    command = [
        tool, "-m", str(path), "-d", "CPU", "-hint", "none", "-api", "async", "-nstreams", str(count),
        "-nireq", str(count), "-nthreads", str(count), "-infer_precision", "f32", "-t", str(max(1, round(seconds))),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Throughput:\s+([\d.]+) FPS", done.stdout)
    if found is None:
        sys.exit(f"error: benchmark_app printed no throughput:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(found[1])


def drift(simulations: int) -> str:
    """Return the coverage of the slope's interval, and of plain least squares."""
    rng = np.random.default_rng(1)
    rows = []
    for n in (12, 24, 60):
        for r in (0.0, 0.2, 0.4, 0.6):
            x = np.arange(n) / 12
            c = x - x.mean()
            covered = plain = refused = 0
            for _ in range(simulations):
                noise = rng.standard_normal(n)
                for i in range(1, n):
                    noise[i] = r * noise[i - 1] + math.sqrt(1 - r * r) * noise[i]
                found, ci = slope(list(x), list(noise))
                refused += ci is None
                covered += ci is not None and ci[0] <= 0 <= ci[1]
                residual = noise - noise.mean() - found * c
                half = student_t_quantile(0.975, n - 2) * math.sqrt((residual @ residual) / (n - 2) / (c @ c))
                plain += abs(found) <= half
            shares = [
                f"{100 * covered / max(1, simulations - refused):.1f}",
                f"{100 * refused / simulations:.1f}",
                f"{100 * plain / simulations:.1f}",
            ]
            rows.append([str(n), f"{r:g}", *shares, str(simulations)])
    return align(["windows", "correlation", "covers %", "refused %", "plain covers %", "n"], rows, left=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; see the top of this file."""
    parser = argparse.ArgumentParser(
        description="the modes of portcall bench, beside theory and other programs"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="small n: shows that it works")
    parser.add_argument("--pairs", type=int, default=10, help="of processes (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-modes"), help="default: %(default)s")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    pairs = 2 if given.quick else given.pairs
    tables: dict[str, Any] = {
        "arrival": lambda: arrival(2.0 if given.quick else 120.0),
        "cold": lambda: cold(given.folder, pairs),
        "streams": lambda: streams(given.folder, pairs, 1.0 if given.quick else 5.0),
        "drift": lambda: drift(100 if given.quick else 4000),
    }
    facts = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({**facts, "quick": given.quick}))
    for name in given.only or PARTS:
        print(f"\n{name} (load average {os.getloadavg()[0]:.2f})\n{tables[name]()}", flush=True)


if __name__ == "__main__":
    main()
