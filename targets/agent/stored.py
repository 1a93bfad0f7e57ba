"""What every reader of model files shares: stored constants, the signs of their real values, sparsity patterns."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Sequence, Tuple

from portcall.targets.agent.contents import (
    CHANNELS,
    DENSE,
    STRUCTURAL_SHARE,
    TWO_OF_FOUR,
    UNSTRUCTURED,
    Weight,
)

IN_CHANNELS_SHARE = 0.95
"""Of a layer's zeros: so many lie in whole channels where the pattern is called that."""


class Stored(NamedTuple):
    """A constant as a file holds it: values: real numbers, or anything of the same signs, in *shape*."""

    tensor: str
    shape: Tuple[int, ...]
    dtype: str
    bits: int
    values: Any
    scale: Any = None
    zero_point: Any = None


def signs_of(values: Any, zero_point: Any = 0) -> Any:
    """Return int8 -1, 0 or 1 for every element; 0 only where *values* equal *zero_point* (NaN counts as 1)."""
    import numpy as np

    found = np.where(values < zero_point, np.int8(-1), np.int8(1))
    found[values == zero_point] = 0
    return found


def spread(parameter: Any, shape: Sequence[int], axis: Optional[int], block: int = 0) -> Any:
    """Return a scale or zero point so that it broadcasts against a tensor of *shape*.

    One element serves all. Else it lies along *axis*; with *block* it has the tensor's rank and every element stands
    for that many neighbours along *axis*.
    """
    import numpy as np

    array = np.asarray(parameter)
    if array.size == 1:
        return array.reshape(())
    if block:
        return np.repeat(array, block, axis or 0).take(np.arange(shape[axis or 0]), axis or 0)
    return array.reshape([-1 if i == (axis or 0) % len(shape) else 1 for i in range(len(shape))])


def integers(
    tensor: str,
    data: Any,
    scale: Any,
    zero_point: Any,
    axis: Optional[int],
    block: int,
    dtype: str,
    bits: int,
) -> Stored:
    """Return integers with their scales as a Stored whose values are the signs of the real ones."""
    import numpy as np

    wide = np.asarray(data).astype(np.int64)
    zero = (
        0 if zero_point is None else spread(np.asarray(zero_point).astype(np.int64), wide.shape, axis, block)
    )
    signs = signs_of(wide, zero)
    if scale is not None and np.any(np.asarray(scale) < 0):  # ONNX Runtime's MatMulNBits has negative scales
        turned = spread(np.asarray(scale) < 0, wide.shape, axis, block)
        signs = np.where(turned, -signs, signs)
    return Stored(tensor, tuple(wide.shape), dtype, bits, signs, scale, zero_point)


def unpacked(data: bytes, bits: int, count: int, signed: bool) -> Any:
    """Return *count* integers of *bits* bits, the lowest first: int8 or uint8 of rank 1."""
    import numpy as np

    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        found = raw[:count].copy()
    else:
        stream = np.unpackbits(raw, bitorder="little")[: bits * count].reshape(count, bits)
        found = np.packbits(stream, axis=1, bitorder="little")[:, 0]
    if not signed:
        return found
    moved = found.astype(np.int16)
    return np.where(moved >= 1 << (bits - 1), moved - (1 << bits), moved).astype(np.int8)


def weight(
    name: str,
    operator: str,
    stored: Stored,
    signs: Any,
    axes: Tuple[Optional[int], Optional[int]],
    groups: int = 1,
    macs: Optional[int] = None,
) -> Weight:
    """Return the description of one layer's weight.

    signs: of *stored*, in the order [outputs, inputs / groups, *kernel]. axes: of the output and the input channels in
    the stored shape.
    """
    import numpy as np

    signs = np.ascontiguousarray(signs_of(signs))
    if signs.ndim == 1:
        signs = signs[:, None]
    pattern, zero_outputs, zero_inputs = pattern_of(signs, groups)
    scale = None if stored.scale is None else np.asarray(stored.scale).astype(np.float64)
    zero = None if stored.zero_point is None else np.asarray(stored.zero_point).astype(np.int64)
    return Weight(
        name=name,
        operator=operator,
        tensor=stored.tensor,
        shape=stored.shape,
        dtype=stored.dtype,
        bits=stored.bits,
        elements=int(signs.size),
        zeros=int(signs.size - np.count_nonzero(signs)),
        pattern=pattern,
        output_axis=axes[0],
        input_axis=axes[1],
        zero_outputs=zero_outputs,
        zero_inputs=zero_inputs,
        scales=0 if scale is None else int(scale.size),
        scale_min=None if scale is None or not scale.size else float(scale.min()),
        scale_max=None if scale is None or not scale.size else float(scale.max()),
        zero_point=None if zero is None or not zero.size else (int(zero.min()), int(zero.max())),
        macs=macs,
        signs=signs,
    )


def pattern_of(signs: Any, groups: int = 1) -> Tuple[str, int, int]:
    """Return the sparsity pattern of a weight, and how many whole output and input channels are zero.

    signs: [outputs, inputs / groups, *kernel], 0 where the weight is exactly 0. The first of these that holds:

    - "channels": at least one whole output or input channel is zero, and at least 95 % of the zeros lie in such.
    - "2:4": at every output and kernel position, each group of 4 consecutive input channels (0 to 3, 4 to 7, ...) has
      at least 2 zeros; the number of input channels (of a group of the convolution) is a multiple of 4.
    - "unstructured": at least 10 % of the elements are zero.
    - "dense": fewer are.

    Source of 2:4: A. Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), section 3, along the axis that
    a product sums over.
    """
    import numpy as np

    zero = signs == 0
    total = int(np.count_nonzero(zero))
    if not total:
        return DENSE, 0, 0
    outputs, inputs = zero.shape[:2]
    split = groups if groups > 0 and outputs % groups == 0 else 1
    grouped = zero.reshape(split, outputs // split, inputs, -1)
    dead_outputs = grouped.all(axis=(2, 3))
    dead_inputs = grouped.all(axis=(1, 3))
    found = int(dead_outputs.sum()), int(dead_inputs.sum())
    whole = dead_outputs[:, :, None] | dead_inputs[:, None, :]
    held = int(whole.sum()) * grouped.shape[3]
    if held and held >= IN_CHANNELS_SHARE * total:
        return (CHANNELS, *found)
    if inputs % 4 == 0 and inputs:
        quarters = zero.reshape(outputs, inputs // 4, 4, -1).sum(axis=2)
        if int(quarters.min()) >= 2:
            return (TWO_OF_FOUR, *found)
    return (UNSTRUCTURED if total >= STRUCTURAL_SHARE * signs.size else DENSE, *found)


def upright(values: Any, inputs_last: bool) -> Any:
    """Return the matrix, or batch of matrices, of a product as [outputs, inputs]; batches lie below each other."""
    import numpy as np

    turned = values if inputs_last else np.swapaxes(values, -1, -2)
    return turned.reshape(-1, turned.shape[-1])


def swapped(values: Any, groups: int) -> Any:
    """Return a transposed convolution's weight [inputs, outputs / groups, *kernel] with the outputs first."""
    import numpy as np

    inputs, outputs = values.shape[:2]
    cut = values.reshape(groups, inputs // groups, outputs, *values.shape[2:])
    return np.swapaxes(cut, 1, 2).reshape(groups * outputs, inputs // groups, *values.shape[2:])
