"""The modes end to end through the local driver: null, ONNX Runtime, OpenVINO, TFLite; order, budget, raw samples."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.api
from portcall.bench.modes import Arrival, Cold, Mode, Sustained, Throughput
from portcall.core import BadInput, Workload
from portcall.targets import Target, local
from tests.processes import running

NULL = {"inputs": [{"name": "x", "shape": ["batch", 4], "dtype": "float32"}], "copies": {"y": "x"}}
JOBS: list[tuple[str, str]] = []
QUICK = Workload(processes=2, min_time_s=0.05, warmup_s=0.0, shapes={"x": (1, 4)})


class RecordingDriver(local.LocalDriver):
    """The local driver, and a list of what it was asked to do."""

    def run(self, job: str, arguments: Mapping[str, Any], label: str, backend: str) -> Any:
        if job == "describe":
            pass
        elif "artifact" in arguments:
            JOBS.append((job, Path(arguments["artifact"]["directory"]).parent.name))
        else:
            JOBS.append((job, arguments["cache"]))
        return super().run(job, arguments, label, backend)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two bare files of the null backend in folders with spaces, and a local target that keeps a record."""
    paths = [tmp_path / name / "in" / "model.null" for name in ("a a", "b b")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(NULL))
    JOBS.clear()
    monkeypatch.setattr(local, "TARGET", Target("local", "recorded", RecordingDriver))
    return paths


def one(path: Path, mode: str | Mode, workload: Workload = QUICK, **options: Any) -> dict[str, Any]:
    [result] = portcall.api.benchmark(path, mode=mode, workload=workload, **options)["results"]
    return dict(result)


def test_every_round_visits_all_points_of_all_artifacts(two: list[Path]) -> None:
    workload = replace(QUICK, min_time_s=0.3, warmup_s=0.02)
    answer = portcall.api.benchmark(two, mode=Throughput(batches=(1, 3), streams=(1, 2)), workload=workload)
    assert [
        ("throughput:measure", name) for _ in range(2) for name in ("a a", "b b") for _ in range(4)
    ] == JOBS
    for result in answer["results"]:
        assert result["mode"] == {"name": "throughput", "batches": (1, 3), "streams": (1, 2)}
        assert result["latency"] is None, "that is another mode's"
        points = result["throughput"]["points"]
        assert [(p["batch"], p["streams"]) for p in points] == [(1, 1), (1, 2), (3, 1), (3, 2)]
        assert all(p["outcome"] == "measurement" and p["processes"] == 2 for p in points)
        assert all(p["ci"][0] <= p["samples_per_s"] <= p["ci"][1] for p in points)


def test_cold_starts_are_dropped_before_each_and_warm_stands_beside(two: list[Path], tmp_path: Path) -> None:
    result = one(two[0], Cold(caches=("warm", "artifact")), output=tmp_path / "raw out")
    first = [("cold:measure", "a a")]
    assert first + 2 * [("cold:measure", "a a"), ("cold:drop", "artifact"), ("cold:measure", "a a")] == JOBS
    warm, dropped = result["cold"]["caches"]
    assert warm["method"] is None and warm["n"] == 2
    if dropped["reason"] is None:
        assert dropped["method"] == "posix_fadvise" and dropped["n"] == 2
        assert dropped["dropped"]["files"] == 1 and dropped["dropped"]["bytes"] > 50
    with np.load(next((tmp_path / "raw out" / "raw").iterdir())) as stored:
        assert stored["warm_total_ns"].size == 2
        parts = ("interpreter_ns", "import_ns", "load_ns", "bind_ns", "first_ns")
        np.testing.assert_array_equal(sum(stored[f"warm_{p}"] for p in parts), stored["warm_total_ns"])


