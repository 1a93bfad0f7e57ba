"""Is the candidate slower than the base? Fresh pairs in alternate turns until the verdict is clear or time is up."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.environment import difference
from portcall.bench.passes import Bench, finish, read_memory
from portcall.bench.sequential import fixed_interval
from portcall.bench.statistics import samples_needed
from portcall.bench.subject import Subject, find_inputs, open_subject
from portcall.bench.verdict import (
    METRICS,
    TAILS,
    Pair,
    Ratio,
    Verdict,
    check_metric,
    judge,
    metric_json,
    p50_ratio,
    percentile_ratio,
    top_verdict,
)
from portcall.core import BadInput, Workload
from portcall.targets import get_target
from portcall.targets.agent import settings
from portcall.targets.agent.fingerprint import identity
from portcall.worker import AGENT_MAIN, PACKAGE_ROOT, interpreter_command
from portcall.workspace import DataArgument, Workspace

FEWEST_PAIRS = 5
"""Pairs before the first verdict: below, the interval is wide whatever was found."""

MEMORY_PROCESSES = 4
"""Fresh ones per side: the peak depends on the addresses that a process happens to get."""


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """How to compare. margin: share below which a change means nothing; budget_s: time for the pairs and memory.

    metric: whose verdict is the top one. turns_s: that one pair takes turns. most_pairs: stop there. memory: measure it
    too. slowdown: share of its own time that every inference of the candidate computes on, for ``compare``'s own test.
    fixed: take exactly *most_pairs* and report fixed-sample intervals.
    """

    metric: str = "p50"
    margin: float = 0.03
    budget_s: float = 60.0
    turns_s: float = 0.4
    most_pairs: int = 1000
    memory: bool = True
    slowdown: float = 0.0
    fixed: bool = False
    workload: Workload = field(default_factory=lambda: Workload(warmup_s=0.15))


@dataclass(slots=True)
class Side:
    """One side: what is measured, and by which interpreter."""

    subject: Subject
    python: str
    answers: list[Mapping[str, Any]] = field(default_factory=list)
    memory: list[Mapping[str, Any]] = field(default_factory=list)


def run_compare(
    work: Workspace,
    base: str,
    candidate: str,
    target: str,
    options: CompareOptions,
    data: DataArgument | None = None,
) -> dict[str, Any]:
    """Compare two artifacts or bare files, each optionally ``@ENV``; return the JSON contract's ``compare`` object.

    Raises BadInput for what cannot be compared at all, and the PortcallError of a side that cannot be measured.
    """
    check_metric(options.metric)
    settings.check(options.workload)
    started = time.monotonic()
    bench = Bench(work, get_target(target).driver(work), target, options.workload)
    sides = [open_side(work, number, spec) for number, spec in enumerate((base, candidate))]
    for side in sides:
        prepare(bench, side, data)
    memory = _measure_memory_of(bench, sides, options)
    pairs: list[Pair] = []
    durations: list[float] = []
    stopped = None
    while stopped is None:
        begun = time.monotonic()
        pairs.append(measure_pair(bench, sides, options, len(pairs)))
        durations.append(time.monotonic() - begun)
        primary = _ratio(options.metric, pairs, memory, options)
        stopped = should_stop(primary, durations, time.monotonic() - started, options)
    return _answer(sides, target, pairs, memory, options, stopped, time.monotonic() - started)


def should_stop(
    primary: Ratio | None, durations: Sequence[float], elapsed_s: float, options: CompareOptions
) -> str | None:
    """Return why to stop after these pairs ("clear", "pairs", "budget"), or None to go on.

    primary: the ratio of the top verdict's metric so far. durations: seconds that each pair took. The budget ends where
    another pair might not end within it; three pairs are always taken.
    """
    n = len(durations)
    if n >= options.most_pairs:
        return "pairs"
    if options.fixed:
        return None
    if (
        primary is not None
        and n >= FEWEST_PAIRS
        and judge(primary, options.margin, clear=True) != Verdict.INCONCLUSIVE
    ):
        return "clear"
    return "budget" if n >= 3 and elapsed_s + max(durations) > options.budget_s else None


def open_side(work: Workspace, number: int, spec: str) -> Side:
    """Return one side of ``artifact``, ``file`` or either with ``@ENV``."""
    path, at, environment = spec.rpartition("@")
    if not at or Path(spec).exists():
        path, environment = spec, ""
    subject = open_subject(number, Path(path))
    subject.spec = spec
    if subject.error is not None:
        raise subject.error
    if not environment:
        return Side(subject, work.pool.python_of(subject.interpreter))
    known = work.settings.environments
    if environment not in known:
        listed = f"It has: {', '.join(known)}" if known else "It names none"
        raise BadInput(
            f"no environment {environment!r} in portcall.toml",
            f'{listed}. Write [environments.{environment}], and below it python = "/path/to/python"',
        )
    subject.environment = f"@{environment}"
    work.pool.pythons[subject.environment] = known[environment]
    return Side(subject, known[environment])


def prepare(bench: Bench, side: Side, data: DataArgument | None) -> None:
    """Find the inputs of one side, and have the device build what ends there. Raises the error of either."""
    find_inputs(bench.work, bench.driver, side.subject, data, bench.workload)
    finish(bench, side.subject)


def _measure_memory_of(
    bench: Bench, sides: Sequence[Side], options: CompareOptions
) -> tuple[list[float], list[float]] | None:
    """Return the peak resident bytes of several fresh processes of each side; None where it is not asked for."""
    if not options.memory:
        return None
    for _ in range(MEMORY_PROCESSES):
        for side in sides:
            side.memory.append(read_memory(bench, side.subject, "random", False))
    base, candidate = ([float(m["peak_bytes"]) for m in side.memory] for side in sides)
    return base, candidate


def measure_pair(bench: Bench, sides: Sequence[Side], options: CompareOptions, number: int) -> Pair:
    """Run one pair; its number seeds the order of turns."""
    folder = Path(tempfile.mkdtemp(prefix="pair-", dir=bench.work.folder))
    jobs = []
    for i, side in enumerate(sides):
        job = {
            **side.subject.job(options.workload),
            "wall": str(folder / f"wall-{i}.npy"),
            "cpu": str(folder / f"cpu-{i}.npy"),
            "slowdown": options.slowdown if i else 0.0,
        }
        jobs.append({"command": interpreter_command(side.python), "job": job})
    arguments = {
        "sides": jobs,
        "agent_main": str(AGENT_MAIN),
        "package_root": str(PACKAGE_ROOT),
        "exporters_path": bench.work.exporters_path,
        "folder": str(folder),
        "turns_s": options.turns_s,
        "fewest": 5,
        "inferences": samples_needed(TAILS[options.metric]) if options.metric in TAILS else 0,
        "longest_s": options.budget_s / 10,
        "seed": number,
        "threads": options.workload.threads,
    }
    answer = bench.driver.run("duet:duet", arguments, f"pair {number + 1}", "")
    for side, told in zip(sides, answer["sides"], strict=True):
        side.answers.append(told)
    burst = answer["burst"]
    wall, cpu = (
        [np.load(folder / f"{kind}-{i}.npy").reshape(-1, burst) for i in range(2)] for kind in ("wall", "cpu")
    )
    shutil.rmtree(folder, ignore_errors=True)
    return Pair(wall[0], wall[1], cpu[0], cpu[1])


def _ratio(
    metric: str,
    pairs: Sequence[Pair],
    memory: tuple[list[float], list[float]] | None,
    options: CompareOptions,
) -> Ratio | None:
    """Return the ratio of one metric, or None where it was not measured or n does not support it."""
    if metric == "memory":
        if memory is None:
            return None
        values = [float(np.log(c / b)) for b, c in zip(*memory, strict=True)]
        return Ratio(values, fixed_interval(values))
    if metric in ("p50", "cpu"):
        ratio = p50_ratio(pairs, cpu=metric == "cpu")
        if not np.isfinite(ratio.values).all():
            return None
    else:
        found = percentile_ratio(pairs, TAILS[metric])
        if found is None:
            return None
        ratio = found
    return replace(ratio, interval=fixed_interval(ratio.values)) if options.fixed else ratio


def _absent(metric: str, options: CompareOptions) -> str | None:
    """Return why a metric gets no verdict, or None where it does."""
    if metric == "cpu" and options.workload.threads > 1:
        return "CPU time of several threads counts their waiting: judged with one thread only"
    if metric == "memory" and not options.memory:
        return "not measured"
    return None


def _too_few(metric: str, ratio: Ratio | None, n: int, options: CompareOptions) -> str:
    """Return why there is no ratio, or one without an interval."""
    more = "allow more time with --max-time"
    if metric in TAILS and metric != options.metric:
        more = f"--metric {metric} takes more"
    if ratio is None:
        return f"n={n} inferences support no {metric}: {more}"
    groups = f"groups of pairs that support {metric}" if metric in TAILS else "pairs"
    return f"{groups}: {len(ratio.values)}, too few for an interval: {more}"


def _answer(
    sides: Sequence[Side],
    target: str,
    pairs: Sequence[Pair],
    memory: tuple[list[float], list[float]] | None,
    options: CompareOptions,
    stopped: str,
    seconds: float,
) -> dict[str, Any]:
    machines = {identity(a["environment"]["machine"]) for side in sides for a in side.answers}
    incomparable = len(machines) > 1
    n = sum(p.base.size for p in pairs)
    metrics = []
    for name in METRICS:
        reason = _absent(name, options)
        ratio = None if reason else _ratio(name, pairs, memory, options)
        if reason is None and (ratio is None or ratio.interval is None):
            reason = _too_few(name, ratio, n, options)
        metrics.append(metric_json(name, ratio, reason, options.margin, incomparable))
    base, candidate = (side.answers[-1]["environment"] for side in sides)
    return {
        "schema": 1,
        "verdict": top_verdict(metrics, options.metric),
        "metric": options.metric,
        "margin": options.margin,
        "target": target,
        "metrics": metrics,
        "pairs": len(pairs),
        "seconds": seconds,
        "stopped": stopped,
        "interval": "fixed-sample" if options.fixed else "sequential",
        "base": _side_json(sides[0], [p.base for p in pairs], options),
        "candidate": _side_json(sides[1], [p.candidate for p in pairs], options),
        "difference": difference(base, candidate).to_json(),
        "warnings": _warnings(sides, incomparable),
    }


def _side_json(side: Side, wall: Sequence[np.ndarray[Any, Any]], options: CompareOptions) -> dict[str, Any]:
    pooled = np.concatenate([w.ravel() for w in wall])
    return {
        "artifact": side.subject.spec,
        "backend": side.subject.artifact.backend,
        "precision": side.subject.artifact.precision,
        "p50_ns": float(np.median(pooled)),
        "n": int(pooled.size),
        "processes": len(wall),
        "load_ns": float(np.median([a["load_ns"] for a in side.answers])),
        "peak_bytes": None if not side.memory else float(np.median([m["peak_bytes"] for m in side.memory])),
        "environment": side.answers[-1]["environment"],
        "slowdown": options.slowdown or None,
    }


def _warnings(sides: Sequence[Side], incomparable: bool) -> list[str]:
    told = [w for side in sides for a in side.answers for w in a["warnings"]]
    found = list(dict.fromkeys([w for side in sides for w in side.subject.warnings] + told))
    if incomparable:
        found.append("the machine changed between the processes: compare again where CPUs and limits stay")
    if not all(a["pinned"] for side in sides for a in side.answers):
        found.append("processes could not be pinned to one CPU: expect wider intervals")
    return found
