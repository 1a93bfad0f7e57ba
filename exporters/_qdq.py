"""Explicit Q/DQ from given ranges: ONNX Runtime's quantizer places the nodes, our table gives the ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Sequence, Tuple

from portcall.targets.agent.contract import Graph, Ranges
from portcall.targets.agent.errors import CellFailed


def quantizable_ops() -> List[str]:
    """Return the operator types that ONNX Runtime's Q/DQ quantizer treats."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted(set(QLinearOpsRegistry) | set(QDQRegistry))


def tapped_tensors(path: Path) -> List[str]:
    """Return the float activations whose ranges an int8 export needs: inputs and outputs of quantizable operators."""
    import onnx

    ops = set(quantizable_ops())
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {t.name for t in graph.initializer}
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*_value_info(path), *graph.input, *graph.output]}
    names = (name for n in graph.node if n.op_type in ops for name in [*n.input, *n.output])
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return list(dict.fromkeys(n for n in names if n and n not in weights and kinds.get(n) in floats))


def quantize(graph: Graph, ranges: Ranges, path: Path) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write *graph* with Q/DQ pairs: uint8 asymmetric activations, int8 symmetric per-channel weights, int32 bias.

    Return the names of the files written, and notes: which nodes stayed in floating point and why.
    Raises CellFailed where *ranges* lacks a tensor.
    """
    import numpy as np
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    from portcall.exporters import _onnx

    missing = [n for n in tapped_tensors(graph.path) if n not in ranges]
    if missing:
        raise CellFailed(
            f"the calibration table lacks {len(missing)} tensors of this graph, first {missing[0]!r}",
            "Calibrate again with this version of portcall",
        )
    model = onnx.load(str(graph.path))
    model.graph.value_info.extend(_value_info(graph.path))
    beyond = {name for name, r in ranges.items() if r.is_beyond_int8()}
    excluded = [n.name for n in model.graph.node if beyond & {*n.input, *n.output}]
    data = {n: (np.float32(r.minimum), np.float32(r.maximum)) for n, r in ranges.items()}
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=excluded,
        op_types_to_quantize=quantizable_ops(),
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantized = quantizer.model.model
    del quantized.graph.value_info[:]
    return _onnx.save(quantized, path), float_notes(excluded)


def float_notes(names: Sequence[str]) -> Tuple[str, ...]:
    """Return the note that names what stays in floating point because of its range."""
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (f"left in float32, its values reach 10,000 and more (an attention mask?): {shown}",)


def _value_info(path: Path) -> List[Any]:
    """Return the inferred types of all tensors, from the graph without its weights (which may be above 2 GB)."""
    import onnx

    return list(
        onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False)).graph.value_info
    )
