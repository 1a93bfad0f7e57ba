"""Operators of Core ML's MIL in NumPy that move data: shapes, slices, gathers, joins. See ``_mil_ops``."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence

Array = Any


def operators() -> Dict[str, Callable[..., Any]]:
    """Return every operator of this file by its MIL name."""
    return dict(_MOVING)


def reshape(x: Array, shape: Array) -> Array:
    """Return *x* in *shape*: one -1 is inferred, 0 keeps the dimension at its place."""
    wanted = [x.shape[i] if d == 0 and x.size else int(d) for i, d in enumerate(shape)]
    return x.reshape(wanted)


def transpose(x: Array, perm: Array) -> Array:
    return x.transpose([int(p) for p in perm])


def expand_dims(x: Array, axes: Array) -> Array:
    import numpy as np

    return np.expand_dims(x, tuple(int(a) for a in axes))


def squeeze(x: Array, axes: Optional[Array] = None) -> Array:
    import numpy as np

    return np.squeeze(x, None if axes is None else tuple(int(a) for a in axes))


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Optional[Array] = None,
    begin_mask: Optional[Array] = None,
    end_mask: Optional[Array] = None,
    squeeze_mask: Optional[Array] = None,
) -> Array:
    """Return x[begin:end:stride] on every axis; a mask leaves that end open, or takes the one element at begin."""
    no = [False] * x.ndim
    steps = [1] * x.ndim if stride is None else [int(s) for s in stride]
    opened = zip(*(no if m is None else m for m in (begin_mask, end_mask, squeeze_mask)))
    index: List[Any] = []
    for first, last, step, (from_start, to_end, single) in zip(begin, end, steps, opened):
        whole = slice(None if from_start else int(first), None if to_end else int(last), step)
        index.append((0 if from_start else int(first)) if single else whole)
    return x[tuple(index)]


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """Return *size* elements from *begin* on every axis; -1 is all that follow."""
    ends = [x.shape[i] if s == -1 else int(b) + int(s) for i, (b, s) in enumerate(zip(begin, size))]
    return x[tuple(slice(int(b), e) for b, e in zip(begin, ends))]


def split(
    x: Array, axis: int, num_splits: Optional[int] = None, split_sizes: Optional[Array] = None
) -> List[Array]:
    import numpy as np

    if split_sizes is None:
        assert num_splits is not None
        return list(np.split(x, int(num_splits), axis=int(axis)))
    return list(np.split(x, np.cumsum([int(s) for s in split_sizes])[:-1], axis=int(axis)))


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    import numpy as np

    parts = [np.atleast_1d(v) for v in values]
    if not interleave:
        return np.concatenate(parts, axis=int(axis))
    place = int(axis) % parts[0].ndim
    shape = list(parts[0].shape)
    shape[place] *= len(parts)
    return np.stack(parts, axis=place + 1).reshape(shape)


def stack(values: Sequence[Array], axis: int) -> Array:
    import numpy as np

    return np.stack([np.asarray(v) for v in values], axis=int(axis))


def tile(x: Array, reps: Array) -> Array:
    import numpy as np

    return np.tile(x, [int(r) for r in reps])


def pad(x: Array, pad: Array, mode: str, constant_val: float) -> Array:
    """Return *x* with *pad* (before, after) elements on its last axes: a constant, reflected or the edge's."""
    import numpy as np

    pairs = np.asarray(pad, int).reshape(-1, 2).tolist()
    widths = [(0, 0)] * (x.ndim - len(pairs)) + [tuple(p) for p in pairs]
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    return np.pad(x, widths, mode="edge" if mode == "replicate" else "reflect")


