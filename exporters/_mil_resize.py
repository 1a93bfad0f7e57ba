"""Operators of Core ML's MIL that resize the last axes of a tensor, in NumPy: see ``_mil_ops``."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence

Array = Any


def operators() -> Dict[str, Callable[..., Any]]:
    """Return every operator of this file by its MIL name."""
    return dict(_OPERATORS)


def _grid(size: int, count: int, mode: str) -> Array:
    """Return where *count* samples lie between 0 and size - 1: float64[count]. Source: iOS15 ``resize_bilinear``."""
    import numpy as np

    steps = np.arange(count, dtype=np.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return np.array([0.0 if mode == "STRICT_ALIGN_CORNERS" else (size - 1) / 2])
        points = steps * (size - 1) / (count - 1)
    elif mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * size / count - 0.5
    elif mode == "OFFSET_CORNERS":
        points = (steps + 0.5) * max(1, size - 1) / count
    else:
        points = steps * (size - size / count) / max(1, count - 1)
    return np.clip(points, 0, size - 1)


def _bilinear(x: Array, sizes: Sequence[int], mode: str) -> Array:
    """Interpolate along the last axes, as many as there are *sizes*, one after the other."""
    import numpy as np

    result = x
    for axis, count in zip(range(x.ndim - len(sizes), x.ndim), sizes):
        points = _grid(x.shape[axis], count, mode)
        low = np.floor(points).astype(int)
        share = (points - low).astype(np.float32).reshape((-1,) + (1,) * (x.ndim - axis - 1))
        high = np.minimum(low + 1, x.shape[axis] - 1)
        below, above = np.take(result, low, axis), np.take(result, high, axis)
        result = below + (above - below) * share
    return result


def _nearest(x: Array, sizes: Sequence[int]) -> Array:
    """Take floor(i * size / count) along the last axes."""
    import numpy as np

    result = x
    for axis, count in zip(range(x.ndim - len(sizes), x.ndim), sizes):
        result = np.take(result, np.arange(count) * x.shape[axis] // count, axis)
    return result


def _scaled(x: Array, height: float, width: float) -> List[int]:
    return [int(x.shape[-2] * float(height) + 1e-4), int(x.shape[-1] * float(width) + 1e-4)]


def upsample_nearest_neighbor(x: Array, scale_factor_height: float, scale_factor_width: float) -> Array:
    return _nearest(x, _scaled(x, scale_factor_height, scale_factor_width))


def resize_nearest_neighbor(x: Array, target_size_height: int, target_size_width: int) -> Array:
    return _nearest(x, [int(target_size_height), int(target_size_width)])


def upsample_bilinear(
    x: Array,
    scale_factor_height: float,
    scale_factor_width: float,
    align_corners: bool,
    half_pixel_centers: Optional[bool] = None,
) -> Array:
    """half_pixel_centers (iOS16): None for the contrary of align_corners; neither of the two is TensorFlow's grid."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "UNALIGN_CORNERS" if half else "STRICT_ALIGN_CORNERS" if align_corners else "DEFAULT"
    return _bilinear(x, _scaled(x, scale_factor_height, scale_factor_width), mode)


def resize_bilinear(
    x: Array, target_size_height: int, target_size_width: int, sampling_mode: str = "DEFAULT"
) -> Array:
    return _bilinear(x, [int(target_size_height), int(target_size_width)], str(sampling_mode))


def resize(x: Array, shape: Array, resized_dims: int, interpolation_mode: str, sampling_mode: str) -> Array:
    """Resize the last axes to the last *resized_dims* of *shape* (0: as it is). Source: iOS17 ``resize``."""
    import numpy as np

    count = int(resized_dims)
    wanted = [int(d) for d in shape][-count:]
    sizes = [d or x.shape[x.ndim - count + i] for i, d in enumerate(wanted)]
    if interpolation_mode == "LINEAR":
        return _bilinear(x, sizes, sampling_mode)
    if sampling_mode == "DEFAULT":
        return _nearest(x, sizes)
    result = x
    for axis, size in zip(range(x.ndim - count, x.ndim), sizes):
        nearest = np.floor(_grid(x.shape[axis], size, sampling_mode) + 0.5).astype(int)
        result = np.take(result, nearest, axis)
    return result


def crop(x: Array, crop_height: Array, crop_width: Array) -> Array:
    top, bottom = (int(c) for c in crop_height)
    left, right = (int(c) for c in crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


_OPERATORS: Dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        crop,
        resize,
        resize_bilinear,
        resize_nearest_neighbor,
        upsample_bilinear,
        upsample_nearest_neighbor,
    )
}
