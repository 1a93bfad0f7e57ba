"""The samples of ``make bench-calibration`` for every contender: one reader, one sample at a time.

The contenders' own environments import this module too: standard library and numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy

Feed = dict[str, "np.ndarray[Any, Any]"]


class Images:
    """The samples of an ``.npz`` of one array, read one at a time, each float32[1, 3, height, width]."""

    def __init__(self, path: str) -> None:
        self._path = path
        with ZipFile(path) as archive:
            [member] = archive.namelist()
            with archive.open(member) as stream:
                (self._count, *sample), _ = _header(stream)
        self.name = member.removesuffix(".npy")
        self.shape = (1, *sample)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Feed]:
        with ZipFile(self._path) as archive, archive.open(f"{self.name}.npy") as stream:
            _, dtype = _header(stream)
            size = math.prod(self.shape) * dtype.itemsize
            for _ in range(self._count):
                yield {self.name: np.frombuffer(stream.read(size), dtype).reshape(self.shape)}


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    npy.read_magic(stream)
    shape, _, dtype = npy.read_array_header_1_0(stream)
    return shape, dtype


class Reader:
    """The samples as a CalibrationDataReader of onnxruntime.quantization, and of modelopt (get_first, rewind)."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self.rewind()

    def rewind(self) -> None:
        self._rest = iter(self._images)
        self._left = len(self._images)

    def get_first(self) -> Feed:
        return next(iter(self._images))

    def get_next(self) -> Feed | None:
        if self._left == 0:
            return None
        self._left -= 1
        return next(self._rest, None)

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Let get_next stop after the samples [start_index, end_index); they come in order, so it reads on."""
        self._left = end_index - start_index
