"""Affinity and priority, applied for real in processes of their own; what is refused goes on and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from portcall.targets.agent import settings
from portcall.targets.agent.contract import Workload
from portcall.targets.agent.errors import BadInput

LINUX = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity; run this on Linux"
)

APPLY = """
import json, os, sys, threading
{before}
from portcall.targets.agent import settings
from portcall.targets.agent.contract import Workload
from portcall.targets.agent.errors import BadInput
workload = Workload.from_json(json.loads(sys.argv[1]))
try:
    record, warnings = settings.apply(workload)
except BadInput as error:
    print(json.dumps({{"error": error.message}}))
    sys.exit()
seen = []
thread = threading.Thread(target=lambda: seen.append(sorted(os.sched_getaffinity(0))))
thread.start()
thread.join()
print(json.dumps({{"record": record, "warnings": warnings, "thread": seen[0]}}))
"""


def applied(workload: Workload, before: str = "") -> dict[str, Any]:
    """Return what a fresh process says after applying; *before*: what it does first."""
    command = [sys.executable, "-c", APPLY.format(before=before), json.dumps(workload.to_json())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@LINUX
def test_nothing_asked_for_changes_nothing() -> None:
    found = applied(Workload())
    assert found["record"] == {
        "affinity": sorted(os.sched_getaffinity(0)),
        "priority": f"nice:{os.getpriority(os.PRIO_PROCESS, 0)}",
    }
    assert found["warnings"] == []


@LINUX
def test_threads_started_later_inherit_the_affinity() -> None:
    cpu = max(os.sched_getaffinity(0))
    found = applied(Workload(affinity=(cpu,)))
    assert found["record"]["affinity"] == found["thread"] == [cpu]
    assert found["warnings"] == []


@LINUX
def test_more_threads_than_cpus_are_told() -> None:
    cpu = min(os.sched_getaffinity(0))
    [warning] = applied(Workload(affinity=(cpu,), threads=3))["warnings"]
    assert warning.startswith(f"3 threads on 1 CPUs ({cpu})") and "--threads 1" in warning


@LINUX
def test_a_cpu_that_does_not_exist_is_bad_input() -> None:
    error = applied(Workload(affinity=(4000,)))["error"]
    assert error.startswith("--affinity 4000: this machine has the CPUs 0-")


@LINUX
def test_a_larger_nice_value_needs_no_permission() -> None:
    found = applied(Workload(priority="nice:19"))
    assert (found["record"]["priority"], found["warnings"]) == ("nice:19", [])


DROP = "os.setgid(65534); os.setuid(65534)"


@LINUX
def test_a_priority_without_permission_goes_on_and_says_so() -> None:
    """As nobody, and with no real-time limit."""
    if os.geteuid() != 0:
        before = ""
    else:
        before = "import resource; resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))\n"
        before += (
            "resource.setrlimit(resource.RLIMIT_NICE, (0, 0)); import portcall.targets.agent.settings\n"
            + DROP
        )
    found = applied(Workload(priority="nice:-20"), before)
    [warning] = found["warnings"]
    assert warning.startswith("--priority nice:-20 was refused (") and "CAP_SYS_NICE" in warning
    assert found["record"]["priority"] == f"nice:{os.getpriority(os.PRIO_PROCESS, 0)}"
    [warning] = applied(Workload(priority="fifo:5"), before)["warnings"]
    assert warning.startswith("--priority fifo:5 was refused (") and "rtprio" in warning


@LINUX
def test_real_time_priority_where_it_is_permitted() -> None:
    found = applied(Workload(priority="fifo:1"))
    if found["record"]["priority"] != "fifo:1":
        pytest.skip("real-time scheduling is not permitted here; run this as root")
    throttled = settings._throttled_ms()
    assert len(found["warnings"]) == (throttled is not None)
    assert all("sched_rt_runtime_us" in w for w in found["warnings"])


def test_a_system_without_affinity_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_setaffinity", "sched_getaffinity", "sched_setscheduler", "sched_getscheduler"):
        monkeypatch.delattr(os, name, raising=False)
    record, warnings = settings.apply(Workload(affinity=(0,), priority="fifo:1"))
    assert record["affinity"] is None
    assert "this system has no CPU affinity" in warnings[0]
    assert "this system has no real-time scheduling" in warnings[1]


@pytest.mark.parametrize(
    "text", ["", "nice", "nice:20", "nice:-21", "fifo:0", "fifo:100", "fifo:-1", "rr:1", "nice:1.5"]
)
def test_what_is_no_priority(text: str) -> None:
    with pytest.raises(BadInput, match="is no priority"):
        settings.parse_priority(text)


def test_priorities() -> None:
    assert settings.parse_priority("nice:-20") == ("nice", -20)
    assert settings.parse_priority("fifo:99") == ("fifo", 99)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"min_count": 0}, "min_count is 0"),
        ({"min_time_s": float("nan")}, "min_time_s is nan"),
        ({"warmup_s": -1.0}, "warmup_s is -1.0"),
        ({"max_time_s": 0.0}, "a budget above 0 is needed"),
        ({"max_time_s": float("inf")}, "max_time_s is inf"),
        ({"ci_width": 0.0}, "width above 0 is needed"),
        ({"affinity": ()}, "names no CPU"),
        ({"affinity": (-1,)}, "names no CPU"),
        ({"priority": "high"}, "is no priority"),
    ],
)
def test_a_workload_that_cannot_be(change: dict[str, Any], part: str) -> None:
    settings.check(Workload())
    with pytest.raises(BadInput) as caught:
        settings.check(replace(Workload(), **change))
    assert part in caught.value.message and caught.value.fix


def test_a_workload_survives_json() -> None:
    workload = Workload(
        affinity=(0, 3), priority="nice:5", spinning=False, min_count=7, ci_width=0.02, shapes={"x": (1, 2)}
    )
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload
    assert Workload.from_json({"batch": 2}) == Workload(batch=2), "what an older file lacks has its default"


def test_ranges() -> None:
    assert settings.ranges([3, 0, 1, 2, 6]) == "0-3,6"
    assert settings.ranges([]) == ""