def gather(
    x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Array:
    """Return the slices of *x* at *indices* of *axis*; the first *batch_dims* axes of both belong together."""
    import numpy as np

    at = int(axis) % x.ndim
    if not batch_dims:
        return np.take(x, indices, axis=at)
    n = int(batch_dims)
    leading = indices.shape[:n]
    rows = zip(x.reshape(-1, *x.shape[n:]), indices.reshape(-1, *indices.shape[n:]))
    found = np.stack([np.take(row, index, axis=at - n) for row, index in rows])
    return found.reshape(*leading, *found.shape[1:])


def gather_along_axis(x: Array, indices: Array, axis: int = 0, validate_indices: bool = False) -> Array:
    import numpy as np

    return np.take_along_axis(x, indices, axis=int(axis))


def gather_nd(x: Array, indices: Array, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Return the slices of *x* that the last axis of *indices* names."""
    import numpy as np

    if not batch_dims:
        return x[tuple(np.moveaxis(indices, -1, 0))]
    return np.stack([gather_nd(a, i, int(batch_dims) - 1) for a, i in zip(x, indices)])


def scatter_nd(
    data: Array, indices: Array, updates: Array, mode: str, validate_indices: bool = False
) -> Array:
    """Return *data* with *updates* put, added, ... at the places that the last axis of *indices* names."""
    import numpy as np

    return _scattered(data, tuple(np.moveaxis(indices, -1, 0)), updates, mode)


def scatter(
    data: Array, indices: Array, updates: Array, axis: int, mode: str, validate_indices: bool = False
) -> Array:
    return _scattered(data, (slice(None),) * (int(axis) % data.ndim) + (indices,), updates, mode)


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: int, mode: str, validate_indices: bool = False
) -> Array:
    import numpy as np

    places = list(np.ogrid[tuple(slice(d) for d in indices.shape)])
    places[int(axis)] = indices
    return _scattered(data, tuple(places), updates, mode)


def _scattered(data: Array, places: Any, updates: Array, mode: str) -> Array:
    import numpy as np

    result = np.array(data)
    if mode == "update":
        result[places] = updates
        return result
    combined = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    combined.update({"max": np.maximum, "min": np.minimum})
    combined[mode].at(result, places, updates)
    return result


def topk(
    x: Array,
    k: int,
    axis: int,
    ascending: bool,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: Optional[str] = None,
) -> Any:
    """Return the *k* largest (ascending: smallest) values of *axis* in order, and their indices."""
    import numpy as np

    order = np.argsort(x if ascending else -x, axis=int(axis), kind="stable")
    indices = np.take(order, range(int(k)), axis=int(axis))
    values = np.take_along_axis(x, indices, axis=int(axis))
    return [values, indices] if return_indices else values


def argsort(x: Array, axis: int, ascending: bool) -> Array:
    import numpy as np

    return np.argsort(x if ascending else -x, axis=int(axis), kind="stable")


def cumsum(x: Array, axis: int, exclusive: bool, reverse: bool) -> Array:
    import numpy as np

    turned = np.flip(x, int(axis)) if reverse else x
    total = np.cumsum(turned, axis=int(axis), dtype=x.dtype)
    total = total - turned if exclusive else total
    return np.flip(total, int(axis)) if reverse else total


def band_part(x: Array, lower: int, upper: int) -> Array:
    """Return *x* with zeros outside *lower* diagonals below and *upper* above the main one (-1: all)."""
    import numpy as np

    distance = np.arange(x.shape[-1])[None] - np.arange(x.shape[-2])[:, None]
    keep = ((lower < 0) | (-distance <= lower)) & ((upper < 0) | (distance <= upper))
    return np.where(keep, x, 0)


def one_hot(indices: Array, one_hot_vector_size: int, axis: int, on_value: float, off_value: float) -> Array:
    import numpy as np

    hot = np.arange(int(one_hot_vector_size)) == np.asarray(indices)[..., None]
    return np.moveaxis(np.where(hot, on_value, off_value), -1, int(axis))


def reverse(x: Array, axes: Optional[Array] = None) -> Array:
    import numpy as np

    return np.flip(x, None if axes is None else tuple(int(a) for a in axes))


def fill(shape: Array, value: float) -> Array:
    import numpy as np

    return np.full([int(d) for d in shape], value)


def range_1d(start: float, end: float, step: float) -> Array:
    import numpy as np

    return np.arange(start, end, step)


def shape(x: Array) -> Array:
    import numpy as np

    return np.array(x.shape, np.int32)


def non_zero(x: Array) -> Array:
    import numpy as np

    return np.argwhere(x)


def depth_to_space(x: Array, block_size: int) -> Array:
    """Return channels laid out as blocks of pixels, the block's offset being the outer part of a channel's number."""
    n, c, h, w = x.shape
    b = int(block_size)
    parts = x.reshape(n, b, b, c // (b * b), h, w)
    return parts.transpose(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Array, block_size: int) -> Array:
    """Undo ``depth_to_space``."""
    n, c, h, w = x.shape
    b = int(block_size)
    parts = x.reshape(n, c, h // b, b, w // b, b)
    return parts.transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    """As torch's: the block's offset is the inner part of a channel's number."""
    n, c, h, w = x.shape
    b = int(upscale_factor)
    parts = x.reshape(n, c // (b * b), b, b, h, w)
    return parts.transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (b * b), h * b, w * b)


def pixel_unshuffle(x: Array, downscale_factor: int) -> Array:
    n, c, h, w = x.shape
    b = int(downscale_factor)
    parts = x.reshape(n, c, h // b, b, w // b, b)
    return parts.transpose(0, 1, 3, 5, 2, 4).reshape(n, c * b * b, h // b, w // b)


def fill_like(ref_tensor: Array, value: float) -> Array:
    import numpy as np

    return np.full(ref_tensor.shape, value)


def flatten2d(x: Array, axis: int) -> Array:
    import math

    return x.reshape(math.prod(x.shape[: int(axis)]), -1)


_MOVING: Dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        argsort,
        band_part,
        concat,
        cumsum,
        depth_to_space,
        expand_dims,
        fill,
        fill_like,
        flatten2d,
        gather,
        gather_along_axis,
        gather_nd,
        non_zero,
        one_hot,
        pad,
        pixel_shuffle,
        pixel_unshuffle,
        range_1d,
        reshape,
        reverse,
        scatter,
        scatter_along_axis,
        scatter_nd,
        shape,
        slice_by_index,
        slice_by_size,
        space_to_depth,
        split,
        squeeze,
        stack,
        tile,
        topk,
        transpose,
    )
}
