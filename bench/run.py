"""Measures artifacts and bare files on a target: fresh processes, interleaved rounds, memory in a pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from portcall.bench.passes import AFTER, BEFORE, Bench, Passes
from portcall.bench.placement import judge
from portcall.bench.result import ending, result_of
from portcall.bench.rounds import attempt, time_rounds
from portcall.bench.saving import check_output, save
from portcall.bench.subject import Subject, find_inputs, open_subjects
from portcall.core import Outcome, PortcallError, Workload
from portcall.targets import get_target
from portcall.targets.agent import settings
from portcall.workspace import DataArgument, Workspace


def run_bench(
    work: Workspace,
    specs: Sequence[str],
    target: str,
    workload: Workload,
    data: DataArgument | None = None,
    output: Path | None = None,
    wanted: Passes | None = None,
) -> tuple[list[dict[str, Any]], PortcallError | None]:
    """Measure every spec (artifact folder or bare file); return the ``results`` of the JSON contract, and the error
    of saving them: what was measured is never lost to a full disk.

    The passes before (memory), then rounds of one timed process each (A B C A B C ...), so that drift hits all alike,
    then the passes after. output: a folder for ``bench.json`` and the raw samples. Raises BadInput for unusable specs,
    and for a workload that cannot be.
    """
    settings.check(workload)
    driver = get_target(target).driver(work)
    if output is not None:
        check_output(output)
    subjects = open_subjects(specs)
    for subject in subjects:
        attempt(subject, partial(find_inputs, work, driver, subject, data, workload))
    bench = Bench(work, driver, target, workload, wanted or Passes())
    for subject in subjects:
        for step in BEFORE:
            attempt(subject, partial(step, bench, subject))
    time_rounds(work, driver, subjects, workload)
    for subject in subjects:
        for step in AFTER:
            attempt(subject, partial(step, bench, subject))
    results = [_judged(result_of(subject, target, workload), bench.wanted) for subject in subjects]
    if output is not None:
        try:
            results = save(output, [(s.label, _arrays(s)) for s in subjects], results)
        except PortcallError as error:
            return results, error
    return results, None


def _judged(result: dict[str, Any], wanted: Passes) -> dict[str, Any]:
    """Return *result*, failed where a budget is broken; what was measured stays."""
    if result["outcome"] == Outcome.MEASUREMENT and result["placement"] is not None:
        broken = judge(result["placement"], wanted.min_placement)
        if broken is not None:
            result.update(ending(broken))
    return result


def _arrays(subject: Subject) -> dict[str, Any]:
    """Return the raw samples of every process in order, by name."""
    arrays: dict[str, Any] = {f"wall_ns_{i}": a for i, a in enumerate(subject.wall)}
    arrays |= {f"cpu_ns_{i}": a for i, a in enumerate(subject.cpu)}
    return arrays | {f"device_ns_{i}": a for i, a in enumerate(subject.device) if a.size}
