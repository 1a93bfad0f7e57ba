"""``make bench-calibration``: how long calibration takes, and how much memory, side by side with its peers.

Same model (EfficientNet-Lite0 at 224, lowered once by portcall to its ONNX graph and its float ``.tflite``), same
samples (the example's crops, one ``.npz``), same machine; every trial in a fresh process, contenders taking turns
over the rounds (A B C, A B C, ...). Seconds: wall time from the model file to ranges, imports left out; peak memory:
VmHWM of the process, imports included (the largest of its processes where there are two). The limit is plain fp32
inference over the same samples, and "x limit" the ratio to it in the same round: median, least and most.

What the peers do differs: NNCF and modelopt end in a quantized model, the calibrators in ranges. Each row says what
is included. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.calibration_contenders import CONTENDERS, Contender
from benchmarks.calibration_report import Row, Trial, footer, table, to_json
from benchmarks.calibration_setup import MODEL, environment, lower_graphs, write_images
from portcall.core import CellFailed, Graph, PortcallError

ROOT = Path(__file__).parent.parent
FOLDER = Path("build", "bench-calibration")
HEAVY_IMAGES = 100
OWN = ("limit", "portcall-")
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|bad_alloc|[Cc]annot allocate|[Ff]ailed to allocate|[Uu]nable to allocate"
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What every trial shares. threads: where the contender lets one choose; folder: for copies of the model."""

    folder: Path
    threads: int
    memory_limit_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """Kind -> graph, and environment -> interpreter; in place of one that cannot be had, the error that says why."""

    graphs: Mapping[str, Graph | PortcallError]
    pythons: Mapping[str | None, Path | PortcallError]


def prepare(contenders: Collection[Contender], folder: Path) -> Prepared:
    """Lower the model and make the environments that *contenders* need."""
    pythons: dict[str | None, Path | PortcallError] = {}
    for name in sorted({c.venv for c in contenders}, key=str):
        try:
            pythons[name] = environment(name, folder)
        except PortcallError as error:
            pythons[name] = error
    return Prepared(lower_graphs(sorted({c.graph for c in contenders}), folder), pythons)


def run_trial(
    contender: Contender, prepared: Prepared, images: Path, number: int, settings: Settings
) -> Trial:
    """Run every step of *contender* in a fresh process, on a copy of the model. Raises PortcallError."""
    graph, python = prepared.graphs[contender.graph], prepared.pythons[contender.venv]
    if isinstance(python, PortcallError):
        raise python
    if isinstance(graph, PortcallError):
        raise graph
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    process_s, previous = 0.0, None
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="trial-", dir=settings.folder) as name:
        scratch = Path(name)
        shutil.copytree(graph.path.parent, scratch / "model")  # some write beside it, or into it
        own = replace(graph, path=scratch / "model" / graph.path.name)
        for step in range(len(contender.steps)):
            job = {
                "contender": contender.name,
                "step": step,
                "model": str(own.path),
                "graph": own.to_json(),
                "images": str(images),
                "threads": settings.threads,
                "memory_limit_bytes": settings.memory_limit_bytes,
                "previous": previous,
            }
            start = time.perf_counter()
            answer = _run_step(python, job, scratch, settings)
            process_s += time.perf_counter() - start
            seconds |= answer["seconds"]
            peaks |= answer["peak_rss_bytes"]
            previous, versions = answer["value"], answer["versions"]
    return Trial(number, seconds, process_s, peaks, previous, versions)


def _run_step(python: Path, job: dict[str, Any], scratch: Path, settings: Settings) -> dict[str, Any]:
    job_path, answer_path, log = (scratch / n for n in ("job.json", "answer.json", "output.log"))
    job_path.write_text(json.dumps(job))
    answer_path.unlink(missing_ok=True)
    command = [str(python), "-P", "-m", "benchmarks.calibration_step", str(job_path), str(answer_path)]
    with log.open("wb") as stream:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                cwd=scratch,
                timeout=settings.timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise CellFailed(
                f"no result within {settings.timeout_s:g} s", "Allow more with --timeout"
            ) from error
    answer: dict[str, Any] = {}
    if answer_path.is_file():
        answer = json.loads(answer_path.read_text())
        if "error" not in answer:
            return answer
    output = log.read_text(errors="replace").strip().splitlines() or ["none"]
    reason = answer.get("error") or f"{_death(status)}; its last output: {output[-1].strip()[:200]}"
    if _OUT_OF_MEMORY.search(reason):
        reason = f"out of memory at {settings.memory_limit_bytes / 1e9:g} GB"
    raise CellFailed(reason)


