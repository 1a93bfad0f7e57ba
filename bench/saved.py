"""Reads results that ``bench`` saved: ``bench.json`` and, per process, the raw samples beside it.

Reports, other tools' formats and comparisons of saved results start here. A file that ``bench --json`` printed is read
too; it has no raw samples.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import bidirectional, category

import numpy as np

from portcall.core import BadInput, Outcome

SCHEMA = 1
"""1: {"schema", "results": [...]}; "raw" of a result names its file of samples, relative to the folder."""

FILE = "bench.json"
RAW = "raw"
LABELS = ("emulated", "simulated", "interpreted", "estimated")
"""Keys of a result that say that its figures are not of the real thing; where one is true, its name says so."""

_AGAIN = "Run portcall bench again, with -o"
_TEXTS = ("artifact", "backend", "precision", "target", "outcome")
_OBJECTS = ("latency", "cpu", "device", "memory", "environment", "parity", "eval", "workload")
_LISTS = ("warnings", "per_process")
_COUNTS = ("n", "processes")
_CLOCKS = ("wall_ns", "cpu_ns", "device_ns")


@dataclass(frozen=True, slots=True)
class ProcessSamples:
    """What one fresh process measured, one value per inference in order, in nanoseconds.

    number: of the process within its artifact, from 0; gaps are processes whose samples were discarded. wall_ns,
    cpu_ns, device_ns: int64[n]; cpu_ns and device_ns are None where no such clock was read.
    """

    number: int
    wall_ns: np.ndarray[Any, Any]
    cpu_ns: np.ndarray[Any, Any] | None
    device_ns: np.ndarray[Any, Any] | None


@dataclass(frozen=True)
class SavedResult:
    """One cell of a saved bench: its entry in the JSON, and its raw samples, read when they are asked for."""

    result: Mapping[str, Any]
    origin: Path
    raw: Path | None

    @property
    def measured(self) -> bool:
        """Whether it holds figures; else its "reason" and "fix" say why not."""
        return self.result["outcome"] == Outcome.MEASUREMENT and self.result.get("latency") is not None

    @property
    def latency(self) -> Mapping[str, Any]:
        """The "latency" object of a measured cell."""
        found: Mapping[str, Any] = self.result["latency"]
        return found

    def get(self, *path: str) -> Any:
        """Return the value at *path* in the result, or None where a part of it is absent."""
        value: Any = self.result
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *path: str) -> float | None:
        """Return the finite number at *path*, or None where there is none."""
        value = self.get(*path)
        real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return value if real else None

    def interval(self, key: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a latency figure such as "p50_ns", or None where it has none."""
        ends = self.get("latency", "ci", key)
        if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(e, int | float) for e in ends):
            return None
        return float(ends[0]), float(ends[1])

    @cached_property
    def processes(self) -> list[ProcessSamples]:
        """Raw samples per process, read once. Raises BadInput where they are missing, damaged or another bench's."""
        if self.raw is None:
            if not self.measured:
                return []
            raise BadInput(f"{self.origin} has no raw samples beside it", _AGAIN)
        found = _read(self.raw)
        n = sum(p.wall_ns.size for p in found)
        if self.measured and n != self.latency["n"]:
            raise BadInput(
                f"{self.raw} holds {n} samples, {self.origin} says n={self.latency['n']}: they are of two runs",
                _AGAIN,
            )
        return found


def load_results(path: str | Path) -> list[SavedResult]:
    """Return the results in a folder that ``bench -o`` wrote, or in a file that holds what ``bench --json`` printed.

    Raises BadInput where it is missing, not JSON, of another schema or form, or names a file outside its folder.
    """
    given = Path(path)
    file = given / FILE if given.is_dir() else given
    answer = _json(file, given)
    entries = answer.get("results")
    if answer.get("schema") != SCHEMA or not isinstance(entries, list):
        raise BadInput(
            f"{file} is no result of portcall bench (schema {answer.get('schema')!r})",
            f"Name a folder that portcall bench -o wrote; this portcall reads schema {SCHEMA}",
        )
    return [_entry(entry, number, file) for number, entry in enumerate(entries)]


def load_all(paths: Sequence[str | Path]) -> list[SavedResult]:
    """Return the results of several folders or files, in order. Raises BadInput where there are none at all."""
    found = [result for path in paths for result in load_results(path)]
    if not found:
        raise BadInput(f"no results in {', '.join(map(str, paths))}", "Name what portcall bench -o wrote")
    return found


def names(results: Sequence[SavedResult]) -> list[str]:
    """Return one name per result, unique and the same from run to run, for tools that follow a name over time.

    ``onnxruntime:int8``, a bare file's name, or either with what differs from the default: ``@target``,
    ``/batch:8``, ``/threads:4`` (as google-benchmark writes them), ``(emulated)``. Names that are alike get the
    artifact's path in front, or the bench's where the artifacts are the same.
    """
    short = [_name(r.result) for r in results]
    alike: dict[str, list[SavedResult]] = {}
    for name, result in zip(short, results, strict=True):
        alike.setdefault(name, []).append(result)
    longer = [_in_front(r, alike[name]) + name for r, name in zip(results, short, strict=True)]
    seen: Counter[str] = Counter()
    unique = []
    for name in longer:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return unique


def _in_front(result: SavedResult, alike: Sequence[SavedResult]) -> str:
    """Return what goes before a name that several results have: the bench's path if they are of several benches of
    the same artifacts, else the artifact's."""
    if len(alike) == 1:
        return ""
    artifacts, benches = {r.result["artifact"] for r in alike}, {r.origin for r in alike}
    if len(artifacts) < len(alike) == len(benches):
        return f"{result.origin.parent if result.origin.name == FILE else result.origin} "
    return f"{result.result['artifact']} "


