"""DATA for calibration and evaluation: an ``.npz``, a folder of ``.npy`` or of images, or a callable.

Samples are read one at a time, so memory does not grow with the data. Opening a ``package.module:callable``
imports the user's code and iterating runs it; the other kinds run none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portcall.calibration._callable import CallableReader
from portcall.calibration._fit import fit_rows, fixed_batch, group_size, input_dtype
from portcall.calibration._folder import open_folder
from portcall.calibration._npz import NpzReader
from portcall.calibration._rows import LABELS, Label, Reader, Row, class_indices
from portcall.calibration.input_statistics import InputStatistics
from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput

_CALLABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_KINDS = (
    "an .npz keyed by input name, a folder of .npy files, a folder of images with a named preprocessing, "
    "or package.module:callable that yields dicts"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, ready for the model: every array has the input's rank and dtype, batch axis included.

    index: position in the data, from 0; slices of the data keep it.
    """

    index: int
    inputs: dict[str, np.ndarray]
    label: Label | None


class Data:
    """Samples that fit a model's inputs; may be iterated several times, in constant memory.

    Where the model's batch is fixed at b > 1 and stored samples have no batch axis of b, b consecutive ones
    make one Sample, whose label is theirs in one array, and a short tail is dropped.
    """

    def __init__(
        self, spec: str, inputs: Sequence[TensorSpec], reader: Reader, start: int = 0, stop: int | None = None
    ) -> None:
        self.spec = spec
        self._inputs = tuple(inputs)
        self._reader = reader
        self._start = start
        self._stop = stop
        self._group: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        group = self._group_size()
        stop = None if self._stop is None else self._stop * group
        index = self._start
        rows: list[Row] = []
        for row in self._reader.rows(self._start * group, stop):
            rows.append(row)
            if len(rows) == group:
                yield Sample(index, fit_rows(self._inputs, rows), _joined(rows))
                index += 1
                rows = []
        if index == 0 and self._stop is None:
            raise self._too_few(len(rows), group)

    def count(self) -> int:
        """Return the number of samples. A callable has to be run through to be counted, once."""
        rows, group = self._reader.count(), self._group_size()
        total = rows // group
        if total == 0:
            raise self._too_few(rows, group)
        return max((total if self._stop is None else min(self._stop, total)) - self._start, 0)

    def has_labels(self) -> bool:
        """Return whether samples carry a label. A callable is started to see its first sample."""
        return self._reader.labelled()

    def check_classes(self) -> None:
        """Raise BadInput where the first sample's label is no class index: an integer."""
        for row in self._reader.rows(self._start * self._group_size(), None):
            if row.label is not None:
                class_indices(row.label, f"{row.where} of {self.spec}")
            return

    def with_slice(self, start: int, stop: int | None) -> Data:
        """Return a view of samples [start, stop), counted within this view; it may turn out to be empty."""
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"a slice needs 0 <= start <= stop, not [{start}, {stop})")
        ends = [e for e in (self._stop, None if stop is None else self._start + stop) if e is not None]
        first, last = self._start + start, min(ends, default=None)
        view = Data(self.spec, self._inputs, self._reader, first if last is None else min(first, last), last)
        view._group = self._group
        return view

    def check_first(self) -> None:
        """Raise BadInput unless there is a sample and the first one fits the model."""
        group = self._group_size()
        rows = list(self._reader.rows(0, group))
        if len(rows) < group:
            raise self._too_few(len(rows), group)
        fit_rows(self._inputs, rows)

    def _group_size(self) -> int:
        """Return how many stored samples make one Sample; reads the first if the batch is fixed."""
        if self._group is None:
            if all(fixed_batch(t) <= 1 for t in self._inputs):
                self._group = 1
            else:
                first = next(self._reader.rows(0, 1), None)
                if first is None:
                    raise self._too_few(0, 1)
                self._group = group_size(self._inputs, first)
        return self._group

    def _too_few(self, found: int, group: int) -> BadInput:
        if found == 0:
            return BadInput(f"{self.spec} holds no samples", "Give at least one, 100 or more for calibration")
        return BadInput(
            f"{self.spec} holds {found} samples, and the model takes {group} at once",
            f"Give at least {group}, or export the model with a dynamic batch",
        )


