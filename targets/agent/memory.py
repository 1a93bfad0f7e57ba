"""Resident memory of this process: now, at its peak, and without what it shares.

On Linux the figures come from ``/proc/self/status``. Since Linux 6.2 the kernel counts pages per CPU and may
read them loosely: off by max(32, 2 x CPUs) pages per CPU and kind of page at worst; some later versions sum
exactly. Measure memory in a process of its own: a timed one holds the arrays of its samples.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Optional

from portcall.targets.agent.errors import UnavailableError

_PROC = Path("/proc/self")


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
