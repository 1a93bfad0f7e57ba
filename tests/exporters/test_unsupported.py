"""Operators that no converter knows: named, with the line that made them and what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

import portcall.api
from portcall.exporters._unsupported import DEFAULT, replacement_for


@pytest.mark.parametrize(
    ("cell", "target"), [("onnxruntime:fp32", "ONNX"), ("openvino:fp32", "ONNX"), ("tflite:fp32", "TFLite")]
)
def test_the_line_of_the_model_is_named(tmp_path: Path, cell: str, target: str) -> None:
    [result] = portcall.api.export("tests.models:decomposed", cell, tmp_path / "out")["results"]
    assert result["outcome"] == "unsupported", result["reason"]
    assert result["reason"].startswith(f"{target} has no operator for torch's aten._linalg_svd (models.py:")
    assert "_, values, _ = torch.linalg.svd(x)" in result["reason"]
    assert result["fix"] == "Compute the decomposition outside the model"


@pytest.mark.parametrize(
    ("operator", "word"),
    [
        ("aten.fft_fft_r2c", "transform"), ("torchvision.nms", "post-processing"),
        ("NonMaxSuppression", "post-processing"), ("aten.special_bessel_j0", "polynomial"),
        ("aten.multinomial", "random"), ("aten.grid_sampler_2d", "interpolate"),
    ],
)  # fmt: skip
def test_replacements(operator: str, word: str) -> None:
    assert word in replacement_for(operator)
    assert replacement_for("aten.add") == DEFAULT
