"""The options of ``bench`` for its runner: what they take, what they refuse, and the Workload that comes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from portcall.arguments import Usage, build_parser
from portcall.core import Workload
from portcall.runner_options import runner_fields


def fields(*arguments: str) -> dict[str, Any]:
    return runner_fields(build_parser().parse_args(["bench", "a", *arguments]))


def test_defaults_are_those_of_a_workload() -> None:
    assert Workload(**fields()) == Workload()


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--affinity", "0"], "affinity", (0,)),
        (["--affinity", "3,0-1"], "affinity", (0, 1, 3)),
        (["--priority", "nice:-5"], "priority", "nice:-5"),
        (["--priority", "fifo:10"], "priority", "fifo:10"),
        (["--spinning", "on"], "spinning", True),
        (["--spinning", "off"], "spinning", False),
        (["--ci-width", "1%"], "ci_width", 0.01),
        (["--ci-width", "0.02"], "ci_width", 0.02),
        (["--min-count", "300"], "min_count", 300),
        (["--max-warmup", "0"], "max_warmup_s", 0.0),
    ],
)
def test_what_they_take(arguments: list[str], key: str, value: Any) -> None:
    assert fields(*arguments)[key] == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--affinity", ""],
        ["--affinity", "1-0"],
        ["--affinity", "a"],
        ["--affinity", "-1"],
        ["--affinity", "0-99999"],
        ["--priority", "high"],
        ["--priority", "nice:99"],
        ["--spinning", "maybe"],
        ["--ci-width", "0"],
        ["--ci-width", "100%"],
        ["--ci-width", "nan"],
        ["--min-count", "0"],
        ["--max-warmup", "-1"],
        ["--max-warmup", "inf"],
        ["--max-time", "0"],
    ],
)
def test_what_they_refuse(arguments: list[str]) -> None:
    with pytest.raises(Usage, match=arguments[0]):
        fields(*arguments)


def test_bench_records_them(portcall: Any, tiny_onnx: Path) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no CPU affinity; run this on Linux")
    cpu = str(min(os.sched_getaffinity(0)))
    options = ["--processes", "1", "--min-time", "0.01", "--min-count", "40", "--max-warmup", "0.1"]
    settings = ["--affinity", cpu, "--priority", "nice:19", "--spinning", "off"]
    done = portcall("bench", tiny_onnx, *options, *settings, "--json")
    assert done.returncode == 0, done.stderr
    [result] = json.loads(done.stdout)["results"]
    stack = result["environment"]["stack"]
    assert (stack["affinity"], stack["priority"], stack["spinning"]) == ([int(cpu)], "nice:19", False)
    assert result["workload"]["affinity"] == [int(cpu)] and result["workload"]["priority"] == "nice:19"
    assert result["latency"]["n"] >= 40
    assert not any("--affinity" in w or "--priority" in w or "--spinning" in w for w in result["warnings"])


def test_a_cpu_that_does_not_exist_is_bad_input(portcall: Any, tiny_onnx: Path) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no CPU affinity; run this on Linux")
    done = portcall("bench", tiny_onnx, "--affinity", "4000", "--json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "bad_input" and "this machine has the CPUs 0-" in error["message"]
