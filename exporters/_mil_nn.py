"""Operators of Core ML's MIL that have weights or windows: convolution, pooling, normalization, products.

Convolutions, pools and products run in torch, in float32 whatever the program's type: see ``_mil_ops``.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

Array = Any


def operators() -> Dict[str, Callable[..., Any]]:
    """Return every operator of this file by its MIL name."""
    return dict(_OPERATORS)


def _tensor(array: Array) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _window_pads(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pad_type: str,
    pad: Optional[Array],
) -> List[Tuple[int, int]]:
    """Return the padding before and after every spatial axis. Source: iOS15 ``conv``, ``pad_type``.

    same: the output has ceil(size / stride) elements, the odd one of the padding lies behind; same_lower: before.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        flat = [0] * (2 * len(sizes)) if pad is None else [int(p) for p in pad]
        return list(zip(flat[::2], flat[1::2]))
    pairs = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        small = total // 2
        pairs.append((small, total - small) if pad_type == "same" else (total - small, small))
    return pairs


def _padded(x: Any, pairs: Sequence[Tuple[int, int]], value: float = 0.0) -> Any:
    import torch

    flat = [p for pair in reversed(pairs) for p in pair]
    return torch.nn.functional.pad(x, flat, value=value) if any(flat) else x


def conv(
    x: Array,
    weight: Array,
    strides: Array,
    pad_type: str,
    pad: Array,
    dilations: Array,
    groups: int,
    bias: Optional[Array] = None,
) -> Array:
    """x [n, c_in, *d], weight [c_out, c_in / groups, *k]: 1, 2 or 3 spatial axes."""
    import torch

    steps, spread = [int(s) for s in strides], [int(d) for d in dilations]
    pairs = _window_pads(x.shape[2:], weight.shape[2:], steps, spread, pad_type, pad)
    functions = (torch.conv1d, torch.conv2d, torch.conv3d)
    offset = None if bias is None else _tensor(bias)
    windowed = _padded(_tensor(x), pairs)
    function = functions[x.ndim - 3]
    found = function(windowed, _tensor(weight), offset, stride=steps, dilation=spread, groups=int(groups))
    return found.numpy()


def conv_transpose(
    x: Array,
    weight: Array,
    strides: Array,
    pad_type: str,
    pad: Array,
    dilations: Array,
    groups: int,
    bias: Optional[Array] = None,
    output_shape: Optional[Array] = None,
) -> Array:
    """x [n, c_in, *d], weight [c_in, c_out / groups, *k]. The padding is cut off the full result."""
    import torch

    steps, spread = [int(s) for s in strides], [int(d) for d in dilations]
    functions = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    function = functions[x.ndim - 3]
    full = function(_tensor(x), _tensor(weight), None, stride=steps, dilation=spread, groups=int(groups))
    spatial = full.shape[2:]
    flat = [0] * (2 * len(spatial)) if pad is None or pad_type != "custom" else [int(p) for p in pad]
    before = flat[::2]
    sizes = [f - b - e for f, b, e in zip(spatial, before, flat[1::2])]
    if pad_type in ("same", "same_lower"):
        sizes = [d * s for d, s in zip(x.shape[2:], steps)]
        cut = [f - n for f, n in zip(spatial, sizes)]
        before = [c // 2 if pad_type == "same" else c - c // 2 for c in cut]
    if output_shape is not None:
        sizes = [int(d) for d in output_shape[2:]]
    missing = [(0, max(0, b + n - f)) for b, n, f in zip(before, sizes, spatial)]
    full = _padded(full, missing)
    for axis, (b, n) in enumerate(zip(before, sizes)):
        full = full.narrow(axis + 2, b, n)
    if bias is not None:
        full = full + _tensor(bias).reshape(-1, *[1] * len(spatial))
    return full.contiguous().numpy()


def _pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array,
    pad_type: str,
    pad: Optional[Array],
    ceil_mode: bool,
    value: float,
) -> Tuple[Any, List[Tuple[int, int]], List[int], List[int], List[int]]:
    """Return *x* padded with *value*, its padding, the kernel, the strides and what ceil_mode adds behind."""
    kernel, steps = [int(k) for k in kernel_sizes], [int(s) for s in strides]
    pairs = _window_pads(x.shape[2:], kernel, steps, [1] * len(kernel), pad_type, pad)
    extra = [0] * len(kernel)
    if ceil_mode:
        for axis, (size, k, s, (b, e)) in enumerate(zip(x.shape[2:], kernel, steps, pairs)):
            count = -(-(size + b + e - k) // s) + 1
            count -= (
                count - 1
            ) * s >= size + b  # the last window begins in the input or the padding before it
            extra[axis] = max(0, (count - 1) * s + k - size - b - e)
    wide = [(b, e + more) for (b, e), more in zip(pairs, extra)]
    return _padded(_tensor(x), wide, value), pairs, kernel, steps, extra


def max_pool(
    x: Array, kernel_sizes: Array, strides: Array, pad_type: str, pad: Array, ceil_mode: bool
) -> Array:
    import torch.nn.functional as F

    wide, _, kernel, steps, _ = _pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode, float("-inf"))
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return function(wide, kernel, steps).numpy()


