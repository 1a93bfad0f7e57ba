"""The order and the shares of a bench run, watched through the real local driver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import portcall.api
from portcall.bench.cost_report import cost_lines
from portcall.core import UnavailableError, Workload
from portcall.targets import Target, local

JOBS: list[tuple[str, str]] = []


class RecordingDriver(local.LocalDriver):
    """The local driver, and a list of what it was asked to do."""

    def run(self, job: str, arguments: Mapping[str, Any], label: str, backend: str) -> Any:
        JOBS.append((job, Path(arguments["artifact"]["directory"]).parent.name))
        return super().run(job, arguments, label, backend)


@pytest.fixture
def two(identity_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two artifacts, and a local target that keeps a record."""
    for name in ("a", "b"):
        portcall.api.export(identity_onnx, "null:fp32", tmp_path / name)
    JOBS.clear()
    monkeypatch.setattr(local, "TARGET", Target("local", "recorded", RecordingDriver))
    return [tmp_path / "a", tmp_path / "b"]


def test_memory_first_then_rounds_over_all_artifacts_then_energy(two: list[Path]) -> None:
    answer = portcall.api.benchmark(two, workload=Workload(processes=3, min_time_s=0.01, warmup_s=0.0))
    memory = [name for job, name in JOBS if job == "measure_memory"]
    assert memory == sorted(memory) and set(memory) == {"a", "b"}
    rest = JOBS[len(memory) :]
    assert rest[:6] == [("measure", name) for _ in range(3) for name in ("a", "b")]
    assert rest[6:] == [("measure_energy", "a"), ("measure_energy", "b")]
    assert [r["latency"]["processes"] for r in answer["results"]] == [3, 3]


def test_memory_and_energy_have_their_keys(two: list[Path]) -> None:
    [result] = portcall.api.benchmark(two[:1], workload=Workload(processes=1, min_time_s=0.01))["results"]
    memory, energy = result["memory"], result["energy"]
    for key in ("baseline_bytes", "model_bytes", "loaded_bytes", "peak_bytes"):
        assert isinstance(memory[key], int), key
    assert memory["layout"] in ("fixed", "random") and memory["processes"] >= 3
    assert memory["spread"]["peak_bytes"][0] <= memory["peak_bytes"] <= memory["spread"]["peak_bytes"][1]
    assert memory["limit"] is None, "nobody asked for it"
    assert memory["weights"]["bytes"] is None and memory["weights"]["reason"], "null holds no weights"
    if energy["available"]:
        assert energy["joules_per_inference"] > 0 and energy["reason"] is None
    else:
        assert energy["reason"] and energy["fix"]


def test_a_limit_that_cannot_be_searched_leaves_the_measurement(
    two: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(
        self: RecordingDriver, job: str, arguments: Mapping[str, Any], label: str, backend: str
    ) -> Any:
        if job == "find_memory_limit":
            raise UnavailableError("no cgroups on this device", "Use another one")
        return local.LocalDriver.run(self, job, arguments, label, backend)

    monkeypatch.setattr(RecordingDriver, "run", refused)
    workload = Workload(processes=1, min_time_s=0.01)
    [result] = portcall.api.benchmark(two[:1], workload=workload, find_memory_limit=True)["results"]
    assert result["outcome"] == "measurement"
    expected = {"available": False, "reason": "no cgroups on this device", "fix": "Use another one"}
    assert result["memory"]["limit"] == expected
    assert "no memory limit: no cgroups on this device; fix: Use another one" in cost_lines([result])


def test_a_cap_is_shared_by_all_processes(two: list[Path], tmp_path: Path) -> None:
    """Every process times something, none takes what belongs to those after it."""
    import numpy as np

    workload = Workload(processes=4, min_time_s=60.0, max_time_s=4.0, warmup_s=0.0)
    portcall.api.benchmark(two[:1], workload=workload, output=tmp_path / "out")
    with np.load(next((tmp_path / "out" / "raw").iterdir())) as stored:
        counts = [stored[f"wall_ns_{i}"].size for i in range(4)]
    assert min(counts) >= 5
    assert max(counts) < 10 * min(counts)


def test_a_batch_joins_samples(tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    portcall.api.export(tiny_onnx, "onnxruntime:fp32", tmp_path / "tiny", data=tiny_data)
    workload = Workload(batch=4, processes=1, min_time_s=0.05)
    [result] = portcall.api.benchmark(tmp_path / "tiny", workload=workload)["results"]
    assert result["outcome"] == "measurement", result["reason"]
    assert result["throughput_per_s"] == pytest.approx(4e9 / result["latency"]["mean_ns"])


def test_a_batch_that_the_file_cannot_take_is_unsupported(identity_onnx: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(identity_onnx)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    portcall.api.export(tmp_path / "fixed.onnx", "null:fp32", tmp_path / "out")
    [result] = portcall.api.benchmark(
        tmp_path / "out", workload=Workload(batch=2, processes=1, min_time_s=0.01)
    )["results"]
    assert result["outcome"] == "unsupported"
    assert "fixed first dimension" in result["reason"]
    assert result["fix"] == "Use --batch 1"
