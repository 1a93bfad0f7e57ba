from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from portcall.targets.agent.counters import counters


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_totals_of_a_made_machine(tmp_path: Path) -> None:
    hz = os.sysconf("SC_CLK_TCK")
    stat = " ".join(str(n * hz) for n in (10, 1, 5, 100, 2, 1, 3, 7, 4, 0))
    files = {
        "proc/stat": f"cpu  {stat}\ncpu0 1 2 3\n",
        "proc/pressure/cpu": "some avg10=1.00 avg60=2.00 avg300=3.00 total=2500000\nfull avg10=0.00 total=9\n",
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/box/cpu.stat": "usage_usec 5\nnr_throttled 2\nthrottled_usec 1500000\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
        "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4\n",
    }
    found = counters(plant(tmp_path, files))
    assert (found["busy_s"], found["steal_s"], found["total_s"]) == (20.0, 7.0, 129.0)
    assert (found["pressure_s"], found["throttled_s"], found["thermal_throttles"]) == (2.5, 1.5, 7)


def test_version_1_counts_throttling_in_nanoseconds(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "3:cpu:/box\n",
        "proc/self/mountinfo": "30 25 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
        "sys/fs/cgroup/cpu/box/cpu.stat": "nr_periods 9\nnr_throttled 2\nthrottled_time 2500000000\n",
    }
    assert counters(plant(tmp_path, files))["throttled_s"] == 2.5


@pytest.mark.parametrize("root", [Path("/"), None])
def test_every_absent_counter_has_its_reason(root: Path | None, tmp_path: Path) -> None:
    found = counters(root or tmp_path)
    assert {k for k, v in found.items() if v is None} == set(found["absent"])
    assert all(found["absent"].values())
    assert found["own_cpu_s"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_real_totals_only_grow() -> None:
    before, after = counters(), counters()
    for key, value in before.items():
        if key != "absent" and value is not None:
            assert after[key] >= value, key
