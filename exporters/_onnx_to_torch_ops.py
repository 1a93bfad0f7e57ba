"""ONNX operators as torch ones: arithmetic, reductions, quantization; others: ..._moving, ..._nn, ..._resize.

Each function takes its node, then its inputs: tensors, or known arrays at the positions that its Operator names.
Sources: ONNX's Operators.md; each is compared with ONNX Runtime by tests/exporters/test_onnx_to_torch.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Tuple

if TYPE_CHECKING:
    from portcall.exporters._onnx_to_torch_node import Node


class Operator(NamedTuple):
    """A function of (node, *inputs), and the positions of inputs that it takes as they are: known arrays."""

    function: Callable[..., Any]
    static: Tuple[int, ...] = ()

    def is_static(self, position: int) -> bool:
        return position in self.static


def operators() -> Dict[str, Operator]:
    """Return every operator by its ONNX name."""
    from portcall.exporters import _onnx_to_torch_moving, _onnx_to_torch_nn, _onnx_to_torch_resize

    tables = [_elementwise(), _reductions(), _OTHERS, _onnx_to_torch_moving.OPERATORS]
    tables += [_onnx_to_torch_nn.OPERATORS, _onnx_to_torch_resize.OPERATORS]
    return {
        name: Operator(*entry) if isinstance(entry, tuple) else Operator(entry)
        for table in tables
        for name, entry in table.items()
    }


def _elementwise() -> Dict[str, Any]:
    import torch

    functional = torch.nn.functional
    same = {  # by one name in torch
        "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Add": torch.add, "And": torch.logical_and,
        "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil,
        "Cos": torch.cos, "Cosh": torch.cosh, "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp,
        "Floor": torch.floor, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "HardSwish": functional.hardswish,
        "IsNaN": torch.isnan, "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log,
        "MatMul": torch.matmul, "Mish": functional.mish, "Mul": torch.mul, "Neg": torch.neg,
        "Not": torch.logical_not, "Or": torch.logical_or, "Reciprocal": torch.reciprocal, "Relu": torch.relu,
        "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
        "Softplus": functional.softplus, "Softsign": functional.softsign, "Sqrt": torch.sqrt, "Sub": torch.sub,
        "Tan": torch.tan, "Tanh": torch.tanh, "Where": torch.where, "Xor": torch.ne,
        "Linear": functional.linear,
    }  # fmt: skip
    found: Dict[str, Any] = {k: (lambda n, *values, f=f: f(*values)) for k, f in same.items()}
    found.update({
        "Celu": lambda n, x: functional.celu(x, n.get("alpha", 1.0)),
        "Elu": lambda n, x: functional.elu(x, n.get("alpha", 1.0)),
        "Identity": lambda n, x: x,
        "LeakyRelu": lambda n, x: functional.leaky_relu(x, n.get("alpha", 0.01)),
        "Max": lambda n, *values: _folded(torch.maximum, values),
        "Mean": lambda n, *values: _folded(torch.add, values) / len(values),
        "Min": lambda n, *values: _folded(torch.minimum, values),
        "Sum": lambda n, *values: _folded(torch.add, values),
        "ThresholdedRelu": lambda n, x: torch.where(x > n.get("alpha", 1.0), x, torch.zeros_like(x)),
        "BitwiseAnd": lambda n, a, b: torch.bitwise_and(a, b),
        "BitwiseOr": lambda n, a, b: torch.bitwise_or(a, b),
        "BitwiseNot": lambda n, a: torch.bitwise_not(a),
        "CastLike": lambda n, x, like: x.to(like.dtype),
    })  # fmt: skip
    return found


def _folded(function: Callable[[Any, Any], Any], values: Any) -> Any:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


def _divide(node: Node, a: Any, b: Any) -> Any:
    """Divide; integers truncate towards zero."""
    import torch

    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _modulo(node: Node, a: Any, b: Any) -> Any:
    import torch

    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def _power(node: Node, x: Any, exponent: Any) -> Any:
    import torch

    from portcall.exporters._onnx_to_torch_node import as_tensor, is_known

    if is_known(exponent) and exponent.size == 1 and exponent.ndim <= x.dim() and x.is_floating_point():
        return torch.pow(x, float(exponent.reshape(())))
    return torch.pow(x, as_tensor(exponent)).to(x.dtype)


def _clip(node: Node, x: Any, low: Any = None, high: Any = None) -> Any:
    import torch

    from portcall.exporters._onnx_to_torch_node import is_known

    numbers = [node.get("min", None), node.get("max", None)]
    for i, (value, function) in enumerate(((low, torch.maximum), (high, torch.minimum))):
        if is_known(value):
            numbers[i] = value.reshape(()).item()
        elif value is not None:
            x = function(x, value)
    if numbers == [0.0, 6.0]:
        return torch.nn.functional.relu6(x)
    return x if numbers == [None, None] else torch.clamp(x, *numbers)


def _prelu(node: Node, x: Any, slope: Any) -> Any:
    import torch

    sizes = node.sizes(slope)
    one_per_channel = x.dim() >= 2 and sizes == [node.sizes(x)[1], *[1] * (x.dim() - 2)]
    if slope.numel() == 1 or one_per_channel:
        return torch.nn.functional.prelu(x, slope.reshape(-1))
    return torch.where(x > 0, x, x * slope)


def _hard_sigmoid(node: Node, x: Any) -> Any:
    import torch

    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return torch.nn.functional.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _selu(node: Node, x: Any) -> Any:
    import torch

    alpha, gamma = node.get("alpha", 1.6732631921768188), node.get("gamma", 1.0507010221481323)
    if abs(alpha - 1.6732631921768188) < 1e-6 and abs(gamma - 1.0507010221481323) < 1e-6:
        return torch.selu(x)
    return gamma * torch.nn.functional.elu(x, alpha)


def _gelu(node: Node, x: Any) -> Any:
    import torch

    return torch.nn.functional.gelu(x, approximate=node.get("approximate", "none"))


def _softmax(node: Node, x: Any) -> Any:
    """Softmax and LogSoftmax; before operator set 13 over all axes from *axis* on."""
    import torch

    function = torch.log_softmax if node.op_type == "LogSoftmax" else torch.softmax
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.dim()
    if axis == x.dim() - 1:
        return function(x, -1)
    sizes = node.sizes(x)
    return function(x.flatten(axis), -1).reshape(sizes)


def _is_inf(node: Node, x: Any) -> Any:
    import torch

    if not node.get("detect_negative", 1):
        return torch.eq(x, float("inf"))
    return torch.isinf(x) if node.get("detect_positive", 1) else torch.eq(x, -float("inf"))


def _cast(node: Node, x: Any) -> Any:
    return x.to(torch_type(node, node.get("to", 1)))


def torch_type(node: Node, number: int) -> Any:
    """Return the torch dtype of an ONNX element type."""
    import onnx
    import torch

    name = onnx.TensorProto.DataType.Name(number).lower()
    known = {"float": "float32", "double": "float64"}.get(name, name)
    found = getattr(torch, known, None)
    if not isinstance(found, torch.dtype) or known.startswith("float8"):
        raise node.refused(f"torch has no arithmetic on {name}", "Cast to float32 or an integer")
    return found


def _gemm(node: Node, a: Any, b: Any, c: Any = None) -> Any:
    import torch

    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.transpose(0, 1) if node.get("transA", 0) else a
    b = b if node.get("transB", 0) else b.transpose(0, 1)
    plain = c is None or (beta == 1.0 and c.numel() == c.shape[-1:].numel() == b.shape[0])
    if alpha == 1.0 and plain:
        return torch.nn.functional.linear(a, b, None if c is None else c.reshape(-1))
    product = torch.nn.functional.linear(a, b)
    product = product if alpha == 1.0 else alpha * product
    return product if c is None else product + (c if beta == 1.0 else beta * c)


def _reductions() -> Dict[str, Any]:
    import torch

    functions: Dict[str, Callable[..., Any]] = {
        "ReduceSum": lambda x, axes: torch.sum(x, axes, keepdim=True, dtype=x.dtype),
        "ReduceMean": lambda x, axes: torch.mean(x, axes, keepdim=True),
        "ReduceMax": lambda x, axes: torch.amax(x, axes, keepdim=True),
        "ReduceMin": lambda x, axes: torch.amin(x, axes, keepdim=True),
        "ReduceL1": lambda x, axes: torch.sum(torch.abs(x), axes, keepdim=True),
        "ReduceL2": lambda x, axes: torch.sqrt(torch.sum(x * x, axes, keepdim=True)),
        "ReduceLogSum": lambda x, axes: torch.log(torch.sum(x, axes, keepdim=True)),
        "ReduceLogSumExp": lambda x, axes: torch.logsumexp(x, axes, keepdim=True),
        "ReduceSumSquare": lambda x, axes: torch.sum(x * x, axes, keepdim=True),
        "ReduceProd": _product,
    }
    return {
        name: ((lambda n, x, axes=None, f=f: reduced(n, f, x, axes)), (1,)) for name, f in functions.items()
    }


def _product(x: Any, axes: List[int]) -> Any:
    import torch

    for axis in axes:
        x = torch.prod(x, axis, keepdim=True, dtype=x.dtype)
    return x


def reduced(node: Node, function: Callable[..., Any], x: Any, axes: Any = None) -> Any:
    """Reduce with the axes kept, and drop them by a reshape: LiteRT's converter transposes for anything else."""
    along = node.axes(axes)
    if not along and node.get("noop_with_empty_axes", 0):
        return x
    sizes = node.sizes(x)
    along = sorted({a % len(sizes) for a in along}) if along else list(range(len(sizes)))
    result = function(x, along) if along else x
    if node.get("keepdims", 1):
        return result
    return result.reshape([d for axis, d in enumerate(sizes) if axis not in along])


