"""The portable ONNX file of a QNN artifact: fixed shapes, Q/DQ with QNN's configuration and our ranges, encodings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.exporters._encodings import Encoding
from portcall.targets.agent.contract import BoundTensor, Graph, Ranges, Recipe
from portcall.targets.agent.errors import UnsupportedError

if TYPE_CHECKING:
    from portcall.calibration.weights import Scheme

ENCODINGS = "encodings.json"
ACTIVATIONS = {"int8": "QUInt8", "int16x8": "QUInt16"}


def fix_shapes(graph: Graph, directory: Path) -> Graph:
    """Return *graph* with every dimension fixed at the source's example shapes, written into *directory*.

    QNN compiles for one shape. Raises UnsupportedError where the shape of an output still depends on the data.
    """
    import onnx
    import onnxruntime as ort

    from portcall.exporters import _onnx

    model = onnx.load(str(graph.path))
    shapes = {graph.names[name]: shape for name, shape in graph.source.example_shapes.items()}
    for value in model.graph.input:
        _set_shape(value, shapes[value.name])
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    del model.graph.value_info[:]
    path = directory / "fixed.onnx"
    _onnx.save(model, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = {v.name: v.shape for v in session.get_outputs()}
    for value in model.graph.output:
        shape = found[value.name]
        if not all(isinstance(d, int) for d in shape):
            raise UnsupportedError(
                f"the shape of output {value.name!r} depends on the data: {shape}; QNN compiles for one shape",
                "Export the model without the operator that makes it (NonZero, NonMaxSuppression)",
            )
        _set_shape(value, shape)
    _onnx.save(model, path)
    return replace(graph, path=path)


def _set_shape(value: Any, shape: Sequence[int]) -> None:
    kind = value.type.tensor_type
    kind.ClearField("shape")
    kind.shape.SetInParent()  # a scalar's shape is there, and empty
    for size in shape:
        kind.shape.dim.add().dim_value = size


def write_model(
    graph: Graph, recipe: Recipe, ranges: Optional[Ranges], path: Path
) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write a graph of fixed shapes as the ONNX file of a precision; return the names of its files, and notes."""
    import onnx

    from portcall.exporters import _half_weights, _onnx, _qdq, _trained_rewrite

    if graph.source.quantized:
        return _trained_rewrite.write(graph.path, path), ()
    if recipe.precision == "fp16":
        model = onnx.load(str(graph.path))
        _half_weights.round_weights(model)
        return _onnx.save(model, path), ()
    assert ranges is not None
    activation = ACTIVATIONS[recipe.precision]
    return _qdq.quantize(
        graph,
        ranges,
        path,
        recipe.options,
        activation,
        lambda model, scheme: settings(model, scheme, activation),
    )


def settings(model: Any, scheme: Scheme, activation: str) -> Mapping[str, Any]:
    """Return what QNN asks of ONNX Runtime's quantizer: one scale for the weight of a MatMul, 16-bit exceptions.

    Source: ``get_qnn_qdq_config`` of onnxruntime 1.31; its calibration and its least range are left out.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    from portcall.exporters import _qdq

    config = get_qnn_qdq_config(
        model,
        None,
        activation_type=QuantType[activation],
        weight_type=QuantType.QInt8,
        weight_symmetric=scheme.symmetric,
        per_channel=scheme.per_channel,
        op_types_to_quantize=_qdq.quantized_ops(model.graph),
    )
    wanted = ("TensorQuantOverrides", "UseQDQContribOps", "DedicatedQDQPair", "QDQKeepRemovableActivations")
    return {name: config.extra_options[name] for name in wanted if name in config.extra_options}


def write_encodings(path: Path, directory: Path) -> str:
    """Write the scales of a Q/DQ file as ``encodings.json`` (AIMET's format 0.6.1); return its name.

    The names are those of the float graph; biases are left out, since converters derive theirs.
    """
    from portcall.exporters import _encodings

    activations, parameters = read_encodings(path)
    text = json.dumps(_encodings.write_encodings(activations, parameters), indent=1)
    (directory / ENCODINGS).write_text(text, encoding="utf-8")
    return ENCODINGS


def read_encodings(path: Path) -> Tuple[Dict[str, Encoding], Dict[str, Encoding]]:
    """Return the encodings of activations and of weights that the Q/DQ nodes of an ONNX file hold, by float name."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {t.name: t for t in graph.initializer}
    activations: Dict[str, Encoding] = {}
    parameters: Dict[str, Encoding] = {}

    def encoding(node: Any) -> Optional[Encoding]:
        scales = numpy_helper.to_array(constants[node.input[1]])
        zeros = numpy_helper.to_array(constants[node.input[2]])
        if zeros.dtype.itemsize > 2:
            return None
        bits = zeros.dtype.itemsize * 8
        signed = zeros.dtype.kind == "i"
        offset = -int(np.ravel(zeros)[0]) - (2 ** (bits - 1) if signed else 0)
        return bits, signed and not zeros.any(), [float(s) for s in np.ravel(scales)], offset

    inner = {
        f"{v.name}_QuantizeLinear_Input": v.name for v in graph.output
    }  # so the quantizer renames outputs
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            found = encoding(node)
            if found is not None:
                name = inner.get(node.input[0], node.input[0])
                (parameters if name in constants else activations)[name] = found
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            found = encoding(node)
            if found is not None:
                name = node.input[0]
                parameters[name[: -len("_quantized")] if name.endswith("_quantized") else name] = found
    return activations, parameters


def bound_tensors(graph: Graph, path: Path) -> Tuple[Tuple[BoundTensor, ...], Tuple[BoundTensor, ...]]:
    """Return inputs and outputs by the source's names, with the fixed shapes of the file at *path*."""
    import onnx

    from portcall.exporters import _onnx

    held = onnx.load(str(path), load_external_data=False).graph
    shapes: Dict[str, List[int]] = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*held.input, *held.output]
    }
    inputs, outputs = _onnx.bound_tensors(graph)
    return (
        tuple(replace(t, shape=tuple(shapes[t.name])) for t in inputs),
        tuple(replace(t, shape=tuple(shapes[t.name])) for t in outputs),
    )
