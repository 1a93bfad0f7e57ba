"""OpenVINO's benchmark_app, which the openvino package brings along.

Read in openvino 2026.4 (openvino/tools/benchmark): the latency is ``InferRequest.latency``, measured in C++ around the
inference; with ``-api sync`` one request, inferred once before; a float input of 3 channels becomes uint8 with a
conversion inside the model unless ``-ip`` says otherwise.
"""

from __future__ import annotations

import json
import re

from portcall.bench.witness.tool import Case, Output, Plan, Reading, Tool, unreadable
from portcall.core import UnsupportedError

NAME = "benchmark_app"
REPORT = "benchmark_report.json"
TYPES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8",
    "uint64": "u64", "uint32": "u32", "uint16": "u16", "uint8": "u8", "bool": "bool",
}  # fmt: skip

_KEYS = {"latency (ms)": "p50_ns", "avg latency": "mean_ns", "min latency": "min_ns", "max latency": "max_ns"}
_LINES = {"Median": "p50_ns", "Average": "mean_ns", "Min": "min_ns", "Max": "max_ns"}


def plan(case: Case) -> Plan:
    """Return the command line: one stream, our threads, float32 arithmetic, our inputs and their own types."""
    unknown = [i for i in case.inputs if i.dtype not in TYPES]
    if unknown:
        raise UnsupportedError(f"{NAME} has no type for the {unknown[0].dtype} input {unknown[0].name!r}", "")
    types = [TYPES[i.dtype] for i in case.inputs]
    if len(set(types)) == 1:
        kept = ("-ip", types[0])
    else:
        kept = ("-iop", ",".join(f"{i.name}:{t}" for i, t in zip(case.inputs, types, strict=True)))
    arguments = (
        "-m", str(case.model), "-d", "CPU", "-hint", "none", "-nstreams", "1",
        "-nthreads", str(case.workload.threads), "-infer_precision", "f32", "-api", "sync",
        "-inference_only", "true", *kept, "-i", ",".join(str(i.file) for i in case.inputs),
        "-niter", str(case.iterations),
        "-report_type", "no_counters", "-json_stats", "-report_folder", ".",
    )  # fmt: skip
    differences = (
        "benchmark_app times inside the runtime (InferRequest.latency), portcall around the Python call of infer(), "
        "which adds about 2 us",
        "benchmark_app warms up with one inference",
        "benchmark_app prints 0.01 ms, below 1 ms 0.01 us",
        "inputs lie in the runtime's memory for benchmark_app, in NumPy's for portcall; neither copies them in the "
        "timed part",
    )
    return Plan(arguments, differences, REPORT)


def read(output: Output) -> Reading:
    """Return the latency of the JSON report, or of the console where that is finer (below 1 ms)."""
    try:
        results = json.loads(output.report or "{}").get("execution_results", {})
    except json.JSONDecodeError:
        results = {}
    if "error" in results:
        raise unreadable(NAME, output, str(results["error"]))
    values = {key: float(results[name]) * 1e6 for name, key in _KEYS.items() if name in results}
    for name, key in _LINES.items():
        found = re.search(rf"\] +{name}: +([\d.]+) (us|ms)$", output.text, re.MULTILINE)
        if found is not None and (found[2] == "us" or key not in values):
            values[key] = float(found[1]) * (1e3 if found[2] == "us" else 1e6)
    if not values.get("p50_ns"):
        raise unreadable(NAME, output)
    count = results.get("total number of iterations")
    p50, mean = values.pop("p50_ns"), values.pop("mean_ns", None)
    return Reading(p50, mean, None if count is None else int(count), values)


TOOL = Tool(
    name=NAME,
    backend="openvino",
    plan=plan,
    read=read,
    fix="pip install 'portcall[openvino]': the openvino package brings benchmark_app along",
    module="openvino.tools.benchmark.main",
    distribution="openvino",
    suffix=".npy",
)
