"""The flatbuffer side of the tflite backend: reading and writing, names, tap points, integer census."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Census, Source, TensorSpec
from portcall.targets.agent.errors import UnsupportedError

COMPUTE_OPS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "FULLY_CONNECTED", "BATCH_MATMUL")
CHANNEL_AXES: Mapping[str, int] = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
"""Operators whose input is measured per channel -> the axis of their weight that output channels run along."""


def _read(flatbuffer: bytes) -> Any:
    """Return the object model, with buffers stored outside the flatbuffer brought inside."""
    import numpy as np
    from ai_edge_litert.tools.flatbuffer_utils import read_model_from_bytearray

    model = read_model_from_bytearray(bytearray(flatbuffer))
    for buffer in model.buffers:
        if buffer.data is not None:
            buffer.data = np.frombuffer(bytes(buffer.data), dtype=np.uint8)
    return model


def _write(model: Any) -> bytes:
    """Pack with the 16-byte alignment of buffers that the schema asks for (``force_align: 16``).

    The generated Python code forgets it, and TFLite-Micro reads weights in place.
    """
    import flatbuffers

    class AlignedBuilder(flatbuffers.Builder):  # type: ignore[misc]  # flatbuffers ships no types
        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:
            return super().StartVector(elemSize, numElems, 16 if elemSize == 1 else alignment)

    builder = AlignedBuilder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def with_source_interface(flatbuffer: bytes, source: Source) -> bytes:
    """Return the flatbuffer with one signature whose inputs and outputs carry the source's names and dtypes.

    litert-torch numbers them (args_0, output_0) in the order of the exported program, and narrows int64 to int32:
    a CAST at either end keeps the source's dtype. TensorFlow's converter keeps names, in an order of its own.
    """
    model = _read(flatbuffer)
    signature, graph = model.signatureDefs[0], model.subgraphs[0]
    graph.inputs, graph.outputs = [list(map(int, ends)) for ends in (graph.inputs, graph.outputs)]
    for maps, indices, specs, end in (
        (signature.inputs, graph.inputs, source.inputs, "input"),
        (signature.outputs, graph.outputs, source.outputs, "output"),
    ):
        by_index = {m.tensorIndex: m for m in maps}
        if len(by_index) != len(specs) or len(indices) != len(specs):
            raise UnsupportedError(
                f"the converter kept {len(by_index)} of {len(specs)} {end}s",
                f"Remove unused or repeated {end}s",
            )
        named = {m.name.decode(): m for m in maps}
        if set(named) == {spec.name for spec in specs}:
            indices[:] = [named[spec.name].tensorIndex for spec in specs]
            maps[:] = [named[spec.name] for spec in specs]
        for position, spec in enumerate(specs):
            entry = by_index[indices[position]]
            entry.name = spec.name.encode()
            entry.tensorIndex = indices[position] = _with_dtype(model, indices[position], spec, end)
    return _write(model)


def _with_dtype(model: Any, index: int, spec: TensorSpec, end: str) -> int:
    """Return the index of a tensor of the source's dtype, joined to tensor *index* by a CAST if that is narrower."""
    import copy

    from ai_edge_litert.schema_py_generated import OperatorT, TensorType

    graph = model.subgraphs[0]
    inner = graph.tensors[index]
    wanted = getattr(TensorType, spec.dtype.upper(), None)
    if inner.type == wanted:
        return index
    if (spec.dtype, inner.type) != ("int64", TensorType.INT32):
        raise UnsupportedError(
            f"LiteRT has no {end} of {spec}", "Cast it to float32 or int64 inside the model"
        )
    outer = copy.copy(inner)
    outer.type, outer.name, outer.buffer = wanted, inner.name + b"_int64", 0
    graph.tensors.append(outer)
    cast = OperatorT()
    cast.opcodeIndex = operator_code(model, "CAST")
    ends = [len(graph.tensors) - 1, index]
    cast.inputs, cast.outputs = (ends[:1], ends[1:]) if end == "input" else (ends[1:], ends[:1])
    graph.operators.insert(0 if end == "input" else len(graph.operators), cast)
    return ends[0]


