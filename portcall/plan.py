"""What an export was asked for, and the samples that all its cells are compared on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portcall.accuracy import Accuracy, Scored
from portcall.core import Cell
from portcall.recipe import BackendOptions
from portcall.workspace import DataArgument


@dataclass(slots=True)
class ExportPlan:
    """Everything ``export`` was asked for."""

    model: str
    cells: Sequence[Cell]
    output: Path
    data: DataArgument | None = None
    evaluation: DataArgument | None = None
    table: Path | None = None
    method: str = "minmax"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of every cell's recipe: see ``Recipe``."""
    backend_options: BackendOptions = field(default_factory=dict)
    equalize: bool = False
    parity_report: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    accuracy: Accuracy = field(default_factory=Accuracy)


@dataclass(frozen=True, slots=True)
class Samples:
    """The evaluation samples with the reference's outputs, and the few of them that every artifact carries."""

    folder: Path
    packed: Path
    packed_n: int
    scored: Scored
    notes: Sequence[str] = ()
    """Warnings about these samples, for every manifest."""
