"""TensorFlow Lite's native ``benchmark_model``, a program that users download or build.

Read in tensorflow/lite/tools/benchmark (benchmark_model.cc, benchmark_tflite_model.cc): an Interpreter's Invoke, timed
in microseconds. Versions since 2024 print the median, older ones only the mean. Its option for input files takes tensor
names, which an Interpreter's signature does not tell, so it fills inputs itself: floats from -0.5 to 0.5.
"""

from __future__ import annotations

import re

from portcall.bench.witness.tool import Case, Output, Plan, Reading, Tool, unreadable

NAME = "benchmark_model"

_STATISTICS = re.compile(r"\bcount=(\d+)((?: \w+=[\d.e+]+)+)")
_KEYS = {"avg": "mean_ns", "median": "p50_ns", "min": "min_ns", "max": "max_ns", "std": "std_ns", "p5": "p5_ns", "p95": "p95_ns"}  # fmt: skip  # noqa: E501  # one table


def plan(case: Case) -> Plan:
    """Return the command line: XNNPACK as in the Interpreter's default, our threads and counts."""
    arguments = (
        f"--graph={case.model}",
        f"--num_threads={case.workload.threads}",
        "--use_xnnpack=true",
        f"--warmup_runs={case.warmup_iterations}",
        f"--warmup_min_secs={case.workload.warmup_s:g}",
        f"--num_runs={case.iterations}",
        "--min_secs=0",
        "--max_secs=3600",
    )
    differences = (
        "benchmark_model does not tell its version: it may be another build than the runtime that portcall loads",
        "benchmark_model fills inputs with random values of its own (floats from -0.5 to 0.5); portcall's processes "
        "of the pairs get the same kind, not the same values",
        "benchmark_model prints whole microseconds",
    )
    return Plan(arguments, differences)


def read(output: Output) -> Reading:
    """Return the latency of the last ``count=...`` line; the one before is the warm-up's."""
    lines = list(_STATISTICS.finditer(output.text))
    summary = re.search(r"Inference \(avg\): ([\d.e+]+)", output.text)
    if len(lines) < 2 or summary is None:
        raise unreadable(NAME, output)
    found = dict(pair.split("=") for pair in lines[-1][2].split())
    values = {key: float(found[name]) * 1e3 for name, key in _KEYS.items() if name in found}
    return Reading(values.pop("p50_ns", None), values.pop("mean_ns"), int(lines[-1][1]), values)


TOOL = Tool(
    name=NAME,
    backend="tflite",
    plan=plan,
    read=read,
    fix="Put TensorFlow Lite's benchmark_model into PATH, or its path into PORTCALL_BENCHMARK_MODEL",
    variable="PORTCALL_BENCHMARK_MODEL",
    values=(-0.5, 0.5),
)
