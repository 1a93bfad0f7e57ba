"""Weights in float16 whose channels keep their sums: what the fp16 files of all backends hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import portcall.api
from portcall.exporters import _half_weights
from tests.exporters.graphs import write_onnx

Array = np.ndarray[Any, Any]


def rounded(path: Path) -> dict[str, Array]:
    model = onnx.load(str(path))
    _half_weights.round_weights(model)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_sums_of_channels_stay_and_every_value_is_a_neighbour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 4, 3, 3)).astype(np.float32),
        "m": rng.random((300, 4)).astype(np.float32),
    }
    weights["b"] = rng.standard_normal(8).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"),
        helper.make_node("MatMul", ["y", "m"], ["z"], "product"),
    ]
    path = write_onnx(
        tmp_path / "m.onnx",
        nodes,
        {"x": [1, 4, 5, 5], "y": [2, 300]},
        {"c": [1, 8, 3, 3], "z": [2, 4]},
        weights,
    )
    found = rounded(path)
    np.testing.assert_array_equal(found["b"], weights["b"])  # no weight of a product
    for name, axes in (("w", (1, 2, 3)), ("m", (0,))):
        exact, values = weights[name].astype(np.float64), found[name]
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, values.astype(np.float16))
        nearest = weights[name].astype(np.float16)
        spacing = np.abs(np.spacing(nearest)).astype(np.float64)
        assert (np.abs(values - exact) <= spacing).all()
        before, after = (np.abs((v.astype(np.float64) - exact).sum(axes)) for v in (nearest, values))
        assert after.sum() < 0.2 * before.sum() and (after <= before + 1e-12).all()


def test_weights_beyond_float16_are_left_alone(tmp_path: Path) -> None:
    weights = {"m": np.full((4, 3), 1e5, np.float32)}
    node = helper.make_node("MatMul", ["x", "m"], ["y"], "product")
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": [1, 4]}, {"y": [1, 3]}, weights)
    np.testing.assert_array_equal(rounded(path)["m"], weights["m"])


@pytest.mark.slow
def test_it_is_what_efficientnet_needs(tmp_path: Path) -> None:
    """Rounding to nearest gives 42 to 43 dB on these crops."""
    cells = ["onnxruntime:fp16", "openvino:fp16", "tflite:fp16"]
    evaluation = "tests.models:few_crops"
    answer = portcall.api.export(
        "examples.efficientnet_lite0:model", cells, tmp_path / "out", evaluation=evaluation
    )
    for result in answer["results"]:
        assert result["parity"]["sqnr_db"] > 46, result["backend"]
