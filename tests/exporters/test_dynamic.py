"""Dynamic int8: per-channel convolution weights, and nothing lost from the graph around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from portcall.calibration import weights
from portcall.exporters import _dynamic, _onnx
from portcall.targets.agent.errors import BadInput, UnsupportedError
from tests.exporters.graphs import Array, conv_add_mul, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx, sqnr_db


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, inputs)[0]
    return found


def test_convolutions_become_integer_with_a_scale_per_channel(tmp_path: Path) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    assert _dynamic.quantize(graph, tmp_path / "q.onnx") == (("q.onnx",), ())
    model = onnx.load(str(tmp_path / "q.onnx"))
    kinds = [n.op_type for n in model.graph.node]
    assert "Conv" not in kinds and kinds.count("ConvInteger") == 1
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    assert shapes["conv_weight_scale"] == (1, 4, 1, 1) and "w" not in shapes
    rng = np.random.default_rng(1)
    x, x2 = (rng.standard_normal((2, c, 8, 8)).astype(np.float32) for c in (3, 4))
    wanted, found = run(graph.path, x=x, x2=x2), run(tmp_path / "q.onnx", x=x, x2=x2)
    assert 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()) > 30


def test_weights_that_only_a_branch_uses_are_kept(tmp_path: Path) -> None:
    def branch(node: onnx.NodeProto) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [1, 4, 6, 6])
        return helper.make_graph([node], node.output[0], [], [output])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["positive"], "greater"),
        helper.make_node(
            "If",
            ["positive"],
            ["y"],
            "if",
            then_branch=branch(helper.make_node("Add", ["c", "k"], ["added"])),
            else_branch=branch(helper.make_node("Identity", ["c"], ["same"])),
        ),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "k": np.full(1, 5, np.float32),
        "zero": np.zeros((), np.float32),
    }
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 6, 6]}, weights)
    _dynamic.quantize(graph_of(path), tmp_path / "q.onnx")
    x = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "q.onnx", x=x), run(path, x=x), atol=0.3)


def layers(folder: Path) -> Path:
    """conv -> product -> Gemm, each named after its type."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "m": (6, 5), "g": (7, 20), "b": (7,)}
    held = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("MatMul", ["c", "m"], ["p"], "product"),
        helper.make_node("ReduceMean", ["p"], ["a"], "mean", axes=[2], keepdims=0),
        helper.make_node("Flatten", ["a"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "g", "b"], ["y"], "gemm", transB=1),
    ]
    return write_onnx(
        folder / "m.onnx", nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 7]}, held, opset=17, ir_version=8
    )


def images(count: int = 4) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def quality(path: Path, output: Path) -> float:
    wanted, out = ([r[0] for r in run_onnx(p, images())] for p in (path, output))
    return sqnr_db(wanted, out)


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, False),
        ({"weights": "channel"}, True),
        ({"weights": "tensor"}, False),
        ({"weights": "tensor", "weight_symmetric": False}, False),
    ],
)
def test_integers_are_those_of_calibration_weights(
    tmp_path: Path, options: dict[str, Any], channels: bool
) -> None:
    path = layers(tmp_path)
    _dynamic.quantize(graph_of(path), tmp_path / "q.onnx", options)
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "q.onnx")).graph.initializer}
    for name, weight in (("m", before["m"]), ("g", before["g"].T)):
        wanted = weights.quantize(weight, 8, False, 1 if channels else None)
        np.testing.assert_array_equal(held[f"{name}_scale"], wanted.scale)
        np.testing.assert_array_equal(
            held[f"{name}_quantized"].astype(int), wanted.integers.astype(int) + 128
        )
        np.testing.assert_array_equal(
            held[f"{name}_zero_point"].astype(int), wanted.zero_point.astype(int) + 128
        )
    per_tensor, conv_symmetric = options.get("weights") == "tensor", options.get("weight_symmetric", True)
    wanted = weights.quantize(before["w"], 8, conv_symmetric, None if per_tensor else 0)
    np.testing.assert_array_equal(held["conv_weight_scale"].ravel(), wanted.scale.ravel())
    np.testing.assert_array_equal(held["conv_weight_uint8"].astype(int), wanted.integers.astype(int) + 128)
    assert int(held["conv_weight_zero_point"]) == int(wanted.zero_point.flat[0]) + 128
    assert quality(path, tmp_path / "q.onnx") > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "group64"}, "weights in groups of 64"),
        ({"weight_symmetric": False}, "one zero point for all channels"),
    ],
)
def test_weights_that_no_kernel_takes_are_unsupported(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        _dynamic.quantize(graph_of(layers(tmp_path)), tmp_path / "q.onnx", options)
    assert caught.value.fix and not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("name", ["conv", "product", "gemm"])
def test_layers_are_kept_in_float(tmp_path: Path, name: str) -> None:
    path = layers(tmp_path)
    _, notes = _dynamic.quantize(graph_of(path), tmp_path / "q.onnx", {"keep_float": [name]})
    assert notes == (f"left in float32 as asked (keep_float): {name}",)
    found = _onnx.census(tmp_path / "q.onnx", {"x": (1, 3, 8, 8)})
    macs = {"conv": 4 * 36 * 27, "product": 4 * 6 * 6 * 5, "gemm": 20 * 7}
    assert found.macs == sum(macs.values()) and found.integer_macs == found.macs - macs[name]
    assert len(found.float_nodes) == 1
    assert quality(path, tmp_path / "q.onnx") > 30


def test_a_pattern_without_a_match_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'type:Softmax' matches no operator"):
        _dynamic.quantize(graph_of(layers(tmp_path)), tmp_path / "q.onnx", {"keep_float": ["type:Softmax"]})


def test_biases_are_corrected_where_means_are_known(tmp_path: Path) -> None:
    path = layers(tmp_path)
    graph, options = graph_of(path), {"bias_correction": True}
    _, notes = _dynamic.quantize(graph, tmp_path / "q.onnx", options)
    assert notes == ()  # nothing was calibrated
    _, notes = _dynamic.quantize(graph, tmp_path / "q.onnx", options, onnx_ranges(path, images()))
    assert notes[0] == "bias corrected in 2 layers" and notes[1].endswith("there: product")
    assert quality(path, tmp_path / "q.onnx") > 30


def test_an_empty_bias_is_no_bias(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w", ""], ["y"], "conv")
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": [1, 3, 8, 8]}, {"y": [1, 4, 6, 6]}, {"w": weight})
    _dynamic.quantize(graph_of(path), tmp_path / "q.onnx")
    model = onnx.load(str(tmp_path / "q.onnx"))
    assert [t.dims for t in model.graph.initializer if t.name == "conv_weight_scale"] == [[1, 4, 1, 1]]
    assert quality(path, tmp_path / "q.onnx") > 30
