"""Explicit symmetric Q/DQ for TensorRT: int8 activations with zero point 0, int8 weights, float bias.

ONNX Runtime's quantizer puts Q/DQ on both sides of a Relu and a DequantizeLinear on the bias: TensorRT then neither
fuses convolution, addition and Relu nor takes the bias. So the pairs are placed here, where NVIDIA recommends them
(TensorRT developer guide, "Q/DQ Layer-Placement Recommendations") and its Model Optimizer puts them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from portcall.targets.agent.contract import Graph, Ranges
from portcall.targets.agent.errors import CellFailed, UnsupportedError

POOLS = ("AveragePool", "GlobalAveragePool")

SUFFIXES = ("_quantized", "_scale", "_zero_point", "_dequantized")
"""Of the tensors that a Q/DQ pair adds."""


@dataclass(frozen=True)
class Use:
    """A float tensor that a node reads as its input number *index*, and that it shall read through Q/DQ."""

    node: Any
    index: int
    tensor: str
    element_type: int
    """Of ``onnx.TensorProto``: float32 or float16."""
    is_weight: bool = False
    axis: Optional[int] = None
    """The channels' axis of a weight with a scale per channel."""
    fused_with: str = ""
    """The convolution that an addition fuses with: left in float, it leaves the addition in float too."""


def quantized_tensors(path: Path) -> List[str]:
    """Return the activations that get a Q/DQ pair: those whose ranges ``quantize`` needs."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    uses, _ = _plan(model.graph, _types(model), True)
    return list(dict.fromkeys(use.tensor for use in uses if not use.is_weight))


def quantize(
    graph: Graph, ranges: Ranges, path: Path, options: Mapping[str, Any]
) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write *graph* with Q/DQ pairs; return the names of the files written, and notes on what stayed in float.

    A pair stands at the activations that Conv, ConvTranspose, Gemm and MatMul read, at what pools average, and at the
    shortcut of an Add whose other input is a quantized convolution's; nothing stands between a convolution and its
    addition or Relu. The readers of a tensor share its pair. Activations: scale T / 127, T the largest magnitude of
    the range. Weights: stored as int8 in front of a DequantizeLinear, a scale per output channel. Scales have the type
    of their tensor, float32 or float16.
    options: "weights" ("channel" or "tensor"), "bias_correction", "keep_float" (patterns): see ``Recipe``.
    Raises CellFailed where *ranges* lacks a tensor, UnsupportedError for weights that TensorRT does not compute with
    and where the operator set cannot be raised.
    """
    import onnx

    from portcall.calibration import weights
    from portcall.exporters import _correction, _onnx, _qdq, _selection, _structure

    per_channel = _per_channel(options)
    model = onnx.load(str(graph.path))
    # A scale per channel needs operator set 13, float16 needs 19.
    _structure.raise_opset(model, 19 if onnx.TensorProto.FLOAT16 in _types(model).values() else 13)
    types = _types(model)
    nodes = [(n.name, n.op_type) for n in model.graph.node]
    kept = _selection.select(nodes, options.get("keep_float", ()))
    uses, computed = _plan(model.graph, types, per_channel)
    uses = _without(uses, kept)
    missing = list(dict.fromkeys(u.tensor for u in uses if not u.is_weight and u.tensor not in ranges))
    if missing:
        raise CellFailed(
            f"the calibration table lacks {len(missing)} tensors of this graph, first {missing[0]!r}",
            "Calibrate again with this version of portcall",
        )
    beyond = [u.node.name for u in uses if not u.is_weight and ranges[u.tensor].is_beyond_int8()]
    notes = _qdq.float_notes(list(dict.fromkeys(beyond))) + _qdq.kept_notes(kept)
    notes += _qdq.named("left in float32, their weights are computed at run time", computed)
    uses = _without(uses, beyond)
    if options.get("bias_correction"):
        axes = {u.node.name: u.axis for u in uses if u.is_weight}

        def rebuild(node: Any, weight: Any) -> Optional[Any]:
            if node.name not in axes:
                return None
            return weights.quantize(weight, axis=axes[node.name]).dequantize()

        notes += _correction.correct(model, ranges, _qdq.weighted_inputs(graph.path), rebuild)
    _insert(model.graph, uses, ranges)
    del model.graph.value_info[:]
    return _onnx.save(model, path), notes


def _per_channel(options: Mapping[str, Any]) -> bool:
    """Tell whether weights have a scale per channel. Raises UnsupportedError for those that have no integer kernel."""
    from portcall.calibration.weights import scheme_of

    scheme = scheme_of(options)
    if scheme.block or not scheme.symmetric:
        raise UnsupportedError(
            f"TensorRT's int8 kernels take no weights by {scheme}: they have zero point 0 and no groups",
            'Use "weights": "channel" (the default) or "tensor"',
        )
    return scheme.per_channel


def _without(uses: Sequence[Use], names: Collection[str]) -> List[Use]:
    """Return the uses that are left where nodes called *names* stay in float."""
    return [u for u in uses if u.node.name not in names and u.fused_with not in names]


