"""Explicit Q/DQ from given ranges: ONNX Runtime's quantizer places the nodes, our table gives the ranges."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Graph, Ranges
from portcall.targets.agent.errors import CellFailed, UnsupportedError

if TYPE_CHECKING:
    from portcall.calibration.weights import Scheme

CONTROL_FLOW = ("If", "Loop", "Scan")
NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
PRODUCTS = ("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul")
"""What is quantized in a graph that normalizes over channels; Gather is how an embedding table is read."""
FLOAT_OUTPUT = ("Gemm", "MatMul")
"""Operators there that ONNX Runtime computes on integers although their output stays in float."""


def quantizable_ops() -> List[str]:
    """Return the operator types that ONNX Runtime's Q/DQ quantizer treats."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted(set(QLinearOpsRegistry) | set(QDQRegistry))


def quantized_ops(graph: Any) -> List[str]:
    """Return the operator types to quantize: in a transformer the products alone.

    What is added up between its normalizations has a few channels that are a hundred times as large as the others, and
    8 bits for all of them lose those (MiniLM: 2 dB with everything quantized, 16 dB with the products, and faster).
    """
    return list(PRODUCTS) if _is_transformer(graph) else quantizable_ops()


def _is_transformer(graph: Any) -> bool:
    return any(n.op_type in NORMALIZATIONS for n in graph.node)


def check_no_control_flow(model: Any) -> None:
    """Raise UnsupportedError where *model* has If, Loop or Scan nodes, whose bodies no tap sees."""
    found = [f"{n.name} ({n.op_type})" for n in model.graph.node if n.op_type in CONTROL_FLOW]
    if found:
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise UnsupportedError(
            f"a graph with control flow cannot be calibrated: {shown}",
            "Export the model without branches and loops, or use a precision without calibration",
        )


def tapped_tensors(path: Path) -> List[str]:
    """Return the float activations whose ranges an int8 export needs: inputs and outputs of quantizable operators.

    Left out is what a Relu or Clip alone reads (a convolution's raw output): the quantizer gives it the range of the
    Relu's output and removes the Relu. An operator with symmetric ranges reads none of these either: it quantizes what
    goes into convolutions, products and additions. In a transformer (``quantized_ops``) the outputs of products are
    left out as well.
    """
    import onnx

    from portcall.exporters import _qdq_symmetric, _structure

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    ops = set(quantized_ops(graph))
    inputs_only = FLOAT_OUTPUT if _is_transformer(graph) else ()
    symmetric = set(_qdq_symmetric.quantized_tensors(path))
    types = [*_structure.tensor_types(model), *graph.input, *graph.output]
    kinds = {v.name: v.type.tensor_type.elem_type for v in types}
    names = (
        name
        for n in graph.node
        for names, watched in (
            (n.input, n.op_type in ops),
            (n.output, n.op_type in ops and n.op_type not in inputs_only),
        )
        for name in names
        if watched or name in symmetric
    )
    ignored = {t.name for t in graph.initializer} | set(_absorbed(graph))
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return list(dict.fromkeys(n for n in names if n and n not in ignored and kinds.get(n) in floats))


