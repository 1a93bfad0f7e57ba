"""A graph of ``_half`` in float32 arithmetic, every result rounded to its half type: ONNX Runtime's CPU then runs it.

It has no bfloat16 convolutions, and computes float16 ones in float32 with a Cast around each anyway. TensorRT rounds as
often or less: fused operators keep float32 between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

MOVING = frozenset(
    (
        *(
            "Concat",
            "DepthToSpace",
            "DequantizeLinear",
            "Expand",
            "Flatten",
            "Gather",
            "GatherElements",
            "GatherND",
            "Identity",
        ),
        *("Max", "MaxPool", "Min", "Neg", "Relu", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze", "Where"),
    )
)
"""Gives values that it read: nothing to round. (Integer kernels take what was quantized as it is.)"""


def is_half(path: Path) -> bool:
    """Tell whether the graph of an ONNX file computes in a half type: a Cast to it or weights of it say so."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    casts = (a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to")
    inside = {v.name for v in (*graph.input, *graph.output)}
    return any(t.data_type in halves for t in graph.initializer if t.name not in inside) or any(
        to in halves for to in casts
    )


def write_rounding(path: Path, target: Path) -> None:
    """Write the half graph of *path* to *target* as float32 operators, with two Casts where a result is rounded.

    Inputs and outputs of the graph keep their type.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from portcall.exporters import _onnx, _structure

    model = onnx.load(str(path))
    graph = model.graph
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    values = [*_structure.tensor_types(model), *graph.input, *graph.output]
    types: Dict[str, int] = {v.name: int(v.type.tensor_type.elem_type) for v in values}
    for tensor in graph.initializer:
        if tensor.data_type in halves:
            exact = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
    inputs = {v.name for v in graph.input if types[v.name] in halves}
    outputs = {v.name for v in graph.output if types[v.name] in halves}
    prefix = "portcall"
    while any(n.startswith(prefix) for node in graph.node for n in (*node.input, *node.output)):
        prefix += "_"

    def cast(source: str, target: str, to: int) -> Any:
        return helper.make_node("Cast", [source], [target], f"{prefix}/{target}_cast", to=to)

    single = {name: f"{prefix}/{name}_single" for name in inputs | outputs}
    nodes = [cast(name, single[name], TensorProto.FLOAT) for name in sorted(inputs)]
    for node in graph.node:
        node.input[:] = [single.get(n, n) for n in node.input]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in halves:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for index, name in enumerate(node.output):
            half = types.get(name, TensorProto.FLOAT)
            if half not in halves:
                continue
            result = single.get(name, name)
            node.output[index] = result
            if node.op_type not in MOVING:
                node.output[index] = f"{prefix}/{name}_exact"
                rounded = f"{prefix}/{name}_rounded"
                nodes += [cast(node.output[index], rounded, half), cast(rounded, result, TensorProto.FLOAT)]
            if name in outputs:
                nodes.append(cast(result, name, half))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    _onnx.save(model, target)
