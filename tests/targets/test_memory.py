from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from portcall.targets.agent import memory
from portcall.targets.agent.errors import UnavailableError

PLANTED = 50 * 1024 * 1024
NEAR = 1024 * 1024

PLANT = f"""
import json
from portcall.targets.agent import memory
def figures():
    return [memory.current_rss_bytes(), memory.peak_rss_bytes(), memory.pss_bytes()]
figures()
did_reset = memory.reset_peak()
before = figures()
block = b"x" * {PLANTED}
held = figures()
del block
freed = figures()
did_reset_again = memory.reset_peak()
print(json.dumps({{
    "before": before, "held": held, "freed": freed, "reset": figures(),
    "did_reset": did_reset and did_reset_again,
}}))
"""


@pytest.mark.skipif(memory.METHOD != "VmHWM", reason="this system's /proc/self/status has no VmHWM")
def test_a_planted_allocation_is_seen_within_1_mb() -> None:
    """In a fresh process: one that ran before may reuse freed pages."""
    answer = subprocess.run([sys.executable, "-c", PLANT], capture_output=True, check=True, timeout=60)
    figures = json.loads(answer.stdout)
    if not figures["did_reset"]:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    for index, name in enumerate(("current", "peak", "pss")):
        if figures["before"][index] is not None:
            assert abs(figures["held"][index] - figures["before"][index] - PLANTED) < NEAR, name
    current, peak, _ = figures["freed"]
    assert abs(current - figures["before"][0]) < NEAR
    assert abs(peak - figures["held"][1]) < NEAR
    assert abs(figures["reset"][1] - current) < NEAR


def test_the_peak_is_at_least_the_current_size_or_nearly() -> None:
    assert memory.current_rss_bytes() > NEAR
    assert memory.peak_rss_bytes() > memory.current_rss_bytes() - NEAR
    assert memory.METHOD in ("VmHWM", "ru_maxrss")


@pytest.mark.parametrize(("system", "unit"), [("Darwin", 1), ("Linux", 1024)])
def test_without_proc_the_peak_is_ru_maxrss_in_the_systems_unit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, unit: int
) -> None:
    import resource

    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "METHOD", "ru_maxrss")
    monkeypatch.setattr("platform.system", lambda: system)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert before <= memory.peak_rss_bytes() <= before + NEAR * unit
    assert memory.reset_peak() is False
    assert memory.pss_bytes() is None


def test_without_proc_the_current_size_comes_from_ps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        called.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=b"  1234\n")

    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    assert memory.current_rss_bytes() == 1234 * 1024
    assert called[0][0] == "ps"


def test_with_neither_proc_nor_ps_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*_: object, **__: object) -> None:
        raise FileNotFoundError("ps")

    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UnavailableError, match=r"no VmRSS in .* and ps failed"):
        memory.current_rss_bytes()


def test_a_reset_that_is_refused_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "METHOD", "VmHWM")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "absent")
    assert memory.reset_peak() is False


def test_an_exact_reading_and_what_the_counter_is_off_by() -> None:
    found = memory.read()
    assert found.method in ("smaps_rollup", "VmRSS", "ps")
    if found.method != "smaps_rollup":
        pytest.skip("no /proc/self/smaps_rollup here: run it on Linux 4.14 or newer")
    assert found.pss_bytes is not None and found.private_bytes is not None
    assert 0 < found.private_bytes <= found.rss_bytes
    assert 0 < found.pss_bytes <= found.rss_bytes
    assert found.counter_error_bytes is not None and abs(found.counter_error_bytes) < found.rss_bytes / 4


def test_without_smaps_the_counter_is_read_and_the_rest_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t    1000 kB\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert memory.read() == memory.Reading(1000 * 1024, None, None, None, "VmRSS")


def test_settling_gives_freed_heap_back() -> None:
    code = (
        "from portcall.targets.agent import memory\n"
        "memory.settle()\n"
        "before = memory.read().rss_bytes\n"
        "small = [b'x' * 4096 for _ in range(5000)]; pin = b'y' * 4096; del small\n"
        "can = memory.settle()\n"
        "print(int(can), memory.read().rss_bytes - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    can, grown = map(int, done.stdout.split())
    if not can:
        pytest.skip("this C library has no malloc_trim: run it with glibc")
    assert grown < 4 * NEAR
