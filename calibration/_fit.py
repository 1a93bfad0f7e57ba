"""Fitting stored arrays to a model's inputs: rank, shape, dtype, and values that can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from portcall.calibration._rows import Array, Row
from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput


def input_dtype(spec: TensorSpec) -> np.dtype[Any]:
    """Return the NumPy dtype of a model input. Raises BadInput for one that holds no plain numbers."""
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as e:
        raise BadInput(
            f"input {spec} has a dtype that NumPy does not know", "Give the model a standard input"
        ) from e
    if dtype.kind not in "biufc":
        raise BadInput(f"input {spec} does not hold numbers", "Give the model a numeric input")
    return dtype


def fixed_batch(spec: TensorSpec) -> int:
    """Return the size of an input's first axis if it is fixed, else 1."""
    return spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1


def group_size(inputs: Sequence[TensorSpec], row: Row) -> int:
    """Return how many consecutive rows make one sample of the model.

    More than 1 only where an input's fixed batch is larger than what a row holds. *row* is the first one.
    """
    wanted: dict[str, int] = {}
    for spec in inputs:
        batch = fixed_batch(spec)
        if batch > 1 and _leading(spec, row.arrays[spec.name].shape) == 1:
            wanted[spec.name] = batch
    if len(set(wanted.values())) > 1:
        batches = ", ".join(f"{name} {batch}" for name, batch in wanted.items())
        raise BadInput(
            f"the model's inputs have different fixed batches: {batches}",
            "Store samples with their own batch axis",
        )
    return next(iter(wanted.values()), 1)


def fit_rows(inputs: Sequence[TensorSpec], rows: Sequence[Row]) -> dict[str, Array]:
    """Return the arrays of one sample, made of *rows* (one, or as many as the model's fixed batch).

    Every array is new, writable, C-contiguous and of the input's rank and dtype. Raises BadInput.
    """
    return {spec.name: _fit(spec, rows) for spec in inputs}


def _fit(spec: TensorSpec, rows: Sequence[Row]) -> Array:
    """Return the array of one input: the rows' arrays joined on the batch axis, or what all rows agree on."""
    for row in rows:
        _check_shape(spec, row.arrays[spec.name].shape, len(rows), row.where)
    parts = [_convert(spec, row.arrays[spec.name], row.where) for row in rows]
    if len(rows) == 1:
        return parts[0]
    where = f"{rows[0].where} to {rows[-1].where}"
    whole = not spec.shape or (isinstance(spec.shape[0], int) and parts[0].shape[0] == spec.shape[0])
    if whole:
        # Rows hold all of it already (a threshold, a table of anchors): one value serves the whole batch.
        if any(not np.array_equal(parts[0], p) for p in parts[1:]):
            raise BadInput(
                f"the model takes {len(rows)} samples at once but only one value of input {spec}, "
                f"and {where} differ in it",
                "Store samples with their own batch axis",
            )
        return parts[0]
    try:
        return np.concatenate(parts, axis=0)
    except ValueError as e:
        shapes = sorted({str(list(p.shape[1:])) for p in parts})
        raise BadInput(
            f"{where} make one batch of input {spec} but have different shapes: {', '.join(shapes)}",
            "Pad them to one shape",
        ) from e


def _leading(spec: TensorSpec, shape: tuple[int, ...]) -> int:
    """Return the size of the batch axis of a stored array, which is 1 where it has none."""
    return shape[0] if len(shape) == len(spec.shape) and shape else 1


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], group: int, where: str) -> None:
    rank = len(spec.shape)
    full = shape if len(shape) == rank else (1, *shape)
    if len(full) == rank:
        batches = (full[0], group if full[0] == 1 else full[0]) if rank else ()
        batch_fits = not rank or isinstance(spec.shape[0], str) or spec.shape[0] in batches
        rest = zip(spec.shape[1:], full[1:], strict=True)
        if batch_fits and all(isinstance(d, str) or d == n for d, n in rest):
            return
    one = f"[{', '.join(str(d) for d in spec.shape[1:])}]"
    full_text = f"[{', '.join(str(d) for d in spec.shape)}]"
    raise BadInput(
        f"{where} of input {spec.name!r} has shape {list(shape)}; the model's input is {spec}",
        f"Store each sample as {one}, or as {full_text} with its own batch axis; "
        "in an .npz one more axis in front counts the samples"
        if rank
        else "Store each sample as one number",
    )


def _convert(spec: TensorSpec, stored: Array, where: str) -> Array:
    """Return *stored* as a new array of the input's rank and dtype, after checking its values."""
    dtype = input_dtype(spec)
    check_dtype(spec, stored.dtype, where)
    if stored.dtype.kind in "fc":
        _check_finite(spec, stored, where)
    elif stored.dtype.kind in "iu" and stored.size:
        _check_range(spec, stored, dtype, where)
    with np.errstate(over="ignore"):  # float64 values beyond float32 are reported below, by name
        array = np.array(stored, dtype=dtype, order="C", copy=True)
    if dtype.itemsize < stored.dtype.itemsize and dtype.kind == "f" and not np.isfinite(array).all():
        raise BadInput(f"{where} of input {spec.name!r} has values beyond {dtype}", "Scale the data")
    return array if array.ndim == len(spec.shape) else array[np.newaxis]


def check_dtype(spec: TensorSpec, found: np.dtype[Any], where: str) -> None:
    """Raise BadInput unless data of dtype *found* can be used for the input as it is."""
    wanted = input_dtype(spec)
    same = found.newbyteorder("=") == wanted
    if same or (wanted == np.float32 and found.kind == "f" and found.itemsize in (2, 8)):
        return
    if found.kind in "iu" and wanted.kind in "iu":
        return
    if found.kind in "iub" and wanted.kind == "f":
        fix = f"Convert it to {wanted} as in training, or give a folder of images and a named preprocessing"
    elif found.kind == "f" and wanted.kind in "iu":
        fix = f"Store integers (token ids, indices) with .astype('{wanted}')"
    else:
        fix = f"Convert it with .astype('{wanted}')"
    raise BadInput(f"{where} of input {spec.name!r} is {found}; the model's input is {spec}", fix)


def _check_finite(spec: TensorSpec, array: Array, where: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        bad = np.argwhere(~finite)
        raise BadInput(
            f"{where} of input {spec.name!r} holds NaN or infinity: {len(bad)} of {array.size} values, "
            f"the first at {bad[0].tolist()}",
            "Repair the sample or leave it out",
        )


def _check_range(spec: TensorSpec, array: Array, dtype: np.dtype[Any], where: str) -> None:
    limits = np.iinfo(dtype)
    low, high = int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        raise BadInput(
            f"{where} of input {spec.name!r} has values from {low} to {high}, which do not fit {dtype} "
            f"({limits.min} to {limits.max})",
            "Repair the data, or export the model with a wider input",
        )
