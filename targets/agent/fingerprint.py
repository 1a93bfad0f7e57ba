"""What a measurement was taken on: the machine, its software stack, and its state at that moment.

Two measurements compare only if their machines have the same ``identity``. The stack may differ: the
difference is then printed. The state is volatile and explains outliers. Each part is one JSON-able dict; what
a system does not tell is None, with the reason under its key in ``absent``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

import numpy as np

from portcall.targets.agent.cgroups import own_folders, read
from portcall.targets.agent.counters import counters

_ROOT = Path("/")
_CPUS = "sys/devices/system/cpu"

# Features that kernels for int8, fp16 and bf16 are chosen by, as Linux names them.
_FLAG_NAMES = """
    ssse3 sse4_1 sse4_2 avx f16c fma avx2 avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ifma avx_ne_convert avx10
    avx512f avx512bw avx512dq avx512vl avx512_vnni avx512vbmi avx512_bf16 avx512_fp16
    amx_tile amx_int8 amx_bf16 amx_fp16
    neon vfpv4 asimd asimdhp asimddp asimdfhm fphp i8mm bf16 sve sve2 svei8mm svebf16 sme sme2
"""
_FLAGS = frozenset(_FLAG_NAMES.split())
_MACOS_FLAGS = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.avx512vl": "avx512vl",
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.arm.FEAT_SME2": "sme2",
}

# Arm's /proc/cpuinfo tells numbers only. These of Arm Ltd. (0x41) agree with util-linux,
# sys-utils/lscpu-arm.c, commit 01e2697a.
_ARM_PARTS = {
    0xC07: "Cortex-A7", 0xC08: "Cortex-A8", 0xC09: "Cortex-A9", 0xC0F: "Cortex-A15", 0xD03: "Cortex-A53",
    0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510",
    0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2",
}  # fmt: skip

_VARIABLES = re.compile(
    r"(OMP|GOMP|KMP|MKL|OPENBLAS|GOTO|BLIS|VECLIB|NUMEXPR|TBB|DNNL|ONEDNN|ORT|ONNXRUNTIME|OV|OPENVINO|TF|TFLITE|"
    r"LITERT|TORCH|CUDA|NVIDIA|TRT|MALLOC|PYTHON|DYLD)_.*|XNNPACK.*|LD_PRELOAD|LD_LIBRARY_PATH|GLIBC_TUNABLES|"
    r"PYTHON(PATH|HOME|MALLOC|HASHSEED|OPTIMIZE|DEVMODE)"
)
# Results are stored and shared. TF_VAR_, TF_CLI_ and TF_HTTP_ are Terraform's.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|KEY|TF_VAR_|TF_CLI_|TF_HTTP_")


def machine(root: Path = _ROOT) -> Dict[str, Any]:
    """Return what must match before two measurements are compared.

    memory_bytes is rounded up to an eighth of its power of two: a kernel update changes the exact figure (see
    ``state``) by some MB. cpu_quota_cores and memory_limit_bytes are the tightest of this process's cgroups
    (v1 or v2) and their parents. usable_cpu_model: cpu_model of the CPUs that this process may run on (on
    big.LITTLE their number alone does not tell). root: where /proc and /sys are found.
    """
    facts = _Facts()
    if platform.system() == "Darwin":
        _macos_cpu(facts)
    else:
        _linux_cpu(facts, root)
    facts.put("architecture", platform.machine() or None, "Python does not know it")
    facts.put("logical_cpus", _online_cpus(), "the system does not tell")
    affinity = _affinity()
    facts.put("usable_cpus", None if affinity is None else len(affinity), "this system has no CPU affinity")
    facts.put("board", _board(root), "no device tree and no DMI product name")
    quota, limit = _container_limits(root)
    facts.put("cpu_quota_cores", quota, "no cgroup limits it")
    facts.put("memory_limit_bytes", limit, "no cgroup limits it")
    facts.put("governor", _distinct(root, "cpufreq/scaling_governor"), "no cpufreq in /sys")
    facts.put("max_frequency_khz", _distinct(root, "cpufreq/cpuinfo_max_freq"), "no cpufreq in /sys")
    facts.put("gpus", _gpus(root), "no NVIDIA driver in /proc")
    facts.put("smt", _switch(root, "smt/active"), "no smt/active in /sys")
    boost, no_turbo = _switch(root, "cpufreq/boost"), _switch(root, "intel_pstate/no_turbo")
    if boost is None and no_turbo is not None:
        boost = not no_turbo
    facts.put("boost", boost, "neither cpufreq/boost nor intel_pstate/no_turbo in /sys")
    return facts.to_json()


def stack(root: Path = _ROOT) -> Dict[str, Any]:
    """Return the software that may differ between two measurements: versions, kernel, environment variables.

    environment_variables: those that change results or speed (threads, allocator, runtime options, preloads);
    names that look like a secret are left out.
    """
    facts = _Facts()
    facts.put("python", platform.python_version())
    facts.put("python_implementation", platform.python_implementation())
    facts.put("numpy", np.__version__)
    facts.put("os", _os_name(root), "no /etc/os-release")
    facts.put("kernel", f"{platform.system()} {platform.release()}")
    facts.put("libc", _libc(), "neither confstr nor the interpreter's file tells it")
    driver = re.search(r"Kernel Module\D+([\d.]+)", read(root, "proc/driver/nvidia/version") or "")
    facts.put("gpu_driver", driver.group(1) if driver else None, "no NVIDIA driver in /proc")
    facts.put("microcode", _first(_cpuinfo(root), "microcode"), "not in /proc/cpuinfo")
    huge = re.search(r"\[(\w+)\]", read(root, "sys/kernel/mm/transparent_hugepage/enabled") or "")
    facts.put("transparent_hugepage", huge.group(1) if huge else None, "not in /sys")
    chosen = {
        k: v
        for k, v in sorted(os.environ.items())
        if _VARIABLES.fullmatch(k) and not _SECRET.search(k.upper())
    }
    facts.put("environment_variables", chosen)
    return facts.to_json()


def state(root: Path = _ROOT) -> Dict[str, Any]:
    """Return what changes from moment to moment: load, clock, temperatures, free memory, UTC time, ``counters``."""
    facts = _Facts()
    facts.put("time", datetime.now(timezone.utc).isoformat())
    try:
        load: Optional[List[float]] = list(os.getloadavg())
    except OSError:
        load = None
    facts.put("load_average", load, "the system does not tell")
    frequencies, method = _frequencies(root)
    facts.put("cpu_mhz", frequencies, "neither cpufreq nor /proc/cpuinfo tells it")
    facts.put("cpu_mhz_method", method, "neither cpufreq nor /proc/cpuinfo tells it")
    facts.put("temperatures_c", _temperatures(root) or None, "no thermal zone can be read")
    memory = _meminfo(root)
    for key, name in (
        ("memory_total_bytes", "MemTotal"), ("memory_available_bytes", "MemAvailable"),
        ("swap_free_bytes", "SwapFree"),
    ):  # fmt: skip
        facts.put(key, memory.get(name), f"no {name} in /proc/meminfo")
    facts.put("counters", counters(root))
    return facts.to_json()


def identity(machine: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of a ``machine()``; the reasons in "absent" do not count."""
    facts = {key: value for key, value in machine.items() if key != "absent"}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Facts:
    """Values by key, and the reason for each that is None."""

    def __init__(self) -> None:
        self._values: Dict[str, Any] = {}
        self._absent: Dict[str, str] = {}

    def put(self, key: str, value: Any, reason: str = "") -> None:
        self._values[key] = value
        if value is None:
            self._absent[key] = reason

    def to_json(self) -> Dict[str, Any]:
        return {**self._values, "absent": self._absent}


