"""A network with an operator that no fast unit takes, as ONNX and as a flatbuffer: conv, relu, cumsum, conv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CHANNELS, SIZE = 16, 24


def _weights() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the kernels of both convolutions, float32[outputs, inputs, 3, 3]."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((CHANNELS, 3, 3, 3)).astype(np.float32) / 5
    second = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32) / 12
    return first, second


def write_onnx(path: Path, prefix: str = "") -> Path:
    """Write input "picture" float32[batch, 3, 24, 24], output "scores"; *prefix*: of the operators' names."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    first, second = _weights()
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["picture", "body.first.weight"], ["c1"], prefix + "first", **pads),
        helper.make_node("Relu", ["c1"], ["r1"], prefix + "relu"),
        helper.make_node("CumSum", ["r1", "axis"], ["s1"], prefix + "sum"),
        helper.make_node("Conv", ["s1", "body.second.weight"], ["scores"], prefix + "second", **pads),
    ]
    graph = helper.make_graph(
        nodes,
        "cumulative",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CHANNELS, SIZE, SIZE])],
        [
            numpy_helper.from_array(first, "body.first.weight"),
            numpy_helper.from_array(second, "body.second.weight"),
            numpy_helper.from_array(np.array(3, np.int64), "axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def write_data(path: Path, n: int = 6) -> Path:
    """Write *n* samples for the ONNX file."""
    samples = np.random.default_rng(1).standard_normal((n, 3, SIZE, SIZE)).astype(np.float32)
    np.savez(path, picture=samples)
    return path


def write_tflite(path: Path, signature: bool = True) -> Path:
    """Write the same network channels last: input [1, 24, 24, 3]. signature: without one, tensors have the names."""
    from ai_edge_litert import schema_py_generated as schema

    from portcall.exporters import _tflite

    model = schema.ModelT()
    model.version, model.description = 3, b"cumulative"
    model.buffers, model.operatorCodes, model.metadata = [_buffer(b"")], [], []
    body = schema.SubGraphT()
    body.name, body.tensors, body.operators = b"main", [], []
    model.subgraphs = [body]

    def tensor(name: str, shape: tuple[int, ...], data: np.ndarray[Any, Any] | None = None) -> int:
        made = schema.TensorT()
        made.name, made.shape = name.encode(), np.array(shape, np.int32)
        integer = data is not None and data.dtype == np.int32
        made.type = schema.TensorType.INT32 if integer else schema.TensorType.FLOAT32
        made.buffer = 0
        if data is not None:
            made.buffer = len(model.buffers)
            model.buffers.append(_buffer(data.tobytes()))
        body.tensors.append(made)
        return len(body.tensors) - 1

    def operator(kind: int, version: int, inputs: list[int], output: int, options: Any, number: int) -> None:
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = kind, min(kind, 127), version
        made = schema.OperatorT()
        made.opcodeIndex = len(model.operatorCodes)
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        made.builtinOptionsType, made.builtinOptions = number, options
        model.operatorCodes.append(code)
        body.operators.append(made)

    def convolution(activation: int) -> Any:
        options = schema.Conv2DOptionsT()
        options.padding, options.strideW, options.strideH = schema.Padding.SAME, 1, 1
        options.dilationWFactor = options.dilationHFactor = 1
        options.fusedActivationFunction = activation
        return options

    first, second = (np.ascontiguousarray(w.transpose(0, 2, 3, 1)) for w in _weights())
    bias = np.zeros(CHANNELS, np.float32)
    whole = (1, SIZE, SIZE, CHANNELS)
    picture = tensor("picture", (1, SIZE, SIZE, 3))
    constants = [tensor(f"weight{i}", w.shape, w) for i, w in enumerate((first, second))]
    biases = [tensor(f"bias{i}", bias.shape, bias) for i in range(2)]
    axis = tensor("axis", (), np.array(2, np.int32))
    made = [tensor("body/first", whole), tensor("body/sum", whole), tensor("scores", whole)]
    kinds, numbers = schema.BuiltinOperator, schema.BuiltinOptions
    relu, none = schema.ActivationFunctionType.RELU, schema.ActivationFunctionType.NONE
    operator(
        kinds.CONV_2D,
        1,
        [picture, constants[0], biases[0]],
        made[0],
        convolution(relu),
        numbers.Conv2DOptions,
    )
    operator(kinds.CUMSUM, 1, [made[0], axis], made[1], schema.CumsumOptionsT(), numbers.CumsumOptions)
    operator(
        kinds.CONV_2D,
        1,
        [made[1], constants[1], biases[1]],
        made[2],
        convolution(none),
        numbers.Conv2DOptions,
    )
    body.inputs, body.outputs = np.array([picture], np.int32), np.array([made[2]], np.int32)
    if signature:
        model.signatureDefs = [_signature(schema, picture, made[2])]
    path.write_bytes(_tflite._write(model))
    return path


def _buffer(data: bytes) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    made = schema.BufferT()
    made.data = np.frombuffer(data, np.uint8) if data else None
    return made


def _signature(schema: Any, picture: int, scores: int) -> Any:
    made = schema.SignatureDefT()
    made.signatureKey, made.subgraphIndex = b"serving_default", 0
    ends = []
    for name, index in ((b"given", picture), (b"made", scores)):
        end = schema.TensorMapT()
        end.name, end.tensorIndex = name, index
        ends.append([end])
    made.inputs, made.outputs = ends
    return made
