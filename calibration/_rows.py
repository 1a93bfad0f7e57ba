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

LABELS = "labels"
"""The key, or the stem of the file, that holds class labels."""


@dataclass(frozen=True, slots=True)
class Row:
    """One stored sample: source input name -> array as stored.

    where: what messages call it, such as "sample 3 (a.npy)".
    """

    arrays: dict[str, Array]
    label: int | None
    where: str


class Reader(Protocol):
    """One kind of DATA. Rows are counted from 0 and may be read any number of times."""

    def rows(self, start: int, stop: int | None) -> Iterator[Row]:
        """Yield rows [start, stop) one at a time, in order."""

    def count(self) -> int:
        """Return the number of rows."""

    def labelled(self) -> bool:
        """Return whether rows carry class labels."""


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
    """Raise BadInput unless an array of *shape* and *dtype* holds one integer for each of *count* samples."""
    if dtype.kind not in "iu":
        raise BadInput(
            f"labels in {spec} are {dtype}, not integers",
            "Store the index of each sample's class as an integer",
        )
    if shape != (count,):
        raise BadInput(
            f"labels in {spec} have shape {list(shape)}, but the data has {count} samples",
            f"Store one class index per sample: an integer array of shape [{count}]",
        )
