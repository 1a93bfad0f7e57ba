"""Energy on counters made by hand: a file tree like /sys/class/powercap, a stand-in for NVML. None is real here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from portcall.targets.agent import energy
from portcall.targets.agent.energy import Counter, Meter, find, gpus, rapl, used_j
from portcall.targets.agent.energy_pass import PAIRS, metered
from portcall.targets.agent.nvml import Absent, process_memory


def plant(root: Path, zones: dict[str, tuple[str, int]], top_uj: int = 262_143_328_850) -> Path:
    for zone, (name, value) in zones.items():
        folder = root / "sys/class/powercap" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text(f"{top_uj}\n")
    return root


ZONES = {
    "intel-rapl:0": ("package-0", 1_000_000),
    "intel-rapl:0:0": ("core", 400_000),
    "intel-rapl:0:1": ("dram", 250_000),
    "intel-rapl:1": ("psys", 9_000_000),
    "intel-rapl-mmio:0": ("package-0", 1_000_000),
}


def test_packages_and_their_memory_are_counted_once(tmp_path: Path) -> None:
    found = rapl(plant(tmp_path, ZONES))
    assert isinstance(found, list)
    assert [c.name for c in found] == ["intel-rapl:0 package-0", "intel-rapl:0:1 dram"]
    assert [c.read_j() for c in found] == [1.0, 0.25]
    assert found[0].range_j == pytest.approx(262_143.32885)
    assert isinstance(find(tmp_path), list)


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    root = plant(tmp_path, {"intel-rapl:0": ("package-0", 99_000_000)}, top_uj=100_000_000)
    counters = rapl(root)
    assert isinstance(counters, list)
    meter = Meter(counters)
    meter.start()
    file = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    file.write_text("2000000")
    assert meter.poll() == pytest.approx(3.0)
    file.write_text("7000000")
    assert meter.poll() == pytest.approx(8.0)
    assert meter.joules == {"intel-rapl:0 package-0": pytest.approx(8.0)}


def test_a_counter_without_a_range_that_goes_back_was_reset() -> None:
    assert used_j(1.0, 3.5, None) == 2.5
    with pytest.raises(OSError, match=r"went back from 3 to 1 J: it was reset"):
        used_j(3.0, 1.0, None)


def test_no_counter_is_absent_with_a_reason(tmp_path: Path) -> None:
    found = find(tmp_path)
    assert isinstance(found, Absent)
    assert "no RAPL counter" in found.reason and "no NVIDIA driver" in found.reason and found.fix
    assert found.to_json()["available"] is False
    of_the_cpu = find(tmp_path, energy.kinds_of("tflite"))
    assert isinstance(of_the_cpu, Absent) and "NVIDIA" not in of_the_cpu.reason


def test_a_counter_that_only_root_may_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plant(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    real = Path.read_text

    def refused(self: Path, *args: Any, **options: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", refused)  # root may read anything: a mode would not do
    found = find(root)
    assert isinstance(found, Absent)
    assert "only root may read it" in found.reason and found.fix.startswith("Run as root")


class NvmlError(Exception):
    pass


def library(**functions: Any) -> Any:
    """A stand-in for ``pynvml`` with two GPUs."""
    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        **functions,
    )


def test_gpus_count_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    fake = library(nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1500 + handle)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    found = gpus(tmp_path)
    assert isinstance(found, list)
    assert [(c.name, c.read_j()) for c in found] == [("gpu0", 1.5), ("gpu1", 1.501)]


def test_a_gpu_that_counts_no_energy_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)

    def unsupported(handle: int) -> int:
        raise NvmlError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", library(nvmlDeviceGetTotalEnergyConsumption=unsupported))
    found = gpus(tmp_path)
    assert isinstance(found, Absent) and "counts no energy: Not Supported" in found.reason


def test_gpu_memory_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 << 20)
    others = SimpleNamespace(pid=1, usedGpuMemory=9 << 20)
    fake = library(nvmlDeviceGetComputeRunningProcesses=lambda handle: [mine, others])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert process_memory() == 2 * (3 << 20), "one entry on each of two GPUs"
    mine.usedGpuMemory = None
    assert isinstance(process_memory(), Absent)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = process_memory()
    assert isinstance(found, Absent) and "nvidia-ml-py is not installed" in found.reason


def test_joules_per_inference_with_what_idling_draws_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made machine: 2 W idle; an inference takes 10 ms and 0.05 J on top."""
    now = {"s": 0.0, "extra_j": 0.0}

    def infer() -> None:
        now["s"] += 0.01
        now["extra_j"] += 0.05

    def sleep(seconds: float) -> None:
        now["s"] += seconds

    def joules() -> float:
        return 2.0 * now["s"] + now["extra_j"]

    monkeypatch.setattr("time.perf_counter", lambda: now["s"])
    found = metered(infer, [Counter("made", "made", joules, None, 0.001)], batch=1, sleep=sleep)
    assert found["available"] is True and found["windows"] == PAIRS
    assert found["idle_watts"] == pytest.approx(2.0)
    assert found["busy_watts"] == pytest.approx(7.0)
    assert found["net_joules_per_inference"] == pytest.approx(0.05)
    assert found["joules_per_inference"] == pytest.approx(0.07)
    assert found["counters"] == {"made": pytest.approx(0.07)}
    assert found["n"] == pytest.approx(PAIRS * found["window_s"] / 0.01, abs=PAIRS)


@pytest.fixture
def answers() -> Iterator[float]:
    return iter([5.0, 1.0])


def test_a_counter_that_breaks_raises_for_the_caller(answers: Iterator[float]) -> None:
    counter = Counter("made", "made", lambda: next(answers), None, 0.001)
    meter = energy.Meter([counter])
    meter.start()
    with pytest.raises(OSError, match="reset"):
        meter.poll()