def _arg_extreme(node: Node, x: Any) -> Any:
    import torch

    axis = node.get("axis", 0) % x.dim()
    last = node.get("select_last_index", 0)
    x = torch.flip(x, (axis,)) if last else x
    function = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    found = function(x, axis, keepdim=bool(node.get("keepdims", 1)))
    return node.sizes(x)[axis] - 1 - found if last else found


def _top_k(node: Node, x: Any, k: Any) -> Any:
    import torch

    [count] = node.ints(k, "k")
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    return tuple(torch.topk(x, count, node.get("axis", -1), largest, ordered))


def _cumulative_sum(node: Node, x: Any, axis: Any) -> Any:
    import torch

    [along] = node.ints(axis, "axis")
    x = torch.flip(x, (along,)) if node.get("reverse", 0) else x
    result = torch.cumsum(x, along, dtype=x.dtype)
    result = result - x if node.get("exclusive", 0) else result
    return torch.flip(result, (along,)) if node.get("reverse", 0) else result


def _einsum(node: Node, *operands: Any) -> Any:
    import torch

    return torch.einsum(node.get("equation", ""), *operands)


# quantization: operators of torch's quantized_decomposed, which both converters know


def _quantization(node: Node, scale: Any, zero_point: Any) -> Tuple[Any, Any, Any]:
    """Return scale and zero point as arrays of one shape, and the type of the integers."""
    import numpy as np
    import torch
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers the operators

    if node.get("block_size", 0):
        raise node.refused(f"its block_size is {node.get('block_size', 0)}", "Use a scale per axis")
    scale = node.known(scale, "scale")
    number = node.get("output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
    if zero_point is None:
        dtype = torch_type(node, number) if number else torch.uint8
        return scale, np.zeros(scale.shape, np.int64), dtype
    zero_point = node.known(zero_point, "zero point")
    names = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
    if zero_point.dtype.name not in names:
        raise node.refused(f"its integers are {zero_point.dtype}", "Use int8, uint8, int16 or int32")
    return scale, zero_point.astype(np.int64), names[zero_point.dtype.name]


def quantize(node: Node, x: Any, scale: Any, zero_point: Any = None) -> Any:
    """QuantizeLinear: per tensor, or per index of *axis*."""
    import torch

    scale, zero_point, dtype = _quantization(node, scale, zero_point)
    limits = torch.iinfo(dtype)
    ops = torch.ops.quantized_decomposed
    if scale.size == 1:
        return ops.quantize_per_tensor(
            x, float(scale.reshape(())), int(zero_point.reshape(())), limits.min, limits.max, dtype
        )
    scales, zeros = torch.from_numpy(scale.copy()), torch.from_numpy(zero_point)
    axis = node.get("axis", 1) % x.dim()
    return ops.quantize_per_channel(x, scales, zeros, axis, limits.min, limits.max, dtype)


def dequantize(node: Node, x: Any, scale: Any, zero_point: Any = None) -> Any:
    """DequantizeLinear: per tensor, or per index of *axis*."""
    import torch

    scale, zero_point, _ = _quantization(node, scale, zero_point)
    limits = torch.iinfo(x.dtype)
    ops = torch.ops.quantized_decomposed
    if scale.size == 1:
        return ops.dequantize_per_tensor(
            x, float(scale.reshape(())), int(zero_point.reshape(())), limits.min, limits.max, x.dtype
        )
    scales, zeros = torch.from_numpy(scale.copy()), torch.from_numpy(zero_point)
    axis = node.get("axis", 1) % x.dim()
    return ops.dequantize_per_channel(x, scales, zeros, axis, limits.min, limits.max, x.dtype)


_OTHERS: Dict[str, Any] = {
    "ArgMax": _arg_extreme,
    "ArgMin": _arg_extreme,
    "Cast": _cast,
    "Clip": (_clip, (1, 2)),
    "CumSum": (_cumulative_sum, (1,)),
    "DequantizeLinear": (dequantize, (1, 2)),
    "Div": _divide,
    "Einsum": _einsum,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "HardSigmoid": _hard_sigmoid,
    "IsInf": _is_inf,
    "LogSoftmax": _softmax,
    "Mod": _modulo,
    "PRelu": _prelu,
    "Pow": (_power, (1,)),
    "QuantizeLinear": (quantize, (1, 2)),
    "Selu": _selu,
    "Softmax": _softmax,
    "TopK": (_top_k, (1,)),
}
