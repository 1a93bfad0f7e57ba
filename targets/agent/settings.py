"""The settings of a measuring process: CPU affinity, priority, spinning threads.

They are applied before the runtime is imported: threads that it starts later inherit them. What the system does not
offer or permit is left as it is, and a warning says so and what to do: a measurement without it is still one.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Workload
from portcall.targets.agent.errors import BadInput

_RT_RUNTIME = Path("/proc/sys/kernel/sched_rt_runtime_us")
_RT_PERIOD = Path("/proc/sys/kernel/sched_rt_period_us")

_PRIORITY = re.compile(r"(nice):(-?\d{1,2})|(fifo):(\d{1,2})")


def check(workload: Workload) -> None:
    """Raise BadInput where a number of *workload* cannot be: zero processes, a budget of zero, CPU -1."""
    for name, least in (("batch", 1), ("threads", 1), ("processes", 1), ("min_count", 1)):
        value = getattr(workload, name)
        if not isinstance(value, int) or value < least:
            raise BadInput(f"{name} is {value!r}", f"Give a whole number from {least} up")
    for name in ("warmup_s", "max_warmup_s", "min_time_s"):
        value = getattr(workload, name)
        if not (math.isfinite(value) and value >= 0):
            raise BadInput(f"{name} is {value!r} seconds", "Give a finite number of seconds, not negative")
    for name, meaning in (("max_time_s", "a budget"), ("ci_width", "an interval's width")):
        value = getattr(workload, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadInput(
                f"{name} is {value!r}: {meaning} above 0 is needed", f"Leave {name} out, or raise it"
            )
    if workload.affinity is not None and (not workload.affinity or min(workload.affinity) < 0):
        raise BadInput(
            f"affinity {list(workload.affinity)} names no CPU", "Give numbers from 0 up, such as 0 or 0-3"
        )
    if workload.priority is not None:
        parse_priority(workload.priority)


def parse_priority(text: str) -> Tuple[str, int]:
    """Return ("nice", -20..19) or ("fifo", 1..99) of a text such as "nice:-5". Raises BadInput for any other."""
    found = _PRIORITY.fullmatch(text)
    if found is not None:
        kind, number = (
            (found.group(1), int(found.group(2))) if found.group(1) else ("fifo", int(found.group(4)))
        )
        low, high = (-20, 19) if kind == "nice" else (1, 99)
        if low <= number <= high:
            return kind, number
    raise BadInput(
        f"{text!r} is no priority", "Give nice:N with N from -20 to 19, or fifo:N with N from 1 to 99"
    )


def apply(workload: Workload) -> Tuple[Dict[str, Any], List[str]]:
    """Apply affinity and priority to this process; return what holds now, and warnings on what does not.

    The record: "affinity" (the CPUs of this process, None where the system has no affinity), "priority" ("nice:N" or
    "fifo:N" as read back). Raises BadInput for a CPU that this machine does not have.
    """
    warnings: List[str] = []
    if workload.affinity is not None:
        warnings += _set_affinity(workload.affinity)
    if workload.priority is not None:
        warnings += _set_priority(workload.priority)
    cpus = _affinity()
    if cpus is not None and workload.threads > len(cpus):
        warnings.append(
            "%d threads on %d CPUs (%s): they wait for each other; give --threads %d, or more CPUs with --affinity"
            % (workload.threads, len(cpus), ranges(cpus), len(cpus))
        )
    return {"affinity": cpus, "priority": _priority()}, warnings


def spinning_warning(workload: Workload, environment: Mapping[str, Any], backend: str) -> Optional[str]:
    """Return a warning where *workload* asks for spinning and the session does not tell that it does so."""
    if workload.spinning is None or environment.get("spinning") == workload.spinning:
        return None
    word = "on" if workload.spinning else "off"
    return "--spinning %s: %s has no such switch, its threads wait as it likes; leave --spinning out" % (
        word,
        backend,
    )


def ranges(numbers: Sequence[int]) -> str:
    """Return CPU numbers as Linux writes them: "0-3,6"."""
    parts: List[List[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else "%d-%d" % (a, b) for a, b in parts)


def _affinity() -> Optional[List[int]]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _set_affinity(cpus: Tuple[int, ...]) -> List[str]:
    wanted = "--affinity " + ranges(cpus)
    if not hasattr(os, "sched_setaffinity"):
        return [wanted + ": this system has no CPU affinity; measured unpinned, stop other programs instead"]
    configured = os.sysconf("SC_NPROCESSORS_CONF")
    if max(cpus) >= configured:
        raise BadInput(
            "%s: this machine has the CPUs 0-%d" % (wanted, configured - 1), "Name CPUs of this machine"
        )
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        return [
            "%s was refused (%s); measured on the CPUs %s: name some of these, or ask whoever limits this container"
            % (wanted, error.strerror, ranges(_affinity() or []))
        ]
    found = _affinity() or []
    if found != sorted(set(cpus)):
        return ["%s: only %s is allowed here; measured there" % (wanted, ranges(found))]
    return []


def _set_priority(text: str) -> List[str]:
    kind, number = parse_priority(text)
    if kind == "nice":
        if not hasattr(os, "setpriority"):
            return ["--priority %s: this system has no nice values; measured without" % text]
        try:
            os.setpriority(os.PRIO_PROCESS, 0, number)
        except OSError as error:
            return [
                _refused(
                    text, error, "only root, or a process with CAP_SYS_NICE, may go below its own nice value"
                )
            ]
        return []
    if not hasattr(os, "sched_setscheduler"):
        return [
            "--priority %s: this system has no real-time scheduling; measured without, try nice:-10" % text
        ]
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(number))
    except OSError as error:
        return [
            _refused(
                text, error, "real-time scheduling needs root, CAP_SYS_NICE or an rtprio limit (ulimit -r)"
            )
        ]
    throttled = _throttled_ms()
    if throttled is None:
        return []
    return [
        "--priority %s: the kernel stops real-time processes for up to %g ms a second, and the highest latencies hold "
        "these pauses; sysctl kernel.sched_rt_runtime_us=-1 lifts that" % (text, throttled)
    ]


def _refused(text: str, error: OSError, fix: str) -> str:
    return "--priority %s was refused (%s), measured as %s: %s" % (text, error.strerror, _priority(), fix)


def _throttled_ms() -> Optional[float]:
    """Return how long per second the kernel keeps real-time processes from running; None for never or unknown."""
    try:
        runtime, period = int(_RT_RUNTIME.read_text()), int(_RT_PERIOD.read_text())
    except (OSError, ValueError):
        return None
    return None if runtime < 0 or runtime >= period else 1000.0 * (1 - runtime / period)


def _priority() -> Optional[str]:
    """Return "fifo:N", "nice:N", or None where the system does not tell."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_FIFO:
        return "fifo:%d" % os.sched_getparam(0).sched_priority
    return "nice:%d" % os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else None