def visible(text: str) -> str:
    """Return *text* with U+FFFD for control characters, which XML and HTML cannot hold, and for those that turn the
    reading direction; line ends and tabs stay."""
    return "".join(
        "\ufffd" if (category(c) == "Cc" and c not in "\n\t") or bidirectional(c) in _TURNS else c
        for c in text
    )


_TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def _name(result: Mapping[str, Any]) -> str:
    bare = result["precision"] == "as is"
    name = Path(result["artifact"]).name if bare else f"{result['backend']}:{result['precision']}"
    if result["target"] != "local":
        name += f"@{result['target']}"
    workload = result.get("workload") or {}
    for key in ("batch", "threads"):
        if workload.get(key, 1) != 1:
            name += f"/{key}:{workload[key]}"
    labels = [word for word in LABELS if result.get(word)]
    return f"{name} ({', '.join(labels)})" if labels else name


def _json(file: Path, given: Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        answer = _clean(json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse))
    except FileNotFoundError as error:
        what = f"{given} holds no {FILE}" if given.is_dir() else f"no file or folder {given}"
        raise BadInput(what, "Name a folder that portcall bench -o wrote") from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}", "Check its permissions") from error
    except (ValueError, RecursionError) as error:  # JSON and text decoding errors are ValueErrors
        raise BadInput(f"{file} is not valid JSON: {error}", _AGAIN) from error
    if not isinstance(answer, dict):
        raise BadInput(f"{file} is no result of portcall bench", "Name a folder that portcall bench -o wrote")
    return answer


def _clean(value: Any) -> Any:
    """Return *value* with texts that every format can hold: bytes of a path that are no UTF-8 as ``\\udcff``."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, list):
        return [_clean(v) for v in value]
    return {_clean(k): _clean(v) for k, v in value.items()} if isinstance(value, dict) else value


def _entry(entry: Any, number: int, file: Path) -> SavedResult:
    """Return one checked result. Keys that a newer portcall adds are left as they are."""

    def malformed(what: str) -> BadInput:
        return BadInput(f"{file}, result {number}: {what}", _AGAIN)

    if not isinstance(entry, dict):
        raise malformed("it is no object")
    for key in _TEXTS:
        if not isinstance(entry.get(key), str):
            raise malformed(f"{key!r} is missing or no text")
    for key in _OBJECTS:
        if not isinstance(entry.get(key), dict | None):
            raise malformed(f"{key!r} is no object")
    for key in _LISTS:
        if not isinstance(entry.get(key), list | None):
            raise malformed(f"{key!r} is no list")
    for key, part in (entry.get("environment") or {}).items():
        if key in ("machine", "stack", "state") and not isinstance(part, dict | None):
            raise malformed(f"{key!r} of its environment is no object")
    latency = entry.get("latency")
    if latency is not None:
        for key in _COUNTS:
            if not isinstance(latency.get(key), int) or isinstance(latency[key], bool):
                raise malformed(f"latency has no whole number {key!r}")
    if entry["outcome"] not in {o.value for o in Outcome}:
        raise malformed(f"unknown outcome {entry['outcome']!r}")
    return SavedResult(entry, file, _raw_file(entry, number, file))


def _raw_file(entry: Mapping[str, Any], number: int, file: Path) -> Path | None:
    """Return the file of raw samples that belongs to an entry, or None where the bench did not save any.

    An entry names it; of an older bench it is found by its number.
    """
    folder = file.parent
    named = entry.get("raw")
    if named is None:
        found = sorted((folder / RAW).glob(f"{number:03d}-*.npz")) if file.name == FILE else []
        if len(found) != 1:
            return None
        path = found[0]
    elif not isinstance(named, str) or not _is_plain(named):
        raise BadInput(f"{file} names {named!r}, which is outside its folder", "Do not use this result")
    else:
        path = folder / named
    if path.resolve().parent != folder.resolve() / RAW:  # a link that leads elsewhere
        raise BadInput(f"{path} leads outside of {folder / RAW}", "Do not use this result")
    if not path.is_file():
        raise BadInput(f"{file} names {named}, which is missing", f"Copy the folder whole. {_AGAIN}")
    return path


def _is_plain(name: str) -> bool:
    """Tell whether *name* is a file directly in the folder of raw samples."""
    folder, slash, last = name.partition("/")
    return folder == RAW and bool(slash) and last not in ("", ".", "..") and not set(last) & {"/", "\0"}


def _read(path: Path) -> list[ProcessSamples]:
    damaged = f"{path} is damaged"
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise BadInput(f"{damaged}: {error}", _AGAIN) from error
    by_process: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    for name, array in arrays.items():
        found = re.fullmatch(r"(wall_ns|cpu_ns|device_ns)_(\d+)", name)
        if found is None:
            continue  # of a newer portcall
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise BadInput(f"{damaged}: {name} is {array.dtype}{list(array.shape)}", _AGAIN)
        by_process.setdefault(int(found[2]), {})[found[1]] = array
    processes = []
    for number, clocks in sorted(by_process.items()):
        sizes = {a.size for a in clocks.values()}
        if "wall_ns" not in clocks or len(sizes) != 1:
            raise BadInput(f"{damaged}: process {number} has arrays of {sorted(sizes)} samples", _AGAIN)
        processes.append(ProcessSamples(number, *(clocks.get(k) for k in _CLOCKS)))  # type: ignore[arg-type]  # wall is there
    return processes
