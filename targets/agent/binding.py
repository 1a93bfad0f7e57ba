"""Between the source's tensors and an artifact's: dtype, order of axes, integers for floats."""

from __future__ import annotations

from typing import Tuple

import numpy as np

from portcall.targets.agent.contract import BoundTensor, Dim, TensorSpec


def source_spec(tensor: BoundTensor) -> TensorSpec:
    """Return the input or output as the source has it."""
    shape: Tuple[Dim, ...] = tensor.shape
    if tensor.permutation is not None:
        shape = tuple(tensor.shape[tensor.permutation.index(axis)] for axis in range(len(tensor.shape)))
    return TensorSpec(tensor.source, shape, tensor.dtype if tensor.scale is None else "float32")


def to_runtime(tensor: BoundTensor, array: np.ndarray) -> np.ndarray:
    """Return the source's *array* as the runtime takes it; integers are rounded half to even and saturated."""
    if tensor.permutation is not None:
        array = array.transpose(tensor.permutation)
    if tensor.scale is not None:
        limits = np.iinfo(tensor.dtype)
        levels = np.rint(array.astype(np.float64) / tensor.scale) + (tensor.zero_point or 0)
        array = np.clip(levels, limits.min, limits.max).astype(tensor.dtype)
    return np.asarray(array, order="C")


def to_source(tensor: BoundTensor, array: np.ndarray) -> np.ndarray:
    """Return the runtime's *array* as the source has it."""
    if tensor.scale is not None:
        levels = array.astype(np.float64) - (tensor.zero_point or 0)
        array = (levels * tensor.scale).astype(np.float32)
    if tensor.permutation is not None:
        array = array.transpose(np.argsort(tensor.permutation))
    return np.asarray(array, order="C")
