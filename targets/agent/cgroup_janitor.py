"""Removes the memory cgroups of a search once the search has ended, however it ended.

Run by path as ``INTERPRETER -I cgroup_janitor.py FOLDER PREFIX`` in a session of its own, so that a kill of the
search's process group does not reach it. It blocks until its standard input ends, which happens when the search closes
the pipe or dies. Imports nothing beyond the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

PATIENCE_S = 10.0


def sweep(folder: str, prefix: str, kill: bool = True) -> None:
    """Remove the cgroups *prefix*... in *folder*; with *kill* end the processes in them first.

    A cgroup can be removed only once its processes are reaped, so that this tries again for a while. Never raises.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        left = [name for name in _names(folder) if name.startswith(prefix)]
        for name in left:
            path = os.path.join(folder, name)
            if kill:
                _kill(path)
            try:
                os.rmdir(path)
            except OSError:
                continue
        if not kill or not any(name.startswith(prefix) for name in _names(folder)):
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _kill(path: str) -> None:
    try:
        with open(os.path.join(path, "cgroup.procs")) as stream:
            pids = [int(line) for line in stream]
    except (OSError, ValueError):
        return
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def main(folder: str, prefix: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        pass
    sweep(folder, prefix)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
