"""A node of an ONNX graph, and what is computed on values that are known while torch traces: shapes, constants.

Known values are NumPy arrays; a dimension that torch.export leaves open makes one of dtype object with a SymInt in it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.errors import UnsupportedError

INSTEAD: Mapping[str, str] = {
    "NonMaxSuppression": "Leave it outside of the model: export the boxes and scores",
    "NonZero": "Compute with a mask (Where) instead: the shape of its result depends on the data",
    "Unique": "Leave it outside of the model: the shape of its result depends on the data",
    "Compress": "Compute with a mask (Where) instead: the shape of its result depends on the data",
    "If": "Export the branch that is used: conditions are not converted",
    "Loop": "Unroll the loop when exporting to ONNX",
    "Scan": "Unroll the loop when exporting to ONNX",
    "RNN": "Use LSTM or GRU, or unroll the loop when exporting to ONNX",
    "LpPool": "Use Pow, AveragePool and Pow",
    "MatMulInteger": "Give the float model: portcall quantizes it",
    "ConvInteger": "Give the float model: portcall quantizes it",
    "QLinearConv": "Give the float model, or one with QuantizeLinear and DequantizeLinear",
    "QLinearMatMul": "Give the float model, or one with QuantizeLinear and DequantizeLinear",
    "DynamicQuantizeLinear": "Give the float model: portcall quantizes it",
}
"""Operators without an equivalent here -> what would replace them."""


@dataclass
class Node:
    """An ONNX node, its attributes as Python values (tensors as arrays)."""

    name: str
    op_type: str
    domain: str
    opset: int
    inputs: List[str]
    outputs: List[str]
    attributes: Dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(node: Any, opset: int, number: int) -> Node:
        import onnx

        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
        domain = "" if node.domain == "ai.onnx" else node.domain
        name = node.name or f"{node.op_type}_{number}"
        return Node(name, node.op_type, domain, opset, list(node.input), list(node.output), plain)

    def get(self, name: str, default: Any) -> Any:
        return self.attributes.get(name, default)

    def uses(self, output: int) -> bool:
        """Tell whether the node has output number *output*."""
        return len(self.outputs) > output and bool(self.outputs[output])

    def refused(self, what: str = "", fix: str = "") -> UnsupportedError:
        """Return the error for a node that cannot be converted; *what* is wrong with it, or its operator is unknown."""
        kind = f"{self.domain or 'ai.onnx'}.{self.op_type}"
        instead = INSTEAD.get(
            self.op_type, "Replace that node by standard operators, or export with onnxruntime"
        )
        return UnsupportedError(
            f"node {self.name!r} ({kind}, operator set {self.opset}) has no equivalent in torch"
            + (f": {what}" if what else ""),
            fix or instead,
        )

    def ints(self, value: Any, what: str) -> List[Any]:
        """Return a known value as a list of integers. Raises UnsupportedError where it is computed from data."""
        return [i if is_symbol(i) else int(i) for i in self.known(value, what).reshape(-1).tolist()]

    def known(self, value: Any, what: str) -> Any:
        """Return a value that is known while tracing. Raises UnsupportedError where it is computed from data."""
        if not is_known(value):
            raise self.refused(f"its {what} is computed from data", f"Give {what} as a constant")
        return value

    def axes(self, value: Any = None, default: Optional[Sequence[int]] = None) -> Optional[List[int]]:
        """Return the axes, an attribute in older operator sets and an input in newer ones."""
        if value is not None:
            return self.ints(value, "axes")
        found = self.get("axes", default)
        return None if found is None else [int(a) for a in found]

    def sizes(self, tensor: Any) -> List[Any]:
        """Return the sizes of a tensor as Python integers (SymInt where open), under torch.jit.trace too."""
        return [d if is_symbol(d) else int(d) for d in tensor.shape]

    def constant(self) -> Any:
        """Return the value of a Constant."""
        import numpy as np

        for name, value in self.attributes.items():
            if name == "value":
                return as_array(value, Path())
            if name in ("value_float", "value_floats"):
                return np.asarray(value, np.float32)
            if name in ("value_int", "value_ints"):
                return np.asarray(value, np.int64)
        raise self.refused("its value is neither a number nor a tensor")

    def reshaped(self, shape: Sequence[Any], wanted: Sequence[Any]) -> List[Any]:
        """Return the shape that Reshape makes: 0 keeps a dimension, unless allowzero is set."""
        keep = not self.get("allowzero", 0)
        return [shape[i] if keep and not is_symbol(d) and d == 0 else d for i, d in enumerate(wanted)]

    def slices(self, sizes: Sequence[Any], *values: Any) -> List[Tuple[int, Any, Any, int]]:
        """Return what Slice takes: (axis, start, end, step) 0 <= start; of the flipped axis if step < 0."""
        if self.opset < 10:
            starts, ends = list(self.get("starts", ())), list(self.get("ends", ()))
            axes, steps = self.get("axes", None), None
        else:
            starts, ends = self.ints(values[0], "starts"), self.ints(values[1], "ends")
            axes = self.ints(values[2], "axes") if len(values) > 2 and values[2] is not None else None
            steps = self.ints(values[3], "steps") if len(values) > 3 and values[3] is not None else None
        found = []
        for i, axis in enumerate(range(len(starts)) if axes is None else axes):
            axis, step = int(axis) % len(sizes), 1 if steps is None else steps[i]
            start, end, size = starts[i], ends[i], sizes[axis]
            if is_symbol(start) or is_symbol(end) or is_symbol(size):
                if step < 0:
                    raise self.refused(
                        "it runs backwards along a dynamic dimension", "Give a fixed size: --shape"
                    )
                end = size if not is_symbol(end) and end >= 2**31 - 1 else end
            else:
                start, end, _ = slice(start, end, step).indices(size)
                if step < 0:
                    start, end = size - 1 - start, size - 1 - end
            found.append((axis, start, end, step))
        return found

    def parts(self, size: int, split: Any) -> List[int]:
        """Return the sizes of the parts that Split makes of an axis."""
        given = self.get("split", None) if split is None else self.ints(split, "split")
        if given is not None:
            return [int(s) for s in given]
        count = int(self.get("num_outputs", len(self.outputs)))
        part = -(-size // count)
        return [part] * (count - 1) + [size - part * (count - 1)]


def is_known(value: Any) -> bool:
    import numpy as np

    return isinstance(value, np.ndarray)


def is_symbol(value: Any) -> bool:
    """Tell whether *value* is a dimension that torch.export leaves open."""
    return type(value).__name__ == "SymInt"


def as_array(tensor: Any, folder: Path) -> Any:
    """Return a TensorProto's value: an array, or a torch tensor for bfloat16, which NumPy does not have.

    4-bit integers come as 8-bit ones.
    """
    import numpy as np
    import onnx
    import torch

    array = onnx.numpy_helper.to_array(tensor, str(folder))
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return array.astype(np.int8 if tensor.data_type == onnx.TensorProto.INT4 else np.uint8)
    if array.dtype.kind not in "biuf":
        raise UnsupportedError(
            f"constant {tensor.name!r} is {onnx.TensorProto.DataType.Name(tensor.data_type)}, which is not converted",
            "Use float32, float16, bfloat16 or integers",
        )
    return array


def as_tensor(value: Any) -> Any:
    """Return a known value as a tensor."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if value.dtype == object:
        flat = [torch.scalar_tensor(v, dtype=torch.int64) for v in value.reshape(-1).tolist()]
        return torch.stack(flat).reshape(value.shape) if flat else torch.zeros(value.shape, dtype=torch.int64)
    unsigned = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(value.dtype.name)
    array = np.require(value if unsigned is None else value.astype(unsigned), requirements=["C", "W"])
    return torch.from_numpy(array.copy() if array is value else array)