def _death(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def run_rounds(rows: Sequence[Row], prepared: Prepared, images: Path, settings: Settings) -> None:
    """Fill the *rows* of one number of images, contenders taking turns. A contender that fails is not run again."""
    for number in range(1, max(row.rounds for row in rows) + 1):
        for row in rows:
            if row.reason or number > row.rounds:
                continue
            try:
                trial = run_trial(row.contender, prepared, images, number, settings)
            except PortcallError as error:
                row.reason = shown = str(error)
            else:
                row.trials.append(trial)
                shown = f"{trial.total_s:.2f} s, {trial.peak_bytes / 1e6:.0f} MB"
            print(f"{row.images} images, round {number}, {row.contender.name}: {shown}", file=sys.stderr)


def plan_rows(contenders: Sequence[Contender], images: int, rounds: int, heavy: bool) -> list[Row]:
    """Return one row per contender; heavy ones run once, on HEAVY_IMAGES at most, unless *heavy* says otherwise."""
    rows = []
    for contender in contenders:
        spared = bool(contender.heavy) and not heavy
        row = Row(contender, images, 1 if spared else rounds)
        if spared and images > HEAVY_IMAGES:
            row.reason = f"not run on more than {HEAVY_IMAGES} images without --heavy: {contender.heavy}"
        rows.append(row)
    return rows


def _names(text: str) -> list[str]:
    known = [c.name for c in CONTENDERS]
    for name in text.split(","):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise argparse.ArgumentTypeError(f"no contender {name!r}; there are: {', '.join(known)}.{hint}")
    return text.split(",")


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of images, such as 100,500")
    return [int(n) for n in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=_counts, default=[100, 500], metavar="N[,N...]", help="default 100,500")
    add("--rounds", type=int, default=5, help="default 5")
    add("--only", type=_names, metavar="NAMES", help="these contenders, and the limit")
    add("--skip", type=_names, default=[], metavar="NAMES")
    add("--heavy", action="store_true", help="heavy contenders at every size and in every round, too")
    add("--memory-limit", type=float, default=12.0, metavar="GB", help="of a process; default 12")
    add("--timeout", type=float, default=3600.0, metavar="S", help="of a process; default 3600")
    add("--folder", type=Path, default=FOLDER, help=f"for all that is made; default {FOLDER}")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 if the limits and portcall's contenders have a result wherever they were run."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = {"limit", *(options.only or [c.name for c in CONTENDERS])} - set(options.skip)
    contenders = [c for c in CONTENDERS if c.name in names]
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"there is no folder {options.json.parent} for --json")
    # All cores, as the contenders take by default.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = Settings(folder, threads, int(options.memory_limit * 1e9), options.timeout)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"this machine is busy (load {load:.1f}): the figures will be noisy", file=sys.stderr)
    rows = [row for n in options.images for row in plan_rows(contenders, n, options.rounds, options.heavy)]
    interrupted = False
    try:
        prepared = prepare(contenders, folder)
        for count in options.images:
            images = folder / f"images-{count}.npz"
            write_images(count, images)
            run_rounds([r for r in rows if r.images == count], prepared, images, settings)
    except KeyboardInterrupt:
        interrupted = True
        for row in rows:
            row.reason = row.reason or ("interrupted" if len(row.trials) < row.rounds else "")
    print(table(rows))
    print(footer(rows, threads, load))
    if options.json:
        shared = {"model": MODEL, "threads": threads, "memory_limit_bytes": settings.memory_limit_bytes}
        options.json.write_text(json.dumps(to_json(rows, shared), indent=1) + "\n")
    if interrupted:
        return 130
    return 1 if any(r.contender.name.startswith(OWN) and not r.trials for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
