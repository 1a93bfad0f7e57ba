"""``python -m benchmarks.compare``: how often ``portcall compare`` is wrong, and what it finds, measured.

- ``record --condition quiet|load``: pairs of fresh processes of one artifact, as ``compare`` measures them, kept raw in
  the folder: in turn A against A, against A slowed by 5 % and by 10 % (or --slowdowns). Resumable: it goes on where it
  was ended, also with more --rounds.
- ``replay``: many comparisons per condition and slow-down, each a contiguous block of recorded pairs in their order of
  time, judged by ``compare``'s own rules until its verdict is clear or its seconds are used up.
- ``live``: comparisons from end to end, each of ``portcall.api.compare`` with its own new processes. Resumable.
- ``coverage``: live comparisons of a fixed number of pairs, A against A: how often the interval holds 1. Resumable.
- ``report``: all of it, with exact binomial intervals.

``--metric p95|p99|cpu`` with replay, live and report judges by another metric than P50, ``--max-time`` gives other
seconds than 20. The recorded pairs are short ones, as for P50: live ones of P95 and P99 are longer, and find more.

A is fp32 EfficientNet-Lite0 in ONNX Runtime (or --artifact), one thread: 4 to 10 ms on most machines. The slow-down is
real work inside the timed region: after every inference the process computes on for that share of the time which this
inference took. load: one process that computes without end on one core, so that of two cores one is left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

import portcall
from portcall.bench.compare import CompareOptions, measure_pair, open_side, prepare, should_stop
from portcall.bench.passes import Bench
from portcall.bench.report import align
from portcall.bench.sequential import fixed_interval, sequential_interval
from portcall.bench.verdict import TAILS, Pair, Ratio, Verdict, judge, p50_ratio, percentile_ratio
from portcall.progress import Reporter
from portcall.targets import get_target
from portcall.workspace import open_workspace

SLOWDOWNS = (0.0, 0.05, 0.10)
CONDITIONS = ("quiet", "load")
OPTIONS = CompareOptions(budget_s=20.0, memory=False)
FIXED_PAIRS = 8

WANTED = {
    ("quiet", 0.0): "at most 1 % false alarms",
    ("load", 0.0): "at most 1 % false alarms",
    ("quiet", 0.05): "at least 95 % found",
    ("load", 0.05): "at least 90 % found",
    ("quiet", 0.10): "at least 99 % found",
    ("load", 0.10): "at least 99 % found",
}


def make_artifact(folder: Path) -> Path:
    """Export fp32 EfficientNet-Lite0 for ONNX Runtime, once."""
    place = folder / "artifact" / "onnxruntime-fp32"
    if not place.exists():
        portcall.export(
            "examples.efficientnet_lite0:model",
            "onnxruntime:fp32",
            folder / "artifact",
            reporter=Reporter(True),
        )
    return place


@contextmanager
def condition(name: str) -> Iterator[None]:
    """Have one process compute without end on the last core, for "load"."""
    if name == "quiet":
        yield
        return
    core = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def record(folder: Path, artifact: Path, name: str, rounds: int, slowdowns: Sequence[float]) -> None:
    """Record *rounds* pairs of each slow-down, in turn; what is there already counts."""
    place = folder / "pairs" / name
    place.mkdir(parents=True, exist_ok=True)
    with condition(name), open_workspace(Reporter(False), 600.0) as work:
        bench = Bench(work, get_target("local").driver(work), "local", OPTIONS.workload)
        sides = [open_side(work, number, str(artifact)) for number in range(2)]
        for side in sides:
            prepare(bench, side, None)
        for number in range(rounds):
            for slowdown in slowdowns:
                file = place / f"{slowdown:.2f}-{number:05d}.npz"
                if file.exists():
                    continue
                start = time.monotonic()
                options = replace(OPTIONS, slowdown=slowdown)
                pair = measure_pair(bench, sides, options, number)
                took = time.monotonic() - start
                part = file.with_suffix(".part.npz")
                np.savez_compressed(part, *_arrays(pair), seconds=took)
                part.replace(file)
            if number % 20 == 0:
                print(f"{name}: {number + 1} of {rounds} rounds", file=sys.stderr)


def _arrays(pair: Pair) -> list[Any]:
    return [pair.base, pair.candidate, pair.base_cpu, pair.candidate_cpu]


def recorded(folder: Path, name: str, slowdown: float) -> tuple[list[Pair], list[float]]:
    """Return the pairs in the order of time, and the seconds that each took."""
    pairs: list[Pair] = []
    seconds: list[float] = []
    for file in sorted((folder / "pairs" / name).glob(f"{slowdown:.2f}-*[0-9].npz")):
        with np.load(file) as stored:
            pairs.append(Pair(*(stored[f"arr_{i}"] for i in range(4))))
            seconds.append(float(stored["seconds"]))
    return pairs, seconds


def ratio_of(pairs: Sequence[Pair], metric: str) -> Callable[[Sequence[int]], Ratio | None]:
    """Return what gives the ratio of *metric* over the pairs of some indices, as ``compare`` computes it."""
    if metric in TAILS:
        return lambda chosen: percentile_ratio([pairs[i] for i in chosen], TAILS[metric])
    values = p50_ratio(pairs, cpu=metric == "cpu").values  # one per pair: computed once

    def ratio(chosen: Sequence[int]) -> Ratio:
        block = [values[i] for i in chosen]
        return Ratio(block, sequential_interval(block))

    return ratio


def replayed(
    ratio_over: Callable[[Sequence[int]], Ratio | None],
    seconds: Sequence[float],
    start: int,
    options: CompareOptions,
) -> tuple[Ratio | None, float]:
    """Compare with the recorded pairs from *start* on (the first follows the last); return the end and its seconds."""
    order = [(start + i) % len(seconds) for i in range(len(seconds))]
    for n in range(1, len(order) + 1):
        durations = [seconds[i] for i in order[:n]]
        ratio = ratio_over(order[:n])
        if should_stop(ratio, durations, sum(durations), options):
            break
    return ratio, sum(durations)


def replay(folder: Path, count: int, seed: int, asked: CompareOptions) -> list[list[str]]:
    """Replay *count* comparisons per condition and slow-down; return the table's rows."""
    rows = []
    for name in CONDITIONS:
        for slowdown in SLOWDOWNS:
            pairs, seconds = recorded(folder, name, slowdown)
            if len(pairs) < 2:
                continue
            rng = np.random.default_rng([seed, int(100 * slowdown)])
            ratio_over = ratio_of(pairs, asked.metric)
            found, covers, took = [], 0, []
            for start in rng.integers(0, len(pairs), count):
                ratio, spent = replayed(ratio_over, seconds, int(start), asked)
                found.append((judge(ratio, asked.margin) if ratio else Verdict.INCONCLUSIVE).value)
                low, high = (ratio and ratio.interval) or (-np.inf, np.inf)
                covers += low <= np.log1p(slowdown) <= high
                took.append(spent)
            p50 = float(np.median([np.median(pair.base) for pair in pairs]))
            what = f"replayed {_condition(name, asked.metric)}"
            rows.append(_row(what, slowdown, found, covers, took, 2 * len(pairs), p50))
    return rows


