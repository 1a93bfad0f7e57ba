"""What a deviation looks like: a shape of the residual for each of the usual faults. A description, not a proof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from portcall.ladder_statistics import Grid

Array = np.ndarray[Any, Any]


def describe(
    value: Array,
    wanted: Array,
    axis: int | None,
    channels: Sequence[int],
    own: Grid | None,
    expected: Grid | None,
    where: str,
) -> str:
    """Return a sentence on how *value* (shown) deviates from *wanted* (recomputed), arrays of one shape.

    channels: those that deviate, along *axis*. own, expected: the artifact's grid and the recipe's.
    """
    if value.shape != wanted.shape:
        return "another shape: is the padding or a stride lost?"
    if own is not None and expected is not None and not expected.explained:
        factor = own.step / expected.step
        if abs(factor - 1) > 0.02:
            return f"wrong scale: {factor:.3g} times the recipe's"
        return f"wrong zero point: the range starts at {own.low:.4g}, the recipe's at {expected.low:.4g}"
    if "border" in where:
        return "only at the border: is the padding lost, or padded with something else than zero?"
    v, w = _rows(value, axis), _rows(wanted, axis)
    chosen = [c for c in channels if c < len(v)] or list(range(len(v)))
    if 2 <= len(chosen) <= 64:
        swapped = _swapped(v, w, chosen)
        if swapped is not None:
            return f"channels {swapped[0]} and {swapped[1]} look swapped"
    difference = v[chosen] - w[chosen]
    inside = _unclipped(v[chosen], own)
    if inside.any():
        difference, kept = difference[inside], w[chosen][inside]
        offset = float(difference.mean())
        spread = float(difference.std())
        per_channel = [abs((v[c] - w[c]).mean()) > 1.5 * (v[c] - w[c]).std() for c in chosen]
        if np.mean(per_channel) > 0.5 or abs(offset) > 1.5 * spread:
            return f"a constant is added or missing (mean {offset:.4g}): is the bias right?"
        power = float(kept @ kept)
        gain = float(v[chosen][inside] @ kept) / power if power > 0 else 1.0
        if abs(gain - 1) > 0.02:
            left = v[chosen][inside] - gain * kept
            if float(left @ left) < 0.5 * float(difference @ difference):
                return f"wrong scale: the values are {gain:.3g} times what they should be"
    return "no simple shape: compare the weights of this layer"


def _rows(values: Array, axis: int | None) -> Array:
    """Return *values* as float64[channels, elements]."""
    if axis is None or values.ndim == 0:
        return values.astype(np.float64).reshape(1, -1)
    moved = np.moveaxis(values.astype(np.float64), axis, 0)
    return moved.reshape(moved.shape[0], -1)


def _unclipped(values: Array, grid: Grid | None) -> Array:
    """Return which values lie inside their range; of a rectified tensor those above zero."""
    low, high = (grid.low, grid.high) if grid is not None else (float(values.min()), np.inf)
    step = grid.step if grid is not None else 0.0
    return np.asarray((values > low + step / 2) & (values < high - step / 2))


def _swapped(v: Array, w: Array, channels: Sequence[int]) -> tuple[int, int] | None:
    """Return two channels that fit each other's recomputed values much better than their own."""
    for index, a in enumerate(channels):
        for b in channels[index + 1 :]:
            own = ((v[a] - w[a]) ** 2).sum() + ((v[b] - w[b]) ** 2).sum()
            crossed = ((v[a] - w[b]) ** 2).sum() + ((v[b] - w[a]) ** 2).sum()
            if crossed < 0.2 * own:
                return a, b
    return None
