"""What every kind of DATA is read as: rows, one per stored sample, before they are fitted to the model."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput

Array = npt.NDArray[Any]
Label = int | float | Array
"""What a sample is compared with: the index of a class, a number, or an array for the user's own metric."""

LABELS = "labels"
"""The key, or the stem of the file, that holds labels."""


@dataclass(frozen=True, slots=True)
class Row:
    """One stored sample: source input name -> array as stored.

    where: what messages call it, such as "sample 3 (a.npy)".
    """

    arrays: dict[str, Array]
    label: Label | None
    where: str


class Reader(Protocol):
    """One kind of DATA. Rows are counted from 0 and may be read any number of times."""

    def rows(self, start: int, stop: int | None) -> Iterator[Row]:
        """Yield rows [start, stop) one at a time, in order."""

    def count(self) -> int:
        """Return the number of rows."""

    def labelled(self) -> bool:
        """Return whether rows carry labels."""


def listed(names: Collection[str], limit: int = 10) -> str:
    """Return *names* as text for a message; beyond *limit* only their number."""
    shown = ", ".join(sorted(names)[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def check_names(spec: str, inputs: Sequence[TensorSpec], keys: Collection[str]) -> None:
    """Raise BadInput unless *keys* (labels left out) are exactly the names of *inputs*."""
    names = [t.name for t in inputs]
    missing = [n for n in names if n not in keys]
    extra = sorted(k for k in keys if k not in names)
    if not missing and not extra:
        return
    lists = f"the model's inputs are: {', '.join(names)}; the data holds: {listed(keys)}"
    if missing:
        only_choice = extra if len(names) == len(keys) == 1 else []
        near = difflib.get_close_matches(missing[0], extra, 1, 0.4) or only_choice
        raise BadInput(
            f"{spec} has no data for input {missing[0]!r}; {lists}",
            f"Rename {near[0]!r} to {missing[0]!r}" if near else f"Add data named {missing[0]!r}",
        )
    near = difflib.get_close_matches(extra[0], [*names, LABELS], 1, 0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise BadInput(
        f"{spec} holds {extra[0]!r}, which is no input of the model; {lists}",
        f"{hint}Rename it or leave it out",
    )


def check_labels(spec: str, shape: tuple[int, ...], dtype: np.dtype[Any], count: int) -> None:
    """Raise BadInput unless an array of *shape* and *dtype* holds a number or an array for each of *count* samples."""
    if dtype.kind not in "biuf":
        raise BadInput(f"labels in {spec} are {dtype}, not numbers", "Store numbers")
    if shape[:1] != (count,):
        raise BadInput(
            f"labels in {spec} have shape {list(shape)}, but the data has {count} samples",
            f"Store one class index per sample: an integer array of shape [{count}]",
        )


def label_of(array: Array) -> Label:
    """Return a sample's label as Python's number where it is a single one."""
    return (
        int(array) if array.ndim == 0 and array.dtype.kind in "biu" else array if array.ndim else float(array)
    )


def class_indices(label: Label, where: str) -> Array:
    """Return a label as class indices, int64[rows]: one, or one per row of the sample's batch.

    Raises BadInput where it is not made of integers: top-1 cannot be measured with it.
    """
    indices = np.asarray(label)
    if indices.dtype.kind not in "iu" or (indices.ndim > 1 and indices.size != len(indices)):
        what = (
            f"{indices.dtype}, not integers"
            if indices.dtype.kind not in "iu"
            else f"of shape {indices.shape}"
        )
        raise BadInput(
            f"labels are {what} ({where}): top-1 needs the index of each sample's class",
            "Store one integer per sample as labels, or name a function: --metric package.module:callable",
        )
    return indices.reshape(-1).astype(np.int64)
