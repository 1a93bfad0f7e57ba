"""The per-operator profile of OpenVINO's CPU plugin: its performance counters, and the graph that it executes.

Tried with openvino 2026.4: ``PERF_COUNT`` gives whole microseconds per node (rounded down), the mean over all
inferences since the model was compiled, the first, cold ones among them. The runtime model gives the layer's type, the
primitive (``brgconv_avx512_amx_I8``), the precision and the names of the operators that went into it.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from portcall.exporters.openvino import OpenVinoSession
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.profiling import QUANTIZER_SUFFIXES, Operator, Placed, Profiler, owner

UNIT = "CPU plugin"
REFERENCE = "ref"
"""Begins the name of a plain C++ kernel, written to be right and not to be fast."""
INTEGERS = ("u8", "i8")
NO_WORK = ("Const", "Input", "Output", "Parameter", "Result")
COPYING = ("Concatenation", "Split", "Convert", "ShapeOf", "Broadcast", "Tile", "StridedSlice", "Reshape")
"""Operators whose only kernels are called references, and which are copies or conversions of memory all the same."""
MOVING = (*COPYING, "Reorder", "Transpose", "Gather")
METHOD = (
    "OpenVINO's performance counters (PERF_COUNT): mean real time of each executed node over all inferences, "
    "in whole microseconds rounded down"
)


class OpenVinoProfiler(OpenVinoSession, Profiler):
    """A session with PERF_COUNT."""

    def __init__(self, artifact: Artifact, workload: Workload) -> None:
        self._artifact = artifact
        super().__init__(artifact, workload)
        self._means: Dict[str, float] = {}

    def _config(self, workload: Workload, streams: int) -> Dict[str, Any]:
        return {**super()._config(workload, streams), "PERF_COUNT": True}

    def forget(self) -> None:
        """Nothing to drop: the counters cannot be reset."""

    def collect(self) -> None:
        row: Dict[str, float] = {}
        for info in self._request.profiling_info:
            if info.status == self._ov.ProfilingInfo.Status.EXECUTED:
                # What takes less than a microsecond counts as not run; a fused operator can stand there twice.
                row[info.node_name] = max(row.get(info.node_name, 0.0), 1e9 * info.real_time.total_seconds())
        self._means = row

    def placed(self, numbers: Sequence[int]) -> Placed:
        model = self._ov.Core().read_model(str(self._artifact.path))
        nodes = {
            str(node.get_friendly_name()): node
            for node in self.compiled.get_runtime_model().get_ordered_ops()
        }
        infos = {
            name: {k: str(v.astype(str)) for k, v in n.get_rt_info().items()} for name, n in nodes.items()
        }
        quantizing = {
            str(op.get_friendly_name())
            for op in model.get_ordered_ops()
            if op.get_type_name() == "FakeQuantize"
        }
        integer = self._artifact.precision == "int8" or bool(quantizing)
        owners = _owners(model)
        constant = _constant(self.compiled.get_runtime_model())
        operators: List[Operator] = []
        for name, info in infos.items():
            if name in constant or info.get("layerType") in NO_WORK:
                continue
            reason = _reason(name, nodes, infos, quantizing if integer else None)
            operators.append(
                Operator(
                    name=name,
                    operator=info.get("layerType", "?"),
                    kernel=info.get("primitiveType"),
                    unit="CPU",
                    on_unit=reason is None,
                    reason=reason,
                    layers=_layers(info.get("originalLayersNames", ""), owners),
                    time_ns=self._means.get(name, 0.0),
                )
            )
        unit = f"{UNIT}, {'int8' if integer else 'optimized'} kernels"
        return Placed(unit, tuple(operators), METHOD)


def _reason(
    name: str,
    nodes: Mapping[str, Any],
    infos: Mapping[str, Mapping[str, str]],
    quantizing: Optional[Set[str]],
) -> Optional[str]:
    """Return why a node of the runtime model is not on the intended unit.

    quantizing: the file's FakeQuantize operators; None for a file that asks for floats.
    """
    info = infos[name]
    kernel, kind = info.get("primitiveType", ""), info.get("layerType", "")
    if kernel.startswith(REFERENCE) and kind not in COPYING:
        return f"reference kernel {kernel}: OpenVINO has no fast one for this operator and type on this CPU"
    if (
        quantizing is None
        or info.get("runtimePrecision") in INTEGERS
        or kernel.lower().endswith(("_i8", "_u8"))
    ):
        return None
    if kind in MOVING:
        return None
    precision = info.get("runtimePrecision", "?")
    if precision not in ("f32", "f16", "bf16"):  # arithmetic on shapes and indices
        return None
    held = [n for n in info.get("originalLayersNames", "").split(",") if n]
    if kind == "FakeQuantize" or (held and quantizing.issuperset(held)):  # alone, or as a compiled "Subgraph"
        return (
            None
            if _reads_input(nodes[name], infos)
            else ("quantizes inside of the graph: what comes before it ends in floats")
        )
    return f"computes in {precision}"


def _reads_input(node: Any, infos: Mapping[str, Mapping[str, str]]) -> bool:
    """Tell whether a node reads an input of the model, straight or through operators that only move data."""
    while True:
        node = node.input_value(0).get_node()
        kind = infos.get(str(node.get_friendly_name()), {}).get("layerType")
        if kind not in MOVING:
            return kind == "Input"


def _constant(model: Any) -> Set[str]:
    """Return the nodes of the runtime model that were computed when it was compiled: they read constants alone."""
    found: Set[str] = set()
    for node in model.get_ordered_ops():
        name = str(node.get_friendly_name())
        makers = [node.input_value(i).get_node() for i in range(node.get_input_size())]
        kind = node.get_rt_info()["layerType"].astype(str) if "layerType" in node.get_rt_info() else ""
        if kind == "Const" or (makers and all(str(m.get_friendly_name()) in found for m in makers)):
            found.add(name)
    return found


def _owners(model: Any) -> Dict[str, str]:
    """Return operator of the file -> the module that its weights belong to, by the names of its constants."""
    found: Dict[str, str] = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant":
            continue
        for index in range(op.get_input_size()):
            node = op.input_value(index).get_node()
            while node.get_type_name() in (
                "Convert",
                "FakeQuantize",
                "Reshape",
                "Multiply",
                "Subtract",
                "Transpose",
            ):
                node = node.input_value(0).get_node()
            name = owner(str(node.get_friendly_name())) if node.get_type_name() == "Constant" else None
            if name is not None:
                found.setdefault(str(op.get_friendly_name()), name)
    return found


def _layers(original: str, owners: Mapping[str, str]) -> Tuple[str, ...]:
    """Return modules, then operators of the file; the converter splits a convolution from its bias."""
    names = [n.replace("/DequantizationMultiply", "") for n in original.split(",") if n]
    modules = [owners[n] for n in names if n in owners]
    plain = [n.replace("/WithoutBiases", "") for n in names if not n.endswith(QUANTIZER_SUFFIXES)]
    return tuple(dict.fromkeys([*modules, *(n for n in plain if not _is_made_up(n))]))


def _is_made_up(name: str) -> bool:
    """``Multiply_4492``: an operator that OpenVINO's own passes added."""
    kind, _, number = name.rpartition("_")
    return number.isdigit() and kind in (
        "Multiply",
        "Add",
        "Subtract",
        "Convert",
        "Constant",
        "Reshape",
        "FakeQuantize",
    )
