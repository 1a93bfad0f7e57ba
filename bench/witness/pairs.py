"""Runs a runtime's own benchmark tool in pairs with processes of ours on the same file, and says whether they agree."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.statistics import process_interval
from portcall.bench.witness import tools_for
from portcall.bench.witness.tool import Case, Input, Output, Plan, Reading, Tool
from portcall.core import (
    Artifact,
    BadInput,
    CellFailed,
    PortcallError,
    UnavailableError,
    UnsupportedError,
    Workload,
    outcome_of,
)
from portcall.targets import Driver
from portcall.targets.agent.opening import REFERENCE

PAIRS = 10

MARGIN = 0.03
"""How far the ratio may be from 1 for the two to agree."""

JUDGED_FROM_NS = 4e6
"""Below this P50 the difference of the interfaces alone exceeds the margin: the ratio is given, not judged."""


@dataclass(frozen=True, slots=True)
class Times:
    """What one process of ours measured, in ns; device is empty where the device has no clock of its own."""

    wall_ns: np.ndarray[Any, Any]
    device_ns: np.ndarray[Any, Any]


Ours = Callable[[Path, Mapping[str, Any]], Times]
"""Measures in one fresh process: the file of inputs, and options of the session."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is witnessed. inputs: the npz of the measurement. p50_ns: what that measured."""

    artifact: Artifact
    label: str
    inputs: Path
    p50_ns: float


def witness(
    driver: Driver, target: str, subject: Subject, workload: Workload, pairs: int, folder: Path, ours: Ours
) -> dict[str, Any]:
    """Return the "witness" object of the bench JSON; a tool that is missing or fails is an outcome in it.

    folder: a new one for the tool. Raises Interrupted alone.
    """
    result: dict[str, Any] = {
        "outcome": "compared", "reason": None, "fix": None, "tool": None, "version": None, "command": None, "pairs": 0,
        "statistic": None, "clock": None, "p50_ratio": None, "mean_ratio": None, "ci": None, "verdict": None,
        "theirs": None, "ours": None, "ratios": None, "differences": [],
    }  # fmt: skip
    try:
        if target != "local":
            raise UnsupportedError(f"tools run on this machine alone, not on {target}", "Use --on local")
        folder.mkdir(parents=True)
        known = tools_for(subject.artifact.backend)
        if not known:
            raise UnsupportedError(
                f"portcall knows no benchmark tool of {subject.artifact.backend}'s own",
                "See docs/witness.md for those it knows",
            )
        result["tool"] = known[0].name
        tool, found = _find(driver, known)
        result.update(tool=tool.name, version=found["version"], clock=tool.clock)
        inputs, case = _prepare(driver, tool, found["version"], subject, workload, folder)
        planned = tool.plan(case)
        _place(planned, folder)
        result["command"] = shlex.join([tool.name, *planned.arguments])
        result["differences"] = list(planned.differences)
        command = [*found["command"], *planned.arguments]
        theirs: list[Reading] = []
        mine: list[Times] = []
        for number in range(pairs):

            def run_theirs(pair: int = number) -> None:
                theirs.append(_run(driver, tool, subject, planned, command, folder, f"{pair + 1}/{pairs}"))

            def run_ours() -> None:
                mine.append(ours(inputs, tool.session))

            # Swapped from pair to pair: the first of two finds another machine than the second.
            steps = [run_ours, run_theirs] if number % 2 == 0 else [run_theirs, run_ours]
            for step in steps:
                step()
        result.update(_compared(tool, mine, theirs))
        if result["statistic"] == "mean":
            result["differences"].append(f"{tool.name} prints no median: the means are compared")
    except BadInput as error:  # of the measurement: it would have failed there
        result.update(outcome="failed", reason=error.message, fix=error.fix or None)
    except PortcallError as error:
        result.update(outcome=outcome_of(error).value, reason=error.message, fix=error.fix or None)
    except OSError as error:
        reason = f"cannot write {error.filename or folder}: {error.strerror}"
        result.update(outcome="failed", reason=reason, fix="Free space there, or set TMPDIR")
    return result


def _find(driver: Driver, tools: Sequence[Tool]) -> tuple[Tool, dict[str, Any]]:
    """Return the tool to use and where it is: one that a variable names, else the first that is installed."""
    found: list[tuple[Tool, dict[str, Any]]] = []
    missing: list[UnavailableError] = []
    for tool in tools:
        job = {
            "name": tool.name, "module": tool.module, "distribution": tool.distribution, "variable": tool.variable,
            "ask": tool.ask, "fix": tool.fix,
        }  # fmt: skip
        try:
            answer = driver.run("find_tool", job, f"find {tool.name}", tool.backend)
        except UnavailableError as error:
            if tool.variable is not None and os.environ.get(tool.variable):  # what the user asked for
                raise
            missing.append(error)
            continue
        if tool.read_version is not None:
            answer["version"] = tool.read_version(answer["output"] or "")
        found.append((tool, answer))
    if not found:
        raise UnavailableError("; ".join(e.message for e in missing), missing[0].fix)
    return next((pair for pair in found if pair[1]["chosen"]), found[0])


