"""Explicit Q/DQ from given ranges: ONNX Runtime's quantizer places the nodes, our table gives the ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Tuple

from portcall.targets.agent.contract import Graph, Ranges
from portcall.targets.agent.errors import CellFailed


def quantizable_ops() -> List[str]:
    """Return the operator types that ONNX Runtime's Q/DQ quantizer treats."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted(set(QLinearOpsRegistry) | set(QDQRegistry))


def tapped_tensors(model: Any) -> List[str]:
    """Return the float activations whose ranges an int8 export needs: inputs and outputs of quantizable operators."""
    import onnx

    ops = set(quantizable_ops())
    weights = {t.name for t in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]}
    names = (name for n in model.graph.node if n.op_type in ops for name in [*n.input, *n.output])
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return list(dict.fromkeys(n for n in names if n and n not in weights and kinds.get(n) in floats))


def quantize(graph: Graph, ranges: Ranges, path: Path) -> Tuple[str, ...]:
    """Write *graph* with Q/DQ pairs: uint8 asymmetric activations, int8 symmetric per-channel weights, int32 bias.

    Return the names of the files written. Raises CellFailed where *ranges* lacks a tensor.
    """
    import numpy as np
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    from portcall.exporters import _onnx

    model = onnx.load(str(graph.path))
    missing = [n for n in tapped_tensors(model) if n not in ranges]
    if missing:
        raise CellFailed(
            f"the calibration table lacks {len(missing)} tensors of this graph, first {missing[0]!r}",
            "Calibrate again with this version of portcall",
        )
    inferred = onnx.shape_inference.infer_shapes(model) if model.ByteSize() < 1 << 31 else model
    data = {n: (np.float32(r.minimum), np.float32(r.maximum)) for n, r in ranges.items()}
    quantizer = QDQQuantizer(
        inferred,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=quantizable_ops(),
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    quantized = quantizer.model.model
    del quantized.graph.value_info[:]
    return _onnx.save(quantized, path)
