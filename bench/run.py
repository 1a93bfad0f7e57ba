"""Measures artifacts and bare files on a target: fresh processes, interleaved rounds, memory in a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from portcall import artifact as artifacts
from portcall.bench.result import result_of
from portcall.bench.rounds import attempt, time_rounds
from portcall.bench.saving import check_output, save
from portcall.bench.subject import Subject, find_inputs, open_subjects
from portcall.core import CellFailed, PortcallError, Workload
from portcall.exporters import get_backend
from portcall.targets import Driver, get_target
from portcall.targets.agent import settings
from portcall.worker import WorkerDied
from portcall.workspace import DataArgument, Workspace


@dataclass(frozen=True, slots=True)
class Bench:
    """What every pass of one command shares."""

    work: Workspace
    driver: Driver
    workload: Workload


Pass = Callable[[Bench, Subject], None]
"""One step for one subject, in processes of its own; it may set keys of ``Subject.extra`` and add warnings.

A PortcallError that it raises ends this subject alone.
"""


def finish(bench: Bench, subject: Subject) -> None:
    """Have the device build what ends there, before anything is measured."""
    if get_backend(subject.artifact.backend).finish is not None:
        job = subject.job(bench.workload)
        subject.finish = bench.driver.run("finish", job, f"finish {subject.label}", subject.interpreter)


def measure_memory(bench: Bench, subject: Subject) -> None:
    """Read memory in a process of its own; raise CellFailed where the timed processes would not have enough."""
    job, label = subject.job(bench.workload), f"memory {subject.label}"
    try:
        subject.memory = bench.driver.run("measure_memory", job, label, subject.interpreter)
    except WorkerDied as error:
        if "SIGKILL" not in error.message or error.fix:
            raise
        size = artifacts_size(subject)
        raise WorkerDied(
            error.message,
            f"Its files hold {size / 1e6:.0f} MB: see that several times as much memory is free, in this container too",
        ) from error
    check_room(subject.label, subject.memory)


def check_room(label: str, memory: Mapping[str, Any]) -> None:
    """Raise CellFailed where one process peaks above what is available: it would swap, or be killed in the middle.

    Processes run one after another, so that one process has to fit, however many there are.
    """
    available = memory.get("available_bytes")
    if available is not None and memory["peak_bytes"] > available:
        raise CellFailed(
            f"one process of {label} takes {memory['peak_bytes'] / 1e6:.0f} MB, {available / 1e6:.0f} MB are available",
            "End other programs, raise the container's memory limit, or give a smaller --batch",
        )


BEFORE: list[Pass] = [finish, measure_memory]
"""Done in this order for each subject before any is timed."""

AFTER: list[Pass] = []
"""Done for each subject that was timed without an error."""


def run_bench(
    work: Workspace,
    specs: Sequence[str],
    target: str,
    workload: Workload,
    data: DataArgument | None = None,
    output: Path | None = None,
) -> tuple[list[dict[str, Any]], PortcallError | None]:
    """Measure every spec (artifact folder or bare file); return the ``results`` of the JSON contract, and the error
    of saving them: what was measured is never lost to a full disk.

    One process each reads memory; then rounds of one process each (A B C A B C ...) are timed, so that drift hits
    all alike. output: a folder for ``bench.json`` and the raw samples. Raises BadInput for unusable specs, and for a
    workload that cannot be.
    """
    settings.check(workload)
    driver = get_target(target).driver(work)
    if output is not None:
        check_output(output)
    subjects = open_subjects(specs)
    for subject in subjects:
        attempt(subject, partial(find_inputs, work, driver, subject, data, workload))
    bench = Bench(work, driver, workload)
    for subject in subjects:
        for step in BEFORE:
            attempt(subject, partial(step, bench, subject))
    time_rounds(work, driver, subjects, workload)
    for subject in subjects:
        for step in AFTER:
            attempt(subject, partial(step, bench, subject))
    results = [result_of(subject, target, workload) for subject in subjects]
    if output is not None:
        try:
            results = save(output, [(s.label, _arrays(s)) for s in subjects], results)
        except PortcallError as error:
            return results, error
    return results, None


def _arrays(subject: Subject) -> dict[str, Any]:
    """Return the raw samples of every process in order, by name."""
    arrays: dict[str, Any] = {f"wall_ns_{i}": a for i, a in enumerate(subject.wall)}
    arrays |= {f"cpu_ns_{i}": a for i, a in enumerate(subject.cpu)}
    return arrays | {f"device_ns_{i}": a for i, a in enumerate(subject.device) if a.size}


def artifacts_size(subject: Subject) -> int:
    """Return the bytes of a subject's model files."""
    if subject.manifest is not None:
        return artifacts.model_bytes(subject.manifest)
    return subject.artifact.path.stat().st_size
