"""ONNX layers as torch ones (convolution, pooling, normalization, recurrence): see ``_onnx_to_torch_ops``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

if TYPE_CHECKING:
    from portcall.exporters._onnx_to_torch_node import Node

Pairs = List[Tuple[int, int]]


def _window(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> Tuple[List[int], List[int], Pairs]:
    """Return strides, dilations and the padding before and after each spatial axis."""
    rank = len(kernel)
    strides = list(node.get("strides", None) or [1] * rank)
    dilations = list(node.get("dilations", None) or [1] * rank)
    flat = node.get("pads", None) or [0] * (2 * rank)
    mode = node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return strides, dilations, [(0, 0)] * rank
    if mode == "NOTSET":
        return strides, dilations, list(zip(flat[:rank], flat[rank:]))
    pairs = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        pairs.append(_halves(total, mode))
    return strides, dilations, pairs


def _halves(total: int, mode: str) -> Tuple[int, int]:
    """Return the padding before and after; the odd one lies behind, for SAME_LOWER in front."""
    small = total // 2
    return (total - small, small) if mode == "SAME_LOWER" else (small, total - small)


def _padded(x: Any, pairs: Pairs, value: float = 0.0) -> Any:
    import torch

    flat = [p for pair in reversed(pairs) for p in pair]
    return torch.nn.functional.pad(x, flat, value=value) if any(flat) else x


def _conv(node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
    kernel = node.sizes(weight)[2:]
    strides, dilations, pairs = _window(node, node.sizes(x)[2:], kernel)
    symmetric = all(before == after for before, after in pairs)
    padding = [before for before, _ in pairs] if symmetric else [0] * len(kernel)
    x = x if symmetric else _padded(x, pairs)
    function = _by_rank(node, "conv{}d", len(kernel))
    return function(x, weight, bias, strides, padding, dilations, node.get("group", 1))


def _by_rank(node: Node, name: str, rank: int) -> Any:
    """Return torch's function for 1, 2 or 3 spatial axes."""
    import torch

    found = getattr(torch.nn.functional, name.format(rank), None)
    if found is None:
        raise node.refused(f"it has {rank} spatial axes", "Use 1, 2 or 3 spatial axes")
    return found