def test_a_sustained_run_is_a_time_series(two: list[Path], tmp_path: Path) -> None:
    result = one(
        two[0], Sustained(duration_s=0.8, window_s=0.1), replace(QUICK, processes=1), output=tmp_path / "out"
    )
    found = result["sustained"]
    [windows] = found["windows"]
    assert 4 <= len(windows) <= 8
    assert [round(w["t_s"], 3) for w in windows] == [round(0.1 * i, 3) for i in range(len(windows))]
    assert found["drift"]["per_minute"] is not None
    assert found["throttled"] in (True, False, None) and found["reason"]
    with np.load(next((tmp_path / "out" / "raw").iterdir())) as stored:
        assert stored["wall_ns_0"].size == stored["begin_ns_0"].size == found["n"]


def test_arrivals_come_at_their_rate(two: list[Path], tmp_path: Path) -> None:
    mode = Arrival(rate_per_s=200, duration_s=0.5, seed=3)
    result = one(two[0], mode, output=tmp_path / "out")
    found = result["arrival"]
    assert found["saturated"] is False, "a server that does nothing keeps up"
    assert found["utilization"]["mean"] < 0.5
    assert found["unfinished"] == 0
    assert found["response"]["p50_ns"] >= found["service"]["p50_ns"]
    with np.load(next((tmp_path / "out" / "raw").iterdir())) as stored:
        due = [stored["due_ns_0"], stored["due_ns_1"]]
        assert all((stored[f"begin_ns_{i}"] >= due[i]).all() for i in (0, 1))
    assert due[0][0] != due[1][0], "each process has arrivals of its own"
    one(two[0], mode, output=tmp_path / "again")
    with np.load(next((tmp_path / "again" / "raw").iterdir())) as stored:
        np.testing.assert_array_equal(stored["due_ns_0"], due[0])


def test_a_runtime_that_cannot_keep_up_is_saturated(tiny_onnx: Path) -> None:
    """Thousands of requests a second more than a small network can serve."""
    mode = Arrival(rate_per_s=2_000_000, duration_s=0.05, drain_s=0.0)
    found = one(tiny_onnx, mode, Workload(processes=1, shapes={"x": (1, 3, 16, 16)}))["arrival"]
    assert found["saturated"] is True
    assert found["unfinished"] > 0
    assert found["offered_load"]["mean"] > 1


@pytest.mark.parametrize(
    "spec", ["onnxruntime:fp32", "openvino:fp32", pytest.param("tflite:fp32", marks=pytest.mark.slow)]
)
def test_runtimes_take_streams_and_a_batch_that_they_cannot_take_is_one_line(
    spec: str, tmp_path: Path, tiny_onnx: Path, tiny_data: Path
) -> None:
    backend = spec.partition(":")[0]
    module = {"tflite": "litert_torch"}.get(backend, backend)
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'portcall[{backend}]'")
    model, data = (
        ("tests.models:tiny_cnn", "tests.models:tiny_cnn_data")
        if backend == "tflite"
        else (tiny_onnx, tiny_data)
    )
    [made] = portcall.api.export(model, spec, tmp_path / "out", data=data)["results"]
    assert made["outcome"] == "artifact", made["reason"]
    result = one(
        tmp_path / "out", Throughput(batches=(1, 4), streams=(1, 2)), Workload(processes=1, min_time_s=0.05)
    )
    assert result["outcome"] == "measurement", result["reason"]
    points = {(p["batch"], p["streams"]): p for p in result["throughput"]["points"]}
    for key in ((1, 1), (1, 2)):
        assert points[key]["outcome"] == "measurement", points[key]["reason"]
        assert points[key]["samples_per_s"] > 0
    large = points[4, 2]
    if spec.startswith("tflite"):  # a flatbuffer of fixed shapes
        assert large["outcome"] == "unsupported" and large["samples_per_s"] is None
        assert "fixed" in large["reason"] or "shape" in large["reason"]
    else:
        assert large["outcome"] == "measurement", large["reason"]


