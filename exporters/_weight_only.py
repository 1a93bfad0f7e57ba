"""Weight-only int8 and int4 for ONNX Runtime: integer weights behind a DequantizeLinear, activations in float."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple

from portcall.targets.agent.contract import Graph, Ranges
from portcall.targets.agent.errors import UnsupportedError

if TYPE_CHECKING:
    from portcall.calibration.weights import Quantized, Scheme

BITS: Mapping[str, int] = {"int8-weights": 8, "int4-weights": 4}

# EfficientNet-Lite0 on one thread, ONNX Runtime 1.31: 25 ms instead of 5 ms.
_SLOW = (
    "ONNX Runtime dequantizes the weights of {} convolutions at every run; with its session option "
    "session.disable_quant_qdq=1 it does so once, at load"
)


def quantize(
    graph: Graph,
    precision: str,
    ranges: Optional[Ranges],
    path: Path,
    options: Optional[Mapping[str, Any]] = None,
) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write *graph* with the constant weights of Conv, ConvTranspose, Gemm and MatMul as integers.

    int8-weights: per channel unless options["weights"] says otherwise. int4-weights: groups of 32 inputs, the last of
    which may be shorter; convolutions int8 per channel. A transposed Gemm weight is stored the other way round: ONNX
    Runtime 1.31 fuses only that into its MatMulNBits kernel (1x1024x4096 at 4 bits, one thread: 0.05 ms; 9 ms where it
    dequantizes at every run, as before convolutions and before a product whose Relu leads to another product).
    *ranges* serve "bias_correction"; without them there is none. The operator set is raised to 13, for groups and 4
    bits to 21, where the model's is lower. Return the names of the files written, and notes. Raises
    UnsupportedError where there is no weight to quantize.
    """
    import onnx
    from onnx import numpy_helper

    from portcall.calibration.weights import scheme_of
    from portcall.exporters import _correction, _onnx, _qdq, _structure
    from portcall.exporters._operands import weighted_nodes

    options = options or {}
    bits = BITS[precision]
    scheme = scheme_of(options, "channel" if bits == 8 else "group32")
    model = onnx.load(str(graph.path))
    kept = _qdq.kept_in_float(model.graph, options)
    _upright(model.graph)
    quantized: Dict[str, Quantized] = {}  # by the node's output: names of nodes may repeat
    vectors: List[str] = []
    for node, initializer in weighted_nodes(model.graph):
        if len(initializer.dims) < 2:
            vectors.append(node.name)
        elif node.name not in kept:
            quantized[node.output[0]] = _integers(node, numpy_helper.to_array(initializer), bits, scheme)
    if not quantized:
        raise UnsupportedError(
            f"{precision}: this model has no Conv, Gemm or MatMul with a constant float32 weight left to quantize",
            "Use fp32 or fp16",
        )
    notes = _qdq.kept_notes(kept) + _qdq.named("left in float32, the weight is a vector", vectors)
    convolutions = [n.name for n in model.graph.node if n.output[0] in quantized and "Conv" in n.op_type]
    if bits == 4 or scheme.block:
        notes += _qdq.named("int8 weights per channel, as in all convolutions", convolutions)
    if convolutions:
        notes += (_SLOW.format(len(convolutions)),)
    if options.get("bias_correction"):
        rebuilt = {name: q.dequantize() for name, q in quantized.items()}
        axes = _qdq.weighted_inputs(graph.path)
        notes += _correction.correct(model, ranges, axes, lambda node, _: rebuilt.get(node.output[0]))
    modern = any(q.block or q.bits == 4 for q in quantized.values())
    _structure.raise_opset(model, 21 if modern else 13)
    _replace(model.graph, quantized)
    return _onnx.save(model, path), notes


def _upright(graph: Any) -> None:
    """Store the weight of each Gemm as [inputs, outputs]."""
    from onnx import helper, numpy_helper

    from portcall.exporters._operands import attribute, weighted_nodes

    for node, initializer in list(weighted_nodes(graph)):
        if node.op_type != "Gemm" or not attribute(node, "transB", 0):
            continue
        name = f"{initializer.name}_transposed"
        if all(t.name != name for t in graph.initializer):
            turned = numpy_helper.to_array(initializer).T.copy()
            graph.initializer.append(numpy_helper.from_array(turned, name))
        node.input[1] = name
        rest = [a for a in node.attribute if a.name != "transB"]
        del node.attribute[:]
        node.attribute.extend([*rest, helper.make_attribute("transB", 0)])
    _drop_unread(graph)


def _integers(node: Any, weight: Any, bits: int, scheme: Scheme) -> Quantized:
    from portcall.calibration.weights import quantize as round_to
    from portcall.exporters._operands import channel_axis, reduction_axis

    if "Conv" in node.op_type:
        per_channel = scheme.per_channel or scheme.block
        return round_to(weight, 8, scheme.symmetric, channel_axis(node) if per_channel else None)
    if scheme.block:
        return round_to(weight, bits, scheme.symmetric, reduction_axis(node), scheme.block)
    return round_to(weight, bits, scheme.symmetric, channel_axis(node) if scheme.per_channel else None)


def _replace(graph: Any, quantized: Mapping[str, Quantized]) -> None:
    """Put a DequantizeLinear of integers in the place of each quantized weight."""
    import ml_dtypes
    from onnx import helper, numpy_helper

    made: Dict[Tuple[str, Optional[int]], str] = {}
    for node in list(graph.node):
        if node.output[0] not in quantized:
            continue
        q, name = quantized[node.output[0]], node.input[1]
        key = (name, q.axis)
        if key not in made:
            made[key] = f"{name}_dequantized" + (f"_{q.axis}" if any(k[0] == name for k in made) else "")
            parts = {"quantized": q.integers, "scale": q.scale}
            if q.zero_point.any():
                parts["zero_point"] = q.zero_point
            for part, values in parts.items():
                small = q.bits == 4 and part != "scale"
                held = values.astype(ml_dtypes.int4) if small else values
                graph.initializer.append(numpy_helper.from_array(held, f"{made[key]}_{part}"))
            attributes = {} if q.axis is None else {"axis": q.axis}
            if q.block:
                attributes["block_size"] = q.block
            inputs = [f"{made[key]}_{part}" for part in parts]
            graph.node.append(
                helper.make_node("DequantizeLinear", inputs, [made[key]], f"{made[key]}_Node", **attributes)
            )
        node.input[1] = made[key]
    _drop_unread(graph)


def _drop_unread(graph: Any) -> None:
    """Remove the initializers that no node and no branch reads any more."""
    from portcall.exporters import _onnx

    read = {name for node in graph.node for name in _onnx._reads(node)} | {v.name for v in graph.output}
    kept = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
