"""TRANSPOSE operators of a flatbuffer: those that a RESHAPE can replace, and names for the others."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

MOVING = ("TRANSPOSE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS")
"""Operators that give the elements of their first input, in some order and shape."""


def simplify(model: Any) -> int:
    """Replace by one RESHAPE every chain of moving operators that ends or begins in a TRANSPOSE and leaves all elements
    in order; drop what nothing reads any more. Return how many TRANSPOSE are gone.

    Elements stay bit for bit. Two TRANSPOSE that cancel are such a chain; so is one that moves axes of size 1 only.
    """
    before = len(_transposes(model))
    while _simplify_one(model):
        pass
    return before - len(_transposes(model))


def notes(flatbuffer: bytes) -> Tuple[str, ...]:
    """Return a sentence about the TRANSPOSE that are left, with the layers that they come from."""
    from portcall.exporters import _tflite

    model = _tflite._read(flatbuffer)
    names = [_tflite.operator_name(model, op) for op in _transposes(model)]
    if not names:
        return ()
    shown = ", ".join(map(_scope, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (f"{len(names)} TRANSPOSE, for the layout of: {shown}",)


def _scope(name: str) -> str:
    """Return the innermost layer of a tensor name: ``Net/torch.nn.modules.conv.Conv2d_stem;3`` -> ``Conv2d_stem``."""
    scope = name.split(";")[0].split("/")[-1]
    return scope.rpartition(".")[2] or name


def _transposes(model: Any) -> List[Any]:
    from portcall.exporters import _tflite

    return [op for op, kind in _tflite.operators(model) if kind == "TRANSPOSE"]


def _simplify_one(model: Any) -> bool:
    """Rewrite one chain; False where there is none left."""
    from portcall.exporters import _tflite

    kinds = _tflite.operators(model)
    makers: Dict[int, Tuple[Any, str]] = {int(op.outputs[0]): (op, kind) for op, kind in kinds}
    for op, kind in reversed(kinds):  # the longest chains end last
        if kind not in MOVING:
            continue
        order = _order(model, op, kind)
        chain, best, start = [kind], None, op
        while order is not None:
            if "TRANSPOSE" in chain and _in_order(order):
                best = (int(start.inputs[0]), len(chain))
            maker = makers.get(int(start.inputs[0]))
            if maker is None or maker[1] not in MOVING:
                break
            start, chain = maker[0], [*chain, maker[1]]
            earlier = _order(model, *maker)
            order = None if earlier is None else earlier.reshape(-1)[order]
        if best is not None:
            _make_reshape(model, op, best[0])
            _drop_unread(model)
            return True
    return False


def _order(model: Any, op: Any, kind: str) -> Optional[Any]:
    """Return which element of its input each element of the output is, in the output's shape; None if not known."""
    import numpy as np

    tensors = model.subgraphs[0].tensors
    shape, result = tensors[op.inputs[0]].shape, tensors[op.outputs[0]].shape
    shape = [] if shape is None else [int(d) for d in shape]
    result = [] if result is None else [int(d) for d in result]
    order = np.arange(int(np.prod(shape)))
    if kind != "TRANSPOSE":
        return order.reshape(result)
    data = model.buffers[tensors[op.inputs[1]].buffer].data
    if data is None or not len(data):
        return None
    return order.reshape(shape).transpose(np.frombuffer(bytes(data), np.int32))


def _in_order(order: Any) -> bool:
    import numpy as np

    return bool(np.array_equal(order.reshape(-1), np.arange(order.size)))


def _make_reshape(model: Any, op: Any, source: int) -> None:
    """Turn *op* into a RESHAPE of tensor *source*."""
    import copy

    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    from portcall.exporters import _tflite

    graph = model.subgraphs[0]
    result = graph.tensors[op.outputs[0]]
    sizes = [] if result.shape is None else [int(d) for d in result.shape]
    shape = copy.copy(result)
    shape.type, shape.name, shape.quantization = schema.TensorType.INT32, result.name + b"_shape", None
    shape.shape, shape.shapeSignature = [len(sizes)], None
    shape.buffer = _tflite.new_buffer(model)
    model.buffers[shape.buffer].data = np.frombuffer(np.array(sizes, np.int32).tobytes(), np.uint8)
    graph.tensors.append(shape)
    op.opcodeIndex = _tflite.operator_code(model, "RESHAPE")
    op.inputs = [source, len(graph.tensors) - 1]
    op.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
    op.builtinOptions = schema.ReshapeOptionsT()
    op.builtinOptions.newShape = sizes


def _drop_unread(model: Any) -> None:
    """Remove moving operators whose output nothing reads."""
    from portcall.exporters import _tflite

    graph = model.subgraphs[0]
    while True:
        read = {int(i) for op in graph.operators for i in op.inputs} | {int(i) for i in graph.outputs}
        unread = [op for op, k in _tflite.operators(model) if k in MOVING and int(op.outputs[0]) not in read]
        if not unread:
            return
        graph.operators = [op for op in graph.operators if all(op is not other for other in unread)]
