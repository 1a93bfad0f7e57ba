"""Measures artifacts in a mode other than latency: fresh processes, rounds over all artifacts and all their points."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.modes import Arrival, Cold, Mode, Sustained, Throughput
from portcall.bench.modes_arrival import arrival_figures
from portcall.bench.modes_cold import KEYS, cold_figures
from portcall.bench.modes_sustained import sustained_figures
from portcall.bench.modes_throughput import point_figures, throughput_figures
from portcall.bench.passes import Bench, finish
from portcall.bench.result import result_of
from portcall.bench.rounds import attempt
from portcall.bench.saving import check_output, save
from portcall.bench.subject import Subject, find_inputs, open_subjects
from portcall.core import (
    BadInput,
    CellFailed,
    PortcallError,
    UnavailableError,
    UnsupportedError,
    VerificationFailed,
    Workload,
    outcome_of,
)
from portcall.targets import Driver, get_target
from portcall.targets.agent import settings
from portcall.workspace import DataArgument, Workspace

_ALLOWANCE_S = 60.0
"""Of a worker's --timeout, for what is not the measured time: start, load, warm-up."""


@dataclass(slots=True)
class _Point:
    """One setting of a subject: the job that measures it, and what its processes have told so far.

    drop: arguments of ``cold:drop``, done in a process of its own before each measurement. lost: why processes died;
    nothing of them counts. error: why this point has no figures.
    """

    label: str
    job: str
    workload: Workload
    arguments: dict[str, Any]
    drop: dict[str, Any] | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    drops: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, np.ndarray[Any, Any]]] = field(default_factory=list)
    lost: list[PortcallError] = field(default_factory=list)
    error: PortcallError | None = None
    startup_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Tell whether further processes of it would tell nothing."""
        return self.error is not None or any(d["method"] is None for d in self.drops)


@dataclass(slots=True)
class _Measured:
    """A subject with its points. left_out: processes that were not started since the time budget had ended."""

    subject: Subject
    points: list[_Point] = field(default_factory=list)
    left_out: int = 0


def run_mode(
    work: Workspace,
    specs: Sequence[str],
    target: str,
    workload: Workload,
    mode: Mode,
    data: DataArgument | None = None,
    output: Path | None = None,
) -> tuple[list[dict[str, Any]], PortcallError | None]:
    """Measure every spec in *mode*; return the ``results`` of the JSON contract, and the error of saving them.

    In every round each point of each subject gets one fresh process; a sweep's points are points, and so are the states
    of the page cache. Of a subject whose share of ``workload.max_time_s`` is spent no further process is started.
    Raises BadInput for unusable specs and settings.
    """
    settings.check(workload)
    _check(work, mode, workload)
    driver = get_target(target).driver(work)
    if output is not None:
        check_output(output)
    every = [_Measured(subject) for subject in open_subjects(specs)]
    bench = Bench(work, driver, target, workload)
    for measured in every:
        subject = measured.subject
        attempt(subject, partial(find_inputs, work, driver, subject, data, workload))
    for measured in every:
        attempt(measured.subject, partial(finish, bench, measured.subject))
        attempt(measured.subject, partial(_plan, driver, measured, workload, mode))
    for number in range(workload.processes):
        for measured in every:
            for point in measured.points:
                if not point.is_over and measured.subject.error is None:
                    _measure(work, driver, measured, point, number, workload)
    results = [_figures(m, target, workload, mode) for m in every]
    if output is not None:
        try:
            results = save(output, [(m.subject.label, _arrays(m, mode)) for m in every], results)
        except PortcallError as error:
            return results, error
    return results, None


def _check(work: Workspace, mode: Mode, workload: Workload) -> None:
    """Raise BadInput for settings that cannot go together."""
    longest = 0.0
    if isinstance(mode, Sustained):
        longest = mode.duration_s
    elif isinstance(mode, Arrival):
        longest = mode.duration_s + (mode.duration_s if mode.drain_s is None else mode.drain_s)
    if longest and longest + _ALLOWANCE_S > work.pool.timeout_s:
        raise BadInput(
            f"one process of this takes {longest:g} s and more, and --timeout ends it at {work.pool.timeout_s:g} s",
            f"Give --timeout {longest + 2 * _ALLOWANCE_S:g}",
        )
    if isinstance(mode, Throughput) and workload.batch != 1:
        raise BadInput("--batch is one batch, the throughput mode sweeps several", "Give --batches 1,2,4")


def _plan(driver: Driver, measured: _Measured, workload: Workload, mode: Mode) -> None:
    """Set the points of a subject."""
    subject = measured.subject
    if isinstance(mode, Throughput):
        for batch in mode.batches:
            for streams in mode.streams:
                point = replace(workload, batch=batch)
                measured.points.append(
                    _Point(f"batch {batch} x {streams}", "throughput:measure", point, {"streams": streams})
                )
    elif isinstance(mode, Cold):
        # A start that is not counted: it warms the page cache, and tells which files a start reads.
        label = f"first start {subject.label}"
        first = driver.run("cold:measure", subject.job(workload), label, subject.interpreter)
        for cache in mode.caches:
            drop = None if cache == "warm" else {"cache": cache, "files": first["files"]}
            measured.points.append(_Point(cache, "cold:measure", workload, {}, drop))
    elif isinstance(mode, Sustained):
        told = {"duration_s": mode.duration_s, "window_s": mode.window_s}
        measured.points.append(_Point("sustained", "sustained:measure", workload, told))
    elif isinstance(mode, Arrival):
        told = {
            "rate_per_s": mode.rate_per_s,
            "duration_s": mode.duration_s,
            "drain_s": mode.duration_s if mode.drain_s is None else mode.drain_s,
        }
        measured.points.append(_Point("arrival", "arrival:measure", workload, {**told, "seed": mode.seed}))


def _measure(
    work: Workspace, driver: Driver, measured: _Measured, point: _Point, number: int, workload: Workload
) -> None:
    """Measure one point in one fresh process, within what the budget leaves for it."""
    subject = measured.subject
    job = {**subject.job(point.workload), **point.arguments, "deadline_s": None}
    if "seed" in job:  # another part of the same Poisson process in each process
        job["seed"] = [job["seed"], number]
    if workload.max_time_s is not None:
        left = workload.max_time_s - subject.spent_s
        if left <= 0:
            measured.left_out += 1
            return
        waiting = sum(not p.is_over for p in measured.points)
        after = measured.points[measured.points.index(point) + 1 :]
        runs = 1 + sum(not p.is_over for p in after) + (workload.processes - number - 1) * waiting
        job["deadline_s"] = max(0.0, left / runs - point.startup_s)
    file = work.folder / f"samples-{number}.npz"
    file.unlink(missing_ok=True)  # of a process that died while it wrote
    job["samples"] = str(file)
    backend = subject.interpreter
    label = f"{point.label} {subject.label} {number + 1}/{workload.processes}"
    start = time.monotonic()
    try:
        if point.drop is not None:
            point.drops.append(driver.run("cold:drop", point.drop, f"drop {label}", backend))
        if not point.is_over:
            answer = driver.run(point.job, job, label, backend)
            answer.pop("files", None)
            point.answers.append(answer)
            if file.exists():
                with np.load(file) as stored:
                    point.samples.append({name: stored[name] for name in stored.files})
                file.unlink()
            point.startup_s = time.monotonic() - start - answer["elapsed_s"]
    except BadInput:
        raise
    except (UnavailableError, VerificationFailed) as error:
        subject.error = point.error = error
    except UnsupportedError as error:
        point.error = error
    except PortcallError as error:  # killed, out of memory: of a sweep, this point alone
        point.lost.append(error)
        if not point.answers and len(point.lost) == 2:
            point.error = error
    finally:
        subject.spent_s += time.monotonic() - start


def _figures(measured: _Measured, target: str, workload: Workload, mode: Mode) -> dict[str, Any]:
    """Return the result of one subject: that of the latency mode without its figures, and the mode's object."""
    subject = measured.subject
    answers = [a for p in measured.points for a in p.answers]
    for point in measured.points:
        if point.lost and not point.answers:
            point.error = point.error or point.lost[-1]
    if subject.error is None and not answers:
        errors = [p.error for p in measured.points if p.error is not None]
        reasons = [d["reason"] for p in measured.points for d in p.drops if d["reason"]]
        if errors:
            subject.error = errors[0]
        elif reasons:
            subject.error = UnavailableError(reasons[0], "Measure --page-cache warm, or another state")
        else:
            subject.error = CellFailed(
                f"the time budget of {workload.max_time_s} s ended before the first process",
                "Give a longer --max-time",
            )
    failure, subject.error = subject.error, None
    # The latency mode's own keys are all there, without figures: this mode's are in the object of its name.
    result = result_of(_failed(subject, failure), target, workload)
    result["mode"] = mode.to_json()
    if failure is not None:
        return result
    result.update(outcome="measurement", error_kind=None, reason=None, fix=None)
    result["load_ns"] = float(np.median([a["load_ns"] for a in answers]))
    result["first_ns"] = float(np.median([a["first_ns"] for a in answers]))
    result["environment"] = answers[-1]["environment"]
    figures, warnings = _mode_figures(measured, mode)
    result[mode.name] = figures
    for point in measured.points:
        if point.lost and point.answers:
            warnings.append(
                f"{point.label}: {len(point.lost)} of {workload.processes} processes died and were discarded: "
                f"{point.lost[-1].message}"
            )
    if measured.left_out:
        warnings.append(
            f"--max-time {workload.max_time_s:g} s: {measured.left_out} of "
            f"{workload.processes * len(measured.points)} processes were not started"
        )
    told = dict.fromkeys(w for a in answers for w in a.get("warnings", []))
    result["warnings"] = [*subject.warnings, *told, *warnings]
    return result


