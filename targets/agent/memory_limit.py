"""The smallest memory limit in which an artifact still runs: bisection, each try a fresh process in its own cgroup.

The job ``find_memory_limit``. "Runs" means: the runtime imports, the artifact loads, infers, and its outputs equal the
samples as ``bench`` checks them, within the time allowed. The limit holds for the whole process: interpreter, NumPy and
runtime included, without swap. File pages that others brought into the page cache are charged to those: the files of
the artifact are dropped from the cache before each try where nobody else maps them, libraries are not.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

from portcall.targets.agent import cgroups, child, jobs, opening
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.errors import CellFailed, UnavailableError, error_from_kind

INFERENCES = 5
CONFIRMATIONS = 5
"""The smallest limit must hold this many times: what the kernel can reclaim varies."""

FINEST_BYTES = 1 << 20
SLOWDOWN = 20.0
"""A try that takes this many times as long as without a limit (at least 30 s) does not run: it thrashes."""


def find(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """Return "limit_bytes" with its resolution, the tries, and how it was found; see docs/memory.md.

    The edge is not sharp: "ran_once_at_bytes" is the smallest limit in which some try ran, "failed_at_bytes" the
    largest in which one failed; limit_bytes is above the latter and held ``CONFIRMATIONS`` times in a row.

    Without permission or a memory controller: {"available": False, "reason", "fix"}. Raises what the artifact raises
    without a limit: then there is nothing to search.
    """
    try:
        place = cgroups.find_place()
    except UnavailableError as error:
        return {"available": False, "limit_bytes": None, "reason": error.message, "fix": error.fix or None}
    tries: List[Dict[str, Any]] = []
    with cgroups.Groups(place) as groups:

        def attempt(limit: Optional[int], timeout_s: Optional[float]) -> Dict[str, Any]:
            _drop_from_cache(Artifact.from_json(arguments["artifact"]).path)
            try:
                with groups.make(limit) as group:
                    found = {"limit_bytes": limit, **_try(group, arguments, timeout_s)}
            except OSError as error:
                raise UnavailableError(
                    "the cgroup %s cannot be used: %s" % (place.folder, error.strerror), cgroups.FIX
                ) from error
            tries.append(found)
            progress(len(tries), None)
            return found

        free = attempt(None, None)
        if not free["runs"]:
            raise error_from_kind(free["kind"], free["reason"], free["fix"])
        resolution = max(FINEST_BYTES, (free["peak_bytes"] or 0) >> 7)
        timeout_s = max(30.0, SLOWDOWN * free["seconds"])
        smallest = search(
            lambda limit: bool(attempt(limit, timeout_s)["runs"]),
            free["peak_bytes"] or 256 << 20,
            resolution,
        )
    once = min(t["limit_bytes"] for t in tries if t["limit_bytes"] is not None and t["runs"])
    passing = [t for t in tries if t["limit_bytes"] == smallest and t["runs"]]
    failing = [t for t in tries if t["limit_bytes"] is not None and not t["runs"]]
    at_limit = statistics.median(t["infer_ns"] for t in passing)
    return {
        "available": True,
        "limit_bytes": smallest,
        "resolution_bytes": resolution,
        "ran_once_at_bytes": once,
        "failed_at_bytes": max((t["limit_bytes"] for t in failing), default=None),
        "confirmations": CONFIRMATIONS,
        "method": "bisection in a cgroup v%d, swap off, a fresh process per try" % place.version,
        "cgroup_version": place.version,
        "checked_samples": free["checked"],
        "unlimited_peak_bytes": free["peak_bytes"],
        "infer_ratio": at_limit / free["infer_ns"],
        "failed_because": failing[-1]["reason"] if failing else None,
        "tries": tries,
        "reason": None,
        "fix": None,
    }


def search(
    runs: Callable[[int], bool], peak: int, resolution: int, confirmations: int = CONFIRMATIONS
) -> int:
    """Return the smallest multiple of *resolution* at which *runs* is true *confirmations* times in a row.

    peak: where the search begins, in bytes. All limits are multiples of *resolution*; the one below the answer was
    tried and failed, or is 0. Raises CellFailed where nothing up to four times the peak runs.
    """
    low, high = 0, math.ceil(peak / resolution)
    most = 4 * high
    while not runs(high * resolution):
        low, high = high, high + max(1, high // 4)
        if high > most:
            raise CellFailed(
                "it runs without a limit but not within %d bytes" % (low * resolution),
                "Run it again on a quieter machine",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if runs(middle * resolution) else (middle, high)
    more = confirmations - 1
    while not all(runs(high * resolution) for _ in range(more)):
        high, more = high + 1, confirmations
        if high > most:
            raise CellFailed(
                "no limit holds %d times in a row" % confirmations, "Run it on a quieter machine"
            )
    return high * resolution


def _try(group: cgroups.Group, arguments: Mapping[str, Any], timeout_s: Optional[float]) -> Dict[str, Any]:
    """Run ``attempt`` in a fresh process in *group*; tell whether it ran, and if not, why."""
    start = time.monotonic()
    ended = child.run("portcall.targets.agent.memory_limit:attempt", arguments, group.command, timeout_s)
    seconds = time.monotonic() - start
    told = {"seconds": seconds, "peak_bytes": group.peak_bytes(), "infer_ns": None, "checked": None}
    failed = {**told, "runs": False, "kind": "failed", "fix": ""}
    if ended.timed_out:
        return {
            **failed,
            "reason": "not done within %.0f s: it spends its time on reclaiming memory" % seconds,
        }
    if ended.answer is None:
        return {**failed, "reason": "killed by the kernel for memory" if group.oom_kills() else ended.death}
    if "error" in ended.answer:
        error = ended.answer["error"]
        return {**failed, "reason": error["message"], "kind": error["kind"], "fix": error["fix"]}
    return {**told, **ended.answer["value"], "runs": True, "reason": None}


def attempt(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """Load, infer and check in this process; return the median time of an inference and how many samples agreed."""
    artifact = Artifact.from_json(arguments["artifact"])
    workload = Workload.from_json(arguments["workload"])
    backend, artifact, _ = opening.ready(artifact, workload)
    inputs, reference = opening.read_inputs(arguments["inputs"])
    with backend.load(artifact, workload) as session:
        names = opening.Names(artifact, session)
        names.bind(session, opening.batch_of(session, names, inputs, workload.batch))
        times = []
        for _ in range(INFERENCES):
            start = time.perf_counter_ns()
            session.infer()
            times.append(time.perf_counter_ns() - start)
        opening.check_outputs(names, session, arguments, limit=None)
    return {
        "infer_ns": statistics.median(times),
        "checked": len(arguments["expected_sqnr_db"]) if reference else 0,
    }


def _drop_from_cache(path: Path) -> None:
    """Have the kernel forget the file's pages, so that the next process to read them is charged for them."""
    if not hasattr(os, "posix_fadvise"):
        return
    files = (
        [p for p in path.rglob("*") if p.is_file()]
        if path.is_dir()
        else list(path.parent.glob(path.stem + ".*"))
    )
    for file in files:
        try:
            fd = os.open(str(file), os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
