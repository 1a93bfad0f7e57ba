"""The calibration table (``*.pctable``): per tapped graph and tensor what was observed, and ranges derived from it.

A zip of ``table.json`` and ``.npy`` arrays; loading it needs neither the model nor a runtime.

Schema 1: exact minimum and maximum per tensor.
Schema 2: a histogram per tensor, channel means of what meets weights, which samples were observed, ``auto``'s choices.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall.calibration.histogram import BINS, Histogram
from portcall.calibration.methods import check_method, derive
from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import BadInput, CellFailed

SCHEMA = 2
MEAN_UNIT = 2.0**-28
"""Channel means are summed as integers of this unit, so that the sum does not depend on the order of samples."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Every zip member carries this date, so that equal tables are equal files."""

Interval = tuple[int, int]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class DataRecord:
    """Which samples belong to a table: the DATA spec, its preprocessing, [start, stop), their hash and number.

    largest: the shapes of the largest sample, by input name.
    """

    spec: str
    preprocess: str | None
    start: int
    stop: int | None
    sha256: str
    n: int
    largest: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in self.__slots__}


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``auto`` chose: tensor -> method, by the output error on *n* samples kept out of the histograms.

    sqnr_db: of the network with all activations quantized so, and with each single method, on those samples.
    """

    methods: Mapping[str, str]
    n: int
    sqnr_db: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"methods": dict(self.methods), "n": self.n, "sqnr_db": dict(self.sqnr_db)}


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """What was observed on one tapped graph.

    planned: the samples of *data*, counted from its start, that the histograms are to hold; observed: those that they
    hold, less where this is a shard. held_every: k where every k-th sample was kept out of them, to choose methods on;
    0 where none was. step: every step-th element was counted (extremes are exact at any step).
    means: tensor -> int64[channels], the sum over samples of the channel's mean in units of MEAN_UNIT.
    choices: "asymmetric" or "symmetric" -> what ``auto`` chose.
    """

    kind: str
    graph_sha256: str
    source_sha256: str
    data: DataRecord
    planned: Interval
    observed: tuple[Interval, ...]
    histograms: Mapping[str, Histogram]
    means: Mapping[str, Ints] = field(default_factory=dict)
    step: int = 1
    held_every: int = 0
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of samples observed."""
        return sum(not is_held(i, self.held_every) for a, b in self.observed for i in range(a, b))

    @property
    def is_complete(self) -> bool:
        return self.observed == (self.planned,)

    def ranges(self, method: str, symmetric: bool = False, bits: int = 8) -> dict[str, Range]:
        """Return the range of every tensor by *method*. Raises BadInput for an unknown one, or ``auto`` not stored."""
        check_method(method)
        methods = self.chosen(symmetric) if method == "auto" else dict.fromkeys(self.histograms, method)
        found = {}
        for name, histogram in self.histograms.items():
            derived = derive(histogram, methods[name], symmetric, bits)
            sums = self.means.get(name)
            mean = None if sums is None else tuple((sums * (MEAN_UNIT / self.n)).tolist())
            found[name] = replace(derived, channel_mean=mean)
        return found

    def chosen(self, symmetric: bool) -> Mapping[str, str]:
        """Return the method that ``auto`` chose for every tensor. Raises BadInput where the table holds none."""
        scheme = "symmetric" if symmetric else "asymmetric"
        if scheme not in self.choices:
            raise BadInput(
                f"the table holds no choice of methods for {scheme} ranges of the {self.kind} graph",
                "Run portcall calibrate with --auto, or choose another --method",
            )
        return self.choices[scheme].methods

    def merged(self, other: Section) -> Section:
        """Return what both observed together. Raises BadInput for other graphs, data or options, or an overlap."""
        for what in ("kind", "graph_sha256", "source_sha256", "data", "planned", "step", "held_every"):
            if getattr(self, what) != getattr(other, what):
                raise BadInput(
                    f"the tables differ in {what}: {getattr(self, what)} and {getattr(other, what)}",
                    "Merge shards of one model, one DATA and the same options",
                )
        if set(self.histograms) != set(other.histograms) or set(self.means) != set(other.means):
            raise BadInput("the tables hold other tensors", "Make all shards with one version of portcall")
        observed = _joined([*self.observed, *other.observed])
        histograms = {k: h.merged(other.histograms[k]) for k, h in self.histograms.items()}
        means = {k: m + other.means[k] for k, m in self.means.items()}
        return replace(self, observed=observed, histograms=histograms, means=means, choices={})


def is_held(index: int, every: int) -> bool:
    """Tell whether a sample, counted from the start of DATA, is kept out of the histograms."""
    return every > 0 and index % every == every - 1


