"""Quantization of constant weights by rounding to nearest: per tensor, per channel or per group, 8 or 4 bits.

The exporters write these integers themselves (weight-only, dynamic convolutions) or let the vendor's quantizer write
them; tests prove that both agree to the bit. Bias correction needs to know them before they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portcall.targets.agent.errors import BadInput

Array = np.ndarray[Any, Any]

GROUPS = (32, 64, 128)
GRANULARITIES = ("channel", "tensor", *(f"group{size}" for size in GROUPS))


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights share their scales: each output channel, the whole tensor, or each *block* of inputs (0: none)."""

    per_channel: bool = True
    block: int = 0
    symmetric: bool = True

    def __str__(self) -> str:
        name = f"group{self.block}" if self.block else "channel" if self.per_channel else "tensor"
        return name if self.symmetric else f"{name}, asymmetric"


def scheme_of(options: Mapping[str, Any], default: str = "channel") -> Scheme:
    """Return the scheme that a recipe's options "weights" and "weight_symmetric" ask for. Raises BadInput."""
    name = options.get("weights", default)
    if name not in GRANULARITIES:
        raise BadInput(f"no weight granularity {name!r}", f"There are: {', '.join(GRANULARITIES)}")
    symmetric = options.get("weight_symmetric", True)
    if not isinstance(symmetric, bool):
        raise BadInput(f"weight_symmetric is {symmetric!r}", "Give true or false")
    block = int(name[len("group") :]) if name.startswith("group") else 0
    return Scheme(name != "tensor", block, symmetric)


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A quantized weight: weight = scale * (integers - zero_point).

    integers: int8 of the weight's shape, 4-bit values in -8..7. scale: float32, zero_point: int8, both of shape []
    (per tensor), [channels] (per channel: *axis* is the channel's), or that of the weight with dimension *axis* cut to
    the number of groups (per group: *block* neighbours along *axis* share a scale; the last group may be shorter).
    """

    integers: Array
    scale: Array
    zero_point: Array
    bits: int = 8
    axis: int | None = None
    block: int = 0

    def dequantize(self) -> Array:
        """Return the weights that the integers stand for: float32 of the weight's shape."""
        shape = self.integers.shape
        scale, zero_point = (_spread(p, shape, self.axis, self.block) for p in (self.scale, self.zero_point))
        steps = self.integers.astype(np.float32) - zero_point.astype(np.float32)
        return np.asarray(steps * scale)


def quantize(
    weight: Array, bits: int = 8, symmetric: bool = True, axis: int | None = None, block: int = 0
) -> Quantized:
    """Quantize *weight* (floats of any shape) by rounding to nearest, half to even.

    axis: None for one scale; else the axis of the channels, or, with *block*, the axis that is cut into groups.
    Symmetric 8 bits use -127..127 with scale max|w| / 127; 4 bits use -8..7 with scale max|w| / 7.5, so that no weight
    is off by more than half a step. Asymmetric ranges contain zero and use all 2**bits values. Where all weights are
    zero (a dead channel) the scale is 1, the zero point 0.
    Source: onnxruntime 1.31 ``quant_utils.compute_scale_zp`` and ``quantize_nparray``; ai-edge-quantizer 0.10
    ``tensor_zp_scale_from_min_max`` agrees for symmetric 8 bits; a test proves both.
    """
    values = np.asarray(weight, np.float32)
    if axis is not None:
        axis %= values.ndim
    low, high = _extremes(values, axis, block)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    least, most = (-127, 127) if symmetric and bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    exact = (high - low) / (most - least)
    dead = exact < np.finfo(np.float32).tiny
    exact = np.where(dead, 1.0, exact)
    if symmetric:
        zero_point = np.zeros(exact.shape, np.int8)
    else:
        zero_point = np.where(dead, 0, np.rint(least - low / exact)).astype(np.int8)
    scale = exact.astype(np.float32)
    spread = _spread(scale, values.shape, axis, block), _spread(zero_point, values.shape, axis, block)
    integers = np.clip(np.rint(values / spread[0]) + spread[1], least, most).astype(np.int8)
    return Quantized(integers, scale, zero_point, bits, axis, block)


def on_grid(weight: Array, scale: Array | float, axis: int | None) -> Quantized:
    """Return *weight* as int8 with given scales: one, or one for every index of *axis*; zero is the integer 0."""
    values, scales = np.asarray(weight, np.float32), np.asarray(scale, np.float32)
    if scales.size == 1:
        axis, scales = None, scales.reshape(())
    spread = _spread(scales, values.shape, axis, 0)
    integers = np.clip(np.rint(values / spread), -128, 127).astype(np.int8)
    return Quantized(integers, scales, np.zeros(scales.shape, np.int8), 8, axis, 0)


def _extremes(values: Array, axis: int | None, block: int) -> tuple[Array, Array]:
    """Return minimum and maximum, float64, in the shape of the scale."""
    if axis is None:
        low, high = values.min(), values.max()
    elif block:
        starts = np.arange(0, values.shape[axis], block)
        low = np.minimum.reduceat(values, starts, axis)
        high = np.maximum.reduceat(values, starts, axis)
    else:
        others = tuple(a for a in range(values.ndim) if a != axis)
        low, high = values.min(others), values.max(others)
    return np.asarray(low, np.float64), np.asarray(high, np.float64)


def _spread(parameter: Array, shape: tuple[int, ...], axis: int | None, block: int) -> Array:
    """Return scale or zero point so that it broadcasts against the weight."""
    if axis is None:
        return parameter
    if block:
        return np.repeat(parameter, block, axis).take(np.arange(shape[axis]), axis)
    return parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))])