def operator_code(model: Any, kind: str, version: int = 1) -> int:
    """Return the index of an operator's code; it is appended where the model has none."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator, OperatorCodeT

    number = getattr(BuiltinOperator, kind)
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == number and code.version == version:
            return index
    code = OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def with_outputs(flatbuffer: bytes, indices: Sequence[int]) -> bytes:
    """Return the flatbuffer with the tensors *indices* of its primary subgraph as further outputs of it.

    Signatures stay as they are. Inputs and constants are left out: no operator makes them.
    """
    model = _read(flatbuffer)
    graph = model.subgraphs[0]
    made = {int(o) for op in graph.operators for o in op.outputs}
    known = [int(o) for o in graph.outputs]
    graph.outputs = known + [i for i in indices if i in made and i not in known]
    return _write(model)


def tapped_tensors(path: Path) -> Dict[int, str]:
    """Return the float activations of the primary subgraph: tensor index -> name.

    Constants are left out: the quantizer takes weights from the file itself.
    """
    from ai_edge_litert.schema_py_generated import TensorType

    graph = _read(path.read_bytes()).subgraphs[0]
    indices = [*graph.inputs, *(o for op in graph.operators for o in op.outputs)]
    tensors = {i: graph.tensors[i] for i in indices if graph.tensors[i].type == TensorType.FLOAT32}
    return {i: t.name.decode() for i, t in tensors.items()}


def weighted_inputs(path: Path) -> Dict[str, int]:
    """Return the tapped tensors that meet constant weights, and their channel axis: always the last."""
    model = _read(path.read_bytes())
    graph = model.subgraphs[0]
    tapped = tapped_tensors(path)
    found = {int(op.inputs[0]) for op, kind in operators(model) if weight_of(model, op, kind) is not None}
    return {name: -1 for index, name in tapped.items() if index in found and len(graph.tensors[index].shape)}


def operators(model: Any) -> List[Tuple[Any, str]]:
    """Return the operators of the primary subgraph, each with its type's name."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator

    names = {v: k for k, v in vars(BuiltinOperator).items() if isinstance(v, int)}
    codes = [names[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in model.operatorCodes]
    return [(op, codes[op.opcodeIndex]) for op in model.subgraphs[0].operators]


def operator_name(model: Any, op: Any) -> str:
    """Return what an operator goes by: the name of its first output."""
    return str(model.subgraphs[0].tensors[op.outputs[0]].name.decode())


def weight_of(model: Any, op: Any, kind: str) -> Optional[Any]:
    """Return the constant float32 weight of a product, or None.

    Its shape: [outputs, *kernel, inputs / groups]; of a depthwise one [1, *kernel, outputs].
    """
    return None if kind not in CHANNEL_AXES else constant(model, int(op.inputs[1]))


def constant(model: Any, index: int) -> Optional[Any]:
    """Return the value of tensor *index* of the primary subgraph, a view, or None where it is no float32 constant."""
    import numpy as np
    from ai_edge_litert.schema_py_generated import TensorType

    if index < 0:
        return None
    tensor = model.subgraphs[0].tensors[index]
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data) or tensor.type != TensorType.FLOAT32:
        return None
    return np.frombuffer(data, np.float32).reshape(tensor.shape)


def set_constant(model: Any, buffer: int, values: Any) -> None:
    """Write float32 *values* into buffer number *buffer*."""
    import numpy as np

    contiguous = np.ascontiguousarray(values, np.float32)
    model.buffers[buffer].data = np.frombuffer(contiguous.tobytes(), np.uint8)


def new_buffer(model: Any) -> int:
    """Append an empty buffer; return its number."""
    from ai_edge_litert.schema_py_generated import BufferT

    model.buffers.append(BufferT())
    return len(model.buffers) - 1


def signature_shapes(path: Path) -> Dict[str, Tuple[int, ...]]:
    """Return the shape of every named input and output."""
    model = _read(path.read_bytes())
    tensors = model.subgraphs[0].tensors
    maps = [*model.signatureDefs[0].inputs, *model.signatureDefs[0].outputs]
    return {m.name.decode(): tuple(int(d) for d in tensors[m.tensorIndex].shape) for m in maps}


def census(path: Path) -> Census:
    """Count integer arithmetic: an operator computes on integers if its weights and activations are integers, or
    if its weights are integers and it quantizes its activations at run time (hybrid).
    """
    from ai_edge_litert.schema_py_generated import BuiltinOperator, TensorType

    names = {v: k for k, v in vars(BuiltinOperator).items() if isinstance(v, int)}
    model = _read(path.read_bytes())
    total = integer = quantize = 0
    floats: List[str] = []
    for graph in model.subgraphs:
        for op in graph.operators:
            code = model.operatorCodes[op.opcodeIndex]
            name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
            tensors = [graph.tensors[i] for i in op.inputs if i >= 0]
            output = graph.tensors[op.outputs[0]]
            if name in ("QUANTIZE", "DEQUANTIZE"):
                # A DEQUANTIZE of a constant is storage, not integer arithmetic.
                data = model.buffers[tensors[0].buffer].data
                quantize += data is None or not len(data)
            if name not in COMPUTE_OPS:
                continue
            weight = tensors[1]
            transposed = bool(getattr(op.builtinOptions, "adjX", False))
            macs = _macs(name, [tuple(t.shape) for t in tensors], tuple(output.shape), transposed)
            total += macs
            if weight.type in (TensorType.INT8, TensorType.INT4, TensorType.UINT8):
                quantize += 1
                integer += macs
            else:
                floats.append(output.name.decode())
    return Census(quantize, total, integer, tuple(floats), "operator types of the flatbuffer")


def _macs(name: str, shapes: List[Tuple[int, ...]], output: Tuple[int, ...], transposed: bool) -> int:
    """Multiply-accumulates of one operator; weights are [out, *kernel, in], depthwise [1, *kernel, out].

    transposed: the left operand of a batched product is [..., inner, rows].
    """
    weight = shapes[1]
    if name == "TRANSPOSE_CONV":  # inputs: output shape, weights, activations
        elements, per_element = shapes[2], (*weight[1:-1], weight[0])
    elif name == "DEPTHWISE_CONV_2D":
        elements, per_element = output, weight[1:-1]
    elif name == "CONV_3D":
        elements, per_element = output, weight[:-1]
    elif name == "BATCH_MATMUL":
        elements, per_element = output, shapes[0][-2:-1] if transposed else shapes[0][-1:]
    else:
        elements, per_element = output, weight[1:]
    result = 1
    for dim in (*elements, *per_element):
        result *= int(dim)
    return result