def _condition(name: str, metric: str) -> str:
    return name if metric == "p50" else f"{name}-{metric}"


def _row(
    what: str,
    slowdown: float,
    found: Sequence[str],
    covers: int,
    seconds: Sequence[float],
    processes: int,
    p50_ns: float,
) -> list[str]:
    n = len(found)
    shares = {v: found.count(v) for v in ("regressed", "improved", "unchanged", "inconclusive")}
    alarms = shares["regressed"] + (shares["improved"] if slowdown == 0 else 0)
    return [
        what,
        f"{100 * slowdown:+.0f} %",
        str(n),
        str(processes),
        f"{p50_ns / 1e6:.2f}",
        f"{100 * alarms / n:.2f} {_exact(alarms, n)}",
        *(f"{100 * shares[v] / n:.1f}" for v in ("improved", "unchanged", "inconclusive")),
        f"{100 * covers / n:.2f}",
        f"{np.median(seconds):.1f}",
        WANTED.get((what.split()[-1], slowdown), ""),
    ]


HEADER = (
    "comparisons", "slowed", "n", "processes", "P50 ms", "regressed % [95 %]", "improved %", "unchanged %",
    "inconclusive %", "interval covers %", "s (median)", "wanted",
)  # fmt: skip


def _exact(k: int, n: int) -> str:
    """Return the exact binomial interval (C. Clopper, E. Pearson, Biometrika 26 (1934) 404-413) in percent."""
    low = 0.0 if k == 0 else float(beta.ppf(0.025, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(0.975, k + 1, n - k))
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def fixed_coverage(folder: Path, count: int, seed: int) -> list[str]:
    """Say how often fixed-sample intervals of *count* replayed A/A comparisons hold 1, for several sizes."""
    lines = []
    for name in CONDITIONS:
        values = p50_ratio(recorded(folder, name, 0.0)[0]).values
        for pairs in (5, FIXED_PAIRS, 16, 30):
            if len(values) < pairs:
                continue
            rng = np.random.default_rng([seed, pairs])
            covered = 0
            for start in rng.integers(0, len(values), count):
                block = [values[(start + i) % len(values)] for i in range(pairs)]
                low, high = fixed_interval(block) or (0.0, 0.0)
                covered += low <= 0 <= high
            share = f"{100 * covered / count:.2f} % {_exact(covered, count)}"
            lines.append(
                f"replayed A/A, {name}, {pairs} pairs fixed: interval of the P50 ratio holds 1 in {share} of {count} "
                "(wanted 93 to 97)"
            )
    return lines


def live(folder: Path, artifact: Path, name: str, counts: Sequence[int], asked: CompareOptions) -> None:
    """Run comparisons from end to end, interleaved over slow-downs; what is there already counts."""
    place = folder / "live" / _condition(name, asked.metric)
    place.mkdir(parents=True, exist_ok=True)
    with condition(name):
        for number in range(max(counts)):
            for slowdown, count in zip(SLOWDOWNS, counts, strict=True):
                file = place / f"{slowdown:.2f}-{number:05d}.json"
                if number < count and not file.exists():
                    options = replace(asked, slowdown=slowdown)
                    _save(file, portcall.compare(artifact, artifact, options=options))


def coverage(folder: Path, artifact: Path, count: int) -> None:
    """Run *count* A/A comparisons of a fixed number of pairs; what is there already counts."""
    place = folder / "live" / "fixed"
    place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = place / f"{number:05d}.json"
        if not file.exists():
            options = replace(OPTIONS, fixed=True, most_pairs=FIXED_PAIRS)
            _save(file, portcall.compare(artifact, artifact, options=options))


def _save(file: Path, answer: Any) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(answer))
    part.replace(file)


