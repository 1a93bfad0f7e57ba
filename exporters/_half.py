"""ONNX graphs that compute in float16 or bfloat16 by the types of their tensors, for strongly typed TensorRT networks.

Inputs and outputs keep names and types through a Cast. TensorRT adds up in float32 inside convolutions, products,
Softmax and normalizations whatever the type of their tensors, so these are half. What squares, exponentiates or sums
tensor by tensor (``FLOAT_OPS``: a LayerNorm in pieces) stays in float32 up to the first operator that meets a half
tensor, as mixed precision in PyTorch (torch.amp's list of operators that autocast to float32) has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

LARGEST: Mapping[str, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
"""The largest finite value of each type."""

# fmt: off
FLOAT_OPS = frozenset((
    "Bernoulli", "ConstantOfShape", "CumSum", "Exp", "EyeLike", "Log", "LpNormalization", "Multinomial",
    "NonMaxSuppression", "Pow", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "Range", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSum",
    "ReduceSumSquare",
))
# fmt: on
"""What stays in float32: its values outgrow float16, or it makes constants."""

# fmt: off
CARRIERS = frozenset((
    "Abs", "Add", "Cast", "Clip", "Concat", "Div", "Expand", "Flatten", "Gather", "Identity", "Max", "Min",
    "Mul", "Neg", "Reciprocal", "ReduceMean", "Reshape", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
    "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
))
# fmt: on
"""What stays in float32 where all that it reads does: pieces of a normalization, an attention mask."""

NEWEST_OPSET = 23
"""The newest operator set that a graph is raised to; 22 is the first with bfloat16 convolutions."""

UNTYPED = frozenset(("Shape", "Size"))
"""Reads no values: any type will do."""


def convert(model: Any, precision: str, keep_float: Iterable[str] = ()) -> Tuple[str, ...]:
    """Make the float32 tensors of *model* "fp16" or "bf16" in place; return notes on what stays in float32.

    keep_float: patterns of ``_selection.select``. Operators that hold a constant beyond the type's largest value (a
    sentinel) stay in float32, and what they give is clipped to half of that value before it becomes half: two masks
    still add up to a finite one. Control flow and operators of other domains stay in float32, whole. Raises
    UnsupportedError where the model's operator set is too old for the type and cannot be raised.
    """
    from portcall.exporters import _onnx, _qdq, _selection, _structure

    graph = model.graph
    _lift_constants(graph)
    _structure.raise_opset(model, _needed_opset(model, precision))
    _lift_constants(graph)  # the version converter makes some
    _onnx.sort(graph)
    kept = _selection.select([(n.name, n.op_type) for n in graph.node], keep_float)
    plan = _plan(model, precision, set(kept))
    del graph.value_info[:]
    _apply(graph, plan, precision)
    return (
        _qdq.kept_notes(kept)
        + _qdq.named(f"left in float32, a constant beyond {LARGEST[precision]:g}", plan.beyond)
        + _qdq.named("left in float32, values may outgrow or lose their place in half", plan.sensitive)
    )


def element_type(precision: str) -> int:
    """Return the element type of ``onnx.TensorProto``."""
    import onnx

    return int(onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16)


def to_half(values: Any, precision: str) -> Any:
    """Return float32 *values* rounded to nearest even; finite ones stay finite (the upper bound of a Clip)."""
    import numpy as np

    limit = LARGEST[precision]
    values = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
    if precision == "fp16":
        return values.astype(np.float16)
    import ml_dtypes  # comes with onnx

    return values.astype(ml_dtypes.bfloat16)


@dataclass
class _Plan:
    """Which inputs and outputs of which nodes are half: (number of the node) -> numbers of its inputs or outputs."""

    inputs: Dict[int, List[int]] = field(default_factory=dict)
    outputs: Dict[int, List[int]] = field(default_factory=dict)
    sentinels: Set[str] = field(default_factory=set)
    """Float32 tensors that may hold values beyond the type's largest."""
    beyond: List[str] = field(default_factory=list)
    sensitive: List[str] = field(default_factory=list)


