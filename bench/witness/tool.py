"""What a witness is: a runtime's own benchmark tool as a value, and what its functions take and give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portcall.core import CellFailed, Workload


@dataclass(frozen=True, slots=True)
class Input:
    """One input of the model as bound: the runtime's name, shape and dtype, and the file in the tool's folder.

    is_dynamic: the model leaves a dimension open. file: None where the tool makes its own values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_dynamic: bool
    file: str | None


@dataclass(frozen=True, slots=True)
class Case:
    """What a tool is to run. model: the file that the runtime loads. p50_ns: our P50, to count iterations by."""

    model: Path
    inputs: tuple[Input, ...]
    workload: Workload
    p50_ns: float
    version: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """How many inferences fill the workload's minimum time, at least 5."""
        return max(5, math.ceil(self.workload.min_time_s * 1e9 / self.p50_ns))

    @property
    def warmup_iterations(self) -> int:
        return max(1, math.ceil(self.workload.warmup_s * 1e9 / self.p50_ns))


@dataclass(frozen=True, slots=True)
class Plan:
    """A command line without the program, and what could not be made the same as in our measurement.

    report: the file that the tool writes into its folder. files: name in that folder -> the file to put there.
    """

    arguments: tuple[str, ...]
    differences: tuple[str, ...]
    report: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """What one run of a tool left: stdout and stderr together, and the text of its report file."""

    text: str
    report: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The latency that one run of a tool printed, in ns; None where it does not print that figure.

    n: inferences. others: further figures by the keys of our JSON ("min_ns", "p95_ns", ...).
    """

    p50_ns: float | None
    mean_ns: float | None
    n: int | None
    others: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"p50_ns": self.p50_ns, "mean_ns": self.mean_ns, "n": self.n, **self.others}


@dataclass(frozen=True, slots=True)
class Tool:
    """A runtime's own benchmark tool.

    module, distribution: of a tool written in Python, run by the backend's interpreter; None for a program, whose
    path is in the environment variable *variable* or whose name is in PATH. ask: arguments with which the program
    says its version, which *read_version* finds. fix: how to get it.
    suffix: of the input files that it reads, in the subfolder *inputs* of its folder. None where it fills inputs with
    random values of its own, floats between the two *values*: our processes of the pairs then get the same kind.
    session: options with which our session uses the same interface of the runtime as the tool.
    clock: "wall", or "device" where it prints the device's own times.
    plan raises UnsupportedError for a case that the tool cannot run; read raises CellFailed for an output that holds
    no latency, UnsupportedError for an inference too short for the tool's digits.
    """

    name: str
    backend: str
    plan: Callable[[Case], Plan]
    read: Callable[[Output], Reading]
    fix: str
    module: str | None = None
    distribution: str | None = None
    variable: str | None = None
    ask: tuple[str, ...] | None = None
    read_version: Callable[[str], str | None] | None = None
    suffix: str | None = None
    inputs: str = "."
    values: tuple[float, float] = (-1.0, 1.0)
    session: Mapping[str, Any] = field(default_factory=dict)
    clock: str = "wall"


def unreadable(name: str, output: Output, error: str | None = None) -> CellFailed:
    """Return the error for an output without a latency: its last line, or the *error* that the tool reports."""
    lines = [line.strip() for line in output.text.splitlines() if line.strip()]
    said = error or (lines[-1][:200] if lines else "nothing")
    return CellFailed(
        f"{name} printed no latency that portcall can read; it said: {said}",
        "Run the command of the result by hand; a newer version of the tool may print another format",
    )
