"""Operators of Core ML's MIL in NumPy: elementwise, activations and reductions.

A table gives MIL's operator name -> a function of its inputs by MIL's names. float16 comes in as float32, and what
comes out is rounded to the type that the program declares: see ``_mil``. Defaults of optional inputs are filled in by
coremltools, so that they are stated here only where they are None.
Source: the specifications in coremltools 9.0, ``converters/mil/mil/ops/defs``; tests compare each with torch or with
its closed form.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Optional

Array = Any
Operator = Callable[..., Any]


def operators() -> Dict[str, Operator]:
    """Return every operator of this file by its MIL name."""
    return {**_elementwise(), **_activations(), **_reductions()}


def _elementwise() -> Mapping[str, Operator]:
    import numpy as np

    return {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul": lambda x, y: x * y,
        "real_div": real_div,
        "floor_div": lambda x, y: np.floor_divide(x, y),
        "mod": lambda x, y: np.mod(x, y),
        "pow": lambda x, y: np.power(x, y),
        "maximum": lambda x, y: np.maximum(x, y),
        "minimum": lambda x, y: np.minimum(x, y),
        "equal": lambda x, y: np.equal(x, y),
        "not_equal": lambda x, y: np.not_equal(x, y),
        "greater": lambda x, y: np.greater(x, y),
        "greater_equal": lambda x, y: np.greater_equal(x, y),
        "less": lambda x, y: np.less(x, y),
        "less_equal": lambda x, y: np.less_equal(x, y),
        "logical_and": lambda x, y: np.logical_and(x, y),
        "logical_or": lambda x, y: np.logical_or(x, y),
        "logical_xor": lambda x, y: np.logical_xor(x, y),
        "logical_not": lambda x: np.logical_not(x),
        "abs": lambda x: np.abs(x),
        "acos": lambda x: np.arccos(x),
        "asin": lambda x: np.arcsin(x),
        "atan": lambda x: np.arctan(x),
        "atanh": lambda x: np.arctanh(x),
        "cast": cast,
        "ceil": lambda x: np.ceil(x),
        "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
        "cos": lambda x: np.cos(x),
        "cosh": lambda x: np.cosh(x),
        "erf": lambda x: erf(x),
        "exp": lambda x: np.exp(x),
        "exp2": lambda x: np.exp2(x),
        "floor": lambda x: np.floor(x),
        "identity": lambda x: x,
        "inverse": lambda x, epsilon: 1 / (x + epsilon),
        "log": lambda x, epsilon: np.log(x + epsilon),
        "round": lambda x: np.rint(x),
        "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
        "select": lambda cond, a, b: np.where(cond, a, b),
        "sign": lambda x: np.sign(x),
        "sin": lambda x: np.sin(x),
        "sinh": lambda x: np.sinh(x),
        "sqrt": lambda x: np.sqrt(x),
        "square": lambda x: x * x,
        "tan": lambda x: np.tan(x),
        "tanh": lambda x: np.tanh(x),
        "threshold": lambda x, alpha: np.maximum(x, alpha),
    }


def _activations() -> Mapping[str, Operator]:
    import numpy as np

    def softplus(x: Array) -> Array:
        return np.logaddexp(x, np.float32(0))

    return {
        "clamped_relu": lambda x, alpha, beta: np.minimum(beta, np.where(x >= 0, x, alpha * x)),
        "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
        "gelu": gelu,
        "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
        "linear_activation": lambda x, alpha, beta: alpha * x + beta,
        "prelu": lambda x, alpha: np.where(x >= 0, x, _channels(alpha, x) * x),
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "scaled_tanh": lambda x, alpha, beta: alpha * np.tanh(beta * x),
        "sigmoid": sigmoid,
        "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
        "silu": lambda x: x * sigmoid(x),
        "softmax": softmax,
        "softplus": softplus,
        "softplus_parametric": lambda x, alpha, beta: _channels(alpha, x) * softplus(_channels(beta, x) * x),
        "softsign": lambda x: x / (1 + np.abs(x)),
        "thresholded_relu": lambda x, alpha: np.where(x >= alpha, x, 0),
    }


def _reductions() -> Mapping[str, Operator]:
    import numpy as np

    def reduction(function: Operator) -> Operator:
        def reduce(x: Array, keep_dims: bool, axes: Optional[Array] = None) -> Array:
            chosen = None if axes is None else tuple(int(a) for a in np.ravel(axes))
            return function(x, axis=chosen, keepdims=bool(keep_dims))

        return reduce

    def position(function: Operator) -> Operator:
        def reduce(x: Array, axis: int, keep_dims: bool, output_dtype: Optional[str] = None) -> Array:
            return function(x, axis=int(axis), keepdims=bool(keep_dims))

        return reduce

    def log_sum_exp(x: Array, **over: Any) -> Array:
        largest = np.max(x, axis=over["axis"], keepdims=True)
        total = np.log(np.sum(np.exp(x - largest), **over))
        return total + largest.reshape(total.shape)

    return {
        "reduce_argmax": position(np.argmax),
        "reduce_argmin": position(np.argmin),
        "reduce_l1_norm": reduction(lambda x, **over: np.sum(np.abs(x), **over)),
        "reduce_l2_norm": reduction(lambda x, **over: np.sqrt(np.sum(x * x, **over))),
        "reduce_log_sum": reduction(lambda x, **over: np.log(np.sum(x, **over))),
        "reduce_log_sum_exp": reduction(log_sum_exp),
        "reduce_max": reduction(np.max),
        "reduce_mean": reduction(np.mean),
        "reduce_min": reduction(np.min),
        "reduce_prod": reduction(np.prod),
        "reduce_sum": reduction(np.sum),
        "reduce_sum_square": reduction(lambda x, **over: np.sum(x * x, **over)),
    }


def real_div(x: Array, y: Array) -> Array:
    """Return x / y; of integers the quotient cut to an integer by the declared type."""
    import numpy as np

    return np.divide(x, y)


def cast(x: Array, dtype: str) -> Array:
    """Return *x* as *dtype* ("fp16", "fp32", "int32", "bool", ...); a float loses its fraction."""
    import numpy as np

    names = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}
    return np.asarray(x).astype(names.get(dtype, dtype))


def erf(x: Array) -> Array:
    """Return the error function of *x*."""
    import numpy as np
    import torch

    return torch.erf(torch.from_numpy(np.array(x, np.float32))).numpy()


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), without overflow for large negative *x*."""
    import numpy as np

    return np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + 1)


def gelu(x: Array, mode: str) -> Array:
    """Return x * P(X <= x) of a standard normal X, or one of its approximations. Source: iOS15 ``gelu``."""
    import numpy as np

    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    return 0.5 * x * (1 + erf(x / np.float32(np.sqrt(2))))


def softmax(x: Array, axis: int) -> Array:
    import numpy as np

    powers = np.exp(x - np.max(x, axis=int(axis), keepdims=True))
    return powers / np.sum(powers, axis=int(axis), keepdims=True)


def _channels(vector: Array, x: Array) -> Array:
    """Return a value per channel in a shape that multiplies *x* along axis 1."""
    import numpy as np

    return np.reshape(vector, (1, -1) + (1,) * (x.ndim - 2))