def _lift_constants(graph: Any) -> None:
    """Turn Constant nodes that hold a tensor into initializers; initializers are no inputs of the graph."""
    constants = [n for n in graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"]
    for node in constants:
        tensor = graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.node.remove(node)
    weights = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in weights]
    if len(inputs) < len(graph.input):
        del graph.input[:]
        graph.input.extend(inputs)


def _constraint(node: Any, version: int, name: str) -> Optional[Set[str]]:
    """Return the types that *node*'s tensor *name* may have in an operator set; None where that is unknown."""
    import onnx

    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    for actual, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, found in enumerate(actual):
            if found == name and formal:
                kind = formal[min(index, len(formal) - 1)].type_str
                # U: the statistics of a normalization, kept in float32 beside half data.
                if kind == "U":
                    return {"tensor(float)"}
                allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
                return set(allowed.get(kind, {kind}))
    return None


def _takes(node: Any, version: int, name: str, precision: str) -> bool:
    allowed = _constraint(node, version, name)
    return (
        allowed is not None and ("tensor(float16)" if precision == "fp16" else "tensor(bfloat16)") in allowed
    )


def _opset(model: Any) -> int:
    return int(next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))


def _needed_opset(model: Any, precision: str) -> int:
    """Return the lowest operator set, 13 or newer, in which every operator that ever takes the type takes it.

    (A convolution takes bfloat16 from 22 on, a DequantizeLinear float16 from 19.)
    """
    import onnx

    floats = _float_tensors(model)
    current = needed = max(13, _opset(model))
    newest = max(current, min(onnx.defs.onnx_opset_version(), NEWEST_OPSET))
    for node in model.graph.node:
        if node.op_type in FLOAT_OPS | UNTYPED:
            continue
        for name in [n for n in (*node.input, *node.output) if n in floats][:1]:
            fits = [v for v in range(current, newest + 1) if _takes(node, v, name, precision)]
            needed = max(needed, fits[0]) if fits else needed
    return needed


def _float_tensors(model: Any) -> Set[str]:
    import onnx

    from portcall.exporters import _structure

    values = [*_structure.tensor_types(model), *model.graph.input, *model.graph.output]
    found = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return found | {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}


def _plan(model: Any, precision: str, kept: Set[str]) -> _Plan:
    """Decide node by node, in the order of the graph."""
    import numpy as np
    from onnx import numpy_helper

    graph, version = model.graph, _opset(model)
    floats = _float_tensors(model)
    weights = {t.name for t in graph.initializer}

    def is_large(tensor: Any) -> bool:
        values = numpy_helper.to_array(tensor)
        return bool(np.any(np.isfinite(values) & (np.abs(values) > LARGEST[precision])))

    large = {t.name for t in graph.initializer if t.name in floats and is_large(t)}
    plan = _Plan()
    stays: Set[str] = set()  # tensors that stay float32
    for number, node in enumerate(graph.node):
        reads = [n for n in node.input if n in floats]
        makes = [n for n in node.output if n in floats]
        if node.op_type in UNTYPED or not (reads or makes):
            continue
        variable = [n for n in reads if n not in weights]
        fill = [a.t for a in node.attribute if node.op_type == "ConstantOfShape" and is_large(a.t)]
        holds_large = bool(fill) or (bool(large & set(reads)) and node.op_type != "Clip")
        sensitive = (
            node.op_type in FLOAT_OPS
            or any(a.HasField("g") for a in node.attribute)
            or not _takes(node, version, (reads or makes)[0], precision)
        )
        carried = bool(variable) and node.op_type in CARRIERS and stays.issuperset(variable)
        if node.name in kept or holds_large or sensitive or carried or not reads:
            stays.update(makes)
            if holds_large or (plan.sentinels & set(variable) and node.op_type in CARRIERS):
                plan.sentinels.update(makes)
            if node.name not in kept and (holds_large or (sensitive and reads)):
                (plan.beyond if holds_large else plan.sensitive).append(node.name)
            continue
        plan.inputs[number] = [
            i for i, n in enumerate(node.input) if n in reads and _takes(node, version, n, precision)
        ]
        plan.outputs[number] = [
            i for i, n in enumerate(node.output) if n in makes and _takes(node, version, n, precision)
        ]
    return plan