def weighted_inputs(path: Path) -> Dict[str, int]:
    """Return the tapped tensors that meet constant weights, and their channel axis: 1 before a Conv, else the last."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {t.name for t in graph.initializer}
    found: Dict[str, int] = {}
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in weights:
            found.setdefault(node.input[0], 1 if node.op_type == "Conv" else -1)
    return {name: found[name] for name in tapped_tensors(path) if name in found}


def quantize(
    graph: Graph,
    ranges: Ranges,
    path: Path,
    options: Optional[Mapping[str, Any]] = None,
    activation: str = "QUInt8",
    settings: Optional[Callable[[Any, Scheme], Mapping[str, Any]]] = None,
) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write *graph* with Q/DQ pairs: uint8 asymmetric activations, int8 weights (symmetric, per channel), int32 bias.

    options: "weights" ("channel" or "tensor"), "weight_symmetric", "bias_correction", "keep_float" (patterns): see
    ``Recipe``. activation: the QuantType of activations. settings: the quantizer's extra options for the float model, a
    backend's own exceptions among them ("TensorQuantOverrides"). Return the names of the files written, and notes:
    which nodes stayed in floating point and why. Raises CellFailed where *ranges* lacks a tensor, UnsupportedError
    for control flow and for weights that ONNX Runtime does not compute with.
    """
    import numpy as np
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    from portcall.calibration.weights import scheme_of
    from portcall.exporters import _correction, _onnx, _structure

    options = options or {}
    scheme = scheme_of(options)
    check_computable(scheme)
    model = onnx.load(str(graph.path))
    check_no_control_flow(model)
    _check_float32(model)
    missing = [n for n in tapped_tensors(graph.path) if n not in ranges]
    if missing:
        raise CellFailed(
            f"the calibration table lacks {len(missing)} tensors of this graph, first {missing[0]!r}",
            "Calibrate again with this version of portcall",
        )
    _structure.raise_opset(model, 13 if scheme.per_channel else 10)  # DequantizeLinear has an axis since 13
    given = {n: (np.float32(r.minimum), np.float32(r.maximum)) for n, r in ranges.items()}
    absorbed = _absorbed(model.graph)
    beyond = {name for name, r in ranges.items() if r.is_beyond_int8()}
    for raw, read in reversed(list(absorbed.items())):
        if read in given:
            given[raw] = given[read]
        if read in beyond:
            beyond.add(raw)
    sentinels = [n.name for n in model.graph.node if beyond & {*n.input, *n.output}]
    kept = kept_in_float(model.graph, options)
    excluded = {*sentinels, *kept, *_left_alone(model.graph)}
    notes = float_notes(sentinels) + kept_notes(kept)
    extra = dict(settings(model, scheme)) if settings else {}
    if options.get("bias_correction"):
        whole = extra.get("TensorQuantOverrides", {})  # weights with one scale, whatever the others have

        def rebuild(node: Any, weight: Any) -> Optional[Any]:
            own = replace(scheme, per_channel=scheme.per_channel and node.input[1] not in whole)
            return None if node.name in excluded else rounded(node, weight, own)

        notes += _correction.correct(model, ranges, weighted_inputs(graph.path), rebuild)
    model.graph.value_info.extend(_structure.tensor_types(model))
    quantizer = QDQQuantizer(
        model,
        per_channel=scheme.per_channel,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType[activation],
        tensors_range=TensorsData(CalibrationMethod.MinMax, given),
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(excluded),
        op_types_to_quantize=quantized_ops(model.graph),
        extra_options={
            "ActivationSymmetric": False,
            "WeightSymmetric": scheme.symmetric,
            "OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT) if _is_transformer(model.graph) else [],
            **extra,
        },
    )
    quantizer.quantize_model()
    quantized = quantizer.model.model
    if _is_transformer(quantized.graph):
        _spare_float_readers(quantized.graph)
    del quantized.graph.value_info[:]
    return _onnx.save(quantized, path), notes


def check_computable(scheme: Scheme) -> None:
    """Raise UnsupportedError for weights that integer kernels cannot multiply with."""
    if scheme.block:
        raise UnsupportedError(
            f"no integer kernel multiplies weights in groups of {scheme.block}",
            'Use int8-weights or int4-weights (float activations), or "weights": "channel"',
        )
    if scheme.per_channel and not scheme.symmetric:
        raise UnsupportedError(
            "ONNX Runtime's integer kernels need one zero point for all channels",
            'Use "weights": "tensor" with asymmetric weights, or symmetric ones per channel',
        )


def rounded(node: Any, weight: Any, scheme: Scheme) -> Any:
    """Return what the int8 weights of *node* stand for: float32 of the weight's shape."""
    from portcall.calibration import weights
    from portcall.exporters._operands import channel_axis

    axis = channel_axis(node) if scheme.per_channel else None
    return weights.quantize(weight, 8, scheme.symmetric, axis).dequantize()


