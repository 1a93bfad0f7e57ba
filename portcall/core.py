"""The nouns of portcall on the host: cells, outcomes, and the settings of a command.

What a device needs too (Artifact, Backend, Graph, Recipe, Source, Workload, ...) lives in
``portcall.targets.agent.contract`` and is re-exported here.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from portcall.exporters import backend_names, get_backend
from portcall.targets.agent.contract import (
    Artifact,
    Backend,
    Graph,
    Precision,
    Range,
    Ranges,
    Recipe,
    Source,
    TensorSpec,
    Workload,
)
from portcall.targets.agent.errors import (
    BadInput,
    CellFailed,
    PortcallError,
    UnavailableError,
    UnsupportedError,
    VerificationFailed,
)

__all__ = [
    "Artifact",
    "Backend",
    "BadInput",
    "Cell",
    "CellFailed",
    "Graph",
    "Outcome",
    "PortcallError",
    "Precision",
    "Range",
    "Ranges",
    "Recipe",
    "Settings",
    "Source",
    "TensorSpec",
    "UnavailableError",
    "UnsupportedError",
    "VerificationFailed",
    "Workload",
    "outcome_of",
    "parse_cells",
]


class Outcome(StrEnum):
    """How a cell of the matrix ended; a cell always holds one."""

    ARTIFACT = "artifact"
    MEASUREMENT = "measurement"
    UNAVAILABLE = "unavailable"
    UNSUPPORTED = "unsupported"
    FAILED = "failed"


def outcome_of(error: PortcallError) -> Outcome:
    """Return the outcome of a cell that ended in *error*."""
    if isinstance(error, UnavailableError):
        return Outcome.UNAVAILABLE
    return Outcome.UNSUPPORTED if isinstance(error, UnsupportedError) else Outcome.FAILED


@dataclass(frozen=True, slots=True)
class Cell:
    """One wanted export: a backend and a precision of it."""

    backend: str
    precision: str

    @property
    def folder(self) -> str:
        return f"{self.backend}-{self.precision}"

    def __str__(self) -> str:
        return f"{self.backend}:{self.precision}"


def parse_cells(texts: list[str]) -> list[Cell]:
    """Return the cells of ``BACKEND:PRECISION[,PRECISION...][,BACKEND:...]`` texts, in order, without repeats.

    A precision without a backend belongs to the backend before it; ``BACKEND:all`` means all its precisions.
    Raises BadInput for an unknown backend or precision: what there is, and the nearest name.
    """
    cells: dict[Cell, None] = {}
    for text in texts:
        name = ""
        for part in text.replace("{", "").replace("}", "").split(","):
            head, colon, precision = part.strip().rpartition(":")
            name = head if colon else name
            if not name or not precision:
                raise BadInput(
                    f"cannot read {text!r} as BACKEND:PRECISION",
                    "Write e.g. --to onnxruntime:fp32,int8,tflite:int8",
                )
            known = get_backend(name).capabilities.precisions
            if precision != "all" and precision not in known:
                near = difflib.get_close_matches(precision, list(known), 1, 0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise BadInput(f"{name} has no precision {precision!r}", f"It has: {', '.join(known)}.{hint}")
            cells.update(dict.fromkeys(Cell(name, p) for p in (known if precision == "all" else [precision])))
    return list(cells)


_TOML_FIX = (
    'Write e.g. [backends.onnxruntime] or [environments.NAME], and below it python = "/path/to/python"'
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``portcall.toml`` and the environment say: an interpreter per backend, other environments, the cache folder.

    environments: interpreters by the name that ``compare ARTIFACT@NAME`` takes.
    """

    pythons: Mapping[str, str]
    cache: Path
    environments: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def load() -> Settings:
        """Read ``portcall.toml`` of the current folder and PORTCALL_PYTHON_NAME, PORTCALL_CACHE.

        Raises BadInput for a file that is not TOML or names an unknown backend.
        """
        file = Path("portcall.toml")
        table: dict[str, Any] = {}
        if file.is_file():
            try:
                table = tomllib.loads(file.read_text())
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise BadInput(f"portcall.toml is not valid TOML: {error}", "Correct it") from error
        if table.keys() - {"backends", "environments"}:
            raise BadInput(
                "portcall.toml holds something else than [backends.NAME] and [environments.NAME]", _TOML_FIX
            )
        pythons = _interpreters(table, "backends")
        for name in pythons:
            get_backend(name)
        for name in backend_names():
            python = os.environ.get(f"PORTCALL_PYTHON_{name.upper()}")
            if python:
                pythons[name] = python
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "portcall"
        cache = Path(os.environ.get("PORTCALL_CACHE") or default)
        return Settings(pythons, cache, _interpreters(table, "environments"))


def _interpreters(table: Mapping[str, Any], section: str) -> dict[str, str]:
    """Return the interpreter by name of ``[SECTION.NAME] python = "..."``."""
    entries = table.get(section, {})
    if not isinstance(entries, dict):
        raise BadInput(f"portcall.toml holds something else than [{section}.NAME]", _TOML_FIX)
    found = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"python"} or not isinstance(entry["python"], str):
            raise BadInput(f"portcall.toml: [{section}.{name}] is not python = PATH alone", _TOML_FIX)
        found[name] = entry["python"]
    return found
