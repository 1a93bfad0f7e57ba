"""DATA from ``package.module:callable``: user code that returns an iterable of dicts, one sample each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from portcall.calibration._rows import LABELS, Array, Label, Row, check_names, label_of
from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput
from portcall.user_code import load_callable

_LABEL_KEYS = (LABELS, "label")


class CallableReader:
    """Rows that a callable yields. It is called anew for every pass, and runs the user's code each time."""

    def __init__(self, spec: str, inputs: Sequence[TensorSpec]) -> None:
        self._spec = spec
        self._inputs = inputs
        self._function = load_callable(spec, "returns an iterable of dicts")
        self._count: int | None = None
        self._labelled: bool | None = None

    def count(self) -> int:
        """Return the number of rows, for which the first call has to run the callable through."""
        if self._count is None:
            self._count = sum(1 for _ in self._items())
        return self._count

    def labelled(self) -> bool:
        """Return whether the first row has a label, for which the callable is started."""
        if self._labelled is None:
            self._labelled = any(row.label is not None for row in self.rows(0, 1))
        return self._labelled

    def rows(self, start: int, stop: int | None) -> Iterator[Row]:
        labelled: bool | None = None
        for index, item in islice(enumerate(self._items()), start, stop):
            row = self._row(index, item)
            if labelled is not None and labelled != (row.label is not None):
                has = "has no" if labelled else "has a"
                raise BadInput(f"{row.where} of {self._spec} {has} label, unlike those before", "Label all")
            labelled = row.label is not None
            yield row

    def _items(self) -> Iterator[Any]:
        """Yield what the callable yields; whatever it raises becomes BadInput."""
        items, index = None, 0
        while True:
            try:
                if items is None:
                    returned = self._function()
                    if isinstance(returned, Mapping):
                        raise TypeError("it returned a single dict; return a list of dicts, or yield them")
                    items = iter(returned)
                item = next(items)
            except StopIteration:
                return
            except Exception as e:  # the user's code raises anything
                raise BadInput(
                    f"{self._spec} raised {type(e).__name__} at sample {index}: {e}",
                    "It must return an iterable of dicts, one per sample, from input name to array",
                ) from e
            yield item
            index += 1

    def _row(self, index: int, item: object) -> Row:
        where = f"sample {index}"
        if not isinstance(item, Mapping):
            raise BadInput(
                f"{where} of {self._spec} is a {type(item).__name__}, not a dict",
                "Yield dicts from input name to array",
            )
        names = {t.name for t in self._inputs}
        label_key = next((k for k in _LABEL_KEYS if k in item and k not in names), None)
        values = {str(k): v for k, v in item.items() if k != label_key}
        check_names(f"{where} of {self._spec}", self._inputs, values)
        arrays = {k: self._array(f"{where} of {self._spec}", k, v) for k, v in values.items()}
        label = None if label_key is None else self._label(where, item[label_key])
        return Row(arrays, label, where)

    def _array(self, where: str, name: str, value: object) -> Array:
        try:
            array = np.array(value)  # a copy: the callable may reuse its buffer
        except Exception as e:  # whatever the value's own conversion raises
            raise BadInput(
                f"{name!r} in {where} is no array: {type(e).__name__}: {e}", "Yield NumPy arrays"
            ) from e
        if array.dtype.kind not in "biufc":
            raise BadInput(
                f"{name!r} in {where} holds {array.dtype}, not numbers", "Yield NumPy arrays of numbers"
            )
        return array

    def _label(self, where: str, value: object) -> Label | None:
        if value is None:
            return None
        return label_of(self._array(f"{where} of {self._spec}", LABELS, value))
