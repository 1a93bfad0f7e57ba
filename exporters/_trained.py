"""The quantization that a model was trained with: read from the Q/DQ pairs of an ONNX graph, kept, or taken off.

A pair is QuantizeLinear and DequantizeLinear (ONNX operator specification): x = (q - zero_point) * scale. Operators
that only move or choose elements may stand between the two. A constant behind a DequantizeLinear is a weight; an int32
one is a bias, whose scale follows from its layer's and is no parameter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import UnsupportedError

MOVING = (
    "Concat",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
"""Operators that give the values that they take, so that they compute on quantized integers as well."""
INTEGER_LIMITS: Mapping[str, Tuple[int, int]] = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
}


@dataclass(frozen=True)
class Quantization:
    """Scales (float32 values) and zero points: one, or one for every index of *axis*; integers from low to high."""

    scales: Tuple[float, ...]
    zero_points: Tuple[int, ...]
    low: int
    high: int
    axis: Optional[int] = None

    def is_symmetric_int8(self) -> bool:
        """Tell whether int8 with zero point 0 holds the same integers with the same scales (uint8 around 128 does)."""
        return all(low >= -128 and high <= 127 for low, high in self._centred())

    def _centred(self) -> List[Tuple[int, int]]:
        return [(self.low - z, self.high - z) for z in self.zero_points]

    def symmetric(self) -> Quantization:
        """Return the nearest int8 quantization with zero point 0: the same scale, or the one that reaches as far."""
        import numpy as np

        scales = []
        for scale, (low, high) in zip(self.scales, self._centred()):
            fits = low >= -128 and high <= 127
            scales.append(scale if fits else float(np.float32(max(-low, high) * scale / 127)))
        return Quantization(tuple(scales), (0,) * len(scales), -128, 127, self.axis)

    def as_int8(self) -> Quantization:
        """Return the same quantization on int8: the same scales, zero points moved along with unsigned integers."""
        shift = 128 if self.low == 0 and self.high == 255 else 0
        return replace(self, zero_points=tuple(z - shift for z in self.zero_points), low=-128, high=127)

    def half(self) -> Quantization:
        """Return it with its scales rounded to float16."""
        import numpy as np

        return replace(self, scales=tuple(float(np.float16(s)) for s in self.scales))

    def range(self) -> Range:
        """Return the range of a tensor with one scale, exact in float64."""
        [scale], [zero_point] = self.scales, self.zero_points
        return Range((self.low - zero_point) * scale, (self.high - zero_point) * scale)

    def to_json(self) -> Dict[str, Any]:
        return {
            "scale": list(self.scales) if self.axis is not None else self.scales[0],
            "zero_point": list(self.zero_points) if self.axis is not None else self.zero_points[0],
            "low": self.low,
            "high": self.high,
            "axis": self.axis,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Quantization:
        many = data["axis"] is not None
        scales, zeros = (
            (data["scale"], data["zero_point"]) if many else ([data["scale"]], [data["zero_point"]])
        )
        return Quantization(tuple(scales), tuple(zeros), data["low"], data["high"], data["axis"])

    def __str__(self) -> str:
        shown = [f"{s:.6g}" for s in self.scales[:1]]
        shown += [f"{self.scales[-1]:.6g}"] if len(self.scales) > 1 else []
        zeros = sorted(set(self.zero_points))
        zero = str(zeros[0]) if len(zeros) == 1 else f"{zeros[0]}..{zeros[-1]}"
        kind = next((k for k, v in INTEGER_LIMITS.items() if v == (self.low, self.high)), "integer")
        return f"{kind} scale {'..'.join(shown)} zero point {zero}"


@dataclass(frozen=True)
class Entry:
    """A trained tensor: an activation by its float name, a weight by the name of what its DequantizeLinear gives.

    layer: the ONNX node that computes the activation (an input's own name) or reads the weight.
    """

    tensor: str
    layer: str
    is_weight: bool
    quantization: Quantization

    @property
    def label(self) -> str:
        return f"{'weight' if self.is_weight else 'activation'} {self.tensor!r} of layer {self.layer!r}"

    def to_json(self) -> Dict[str, Any]:
        return {
            "tensor": self.tensor,
            "layer": self.layer,
            "is_weight": self.is_weight,
            "quantization": self.quantization.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Entry:
        quantization = Quantization.from_json(data["quantization"])
        return Entry(data["tensor"], data["layer"], data["is_weight"], quantization)


def is_quantized(model: Any) -> bool:
    """Tell whether an ONNX model quantizes activations: weights alone behind DequantizeLinear are storage."""
    return any(n.op_type == "QuantizeLinear" for n in model.graph.node)


def read(model: Any) -> List[Entry]:
    """Return the trained quantization of *model*, whose nodes are sorted, in the order of the graph.

    Raises UnsupportedError, naming the node, for scales that are computed, for integers of more than 8 bits, for a pair
    whose halves differ, and for operators that compute on integers between the two.
    """
    constants = _constants(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: Dict[str, Any] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, node)
    roots: Dict[str, str] = {}
    held: Dict[str, Quantization] = {}  # integers of the graph -> what they stand for
    entries: Dict[Tuple[str, Quantization], Entry] = {}
    for node in model.graph.node:
        kind = node.op_type
        if kind == "QuantizeLinear":
            name, found = node.input[0], _parameters(node, constants, True)
            assert found is not None
            root = roots.get(name, name)
            maker = makers.get(root)
            constant = root in constants
            layer = _first_product(node, readers) if constant else maker.name if maker is not None else root
            tensor = _pair_end(node, readers) if constant else root
            _check_bits(node, found)
            entries.setdefault((tensor, found), Entry(tensor, layer, constant, found))
            held[node.output[0]], roots[node.output[0]] = found, root
        elif kind == "DequantizeLinear":
            name, output = node.input[0], node.output[0]
            found = _parameters(node, constants, name not in held)
            if name in constants:
                if found is not None and not _is_bias(constants[name]):
                    _check_bits(node, found)
                    layer = readers[output].name if output in readers else node.name
                    entries[(output, found)] = Entry(output, layer, True, found)
            elif name not in held:
                raise UnsupportedError(
                    f"the integers that {node.name!r} dequantizes come from {_kind_of(makers, name)}",
                    "Quantize with QuantizeLinear/DequantizeLinear pairs (the Q/DQ format)",
                )
            elif found is not None and not _same(found, held[name]):
                raise UnsupportedError(
                    f"{node.name!r} dequantizes by {found}, and the integers are {held[name]}",
                    "Give both halves of the pair the same scale and zero point",
                )
            else:
                roots[output] = roots.get(name, name)
        elif any(name in held for name in node.input):
            if kind not in MOVING:
                raise UnsupportedError(
                    f"{node.name!r} ({kind}) computes on integers between QuantizeLinear and DequantizeLinear",
                    "Export the model in the Q/DQ format, with floats between the pairs",
                )
            source = next(name for name in node.input if name in held)
            held.update({name: held[source] for name in node.output})
    return list(entries.values())


def split(model: Any) -> List[Entry]:
    """Make the float model of *model* in place: pairs taken off, weights dequantized; return what was trained.

    A weight goes by the name of what its DequantizeLinear gave. Raises as ``read`` does.
    """
    from onnx import helper, numpy_helper

    entries = read(model)
    constants = _constants(model)
    graph = model.graph
    renamed: Dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            array = dequantized(node, constants)
            graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        elif node.op_type == "QuantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = quantized(node, constants)
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

    constants = _constants(model)
    graph = model.graph
    stored = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants]
    for node in stored:
        graph.initializer.append(numpy_helper.from_array(quantized(node, constants), node.output[0]))
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
    read(model)  # refuses what cannot be changed
    graph, constants = model.graph, _constants(model)
    for number, node in enumerate(graph.node):
        constant = node.op_type == "DequantizeLinear" and node.input[0] in constants
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        found = _parameters(node, constants, True)
        assert found is not None
        new = found.symmetric()
        if constant:
            integers = np.asarray(constants[node.input[0]]).astype(np.int64)
            shape = _shape_along(new.axis, integers.ndim)
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

    graph, constants = model.graph, _constants(model)
    for node in list(graph.node):
        if node.op_type == "DequantizeLinear" and _is_bias(constants.get(node.input[0])):
            graph.initializer.append(numpy_helper.from_array(dequantized(node, constants), node.output[0]))
            graph.node.remove(node)
    _finish(model)


def dequantized(node: Any, constants: Mapping[str, Any]) -> Any:
    """Return what a DequantizeLinear of a constant gives, as float32."""
    import numpy as np

    found = _parameters(node, constants, True)
    assert found is not None
    integers = np.asarray(constants[node.input[0]]).astype(np.int64)
    shape = _shape_along(found.axis, integers.ndim)
    scale = np.asarray(found.scales, np.float32).reshape(shape)
    zero = np.asarray(found.zero_points, np.int64).reshape(shape)
    return ((integers - zero).astype(np.float32) * scale).astype(np.float32)


def quantized(node: Any, constants: Mapping[str, Any]) -> Any:
    """Return the integers that a QuantizeLinear of a constant gives: rounded half to even, saturated (ONNX)."""
    import numpy as np

    found = _parameters(node, constants, True)
    assert found is not None
    _check_bits(node, found)
    values = np.asarray(constants[node.input[0]], np.float32)
    shape = _shape_along(found.axis, values.ndim)
    scale = np.asarray(found.scales, np.float32).reshape(shape)
    zero = np.asarray(found.zero_points, np.int64).reshape(shape)
    integers = np.clip(np.rint(values / scale) + zero, found.low, found.high)
    kind = constants[node.input[2]].dtype if len(node.input) > 2 and node.input[2] else np.dtype(np.uint8)
    return integers.astype(kind)


def _shape_along(axis: Optional[int], rank: int) -> Sequence[int]:
    return [1] * rank if axis is None else [-1 if a == axis else 1 for a in range(rank)]


def _constants(model: Any) -> Dict[str, Any]:
    from onnx import numpy_helper

    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def _is_bias(array: Any) -> bool:
    return array is not None and str(array.dtype) == "int32"


def _parameters(node: Any, constants: Mapping[str, Any], needed: bool) -> Optional[Quantization]:
    """Return the quantization of one half of a pair. Raises UnsupportedError where its scale is computed."""
    import numpy as np

    from portcall.exporters._operands import attribute

    names = [name for name in node.input[1:3] if name]
    computed = [name for name in names if name not in constants]
    if computed:
        raise UnsupportedError(
            f"{node.name!r} has a scale or zero point that is computed at run time: {computed[0]!r}",
            "Quantize statically, with constant scales",
        )
    if attribute(node, "block_size", 0):
        raise UnsupportedError(
            f"{node.name!r} has a scale per block of {attribute(node, 'block_size', 0)}",
            "Train with a scale per tensor or per channel",
        )
    scale = constants[node.input[1]].astype(np.float32)
    zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
    if zero is not None:
        kind = str(zero.dtype)
    elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
        kind = str(constants[node.input[0]].dtype)
    else:
        kind = {3: "int8", 4: "int16", 5: "int16"}.get(attribute(node, "output_dtype", 0), "uint8")
        if zero is None and node.op_type == "DequantizeLinear" and not needed:
            return None
    zeros = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
    low, high = INTEGER_LIMITS.get(kind, (-(1 << 31), (1 << 31) - 1))
    axis: Optional[int] = None
    if scale.size > 1 or scale.ndim:
        axis = int(attribute(node, "axis", 1))
        if scale.size == 1 and node.input[0] not in constants:
            axis = None
        rank = constants[node.input[0]].ndim if node.input[0] in constants else 0
        if axis is not None and rank:
            axis %= rank
            if scale.size == 1 and constants[node.input[0]].shape[axis] != 1:
                axis = None
    return Quantization(
        tuple(float(s) for s in scale.reshape(-1)),
        tuple(int(z) for z in zeros.reshape(-1)),
        low,
        high,
        axis,
    )


def _same(one: Quantization, other: Quantization) -> bool:
    return one.scales == other.scales and one.zero_points == other.zero_points


def _check_bits(node: Any, found: Quantization) -> None:
    if found.high > 255:
        raise UnsupportedError(
            f"{node.name!r} quantizes to more than 8 bits", "int8 exports take models trained for 8 bits"
        )


def _kind_of(makers: Mapping[str, Any], name: str) -> str:
    return f"{makers[name].name!r} ({makers[name].op_type})" if name in makers else f"the input {name!r}"


def _pair_end(node: Any, readers: Mapping[str, Any]) -> str:
    """Return what the DequantizeLinear after a QuantizeLinear of a constant gives."""
    back = readers.get(node.output[0])
    return str(back.output[0] if back is not None else node.output[0])


def _first_product(node: Any, readers: Mapping[str, Any]) -> str:
    reader = readers.get(_pair_end(node, readers))
    return str(reader.name if reader is not None else node.name)


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
