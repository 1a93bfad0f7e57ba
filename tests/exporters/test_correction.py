"""Bias correction of ONNX graphs: known numbers, every kind of layer, and what cannot be corrected is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from portcall.calibration import weights
from portcall.exporters import _correction, _dynamic, _qdq, _weight_only
from portcall.targets.agent.contract import Range
from tests.exporters.graphs import Array, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx


def f32(*values: Any) -> Array:
    return np.asarray(values, np.float32)


def coarse(node: Any, weight: Array) -> Array:
    """Round so coarsely that the mean of every output shifts."""
    rounded: Array = weights.quantize(weight, bits=4).dequantize()
    return rounded


def corrected(
    path: Path, samples: Sequence[Mapping[str, Array]], rebuild: Callable[[Any, Any], Any] = coarse
) -> tuple[Any, tuple[str, ...]]:
    """Return the model with corrected biases, and the notes."""
    model = onnx.load(str(path))
    ranges = onnx_ranges(path, samples)
    return model, _correction.correct(model, ranges, _qdq.weighted_inputs(path), rebuild)


def mean_errors(path: Path, model: Any, samples: Sequence[Mapping[str, Array]], axis: int) -> Array:
    """Return |mean difference| of every output channel: float against rounded weights with the biases of *model*."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    tensors = {t.name: t for t in rounded.graph.initializer}
    for node in rounded.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            tensor = tensors[node.input[1]]
            values = coarse(node, numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    other = path.with_name("rounded.onnx")
    onnx.save(rounded, str(other))
    differences = [
        a[0] - b[0] for a, b in zip(run_onnx(path, samples), run_onnx(other, samples), strict=True)
    ]
    moved = [np.moveaxis(d, axis, -1).reshape(-1, d.shape[axis]) for d in differences]
    means: Array = np.abs(np.concatenate(moved).mean(0, np.float64))
    return means


def flat_images(channels: int, count: int = 6) -> list[dict[str, Array]]:
    """Images of one value per channel: no border has another mean than the middle."""
    rng = np.random.default_rng(5)
    values = rng.normal(1.0, 1.0, (count, 1, channels, 1, 1)).astype(np.float32)
    return [{"x": np.broadcast_to(v, (1, channels, 6, 6)).copy()} for v in values]


def rows(features: int, count: int = 6) -> list[dict[str, Array]]:
    rng = np.random.default_rng(6)
    return [{"x": rng.normal(1.0, 1.0, (3, features)).astype(np.float32)} for _ in range(count)]


CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    "plain": (4, (6, 4, 3, 3), {}),
    "strided": (4, (6, 4, 3, 2), {"strides": [2, 1]}),
    "groups": (6, (4, 3, 3, 3), {"group": 2}),
    "depthwise": (5, (5, 1, 3, 3), {"group": 5}),
    "depthwise, multiplier 2": (3, (6, 1, 3, 3), {"group": 3}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_mean_of_a_convolution_is_restored(tmp_path: Path, case: str, bias: bool) -> None:
    channels, shape, attributes = CONVOLUTIONS[case]
    rng = np.random.default_rng(0)
    held = {"w": rng.standard_normal(shape).astype(np.float32)}
    held.update({"b": rng.standard_normal(shape[0]).astype(np.float32)} if bias else {})
    node = helper.make_node("Conv", ["x", *held], ["y"], "conv", **attributes)
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": [1, channels, 6, 6]}, {"y": None}, held)
    samples = flat_images(channels)
    model, notes = corrected(path, samples)
    assert notes == ("bias corrected in 1 layers",)
    assert mean_errors(path, onnx.load(str(path)), samples, 1).max() > 0.05
    assert mean_errors(path, model, samples, 1).max() < 1e-5
    assert len(model.graph.initializer) == 2  # a bias of its own is overwritten, a missing one added


GEMMS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...] | None]] = {
    "plain": ({}, (8, 5), (5,)),
    "transB": ({"transB": 1}, (5, 8), (5,)),
    "no bias": ({"transB": 1}, (5, 8), None),
    "alpha and beta": ({"alpha": 0.5, "beta": 2.0}, (8, 5), (5,)),
    "scalar bias": ({}, (8, 5), (1,)),
    "row bias": ({}, (8, 5), (1, 5)),
    "matrix bias": ({}, (8, 5), (3, 5)),
}


