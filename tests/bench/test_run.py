"""The order and the shares of a bench run, watched through the real local driver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import portcall.api
from portcall.core import Workload
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


def test_memory_first_then_rounds_over_all_artifacts(two: list[Path]) -> None:
    answer = portcall.api.benchmark(two, workload=Workload(processes=3, min_time_s=0.01, warmup_s=0.0))
    memory, timed = JOBS[:2], JOBS[2:]
    assert memory == [("measure_memory", "a"), ("measure_memory", "b")]
    assert timed == [("measure", name) for _ in range(3) for name in ("a", "b")]
    assert [r["latency"]["processes"] for r in answer["results"]] == [3, 3]


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
