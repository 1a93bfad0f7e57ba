from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from portcall.targets.agent import fingerprint
from portcall.targets.agent.fingerprint import identity, machine, stack, state


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def check_absent(facts: dict[str, Any]) -> None:
    """Every None, and nothing else, has a reason, and all of it survives JSON."""
    absent = facts["absent"]
    assert {key for key, value in facts.items() if value is None} == set(absent)
    assert all(absent.values())
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_this_machine_is_json_and_explains_what_is_absent() -> None:
    for facts in (machine(), stack(), state()):
        check_absent(facts)
    assert machine()["logical_cpus"] >= 1
    assert stack()["python"]


def test_nothing_to_read_is_all_absent_and_no_error(tmp_path: Path) -> None:
    for facts in (machine(tmp_path), stack(tmp_path), state(tmp_path)):
        check_absent(facts)
    assert machine(tmp_path)["cpu_flags"] is None
    assert state(tmp_path)["temperatures_c"] is None


def test_identity_is_stable_survives_json_and_ignores_the_reasons() -> None:
    facts = machine()
    assert identity(facts) == identity(machine())
    assert identity(json.loads(json.dumps(facts))) == identity(facts)
    assert identity({**facts, "absent": {}}) == identity(facts)
    assert identity(dict(reversed(facts.items()))) == identity(facts)
    assert identity({**facts, "logical_cpus": 4096}) != identity(facts)


X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C
stepping\t: 8
microcode\t: 0xffffffff
cpu MHz\t\t: 2700.0
flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 amx_bf16 hypervisor

processor\t: 1
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C
stepping\t: 8
cpu MHz\t\t: 2900.0
flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 hypervisor
"""

ARM = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd asimddp asimdhp i8mm
CPU implementer\t: 0x41
CPU variant\t: 0x0
CPU part\t: 0xd05
CPU revision\t: 0

processor\t: 1
BogoMIPS\t: 108.00
Features\t: fp asimd asimddp asimdhp i8mm bf16
CPU implementer\t: 0x41
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

Revision\t: c03111
Model\t\t: Raspberry Pi
"""


def test_x86_flags_are_those_of_every_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    facts = machine(plant(tmp_path, {"proc/cpuinfo": X86, "proc/meminfo": "MemTotal:  16221924 kB\n"}))
    assert facts["cpu_flags"] == ["amx_int8", "avx2", "avx512_vnni", "avx512f"]
    assert facts["cpu_model"] == "Intel(R) Xeon(R) Platinum 8481C (cpu family 6 model 143 stepping 8)"
    assert facts["hypervisor"] is True
    assert facts["memory_bytes"] == 16 << 30
    now = state(tmp_path)
    assert now["cpu_mhz"] == {"min": 2700.0, "median": 2800.0, "max": 2900.0}
    assert now["cpu_mhz_method"] == "/proc/cpuinfo"
    assert now["memory_total_bytes"] == 16221924 * 1024
    assert stack(tmp_path)["microcode"] == "0xffffffff"


def test_big_little_tells_which_cpus_are_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1}, raising=False)
    files = {"proc/cpuinfo": ARM, "proc/device-tree/model": "Raspberry Pi 9\0"}
    facts = machine(plant(tmp_path, files))
    assert facts["cpu_model"] == "Cortex-A55 r0p0 + Cortex-A76 r4p1"
    assert facts["usable_cpu_model"] == "Cortex-A76 r4p1"
    assert facts["usable_cpus"] == 1
    assert facts["cpu_flags"] == ["asimd", "asimddp", "asimdhp", "i8mm"]
    assert facts["hypervisor"] is None
    assert facts["board"] == "Raspberry Pi 9"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert identity(machine(tmp_path)) != identity(facts)


def test_an_unknown_arm_part_keeps_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    unknown = ARM.replace("0xd0b", "0xfff").replace("0xd05", "0xfff")
    facts = machine(plant(tmp_path, {"proc/cpuinfo": unknown}))
    assert "implementer 0x41 part 0xfff r4p1" in facts["cpu_model"]


