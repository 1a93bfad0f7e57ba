"""The search for a memory limit: the bisection on made thresholds, and real runs in real cgroups."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.api
from portcall import artifact as artifacts
from portcall.core import Workload
from portcall.progress import Reporter
from portcall.targets import get_target
from portcall.targets.agent import cgroups
from portcall.targets.agent.errors import CellFailed, UnavailableError, VerificationFailed
from portcall.targets.agent.memory_limit import search
from portcall.workspace import open_workspace
from tests.processes import left_running

MB = 1 << 20


@pytest.mark.parametrize("threshold", [1, 5, 63, 64, 99, 100, 101, 180])
def test_the_search_finds_the_smallest_multiple(threshold: int) -> None:
    tried: list[int] = []

    def runs(limit: int) -> bool:
        tried.append(limit)
        return limit >= threshold * MB

    assert search(runs, 100 * MB, MB) == threshold * MB
    assert threshold == 1 or (threshold - 1) * MB in tried, "the one below was tried and failed"


def test_a_fuzzy_edge_ends_above_it() -> None:
    """Between 60 and 80 a try runs with a probability that grows: the answer held five times in a row."""
    rng = random.Random(0)
    found = [
        search(lambda limit: limit / MB > rng.uniform(60, 80), 100 * MB, MB, confirmations=5) // MB
        for _ in range(200)
    ]
    assert min(found) > 66 and max(found) <= 81


def test_what_never_runs_within_a_limit_is_an_error() -> None:
    with pytest.raises(CellFailed, match="it runs without a limit but not within"):
        search(lambda limit: False, 10 * MB, MB)


@pytest.fixture
def place() -> cgroups.Place:
    try:
        return cgroups.find_place()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def artifact(tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> Path:
    portcall.api.export(tiny_onnx, "onnxruntime:fp32", tmp_path / "my out", data=tiny_data)
    return tmp_path / "my out" / "onnxruntime-fp32"


def left(place: cgroups.Place) -> list[str]:
    return [p.name for p in place.folder.glob("portcall-*-*")]


def test_a_real_artifact_runs_in_its_limit_and_was_killed_below(place: cgroups.Place, artifact: Path) -> None:
    workload = Workload(processes=1, min_time_s=0.001, warmup_s=0.0)
    [result] = portcall.api.benchmark(artifact, workload=workload, find_memory_limit=True)["results"]
    found = result["memory"]["limit"]
    assert found["available"] and (found["reason"], found["fix"]) == (None, None)
    assert 5 * MB < found["failed_at_bytes"] < found["limit_bytes"] <= 2 * found["unlimited_peak_bytes"]
    assert found["limit_bytes"] % found["resolution_bytes"] == 0
    assert found["failed_because"] == "killed by the kernel for memory"
    assert found["checked_samples"] == 2, "outputs were compared, not only computed"
    last = found["tries"][-found["confirmations"] :]
    assert all(t["runs"] and t["limit_bytes"] == found["limit_bytes"] for t in last[1:])
    assert json.loads(json.dumps(found)) == found


def test_an_artifact_that_computes_something_else_has_no_limit(place: cgroups.Place, artifact: Path) -> None:
    """Its outputs are not the samples': what "runs" means includes that."""
    manifest = artifacts.read_manifest(artifact)
    wrong = artifact.parent / "wrong.npz"
    with np.load(artifact / "samples.npz") as stored:
        arrays = {k: stored[k] + 1 if k.startswith("reference/") else stored[k] for k in stored.files}
    np.savez(wrong, **arrays)
    job: dict[str, Any] = {
        "artifact": artifacts.from_manifest(artifact, manifest).to_json(),
        "workload": Workload().to_json(),
        "inputs": str(wrong),
        "expected_sqnr_db": manifest["samples"]["sqnr_db"],
    }
    before = set(left(place))
    with open_workspace(Reporter(False), 60.0) as work, pytest.raises(VerificationFailed):
        get_target("local").driver(work).run("find_memory_limit", job, "limit", "onnxruntime")
    assert set(left(place)) <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_cgroup_and_no_process_is_left_after_a_signal(
    place: cgroups.Place, tiny_onnx: Path, tmp_path: Path, number: signal.Signals
) -> None:
    model = tmp_path / "my model.onnx"
    shutil.copy(tiny_onnx, model)
    command = [sys.executable, "-m", "portcall", "bench", str(model), "--find-memory-limit", "--json"]
    before = set(left(place))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not set(left(place)) - before:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert left_running(str(model)) == {}
    deadline = time.monotonic() + 15
    while set(left(place)) - before:
        assert time.monotonic() < deadline, left(place)
        time.sleep(0.02)
    assert left_running(f"cgroup_janitor.py {place.folder}") == {}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has cgroups: run it there")
def test_without_permission_it_is_unavailable_with_reason_and_fix() -> None:
    """As an ordinary user, in a process of its own."""
    code = (
        "import json, os\n"
        "from portcall.targets.agent import memory_limit\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(json.dumps(memory_limit.find({}, print)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    assert found["available"] is False and found["limit_bytes"] is None
    assert "may not make a cgroup under" in found["reason"] and "systemd-run --user --scope" in found["fix"]
