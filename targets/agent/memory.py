"""Resident memory of this process: now, at its peak, and without what it shares.

Figures of now come from ``/proc/self/smaps_rollup`` where it can be read: it walks the page tables, so it is exact.
``/proc/self/status`` (the peak, and now elsewhere) reads counters. Since Linux 6.2 the kernel counts pages per CPU and
may read them loosely: off by max(32, 2 x CPUs) pages per CPU and kind of page at worst; some later versions sum
exactly. ``Reading.counter_error_bytes`` tells by how much they are off at that moment. Measure memory in a process of
its own: a timed one holds the arrays of its samples.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

from portcall.targets.agent.errors import UnavailableError

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Reading:
    """Resident memory at one moment, in bytes.

    pss_bytes: shared pages divided by their users. private_bytes: pages that no other process has; what would be freed
    if the process ended. counter_error_bytes: the kernel's counter (VmRSS) minus the exact figure. Those three are None
    without smaps_rollup. method: "smaps_rollup", "VmRSS" or "ps".
    """

    rss_bytes: int
    pss_bytes: Optional[int]
    private_bytes: Optional[int]
    counter_error_bytes: Optional[int]
    method: str


def read() -> Reading:
    """Return resident memory now. Raises UnavailableError where the system does not tell."""
    fields = _fields(_PROC / "smaps_rollup")
    if "Rss" not in fields:
        has_counter = _kib_field(_PROC / "status", "VmRSS") is not None
        return Reading(current_rss_bytes(), None, None, None, "VmRSS" if has_counter else "ps")
    counted = _kib_field(_PROC / "status", "VmRSS")
    private = sum(fields.get(k, 0) for k in ("Private_Clean", "Private_Dirty", "Private_Hugetlb"))
    error = None if counted is None else counted - fields["Rss"]
    return Reading(fields["Rss"], fields.get("Pss"), private, error, "smaps_rollup")


def settle() -> bool:
    """Collect garbage and give freed heap back to the system; False where the C library cannot (only glibc can).

    Freed heap that stays would hide what is allocated next.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return True


def current_rss_bytes() -> int:
    """Return the resident set size now: VmRSS, or what ``ps`` says where there is no /proc (macOS).

    Raises UnavailableError where neither exists.
    """
    value = _kib_field(_PROC / "status", "VmRSS")
    if value is not None:
        return value
    try:
        answer = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())], stdout=subprocess.PIPE, check=True, timeout=10
        )
        return int(answer.stdout) * 1024
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"no VmRSS in {_PROC / 'status'}, and ps failed: {error}") from error


def peak_rss_bytes() -> int:
    """Return the high-water mark of the resident set size; ``METHOD`` names the source.

    VmHWM starts with this program. ru_maxrss, where VmHWM is absent, cannot be reset and on Linux is never
    below the size of the process that started this one.
    Raises UnavailableError where neither exists.
    """
    value = _kib_field(_PROC / "status", "VmHWM")
    if value is not None:
        return value
    try:
        import resource  # absent on Windows
    except ImportError as error:
        raise UnavailableError("this Python has neither /proc nor the resource module") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def reset_peak() -> bool:
    """Set the peak back to the current size; False where the system offers no such thing."""
    if METHOD != "VmHWM":
        return False
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def pss_bytes() -> Optional[int]:
    """Return the proportional set size (shared pages divided by their users); None where it is not told."""
    return _kib_field(_PROC / "smaps_rollup", "Pss")


def _fields(path: Path) -> Dict[str, int]:
    """Return every line ``name:  123 kB`` in bytes; empty where the file cannot be read."""
    found = {}
    try:
        with path.open() as lines:
            for line in lines:
                words = line.split()
                if len(words) == 3 and words[2] == "kB":
                    found[words[0].rstrip(":")] = int(words[1]) * 1024
    except OSError:
        return {}
    return found


def _kib_field(path: Path, name: str) -> Optional[int]:
    """Return the bytes of a line ``name:  123 kB``, or None if file or line is absent."""
    prefix = name + ":"
    try:
        with path.open() as lines:
            for line in lines:
                if line.startswith(prefix):
                    return int(line[len(prefix) :].split()[0]) * 1024
    except OSError:
        pass
    return None


METHOD: str = "ru_maxrss" if _kib_field(_PROC / "status", "VmHWM") is None else "VmHWM"
"""Where ``peak_rss_bytes`` comes from: "VmHWM" or "ru_maxrss" (some sandboxes' /proc has no VmHWM)."""
