"""What the runner makes of processes that die, outputs that change, and intervals that have to be narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import portcall.api
import portcall.exporters
from portcall.bench.passes import check_room
from portcall.core import CellFailed, Workload
from portcall.targets.agent.errors import BadInput

TOP = """
import dataclasses, json, os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
from portcall.exporters import null
from portcall.exporters.null import NullSession, load

def call():
    return json.loads(Path(sys.argv[1]).read_text())["call"]

def count(artifact):
    path = Path(artifact.directory).parent / "loads"
    number = int(path.read_text()) + 1 if path.exists() else 0
    path.write_text(str(number))
    return number
"""
END = "\nBACKEND = dataclasses.replace(null.BACKEND, name={name!r}, load=load)\n"
DIES = """
class Dying(NullSession):
    def infer(self):
        self.done = getattr(self, "done", 0) + 1
        if self.deadly and self.done == 1000:
            os.kill(os.getpid(), signal.{signal})

@contextmanager
def load(artifact, workload):
    session = Dying(artifact.path)
    session.deadly = call().endswith("jobs:measure") and count(artifact) in {numbers}
    yield session
"""
FAULTS = {
    "dies_once": DIES.format(signal="SIGKILL", numbers=[2]),
    "dies_mostly": DIES.format(signal="SIGSEGV", numbers=[1, 3, 4]),
    "dies_in_memory_pass": """
@contextmanager
def load(artifact, workload):
    if "memory" in call():
        os.kill(os.getpid(), signal.SIGKILL)
    yield NullSession(artifact.path)
""",
    "changes": """
class Changing(NullSession):
    def infer(self):
        self.calls = getattr(self, "calls", 0) + 1

    def get_outputs(self):
        return {k: v * (1 + (1e-6 if self.calls > 2 else 0)) for k, v in super().get_outputs().items()}

@contextmanager
def load(artifact, workload):
    yield Changing(artifact.path)
""",
    "differs_between_processes": """
class Own(NullSession):
    def get_outputs(self):
        return {k: v * (1 + self.own) for k, v in super().get_outputs().items()}

@contextmanager
def load(artifact, workload):
    session = Own(artifact.path)
    session.own = 1e-6 * count(artifact)
    yield session
""",
    "gets_slower": """
class Slower(NullSession):
    def infer(self):
        self.calls = getattr(self, "calls", 0) + 1
        end = time.perf_counter() + 1e-4 * (1 + self.calls / 500)
        while time.perf_counter() < end:
            pass

@contextmanager
def load(artifact, workload):
    yield Slower(artifact.path)
""",
}
QUICK = Workload(processes=5, min_time_s=0.02, warmup_s=0.0, max_warmup_s=0.05)


@pytest.fixture
def faulty(identity_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that exports with a faulty backend and benchmarks the artifact."""
    folder = tmp_path / "dropins"
    folder.mkdir()
    for name, body in FAULTS.items():
        (folder / f"{name}.py").write_text(TOP + body + END.format(name=name))
    monkeypatch.setattr(portcall.exporters, "__path__", [*portcall.exporters.__path__, str(folder)])

    def bench(name: str, workload: Workload = QUICK) -> dict[str, Any]:
        place = tmp_path / name
        portcall.api.export(identity_onnx, f"{name}:fp32", place)
        (place / f"{name}-fp32" / ".." / "loads").resolve().write_text("0")
        [result] = portcall.api.benchmark(place / f"{name}-fp32", workload=workload)["results"]
        return dict(result)

    return bench


def test_a_process_that_is_killed_loses_its_samples_and_the_cell_goes_on(faulty: Any) -> None:
    result = faulty("dies_once")
    assert result["outcome"] == "measurement", result["reason"]
    assert (result["latency"]["processes"], result["died"], len(result["per_process"])) == (4, 1, 4)
    [warning] = [w for w in result["warnings"] if "died" in w]
    assert warning.startswith("1 of 5 processes died and their samples are discarded: ")
    assert "killed by SIGKILL" in warning


def test_a_cell_whose_processes_mostly_die_fails_with_the_signal(faulty: Any) -> None:
    result = faulty("dies_mostly")
    assert (result["outcome"], result["died"], result["latency"]) == ("failed", 3, None)
    assert result["reason"].startswith(
        "3 of 4 timed processes died; the last: the worker was killed by SIGSEGV"
    )
    assert result["fix"]


def test_the_only_process_keeps_its_own_reason(faulty: Any) -> None:
    workload = Workload(processes=1, min_time_s=0.02, warmup_s=0.0, max_warmup_s=0.05)
    result = faulty("dies_mostly", workload)
    assert result["reason"].startswith("the worker was killed by SIGSEGV")


