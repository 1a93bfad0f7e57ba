"""The profile of a QNN context: what the processor runs as one kernel, and which operators stayed on the CPU.

A context binary is one EPContext operator to ONNX Runtime, so that its profiler gives one time for all that is inside;
how many operators that is, and which stayed outside, was written down when the context was built.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, List, Mapping, Sequence

from portcall.exporters._profile_onnxruntime import METHOD, OnnxRuntimeProfiler, kernels
from portcall.exporters._qnn import BOUNDARY, PROVIDER
from portcall.exporters._qnn_session import DeviceSession
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.profiling import Operator, Placed

UNIT = f"HTP ({PROVIDER})"


class QnnProfiler(OnnxRuntimeProfiler, DeviceSession):
    """A device's context with ``enable_profiling``. Unproven on a device: none was at hand.

    context: its entry of contexts.json.
    """

    _is_graph_written = False  # ONNX Runtime writes no graph that holds a compiled part

    def __init__(
        self, artifact: Artifact, workload: Workload, folder: Path, context: Mapping[str, Any]
    ) -> None:
        self._context, self._portable = context, artifact.path
        super().__init__(replace(artifact, entry=context["wrapper"]), workload, folder)

    def placed(self, numbers: Sequence[int]) -> Placed:
        operators: List[Operator] = []
        for operator in kernels(self, numbers):
            taken = operator.unit == PROVIDER
            reason = None if taken else f"runs on {operator.unit}: {_why(operator)}"
            operators.append(replace(operator, on_unit=taken, reason=reason))
        # What converts inputs and outputs is listed with its time, and is no operator of the network.
        whole = _operators(self._portable)
        method = f"{METHOD}; operators counted when the context was built"
        return Placed(UNIT, tuple(operators), method, (whole, whole - len(self._context["outside"])))


def _why(operator: Operator) -> str:
    if operator.operator in BOUNDARY:
        return "QNN leaves it to the CPU to convert inputs and outputs"
    return "QNN took it into no context"


def _operators(path: Path) -> int:
    """Return how many operators model.onnx has, its Q and DQ left out."""
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return sum(n.op_type not in BOUNDARY for n in nodes)