def test_a_budget_ends_the_sweep_and_says_what_was_left_out(two: list[Path]) -> None:
    workload = replace(QUICK, processes=20, min_time_s=30.0, max_time_s=3.0)
    result = one(two[0], Throughput(batches=(1, 2), streams=(1,)), workload)
    assert len(JOBS) < 40
    assert any("--max-time 3 s" in w and "were not started" in w for w in result["warnings"])


def test_a_budget_shortens_a_sustained_run(two: list[Path]) -> None:
    workload = replace(QUICK, processes=1, max_time_s=1.0)
    found = one(two[0], Sustained(duration_s=100, window_s=0.1), workload)["sustained"]
    assert found["duration_s"] < 10


def test_a_longer_run_than_the_timeout_is_refused(two: list[Path]) -> None:
    with pytest.raises(BadInput, match="--timeout ends it at 100 s"):
        one(two[0], Sustained(duration_s=600), timeout_s=100)
    assert not JOBS


def test_one_batch_beside_a_sweep_is_refused(two: list[Path]) -> None:
    with pytest.raises(BadInput, match="sweeps several"):
        one(two[0], "throughput", Workload(batch=2))


def test_a_failed_artifact_leaves_the_other_alone(two: list[Path]) -> None:
    two[0].write_text("{}")
    bad, good = portcall.api.benchmark(two, mode=Arrival(100, 0.2), workload=QUICK)["results"]
    assert bad["outcome"] == "failed" and bad["reason"] and "arrival" not in bad
    assert good["outcome"] == "measurement" and good["arrival"]["n"] > 0


def test_the_results_are_json_and_saved_as_given(two: list[Path], tmp_path: Path) -> None:
    answer = portcall.api.benchmark(two, mode=Throughput((1,), (1,)), workload=QUICK, output=tmp_path / "out")
    text = json.dumps(answer, allow_nan=False)
    saved = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert saved == json.loads(text)
    assert len(list((tmp_path / "out" / "raw").iterdir())) == 2


def test_latency_says_its_name(two: list[Path]) -> None:
    result = one(two[0], "latency", replace(QUICK, processes=1, min_time_s=0.01))
    assert result["mode"] == {"name": "latency"}
    assert result["latency"]["n"] > 0


class KillingDriver(local.LocalDriver):
    """Kills the worker of the second arrival job in its middle, as a system that runs out of memory would."""

    def run(self, job: str, arguments: Mapping[str, Any], label: str, backend: str) -> Any:
        if job == "arrival:measure":
            JOBS.append((job, label))
            if len(JOBS) == 2:
                threading.Thread(target=self._kill).start()
        return super().run(job, arguments, label, backend)

    def _kill(self) -> None:
        deadline = time.monotonic() + 30
        while not (found := running(tempfile.gettempdir())) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds workers through /proc: run this on Linux")
def test_a_killed_process_is_discarded_and_said(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(local, "TARGET", Target("local", "killing", KillingDriver))
    result = one(two[0], Arrival(100, 2.0), replace(QUICK, processes=3))
    assert result["outcome"] == "measurement", result["reason"]
    assert result["arrival"]["processes"] == 2
    assert any("1 of 3 processes died and were discarded" in w and "SIGKILL" in w for w in result["warnings"])


class BreakingDriver(RecordingDriver):
    """Breaks the file once its inputs are known."""

    def run(self, job: str, arguments: Mapping[str, Any], label: str, backend: str) -> Any:
        if job == "throughput:measure":
            Path(arguments["artifact"]["directory"], "model.null").write_text("{}")
        return super().run(job, arguments, label, backend)


def test_a_point_that_dies_twice_is_not_tried_again(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "TARGET", Target("local", "breaking", BreakingDriver))
    result = one(two[0], Throughput((1, 2), (1,)), replace(QUICK, processes=5))
    assert result["outcome"] == "failed" and result["reason"]
    assert len(JOBS) == 4, "two points, two starts each"