def _linux_cpu(facts: _Facts, root: Path) -> None:
    cpus = _cpuinfo(root)
    affinity = _affinity()
    usable = [c for c in cpus if affinity is None or c.get("processor") in {str(i) for i in affinity}]
    reason = "not in /proc/cpuinfo"
    facts.put("cpu_model", _model(cpus), reason)
    facts.put("usable_cpu_model", _model(usable), reason)
    flags = [_words(c, "flags", "Features") for c in cpus]
    facts.put("cpu_flags", sorted(_FLAGS & flags[0].intersection(*flags)) if any(flags) else None, reason)
    # Only x86 tells a guest so, by this flag.
    facts.put("hypervisor", "hypervisor" in flags[0] if any("fpu" in f for f in flags) else None, "x86 only")
    total = _meminfo(root).get("MemTotal")
    facts.put("memory_bytes", None if total is None else _rounded(total), "no MemTotal in /proc/meminfo")


def _macos_cpu(facts: _Facts) -> None:
    values = _sysctl("machdep.cpu.brand_string", "hw.memsize", "hw.optional", "kern.hv_vmm_present")
    reason = "sysctl does not tell"
    model = values.get("machdep.cpu.brand_string")
    facts.put("cpu_model", model, reason)
    facts.put("usable_cpu_model", model, reason)
    flags = sorted(flag for key, flag in _MACOS_FLAGS.items() if values.get(key) == "1")
    facts.put("cpu_flags", flags if values else None, reason)
    guest = values.get("kern.hv_vmm_present")
    facts.put("hypervisor", None if guest is None else guest == "1", reason)
    size = values.get("hw.memsize", "")
    facts.put("memory_bytes", _rounded(int(size)) if size.isdigit() else None, reason)


