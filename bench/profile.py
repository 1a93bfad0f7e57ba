"""``portcall profile``: what each operator of an artifact or bare file takes, on which unit, and what that explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.bench.passes import Bench, finish
from portcall.bench.placement import placement_line, placement_of
from portcall.bench.report import ABSENT, _percent, align
from portcall.bench.subject import find_inputs, open_subjects
from portcall.core import BadInput, CellFailed, UnsupportedError, Workload
from portcall.exporters import get_backend
from portcall.targets import Driver, get_target
from portcall.workspace import DataArgument, Workspace

LITTLE = 0.8
"""Of the inference's time that the operators explain: below it, the answer warns."""
COSTLY = 1.1
"""Of the time that profiling multiplies the inference's by: above it, the answer warns."""
TOP = 20
WIDEST = 40
"""Characters of a name that the table shows."""
FILES = ("profile.json", "profile.svg", "profile.png")


def run_profile(
    work: Workspace,
    spec: str,
    target: str,
    workload: Workload,
    data: DataArgument | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Profile one artifact or bare file; return the keys of ``portcall profile --json`` without "schema".

    Two processes: one is timed as ``bench`` times it, one has the runtime's profiler on. output: a folder for
    ``profile.json`` and, where matplotlib is installed, ``profile.svg`` and ``profile.png``. Raises BadInput for an
    unusable spec, UnsupportedError for a backend without a profile, and whatever ends a cell of ``bench``.
    """
    driver = get_target(target).driver(work)
    if output is not None:
        artifacts.check_output_folder(output)
    subjects = open_subjects([spec])
    if len(subjects) != 1:
        names = ", ".join(s.spec for s in subjects)
        raise BadInput(f"{spec} holds {len(subjects)} artifacts", f"Give one of them: {names}")
    [subject] = subjects
    if subject.error is not None:
        raise subject.error
    backend = subject.artifact.backend
    if get_backend(backend).profile is None:
        raise UnsupportedError(f"portcall has no profile of {backend}", "Use the vendor's own profiler")
    workload = replace(workload, processes=1)
    find_inputs(work, driver, subject, data, workload)
    finish(Bench(work, driver, target, workload), subject)
    job = subject.job(workload)
    plain_ns = _plain(work, driver, job, subject.label, backend)
    found = driver.run("profile", job, f"profile {subject.label}", backend)
    answer = {
        "artifact": subject.spec,
        "backend": backend,
        "precision": subject.artifact.precision,
        "target": target,
        **summary(found, plain_ns),
        "placement": placement_of(found),
        "workload": workload.to_json(),
        "environment": found["environment"],
    }
    answer["warnings"] = [*subject.warnings, *found["notes"], *_warnings(answer)]
    answer["plot"] = {"files": [], "reason": None if output is not None else "no -o DIR was given"}
    if output is not None:
        _save(output, answer)
    return answer


def _plain(work: Workspace, driver: Driver, job: Mapping[str, Any], label: str, backend: str) -> float:
    """Return the P50 in ns of a process without the profiler."""
    files = {k: str(work.folder / f"{k}-plain.npy") for k in ("wall", "cpu", "device")}
    driver.run("measure", {**job, **files, "deadline_s": None}, f"time {label}", backend)
    return float(np.median(np.load(files["wall"])))


def summary(found: Mapping[str, Any], plain_ns: float) -> dict[str, Any]:
    """Return the figures of a profile from what the job ``profile`` answered.

    {"unit", "method", "inferences", "p50_ns": without the profiler, "profiled_p50_ns", "overhead": profiled / plain,
    "mean_ns": of the profiled inferences over which the operators' times are means, "sum_ns": of these times,
    "coverage": sum / mean, "coverage_of_p50": sum / P50 without the profiler, "operators": the longest first, each
    with "share" of the sum and "cumulative"}. Shares are None where the profiler saw no time.
    """
    total = sum(o["time_ns"] or 0.0 for o in found["operators"])
    timed = found["untimed"] is None and total > 0
    ordered = sorted(found["operators"], key=lambda o: -(o["time_ns"] or 0.0))
    operators, so_far = [], 0.0
    for operator in ordered:
        so_far += operator["time_ns"] or 0.0
        shares = (
            {"share": (operator["time_ns"] or 0.0) / total, "cumulative": so_far / total}
            if timed
            else {"share": None, "cumulative": None}
        )
        operators.append({**operator, **shares})
    return {
        "unit": found["unit"],
        "method": found["method"],
        "inferences": found["inferences"],
        "p50_ns": plain_ns,
        "profiled_p50_ns": found["p50_ns"],
        "overhead": found["p50_ns"] / plain_ns,
        "mean_ns": found["mean_ns"],
        "sum_ns": total if timed else None,
        "coverage": total / found["mean_ns"] if timed else None,
        "coverage_of_p50": total / plain_ns if timed else None,
        "operators": operators,
    }


def _warnings(answer: Mapping[str, Any]) -> list[str]:
    found = []
    coverage, overhead = answer["coverage"], answer["overhead"]
    known = [c for c in (coverage, answer["coverage_of_p50"]) if c is not None and c <= COSTLY]
    if known and max(known) < LITTLE:
        found.append(
            f"the operators explain {max(known):.0%} of an inference; the rest is the "
            "runtime's own work between them, and fractions of a microsecond that its profiler drops"
        )
    if coverage is not None and coverage > COSTLY:
        found.append(
            f"the operators' times add up to {coverage:.0%} of an inference: the runtime's means hold cold and "
            "preempted inferences; profile on a quieter machine, or with a longer --min-time"
        )
    if overhead > COSTLY:
        found.append(
            f"an inference takes {overhead:.2f} times as long with the profiler on: read shares, not milliseconds"
        )
    return found


def _save(output: Path, answer: dict[str, Any]) -> None:
    """Write the plots, then ``profile.json``; what cannot be plotted is said in "plot"."""
    from portcall.bench.profile_plot import plot

    try:
        output.mkdir(parents=True, exist_ok=True)
        answer["plot"] = plot(answer, output)
        artifacts.write_json(output / FILES[0], {"schema": 1, **answer})
    except OSError as error:
        raise CellFailed(
            f"cannot write {output}: {error.strerror}", "Free space there or choose another -o"
        ) from error


HEADER = ("time %", "sum %", "us", "operator", "kernel", "unit", "source layers", "name")


def profile_table(answer: Mapping[str, Any], top: int = TOP) -> str:
    """Return the answer of ``profile`` as text: the *top* operators by time, then what the profile is worth."""
    operators = answer["operators"]
    rows = [_row(o) for o in operators[:top]]
    lines = [f"{answer['artifact']} ({answer['backend']}:{answer['precision']})", ""]
    if rows:
        # "%" columns first: numbers flush right, names flush left.
        lines += [_align(rows), ""]
    if len(operators) > top:
        lines.append(f"{len(operators) - top} more operators: --top {len(operators)}, or --json")
    lines += _worth(answer)
    label = f"{answer['backend']}:{answer['precision']}"
    lines.append(placement_line(label, answer["placement"]))
    lines += [f"  {r['name']} ({r['operator']}): {r['reason']}" for r in answer["placement"]["rest"][:top]]
    lines += [f"method: {answer['method']}"]
    lines += [f"warning: {w}" for w in answer["warnings"]]
    if answer["plot"]["files"]:
        lines.append(f"wrote {', '.join(answer['plot']['files'])}")
    elif answer["plot"]["reason"] and "no -o" not in answer["plot"]["reason"]:
        lines.append(f"no plot: {answer['plot']['reason']}")
    return "\n".join(lines)


def _align(rows: list[list[str]]) -> str:
    """Align with the numbers first: ``align`` sets its first columns flush left."""
    numbers = 3
    widths = [max(len(line[i]) for line in [HEADER, *rows]) for i in range(numbers)]
    table = align(HEADER[numbers:], [r[numbers:] for r in rows], left=len(HEADER) - numbers).split("\n")
    shown = []
    for cells, text in zip([HEADER, *rows], table, strict=True):
        shown.append("  ".join([*(c.rjust(w) for c, w in zip(cells, widths, strict=False)), text]))
    return "\n".join(shown)


def _row(operator: Mapping[str, Any]) -> list[str]:
    time_ns = operator["time_ns"]
    return [
        _percent(operator["share"], 1),
        _percent(operator["cumulative"], 1),
        ABSENT if time_ns is None else f"{time_ns / 1e3:.1f}",
        operator["operator"],
        operator["kernel"] or ABSENT,
        operator["unit"] + ("" if operator["on_unit"] else " !"),
        _layers(operator["layers"]),
        _tail(operator["name"]),
    ]


def _layers(names: Sequence[str]) -> str:
    shown = ", ".join(_tail(n) for n in names[:2])
    return (f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown) or ABSENT


def _tail(name: str) -> str:
    """Return the end of a long name, which tells more than its beginning; the JSON holds all of it."""
    return name if len(name) <= WIDEST else f"...{name[3 - WIDEST :]}"


def _worth(answer: Mapping[str, Any]) -> list[str]:
    plain, profiled = answer["p50_ns"] / 1e6, answer["profiled_p50_ns"] / 1e6
    text = (
        f"P50 {plain:.3g} ms without the profiler, {profiled:.3g} ms with it (x{answer['overhead']:.2f}), "
        f"n={answer['inferences']}"
    )
    if answer["coverage"] is None:
        return [text, f"no times: {answer['placement']['reason']}"]
    return [
        text,
        f"coverage: the operators' times add up to {answer['sum_ns'] / 1e6:.3g} ms, {100 * answer['coverage']:.0f} % "
        f"of the {answer['mean_ns'] / 1e6:.3g} ms that the same inferences took, "
        f"{100 * answer['coverage_of_p50']:.0f} % of the P50 without the profiler",
    ]