def _prepare(
    driver: Driver, tool: Tool, version: str | None, subject: Subject, workload: Workload, folder: Path
) -> tuple[Path, Case]:
    """Return the inputs of our processes, and the tool's case with its input files written.

    Raises UnsupportedError where the tool would fill integers with random values.
    """
    place = folder / tool.inputs
    place.mkdir(parents=True, exist_ok=True)
    path = subject.inputs if tool.suffix is not None else folder / "uniform.npz"
    if tool.suffix is None:
        write_uniform(subject.inputs, path, tool)
    job = {
        "artifact": subject.artifact.to_json(),
        "workload": workload.to_json(),
        "inputs": str(path),
        "suffix": tool.suffix,
        "directory": str(place),
    }
    answer = driver.run("write_inputs", job, f"inputs for {tool.name}", subject.artifact.backend)
    inputs = tuple(
        Input(i["name"], tuple(i["shape"]), i["dtype"], i["is_dynamic"], i["file"]) for i in answer["inputs"]
    )
    options = subject.artifact.options
    return path, Case(Path(answer["model"]), inputs, workload, subject.p50_ns, version, options)


def write_uniform(measured: Path, path: Path, tool: Tool) -> None:
    """Write one sample of the kind that the tool makes itself, with the shapes of the measured inputs."""
    rng = np.random.default_rng(0)
    low, high = tool.values
    arrays: dict[str, Any] = {}
    with np.load(measured) as stored:
        for name in stored.files:
            if name.startswith(REFERENCE):
                continue
            array = stored[name]
            if array.dtype.kind != "f":
                raise UnsupportedError(
                    f"{tool.name} fills the {array.dtype} input {name!r} with random integers, which mean nothing",
                    "Its own figure would be of other inputs: none is made",
                )
            arrays[name] = rng.uniform(low, high, (1, *array.shape[1:])).astype(array.dtype)
    np.savez(path, **arrays)


def _place(planned: Plan, folder: Path) -> None:
    """Put the files that the tool wants beside each other into its folder: by hard link, else by copy."""
    for name, source in planned.files.items():
        try:
            os.link(source, folder / name)
        except OSError:
            shutil.copy2(source, folder / name)


def _run(
    driver: Driver,
    tool: Tool,
    subject: Subject,
    planned: Plan,
    command: Sequence[str],
    folder: Path,
    number: str,
) -> Reading:
    """Return what one run of the tool printed. Raises CellFailed where it failed."""
    job = {"command": list(command), "directory": str(folder), "report": planned.report}
    answer = driver.run("run_tool", job, f"{tool.name} {number}", subject.artifact.backend)
    output = Output(answer["output"], answer["report"])
    if answer["status"] != 0:
        lines = [line.strip() for line in output.text.splitlines() if line.strip()]
        said = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "nothing"
        )
        raise CellFailed(
            f"{tool.name} ended with status {answer['status']}; it said: {said[:300]}",
            "Run the command of the result by hand; it may be a version with other options",
        )
    return tool.read(output)


def _compared(tool: Tool, mine: Sequence[Times], theirs: Sequence[Reading]) -> dict[str, Any]:
    """Return the figures: the ratio ours / theirs as geometric mean over pairs, with its 95 % t interval."""
    by_median = all(r.p50_ns for r in theirs)
    if not by_median and not all(r.mean_ns for r in theirs):
        raise CellFailed(f"{tool.name} printed neither a median nor a mean", "Use another version of it")
    series = [t.device_ns if tool.clock == "device" else t.wall_ns for t in mine]
    if not all(s.size for s in series):
        raise CellFailed("our session reports no device time to compare", "Report it with the result")
    medians, means = [float(np.median(s)) for s in series], [float(s.mean()) for s in series]
    statistic = "p50" if by_median else "mean"
    their_values = [float((r.p50_ns if by_median else r.mean_ns) or 0.0) for r in theirs]
    ratios = [a / b for a, b in zip(medians if by_median else means, their_values, strict=True)]
    ratio = float(np.exp(np.mean(np.log(ratios))))
    interval = process_interval(ratios)
    their_means = [r.mean_ns for r in theirs if r.mean_ns is not None]
    return {
        "pairs": len(ratios),
        "statistic": statistic,
        "p50_ratio": ratio if by_median else None,
        "mean_ratio": None if by_median else ratio,
        "ci": None if interval is None else list(interval),
        "verdict": verdict(float(np.median(their_values)), interval),
        "theirs": {
            "p50_ns": float(np.median(their_values)) if by_median else None,
            "mean_ns": float(np.mean(their_means)) if their_means else None,
            "processes": len(theirs),
            "runs": [r.to_json() for r in theirs],
        },
        "ours": {
            "p50_ns": float(np.median(medians)),
            "mean_ns": float(np.mean(means)),
            "processes": len(mine),
            "runs": [
                {"p50_ns": p50, "mean_ns": mean, "n": int(s.size)}
                for p50, mean, s in zip(medians, means, series, strict=True)
            ],
        },
        "ratios": ratios,
    }


def verdict(their_ns: float, interval: tuple[float, float] | None) -> str:
    """Return "agrees" or "differs" where the interval says so, "undecided", or "not judged" for a small model."""
    if their_ns < JUDGED_FROM_NS:
        return "not judged"
    low, high = 1 - MARGIN, 1 + MARGIN
    if interval is None:
        return "undecided"
    if low <= interval[0] and interval[1] <= high:
        return "agrees"
    if interval[1] < low or interval[0] > high:
        return "differs"
    return "undecided"


def with_options(artifact: Artifact, options: Mapping[str, Any]) -> Artifact:
    """Return *artifact* with further options of its session."""
    return replace(artifact, options={**artifact.options, **options})
