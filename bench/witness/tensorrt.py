"""NVIDIA's trtexec (TensorRT 8.5 to 11) on the very engine that our session loads. Unproven: no GPU at hand.

The defaults changed: until 10 trtexec copies inputs and outputs, launches kernel by kernel and blocks; from 11 on it
copies nothing, launches a CUDA graph and spins. Each is therefore stated or switched off by the version's own flag.
Compared is "GPU Compute Time" (CUDA events around the engine), which is what our session reports as device time.
Flags: NVIDIA/TensorRT samples/common/sampleOptions.cpp for 10; for 11 the use in public benchmarks of 11.0.
"""

from __future__ import annotations

import re

from portcall.bench.witness.tool import Case, Output, Plan, Reading, Tool, unreadable
from portcall.core import UnsupportedError

NAME = "trtexec"

_BANNER = re.compile(r"\[TensorRT(?:-RTX|_RTX)? v([\d.]+)\]")
_FIGURES = re.compile(r"(min|max|mean|median|percentile\((\d+(?:\.\d+)?)%\)) = ([\d.e+-]+) ms")
_KEYS = {"min": "min_ns", "max": "max_ns", "mean": "mean_ns", "median": "p50_ns"}


def read_version(text: str) -> str | None:
    """Return the version in the banner: "v100300" is 10.3.0, "v8602" 8.6.2; newer builds may write dots."""
    found = _BANNER.search(text)
    if found is None:
        return None
    digits = found[1]
    if "." in digits:
        return digits
    number = int(digits)
    # Before 10: major * 1000 + minor * 100 + patch.
    major, rest = divmod(number, 10_000) if number >= 100_000 else divmod(number, 1000)
    minor, patch = divmod(rest, 100)
    return f"{major}.{minor}.{patch}"


def plan(case: Case) -> Plan:
    """Return the command line: the engine, our inputs, transfers and CUDA graph as our session has them.

    Raises UnsupportedError where the version is unknown: its defaults decide what is measured.
    """
    if case.version is None:
        raise UnsupportedError(
            "trtexec does not tell its version, and its defaults differ between versions",
            "Give the trtexec of TensorRT 8.5 to 11",
        )
    if case.model.suffix == ".onnx":
        raise UnsupportedError("no engine was built of this artifact here", "Measure it where TensorRT runs")
    newer = int(case.version.partition(".")[0]) >= 11
    transfers, graph = case.options.get("transfers") == "included", bool(case.options.get("cuda_graph"))
    flags: list[str] = []
    if newer:
        flags += ["--includeDataTransfers"] if transfers else []
        flags += [] if graph else ["--noCudaGraph"]
        flags.append("--noSpinWait")
    else:
        flags += [] if transfers else ["--noDataTransfers"]
        flags += ["--useCudaGraph"] if graph else []
    shapes = [i for i in case.inputs if i.is_dynamic]
    if shapes:
        flags.append("--shapes=" + ",".join(f"'{i.name}':{'x'.join(map(str, i.shape))}" for i in shapes))
    arguments = (
        f"--loadEngine={case.model}",
        "--loadInputs=" + ",".join(f"'{i.name}':{i.file}" for i in case.inputs),
        f"--iterations={case.iterations}",
        "--duration=0",
        f"--warmUp={round(case.workload.warmup_s * 1000)}",
        "--percentile=90,95,99",
        *flags,
    )
    differences = (
        "compared is the device's own time (CUDA events around the engine)",
        "trtexec enqueues the next inference before the last one has ended, portcall waits for each",
    )
    return Plan(arguments, differences)


def read(output: Output) -> Reading:
    """Return the "GPU Compute Time" of the performance summary."""
    return read_summary(output, NAME)


def read_summary(output: Output, name: str) -> Reading:
    line = re.search(r"GPU Compute Time: (.+)$", output.text, re.MULTILINE)
    if line is None:
        raise unreadable(name, output)
    values = {
        _KEYS.get(figure, f"p{percent}_ns"): float(ms) * 1e6
        for figure, percent, ms in _FIGURES.findall(line[1])
    }
    if "p50_ns" not in values:
        raise unreadable(name, output)
    return Reading(values.pop("p50_ns"), values.pop("mean_ns", None), None, values)


TOOL = Tool(
    name=NAME,
    backend="tensorrt",
    plan=plan,
    read=read,
    fix="It comes with TensorRT's archive and packages of Linux (tensorrt/bin): put it into PATH, or its path into "
    "PORTCALL_TRTEXEC",
    variable="PORTCALL_TRTEXEC",
    ask=("--help",),
    read_version=read_version,
    suffix=".bin",
    clock="device",
)
