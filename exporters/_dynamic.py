"""Dynamic int8 for ONNX Runtime: weights quantized now, activations at run time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Graph, Ranges

if TYPE_CHECKING:
    from portcall.calibration.weights import Scheme

_PLAIN_GEMM: Mapping[str, Any] = {"alpha": 1.0, "beta": 1.0, "transA": 0}
"""A Gemm of other attributes stays in float: ONNX Runtime's tool leaves it alone."""


def quantize(
    graph: Graph, path: Path, options: Optional[Mapping[str, Any]] = None, ranges: Optional[Ranges] = None
) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write *graph* with uint8 weights; return the names of the files written, and notes.

    Convolutions become ConvInteger with a scale per output channel: ONNX Runtime's own tool takes one scale for all
    of them, which ruins depthwise networks (EfficientNet-Lite0: 6 dB against 18 dB). It does the rest: products by
    one asymmetric scale per weight, per output channel where options["weights"] is "channel". *ranges* serve
    "bias_correction" alone. Raises UnsupportedError for weights that no integer kernel takes.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from portcall.calibration.weights import Scheme, scheme_of
    from portcall.exporters import _correction, _onnx, _qdq
    from portcall.exporters._operands import attribute

    options = options or {}
    scheme = scheme_of(options)
    _qdq.check_computable(scheme)
    model = onnx.load(str(graph.path))
    kept = _qdq.kept_in_float(model.graph, options)
    notes = _qdq.kept_notes(kept)
    products = Scheme(options.get("weights") == "channel", symmetric=False)

    def rebuild(node: Any, weight: Any) -> Optional[Any]:
        plain = all(attribute(node, name, value) == value for name, value in _PLAIN_GEMM.items())
        if node.name in kept or not plain:
            return None
        return _qdq.rounded(node, weight, scheme if node.op_type == "Conv" else products)

    if options.get("bias_correction"):
        notes += _correction.correct(model, ranges, _qdq.weighted_inputs(graph.path), rebuild)
    _convolutions(model, scheme, kept)
    raw = path.with_name("dynamic.onnx")
    quantize_dynamic(
        model,
        str(raw),
        weight_type=QuantType.QUInt8,
        use_external_data_format=_onnx.is_large(model),
        per_channel=products.per_channel,
        # It turns each Gemm into a MatMul before it looks at names.
        nodes_to_exclude=[*kept, *(f"{name}_MatMul" for name in kept)],
    )
    quantized = onnx.load(str(raw))
    for file in (raw, raw.with_name(raw.name + ".data")):
        if file.exists():
            file.unlink()
    del quantized.graph.value_info[:]
    return _onnx.save(quantized, path), notes


def _convolutions(model: Any, scheme: Scheme, kept: Sequence[str]) -> None:
    """Replace every Conv with constant weights by DynamicQuantizeLinear, ConvInteger, Cast, Mul and Add."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    quantized: Dict[str, List[str]] = {}
    nodes: List[Any] = []
    added: List[Any] = []
    for node in graph.node:
        constant = node.op_type == "Conv" and all(name in weights for name in node.input[1:] if name)
        if not constant or node.name in kept:
            nodes.append(node)
            continue
        source, name = node.input[0], node.name
        if source not in quantized:
            quantized[source] = [f"{source}_{suffix}" for suffix in ("quantized", "scale", "zero_point")]
            nodes.append(
                helper.make_node(
                    "DynamicQuantizeLinear", [source], quantized[source], f"{source}_DynamicQuantize"
                )
            )
        values, scale, zero_point = quantized[source]
        integers, scales, weight_zero = _unsigned(numpy_helper.to_array(weights[node.input[1]]), scheme)
        added += [numpy_helper.from_array(integers, f"{name}_weight_uint8")]
        added += [numpy_helper.from_array(scales, f"{name}_weight_scale")]
        added += [numpy_helper.from_array(weight_zero, f"{name}_weight_zero_point")]
        inputs = [values, f"{name}_weight_uint8", zero_point, f"{name}_weight_zero_point"]
        integer = helper.make_node("ConvInteger", inputs, [f"{name}_int32"], name)
        integer.attribute.extend(node.attribute)
        biased = len(node.input) > 2 and node.input[2]
        result = f"{name}_scaled" if biased else node.output[0]
        nodes += [
            integer,
            helper.make_node(
                "Cast", [f"{name}_int32"], [f"{name}_float"], f"{name}_Cast", to=TensorProto.FLOAT
            ),
            helper.make_node("Mul", [scale, f"{name}_weight_scale"], [f"{name}_scales"], f"{name}_Scales"),
            helper.make_node("Mul", [f"{name}_float", f"{name}_scales"], [result], f"{name}_Mul"),
        ]
        if biased:
            bias = numpy_helper.to_array(weights[node.input[2]])
            shape = [1, -1] + [1] * (len(weights[node.input[1]].dims) - 2)
            added += [numpy_helper.from_array(bias.reshape(shape), f"{name}_bias")]
            nodes.append(helper.make_node("Add", [result, f"{name}_bias"], [node.output[0]], f"{name}_Add"))
    if not quantized:
        return
    used = {name for node in nodes for name in node.input}
    replaced = {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]} - used
    rest = [t for t in graph.initializer if t.name not in replaced]  # a branch of an If may use the others
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend([*rest, *added])


def _unsigned(weight: Any, scheme: Scheme) -> Tuple[Any, Any, Any]:
    """Return uint8 weights, their scales, shaped to multiply the result, and their one zero point.

    The CPU has no fast ConvInteger for int8 weights.
    """
    import numpy as np

    from portcall.calibration.weights import quantize as round_to

    q = round_to(weight, 8, scheme.symmetric, 0 if scheme.per_channel else None)
    zero_point = np.uint8(128 + int(q.zero_point.flat[0]))
    shape = (1, -1) + (1,) * (weight.ndim - 2)
    return (q.integers.astype(np.int16) + 128).astype(np.uint8), q.scale.reshape(shape), zero_point
