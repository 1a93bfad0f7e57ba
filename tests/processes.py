"""Finds processes by a mark in their command line, for tests that nothing is left running."""

from __future__ import annotations

import time
from pathlib import Path


def running(mark: str) -> dict[int, str]:
    """Return pid -> command line of the living processes whose command line holds *mark*; zombies do not live."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except OSError:  # it ended meanwhile
            continue
        if mark in command and state not in "ZX":
            found[int(entry.name)] = command
    return found


def left_running(mark: str, within_s: float = 5.0) -> dict[int, str]:
    """Return what ``running`` still finds after *within_s*; earlier, and empty, once there is nothing."""
    deadline = time.monotonic() + within_s
    while found := running(mark):
        if time.monotonic() > deadline:
            return found
        time.sleep(0.02)
    return {}