def _failed(subject: Subject, error: PortcallError | None) -> Subject:
    """Return the subject as one whose latency figures are absent."""
    return replace(subject, error=error or CellFailed("not the latency mode"))


def _mode_figures(measured: _Measured, mode: Mode) -> tuple[dict[str, Any], list[str]]:
    points = measured.points
    if isinstance(mode, Throughput):
        lines, warnings = [], []
        for point in points:
            line, said = _sweep_line(point)
            lines.append(line)
            warnings += said
        return throughput_figures(lines, warnings)
    if isinstance(mode, Cold):
        found, warnings = cold_figures(
            mode.caches, {p.label: p.answers for p in points}, {p.label: p.drops for p in points}
        )
        for point in points:
            if point.error is not None:
                warnings.append(f"page cache {point.label}: {point.error.message}")
        return found, warnings
    [point] = points
    if isinstance(mode, Sustained):
        return sustained_figures(point.samples, point.answers, mode.window_s)
    assert isinstance(mode, Arrival)
    return arrival_figures(point.samples, mode.rate_per_s, mode.seed)


def _sweep_line(point: _Point) -> tuple[dict[str, Any], list[str]]:
    """Return a point's line of the sweep; one that did not run has its outcome and the reason."""
    batch, streams = point.workload.batch, point.arguments["streams"]
    if point.samples and point.error is None:
        machine = point.answers[-1]["environment"]["machine"]
        cpus = machine.get("usable_cpus") or machine.get("logical_cpus") or 1
        return point_figures(batch, streams, point.workload.threads, cpus, point.samples)
    error = point.error or CellFailed("the time budget ended before it", "Give a longer --max-time")
    line = {
        "batch": batch,
        "streams": streams,
        "threads": point.workload.threads,
        "in_flight": batch * streams,
        "oversubscribed": None,
        "outcome": outcome_of(error).value,
        "reason": error.message,
        "fix": error.fix or None,
        "samples_per_s": None,
        "ci": None,
        "n": 0,
        "processes": 0,
        "latency": None,
    }
    return line, []


def _arrays(measured: _Measured, mode: Mode) -> dict[str, Any]:
    """Return the raw samples by POINT_NAME_PROCESS; of cold starts, the ns of every part over processes."""
    arrays: dict[str, Any] = {}
    for point in measured.points:
        prefix = {"throughput": f"b{point.workload.batch}_s{point.arguments.get('streams')}_"}.get(
            mode.name, ""
        )
        if isinstance(mode, Cold):
            for key in KEYS:
                arrays[f"{point.label}_{key}"] = np.array([a[key] for a in point.answers], np.int64)
        for number, samples in enumerate(point.samples):
            arrays |= {f"{prefix}{name}_{number}": array for name, array in samples.items()}
    return arrays