def avg_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array,
    pad_type: str,
    pad: Array,
    exclude_padding_from_average: bool,
    ceil_mode: bool,
) -> Array:
    """Average over windows; what ceil_mode adds never counts, the padding only where it is not excluded."""
    import torch
    import torch.nn.functional as F

    wide, pairs, kernel, steps, extra = _pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    ones = torch.ones((1, 1, *x.shape[2:]))
    counted = _padded(ones, pairs, 0.0 if exclude_padding_from_average else 1.0)
    counted = _padded(counted, [(0, more) for more in extra])
    return (function(wide, kernel, steps) / function(counted, kernel, steps)).numpy()


def l2_pool(
    x: Array, kernel_sizes: Array, strides: Array, pad_type: str, pad: Array, ceil_mode: bool
) -> Array:
    import math

    import torch.nn.functional as F

    wide, _, kernel, steps, _ = _pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return (function(wide * wide, kernel, steps) * math.prod(kernel)).sqrt().numpy()


def linear(x: Array, weight: Array, bias: Optional[Array] = None) -> Array:
    """x [..., i], weight [o, i]."""
    import torch

    return torch.nn.functional.linear(
        _tensor(x), _tensor(weight), None if bias is None else _tensor(bias)
    ).numpy()


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    import numpy as np

    left, right = _tensor(x), _tensor(y)
    if transpose_x and left.ndim > 1:
        left = left.transpose(-1, -2)
    if transpose_y and right.ndim > 1:
        right = right.transpose(-1, -2)
    return np.asarray((left @ right).numpy())


def einsum(values: Sequence[Array], equation: str) -> Array:
    import torch

    return torch.einsum(equation, *map(_tensor, values)).contiguous().numpy()


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Optional[Array] = None
) -> Array:
    """softmax(query key' / sqrt(d) + mask) value; a boolean mask tells what takes part. Source: iOS18."""
    import torch

    mask = None if attn_mask is None else _tensor(attn_mask)
    q, k, v = map(_tensor, (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).numpy()


# Normalization: x times a scale plus an offset, as the formula says, in float32.


def _broadcast(vector: Optional[Array], axis: int, rank: int, default: float) -> Array:
    import numpy as np

    if vector is None:
        return np.float32(default)
    return np.reshape(vector, (-1,) + (1,) * (rank - axis - 1))


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    epsilon: float,
    gamma: Optional[Array] = None,
    beta: Optional[Array] = None,
) -> Array:
    import numpy as np

    m, v = (_broadcast(a, 1, x.ndim, 0.0) for a in (mean, variance))
    g, b = _broadcast(gamma, 1, x.ndim, 1.0), _broadcast(beta, 1, x.ndim, 0.0)
    return (x - m) / np.sqrt(v + epsilon) * g + b


def instance_norm(
    x: Array, epsilon: float, gamma: Optional[Array] = None, beta: Optional[Array] = None
) -> Array:
    import numpy as np

    axes = tuple(range(2, x.ndim))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    variance = np.mean(centred * centred, axis=axes, keepdims=True)
    g, b = _broadcast(gamma, 1, x.ndim, 1.0), _broadcast(beta, 1, x.ndim, 0.0)
    return centred / np.sqrt(variance + epsilon) * g + b


def layer_norm(
    x: Array,
    epsilon: float,
    axes: Optional[Array] = None,
    gamma: Optional[Array] = None,
    beta: Optional[Array] = None,
) -> Array:
    """Normalize over *axes* (None: all); gamma and beta have the shape of those axes."""
    import numpy as np

    over = tuple(range(x.ndim)) if axes is None else tuple(sorted(int(a) % x.ndim for a in axes))
    centred = x - np.mean(x, axis=over, keepdims=True)
    variance = np.mean(centred * centred, axis=over, keepdims=True)
    result = centred / np.sqrt(variance + epsilon)
    full = [x.shape[a] if a in over else 1 for a in range(x.ndim)]
    result = result if gamma is None else result * np.reshape(gamma, full)
    return result if beta is None else result + np.reshape(beta, full)


def l2_norm(x: Array, epsilon: float) -> Array:
    """Divide by the length of the last three axes together."""
    import numpy as np

    return x / np.sqrt(np.sum(x * x, axis=(-3, -2, -1), keepdims=True) + epsilon)


def local_response_norm(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    import torch

    found = torch.nn.functional.local_response_norm(
        _tensor(x), int(size), float(alpha), float(beta), float(k)
    )
    return found.numpy()


_OPERATORS: Dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        avg_pool,
        batch_norm,
        conv,
        conv_transpose,
        einsum,
        instance_norm,
        l2_norm,
        l2_pool,
        layer_norm,
        linear,
        local_response_norm,
        matmul,
        max_pool,
        scaled_dot_product_attention,
    )
}
