"""The quantization that a model was trained with: read from the Q/DQ pairs of an ONNX graph, kept, or taken off.

A pair is QuantizeLinear and DequantizeLinear (ONNX operator specification): x = (q - zero_point) * scale. Operators
that only move or choose elements may stand between the two. A constant behind a DequantizeLinear is a weight; an int32
one is a bias, whose scale follows from its layer's and is no parameter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    constants = constants_of(model)
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
            name, found = node.input[0], parameters(node, constants, True)
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
            found = parameters(node, constants, name not in held)
            if name in constants:
                if found is not None and not is_bias(constants[name]):
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


def dequantized(node: Any, constants: Mapping[str, Any]) -> Any:
    """Return what a DequantizeLinear of a constant gives, as float32."""
    import numpy as np

    found = parameters(node, constants, True)
    assert found is not None
    integers = np.asarray(constants[node.input[0]]).astype(np.int64)
    shape = shape_along(found.axis, integers.ndim)
    scale = np.asarray(found.scales, np.float32).reshape(shape)
    zero = np.asarray(found.zero_points, np.int64).reshape(shape)
    return ((integers - zero).astype(np.float32) * scale).astype(np.float32)


def quantized(node: Any, constants: Mapping[str, Any]) -> Any:
    """Return the integers that a QuantizeLinear of a constant gives: rounded half to even, saturated (ONNX)."""
    import numpy as np

    found = parameters(node, constants, True)
    assert found is not None
    _check_bits(node, found)
    values = np.asarray(constants[node.input[0]], np.float32)
    shape = shape_along(found.axis, values.ndim)
    scale = np.asarray(found.scales, np.float32).reshape(shape)
    zero = np.asarray(found.zero_points, np.int64).reshape(shape)
    integers = np.clip(np.rint(values / scale) + zero, found.low, found.high)
    kind = constants[node.input[2]].dtype if len(node.input) > 2 and node.input[2] else np.dtype(np.uint8)
    return integers.astype(kind)


def shape_along(axis: Optional[int], rank: int) -> Sequence[int]:
    return [1] * rank if axis is None else [-1 if a == axis else 1 for a in range(rank)]


def constants_of(model: Any) -> Dict[str, Any]:
    from onnx import numpy_helper

    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def is_bias(array: Any) -> bool:
    return array is not None and str(array.dtype) == "int32"


def parameters(node: Any, constants: Mapping[str, Any], needed: bool) -> Optional[Quantization]:
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
