"""ONNX Runtime's onnxruntime_perf_test: built with ONNX Runtime from source, in no package registry.

Read in onnxruntime/test/perftest (command_args_parser.cc, ort_test_session.cc, performance_runner.cc, 2026-11): one
inference to warm up, then ``Session::Run`` timed one by one. Inputs are read from ``test_data_set_0/input_N.pb`` beside
the model, so that the model is linked into the tool's folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from portcall.bench.witness.tool import Case, Output, Plan, Reading, Tool, unreadable

NAME = "onnxruntime_perf_test"
MODEL = "model.onnx"

# "P50 Latency: 0.00727787 s"; until 2020 "P50 Latency is 0.0587108sec".
_LATENCY = re.compile(r"^(Min|Max|P50|P90|P95|P99|P999) Latency(?::| is) *([\d.e+-]+) *s", re.MULTILINE)
_MEAN = re.compile(r"^Average (?:inference )?time cost(?: total)?: *([\d.e+-]+) *ms", re.MULTILINE)
_COUNT = re.compile(r"^(?:Runs|Total inference requests|Total iterations): *(\d+)", re.MULTILINE)
_KEYS = {"Min": "min_ns", "Max": "max_ns", "P50": "p50_ns", "P90": "p90_ns", "P95": "p95_ns", "P99": "p99_ns", "P999": "p999_ns"}  # fmt: skip  # noqa: E501  # one table


def plan(case: Case) -> Plan:
    """Return the command line: the CPU provider, all optimizations, our threads, inputs and count."""
    threads = case.workload.threads
    arguments = (
        "-e", "cpu", "-m", "times", "-r", str(case.iterations), "-x", str(threads), "-y", "1", "-c", "1", "-o", "99",
        "-s", MODEL,
    )  # fmt: skip
    differences = [
        "onnxruntime_perf_test does not tell its version: it may be another build than the runtime that portcall "
        "loads",
        "onnxruntime_perf_test times Session::Run, portcall Python's run_with_iobinding; neither copies inputs",
        "onnxruntime_perf_test warms up with one inference",
    ]
    if threads > 1:
        differences.append("threads spin in both")
    files = {MODEL: case.model, **_beside(case.model)}
    return Plan(arguments, tuple(differences), None, files)


def _beside(model: Path) -> dict[str, Path]:
    """Return the files that may hold the model's external data: those that share its name, but for the ending."""
    return {
        p.name: p
        for p in model.parent.glob("*")
        if p.is_file() and p != model and p.stem.startswith(model.stem)
    }


def read(output: Output) -> Reading:
    """Return the latency from the console."""
    values = {_KEYS[name]: float(seconds) * 1e9 for name, seconds in _LATENCY.findall(output.text)}
    mean, count = _MEAN.search(output.text), _COUNT.search(output.text)
    if "p50_ns" not in values and mean is None:
        raise unreadable(NAME, output)
    p50 = values.pop("p50_ns", None)
    return Reading(
        p50, None if mean is None else float(mean[1]) * 1e6, None if count is None else int(count[1]), values
    )


TOOL = Tool(
    name=NAME,
    backend="onnxruntime",
    plan=plan,
    read=read,
    fix="Build ONNX Runtime from source (--build --skip_tests), and put onnxruntime_perf_test into PATH or its path "
    "into PORTCALL_ONNXRUNTIME_PERF_TEST",
    variable="PORTCALL_ONNXRUNTIME_PERF_TEST",
    suffix=".pb",
    inputs="test_data_set_0",
)