def _plan(graph: Any, types: Mapping[str, int], per_channel: bool) -> Tuple[List[Use], List[str]]:
    """Return what is read through Q/DQ, in the order of the graph, and the convolutions whose weights are computed.

    What reads a DequantizeLinear already is left as it is. An addition that follows a convolution takes its other
    operand, the shortcut, through Q/DQ: the convolution, the addition and its Relu then run as one integer kernel. Of
    two convolutions the deeper one does that, and the other (a projection) is the shortcut.
    """
    from portcall.exporters._operands import WEIGHTED

    ranks = {t.name: len(t.dims) for t in graph.initializer}
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(v.name for v in graph.output)
    depth: Dict[str, int] = {}
    fusible: Dict[str, Any] = {}  # what one node alone reads of a convolution -> that convolution
    uses: List[Use] = []
    computed: List[str] = []
    for node in graph.node:
        here = 1 + max((depth.get(name, 0) for name in node.input), default=0)
        depth.update({name: here for name in node.output})
        operands = list(node.input[:2])
        element_type = _float_type(operands, types)
        if element_type is None or dequantized & set(operands):
            continue
        if node.op_type in POOLS:
            uses.append(Use(node, 0, operands[0], element_type))
        elif node.op_type == "Add":
            main = max((n for n in operands if n in fusible), key=lambda name: depth[name], default=None)
            index = 0 if main is None else 1 - operands.index(main)
            if main is not None and operands[index] not in ranks:
                fused_with = fusible[main].name
                uses.append(Use(node, index, operands[index], element_type, fused_with=fused_with))
        elif node.op_type in WEIGHTED:
            constant = [name in ranks for name in operands]
            if "Conv" in node.op_type and constant != [False, True]:
                computed.append(node.name)
                continue
            if node.op_type == "Conv" and readers[node.output[0]] == 1:
                fusible[node.output[0]] = node
            for index, name in enumerate(operands):
                axis = _channel_axis(node, index, ranks[name]) if constant[index] and per_channel else None
                uses.append(Use(node, index, name, element_type, constant[index], axis))
    return uses, computed


def _types(model: Any) -> Dict[str, int]:
    """Return the element type of every tensor whose type is known or can be inferred."""
    from portcall.exporters import _structure

    values = [*_structure.tensor_types(model), *model.graph.input, *model.graph.output]
    types = {v.name: int(v.type.tensor_type.elem_type) for v in values}
    types.update({t.name: int(t.data_type) for t in model.graph.initializer})
    return types


def _float_type(operands: Sequence[str], types: Mapping[str, int]) -> Optional[int]:
    """Return the element type that a node computes in, float32 or float16; None for others (integer products)."""
    import onnx

    found = {types[name] for name in operands if name in types}
    return found.pop() if found in ({onnx.TensorProto.FLOAT}, {onnx.TensorProto.FLOAT16}) else None


def _channel_axis(node: Any, index: int, rank: int) -> Optional[int]:
    """Return the axis of a weight's output channels; None for left operands and batches of matrices: one scale."""
    from portcall.exporters._operands import channel_axis

    if node.op_type == "MatMul" and (index == 0 or rank != 2):
        return None
    return None if index == 0 else channel_axis(node) % rank


def _insert(graph: Any, uses: Sequence[Use], ranges: Ranges) -> None:
    """Let every use read its tensor through Q/DQ; drop the float weights that nothing reads any more."""
    import numpy as np
    from onnx import helper, numpy_helper

    from portcall.calibration.weights import quantize as quantize_weight
    from portcall.exporters import _encodings, _onnx

    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken.update(t.name for t in graph.initializer)
    weights = {t.name: t for t in graph.initializer}
    results: Dict[Tuple[str, Optional[int]], str] = {}
    for use in uses:
        key = (use.tensor, use.axis)
        if key not in results:
            stem = _stem(use.tensor, taken)
            integers, scale, zero, results[key] = (stem + suffix for suffix in SUFFIXES)
            if use.is_weight:
                found = quantize_weight(numpy_helper.to_array(weights[use.tensor]), axis=use.axis)
                graph.initializer.append(numpy_helper.from_array(found.integers, integers))
                exact = found.scale
            else:
                inputs = [use.tensor, scale, zero]
                graph.node.append(
                    helper.make_node("QuantizeLinear", inputs, [integers], f"{stem}_QuantizeLinear")
                )
                exact = np.asarray(_encodings.symmetric_scale(ranges[use.tensor]), np.float32)
            dtype = helper.tensor_dtype_to_np_dtype(use.element_type)
            scales = np.maximum(exact.astype(dtype), np.finfo(dtype).smallest_subnormal)
            graph.initializer.append(numpy_helper.from_array(scales, scale))
            graph.initializer.append(numpy_helper.from_array(np.zeros(scales.shape, np.int8), zero))
            axis = {} if use.axis is None else {"axis": use.axis}
            inputs, name = [integers, scale, zero], f"{stem}_DequantizeLinear"
            graph.node.append(helper.make_node("DequantizeLinear", inputs, [results[key]], name, **axis))
        use.node.input[use.index] = results[key]
    read = {name for node in graph.node for name in _onnx._reads(node)} | {v.name for v in graph.output}
    unread = {u.tensor for u in uses if u.is_weight} - read
    for entries in (graph.initializer, graph.input):  # old files list their weights as inputs too
        kept = [e for e in entries if e.name not in unread]
        del entries[:]
        entries.extend(kept)


def _stem(tensor: str, taken: Set[str]) -> str:
    """Return a name that is new with each of SUFFIXES, and take those names."""
    stem, number = tensor, 1
    while any(stem + suffix in taken for suffix in SUFFIXES):
        number += 1
        stem = f"{tensor}_{number}"
    taken.update(stem + suffix for suffix in SUFFIXES)
    return stem
