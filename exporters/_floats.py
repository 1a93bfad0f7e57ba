"""What the two kinds of float graphs have in common for ``debug``: rounding of weights, layers, cuts.

A float graph is run whole, and in cuts: every operator on the values that an artifact shows as its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Collection, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Shown

MOVING = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Concat", "Split", "Slice"),
        *(
            "Resize",
            "Pad",
            "Gather",
            "Identity",
            "Expand",
            "Tile",
            "DepthToSpace",
            "SpaceToDepth",
            "Max",
            "Min",
        ),
        *(
            "RESHAPE",
            "TRANSPOSE",
            "SQUEEZE",
            "EXPAND_DIMS",
            "MAX_POOL_2D",
            "CONCATENATION",
            "SPLIT",
            "SPLIT_V",
        ),
        *("SLICE", "STRIDED_SLICE", "PAD", "PADV2", "GATHER", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"),
        *("PACK", "UNPACK", "DEPTH_TO_SPACE", "SPACE_TO_DEPTH", "BROADCAST_TO", "TILE", "REVERSE_V2"),
        *("MAXIMUM", "MINIMUM"),
    }
)
"""Operators that move values: quantizers let their inputs and outputs share one scale."""


@dataclass(frozen=True)
class Rounding:
    """How an artifact rounds constants. bits: of weights, 0 for floats of type *half* ("" for float32).

    block: inputs that share a scale. constants: what is added or multiplied elsewhere is rounded to 8 bits as well.
    """

    bits: int = 0
    half: str = ""
    per_channel: bool = True
    symmetric: bool = True
    block: int = 0
    constants: bool = False

    def is_none(self) -> bool:
        return not self.bits and not self.half

    def weight(self, values: Any, axis: int, sum_axis: Optional[int] = None) -> Any:
        """Return a weight (float32, any shape) rounded; *axis* is its channels', *sum_axis* what is summed over."""
        import numpy as np

        from portcall.calibration import weights

        if self.half == "fp16":
            return values.astype(np.float16).astype(np.float32)
        if self.half == "bf16":
            return rounded_bf16(values)
        if self.block and self.bits == 4 and sum_axis is not None and values.ndim == 2:
            return weights.quantize(values, 4, True, sum_axis, self.block).dequantize()
        channel = axis if self.per_channel else None
        return weights.quantize(values, 8, self.symmetric, channel).dequantize()

    def constant(self, values: Any) -> Any:
        """Return another constant rounded: 8 bits over its own range, which contains zero."""
        from portcall.calibration import weights

        if not self.constants or values.size == 0:
            return values
        return weights.quantize(values, 8, symmetric=False).dequantize()


def rounded_bf16(values: Any) -> Any:
    """Return float32 *values* rounded to bfloat16, half to even."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32).reshape(np.shape(values))


@dataclass(frozen=True)
class Layer:
    """Where a tensor comes from in the source model.

    name: a module path ("layer2.0.conv1") or the node of an ONNX source. group: all layers that one operator of the
    artifact holds (convolution, batch normalization, activation). operator: its type.
    """

    name: str
    group: Tuple[str, ...]
    operator: str


class FloatGraph:
    """A float graph: see ``_floats_onnx`` and ``_floats_tflite``.

    tensors: its float tensors in the order of the graph, inputs first. outputs: of the source -> its tensor here.
    made_from: a tensor -> the tensors that its operator reads. layers, axes (of the channels; None for
    none): by tensor. ties: tensors that a quantizer may give one scale -> the number of their group.
    """

    tensors: Sequence[str]
    inputs: Sequence[str]
    outputs: Mapping[str, str]
    made_from: Mapping[str, Sequence[str]]
    layers: Mapping[str, Layer]
    axes: Mapping[str, Optional[int]]
    ties: Mapping[str, int]
    constant_adders: Mapping[str, float]
    """Tensors that come from an operator with a further constant, which a quantizer rounds in its own way."""

    interpolated: FrozenSet[str] = frozenset()
    """Tensors that come from a function which integer kernels interpolate in a table."""

    def run(self, arrays: Mapping[str, Any]) -> Dict[str, Any]:
        """Return every float tensor for one sample (source input name -> array)."""
        raise NotImplementedError

    def cut(self, shown: Sequence[Shown], rounding: Rounding, dynamic: bool) -> Cut:
        """Return the graph cut at the tensors *shown*, with its weights rounded.

        dynamic: what products with constant weights read in floats is rounded to 8 bits at run time.
        """
        raise NotImplementedError

    def fake_quantized(
        self, grids: Mapping[str, Tuple[float, float, float]], rounding: Rounding
    ) -> FloatGraph:
        """Return the graph with rounded weights and tensors: name -> (scale, minimum, maximum) of its grid."""
        raise NotImplementedError


class Cut:
    """A float graph that takes the value of each tensor from an artifact."""

    def run(self, arrays: Mapping[str, Any], values: Sequence[Any]) -> List[Any]:
        """Return each shown tensor as recomputed from *values* (in the order of what is shown) before it."""
        raise NotImplementedError


def segment(graph: FloatGraph, tensor: str, shown: Collection[str]) -> List[str]:
    """Return *tensor* and what lies between it and the shown tensors before it: one fused operator of an artifact."""
    found, waiting = [tensor], [tensor]
    while waiting:
        for name in graph.made_from.get(waiting.pop(), ()):
            if name not in shown and name not in found:
                found.append(name)
                waiting.append(name)
    return found


def source_of(
    name: str, operator: str, shown: Sequence[Shown], by_name: Mapping[str, Sequence[int]]
) -> Optional[int]:
    """Return the number of the shown value of tensor *name* that *operator* reads; None where none is shown."""
    numbers = by_name.get(name, ())
    for number in numbers:
        if operator in shown[number].readers:
            return number
    quantized = [n for n in numbers if shown[n].scale is not None]
    return next(iter([*quantized, *numbers]), None)


def on_grid(values: Any, grid: Optional[Tuple[float, float, float]]) -> Any:
    """Return *values* rounded to a grid (scale, minimum, maximum), or as they are."""
    import numpy as np

    if grid is None:
        return values
    scale, low, high = grid
    return (np.rint(np.clip(values, low, high) / scale) * scale).astype(np.float32)


def eight_bits(values: Any) -> Any:
    """Return *values* rounded to 256 levels of their own range, which contains zero."""
    import numpy as np

    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    return (np.rint(values / scale) * scale).astype(np.float32)


def groups(pairs: Sequence[Sequence[str]]) -> Dict[str, int]:
    """Return tensor -> number of its group, where the tensors of each of *pairs* belong together."""
    parent: Dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for names in pairs:
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    roots = {r: number for number, r in enumerate(dict.fromkeys(map(root, list(parent))))}
    return {name: roots[root(name)] for name in list(parent)}
