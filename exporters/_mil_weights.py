"""How Core ML's MIL stores numbers in few bits: quantize, dequantize, and the ``constexpr_`` operators of weights.

Written after the specifications in coremltools 9.0 (iOS16 ``constexpr_ops``, iOS17 ``quantization_ops``, iOS18
``compression``), without its code, so that the two check each other.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

Array = Any


def operators() -> Dict[str, Callable[..., Any]]:
    """Return every operator of this file by its MIL name."""
    return dict(_OPERATORS)


def _along(vector: Array, rank: int, axis: Optional[int]) -> Array:
    """Return a scalar, or a vector in the shape that broadcasts along *axis*."""
    import numpy as np

    array = np.asarray(vector, np.float32)
    if array.ndim == 0 or axis is None:
        return array
    return array.reshape([-1 if i == int(axis) % rank else 1 for i in range(rank)])


def quantize(
    input: Array, scale: Array, output_dtype: str, zero_point: Array = 0, axis: Optional[int] = None
) -> Array:
    """Return round(input / scale) + zero_point, half to even, saturated to *output_dtype*."""
    import numpy as np

    limits = np.iinfo(output_dtype)
    levels = np.rint(input / _along(scale, input.ndim, axis)) + _along(zero_point, input.ndim, axis)
    return np.clip(levels, limits.min, limits.max)


def dequantize(input: Array, scale: Array, zero_point: Array = 0, axis: Optional[int] = None) -> Array:
    """Return (input - zero_point) * scale."""
    import numpy as np

    levels = np.asarray(input, np.float32) - _along(zero_point, input.ndim, axis)
    return levels * _along(scale, input.ndim, axis)


def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: int) -> Array:
    """iOS16: integers with a scale and zero point per tensor, or per element of *axis*."""
    return dequantize(quantized_data, scale, zero_point, axis)


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Optional[Array] = None) -> Array:
    """iOS18: (data - offset) * scale; scale and offset have data's rank, each element stands for a block."""
    import numpy as np

    result = np.asarray(data, np.float32)
    if offset is not None:
        result = result - _blocks(np.asarray(offset, np.float32), result.shape)
    return result * _blocks(np.asarray(scale, np.float32), result.shape)


def _blocks(parameter: Array, shape: Any) -> Array:
    """Repeat every element of *parameter* over its block of a tensor of *shape*."""
    import numpy as np

    result = parameter
    for axis, (size, count) in enumerate(zip(shape, parameter.shape)):
        if 1 < count < size:
            result = np.repeat(result, size // count, axis)
    return result


def constexpr_lut_to_dense(
    lut: Array, indices: Array, shape: Optional[Array] = None, vector_axis: Optional[int] = None
) -> Array:
    """Look the weights up in a table.

    With *shape* (iOS16): *indices* are bytes that hold log2(len(lut)) bits for each weight, the lowest first. Without
    (iOS18): lut [*groups, palettes, vector], one table for every group of *indices*; a vector fills *vector_axis*.
    """
    import numpy as np

    if shape is not None:
        count = int(np.prod(shape))
        return lut[unpack(indices, int(np.log2(lut.size)), count)].reshape([int(d) for d in shape])
    rank = indices.ndim
    places: List[Array] = []
    for axis, (size, groups) in enumerate(zip(indices.shape, lut.shape)):
        group = np.arange(size) // (size // groups)
        places.append(group.reshape([-1 if i == axis else 1 for i in range(rank)]))
    found = lut[(*places, indices)]
    if found.shape[-1] == 1:
        return found[..., 0]
    assert vector_axis is not None
    axis = int(vector_axis) % rank
    wide = np.moveaxis(found, -1, axis + 1)
    return wide.reshape([d * lut.shape[-1] if i == axis else d for i, d in enumerate(indices.shape)])


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Return *count* unsigned integers of *bits* bits from bytes, the lowest bits first: uint8[count]."""
    import numpy as np

    stream = np.unpackbits(np.asarray(packed, np.uint8), bitorder="little")[: bits * count]
    return np.packbits(stream.reshape(count, bits), axis=1, bitorder="little")[:, 0]


def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Optional[Array] = None) -> Array:
    """Put the values where *mask* says; with *shape* (iOS16) a bit each, without (iOS18) an element each."""
    import numpy as np

    if shape is not None:
        mask = unpack(mask, 1, int(np.prod(shape))).reshape([int(d) for d in shape])
    result = np.zeros(mask.shape, nonzero_data.dtype)
    result[mask != 0] = nonzero_data
    return result


def constexpr_lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Optional[int] = None
) -> List[Array]:
    """iOS18: return the mask of the weights, and those that are not zero, looked up."""
    import numpy as np

    dense = constexpr_lut_to_dense(
        lut, constexpr_sparse_to_dense(indices_nonzero_data, indices_mask), None, vector_axis
    )
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], axis=int(vector_axis or 0))
    return [mask, dense[mask != 0]]


def constexpr_sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Optional[Array] = None
) -> List[Array]:
    """iOS18: return the mask, and the values that are not zero, scaled."""
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return [data_mask, dense[data_mask != 0]]


def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    return source_val


_OPERATORS: Dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        constexpr_affine_dequantize,
        constexpr_blockwise_shift_scale,
        constexpr_cast,
        constexpr_lut_to_dense,
        constexpr_lut_to_sparse,
        constexpr_sparse_blockwise_shift_scale,
        constexpr_sparse_to_dense,
        dequantize,
        quantize,
    )
}
