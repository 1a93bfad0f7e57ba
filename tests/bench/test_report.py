"""The tables of export and bench say what an interpreter, not the device, has shown."""

from __future__ import annotations

from pathlib import Path

import portcall.api
from portcall.bench.report import INTERPRETED, export_table


def test_interpreted_parity_is_labelled(tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    answer = portcall.api.export(
        tiny_onnx, "tensorrt:fp16,onnxruntime:fp32", tmp_path / "tiny", data=tiny_data
    )
    rows = {
        line.split()[0]: line
        for line in export_table(answer["results"]).splitlines()
        if "tensorrt" in line or "onnxruntime" in line
    }
    assert {name: INTERPRETED in line for name, line in rows.items()} == {
        "tensorrt": True,
        "onnxruntime": False,
    }