def live_rows(folder: Path, metric: str) -> list[list[str]]:
    rows = []
    for name in (_condition(n, metric) for n in CONDITIONS):
        for slowdown in SLOWDOWNS:
            files = sorted((folder / "live" / name).glob(f"{slowdown:.2f}-*.json"))
            answers = [json.loads(f.read_text()) for f in files]
            if not answers:
                continue
            primary = [next(m for m in a["metrics"] if m["name"] == metric) for a in answers]
            covers = sum(not m["ci"] or m["ci"][0] <= 1 + slowdown <= m["ci"][1] for m in primary)
            p50 = float(np.median([a["base"]["p50_ns"] for a in answers]))
            processes = sum(2 * a["pairs"] for a in answers)
            seconds = [a["seconds"] for a in answers]
            verdicts = [a["verdict"] for a in answers]
            rows.append(_row(f"live {name}", slowdown, verdicts, covers, seconds, processes, p50))
    return rows


def live_coverage(folder: Path) -> list[str]:
    answers = [json.loads(f.read_text()) for f in sorted((folder / "live" / "fixed").glob("*.json"))]
    if not answers:
        return []
    primary = [next(m for m in a["metrics"] if m["name"] == "p50") for a in answers]
    covered = sum(m["ci"][0] <= 1 <= m["ci"][1] for m in primary)
    share = f"{100 * covered / len(primary):.1f} % {_exact(covered, len(primary))}"
    return [
        f"live A/A, {FIXED_PAIRS} pairs fixed: interval holds 1 in {share} of {len(primary)} (wanted 91 to 98.5)"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["record", "replay", "live", "coverage", "report"])
    parser.add_argument("--folder", type=Path, default=Path("build/bench-compare"))
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--condition", choices=CONDITIONS, default="quiet")
    parser.add_argument("--rounds", type=int, default=300, help="record: pairs per slow-down")
    parser.add_argument("--slowdowns", default="0,0.05,0.1", help="record: shares, of those three")
    parser.add_argument(
        "--count", type=int, default=2000, help="replay: comparisons each; coverage: how many"
    )
    parser.add_argument("--live", default="40,20,20", help="live: comparisons per slow-down")
    parser.add_argument("--metric", choices=["p50", *TAILS, "cpu"], default="p50", help="what judges")
    parser.add_argument("--max-time", type=float, default=OPTIONS.budget_s, help="seconds of a comparison")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    asked = replace(OPTIONS, metric=options.metric, budget_s=options.max_time)
    if options.command in ("record", "live", "coverage"):
        artifact = (options.artifact or make_artifact(folder)).resolve()
        if options.command == "record":
            slowdowns = [float(share) for share in options.slowdowns.split(",")]
            record(folder, artifact, options.condition, options.rounds, slowdowns)
        elif options.command == "live":
            live(folder, artifact, options.condition, [int(n) for n in options.live.split(",")], asked)
        else:
            coverage(folder, artifact, options.count)
        return
    rows = replay(folder, options.count, options.seed, asked)
    if options.command == "report":
        rows += live_rows(folder, options.metric)
    print(align(HEADER, rows, 2))
    if options.metric != "p50":
        return
    lines = fixed_coverage(folder, options.count, options.seed)
    print("\n".join([*lines, *(live_coverage(folder) if options.command == "report" else [])]))


if __name__ == "__main__":
    main()