def _sysctl(*names: str) -> Dict[str, str]:
    try:
        answer = subprocess.run(  # a name that this version lacks makes it fail, yet it prints the others
            ["sysctl", *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition(": ") for line in answer.stdout.decode(errors="replace").splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _cpuinfo(root: Path) -> List[Dict[str, str]]:
    """Return the blocks of /proc/cpuinfo that describe a processor (Arm adds one on the board)."""
    blocks = []
    for text in (read(root, "proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.partition(":") for line in text.splitlines())
        block = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in block:
            blocks.append(block)
    return blocks


def _model(cpus: List[Dict[str, str]]) -> Optional[str]:
    """Return the distinct models, most significant facts first, or None."""
    names: Set[str] = set()
    for cpu in cpus:
        if "CPU part" in cpu:
            names.add(_arm_model(cpu))
        elif "model name" in cpu:  # a hypervisor may say no more than "AMD EPYC": the numbers tell which
            numbers = " ".join(f"{k} {cpu[k]}" for k in ("cpu family", "model", "stepping") if k in cpu)
            names.add(f"{cpu['model name']} ({numbers})" if numbers else cpu["model name"])
        elif "uarch" in cpu or "isa" in cpu:  # RISC-V
            names.add(" ".join(cpu[k] for k in ("uarch", "isa") if k in cpu))
    return " + ".join(sorted(names)) or None


def _arm_model(cpu: Dict[str, str]) -> str:
    maker, part = cpu.get("CPU implementer", "?"), cpu["CPU part"]
    name = _ARM_PARTS.get(_hex(part)) if _hex(maker) == 0x41 else None
    revision = f"r{_hex(cpu.get('CPU variant', '0'))}p{cpu.get('CPU revision', '?')}"
    return f"{name or f'implementer {maker} part {part}'} {revision}"


def _hex(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return -1


def _words(cpu: Dict[str, str], *keys: str) -> Set[str]:
    return {word for key in keys for word in cpu.get(key, "").split()}


def _first(cpus: List[Dict[str, str]], key: str) -> Optional[str]:
    return cpus[0].get(key) if cpus else None


def _affinity() -> Optional[Set[int]]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _online_cpus() -> Optional[int]:
    # os.cpu_count() can be overridden (PYTHON_CPU_COUNT, Python 3.13).
    try:
        return os.sysconf("SC_NPROCESSORS_ONLN")
    except (AttributeError, ValueError, OSError):
        return os.cpu_count()


def _rounded(size: int) -> int:
    step = max(1, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def _meminfo(root: Path) -> Dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB", read(root, "proc/meminfo") or "", re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in found}


def _board(root: Path) -> Optional[str]:
    text = read(root, "proc/device-tree/model") or read(root, "sys/class/dmi/id/product_name")
    return text.strip("\0 \n") or None if text else None


def _gpus(root: Path) -> Optional[List[str]]:
    """Return the models of the NVIDIA GPUs, as the driver's /proc files name them."""
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    found = [re.search(r"^Model:\s*(.+)$", read(file.parent, file.name) or "", re.M) for file in files]
    return [match.group(1).strip() for match in found if match] or None


def _switch(root: Path, name: str) -> Optional[bool]:
    return {"0": False, "1": True}.get(read(root, f"{_CPUS}/{name}") or "")


def _distinct(root: Path, name: str) -> Optional[str]:
    """Return the distinct values of a file that each CPU has, joined by commas."""
    found = {read(cpu, name) for cpu in (root / _CPUS).glob("cpu[0-9]*")}
    return ",".join(sorted(v for v in found if v)) or None


def _frequencies(root: Path) -> Tuple[Optional[Dict[str, float]], Optional[str]]:
    values, method = [], "scaling_cur_freq"
    for cpu in (root / _CPUS).glob("cpu[0-9]*"):
        khz = read(cpu, "cpufreq/scaling_cur_freq") or ""
        if khz.isdigit():
            values.append(int(khz) / 1000)
    if not values:
        method = "/proc/cpuinfo"
        values = [float(c["cpu MHz"]) for c in _cpuinfo(root) if c.get("cpu MHz")]
    if not values:
        return None, None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}, method


def _temperatures(root: Path) -> Dict[str, float]:
    """Return degrees Celsius by the zone's type; of several zones of one type, the hottest."""
    hottest: Dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, value = read(zone, "type"), read(zone, "temp")
        if name and value and value.lstrip("-").isdigit():
            hottest[name] = max(hottest.get(name, -1e3), int(value) / 1000)
    return hottest


def _os_name(root: Path) -> Optional[str]:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read(root, "etc/os-release") or "", re.MULTILINE)
    return found.group(1) if found else None


def _libc() -> Optional[str]:
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        text = None
    return text or " ".join(platform.libc_ver(sys.executable)).strip() or None


def _container_limits(root: Path) -> Tuple[Optional[float], Optional[int]]:
    """Return the tightest CPU quota in cores and memory limit in bytes over this process's cgroups."""
    quotas, limits = [], []
    for folder in own_folders(root, ""):
        quotas.append(_quota(*((read(folder, "cpu.max") or "").split() or ["max"])))
        limits.append(_number(read(folder, "memory.max")))
    for folder in own_folders(root, "cpu"):
        quotas.append(
            _quota(read(folder, "cpu.cfs_quota_us") or "max", read(folder, "cpu.cfs_period_us") or "100000")
        )
    for folder in own_folders(root, "memory"):
        limits.append(_number(read(folder, "memory.limit_in_bytes")))
    real = [v for v in limits if v is not None and v < 1 << 62]  # v1 says "no limit" with about 2^63
    return min((q for q in quotas if q is not None), default=None), min(real, default=None)


def _quota(quota: str, period: str = "100000") -> Optional[float]:
    allowed, every = _number(quota), _number(period)
    return allowed / every if allowed and every else None


def _number(text: Optional[str]) -> Optional[int]:
    """Return a non-negative integer; None for "max", "-1" and what is absent."""
    return int(text) if text and text.isdigit() else None
