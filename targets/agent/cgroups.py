"""Control groups: where this process is in them, and groups of our own that limit a child's memory.

Version 1: a child of this process's memory cgroup. Version 2: a child of the nearest of its cgroups whose
``cgroup.subtree_control`` lists "memory", and beside which this process may put one. Nothing above is changed: no
controller is enabled and no process of anybody else is moved.
Source of the files' meaning: the kernel's Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ContextManager, Iterator, List, Optional, Sequence

from portcall.targets.agent import cgroup_janitor
from portcall.targets.agent.errors import UnavailableError

_ROOT = Path("/")
_ENTER = "import os, sys; open(sys.argv[1], 'w').write('0'); os.execv(sys.argv[2], sys.argv[2:])"

FIX = (
    "Run it as root, or try one limit by hand: "
    "systemd-run --user --scope -p MemoryMax=200M -p MemorySwapMax=0 portcall bench ARTIFACT"
)


def own_folders(root: Path, controller: str) -> List[Path]:
    """Return the folders of this process's cgroup and its parents; *controller* "" means version 2."""
    own = None
    for line in (read(root, "proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controller in controllers.split(","):
            own = path
    if own is None:
        return []
    for line in (read(root, "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        mounted, mount = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if kind != ("cgroup" if controller else "cgroup2"):
            continue
        if controller and controller not in options.split(","):
            continue
        # Without a cgroup namespace a container sees the host's path but only its own part of the tree.
        inside = own[len(mounted.rstrip("/")) :] if own.startswith(mounted) else ""
        top = root / mount.lstrip("/")
        parts = [part for part in inside.split("/") if part and part != ".."]
        return [top.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
    return []


def read(root: Path, name: str) -> Optional[str]:
    """Return the stripped text of a file, or None where it cannot be read."""
    try:
        return (root / name).read_text(errors="replace").strip()
    except OSError:
        return None


@dataclass(frozen=True)
class Place:
    """Where a memory cgroup can be made: the version (1 or 2) and the folder of its parent."""

    version: int
    folder: Path


def find_place(root: Path = _ROOT) -> Place:
    """Return where this process can make a cgroup that limits memory. Raises UnavailableError with the reason."""
    own = own_folders(root, "memory")
    if own:
        if not (own[0] / "memory.limit_in_bytes").exists():
            raise UnavailableError(
                "this container does not show its memory cgroup (v1) under %s" % own[0], FIX
            )
        return _usable(Place(1, own[0]))
    folders = own_folders(root, "")
    if not folders:
        raise UnavailableError("no cgroup is mounted here (only Linux has them)", "Run it on Linux")
    if all("memory" not in (read(f, "cgroup.controllers") or "").split() for f in folders):
        raise UnavailableError(
            "cgroup v2 at %s offers no memory controller" % folders[-1],
            "Boot with cgroup_enable=memory (Raspberry Pi: in cmdline.txt), or mount the v1 memory controller",
        )
    refused: Optional[UnavailableError] = None
    for folder in folders:
        if "memory" in (read(folder, "cgroup.subtree_control") or "").split():
            try:
                return _usable(Place(2, folder))
            except UnavailableError as error:
                refused = error
    raise refused or UnavailableError(
        "no cgroup of this process hands the memory controller on to children (cgroup.subtree_control)", FIX
    )


def _usable(place: Place) -> Place:
    """Return *place* if a group can be made there and a process of ours put into it."""
    if place.folder.is_dir() and not os.access(str(place.folder), os.W_OK):
        raise UnavailableError("this user may not make a cgroup under %s" % place.folder, FIX)
    try:
        with Groups(place) as groups, groups.make(1 << 30) as group:
            command = group.command([sys.executable, "-I", "-S", "-c", ""])
            subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "strerror", None) or "a process cannot be put into it"
        raise UnavailableError(
            "no memory cgroup can be made under %s: %s" % (place.folder, said), FIX
        ) from error
    return place


@dataclass(frozen=True)
class Group:
    """One memory cgroup of ours."""

    version: int
    folder: Path

    def set_limit(self, limit_bytes: Optional[int]) -> None:
        """Limit memory to *limit_bytes* (None: not at all), without swap. Raises OSError."""
        text = "max" if self.version == 2 else "-1"
        if limit_bytes is not None:
            text = str(limit_bytes)
        if self.version == 2:
            self._write("memory.max", text)
            self._try_write("memory.swap.max", "0")
        else:
            self._write("memory.limit_in_bytes", text)
            self._try_write("memory.memsw.limit_in_bytes", text)
            self._try_write("memory.swappiness", "0")

    def command(self, command: Sequence[str]) -> List[str]:
        """Return the command that enters the group and then becomes *command* (an absolute path first)."""
        return [sys.executable, "-I", "-S", "-c", _ENTER, str(self.folder / "cgroup.procs"), *command]

    def peak_bytes(self) -> Optional[int]:
        """Return the largest usage so far, page cache included; None where it is not told (v2 before 5.19)."""
        text = read(self.folder, "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")
        return int(text) if text and text.isdigit() else None

    def oom_kills(self) -> Optional[int]:
        """Return how many processes the kernel killed here for memory; None where it does not tell (v1 before 4.13)."""
        text = read(self.folder, "memory.events" if self.version == 2 else "memory.oom_control") or ""
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return int(found.group(1)) if found else None

    def _write(self, name: str, text: str) -> None:
        with open(str(self.folder / name), "w") as stream:
            stream.write(text)

    def _try_write(self, name: str, text: str) -> None:
        """Write a file that some kernels lack: without swap there is nothing to limit."""
        with contextlib.suppress(OSError):
            if (self.folder / name).exists():
                self._write(name, text)


@contextlib.contextmanager
def _made(place: Place, name: str) -> Iterator[Group]:
    """Make a group; on the way out kill what is in it and remove it. Raises OSError."""
    folder = place.folder / name
    folder.mkdir()
    try:
        yield Group(place.version, folder)
    finally:
        cgroup_janitor.sweep(str(place.folder), name)


class Groups:
    """Makes groups in a place, one after the other, and leaves none behind: also not after Ctrl-C or kill -9.

    A janitor, in a session of its own, waits on a pipe that ends with this process. What an earlier run could not
    remove (the janitor was killed too) is removed at the start, unless its process still lives.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._numbers = place, itertools.count()
        self._prefix = "portcall-%d-" % os.getpid()

    def __enter__(self) -> Groups:
        self._sweep_stale()
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", cgroup_janitor.__file__, str(self._place.folder), self._prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        self._janitor.wait()

    def make(self, limit_bytes: Optional[int]) -> ContextManager[Group]:
        """Return a context manager of a fresh group with that limit. Raises OSError."""
        return self._limited(limit_bytes)

    @contextlib.contextmanager
    def _limited(self, limit_bytes: Optional[int]) -> Iterator[Group]:
        with _made(self._place, self._prefix + "%04d" % next(self._numbers)) as group:
            group.set_limit(limit_bytes)
            yield group

    def _sweep_stale(self) -> None:
        for path in self._place.folder.glob("portcall-*-*"):
            pid = path.name.split("-")[1]
            if pid.isdigit() and not Path("/proc", pid).exists():
                cgroup_janitor.sweep(str(self._place.folder), path.name, kill=False)