def test_governor_clocks_and_switches(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu"
    plant(tmp_path, {
        f"{cpus}/cpu0/cpufreq/scaling_governor": "performance\n",
        f"{cpus}/cpu1/cpufreq/scaling_governor": "schedutil\n",
        f"{cpus}/cpu0/cpufreq/cpuinfo_max_freq": "1800000\n",
        f"{cpus}/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        f"{cpus}/smt/active": "1\n",
        f"{cpus}/intel_pstate/no_turbo": "1\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48250\n",
        "sys/class/thermal/thermal_zone1/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "51000\n",
    })  # fmt: skip
    facts = machine(tmp_path)
    assert facts["governor"] == "performance,schedutil"
    assert facts["max_frequency_khz"] == "1800000"
    assert facts["smt"] is True
    assert facts["boost"] is False
    now = state(tmp_path)
    assert now["cpu_mhz"] == {"min": 600.0, "median": 600.0, "max": 600.0}
    assert now["temperatures_c"] == {"cpu-thermal": 51.0}


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def test_cgroup_v2_limits_are_the_tightest_of_all_parents(tmp_path: Path) -> None:
    plant(tmp_path, {
        "proc/self/cgroup": "0::/pod/app\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/pod/app/memory.max": "1073741824\n",
        "sys/fs/cgroup/pod/memory.max": "max\n",
    })  # fmt: skip
    facts = machine(tmp_path)
    assert facts["cpu_quota_cores"] == 1.5
    assert facts["memory_limit_bytes"] == 1 << 30


@pytest.mark.parametrize("root", ["/", "/docker/abc"], ids=["host", "container without a cgroup namespace"])
def test_cgroup_v1_limits(tmp_path: Path, root: str) -> None:
    inside = "docker/abc/" if root == "/" else ""
    plant(tmp_path, {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(root=root),
        f"sys/fs/cgroup/cpu,cpuacct/{inside}cpu.cfs_quota_us": "50000\n",
        f"sys/fs/cgroup/cpu,cpuacct/{inside}cpu.cfs_period_us": "100000\n",
        f"sys/fs/cgroup/memory/{inside}memory.limit_in_bytes": "268435456\n",
    })  # fmt: skip
    facts = machine(tmp_path)
    assert facts["cpu_quota_cores"] == 0.5
    assert facts["memory_limit_bytes"] == 1 << 28


def test_cgroup_v1_without_limits_is_absent(tmp_path: Path) -> None:
    plant(tmp_path, {
        "proc/self/cgroup": "4:memory:/\n1:cpu,cpuacct:/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(root="/"),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    })  # fmt: skip
    facts = machine(tmp_path)
    assert facts["cpu_quota_cores"] is None
    assert facts["memory_limit_bytes"] is None
    assert facts["absent"]["memory_limit_bytes"] == "no cgroup limits it"


def test_the_stack_holds_variables_that_matter_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {
        "OMP_NUM_THREADS": "1", "ORT_LOG": "x", "TF_ENABLE_ONEDNN_OPTS": "0", "LD_PRELOAD": "/x.so",
        "MALLOC_ARENA_MAX": "2", "XNNPACK": "1", "PYTHONMALLOC": "malloc",
        "TF_VAR_password": "no", "TF_TOKEN_example": "no", "ORT_API_KEY": "no",
        "HOME": "/root", "PATH": "/bin",
    })  # fmt: skip
    assert list(stack()["environment_variables"]) == [
        "LD_PRELOAD", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "ORT_LOG", "PYTHONMALLOC",
        "TF_ENABLE_ONEDNN_OPTS", "XNNPACK",
    ]  # fmt: skip


def test_macos_answers_from_sysctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.memsize": str(8 << 30),
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "1",
        "hw.optional.arm.FEAT_SME": "0",
        "kern.hv_vmm_present": "0",
    }
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr(fingerprint, "_sysctl", lambda *_: answers)
    facts = machine(tmp_path)
    check_absent(facts)
    assert facts["cpu_model"] == "Apple M2"
    assert facts["cpu_flags"] == ["asimddp", "i8mm"]
    assert facts["memory_bytes"] == 8 << 30
    assert facts["hypervisor"] is False


def test_without_sysctl_macos_facts_are_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = machine(tmp_path)
    check_absent(facts)
    assert facts["cpu_model"] is None
