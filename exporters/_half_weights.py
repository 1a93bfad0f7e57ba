"""Weights rounded to float16 or bfloat16 so that the sum of every output channel's weights hardly changes.

What a layer reads after a Relu has a mean far from zero: rounding to nearest then shifts the mean of each output
channel by the sum of its weights' errors times that mean, and on EfficientNet-Lite0 that shift is most of the error.
So as few roundings as it takes go the other way until the errors of a channel cancel, the cheapest first. Source: the
flipping of C. Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation" (ICLR 2022),
by output channel; here the distance to the next value differs from weight to weight.
"""

from __future__ import annotations

from typing import Any, Dict

LARGEST = 65504.0
"""Of float16; weights beyond it are left to whoever converts them."""

SMALL = 32
"""Elements of a tensor that is not worth storing in 16 bits."""

FLIPS_PER_ROOT = 4
"""Of n weights about 0.3 sqrt(n) roundings have to go the other way; more than 4 sqrt(n) + 32 are not tried."""


def round_weights(model: Any) -> None:
    """Round the weights of an ONNX model so, in place; they stay float32, and casting them to float16 is exact."""
    import numpy as np
    import onnx

    axes = channel_axes(model.graph)
    for tensor in model.graph.initializer:
        if tensor.name not in axes or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        weight = onnx.numpy_helper.to_array(tensor)
        if np.abs(weight).max(initial=0) < LARGEST:
            values = rounded(weight, "fp16", axes[tensor.name]).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def store(model: Any) -> None:
    """Store the weights of an ONNX model in float16, rounded so, with a Cast to float32 before their readers.

    The arithmetic stays float32: ONNX Runtime folds the casts when it loads the file. Tensors of less than SMALL
    elements (bounds, scales of a Resize, epsilons) and those beyond float16 stay as they are.
    """
    import numpy as np
    import onnx

    round_weights(model)
    fixed = {v.name for v in [*model.graph.input, *model.graph.output]}
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name in fixed:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < SMALL or not np.abs(values).max() < LARGEST:
            continue
        name, stored = tensor.name, f"{tensor.name}_fp16"
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), stored))
        cast = onnx.helper.make_node("Cast", [stored], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT)
        casts.append(cast)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def channel_axes(graph: Any) -> Dict[str, int]:
    """Return the axis of the output channels of each weight that has one: name of the initializer -> axis.

    Left out are weights that products read along different axes, batches of matrices and grouped ConvTranspose.
    """
    from portcall.exporters._operands import WEIGHTED, attribute, channel_axis

    ranks = {t.name: len(t.dims) for t in graph.initializer}
    found: Dict[str, int] = {}
    unclear = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in ranks:
                continue
            rank = ranks[name]
            grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1
            if node.op_type not in WEIGHTED or index != 1 or rank < 2 or grouped:
                continue
            axis = channel_axis(node) % rank
            if (node.op_type == "MatMul" and rank != 2) or found.setdefault(name, axis) != axis:
                unclear.add(name)
    return {name: axis for name, axis in found.items() if name not in unclear}


def rounded(weight: Any, precision: str, axis: int) -> Any:
    """Return float32 *weight* in the half type, the sum along all axes but *axis* kept as far as that goes."""
    import numpy as np

    from portcall.exporters import _half

    moved = np.moveaxis(weight, axis, 0)
    exact = moved.reshape(len(moved), -1).astype(np.float64)
    nearest = _half.to_half(exact.astype(np.float32), precision)
    other = _neighbour(nearest, exact)
    values, flipped = nearest.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):  # beyond the largest value there is no neighbour
        step = flipped - values
        cost = ((flipped - exact) ** 2 - (values - exact) ** 2) / np.abs(step)
    total = (values - exact).sum(1)
    # An exact zero stays one: a pruned model keeps its zeros, and a flip away from 0 is the cheapest of all.
    cost[~np.isfinite(cost) | (step * total[:, None] >= 0) | (exact == 0)] = np.inf
    tries = min(exact.shape[1], int(FLIPS_PER_ROOT * exact.shape[1] ** 0.5) + 32)
    order = np.argsort(cost, axis=1, kind="stable")[:, :tries]
    rows = np.arange(len(exact))
    result = nearest.copy()
    for column in order.T:
        better = np.isfinite(cost[rows, column])
        changed = total + np.where(better, step[rows, column], 0.0)
        better &= np.abs(changed) < np.abs(total)
        result[rows[better], column[better]] = other[rows[better], column[better]]
        total = np.where(better, changed, total)
    return np.moveaxis(result.reshape(moved.shape), 0, axis)


def _neighbour(nearest: Any, exact: Any) -> Any:
    """Return the value of the half type on the other side of *exact* than *nearest*.

    Both half types have 16 bits: sign and magnitude, so that the next larger magnitude is the next integer.
    """
    import numpy as np

    bits = nearest.view(np.int16).astype(np.int32)
    magnitude, negative = bits & 0x7FFF, bits < 0
    up = exact > nearest.astype(np.float64)
    outwards = np.where(magnitude == 0, True, up != negative)
    sign = np.where(magnitude == 0, ~up, negative)
    moved = np.where(outwards, magnitude + 1, magnitude - 1)
    return np.where(sign, moved | 0x8000, moved).astype(np.uint16).view(nearest.dtype)