def _joined(rows: Sequence[Row]) -> Label | None:
    """Return the label of a sample made of *rows*: that of a single one as it is, those of several as one array."""
    labels = [r.label for r in rows if r.label is not None]
    if len(rows) == 1 or len(labels) < len(rows):
        return rows[0].label if len(rows) == 1 else None
    shapes = {np.shape(label) for label in labels}
    if len(shapes) > 1:
        raise BadInput(
            f"{rows[0].where} to {rows[-1].where} make one batch but their labels have different shapes: "
            + ", ".join(str(list(s)) for s in sorted(shapes)),
            "Pad them to one shape, or export the model with a dynamic batch",
        )
    return np.stack([np.asarray(label) for label in labels])


def open_data(spec: str, inputs: Sequence[TensorSpec], *, preprocess: str | None = None) -> Data:
    """Return the samples that *spec* names, checked against the model's *inputs* as far as the first one.

    preprocess: a name of ``calibration.preprocess``, for a folder of images. Raises BadInput, or
    UnavailableError where Pillow is missing. Faults of later samples, and of all that a callable yields, are
    raised while iterating.
    """
    if not inputs:
        raise BadInput("the model has no inputs, so no data fits it", "Check the model")
    for tensor in inputs:
        input_dtype(tensor)
        if tensor.name == LABELS:
            raise BadInput(
                f"the model has an input named {LABELS!r}, a name that is kept for class labels",
                "Rename the input",
            )
    path = Path(spec)
    if path.is_dir():
        reader: Reader = open_folder(path, inputs, preprocess)
    elif preprocess is not None:
        raise BadInput(
            f"preprocessing {preprocess!r} is for folders of images, and {spec} is none",
            "Leave the preprocessing out; arrays are used as they are",
        )
    elif path.is_file():
        if path.suffix.lower() == ".npy":
            raise BadInput(
                f"{spec} is a single .npy file",
                f"Give a folder of them, or write numpy.savez('data.npz', {inputs[0].name}=array)",
            )
        reader = NpzReader(path, inputs)
    elif _CALLABLE.fullmatch(spec):
        return Data(spec, inputs, CallableReader(spec, inputs))
    elif path.suffix.lower() == ".npz" or "/" in spec:
        raise BadInput(f"there is no file or folder {spec}", f"DATA is {_KINDS}")
    else:
        raise BadInput(f"{spec!r} is no kind of data: no such file or folder", f"DATA is {_KINDS}")
    data = Data(spec, inputs, reader)
    data.check_first()
    return data


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over DATA finds: a hash of all samples, their number, the shapes of the first and the largest."""

    sha256: str
    n: int
    first: dict[str, list[int]]
    largest: dict[str, list[int]]
    statistics: dict[str, dict[str, Any] | None]
    """By input: see ``input_statistics``."""


def survey(data: Data) -> Survey:
    """Read all samples once.

    The hash covers names, dtypes, shapes and bytes as the model gets them (little-endian), not labels or how the
    data is stored: an .npz and a folder of the same samples have the same hash. n is 0 where there is no sample.
    """
    digest = hashlib.sha256()
    count = most = 0
    first: dict[str, list[int]] = {}
    largest: dict[str, list[int]] = {}
    statistics: dict[str, InputStatistics] = {}
    for sample in data:
        shapes = {name: list(array.shape) for name, array in sample.inputs.items()}
        size = sum(array.size for array in sample.inputs.values())
        first = first or shapes
        if size > most or not largest:
            most, largest = size, shapes
        for name in sorted(sample.inputs):
            array = sample.inputs[name]
            statistics.setdefault(name, InputStatistics()).add(array)
            array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
            header = json.dumps([name, array.dtype.str, list(array.shape)]).encode()
            digest.update(len(header).to_bytes(8, "little") + header)
            digest.update(array.reshape(-1).view(np.uint8).data)
        count += 1
    return Survey(digest.hexdigest(), count, first, largest, {k: s.summary() for k, s in statistics.items()})
