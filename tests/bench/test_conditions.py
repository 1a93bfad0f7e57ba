from __future__ import annotations

from typing import Any

import pytest

from portcall.bench.conditions import RULES, Conditions, condition_warnings
from portcall.targets.agent import fingerprint

MACHINE = {
    "logical_cpus": 4, "usable_cpus": 4, "cpu_quota_cores": None, "architecture": "x86_64",
    "cpu_flags": ["avx2", "avx512_vnni"],
}  # fmt: skip
QUIET = {
    "busy_s": 5.0, "own_cpu_s": 5.0, "steal_s": 0.0, "total_s": 40.0, "involuntary_switches": 3,
    "pressure_s": 0.01, "throttled_s": 0.0, "thermal_throttles": 0,
}  # fmt: skip


def conditions(
    machine: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    counters: dict[str, Any] | None = None,
    precision: str = "fp32",
    backend: str = "onnxruntime",
    threads: int = 1,
) -> Conditions:
    """Ten quiet seconds, but for what is given: states made by hand."""
    before = {
        "time": "2026-01-01T00:00:00+00:00",
        "cpu_mhz": {"median": 2000.0},
        "temperatures_c": {"cpu": 50.0},
        "counters": dict.fromkeys(QUIET, 0.0),
    }
    end = {
        **before,
        "time": "2026-01-01T00:00:10+00:00",
        "counters": {**QUIET, **(counters or {})},
        **(after or {}),
    }
    environment = {"machine": {**MACHINE, **(machine or {})}, "state": {"before": before, "after": end}}
    return Conditions(environment, backend, precision, threads)


def test_a_quiet_run_has_no_warning() -> None:
    assert condition_warnings([conditions(), conditions(precision="int8", threads=4)]) == []


SEEN: dict[str, tuple[dict[str, Any], str]] = {
    "steal": ({"counters": {"steal_s": 2.0}}, "noisy neighbour: the hypervisor gave 5%"),
    "others": ({"counters": {"busy_s": 15.0}}, "other processes used 25%"),
    "switches": ({"counters": {"involuntary_switches": 500}}, "taken off its CPU 50 times a second"),
    "pressure": ({"counters": {"pressure_s": 4.0}}, "waited for a CPU in 40% of the time"),
    "quota": ({"counters": {"throttled_s": 1.5}}, "CPU quota stopped it for 15.0%"),
    "throttled": ({"counters": {"thermal_throttles": 12}}, "throttled itself 12 times"),
    "frequency": ({"after": {"cpu_mhz": {"median": 1500.0}}}, "clock moved by 25%"),
    "heat": ({"after": {"temperatures_c": {"cpu": 97.0}}}, "shows 97 degrees"),
    "threads": ({"threads": 6}, "2 more threads than CPUs"),
    "quota_threads": (
        {"threads": 4, "machine": {"cpu_quota_cores": 1.5}},
        "2.5 more threads than the CPU quota",
    ),
    "slow_int8": ({"precision": "int8", "machine": {"cpu_flags": ["avx2"]}}, "int8 on a CPU without"),
}


def test_every_rule_has_a_case() -> None:
    assert set(SEEN) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", list(SEEN))
def test_each_rule_alone_says_what_was_seen_and_what_to_do(name: str) -> None:
    given, words = SEEN[name]
    [warning] = condition_warnings([conditions(**given)])
    [rule] = [r for r in RULES if r.name == name]
    assert words in warning
    assert warning.endswith(f": {rule.advice}")


def test_the_worst_of_some_processes_is_told_with_their_number() -> None:
    given = [conditions(counters={"steal_s": s}) for s in (0.0, 2.0, 8.0)]
    [warning] = condition_warnings(given)
    assert "20%" in warning and "(in 2 of 3 processes)" in warning


@pytest.mark.parametrize(
    ("architecture", "flags", "backend", "precision", "warned"),
    [
        ("aarch64", ["asimd"], "tflite", "int8", True),
        ("arm64", ["asimd", "asimddp"], "tflite", "int8", False),
        ("x86_64", ["avx2"], "openvino", "int8-dynamic", True),
        ("x86_64", ["avx2"], "openvino", "int8-weights", False),
        ("x86_64", ["avx2", "avx_vnni"], "openvino", "int8", False),
        ("x86_64", ["avx2"], "tensorrt", "int8", False),
        ("x86_64", None, "tflite", "int8", False),
        ("riscv64", ["v"], "tflite", "int8", False),
    ],
)
def test_int8_needs_dot_products_only_where_the_cpu_computes_it(
    architecture: str, flags: list[str] | None, backend: str, precision: str, warned: bool
) -> None:
    machine = {"architecture": architecture, "cpu_flags": flags}
    found = condition_warnings([conditions(machine=machine, backend=backend, precision=precision)])
    assert bool(found) is warned


def test_what_a_system_does_not_tell_triggers_nothing() -> None:
    unknown = dict.fromkeys(QUIET)
    machine = dict.fromkeys(MACHINE)
    states = {"cpu_mhz": None, "temperatures_c": None}
    assert condition_warnings([conditions(machine, states, unknown, precision="int8", threads=99)]) == []


def test_the_real_state_of_this_machine_can_be_judged() -> None:
    before = fingerprint.state()
    after = fingerprint.state()
    environment = {"machine": fingerprint.machine(), "state": {"before": before, "after": after}}
    given = Conditions(environment, "onnxruntime", "fp32", threads=4096)
    for rule in RULES:
        value = rule.value(given)
        assert value is None or value >= 0 or rule.name.endswith("threads")
    cpus = fingerprint.machine()["usable_cpus"]
    if cpus is not None:
        assert any(f"{4096 - cpus} more threads" in w for w in condition_warnings([given]))