def _sizes(values: Sequence[Any]) -> Any:
    """Return dimensions as an array."""
    import numpy as np

    return np.array(values, dtype=object if any(map(is_symbol, values)) else np.int64)


def _settled(array: Any) -> Any:
    """Return an array of dtype object as int64 where no open dimension is left in it."""
    import numpy as np

    if isinstance(array, np.ndarray) and array.dtype != object:
        return array
    if not isinstance(array, np.ndarray) and not is_symbol(array) and not isinstance(array, int):
        return np.asarray(array)
    array = np.asarray(array, dtype=object)
    return array if any(map(is_symbol, array.reshape(-1).tolist())) else array.astype(np.int64)


def static_operators() -> Dict[str, Callable[..., Any]]:
    """Return what is computed on known values: op_type -> (node, *values) -> array, or None where one is a tensor."""
    import numpy as np

    def shape(node: Node, x: Any) -> Any:
        sizes = list(x.shape) if is_known(x) else node.sizes(x)
        return _sizes(sizes[slice(node.get("start", 0), node.get("end", None))])

    def size(node: Node, x: Any) -> Any:
        return _sizes([int(np.prod(shape(node, x), dtype=object))]).reshape(())

    def on_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(node: Node, *values: Any) -> Any:
            if not values or not all(value is None or is_known(value) for value in values):
                return None
            found = function(node, *values)
            if isinstance(found, tuple):
                return tuple(map(_settled, found))
            return None if found is None else _settled(found)

        return run

    binary: Dict[str, Callable[..., Any]] = {
        "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divided,
        "Equal": np.equal, "Less": np.less, "Greater": np.greater, "LessOrEqual": np.less_equal,
        "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or,
    }  # fmt: skip
    unary: Dict[str, Callable[..., Any]] = {
        "Identity": lambda a: a, "Neg": np.negative, "Floor": np.floor, "Ceil": np.ceil, "Not": np.logical_not,
        "Sqrt": np.sqrt, "Abs": np.abs,
    }  # fmt: skip
    found: Dict[str, Callable[..., Any]] = {
        "Cast": lambda n, a: a if a.dtype == object else a.astype(_numpy_type(n, n.get("to", 1))),
        "Concat": lambda n, *a: np.concatenate(a, n.get("axis", 0)),
        "Gather": lambda n, a, i: np.take(a, i.astype(np.int64), n.get("axis", 0)),
        "Reshape": lambda n, a, s: a.reshape(n.reshaped(a.shape, n.ints(s, "shape"))),
        "Transpose": lambda n, a: a.transpose(n.get("perm", None)),
        "Squeeze": lambda n, a, *x: np.squeeze(a, None if n.axes(*x) is None else tuple(n.axes(*x) or ())),
        "Unsqueeze": lambda n, a, *x: np.expand_dims(a, tuple(n.axes(*x) or ())),
        "Slice": _sliced,
        "Split": lambda n, a, *s: _split(n, a, *s),
        "Expand": lambda n, a, s: _expanded(a, s),
        "Where": lambda n, c, a, b: np.where(c, a, b),
        "Mod": lambda n, a, b: np.fmod(a, b) if n.get("fmod", 0) else np.mod(a, b),
        "Pow": lambda n, a, b: np.power(a, b.astype(a.dtype)),
        "Max": lambda n, *a: functools.reduce(np.maximum, a),
        "Min": lambda n, *a: functools.reduce(np.minimum, a),
        "Tile": lambda n, a, r: np.tile(a, tuple(r.tolist())),
        "Range": _range,
        "Constant": lambda n: n.constant(),
        "ConstantOfShape": _filled,
        "ReduceProd": lambda n, a, *x: _reduced(n, np.prod, a, *x),
        "ReduceSum": lambda n, a, *x: _reduced(n, np.sum, a, *x),
        "ReduceMax": lambda n, a, *x: _reduced(n, np.max, a, *x),
        "ReduceMin": lambda n, a, *x: _reduced(n, np.min, a, *x),
        "DequantizeLinear": _dequantized_bias,
    }
    found.update({name: (lambda n, a, b, f=f: f(a, b)) for name, f in binary.items()})
    found.update({name: (lambda n, a, f=f: f(a)) for name, f in unary.items()})
    known = {name: on_arrays(function) for name, function in found.items()}
    return {**known, "Shape": shape, "Size": size, "Constant": lambda node: _settled(node.constant())}


