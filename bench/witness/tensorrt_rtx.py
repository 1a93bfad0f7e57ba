"""NVIDIA's ``tensorrt_rtx``, the trtexec of TensorRT-RTX. Unproven: no GPU at hand.

By NVIDIA's documentation of 1.2 it copies nothing, spins and captures the whole engine as a CUDA graph unless
``--includeDataTransfers``, ``--noSpinWait`` and ``--rtxCudaGraphStrategy=disable`` say otherwise.
"""

from __future__ import annotations

from portcall.bench.witness import tensorrt
from portcall.bench.witness.tool import Case, Output, Plan, Reading, Tool
from portcall.core import UnsupportedError

NAME = "tensorrt_rtx"


def plan(case: Case) -> Plan:
    """Return the command line: the engine, our inputs, transfers and CUDA graph as our session has them."""
    if case.model.suffix == ".onnx":
        raise UnsupportedError(
            "no engine was built of this artifact here", "Measure it where TensorRT-RTX runs"
        )
    graph = "wholeGraph" if case.options.get("cuda_graph") else "disable"
    flags = ["--noSpinWait", f"--rtxCudaGraphStrategy={graph}"]
    if case.options.get("transfers") == "included":
        flags.append("--includeDataTransfers")
    shapes = [i for i in case.inputs if i.is_dynamic]
    if shapes:
        flags.append("--shapes=" + ",".join(f"{i.name}:{'x'.join(map(str, i.shape))}" for i in shapes))
    arguments = (
        f"--loadEngine={case.model}",
        "--loadInputs=" + ",".join(f"{i.name}:{i.file}" for i in case.inputs),
        f"--iterations={case.iterations}",
        "--duration=0",
        f"--warmUp={round(case.workload.warmup_s * 1000)}",
        "--percentile=90,95,99",
        *flags,
    )
    differences = (
        "compared is the device's own time (CUDA events around the engine)",
        "tensorrt_rtx enqueues the next inference before the last one has ended, portcall waits for each",
    )
    return Plan(arguments, differences)


def read(output: Output) -> Reading:
    return tensorrt.read_summary(output, NAME)


TOOL = Tool(
    name=NAME,
    backend="tensorrt_rtx",
    plan=plan,
    read=read,
    fix="It comes with TensorRT-RTX's archive (bin): put it into PATH, or its path into PORTCALL_TENSORRT_RTX",
    variable="PORTCALL_TENSORRT_RTX",
    ask=("--help",),
    read_version=tensorrt.read_version,
    suffix=".bin",
    clock="device",
)
