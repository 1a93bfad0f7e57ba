"""An int8 export in which nothing was quantized is a failed cell that says so, never a passed one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import portcall.api

INTEGER = [
    "onnxruntime:int8",
    "onnxruntime:int8-dynamic",
    "openvino:int8",
    "tflite:int8",
    "tflite:int8-dynamic",
    "tflite:int16x8",
]


class SinExp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.sin(x))


class OddProduct(nn.Module):
    """A matrix product of two activations between functions: there is compute, but no weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.sin(x) @ torch.cos(x).transpose(1, 2))


def save(module: nn.Module, shape: tuple[int, ...], folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    torch.export.save(torch.export.export(module.eval(), (torch.randn(shape),)), folder / "model.pt2")
    values = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
    np.savez(folder / "data.npz", x=values)
    return folder / "model.pt2", folder / "data.npz"


def test_a_model_without_quantizable_operators_fails_in_every_integer_precision(tmp_path: Path) -> None:
    model, data = save(SinExp(), (1, 8), tmp_path)
    cells = ["onnxruntime:fp32", *INTEGER]
    answer = portcall.api.export(model, cells, tmp_path / "out", data=data)
    found = {f"{r['backend']}:{r['precision']}": r for r in answer["results"]}
    assert found["onnxruntime:fp32"]["outcome"] == "artifact"
    for cell in INTEGER:
        result = found[cell]
        assert result["outcome"] == "failed", cell
        assert result["reason"] == f"{cell} stayed in floating point: no operator was quantized", cell
        assert result["fix"] == "No operator of this model can be quantized here; use fp32 or fp16"
        assert result["path"] is None and not (tmp_path / "out" / cell.replace(":", "-")).exists()


def test_compute_operators_that_stayed_in_float_are_named(tmp_path: Path) -> None:
    model, data = save(OddProduct(), (1, 4, 6), tmp_path)
    cells = ["onnxruntime:int8-dynamic", "onnxruntime:int8", "tflite:int8-dynamic"]
    dynamic, static, tflite = portcall.api.export(model, cells, tmp_path / "out", data=data)["results"]
    assert dynamic["outcome"] == tflite["outcome"] == "failed"
    assert dynamic["reason"] == "onnxruntime:int8-dynamic stayed in floating point: node_matmul"
    assert "OddProduct" in tflite["reason"] and "no operator was quantized" not in tflite["reason"]
    # a static export can quantize it: that is a pass, and the count says so
    assert static["outcome"] == "artifact"
    assert static["arithmetic"]["macs"] == static["arithmetic"]["integer_macs"] == 4 * 4 * 6
