"""The lowest operator set and IR version that an ONNX file needs, and the ONNX Runtime that this asks for.

Devices carry older runtimes. A file says which operator set it was written with, not which it needs: an operator whose
definition did not change in between, or only gained types and attributes that are not used, means the same in an older
set.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from portcall.targets.agent.errors import BadInput, UnsupportedError

OLDEST = 11
"""The operator set of the oldest ONNX Runtime that is told apart here."""

REDEFINED: Mapping[str, Tuple[int, ...]] = {
    "Softmax": (13,), "LogSoftmax": (13,), "Hardmax": (13,),  # axis: the last by default, no flattening
    "Resize": (11, 13, 18, 19), "Upsample": (9,), "BatchNormalization": (9, 14), "AveragePool": (19,),
    "Dropout": (12, 13), "RoiAlign": (16,), "GridSample": (20,), "Attention": (23, 24), "Cast": (24,),
}  # fmt: skip
"""Operators -> the sets in which their meaning changed beyond types and attributes (ONNX's Changelog.md)."""

RUNTIMES: Sequence[Tuple[str, int, int]] = (
    ("1.2", 11, 6), ("1.4", 12, 6), ("1.6", 13, 7), ("1.8", 14, 7), ("1.9", 15, 8), ("1.11", 16, 8), ("1.12", 17, 8),
    ("1.14", 18, 8), ("1.15", 18, 9), ("1.16", 19, 9), ("1.17", 20, 9), ("1.18", 21, 10), ("1.21", 22, 10),
    ("1.23", 23, 11), ("1.24", 25, 13), ("1.25", 26, 13),
)  # fmt: skip
"""ONNX Runtime -> the newest operator set and IR version that it loads: up to 1.14 as its documentation says
(docs/reference/compatibility), from 1.15 on as its releases do."""

CONTRIB: Mapping[str, str] = {"MatMulNBits": "1.17", "DynamicQuantizeMatMul": "1.2", "Gelu": "1.0"}
"""Operators of com.microsoft -> the first ONNX Runtime with them."""

AXES: Mapping[str, int] = {
    **dict.fromkeys(("ReduceSum", "Squeeze", "Unsqueeze"), 13),
    **{
        f"Reduce{kind}": 18
        for kind in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    },
}
"""Operators -> the set from which on their axes are an input and no attribute."""

Types = Mapping[str, Optional[str]]
"""Tensor -> its element type, as ONNX's schemas write it: "tensor(float)"."""

ASKED_FIX = "Ask for a newer one, or replace that operator in the model"


def settle(path: Path, options: Mapping[str, Any], backend: str = "onnxruntime") -> str:
    """Rewrite the ONNX file at *path* to the lowest operator set and IR version; return the ONNX Runtime it needs.

    options: of the recipe. "opset": exactly this set. "min_runtime": a version of ONNX Runtime that has to load it.
    Weights in other files stay untouched. Raises UnsupportedError where a node needs more: node, operator and both
    versions.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    _drop_defaults(model)
    asked: Optional[int] = options.get("opset")
    newest = onnx.defs.onnx_opset_version()
    if asked is not None and not OLDEST <= asked <= newest:
        raise BadInput(f"opset is {asked}", f"Give {OLDEST} to {newest}")
    limit = newest if asked is None else asked
    oldest_runtime = options.get("min_runtime")
    if oldest_runtime is not None:
        limit = min(limit, _limits(oldest_runtime)[0])
    who = f"{backend} {oldest_runtime} has" if asked is None else "opset asks for"
    model = _lowered(model, asked or OLDEST, limit, who)
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    needed = runtime_for(model)
    if oldest_runtime is not None and _version(needed) > _version(oldest_runtime):
        contrib = sorted({n.op_type for n in model.graph.node if n.domain == "com.microsoft"})
        what = f"the operators {', '.join(contrib)}" if contrib else f"IR version {model.ir_version}"
        raise UnsupportedError(f"{what} need {backend} {needed}, {oldest_runtime} was asked for", ASKED_FIX)
    path.write_bytes(model.SerializeToString())  # weights in other files were not even read
    onnx.checker.check_model(str(path))
    return needed


def runtime_for(model: Any) -> str:
    """Return the first ONNX Runtime that loads *model*, by its operator set, IR version and contrib operators."""
    opset = _opset(model)
    fits = [version for version, newest, ir in RUNTIMES if opset <= newest and model.ir_version <= ir]
    needed = fits[0] if fits else "99"
    for node in model.graph.node:
        if node.domain == "com.microsoft" and _version(CONTRIB.get(node.op_type, "1.31")) > _version(needed):
            needed = CONTRIB.get(node.op_type, "1.31")
    return needed


def _limits(runtime: str) -> Tuple[int, int]:
    """Return the newest operator set and IR version of an ONNX Runtime. Raises BadInput for no version."""
    try:
        wanted = _version(runtime)
    except ValueError as error:
        raise BadInput(f"min_runtime is {runtime!r}, no version", "Give e.g. 1.16") from error
    known = [(opset, ir) for version, opset, ir in RUNTIMES if _version(version) <= wanted]
    if not known:
        raise BadInput(f"min_runtime {runtime} is older than {RUNTIMES[0][0]}", "Ask for a newer one")
    return known[-1]


def _version(text: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _opset(model: Any) -> int:
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), OLDEST)


def _set_opset(model: Any, version: int) -> None:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version


def _lowered(model: Any, floor: int, limit: int, who: str) -> Any:
    """Return *model* at its lowest operator set from *floor* to *limit*.

    Constant axes become attributes where that lowers it. Where *limit* asks for more, operators that are functions of
    older ones are written out, and then ONNX's own version converter is tried. Raises UnsupportedError where nothing
    helps.
    """
    types = _types(model)
    model = _at_lowest(model, floor, types)
    if _needed(model, types) > limit:
        model = _expanded(model, limit, types)
        types = _types(model)
        model = _at_lowest(model, floor, types)
    if _needed(model, types) > limit:
        model = _converted(model, limit)
        types = _types(model)
    left = needed_opsets(model, types)
    if _needed(model, types) > limit:
        name = next(n for n, version in left.items() if version > limit)
        kind = next(n.op_type for n in _nodes(model.graph) if n.name == name)
        raise UnsupportedError(
            f"{who} operator set {limit}, and node {name!r} ({kind}) needs {left[name]}", ASKED_FIX
        )
    _set_opset(model, max(_needed(model, types), floor))
    return model


def _at_lowest(model: Any, floor: int, types: Types) -> Any:
    """Return *model* with the constant axes as attributes that the lowest set, but at least *floor*, has as such."""
    lowest = max(_needed(_with_axes_attributes(copy.deepcopy(model), OLDEST), types), floor)
    return _with_axes_attributes(model, lowest)


def _needed(model: Any, types: Types) -> int:
    return max([*needed_opsets(model, types).values(), OLDEST])


def _drop_defaults(model: Any) -> None:
    """Drop attributes that say what holds without them: an older operator may not know them."""
    import onnx

    opset = _opset(model)
    constants = _constants(model)
    for node in _nodes(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Reshape" and node.input[1] in constants and 0 not in constants[node.input[1]]:
            del node.attribute[:]  # allowzero tells what a 0 means
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        kept = []
        for attribute in node.attribute:
            default = known[attribute.name].default_value if attribute.name in known else None
            # A default has no type where there is none.
            if default is None or not default.type or not _equal(attribute, default):
                kept.append(attribute)
        del node.attribute[:]
        node.attribute.extend(kept)


def _equal(one: Any, other: Any) -> bool:
    import onnx

    values = onnx.helper.get_attribute_value
    return bool(one.type == other.type and one.type <= 8 and values(one) == values(other) and one.type != 4)


def needed_opsets(model: Any, types: Types) -> Dict[str, int]:
    """Return the lowest operator set of every standard node (branches and loop bodies included), by node name."""
    declared = _opset(model)
    return {
        node.name: _lowest(node, declared, types)
        for node in _nodes(model.graph)
        if node.domain in ("", "ai.onnx")
    }


def _nodes(graph: Any) -> List[Any]:
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                found += _nodes(body)
    return found


def _types(model: Any) -> Types:
    import onnx

    names = {v: k.lower() for k, v in onnx.TensorProto.DataType.items()}
    graph = onnx.shape_inference.infer_shapes(model).graph
    found: Dict[str, Optional[str]] = {t.name: f"tensor({names[t.data_type]})" for t in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            found[value.name] = f"tensor({names[value.type.tensor_type.elem_type]})"
    return found


def _lowest(node: Any, declared: int, types: Types) -> int:
    """Return the lowest set in which *node* means what it means in set *declared*."""
    import onnx

    here = onnx.defs.get_schema(node.op_type, declared)
    lowest = version = int(here.since_version)
    while version > OLDEST and version not in REDEFINED.get(node.op_type, ()):
        try:
            older = onnx.defs.get_schema(node.op_type, version - 1)
        except onnx.defs.SchemaError:  # the operator came with this set
            break
        version = int(older.since_version)
        if not older.deprecated and _fits(
            node, older, here, types
        ):  # in between, axes may have been an input
            lowest = max(version, OLDEST)
    return lowest


def _fits(node: Any, older: Any, here: Any, types: Types) -> bool:
    """Tell whether *node*, written for schema *here*, is well formed and has the same defaults in schema *older*."""
    used: Set[str] = {a.name for a in node.attribute}
    if not used <= set(older.attributes):
        return False
    for name in set(here.attributes) | set(older.attributes):
        new, old = here.attributes.get(name), older.attributes.get(name)
        if old is not None and old.required and name not in used:
            return False
        if name in used or new is None or old is None:
            continue
        if new.default_value.SerializeToString() != old.default_value.SerializeToString():
            return False
    if not older.min_input <= len(node.input) <= older.max_input:
        return False
    if not older.min_output <= len(node.output) <= older.max_output:
        return False
    formal = [*_formal(node.input, older.inputs), *_formal(node.output, older.outputs)]
    return all(not name or types.get(name) is None or types[name] in allowed for name, allowed in formal)


def _formal(names: Sequence[str], parameters: Sequence[Any]) -> List[Tuple[str, Any]]:
    """Pair the names of inputs or outputs with the types allowed; the last parameter may be variadic."""
    return [(name, parameters[min(i, len(parameters) - 1)].types) for i, name in enumerate(names)]


def _expanded(model: Any, limit: int, types: Types) -> Any:
    """Return *model* with the operators that are newer than *limit* written out by ONNX's own function bodies."""
    import onnx
    from onnx import inliner

    needs = needed_opsets(model, types)
    functions = set()
    for node in _nodes(model.graph):
        if needs.get(node.name, 0) > limit:
            schema = onnx.defs.get_schema(node.op_type, _opset(model))
            if schema.has_function or schema.has_context_dependent_function:
                functions.add((node.domain, node.op_type))
    if not functions:
        return model
    typed = onnx.shape_inference.infer_shapes(model)  # the inliner looks for types here
    for tensor in typed.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        typed.graph.value_info.append(info)
    written = inliner.inline_selected_functions(
        typed, sorted(functions), exclude=False, inline_schema_functions=True
    )
    del written.graph.value_info[:]
    names: Set[str] = set()
    for number, node in enumerate(_nodes(written.graph)):
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_written_out_{number}"
        names.add(node.name)
    _drop_defaults(written)
    return written


def _constants(model: Any) -> Dict[str, List[int]]:
    """Return the values of the constant int64 tensors of the main graph that are shapes or axes: up to 32 of them."""
    import numpy as np
    import onnx

    tensors = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            if attribute.name == "value_ints":
                tensors[node.output[0]] = onnx.numpy_helper.from_array(np.array(attribute.ints, np.int64))
            elif attribute.name == "value":
                tensors[node.output[0]] = attribute.t
    small = {k: t for k, t in tensors.items() if t.data_type == onnx.TensorProto.INT64 and sum(t.dims) <= 32}
    inside = {k: t for k, t in small.items() if t.data_location != onnx.TensorProto.EXTERNAL}
    return {k: onnx.numpy_helper.to_array(t).reshape(-1).tolist() for k, t in inside.items()}


def _with_axes_attributes(model: Any, opset: int) -> Any:
    """Return *model*, changed, with constant axes as attributes where *opset* has them as such."""
    import onnx

    constants = _constants(model)
    for node in model.graph.node:
        if opset >= AXES.get(node.op_type, 0) or len(node.input) < 2 or node.input[1] not in constants:
            continue
        axes = constants[node.input[1]]
        del node.input[1:]
        if axes:
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
    read = {name for node in _nodes(model.graph) for name in node.input}
    read |= {value.name for value in model.graph.output}
    kept = [t for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _converted(model: Any, limit: int) -> Any:
    """Return *model* as ONNX's version converter makes it, or as it is where that has no way down."""
    import onnx
    from onnx import version_converter

    try:
        return version_converter.convert_version(model, limit)
    except (RuntimeError, onnx.shape_inference.InferenceError):  # it has no adapter for a node
        return model
