"""The calibration table (``*.pctable``): per tapped graph and tensor what was observed, and ranges derived from it.

A zip of ``table.json`` and one ``.npy`` per array. Schema 1: exact minimum and maximum per tensor.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import BadInput, CellFailed

SCHEMA = 1
METHODS = ("minmax",)
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Every zip member carries this date, so that equal tables are equal files."""


def check_method(name: str) -> None:
    """Raise BadInput unless ranges can be derived by the method *name*: what there is, and the nearest name."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"no calibration method {name!r}", f"There are: {', '.join(METHODS)}.{hint}")


@dataclass(frozen=True, slots=True)
class DataRecord:
    """Which samples were observed: the DATA spec, its preprocessing, [start, stop), their hash and number."""

    spec: str
    preprocess: str | None
    start: int
    stop: int | None
    sha256: str
    n: int

    def to_json(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in self.__slots__}


@dataclass(frozen=True, slots=True)
class Section:
    """What was observed on one tapped graph. minimum and maximum: float64[len(tensors)], in the tensors' own unit."""

    kind: str
    graph_sha256: str
    source_sha256: str
    data: DataRecord
    tensors: tuple[str, ...]
    minimum: np.ndarray[Any, np.dtype[np.float64]]
    maximum: np.ndarray[Any, np.dtype[np.float64]]

    def ranges(self, method: str) -> dict[str, Range]:
        """Return the range of every tensor by *method*. Raises BadInput for an unknown method."""
        check_method(method)
        pairs = zip(self.tensors, self.minimum.tolist(), self.maximum.tolist(), strict=True)
        return {name: Range(low, high) for name, low, high in pairs}


# What zipfile, zlib, json and numpy raise for a file that was damaged or made by something else.
_MALFORMED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    OSError,
)


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """Sections by graph hash."""

    sections: Mapping[str, Section]

    def with_section(self, section: Section) -> CalibrationTable:
        return replace(self, sections={**self.sections, section.graph_sha256: section})

    def save(self, path: Path) -> None:
        """Write to *path* whole or not at all; equal tables give equal bytes."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            listing = []
            for number, key in enumerate(sorted(self.sections)):
                section = self.sections[key]
                listing.append(
                    {
                        "kind": section.kind,
                        "graph_sha256": section.graph_sha256,
                        "source_sha256": section.source_sha256,
                        "data": section.data.to_json(),
                        "tensors": list(section.tensors),
                    }
                )
                for name in ("minimum", "maximum"):
                    array = io.BytesIO()
                    np.save(array, getattr(section, name), allow_pickle=False)
                    archive.writestr(zipfile.ZipInfo(f"{number}/{name}.npy", EPOCH), array.getvalue())
            text = json.dumps({"schema": SCHEMA, "sections": listing}, indent=1, sort_keys=True)
            archive.writestr(zipfile.ZipInfo("table.json", EPOCH), text)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(buffer.getvalue())
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise CellFailed(
                f"cannot write {path}: {error.strerror}", "Free space there or choose another -o"
            ) from error

    @staticmethod
    def load(path: Path) -> CalibrationTable:
        """Read a table. Raises BadInput where it is missing, no table, or of another schema."""
        if not path.is_file():
            raise BadInput(f"no calibration table {str(path)!r}", "Run: portcall calibrate MODEL --data DATA")
        try:
            with zipfile.ZipFile(path) as archive:
                table = json.loads(archive.read("table.json"))
                if table["schema"] != SCHEMA:
                    raise BadInput(
                        f"{path} has schema {table['schema']!r}, this portcall reads {SCHEMA}",
                        "Calibrate again",
                    )
                sections = [
                    _section(archive, number, entry) for number, entry in enumerate(table["sections"])
                ]
        except _MALFORMED as error:
            raise BadInput(f"{path} is not a calibration table: {error}", "Calibrate again") from error
        return CalibrationTable({s.graph_sha256: s for s in sections})


def _section(archive: zipfile.ZipFile, number: int, entry: Mapping[str, Any]) -> Section:
    def array(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        found: np.ndarray[Any, Any] = np.load(
            io.BytesIO(archive.read(f"{number}/{name}.npy")), allow_pickle=False
        )
        return found

    tensors = tuple(entry["tensors"])
    low, high = array("minimum"), array("maximum")
    if not all(a.dtype == np.float64 and a.shape == (len(tensors),) for a in (low, high)):
        raise ValueError(f"section {number} does not hold a range for each of its {len(tensors)} tensors")
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise ValueError(f"section {number} holds a range that is none")
    data = DataRecord(**entry["data"])
    return Section(entry["kind"], entry["graph_sha256"], entry["source_sha256"], data, tensors, low, high)


def table_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
