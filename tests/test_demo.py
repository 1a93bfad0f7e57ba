"""``make demo`` as it stands, with less time per cell: every cell, and the quality that the README's picture shows."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.conftest import ROOT

CELLS = [
    *(("onnxruntime", p) for p in ("fp32", "fp16", "int8-dynamic", "int8")),
    *(("tflite", p) for p in ("fp32", "fp16", "int8-dynamic", "int8", "int16x8")),
    *(("openvino", p) for p in ("fp32", "fp16", "int8")),
]


@pytest.fixture(scope="module")
def demo() -> dict[tuple[str, str], dict[str, Any]]:
    done = subprocess.run(
        ["make", "demo", "SECONDS_PER_CELL=2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((ROOT / "build" / "demo" / "demo.json").read_text())
    cells = {(r["backend"], r["precision"]): {"export": r} for r in answer["export"]}
    for r in answer["bench"]:
        cells[r["backend"], r["precision"]]["bench"] = r
    return {**cells, ("table", ""): {"text": done.stdout}}


@pytest.mark.slow
def test_every_cell_is_an_artifact_and_a_measurement(demo: dict[tuple[str, str], dict[str, Any]]) -> None:
    for cell in CELLS:
        assert demo[cell]["export"]["outcome"] == "artifact", cell
        assert demo[cell]["bench"]["outcome"] == "measurement", cell
        assert demo[cell]["bench"]["latency"]["p50_ns"] > 0
        assert demo[cell]["bench"]["memory"]["peak_bytes"] > demo[cell]["bench"]["memory"]["baseline_bytes"]


@pytest.mark.slow
def test_the_table_has_one_line_per_cell(demo: dict[tuple[str, str], dict[str, Any]]) -> None:
    lines = [tuple(line.split()[:2]) for line in demo["table", ""]["text"].splitlines()]
    for cell in CELLS:
        assert lines.count(cell) == 1, cell


@pytest.mark.slow
def test_quality(demo: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The figures of the first milestone: fp32 100 dB, int8 18 dB, all three int8 within 1 dB of each other."""
    parity = {cell: demo[cell]["export"]["parity"] for cell in CELLS}
    for backend in ("onnxruntime", "tflite", "openvino"):
        assert parity[backend, "fp32"]["sqnr_db"] >= 100
        assert parity[backend, "int8"]["sqnr_db"] >= 18
        assert parity[backend, "int8"]["agreement_margin"]["agreement"] >= 0.96
        assert demo[backend, "int8"]["export"]["arithmetic"]["integer_macs_share"] == 1.0
    int8 = [parity[b, "int8"]["sqnr_db"] for b in ("onnxruntime", "tflite", "openvino")]
    assert max(int8) - min(int8) <= 1.0