def _joined(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """Return the union of disjoint intervals. Raises BadInput where two overlap."""
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start < joined[-1][1]:
            raise BadInput(
                f"the tables overlap: both hold sample {start}", "Merge each shard once: 1/N, 2/N, ... N/N"
            )
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


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

    def merged(self, other: CalibrationTable) -> CalibrationTable:
        """Return the sum of two shards. Raises BadInput where they do not belong together."""
        if set(self.sections) != set(other.sections):
            raise BadInput("the tables were made from other graphs", "Merge shards of one model and one DATA")
        return CalibrationTable({k: s.merged(other.sections[k]) for k, s in self.sections.items()})

    def save(self, path: Path) -> None:
        """Write to *path* whole or not at all; equal tables give equal bytes."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            listing = []
            for number, key in enumerate(sorted(self.sections)):
                entry, arrays = _packed(self.sections[key])
                listing.append(entry)
                for name, array in arrays.items():
                    stream = io.BytesIO()
                    np.save(stream, array, allow_pickle=False)
                    _write(archive, f"{number}/{name}.npy", stream.getvalue())
            text = json.dumps({"schema": SCHEMA, "sections": listing}, indent=1, sort_keys=True)
            _write(archive, "table.json", text.encode())
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
                    _unpacked(archive, number, entry) for number, entry in enumerate(table["sections"])
                ]
        except _MALFORMED as error:
            raise BadInput(f"{path} is not a calibration table: {error}", "Calibrate again") from error
        return CalibrationTable({s.graph_sha256: s for s in sections})


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


def _packed(section: Section) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Return the JSON entry and the arrays of a section; counts and means of all tensors are joined end to end."""
    histograms, means = list(section.histograms.values()), list(section.means.values())
    entry = {
        "kind": section.kind,
        "graph_sha256": section.graph_sha256,
        "source_sha256": section.source_sha256,
        "data": section.data.to_json(),
        "planned": list(section.planned),
        "observed": [list(i) for i in section.observed],
        "step": section.step,
        "held_every": section.held_every,
        "tensors": list(section.histograms),
        "mean_tensors": list(section.means),
        "choices": {k: c.to_json() for k, c in section.choices.items()},
    }
    counts = np.concatenate([h.counts for h in histograms] or [np.zeros(0, np.int64)])
    arrays = {
        "minimum": np.array([h.minimum for h in histograms], np.float64),
        "maximum": np.array([h.maximum for h in histograms], np.float64),
        "exponent": np.array([h.exponent for h in histograms], np.int64),
        "first": np.array([h.first for h in histograms], np.int64),
        "bins": np.array([len(h.counts) for h in histograms], np.int64),
        "counts": counts.astype(np.uint32) if counts.max(initial=0) < 1 << 32 else counts,
        "channels": np.array([len(m) for m in means], np.int64),
        "means": np.concatenate(means or [np.zeros(0, np.int64)]),
    }
    return entry, arrays


def _unpacked(archive: zipfile.ZipFile, number: int, entry: Mapping[str, Any]) -> Section:
    def array(name: str, dtype: type[np.generic], length: int | None) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = np.load(
            io.BytesIO(archive.read(f"{number}/{name}.npy")), allow_pickle=False
        )
        if found.ndim != 1 or found.dtype != dtype or (length is not None and len(found) != length):
            raise ValueError(f"section {number} does not hold one {name} for each tensor")
        return found

    names, mean_names = list(entry["tensors"]), list(entry["mean_tensors"])
    low, high = array("minimum", np.float64, len(names)), array("maximum", np.float64, len(names))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise ValueError(f"section {number} holds a range that is none")
    exponent, first = array("exponent", np.int64, len(names)), array("first", np.int64, len(names))
    bins = array("bins", np.int64, len(names))
    if not ((bins >= 1) & (bins <= BINS)).all() or not ((exponent >= -200) & (exponent <= 200)).all():
        raise ValueError(f"section {number} holds a histogram that is none")
    ends = np.floor(np.ldexp(np.stack([low, high]), -exponent))
    if not (ends == [first, first + bins - 1]).all():
        raise ValueError(f"section {number} holds a histogram of another range")
    counts = np.load(io.BytesIO(archive.read(f"{number}/counts.npy")), allow_pickle=False)
    if counts.ndim != 1 or counts.dtype not in (np.uint32, np.int64) or len(counts) != bins.sum():
        raise ValueError(f"section {number} does not hold the counts of each tensor")
    counts = counts.astype(np.int64)
    if counts.min(initial=0) < 0:
        raise ValueError(f"section {number} holds negative counts")
    histograms = {
        name: Histogram(int(exponent[i]), int(first[i]), part, float(low[i]), float(high[i]))
        for i, (name, part) in enumerate(zip(names, _split(counts, bins), strict=True))
    }
    channels = array("channels", np.int64, len(mean_names))
    means = array("means", np.int64, None)
    if (channels < 1).any() or len(means) != channels.sum():
        raise ValueError(f"section {number} does not hold the means of each channel")
    start, stop = entry["planned"]
    return Section(
        kind=entry["kind"],
        graph_sha256=entry["graph_sha256"],
        source_sha256=entry["source_sha256"],
        data=DataRecord(**entry["data"]),
        planned=(int(start), int(stop)),
        observed=tuple((int(a), int(b)) for a, b in entry["observed"]),
        histograms=histograms,
        means=dict(zip(mean_names, _split(means, channels), strict=True)),
        step=int(entry["step"]),
        held_every=int(entry["held_every"]),
        choices={
            k: Choice(dict(c["methods"]), int(c["n"]), dict(c["sqnr_db"]))
            for k, c in entry["choices"].items()
        },
    )


def _split(joined: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return np.split(joined, np.cumsum(sizes)[:-1]) if len(sizes) else []


def table_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