def test_killed_while_memory_is_read_tells_how_large_the_files_are(faulty: Any) -> None:
    result = faulty("dies_in_memory_pass")
    assert result["outcome"] == "failed" and "killed by SIGKILL (out of memory" in result["reason"]
    assert "MB: see that several times as much memory is free" in result["fix"]
    assert result["died"] == 0, "no timed process was started"


def test_one_process_that_takes_more_than_there_is() -> None:
    check_room("a", {"peak_bytes": 100, "available_bytes": 100})
    check_room("a", {"peak_bytes": 100, "available_bytes": None})
    with pytest.raises(CellFailed, match="one process of a takes 3000 MB, 2000 MB are available") as caught:
        check_room("a", {"peak_bytes": 3e9, "available_bytes": 2e9})
    assert "memory limit" in caught.value.fix


def test_outputs_that_change_from_run_to_run_are_flagged(faulty: Any) -> None:
    result = faulty("changes", Workload(processes=2, min_time_s=0.02, warmup_s=0.0))
    assert result["outcome"] == "measurement", result["reason"]
    assert result["deterministic"] is False
    [warning] = [w for w in result["warnings"] if "outputs differ" in w]
    assert "from run to run" in warning and "y by up to" in warning


def test_outputs_that_differ_between_processes_are_flagged(faulty: Any) -> None:
    result = faulty("differs_between_processes", Workload(processes=2, min_time_s=0.02, warmup_s=0.0))
    assert result["outcome"] == "measurement", result["reason"]
    assert result["deterministic"] is False
    assert all(p["deterministic"] for p in result["per_process"])
    assert any("outputs differ between processes" in w for w in result["warnings"])


def test_a_series_that_never_gets_steady_is_measured_and_flagged(faulty: Any) -> None:
    result = faulty("gets_slower", Workload(processes=2, min_time_s=0.2, warmup_s=0.05, max_warmup_s=0.2))
    assert result["outcome"] == "measurement", result["reason"]
    steady = result["steady"]
    assert (steady["reached"], steady["processes"], steady["processes_reached"]) == (False, 2, 0)
    assert steady["worst_change"] > 0.1
    [warning] = [w for w in result["warnings"] if "no steady state" in w]
    assert "in 2 of 2 processes" in warning and "--max-warmup" in warning


def test_what_a_healthy_result_tells(faulty: Any, identity_onnx: Path, tmp_path: Path) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "good")
    workload = Workload(processes=2, min_time_s=0.05, warmup_s=0.0, min_count=50, spinning=True)
    [result] = portcall.api.benchmark(tmp_path / "good", workload=workload)["results"]
    assert result["deterministic"] is True and result["died"] == 0
    assert set(result["overhead"]) == {"wall_ns", "cpu_ns", "loop_ns"}
    assert result["rss_growth_bytes"] < 1e6
    assert result["latency"]["trim"] == 0.1
    assert result["latency"]["min_ns"] <= result["latency"]["trimmed_mean_ns"]
    started = [p["started_at"] for p in result["per_process"]]
    assert started == sorted(started) and len(started) == 2
    for process in result["per_process"]:
        assert process["n"] >= 50 and process["warmup"] >= 1
        assert process["p50_ns"] > 0 and process["first_ns"] > 0 and process["load_ns"] > 0
        assert process["steady"]["reached"] in (True, False)
    assert sum(p["n"] for p in result["per_process"]) == result["latency"]["n"]
    assert any(w.startswith("--spinning on: null has no such switch") for w in result["warnings"])
    assert result["environment"]["stack"]["affinity"]


def test_processes_are_added_until_the_interval_is_narrow(tiny_onnx: Path) -> None:
    """A width that any two processes reach adds none; one that none reaches goes on to the end of the time."""
    wide = Workload(processes=3, min_time_s=0.01, warmup_s=0.0, max_warmup_s=0.0, ci_width=50.0)
    [result] = portcall.api.benchmark(tiny_onnx, workload=wide)["results"]
    assert result["latency"]["processes"] == 3
    assert not any("--ci-width" in w for w in result["warnings"])

    narrow = Workload(
        processes=3, min_time_s=0.01, warmup_s=0.0, max_warmup_s=0.0, ci_width=1e-9, max_time_s=6.0
    )
    [result] = portcall.api.benchmark(tiny_onnx, workload=narrow)["results"]
    latency = result["latency"]
    assert latency["processes"] > 3  # three equal medians would be a width of 0
    [warning] = [w for w in result["warnings"] if "--ci-width" in w]
    assert "not reached in" in warning and f"after {latency['processes']} processes; about" in warning


@pytest.mark.parametrize("change", [{"max_time_s": 0.0}, {"processes": 0}, {"priority": "fast"}])
def test_a_workload_that_cannot_be_runs_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        portcall.api.benchmark(tmp_path / "not even looked at", workload=Workload(**change))
