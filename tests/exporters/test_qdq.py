"""Explicit Q/DQ: the ranges that are given are the ranges that are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from portcall.exporters import _qdq
from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import CellFailed
from tests.exporters.graphs import Array, conv_add_mul, graph_of, write_onnx

RANGES = {
    "x": Range(-1.5, 2.25),
    "c": Range(-3.0, 5.0),
    "r": Range(0.25, 5.0),  # zero is outside: both ends are nudged to include it
    "x2": Range(-0.75, -0.25),
    "s": Range(-0.5, 4.0),
    "y": Range(0.0, 17.0),
}


def quantized(path: Path, ranges: Mapping[str, Range], output: Path) -> tuple[Any, dict[str, Array], Any]:
    """Return the quantized graph, its constants by name, and the notes."""
    files, notes = _qdq.quantize(graph_of(path), ranges, output)
    assert files == (output.name,)
    model = onnx.load(str(output))
    return model, {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}, notes


def activation_parameters(model: Any, constants: Mapping[str, Array]) -> dict[str, tuple[float, int]]:
    """Return scale and zero point of every quantized activation, by its name in the float graph."""
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (constants[name] for name in node.input[1:])
            assert zero.dtype == np.uint8 and scale.dtype == np.float32
            found[node.input[0].removesuffix("_QuantizeLinear_Input")] = (float(scale), int(zero))
    return found


def test_taps_are_the_float_activations_around_quantizable_operators(tmp_path: Path) -> None:
    assert _qdq.tapped_tensors(conv_add_mul(tmp_path / "m.onnx")) == ["x", "c", "r", "x2", "s", "y"]


def test_taps_leave_out_integers_and_what_nothing_quantizes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sin", ["x"], ["a"], "sin"),
        helper.make_node("Cos", ["a"], ["b"], "cos"),
        helper.make_node("Shape", ["b"], ["shape"], "shape"),
        helper.make_node("Reshape", ["b", "shape"], ["c"], "reshape"),
        helper.make_node("MatMul", ["c", "w"], ["y"], "product"),
    ]
    weights = {"w": np.ones((4, 2), np.float32)}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [3, 4]}, {"y": [3, 2]}, weights)
    assert _qdq.tapped_tensors(path) == ["b", "c", "y"]


def test_scales_and_zero_points_follow_from_the_ranges(tmp_path: Path) -> None:
    model, constants, notes = quantized(conv_add_mul(tmp_path / "m.onnx"), RANGES, tmp_path / "q.onnx")
    found = activation_parameters(model, constants)
    assert set(found) == set(RANGES) - {"c"}  # Relu is absorbed: the convolution's output is quantized as r
    for name, (scale, zero) in found.items():
        low, high = min(RANGES[name].minimum, 0.0), max(RANGES[name].maximum, 0.0)
        assert scale == pytest.approx((high - low) / 255, rel=1e-6), name
        assert zero == round(-low / scale), name
    assert notes == () and not model.graph.value_info


def test_weights_are_symmetric_per_channel_and_bias_is_int32(tmp_path: Path) -> None:
    path = conv_add_mul(tmp_path / "m.onnx")
    _, constants, _ = quantized(path, RANGES, tmp_path / "q.onnx")
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    assert constants["w_quantized"].dtype == np.int8 and constants["b_quantized"].dtype == np.int32
    assert not constants["w_zero_point"].any() and not constants["b_quantized_zero_point"].any()
    scales = constants["w_scale"]
    np.testing.assert_allclose(scales, 2 * np.abs(floats["w"]).max((1, 2, 3)) / 254, rtol=1e-6)
    rebuilt = constants["w_quantized"] * scales[:, None, None, None]
    assert (np.abs(rebuilt - floats["w"]) <= 0.5001 * scales[:, None, None, None]).all()
    np.testing.assert_allclose(constants["b_quantized_scale"], scales * (3.75 / 255), rtol=1e-6)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    ranges = {k: v for k, v in RANGES.items() if k not in ("r", "s")}
    with pytest.raises(CellFailed, match="lacks 2 tensors of this graph, first 'r'") as caught:
        _qdq.quantize(graph_of(conv_add_mul(tmp_path / "m.onnx")), ranges, tmp_path / "q.onnx")
    assert "Calibrate again" in caught.value.fix and not (tmp_path / "q.onnx").exists()


def test_operators_with_sentinel_values_stay_in_float_and_are_named(tmp_path: Path) -> None:
    ranges = {**RANGES, "s": Range(-1e9, 4.0)}
    model, constants, notes = quantized(conv_add_mul(tmp_path / "m.onnx"), ranges, tmp_path / "q.onnx")
    assert "s" not in activation_parameters(model, constants)
    assert len(notes) == 1 and notes[0].endswith(": add, mul")


def test_a_constant_zero_tensor_has_a_usable_scale(tmp_path: Path) -> None:
    ranges = {**RANGES, "x2": Range(0.0, 0.0)}
    model, constants, _ = quantized(conv_add_mul(tmp_path / "m.onnx"), ranges, tmp_path / "q.onnx")
    assert activation_parameters(model, constants)["x2"][0] > 0