@pytest.mark.parametrize("case", GEMMS)
def test_the_mean_of_a_gemm_is_restored(tmp_path: Path, case: str) -> None:
    attributes, shape, bias = GEMMS[case]
    rng = np.random.default_rng(1)
    held = {"w": rng.standard_normal(shape).astype(np.float32)}
    if bias is not None:
        held["b"] = rng.standard_normal(bias).astype(np.float32)
    node = helper.make_node("Gemm", ["x", *held], ["y"], "gemm", **attributes)
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": [3, 8]}, {"y": [3, 5]}, held)
    model, notes = corrected(path, rows(8))
    assert notes == ("bias corrected in 1 layers",)
    assert mean_errors(path, onnx.load(str(path)), rows(8), 1).max() > 0.05
    assert mean_errors(path, model, rows(8), 1).max() < 1e-5


@pytest.mark.parametrize("order", [["p", "b"], ["b", "p"]])
@pytest.mark.parametrize("shape", [(5,), (1, 1, 5), (1,)])
def test_a_matrix_product_is_corrected_in_the_addition_after_it(
    tmp_path: Path, order: list[str], shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(2)
    held = {"w": rng.standard_normal((8, 5)), "b": rng.standard_normal(shape)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("Add", order, ["y"], "add"),
    ]
    arrays = {k: v.astype(np.float32) for k, v in held.items()}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 3, 8]}, {"y": [2, 3, 5]}, arrays)
    samples = [{"x": np.stack([r["x"], r["x"] + 1])} for r in rows(8)]
    model, notes = corrected(path, samples)
    assert notes == ("bias corrected in 1 layers",)
    assert mean_errors(path, onnx.load(str(path)), samples, 2).max() > 0.05
    assert mean_errors(path, model, samples, 2).max() < 1e-5


def test_the_shift_is_the_sum_of_weight_errors_times_means(tmp_path: Path) -> None:
    weight = f32([0.4, 1.6], [0.5, -2.0])  # [inputs, outputs]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm")
    path = write_onnx(
        tmp_path / "m.onnx", [node], {"x": [1, 2]}, {"y": [1, 2]}, {"w": weight, "b": f32(10, 20)}
    )
    model = onnx.load(str(path))
    ranges = {"x": Range(-1, 9, channel_mean=(2.0, 8.0)), "y": Range(0, 1)}
    _correction.correct(model, ranges, {"x": -1}, lambda n, w: np.rint(w))
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    # Q(W) - W = [[-0.4, 0.4], [-0.5, 0]]: the means shift by 2 * -0.4 + 8 * -0.5 and by 2 * 0.4
    np.testing.assert_allclose(held["b"], [10 + 4.8, 20 - 0.8], rtol=1e-6)
    np.testing.assert_array_equal(held["w"], weight)


def test_a_bias_that_others_read_stays_for_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    held = {"w": rng.standard_normal((4, 4)).astype(np.float32), "b": f32(1, 2, 3, 4)}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "one"),
        helper.make_node("Gemm", ["h", "w", "b"], ["z"], "two"),
        helper.make_node("Add", ["z", "b"], ["y"], "add"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [3, 4]}, {"y": [3, 4]}, held)
    model, notes = corrected(path, rows(4))
    assert notes == ("bias corrected in 2 layers",)
    after = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    np.testing.assert_array_equal(after["b"], held["b"])
    one, two, add = model.graph.node
    assert len({one.input[2], two.input[2], add.input[1]}) == 3 and add.input[1] == "b"
    assert not np.array_equal(after[one.input[2]], after[two.input[2]])


def uncorrectable(folder: Path) -> Path:
    rng = np.random.default_rng(4)
    held = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in "abcdeft"}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], "no addition"),
        helper.make_node("MatMul", ["p", "b"], ["q"], "addition of an activation"),
        helper.make_node("Add", ["q", "x"], ["r"], "residual"),
        helper.make_node("MatMul", ["r", "c"], ["s"], "read twice"),
        helper.make_node("Add", ["s", "row"], ["t1"], "add"),
        helper.make_node("Mul", ["s", "t1"], ["u"], "mul"),
        helper.make_node("Gemm", ["u", "d", "x"], ["v"], "activation as bias"),
        helper.make_node("Gemm", ["v", "e"], ["g"], "transposed", transA=1),
        helper.make_node("MatMul", ["g", "f"], ["k"], "corrected"),
        helper.make_node("Add", ["k", "row2"], ["y"], "last"),
    ]
    held.update({"row": f32(1, 2, 3, 4), "row2": f32(4, 3, 2, 1)})
    return write_onnx(folder / "m.onnx", nodes, {"x": [4, 4]}, {"y": [4, 4]}, held)


