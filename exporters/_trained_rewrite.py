"""Q/DQ graphs rewritten: with stored weights, with symmetric scales, or as the float graph without its pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

from portcall.exporters import _trained
from portcall.exporters._trained import Entry


def split(model: Any) -> List[Entry]:
    """Make the float model of *model* in place: pairs taken off, weights dequantized; return what was trained.

    A weight goes by the name of what its DequantizeLinear gave. Raises as ``read`` does.
    """
    from onnx import helper, numpy_helper

    entries = _trained.read(model)
    constants = _trained.constants_of(model)
    graph = model.graph
    renamed: Dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            array = _trained.dequantized(node, constants)
            graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        elif node.op_type == "QuantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = _trained.quantized(node, constants)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for value in graph.output:
        if value.name in renamed:
            inputs = [renamed[value.name]]
            kept.append(helper.make_node("Identity", inputs, [value.name], f"{value.name}_identity"))
    del graph.node[:]
    graph.node.extend(kept)
    _finish(model)
    return entries


def normalize(model: Any) -> None:
    """Store in place the weights that stand as floats before their pair as integers; pairs stay where they are."""
    from onnx import numpy_helper

    constants = _trained.constants_of(model)
    graph = model.graph
    stored = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants]
    for node in stored:
        graph.initializer.append(numpy_helper.from_array(_trained.quantized(node, constants), node.output[0]))
        graph.node.remove(node)
    _finish(model)


def make_symmetric(model: Any) -> None:
    """Make every pair of a normalized model symmetric int8 (zero point 0) in place, biases float: TensorRT's form.

    Scales stay where their integers fit int8 around 0; else they become the smallest that reach as far. Weights that
    change are quantized again from the values that they stood for.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    _dequantize_biases(model)
    _trained.read(model)  # refuses what cannot be changed
    graph, constants = model.graph, _trained.constants_of(model)
    for number, node in enumerate(graph.node):
        constant = node.op_type == "DequantizeLinear" and node.input[0] in constants
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        found = _trained.parameters(node, constants, True)
        assert found is not None
        new = found.symmetric()
        if constant:
            integers = np.asarray(constants[node.input[0]]).astype(np.int64)
            shape = _trained.shape_along(new.axis, integers.ndim)
            old_scale, old_zero, scale = (
                np.asarray(v).reshape(shape) for v in (found.scales, found.zero_points, new.scales)
            )
            values = (integers - old_zero) * (old_scale / scale)
            values = np.clip(np.rint(values), -128, 127).astype(np.int8)
            graph.initializer.append(numpy_helper.from_array(values, f"{node.output[0]}_symmetric_{number}"))
            node.input[0] = f"{node.output[0]}_symmetric_{number}"
        shape_of = () if new.axis is None else (-1,)
        parameters = (
            np.asarray(new.scales, np.float32).reshape(shape_of),
            np.zeros(len(new.scales), np.int8).reshape(shape_of),
        )
        names = [f"{node.output[0]}_{word}_{number}" for word in ("scale", "zero_point")]
        graph.initializer.extend(map(numpy_helper.from_array, parameters, names))
        del node.input[1:]
        node.input.extend(names)
        for attribute in [a for a in node.attribute if a.name in ("output_dtype", "saturate")]:
            node.attribute.remove(attribute)
        if new.axis is None:
            for attribute in [a for a in node.attribute if a.name == "axis"]:
                node.attribute.remove(attribute)
        elif not any(a.name == "axis" for a in node.attribute):
            node.attribute.append(helper.make_attribute("axis", new.axis))
    _finish(model)


def write(path: Path, target: Path, symmetric: bool = False, float_bias: bool = False) -> Tuple[str, ...]:
    """Write the ONNX file at *path* with its own pairs to *target*, weights stored as integers; return the file names.

    symmetric: see ``make_symmetric``. float_bias: biases as floats.
    """
    import onnx

    from portcall.exporters import _onnx

    model = onnx.load(str(path))
    normalize(model)
    if symmetric:
        make_symmetric(model)
    if float_bias:
        _dequantize_biases(model)
    return _onnx.save(model, target)


def _dequantize_biases(model: Any) -> None:
    from onnx import numpy_helper

    graph, constants = model.graph, _trained.constants_of(model)
    for node in list(graph.node):
        if node.op_type == "DequantizeLinear" and _trained.is_bias(constants.get(node.input[0])):
            graph.initializer.append(
                numpy_helper.from_array(_trained.dequantized(node, constants), node.output[0])
            )
            graph.node.remove(node)
    _finish(model)


def _finish(model: Any) -> None:
    """Drop the initializers that nothing reads any more, and stale types."""
    from portcall.exporters import _onnx

    graph = model.graph
    read_names = {name for node in graph.node for name in _onnx._reads(node)} | {v.name for v in graph.output}
    kept = [t for t in graph.initializer if t.name in read_names]
    unread = {t.name for t in graph.initializer} - read_names
    del graph.initializer[:]
    graph.initializer.extend(kept)
    inputs = [v for v in graph.input if v.name not in unread]
    del graph.input[:]
    graph.input.extend(inputs)
    del graph.value_info[:]
