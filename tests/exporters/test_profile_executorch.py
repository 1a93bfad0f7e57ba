"""ExecuTorch's profile through its ETDump: kernels inside of XNNPACK, and the operator that it did not take."""

from __future__ import annotations

from pathlib import Path

import pytest

import portcall.api
from portcall.core import Workload
from portcall.exporters import get_backend
from portcall.targets.agent.contract import Unavailable
from tests.exporters.cumulative import write_data, write_onnx


@pytest.mark.slow
def test_the_sum_runs_outside_of_xnnpack(tmp_path: Path) -> None:
    found = get_backend("executorch").probe("export")
    if isinstance(found, Unavailable):
        pytest.skip(f"{found.reason}: {found.fix}")
    model, data = write_onnx(tmp_path / "model.onnx"), write_data(tmp_path / "data.npz")
    [result] = portcall.api.export(model, "executorch:fp32", tmp_path / "out", data=data)["results"]
    assert result["outcome"] == "artifact", result["reason"]
    answer = portcall.api.profile(result["path"], workload=Workload(min_time_s=0.1, warmup_s=0.05))
    placement = answer["placement"]
    assert placement["unit"] == "XNNPACK" and 0 < placement["time_share"] < 1
    [rest] = placement["rest"]
    assert rest["operator"] == "cumsum.out" and rest["unit"] == "ExecuTorch's own kernels"
    assert placement["operators"] == placement["on_unit"] + 1 == len(answer["operators"])
    taken = [o["kernel"] for o in answer["operators"] if o["on_unit"]]
    assert sum(k.startswith("Convolution (NHWC, F32)") for k in taken) == 2
    assert 0 < answer["coverage"] <= 1.05
