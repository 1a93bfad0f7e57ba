"""Cumulative counters of disturbance: what others took while a process was measured. Two readings make a difference.

Everything is a total since boot (or since the process began), so that ``bench.conditions`` subtracts before from after.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

from portcall.targets.agent.cgroups import own_folders, read

_ROOT = Path("/")


def counters(root: Path = _ROOT) -> Dict[str, Any]:
    """Return totals; what a system does not tell is None, with the reason under its key in "absent".

    busy_s, steal_s, total_s: CPU seconds of the whole machine (all CPUs together; total_s holds idle time too); steal
    is what a hypervisor gave to others. own_cpu_s: of this process. involuntary_switches: how often this process was
    taken off a CPU. pressure_s: seconds in which some task waited for a CPU (PSI). throttled_s: that the CPU quota of
    this process's cgroup stopped it. thermal_throttles: events of all CPUs (x86).
    """
    found: Dict[str, Any] = {}
    absent: Dict[str, str] = {}
    for key, value, reason in (
        *_cpu_times(root),
        ("own_cpu_s", sum(os.times()[:4]), ""),
        ("involuntary_switches", _involuntary(), "this Python has no resource module"),
        ("pressure_s", _pressure(root), "no /proc/pressure/cpu (a kernel without PSI)"),
        ("throttled_s", _throttled(root), "no cpu.stat of a cgroup with a quota"),
        ("thermal_throttles", _thermal(root), "no thermal_throttle in /sys"),
    ):
        found[key] = value
        if value is None:
            absent[key] = reason
    return {**found, "absent": absent}


def _cpu_times(root: Path) -> List[Any]:
    """Return busy, steal and total seconds of the machine from /proc/stat's first line.

    Source: proc_stat(5): user nice system idle iowait irq softirq steal guest guest_nice; guest is part of user.
    """
    words = (read(root, "proc/stat") or "").split("\n")[0].split()
    reason = "no /proc/stat"
    if len(words) < 9 or words[0] != "cpu" or not all(w.isdigit() for w in words[1:]):
        return [(key, None, reason) for key in ("busy_s", "steal_s", "total_s")]
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, iowait, irq, softirq, steal = (int(w) / ticks for w in words[1:9])
    busy = user + nice + system + irq + softirq
    return [("busy_s", busy, ""), ("steal_s", steal, ""), ("total_s", busy + idle + iowait + steal, "")]


def _involuntary() -> Optional[int]:
    try:
        import resource  # absent on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _pressure(root: Path) -> Optional[float]:
    found = re.search(r"^some .*total=(\d+)", read(root, "proc/pressure/cpu") or "", re.MULTILINE)
    return None if found is None else int(found.group(1)) / 1e6


def _throttled(root: Path) -> Optional[float]:
    """Return the largest of this process's cgroups: version 2 counts microseconds, version 1 nanoseconds."""
    totals = []
    for folder in [*own_folders(root, ""), *own_folders(root, "cpu")]:
        text = read(folder, "cpu.stat") or ""
        found = re.search(r"^throttled_(usec|time) (\d+)$", text, re.MULTILINE)
        if found:
            totals.append(int(found.group(2)) / (1e6 if found.group(1) == "usec" else 1e9))
    return max(totals, default=None)


def _thermal(root: Path) -> Optional[int]:
    values = [
        read(path.parent, path.name)
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    ]
    known = [int(v) for v in values if v and v.isdigit()]
    return sum(known) if known else None