def test_what_cannot_be_corrected_is_named(tmp_path: Path) -> None:
    path = uncorrectable(tmp_path)
    samples = [
        {"x": r["x"]} for r in [{"x": np.random.default_rng(7).normal(1, 1, (4, 4)).astype(np.float32)}]
    ]
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    model, notes = corrected(path, samples)
    assert notes == (
        "bias corrected in 1 layers",
        "bias not corrected, no channel means or no constant bias there: no addition, addition of an activation, "
        "read twice, activation as bias, transposed",
    )
    after = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {k for k in after if not np.array_equal(after[k], before[k])} == {"row2"}


def test_without_means_nothing_is_touched(tmp_path: Path) -> None:
    path = uncorrectable(tmp_path)
    before = onnx.load(str(path)).SerializeToString()
    model = onnx.load(str(path))
    axes = _qdq.weighted_inputs(path)
    assert _correction.correct(model, None, axes, coarse) == ()
    assert model.SerializeToString() == before
    ranges = {name: Range(-1, 1) for name in _qdq.tapped_tensors(path)}
    notes = _correction.correct(model, ranges, axes, coarse)
    assert notes[0] == "bias corrected in 0 layers" and notes[1].endswith("transposed and 1 more")
    assert model.SerializeToString() == before
    assert _correction.correct(model, ranges, axes, lambda node, weight: None) == (
        "bias corrected in 0 layers",
    )


def layer(folder: Path) -> tuple[Path, list[dict[str, Array]]]:
    """One 1x1 convolution whose weights differ in size by channel, one channel dead: one scale for all is coarse."""
    rng = np.random.default_rng(8)
    sizes = np.asarray([4.0, 1.0, 0.3, 0.05, 0.0, 2.0]).reshape(6, 1, 1, 1)
    held = {"w": rng.standard_normal((6, 8, 1, 1)) * sizes, "b": rng.standard_normal(6)}
    arrays = {k: v.astype(np.float32) for k, v in held.items()}
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv")
    path = write_onnx(folder / "m.onnx", [node], {"x": [1, 8, 6, 6]}, {"y": [1, 6, 6, 6]}, arrays)
    samples = [{"x": rng.normal(2.0, 1.0, (1, 8, 6, 6)).astype(np.float32)} for _ in range(8)]
    return path, samples


def channel_errors(path: Path, quantized: Path, samples: list[dict[str, Array]]) -> Array:
    pairs = zip(run_onnx(path, samples), run_onnx(quantized, samples), strict=True)
    found: Array = np.abs(np.mean([(b[0] - a[0]).mean((0, 2, 3), np.float64) for a, b in pairs], 0))
    return found


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights"])
def test_exports_restore_the_means_of_a_layer(tmp_path: Path, precision: str) -> None:
    path, samples = layer(tmp_path)
    ranges, graph = onnx_ranges(path, samples), graph_of(path)
    errors = {}
    for correction in (False, True):
        output = tmp_path / f"{correction}.onnx"
        options = {"weights": "tensor", "bias_correction": correction}
        if precision == "int8":
            _, notes = _qdq.quantize(graph, ranges, output, options)
        elif precision == "int8-dynamic":
            _, notes = _dynamic.quantize(graph, output, options, ranges)
        else:
            _, notes = _weight_only.quantize(graph, precision, ranges, output, options)
        assert [n for n in notes if "bias" in n] == (["bias corrected in 1 layers"] if correction else [])
        errors[correction] = channel_errors(path, output, samples)
    # What is left is the rounding of activations: next to nothing over 288 values, but half a step of a constant.
    step, dead = (ranges["y"].maximum - ranges["y"].minimum) / 255, 4
    assert errors[True][dead] < 0.501 * step and errors[False][dead] < 0.501 * step
    before, after = (np.delete(errors[correction], dead).max() for correction in (False, True))
    assert after < (1e-5 if precision == "int8-weights" else before / 4)
    assert before > 0.02


def test_layers_kept_in_float_keep_their_bias(tmp_path: Path) -> None:
    path, samples = layer(tmp_path)
    options = {"weights": "tensor", "bias_correction": True, "keep_float": ["conv"]}
    output = tmp_path / "q.onnx"
    _, notes = _qdq.quantize(graph_of(path), onnx_ranges(path, samples), output, options)
    assert notes == ("left in float32 as asked (keep_float): conv", "bias corrected in 0 layers")
    assert channel_errors(path, output, samples).max() == 0