def _conv_transpose(node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
    """Transposed convolution; padding is cut off afterwards: LiteRT's operator knows none."""
    kernel = node.sizes(weight)[2:]
    rank, sizes, group = len(kernel), node.sizes(x)[2:], node.get("group", 1)
    strides, dilations, pairs = _window(node, sizes, kernel)
    extra = list(node.get("output_padding", None) or [0] * rank)
    wanted, mode = node.get("output_shape", None), node.get("auto_pad", "NOTSET")
    if wanted is not None or mode.startswith("SAME"):
        wanted = [size * s for size, s in zip(sizes, strides)] if wanted is None else list(wanted)[-rank:]
        pairs = []
        for size, s, k, d, e, w in zip(sizes, strides, kernel, dilations, extra, wanted):
            total = s * (size - 1) + e + (k - 1) * d + 1 - w
            # The odd one lies in front except for SAME_UPPER.
            pairs.append(_halves(total, "SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER"))
    function = _by_rank(node, "conv_transpose{}d", rank)
    if min(map(min, pairs)) < 0:
        raise node.refused("its output_shape is larger than what it makes", "Use output_padding")
    x = function(x, weight, bias, strides, [0] * rank, extra, group, dilations)
    for axis, (before, after) in enumerate(pairs, 2):
        x = x[(slice(None),) * axis + (slice(before, node.sizes(x)[axis] - after),)]
    return x


def _pool_ends(
    node: Node, sizes: Sequence[int], kernel: Sequence[int]
) -> Tuple[List[int], List[int], Pairs, Pairs]:
    """Return strides, dilations, the padding, and the padding that makes every window whole (ceil_mode).

    A window that would begin in the padding behind is left out, as in torch and ONNX Runtime. The last value is
    negative behind where windows leave elements over.
    """
    strides, dilations, pairs = _window(node, sizes, kernel)
    whole = []
    for size, k, s, d, (before, after) in zip(sizes, kernel, strides, dilations, pairs):
        room = size + before + after - ((k - 1) * d + 1)
        count = (-(-room // s) if node.get("ceil_mode", 0) else room // s) + 1
        if node.get("ceil_mode", 0) and (count - 1) * s >= size + before:
            count -= 1
        whole.append((before, (count - 1) * s + (k - 1) * d + 1 - size - before))
    return strides, dilations, pairs, whole


def _max_pool(node: Node, x: Any) -> Any:
    if node.uses(1):
        raise node.refused("its indices are used", "Leave out the second output")
    import torch

    kernel = list(node.get("kernel_shape", ()))
    strides, dilations, pairs, whole = _pool_ends(node, node.sizes(x)[2:], kernel)
    function = _by_rank(node, "max_pool{}d", len(kernel))
    small = all(before == after <= k // 2 for (before, after), k in zip(pairs, kernel))
    if small and not node.get("ceil_mode", 0):
        return function(x, kernel, strides, [b for b, _ in pairs], dilations)
    lowest = -float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    x = _padded(x, [(before, max(0, after)) for before, after in whole], lowest)
    return function(x, kernel, strides, 0, dilations)


def _average_pool(node: Node, x: Any) -> Any:
    """Average pooling; where torch counts other elements, the sum is divided by counts that are known."""
    import numpy as np
    import torch

    kernel, sizes = list(node.get("kernel_shape", ())), node.sizes(x)[2:]
    strides, dilations, pairs, whole = _pool_ends(node, sizes, kernel)
    if any(d != 1 for d in dilations):
        raise node.refused(f"its dilations are {dilations}", "Use dilations of 1")
    function, included = _by_rank(node, "avg_pool{}d", len(kernel)), bool(node.get("count_include_pad", 0))
    small = all(before == after <= k // 2 for (before, after), k in zip(pairs, kernel))
    if small and not node.get("ceil_mode", 0):
        return function(x, kernel, strides, [b for b, _ in pairs], False, included)
    total = function(_padded(x, [(b, max(0, a)) for b, a in whole]), kernel, strides)
    factor = np.ones((), np.float64)
    for size, k, s, (before, after), (_, end) in zip(sizes, kernel, strides, pairs, whole):
        starts = np.arange((size + before + end - k) // s + 1) * s - before
        low, high = (-before, size + after) if included else (0, size)
        counts = np.minimum(starts + k, high) - np.maximum(starts, low)
        factor = factor[..., None] * (k / counts)
    return total * torch.from_numpy(factor).to(x.dtype)


def _global_pool(node: Node, x: Any) -> Any:
    import torch

    axes = list(range(2, x.dim()))
    if node.op_type == "GlobalMaxPool":
        return torch.amax(x, axes, keepdim=True)
    return torch.mean(x, axes, keepdim=True)


def _batch_normalization(node: Node, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
    import torch

    if node.get("training_mode", 0) or node.uses(1):
        raise node.refused("it is in training mode", "Export the model in evaluation mode")
    return torch.nn.functional.batch_norm(
        x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5)
    )


def _layer_normalization(node: Node, x: Any, scale: Any, bias: Any = None) -> Any:
    import torch

    if node.uses(1) or node.uses(2):
        raise node.refused("its mean or deviation is used", "Compute them with ReduceMean")
    axis = node.get("axis", -1) % x.dim()
    sizes, epsilon = node.sizes(x)[axis:], node.get("epsilon", 1e-5)
    if list(scale.shape) == sizes and (bias is None or list(bias.shape) == sizes):
        return torch.nn.functional.layer_norm(x, sizes, scale, bias, epsilon)
    result = torch.nn.functional.layer_norm(x, sizes, None, None, epsilon) * scale
    return result if bias is None else result + bias


def _instance_normalization(node: Node, x: Any, scale: Any, bias: Any) -> Any:
    import torch

    epsilon = node.get("epsilon", 1e-5)
    return torch.nn.functional.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


def _group_normalization(node: Node, x: Any, scale: Any, bias: Any) -> Any:
    """Before operator set 21 scale and bias are per group, then per channel."""
    import torch

    groups, channels = node.get("num_groups", 1), node.sizes(x)[1]
    if node.opset < 21 and groups != channels:
        scale = scale.repeat_interleave(channels // groups)
        bias = bias.repeat_interleave(channels // groups)
    return torch.nn.functional.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


def _lp_normalization(node: Node, x: Any) -> Any:
    import torch

    axis = node.get("axis", -1)
    norm = x.abs().sum(axis, True) if node.get("p", 2) == 1 else torch.sqrt((x * x).sum(axis, True))
    return x / norm


def _local_response(node: Node, x: Any) -> Any:
    import torch

    size = node.get("size", 1)
    if size % 2 == 0:
        raise node.refused(f"its size is {size}", "Use an odd size")
    values = (node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0))
    return torch.nn.functional.local_response_norm(x, size, *values)


def _mean_variance(node: Node, x: Any) -> Any:
    import torch

    axes = list(node.get("axes", [0, 2, 3]))
    centered = x - x.mean(axes, keepdim=True)
    return centered / (torch.sqrt((centered * centered).mean(axes, keepdim=True)) + 1e-9)


def _grid_sample(node: Node, x: Any, grid: Any) -> Any:
    import torch

    mode = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest"}.get(
        node.get("mode", "linear")
    )
    if mode is None or x.dim() != 4:
        raise node.refused(f"mode {node.get('mode', 'linear')} on {x.dim()} axes", "Use linear on four axes")
    corners, padding = bool(node.get("align_corners", 0)), node.get("padding_mode", "zeros")
    return torch.nn.functional.grid_sample(x, grid, mode, padding, corners)


def _recurrent(node: Node, x: Any, weight: Any, recurrence: Any, bias: Any = None, *rest: Any) -> Any:
    """LSTM and GRU of torch: gates are put into torch's order (i, f, g, o; r, z, n)."""
    import numpy as np
    import torch

    lstm = node.op_type == "LSTM"
    lengths, initial, cell, peepholes = [*rest, None, None, None, None][:4]
    hidden, direction = node.get("hidden_size", recurrence.shape[2]), node.get("direction", "forward")
    refusals = {
        "peepholes": peepholes is not None, "a clip": "clip" in node.attributes, "layout 1": node.get("layout", 0),
        "other activations": "activations" in node.attributes and not _usual(node, lstm),
        "input_forget": node.get("input_forget", 0), "sequence_lens": lengths is not None,
        "linear_before_reset 0": not lstm and not node.get("linear_before_reset", 0),
    }  # fmt: skip
    for what, found in refusals.items():
        if found:
            raise node.refused(f"it has {what}", "Leave that out: torch's layer does not have it")
    order = [0, 2, 3, 1] if lstm else [1, 0, 2]
    weights = []
    for number in range(recurrence.shape[0]):
        halves = [weight[number], recurrence[number]]
        if bias is not None:
            halves += list(np.split(bias[number], 2))
        weights += [np.concatenate([np.split(half, len(order))[i] for i in order]) for half in halves]
    tensors = [torch.from_numpy(np.ascontiguousarray(w)) for w in weights]
    steps, batch, _ = node.sizes(x)
    count = recurrence.shape[0]
    zeros = torch.zeros([count, batch, hidden], dtype=x.dtype)
    states = [zeros if state is None else state for state in ([initial, cell] if lstm else [initial])]
    backwards = direction == "reverse"
    x = torch.flip(x, (0,)) if backwards else x
    settings = (bias is not None, 1, 0.0, False, count == 2, False)
    if lstm:
        result, *last = torch._VF.lstm(x, states, tensors, *settings)
    else:
        result, *last = torch._VF.gru(x, states[0], tensors, *settings)
    result = torch.flip(result, (0,)) if backwards else result
    return (result.reshape([steps, batch, count, hidden]).transpose(1, 2), *last)


def _usual(node: Node, lstm: bool) -> bool:
    """Tell whether the activations are those of torch."""
    usual = [b"Sigmoid", b"Tanh", b"Tanh"] if lstm else [b"Sigmoid", b"Tanh"]
    return all(name == usual[i % len(usual)] for i, name in enumerate(node.get("activations", ())))


OPERATORS: Dict[str, Any] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GRU": (_recurrent, (1, 2, 3)),
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _local_response,
    "LSTM": (_recurrent, (1, 2, 3)),
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MaxPool": _max_pool,
    "MeanVarianceNormalization": _mean_variance,
}
