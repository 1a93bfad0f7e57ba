"""DATA in an ``.npz``: arrays keyed by input name, read one row at a time from the zip, never whole.

Names in the zip are keys only: nothing is extracted. Pickles (object arrays) are refused.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from portcall.calibration._rows import LABELS, Array, Row, check_labels, check_names, label_of
from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput

_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,  # a bad .npy header
    NotImplementedError,  # an unknown compression
    RuntimeError,  # an encrypted member
)
_CHUNK_BYTES = 1 << 20  # so that reading a row needs no second buffer of its size
_IGNORED = "reference/"  # outputs of the reference, which portcall's own samples.npz holds beside the inputs


@dataclass(frozen=True, slots=True)
class _Member:
    """One array of the zip, as its .npy header describes it; *shape* includes the sample axis."""

    key: str
    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class NpzReader:
    """Rows of an ``.npz``. Opening reads the headers only."""

    def __init__(self, path: Path, inputs: Sequence[TensorSpec]) -> None:
        self._path = path
        members = _read_headers(path)
        labels = members.pop(LABELS, None)
        check_names(str(path), inputs, members)
        counts = {m.key: m.shape[0] for m in members.values()}
        if len(set(counts.values())) > 1:
            raise BadInput(
                f"inputs in {path} have different numbers of samples: "
                + ", ".join(f"{k} {n}" for k, n in sorted(counts.items())),
                "The first axis of every array counts the samples and must be equally long",
            )
        self._count = next(iter(counts.values()))
        if labels is not None:
            check_labels(str(path), labels.shape, labels.dtype, self._count)
        self._inputs = list(members.values())
        self._labels = labels

    def count(self) -> int:
        return self._count

    def labelled(self) -> bool:
        return self._labels is not None

    def rows(self, start: int, stop: int | None) -> Iterator[Row]:
        stop = self._count if stop is None else min(stop, self._count)
        if start >= stop:
            return
        members = [*self._inputs, *([self._labels] if self._labels else [])]
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(self._path))
                streams = [stack.enter_context(archive.open(m.file)) for m in members]
                for member, stream in zip(members, streams, strict=True):
                    _skip(stream, member.offset + start * member.row_bytes)
            except _UNREADABLE as e:
                raise _corrupt(self._path, "", e) from e
            for index in range(start, stop):
                arrays = {m.key: self._row(m, s) for m, s in zip(members, streams, strict=True)}
                label = label_of(arrays.pop(LABELS)) if self._labels else None
                yield Row(arrays, label, f"sample {index}")

    def _row(self, member: _Member, stream: IO[bytes]) -> Array:
        array = np.empty(member.shape[1:], member.dtype)
        view = array.reshape(-1).view(np.uint8).data
        done = 0
        try:
            while done < len(view):
                part = stream.read(min(_CHUNK_BYTES, len(view) - done))
                if not part:
                    raise EOFError("the data ends early")
                view[done : done + len(part)] = part
                done += len(part)
        except _UNREADABLE as e:
            raise _corrupt(self._path, member.key, e) from e
        return array


def _read_headers(path: Path) -> dict[str, _Member]:
    """Return key -> member of every array in the zip, checked against the size that the zip records."""
    members: dict[str, _Member] = {}
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as e:
        raise BadInput(
            f"{path} is not an .npz file, or was cut off ({e})",
            "Write it with numpy.savez, keyed by input name",
        ) from e
    except OSError as e:
        raise _corrupt(path, "", e) from e
    with archive:
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")
            if info.filename.startswith(_IGNORED) or info.is_dir():
                continue
            if key == info.filename:
                raise BadInput(
                    f"{path} is not an .npz file: it holds {info.filename!r}, which is no .npy array",
                    "Write it with numpy.savez, keyed by input name",
                )
            try:
                with archive.open(info) as stream:
                    members[key] = _read_header(path, key, info, stream)
            except _UNREADABLE as e:
                raise _corrupt(path, key, e) from e
    return members


def _read_header(path: Path, key: str, info: zipfile.ZipInfo, stream: IO[bytes]) -> _Member:
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy version {version[0]}.{version[1]} is for structured arrays, not for numbers")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise BadInput(
            f"{key!r} in {path} is an object array (a pickle), which is never loaded", "Store numbers"
        )
    if dtype.kind not in "biufc":
        raise BadInput(f"{key!r} in {path} holds {dtype}, not numbers", "Store numbers")
    if not shape:
        raise BadInput(
            f"{key!r} in {path} is a single number without a sample axis", "The first axis counts the samples"
        )
    if fortran and len(shape) > 1:
        raise BadInput(
            f"{key!r} in {path} is in Fortran order, in which one sample cannot be read on its own",
            f"Store numpy.ascontiguousarray({key})",
        )
    offset = stream.tell()
    wanted = offset + math.prod(shape) * dtype.itemsize
    if info.file_size != wanted:
        raise ValueError(f"its header promises {wanted} bytes and it has {info.file_size}")
    return _Member(key, info.filename, offset, tuple(shape), dtype)


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        part = stream.read(min(_CHUNK_BYTES, size))
        if not part:
            raise EOFError("the data ends early")
        size -= len(part)


def _corrupt(path: Path, key: str, error: BaseException) -> BadInput:
    what = f"{key!r} in {path}" if key else str(path)
    return BadInput(f"{what} cannot be read: {type(error).__name__}: {error}", "Write the file again")
