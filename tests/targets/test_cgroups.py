"""Memory cgroups: real ones where this process may make them, and the rules for choosing a place on made trees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from portcall.targets.agent.cgroups import Group, Groups, Place, find_place, own_folders
from portcall.targets.agent.errors import UnavailableError

MB = 1 << 20
TOUCH = "block = bytearray(%d << 20); block[::4096] = b'x' * len(block[::4096]); print('held')"


@pytest.fixture
def place() -> Place:
    try:
        return find_place()
    except UnavailableError as error:
        pytest.skip(str(error))


def left(place: Place) -> list[str]:
    return [p.name for p in place.folder.glob(f"portcall-{os.getpid()}-*")]


def run_in(group: Group, megabytes: int) -> int:
    command = group.command([sys.executable, "-I", "-S", "-c", TOUCH % megabytes])
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def test_a_limit_kills_what_needs_more_and_only_that(place: Place) -> None:
    with Groups(place) as groups:
        with groups.make(100 * MB) as group:
            assert run_in(group, 20) == 0
            peak = group.peak_bytes()
            assert peak is None or 20 * MB < peak < 60 * MB
            assert group.oom_kills() in (0, None)
        with groups.make(40 * MB) as group:
            assert run_in(group, 200) == -9
            assert group.oom_kills() in (1, None)
            peak = group.peak_bytes()
            assert peak is None or peak <= 40 * MB
        with groups.make(None) as group:
            assert run_in(group, 60) == 0
    assert left(place) == []


def test_a_group_is_removed_although_something_runs_in_it(place: Place) -> None:
    with Groups(place) as groups, groups.make(100 * MB) as group:
        command = group.command([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        process = subprocess.Popen(command)
        while not (group.folder / "cgroup.procs").read_text().strip():
            assert process.poll() is None
    assert left(place) == []
    assert process.wait(10) == -9


def test_what_a_dead_process_left_is_removed_at_the_next_start(place: Place) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = place.folder / f"portcall-{ended.pid}-0000"
    mine = place.folder / f"portcall-{os.getpid()}-kept"
    for folder in (stale, mine):
        folder.mkdir()
    try:
        with Groups(place):
            assert not stale.exists()
            assert mine.exists(), "its process lives: it is in use"
    finally:
        if mine.exists():
            mine.rmdir()


def plant(root: Path, own: str, mount: str, files: dict[str, str]) -> Path:
    """A tree as a process sees it whose cgroup is *own*. Made by hand: nothing in it limits anything."""
    for name, text in {"proc/self/cgroup": own, "proc/self/mountinfo": mount, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2_MOUNT = "30 25 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"


def test_version_2_without_the_controller_says_how_to_get_it(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cgroup.controllers": "cpu io", "sys/fs/cgroup/app/cgroup.controllers": "cpu"}
    with pytest.raises(UnavailableError, match="offers no memory controller") as caught:
        find_place(plant(tmp_path, "0::/app\n", V2_MOUNT, files))
    assert "cgroup_enable=memory" in caught.value.fix


def test_a_real_version_2_mount_without_the_controller_is_refused(tmp_path: Path) -> None:
    """The kernel's own files, reached through a made mountinfo: a hybrid system keeps memory in version 1."""
    mounts = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if " - cgroup2 " in line
    ]
    if not mounts or "memory" in Path(mounts[0], "cgroup.controllers").read_text():
        pytest.skip("no cgroup2 mount without the memory controller: boot a hybrid system")
    (tmp_path / "sys/fs").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").symlink_to(mounts[0])
    with pytest.raises(UnavailableError, match="offers no memory controller"):
        find_place(plant(tmp_path, "0::/\n", V2_MOUNT, {}))


def test_version_2_without_delegation_says_how_to_try_by_hand(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cgroup.controllers": "memory", "sys/fs/cgroup/cgroup.subtree_control": "cpu"}
    with pytest.raises(UnavailableError, match="hands the memory controller on") as caught:
        find_place(plant(tmp_path, "0::/\n", V2_MOUNT, files))
    assert "systemd-run --user --scope -p MemoryMax=" in caught.value.fix


def test_version_2_refuses_what_it_may_not_write(tmp_path: Path) -> None:
    """A plain file stands where the kernel would make cgroup.procs: the same as no permission."""
    root = plant(
        tmp_path, "0::/slice/scope\n", V2_MOUNT,
        {
            "sys/fs/cgroup/slice/cgroup.subtree_control": "memory pids",
            "sys/fs/cgroup/slice/cgroup.controllers": "memory pids",
            f"sys/fs/cgroup/slice/portcall-{os.getpid()}-0000": "in the way",
        },
    )  # fmt: skip
    with pytest.raises(UnavailableError, match=r"no memory cgroup can be made under .*slice: File exists"):
        find_place(root)


def test_a_container_that_hides_its_version_1_cgroup(tmp_path: Path) -> None:
    mount = "31 25 0:27 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    root = plant(tmp_path, "4:memory:/docker/abc\n", mount, {})
    with pytest.raises(UnavailableError, match="does not show its memory cgroup"):
        find_place(root)


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no cgroup is mounted here"):
        find_place(tmp_path)


def test_what_is_written_and_read_in_version_2(tmp_path: Path) -> None:
    """The file protocol on plain files: no kernel with the controller in version 2 is at hand."""
    (tmp_path / "memory.swap.max").write_text("max")
    group = Group(2, tmp_path)
    group.set_limit(64 * MB)
    assert (tmp_path / "memory.max").read_text() == str(64 * MB)
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    group.set_limit(None)
    assert (tmp_path / "memory.max").read_text() == "max"
    assert group.peak_bytes() is None and group.oom_kills() is None
    (tmp_path / "memory.peak").write_text("1234\n")
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n")
    assert (group.peak_bytes(), group.oom_kills()) == (1234, 1)


def test_own_folders_go_from_this_cgroup_up(tmp_path: Path) -> None:
    root = plant(tmp_path, "0::/a/b\n", V2_MOUNT, {})
    top = root / "sys/fs/cgroup"
    assert own_folders(root, "") == [top / "a/b", top / "a", top]
    assert own_folders(root, "memory") == []
