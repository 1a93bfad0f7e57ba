"""Memory that may still be taken, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from portcall.targets.agent.available import available_bytes

GIB = 1 << 30


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * GIB >> 10} kB\nMemAvailable: {8 * GIB >> 10} kB\n")
    return tmp_path


def test_without_cgroups_it_is_what_the_system_has(root: Path) -> None:
    assert available_bytes(root) == 8 * GIB


def test_nothing_is_told_where_there_is_no_proc(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


def test_a_version_2_limit_counts_without_what_the_kernel_can_drop(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/job\n")
    write(root, "proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    write(root, "sys/fs/cgroup/job/memory.max", str(2 * GIB))
    write(root, "sys/fs/cgroup/job/memory.current", str(3 * GIB // 2))
    write(root, "sys/fs/cgroup/job/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    assert available_bytes(root) == 3 * GIB // 2
    write(root, "sys/fs/cgroup/job/memory.max", "max")
    assert available_bytes(root) == 8 * GIB


def test_a_version_1_limit_of_a_parent_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/pod/job\n")
    write(root, "proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    for folder, limit in (("pod", 1 * GIB), ("pod/job", (1 << 63) - 4096)):
        write(root, f"sys/fs/cgroup/memory/{folder}/memory.limit_in_bytes", str(limit))
        write(root, f"sys/fs/cgroup/memory/{folder}/memory.usage_in_bytes", str(GIB // 4))
        write(root, f"sys/fs/cgroup/memory/{folder}/memory.stat", "total_inactive_file 0\n")
    assert available_bytes(root) == 3 * GIB // 4


def test_here_something_is_available() -> None:
    found = available_bytes()
    if found is None:
        pytest.skip("this system does not tell its free memory; run this on Linux")
    assert 1 << 20 < found < 1 << 50
