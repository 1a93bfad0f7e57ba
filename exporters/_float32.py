"""ONNX models that compute in float16, turned into float32 ones.

ONNX Runtime's CPU runs no float16 convolution or matrix product on most machines: it casts around each, and writes
those Casts into the canonical graph, between a weight and its operator. Scales in float16 would also lose small values
(below 6e-5 they are subnormal). So the canonical graph is float32 between inputs and outputs, which keep their type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Set


def converted(raw: Path, path: Path) -> Path:
    """Return *raw* where it holds no float16 tensor, else *path*, a float32 version of it written there."""
    import onnx

    from portcall.exporters import _onnx

    light = onnx.load(str(raw), load_external_data=False)
    if not is_half(light):
        return raw
    model = onnx.load(str(raw))
    to_float32(model)
    for old in (path, path.with_name(path.name + ".data")):
        if old.exists():
            old.unlink()
    _onnx.save(model, path)
    return path


def is_half(model: Any) -> bool:
    """Tell whether *model* has float16 weights, inputs or outputs (control flow aside: its bodies are not entered)."""
    import onnx

    half = onnx.TensorProto.FLOAT16
    ends = [v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]]
    if any(a.HasField("g") for node in model.graph.node for a in node.attribute):
        return False
    return half in ends or any(t.data_type == half for t in model.graph.initializer)


def to_float32(model: Any) -> None:
    """Make every float16 tensor of *model* float32, in place; graph inputs and outputs keep their type by a Cast.

    Tensors keep their names, except what lies behind a float16 input or before such an output: NAME_float32. Casts of
    weights to float32 are folded.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph, half, single = model.graph, TensorProto.FLOAT16, TensorProto.FLOAT
    del graph.value_info[:]
    tensors = [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    for tensor in [*graph.initializer, *tensors]:
        if tensor.data_type == half:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == half:
                attribute.i = single
    _fold_casts(graph)
    taken = {name for node in graph.node for name in [*node.input, *node.output]}
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type != half:
            continue
        inner = f"{value.name}_float32"
        while inner in taken:  # a model that was converted before
            inner += "_"
        is_input = any(v.name == value.name for v in graph.input)
        _rename(graph, value.name, inner)
        ends = ([value.name], [inner]) if is_input else ([inner], [value.name])
        cast = helper.make_node("Cast", *ends, f"{inner}_Cast", to=single if is_input else half)
        graph.node.insert(0 if is_input else len(graph.node), cast)


def _rename(graph: Any, name: str, inner: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inner if n == name else n for n in names]


def _fold_casts(graph: Any) -> None:
    """Replace each Cast of a float32 initializer to float32 by an initializer of the name that the Cast gave."""
    from onnx import TensorProto

    weights: Dict[str, Any] = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    kept = []
    folded: Set[str] = set()
    for node in list(graph.node):
        if node.op_type != "Cast" or node.input[0] not in weights or node.attribute[0].i != TensorProto.FLOAT:
            kept.append(node)
            continue
        constant = graph.initializer.add()
        constant.CopyFrom(weights[node.input[0]])
        constant.name = node.output[0]
        folded.add(node.input[0])
    if not folded:
        return
    unread = folded - {name for node in kept for name in node.input}
    for entries, rest in (
        (graph.node, kept),
        (graph.initializer, [t for t in graph.initializer if t.name not in unread]),
    ):
        del entries[:]
        entries.extend(rest)