def _apply(graph: Any, plan: _Plan, precision: str) -> None:
    """Give every tensor the types that its readers want: itself in the type it is made in, a Cast for the other."""
    import onnx
    from onnx import helper, numpy_helper

    from portcall.exporters._half_weights import channel_axes, rounded

    half, single = element_type(precision), onnx.TensorProto.FLOAT
    taken = {n for node in graph.node for n in (*node.input, *node.output)} | {
        t.name for t in graph.initializer
    }
    weights = {t.name: t for t in graph.initializer}
    ends = {v.name for v in graph.output}
    made_half = {graph.node[k].output[i] for k, numbers in plan.outputs.items() for i in numbers}
    nodes = list(graph.node)
    needs_float = _read_as_float(nodes, plan) | ends
    added: List[Any] = []
    axes = channel_axes(graph)
    limit = LARGEST[precision] / 2

    def new(name: str, suffix: str) -> str:
        found = f"{name}_{suffix}"
        while found in taken:
            found += "_"
        taken.add(found)
        return found

    def cast(source: str, target: str, to: int) -> None:
        added.append(helper.make_node("Cast", [source], [target], f"{target}_Cast", to=to))

    halves: Dict[str, str] = {}  # float32 tensor or weight -> its half version

    def half_of(name: str) -> str:
        if name not in halves:
            if name in weights:
                exact = numpy_helper.to_array(weights[name])
                axis = axes.get(name)
                values = to_half(exact, precision) if axis is None else rounded(exact, precision, axis)
                halves[name] = new(name, precision) if name in needs_float else name
                tensor = weights[name] if halves[name] == name else graph.initializer.add()
                tensor.CopyFrom(numpy_helper.from_array(values, halves[name]))
            else:
                halves[name], source = new(name, precision), name
                if name in plan.sentinels:
                    source = new(name, "clipped")
                    low = _scalar(graph, new(name, "low"), -limit)
                    high = _scalar(graph, new(name, "high"), limit)
                    added.append(helper.make_node("Clip", [name, low, high], [source], f"{source}_Clip"))
                cast(source, halves[name], half)
        return halves[name]

    renamed: Dict[str, str] = {}  # half tensors whose own name is that of a float32 output
    floats: Dict[str, str] = {}  # half tensor -> its float32 version
    for name in sorted(made_half & ends):
        renamed[name], floats[name] = new(name, precision), name
        cast(renamed[name], name, single)
    for name in sorted((made_half & needs_float) - ends):
        floats[name] = new(name, "float32")
        cast(name, floats[name], single)
    for number, node in enumerate(nodes):
        wanted = plan.inputs.get(number, [])
        for index, name in enumerate(node.input):
            if index in wanted:
                node.input[index] = renamed.get(name, name) if name in made_half else half_of(name)
            elif name in floats and node.op_type not in UNTYPED:
                node.input[index] = floats[name]
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                _rename_captured(body, floats)
            if node.op_type == "Cast" and attribute.name == "to" and 0 in plan.outputs.get(number, []):
                attribute.i = half
        for index in plan.outputs.get(number, []):
            node.output[index] = renamed.get(node.output[index], node.output[index])
    graph.node.extend(added)


def _read_as_float(nodes: Sequence[Any], plan: _Plan) -> Set[str]:
    """Return what some node reads other than as half, the bodies of control flow included."""
    from portcall.exporters import _onnx

    found: Set[str] = set()
    for number, node in enumerate(nodes):
        wanted = plan.inputs.get(number, [])
        if node.op_type not in UNTYPED:
            found.update(n for i, n in enumerate(node.input) if i not in wanted)
        found.update(_onnx._reads(node) - set(node.input))
    return found


def _rename_captured(body: Any, names: Mapping[str, str]) -> None:
    """Let the nodes of a body read the float32 versions of half tensors."""
    for node in body.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                _rename_captured(inner, names)
    for value in body.output:  # a body may give back what it captures
        value.name = names.get(value.name, value.name)


def _scalar(graph: Any, name: str, value: float) -> str:
    import numpy as np
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return name
