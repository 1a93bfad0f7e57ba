"""Warnings about the conditions of a measurement, as one table of rules: what was seen, and what to do about it.

A rule looks at one process: its machine, the state before and after (with cumulative counters), the workload. What a
system does not tell triggers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

CPU_BACKENDS = ("executorch", "onnxruntime", "openvino", "tflite")
"""Backends whose integer kernels run on this machine's CPU."""

INT8_FLAGS = {
    "x86_64": {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"},
    "AMD64": {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"},
    "aarch64": {"asimddp", "i8mm"},
    "arm64": {"asimddp", "i8mm"},
}
"""By ``platform.machine()``: instructions that multiply and add int8, one of which makes int8 fast."""

GIVEN = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What one process was measured under. environment: "machine" and "state" with "before" and "after"."""

    environment: GIVEN
    backend: str
    precision: str
    threads: int

    @property
    def machine(self) -> GIVEN:
        machine: GIVEN = self.environment["machine"]
        return machine

    def state(self, when: str, key: str) -> Any:
        return self.environment["state"][when].get(key)

    def gained(self, key: str) -> float | None:
        """Return by how much a cumulative counter grew; None where it is not told."""
        before, after = ((self.state(when, "counters") or {}).get(key) for when in ("before", "after"))
        return None if before is None or after is None else float(after - before)

    @property
    def seconds(self) -> float:
        before, after = (datetime.fromisoformat(self.state(when, "time")) for when in ("before", "after"))
        return max((after - before).total_seconds(), 1e-3)


@dataclass(frozen=True, slots=True)
class Rule:
    """value: of one process, None for unknown. limit: seen if the value is above. sentence: with the value in {}."""

    name: str
    value: Callable[[Conditions], float | None]
    limit: float
    sentence: str
    advice: str


def _per_second(key: str) -> Callable[[Conditions], float | None]:
    def value(c: Conditions) -> float | None:
        gained = c.gained(key)
        return None if gained is None else gained / c.seconds

    return value


def _steal(c: Conditions) -> float | None:
    steal, total = c.gained("steal_s"), c.gained("total_s")
    return None if steal is None or not total else steal / total


def _others(c: Conditions) -> float | None:
    """Return cores that others kept busy, as a share of the machine's."""
    busy, own, cpus = c.gained("busy_s"), c.gained("own_cpu_s"), c.machine.get("logical_cpus")
    return None if busy is None or own is None or not cpus else max(0.0, busy - own) / c.seconds / cpus


def _frequency(c: Conditions) -> float | None:
    before, after = (c.state(when, "cpu_mhz") for when in ("before", "after"))
    return abs(after["median"] / before["median"] - 1) if before and after else None


def _hottest(c: Conditions) -> float | None:
    found = c.state("after", "temperatures_c")
    return max(found.values()) if found else None


def _threads_over(key: str) -> Callable[[Conditions], float | None]:
    def value(c: Conditions) -> float | None:
        available = c.machine.get(key)
        return None if not available else c.threads - available

    return value


def _slow_int8(c: Conditions) -> float | None:
    """Return 1 where int8 runs on a CPU that has no instructions for it."""
    wanted, flags = INT8_FLAGS.get(c.machine.get("architecture") or ""), c.machine.get("cpu_flags")
    if wanted is None or flags is None or c.backend not in CPU_BACKENDS or not c.precision.startswith("int8"):
        return None
    return float(c.precision != "int8-weights" and not wanted & set(flags))


RULES: tuple[Rule, ...] = (
    Rule(
        "steal", _steal, 0.01,
        "a noisy neighbour: the hypervisor gave {:.0%} of the CPU time to other machines",
        "measure on a dedicated host or at a quieter hour, or with more --processes",
    ),
    Rule(
        "others", _others, 0.05,
        "other processes used {:.0%} of this machine's CPU time meanwhile",
        "end them, or measure with more --processes",
    ),
    Rule(
        "switches", _per_second("involuntary_switches"), 20.0,
        "the process was taken off its CPU {:.0f} times a second",
        "end what competes with it, use fewer --threads, or pin it to a free core",
    ),
    Rule(
        "pressure", _per_second("pressure_s"), 0.1,
        "some task waited for a CPU in {:.0%} of the time (PSI)",
        "end what competes with it, or use fewer --threads",
    ),
    Rule(
        "quota", _per_second("throttled_s"), 0.0,
        "the container's CPU quota stopped it for {:.1%} of the time",
        "raise the quota (docker --cpus, cpu.max), or use fewer --threads",
    ),
    Rule(
        "throttled", lambda c: c.gained("thermal_throttles"), 0.0,
        "the CPU throttled itself {:.0f} times because of heat",
        "let it cool down, and improve cooling or lower the clock",
    ),
    Rule(
        "frequency", _frequency, 0.05,
        "the CPU's clock moved by {:.0%} between start and end",
        "fix it: governor performance and boost off (cpupower frequency-set -g performance), or warm up longer",
    ),
    Rule(
        "heat", _hottest, 90.0,
        "the hottest sensor shows {:.0f} degrees C",
        "let it cool down between runs: it may throttle",
    ),
    Rule(
        "threads", _threads_over("usable_cpus"), 0.0,
        "{:.0f} more threads than CPUs that it may run on",
        "use fewer --threads, or a wider affinity",
    ),
    Rule(
        "quota_threads", _threads_over("cpu_quota_cores"), 0.0,
        "{:.1f} more threads than the CPU quota has cores",
        "use fewer --threads, or raise the quota",
    ),
    Rule(
        "slow_int8", _slow_int8, 0.0,
        "int8 on a CPU without int8 dot products (VNNI or AMX; Arm: dotprod)",
        "compare with fp32 here before you ship int8: it can be slower",
    ),
)  # fmt: skip


def condition_warnings(processes: Sequence[Conditions]) -> list[str]:
    """Return a sentence for every rule that some process meets: the worst value, in how many processes, what to do."""
    found = []
    for rule in RULES:
        values = [rule.value(c) for c in processes]
        seen = [v for v in values if v is not None and v > rule.limit]
        if seen:
            where = "" if len(seen) == len(processes) else f" (in {len(seen)} of {len(processes)} processes)"
            found.append(f"{rule.sentence.format(max(seen))}{where}: {rule.advice}")
    return found