def kept_in_float(graph: Any, options: Mapping[str, Any]) -> List[str]:
    """Return the names of the nodes that ``keep_float`` selects.

    A Relu or Clip that would be absorbed takes the node before it along: the two share one range.
    """
    from portcall.exporters import _selection

    chosen = set(_selection.select([(n.name, n.op_type) for n in graph.node], options.get("keep_float", ())))
    made_by = {name: node for node in graph.node for name in node.output}
    absorbed = _absorbed(graph)
    for node in reversed(graph.node):
        raw = node.input[0] if node.input else ""
        if node.name in chosen and absorbed.get(raw) == node.output[0] and raw in made_by:
            chosen.add(made_by[raw].name)
    return [n.name for n in graph.node if n.name in chosen]


def float_notes(names: Sequence[str]) -> Tuple[str, ...]:
    """Return the note that names what stays in floating point because of its range."""
    return named("left in float32, its values reach 10,000 and more (an attention mask?)", names)


def kept_notes(names: Sequence[str]) -> Tuple[str, ...]:
    """Return the note that names what stays in floating point because the recipe asks for it."""
    return named("left in float32 as asked (keep_float)", names)


def named(sentence: str, names: Sequence[str]) -> Tuple[str, ...]:
    """Return *sentence* with the names of what it is about, or nothing where there are none."""
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (f"{sentence}: {shown}",)


def _spare_float_readers(graph: Any) -> None:
    """Let operators that stay in float read the float tensor, where the quantizer gave them the quantized one.

    A sum that goes on beside a product keeps its precision that way (MiniLM: 2 dB). What a Gather reads from a table
    was quantized there, and its readers take it as it is.
    """
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in (*PRODUCTS, "QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            back = made_by.get(name)
            pair = (
                made_by.get(back.input[0])
                if back is not None and back.op_type == "DequantizeLinear"
                else None
            )
            if pair is None or pair.op_type != "QuantizeLinear":
                continue
            source = made_by.get(pair.input[0])
            if source is None or source.op_type != "Gather":
                node.input[index] = pair.input[0]


def _absorbed(graph: Any) -> Dict[str, str]:
    """Return the tensors that one Relu or Clip alone reads -> that node's output, in the order of the graph.

    Source: onnxruntime 1.31 ``QDQRemovableActivation``, ``try_replacing_upstream_output`` and
    ``adjust_tensor_ranges``; a test exports with nothing but the ranges of ``tapped_tensors``.
    """
    ends = {v.name for v in [*graph.input, *graph.output]}
    constants = {t.name: t for t in graph.initializer}
    return {
        n.input[0]: n.output[0]
        for n in _sole_activations(graph)
        if n.input[0] not in ends and _passes_zero(n, constants)
    }


def _left_alone(graph: Any) -> List[str]:
    """Return the Relu and Clip nodes that ONNX Runtime would absorb and must not.

    It cuts a tensor that is an output of the graph as well, and takes a Clip from 1e-6 for one from 0.
    """
    absorbed = set(_absorbed(graph).values())
    return [n.name for n in _sole_activations(graph) if n.output[0] not in absorbed]


def _sole_activations(graph: Any) -> List[Any]:
    """Return the Relu and Clip nodes whose input nothing else reads."""
    counts = Counter(name for node in graph.node for name in node.input)
    return [n for n in graph.node if n.op_type in ("Relu", "Clip") and counts[n.input[0]] == 1]


def _passes_zero(node: Any, constants: Mapping[str, Any]) -> bool:
    """Tell whether zero lies within the constant bounds of a Clip, and so its cut-off in the range of its output."""
    from onnx import numpy_helper

    from portcall.exporters._operands import attribute

    bounds = [attribute(node, "min", 0.0), attribute(node, "max", 0.0)]  # up to operator set 10
    for index, name in enumerate(node.input[1:]):
        if name and name not in constants:
            return False
        bounds[index] = float(numpy_helper.to_array(constants[name]).reshape(-1)[0]) if name else 0.0
    return bool(bounds[0] <= 0.0 <= bounds[1])


def _check_float32(model: Any) -> None:
    """Raise UnsupportedError for a graph that computes in float16 (``_onnx.lower`` makes float32 of those)."""
    import onnx

    half = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    if half:
        raise UnsupportedError(
            f"{len(half)} weights of this graph are float16, first {half[0]!r}: their int8 scales would be too coarse",
            "Give the float32 model",
        )
