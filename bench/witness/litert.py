"""LiteRT's benchmark tool, which the ai-edge-litert package brings along (``litert-benchmark``).

Read in ai-edge-litert 2.3 (ai_edge_litert/tools/benchmark_litert_model.py): a Python loop around
``CompiledModel.run_by_name`` with ``perf_counter``, floats from -1 to 1, integers from -128 to 127.
"""

from __future__ import annotations

import json

from portcall.bench.witness.tool import Case, Output, Plan, Reading, Tool, unreadable
from portcall.core import UnsupportedError

NAME = "litert-benchmark"
REPORT = "litert.json"
_KEYS = {"min_ms": "min_ns", "max_ms": "max_ns", "std_ms": "std_ns", "p5_ms": "p5_ns", "p95_ms": "p95_ns"}


def plan(case: Case) -> Plan:
    """Return the command line: the CPU alone, our threads, as many inferences as fill our minimum time."""
    arguments = (
        f"--model={case.model}",
        f"--num_threads={case.workload.threads}",
        f"--warmup_runs={case.warmup_iterations}",
        f"--num_runs={case.iterations}",
        f"--result_json={REPORT}",
    )
    differences = (
        "litert-benchmark fills inputs with random values of its own (floats from -1 to 1); portcall's processes of "
        "the pairs get the same kind, not the same values",
        "litert-benchmark runs a CompiledModel, and so do portcall's processes of the pairs; the other figures of this "
        "result are an Interpreter's",
        "litert-benchmark passes buffers by name: two dictionaries per inference, in portcall's processes too",
        "litert-benchmark prints 0.01 ms",
    )
    return Plan(arguments, differences, REPORT)


def read(output: Output) -> Reading:
    """Return the latency of the JSON report."""
    try:
        latency = json.loads(output.report or "{}").get("latency", {})
    except json.JSONDecodeError:
        latency = {}
    if "median_ms" not in latency:
        raise unreadable(NAME, output)
    if latency["median_ms"] <= 0:
        raise UnsupportedError(
            f"{NAME} prints 0.01 ms, and this inference takes less than half of that",
            "Witness a larger model",
        )
    others = {key: latency[name] * 1e6 for name, key in _KEYS.items() if name in latency}
    mean = latency.get("avg_ms")
    return Reading(
        latency["median_ms"] * 1e6, None if mean is None else mean * 1e6, latency.get("num_runs"), others
    )


TOOL = Tool(
    name=NAME,
    backend="tflite",
    plan=plan,
    read=read,
    fix="pip install 'ai-edge-litert>=2.3'",
    module="ai_edge_litert.tools.benchmark_litert_model",
    distribution="ai-edge-litert",
    session={"api": "compiled_model"},
)
