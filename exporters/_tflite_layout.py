"""Inputs and outputs in the order of axes that the operators compute in, instead of a TRANSPOSE at either end."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

ALONG = ("QUANTIZE", "DEQUANTIZE", "PAD", "PADV2")
"""Operators that may stand between an end and its TRANSPOSE: element by element, or with one number per axis."""


def with_channels_last(flatbuffer: bytes) -> Tuple[bytes, Dict[str, Tuple[int, ...]]]:
    """Return the flatbuffer without the TRANSPOSE at its inputs and outputs, and who lost one: name -> permutation.

    Axis i of such a tensor is axis ``permutation[i]`` of the source's. An end stays as it is where no TRANSPOSE
    follows (or precedes) it, or where something else reads a tensor on the way.
    """
    from portcall.exporters import _tflite

    model = _tflite._read(flatbuffer)
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    permutations: Dict[str, Tuple[int, ...]] = {}
    for end, entries, indices in (
        ("input", signature.inputs, graph.inputs),
        ("output", signature.outputs, graph.outputs),
    ):
        for entry in entries:
            outer = int(entry.tensorIndex)
            found = _chain(model, outer, end)
            if found is None:
                continue
            between, transpose, order = found
            order = order if end == "input" else tuple(order.index(axis) for axis in range(len(order)))
            inner = int((transpose.outputs if end == "input" else transpose.inputs)[0])
            graph.operators = [op for op in graph.operators if op is not transpose]
            if between:
                _move(model, between, inner, order, end)
            else:
                entry.tensorIndex = inner
                graph_ends = [inner if int(i) == outer else int(i) for i in indices]
                if end == "input":
                    graph.inputs = graph_ends
                else:
                    graph.outputs = graph_ends
            permutations[entry.name.decode()] = order
    return _tflite._write(model), permutations


def _chain(model: Any, index: int, end: str) -> Optional[Tuple[List[Any], Any, Tuple[int, ...]]]:
    """Return the operators from an end to its TRANSPOSE, that, and its order of axes; None where there is none."""
    from portcall.exporters import _tflite

    graph = model.subgraphs[0]
    kinds = _tflite.operators(model)
    ends = {int(i) for i in [*graph.inputs, *graph.outputs]}
    between: List[Any] = []
    while True:
        readers = [(op, kind) for op, kind in kinds if index in map(int, op.inputs)]
        makers = [(op, kind) for op, kind in kinds if index in map(int, op.outputs)]
        beside, others = (readers, makers) if end == "input" else (makers, readers)
        if len(beside) != 1 or len(others) != (1 if between else 0) or (between and index in ends):
            return None
        op, kind = beside[0]
        if kind == "TRANSPOSE":
            inner = int((op.outputs if end == "input" else op.inputs)[0])
            data = model.buffers[graph.tensors[op.inputs[1]].buffer].data
            alone = end == "input" or sum(inner in map(int, o.inputs) for o, _ in kinds) == 1
            if data is None or not len(data) or inner in ends or not alone:
                return None
            return between, op, tuple(_integers(data))
        if kind not in ALONG:
            return None
        between.append(op)
        index = int((op.outputs if end == "input" else op.inputs)[0])


def _move(model: Any, between: Sequence[Any], inner: int, order: Tuple[int, ...], end: str) -> None:
    """Let the operators *between* an end and tensor *inner* compute in *order* of axes; the last one meets *inner*."""
    graph = model.subgraphs[0]
    for op in between:
        outer = graph.tensors[(op.inputs if end == "input" else op.outputs)[0]]
        outer.shape = [int(outer.shape[axis]) for axis in order]
        outer.shapeSignature = None
        if len(op.inputs) > 1:
            op.inputs = [op.inputs[0], _permuted_rows(model, int(op.inputs[1]), order), *op.inputs[2:]]
    if end == "input":
        between[-1].outputs = [inner]
    else:
        between[-1].inputs = [inner, *between[-1].inputs[1:]]


def _permuted_rows(model: Any, index: int, order: Tuple[int, ...]) -> int:
    """Return a new constant: the paddings of tensor *index*, a row per axis, in *order*."""
    import copy

    import numpy as np

    from portcall.exporters import _tflite

    tensors = model.subgraphs[0].tensors
    made = copy.copy(tensors[index])
    kind = np.int64 if len(model.buffers[made.buffer].data) == 16 * len(order) else np.int32
    rows = np.frombuffer(bytes(model.buffers[made.buffer].data), kind).reshape(len(order), 2)
    made.buffer, made.name = _tflite.new_buffer(model), made.name + b"_channels_last"
    model.buffers[made.buffer].data = np.frombuffer(rows[list(order)].tobytes(), np.uint8)
    tensors.append(made)
    return len(tensors) - 1


def _integers(data: Any) -> List[int]:
    import numpy as np

    return [int(i) for i in np.frombuffer(bytes(data), np.int32)]