def _divided(a: Any, b: Any) -> Any:
    """Divide; integers truncate towards zero."""
    import numpy as np

    if a.dtype.kind == "f":
        return np.divide(a, b)
    if object in (a.dtype, b.dtype):
        return a // b  # sizes are not negative
    return np.trunc(np.divide(a, b)).astype(a.dtype) if np.any(a < 0) or np.any(b < 0) else a // b


def _numpy_type(node: Node, number: int) -> Any:
    import onnx

    try:
        return onnx.helper.tensor_dtype_to_np_dtype(number)
    except KeyError:
        raise node.refused(f"type {number} is not known", "Cast to float32 or an integer") from None


def _sliced(node: Node, array: Any, *values: Any) -> Any:
    import numpy as np

    for axis, start, end, step in node.slices(array.shape, *values):
        array = np.flip(array, axis) if step < 0 else array
        array = array[(slice(None),) * axis + (slice(start, end, abs(step)),)]
    return array


def _split(node: Node, array: Any, split: Any = None) -> Any:
    import numpy as np

    axis = node.get("axis", 0)
    ends = np.cumsum(node.parts(array.shape[axis], split))[:-1]
    return tuple(np.split(array, ends, axis))


def _expanded(array: Any, shape: Any) -> Any:
    import numpy as np

    if shape.dtype == object:
        return None
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(shape.tolist())))


def _range(node: Node, start: Any, limit: Any, delta: Any) -> Any:
    import numpy as np

    if object in (start.dtype, limit.dtype, delta.dtype):
        return None
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _filled(node: Node, shape: Any) -> Any:
    import numpy as np

    if shape.dtype == object:
        return None
    value = (
        as_array(node.attributes["value"], Path()) if "value" in node.attributes else np.zeros(1, np.float32)
    )
    return np.full(shape.tolist(), value.item(), value.dtype)


def _reduced(node: Node, function: Any, array: Any, axes: Any = None) -> Any:
    along = node.axes(axes)
    if not along and node.get("noop_with_empty_axes", 0):
        return array
    return function(array, axis=tuple(along) if along else None, keepdims=bool(node.get("keepdims", 1)))


def _dequantized_bias(node: Node, array: Any, scale: Any, zero_point: Any = None) -> Any:
    """Return a constant int32 bias as floats; weights stay integers, for the converter to see."""
    import numpy as np

    if array.dtype != np.int32:
        return None
    scale = scale.reshape([-1 if scale.size > 1 else 1, *[1] * (array.ndim - 1)]) if array.ndim else scale
    return (array * scale).astype(scale.dtype)
