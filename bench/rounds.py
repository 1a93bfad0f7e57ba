"""Times subjects in interleaved rounds of fresh processes, until there are enough of them or the time is up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np

from portcall.bench.statistics import process_interval, processes_for_width, relative_width
from portcall.bench.subject import Subject
from portcall.core import BadInput, CellFailed, PortcallError, Workload
from portcall.targets import Driver
from portcall.worker import WorkerDied
from portcall.workspace import Workspace

CI_TIME_S = 600.0
"""Time per artifact for ``--ci-width`` where no --max-time is given."""


def attempt(subject: Subject, action: Callable[[], None]) -> None:
    """Do one step for a subject that has not failed; its error ends this cell alone."""
    if subject.error is not None:
        return
    try:
        action()
    except BadInput:
        raise
    except PortcallError as error:
        subject.error = error


def time_rounds(work: Workspace, driver: Driver, subjects: Sequence[Subject], workload: Workload) -> None:
    """Time one process of every subject, again and again (A B C A B C ...), so that drift hits all alike.

    Every subject gets ``workload.processes`` processes; with ``ci_width`` further ones until its interval is that
    narrow. A process that dies loses its samples; the cell fails if more than half of them died.
    """
    for number in itertools.count():
        todo = [s for s in subjects if s.error is None and _wants_another(s, workload, number)]
        if not todo:
            break
        for subject in todo:
            attempt(subject, partial(time_process, work, driver, subject, workload, number))
    for subject in subjects:
        if subject.error is None:
            _tell_deaths(subject)
            _tell_width(subject, workload)


def _wants_another(subject: Subject, workload: Workload, number: int) -> bool:
    if number < workload.processes:
        return True
    if workload.ci_width is None:
        return False
    budget_s = workload.max_time_s or CI_TIME_S
    width = _width(subject)
    narrow = width is not None and width <= workload.ci_width
    return not narrow and subject.spent_s + subject.typical_s <= budget_s


def _width(subject: Subject) -> float | None:
    """Return the relative width of the interval of P50; None while there is none."""
    medians = subject.medians_ns()
    if len(medians) < 2 or min(medians) <= 0:
        return None
    interval = process_interval(medians)
    assert interval is not None
    return relative_width(interval, float(np.median(np.concatenate(subject.wall))))


def time_process(work: Workspace, driver: Driver, subject: Subject, workload: Workload, number: int) -> None:
    """Time one process; with a cap, it gets its share of what the processes before it left over."""
    start = time.monotonic()
    files = {k: work.folder / f"{k}-{subject.number}-{number}.npy" for k in ("wall", "cpu", "device")}
    job = {**subject.job(workload), **{k: str(v) for k, v in files.items()}, "deadline_s": None}
    if workload.max_time_s is not None:
        left = workload.max_time_s - subject.spent_s
        share = left / max(1, workload.processes - number)
        job["deadline_s"] = max(0.0, share - subject.startup_s)
    total = workload.processes if number < workload.processes else "?"
    label = f"time {subject.label} {number + 1}/{total}"
    try:
        answer = driver.run("measure", job, label, subject.interpreter)
    except WorkerDied as error:
        subject.spent_s += time.monotonic() - start
        subject.deaths.append(error.message)
        _fail_if_most_died(subject, workload, error)
        return
    samples = {k: np.load(path) for k, path in files.items()}
    for path in files.values():
        path.unlink(missing_ok=True)
    subject.answers.append(answer)
    subject.wall.append(samples["wall"])
    subject.cpu.append(samples["cpu"])
    subject.device.append(samples["device"])
    took_s = time.monotonic() - start
    subject.spent_s += took_s
    subject.startup_s = took_s - answer["elapsed_s"]
    lasted = [a["elapsed_s"] for a in subject.answers]
    subject.typical_s = subject.startup_s + median(lasted)


def _fail_if_most_died(subject: Subject, workload: Workload, error: WorkerDied) -> None:
    """Raise CellFailed once more than half of all processes died; a deadly artifact is not run to the end."""
    deaths = len(subject.deaths)
    planned = max(workload.processes, deaths + len(subject.answers))
    if 2 * deaths <= planned:
        return
    if planned == 1:
        raise error
    fix = error.fix or "Run it alone (portcall bench --processes 1) and watch the memory and the system's log"
    raise CellFailed(
        f"{deaths} of {deaths + len(subject.answers)} timed processes died; the last: {error.message}", fix
    ) from error


def _tell_deaths(subject: Subject) -> None:
    total = len(subject.deaths) + len(subject.answers)
    for reason in dict.fromkeys(subject.deaths):
        count = subject.deaths.count(reason)
        subject.warnings.append(
            f"{count} of {total} processes died and their samples are discarded: {reason}; rerun if it was no accident"
        )


def _tell_width(subject: Subject, workload: Workload) -> None:
    """Warn where the time ended before the interval was as narrow as asked for."""
    if workload.ci_width is None:
        return
    width = _width(subject)
    if width is not None and width <= workload.ci_width:
        return
    asked = f"--ci-width {100 * workload.ci_width:g}%"
    if width is None:
        subject.warnings.append(f"{asked}: no interval from {len(subject.wall)} process; raise --max-time")
        return
    needed = processes_for_width(subject.medians_ns(), workload.ci_width)
    subject.warnings.append(
        f"{asked} not reached in {subject.spent_s:.0f} s: the interval of P50 is {100 * width:.2g} % wide after "
        f"{len(subject.wall)} processes; about {needed} would do "
        f"(--max-time {(needed or 0) * subject.typical_s:.0f})"
    )
