"""The passes of a bench beside the timed rounds: each in processes of its own, before or after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.bench import memory
from portcall.bench.placement import no_placement, placement_of
from portcall.bench.rounds import time_process
from portcall.bench.statistics import percentile
from portcall.bench.subject import Subject
from portcall.bench.witness import pairs as witnesses
from portcall.core import CellFailed, PortcallError, UnsupportedError, Workload
from portcall.exporters import get_backend
from portcall.targets import Driver
from portcall.worker import WorkerDied
from portcall.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Passes:
    """Which passes are wanted.

    witness_pairs: pairs with the runtime's own benchmark tool; None for none. placement: profile one more process.
    min_placement: "operators" or "time" -> the least share on the intended unit.
    """

    witness_pairs: int | None = None
    placement: bool = True
    find_memory_limit: bool = False
    min_placement: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every pass of one command shares."""

    work: Workspace
    driver: Driver
    target: str
    workload: Workload
    wanted: Passes = field(default_factory=Passes)


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
    """Read memory in processes of its own; raise CellFailed where the timed processes would not have enough."""
    job = subject.job(bench.workload)
    try:
        subject.memory, warnings = memory.run_memory(
            lambda layout, held: read_memory(bench, subject, layout, held)
        )
    except WorkerDied as error:
        if "SIGKILL" not in error.message or error.fix:
            raise
        size = _model_bytes(subject)
        raise WorkerDied(
            error.message,
            f"Its files hold {size / 1e6:.0f} MB: see that several times as much memory is free, in this container too",
        ) from error
    subject.warnings += warnings
    label = f"weights {subject.label}"
    subject.memory["weights"] = memory.weights(
        lambda: bench.work.call("portcall.bench.memory:stored_weights", job, label, subject.interpreter)
    )
    check_room(subject.label, subject.memory)


def read_memory(bench: Bench, subject: Subject, layout: str, held: bool) -> Mapping[str, Any]:
    """Return what one fresh process tells of its memory: see the agent's ``memory_pass``."""
    job = {**subject.job(bench.workload), "layout": layout, "held": held}
    answer: Mapping[str, Any] = bench.driver.run(
        "measure_memory", job, f"memory {subject.label}", subject.interpreter
    )
    return answer


def find_memory_limit(bench: Bench, subject: Subject) -> None:
    """Find the smallest memory limit in which it still runs; where that cannot be, the reason stands there."""
    if not bench.wanted.find_memory_limit:
        return
    assert subject.memory is not None
    job, label = subject.job(bench.workload), f"memory limit {subject.label}"
    subject.memory["limit"] = memory.or_absent(
        lambda: bench.driver.run("find_memory_limit", job, label, subject.interpreter)
    )


def measure_energy(bench: Bench, subject: Subject) -> None:
    """Read energy counters in a process of its own; where there is none, the reason stands there."""
    job, label = subject.job(bench.workload), f"energy {subject.label}"
    subject.extra["energy"] = memory.or_absent(
        lambda: bench.driver.run("measure_energy", job, label, subject.interpreter)
    )


def check_room(label: str, figures: Mapping[str, Any]) -> None:
    """Raise CellFailed where one process peaks above what is available: it would swap, or be killed in the middle.

    Processes run one after another, so that one process has to fit, however many there are.
    """
    available = figures.get("available_bytes")
    if available is not None and figures["peak_bytes"] > available:
        takes, left = (f"{value / 1e6:.0f} MB" for value in (figures["peak_bytes"], available))
        raise CellFailed(
            f"one process of {label} takes {takes}, {left} are available",
            "End other programs, raise the container's memory limit, or give a smaller --batch",
        )


def _model_bytes(subject: Subject) -> int:
    """Return the bytes of a subject's model files."""
    if subject.manifest is not None:
        return artifacts.model_bytes(subject.manifest)
    return subject.artifact.path.stat().st_size


def place(bench: Bench, subject: Subject) -> None:
    """Find out which operators run where; what cannot be told costs no measurement."""
    backend = subject.artifact.backend
    try:
        if not bench.wanted.placement:
            raise UnsupportedError("it was not asked for (--no-placement)")
        if get_backend(backend).profile is None:
            raise UnsupportedError(f"portcall has no profile of {backend}")
        job, label = subject.job(bench.workload), f"placement of {subject.label}"
        found = placement_of(bench.driver.run("profile", job, label, subject.interpreter))
    except PortcallError as error:
        found = no_placement(error)
    subject.extra["placement"] = found


def witness(bench: Bench, subject: Subject) -> None:
    """Run the runtime's own benchmark tool in pairs with processes of ours; whatever it does, no cell fails of it."""
    if bench.wanted.witness_pairs is None:
        return
    assert subject.inputs is not None
    alone = replace(bench.workload, max_time_s=None)

    def ours(inputs: Path, options: Mapping[str, Any]) -> witnesses.Times:
        twin = subject.fresh(witnesses.with_options(subject.artifact, options), inputs)
        time_process(bench.work, bench.driver, twin, alone, 0)
        return witnesses.Times(twin.wall[0], twin.device[0])

    typical_ns = percentile(np.concatenate(subject.wall), 0.5)
    asked = witnesses.Subject(subject.artifact, subject.label, subject.inputs, typical_ns)
    folder = bench.work.folder / f"witness-{subject.number}"
    subject.extra["witness"] = witnesses.witness(
        bench.driver, bench.target, asked, bench.workload, bench.wanted.witness_pairs, folder, ours
    )


BEFORE: list[Pass] = [finish, measure_memory, find_memory_limit]
"""Done in this order for each subject before any is timed."""

AFTER: list[Pass] = [measure_energy, place, witness]
"""Done for each subject that was timed without an error."""
