"""Explicit Q/DQ: which ranges are needed, that those given are written, weights, and layers kept in float."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from portcall.calibration import weights
from portcall.exporters import _onnx, _qdq, _qdq_symmetric
from portcall.source_torch import open_torch
from portcall.targets.agent.contract import Graph, Range
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from tests.exporters.graphs import Array, conv_add_mul, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx, sqnr_db

RANGES = {
    "x": Range(-1.5, 2.25),
    "r": Range(0.25, 5.0),  # zero is outside: both ends are nudged to include it
    "x2": Range(-0.75, -0.25),
    "s": Range(-0.5, 4.0),
    "y": Range(0.0, 17.0),
}


def quantized(
    path: Path, ranges: Mapping[str, Range], output: Path, **options: Any
) -> tuple[Any, dict[str, Array], Any]:
    """Return the quantized graph, its constants by name, and the notes."""
    files, notes = _qdq.quantize(graph_of(path), ranges, output, options)
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
    # without the raw output of the convolution, which the quantizer gives the range of the Relu's output
    assert _qdq.tapped_tensors(conv_add_mul(tmp_path / "m.onnx")) == ["x", "r", "x2", "s", "y"]


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
    assert set(found) == set(RANGES)
    assert "Relu" not in {n.op_type for n in model.graph.node}
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


# which tensors are tapped


def activations(
    folder: Path, last: str = "y", outputs: Mapping[str, Any] | None = None, opset: int = 18
) -> Path:
    """conv -> Relu -> Clip -> matrix product -> Relu: c, r and p are raw."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Clip", ["r", "low", "high"], ["k"], "clip"),
        helper.make_node("MatMul", ["k", "v"], ["p"], "product"),
        helper.make_node("Relu", ["p"], [last], "last"),
    ]
    rng = np.random.default_rng(0)
    held = {
        "w": rng.standard_normal((4, 3, 1, 1)),
        "v": rng.standard_normal((6, 5)),
        "low": np.asarray(0.0),
        "high": np.asarray(2.0),
    }
    arrays = {k: v.astype(np.float32) for k, v in held.items()}
    shapes: dict[str, Any] = {last: [1, 4, 6, 5], **(outputs or {})}
    return write_onnx(folder / "m.onnx", nodes, {"x": [1, 3, 6, 6]}, shapes, arrays, opset)


def test_a_chain_of_activations_is_tapped_at_its_end(tmp_path: Path) -> None:
    path = activations(tmp_path)
    assert _qdq.tapped_tensors(path) == ["x", "k", "y"]
    ranges = {"x": Range(-1, 1), "k": Range(0, 1.5), "y": Range(0, 3)}
    model, constants, _ = quantized(path, ranges, tmp_path / "q.onnx")
    assert [n.op_type for n in model.graph.node if "Linear" not in n.op_type] == ["Conv", "MatMul"]
    found = activation_parameters(model, constants)
    assert {k: s for k, (s, _) in found.items()} == pytest.approx(
        {"x": 2 / 255, "k": 1.5 / 255, "y": 3 / 255}
    )


@pytest.mark.parametrize(("seen", "tapped"), [("c", ["x", "c", "k", "y"]), ("r", ["x", "k", "r", "y"])])
def test_what_something_else_sees_is_tapped(tmp_path: Path, seen: str, tapped: list[str]) -> None:
    path = activations(tmp_path, outputs={seen: [1, 4, 6, 6]})
    assert sorted(_qdq.tapped_tensors(path)) == sorted(tapped)
    samples = [{"x": np.random.default_rng(1).standard_normal((1, 3, 6, 6)).astype(np.float32)}]
    _qdq.quantize(graph_of(path), onnx_ranges(path, samples), tmp_path / "q.onnx")
    for one, other in zip(run_onnx(path, samples)[0], run_onnx(tmp_path / "q.onnx", samples)[0], strict=True):
        assert sqnr_db(one, other) > 30


@pytest.mark.parametrize(
    ("low", "high", "absorbed"), [(0.0, 6.0, True), (-1.0, 1.0, True), (0.5, 6.0, False)]
)
@pytest.mark.parametrize("opset", [10, 18])
def test_a_clip_from_above_zero_stays(
    tmp_path: Path, low: float, high: float, absorbed: bool, opset: int
) -> None:
    """ONNX Runtime removes every Clip: one that keeps a divisor from zero would be gone."""
    bounds = {"low": np.float32(low), "high": np.float32(high)} if opset > 10 else {}
    attributes = {} if bounds else {"min": low, "max": high}
    nodes = [
        helper.make_node("Add", ["x", "x2"], ["s"], "add"),
        helper.make_node("Clip", ["s", *bounds], ["d"], "clip", **attributes),
        helper.make_node("Div", ["x", "d"], ["y"], "div"),
    ]
    held = {k: np.asarray(v) for k, v in bounds.items()}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [64], "x2": [64]}, {"y": [64]}, held, opset, 5)
    assert _qdq.tapped_tensors(path) == ["x", "x2", *([] if absorbed else ["s"]), "d"]
    rng = np.random.default_rng(0)
    samples = [{k: rng.standard_normal(64).astype(np.float32) for k in ("x", "x2")} for _ in range(2)]
    model, _, notes = quantized(path, onnx_ranges(path, samples), tmp_path / "q.onnx", weights="tensor")
    assert ("Clip" in {n.op_type for n in model.graph.node}) == (not absorbed) and notes == ()
    if not absorbed:
        wanted, out = ([r[0] for r in run_onnx(p, samples)] for p in (path, tmp_path / "q.onnx"))
        assert sqnr_db(wanted, out) > 30


@pytest.fixture(scope="module")
def small_graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    """The canonical graphs of all small models of ``tests.models``."""
    found = {}
    for name in ("digits", "tiny_cnn", "two_inputs"):
        folder = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporters deprecate parts of each other
            found[name] = _onnx.lower(open_torch(f"tests.models:{name}", "torch", folder), folder)
    return found


@pytest.mark.parametrize("name", ["digits", "tiny_cnn", "two_inputs"])
def test_the_quantizer_reads_no_range_beyond_the_taps(
    small_graphs: dict[str, Graph], tmp_path: Path, name: str
) -> None:
    graph = small_graphs[name]
    names = _qdq.tapped_tensors(graph.path)
    for options in ({}, {"weights": "tensor", "bias_correction": True}):
        _qdq.quantize(graph, {n: Range(-1.0, 3.0) for n in names}, tmp_path / "q.onnx", options)
        model = onnx.load(str(tmp_path / "q.onnx"))
        assert sum(n.op_type == "QuantizeLinear" for n in model.graph.node) >= 3
    raw = {n.input[0] for n in onnx.load(str(graph.path)).graph.node if n.op_type in ("Relu", "Clip")}
    assert raw and not raw & set(names)
    assert set(_qdq_symmetric.quantized_tensors(graph.path)) <= set(names)
    assert set(_qdq.weighted_inputs(graph.path)) <= set(names)


def test_weighted_inputs_carry_the_axis_of_their_channels(tmp_path: Path) -> None:
    assert _qdq.weighted_inputs(activations(tmp_path)) == {"x": 1, "k": -1}
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["a"], "two activations"),
        helper.make_node("MatMul", ["w", "a"], ["b"], "a weight on the left"),
        helper.make_node("Gemm", ["b", "w"], ["y"], "gemm"),
    ]
    weights = {"w": np.ones((4, 4), np.float32)}
    path = write_onnx(tmp_path / "p.onnx", nodes, {"x": [4, 4]}, {"y": [4, 4]}, weights)
    assert _qdq.weighted_inputs(path) == {"b": -1}


def test_control_flow_is_refused_by_name(tmp_path: Path) -> None:
    def body(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2])
        return helper.make_graph([helper.make_node("Identity", ["x"], [name])], name, [], [output])

    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        helper.make_node("Cast", ["m"], ["condition"], "cast", to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], "choose", then_branch=body("a"), else_branch=body("b")),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2]}, {"y": [2]}, {})
    with pytest.raises(UnsupportedError, match=r"cannot be calibrated: choose \(If\)\.") as caught:
        _qdq.check_no_control_flow(onnx.load(str(path)))
    assert "without calibration" in caught.value.fix
    with pytest.raises(UnsupportedError, match="choose"):
        _qdq.quantize(graph_of(path), {}, tmp_path / "q.onnx")
    _qdq.check_no_control_flow(onnx.load(str(conv_add_mul(tmp_path / "plain.onnx"))))


# weights


@pytest.mark.parametrize(
    ("options", "axis", "symmetric"),
    [
        ({}, 0, True),
        ({"weights": "channel"}, 0, True),
        ({"weights": "tensor"}, None, True),
        ({"weights": "tensor", "weight_symmetric": False}, None, False),
    ],
)
def test_integers_are_those_of_calibration_weights(
    tmp_path: Path, options: dict[str, Any], axis: int | None, symmetric: bool
) -> None:
    path = activations(tmp_path)
    ranges = {"x": Range(-1, 1), "k": Range(0, 1.5), "y": Range(0, 3)}
    _, constants, _ = quantized(path, ranges, tmp_path / "q.onnx", **options)
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    for name, channels in (("w", 0), ("v", 1)):
        wanted = weights.quantize(floats[name], 8, symmetric, None if axis is None else channels)
        np.testing.assert_array_equal(constants[f"{name}_scale"], wanted.scale)
        np.testing.assert_array_equal(constants[f"{name}_zero_point"], wanted.zero_point)
        np.testing.assert_array_equal(constants[f"{name}_quantized"], wanted.integers)


@pytest.mark.parametrize("options", [{"weights": "tensor"}, {"weights": "tensor", "weight_symmetric": False}])
def test_weights_per_tensor_compute_on_integers(tmp_path: Path, options: dict[str, Any]) -> None:
    path = activations(tmp_path)
    rng = np.random.default_rng(1)
    samples = [{"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(4)]
    ranges = onnx_ranges(path, samples)
    quantized(path, ranges, tmp_path / "q.onnx", **options)
    found = _onnx.census(tmp_path / "q.onnx", {"x": (1, 3, 6, 6)})
    assert found.integer_macs == found.macs == 4 * 36 * 3 + 24 * 5 * 6
    wanted, out = ([r[0] for r in run_onnx(p, samples)] for p in (path, tmp_path / "q.onnx"))
    assert sqnr_db(wanted, out) > 30


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ({"weights": "group32"}, "weights in groups of 32", "int8-weights or int4-weights"),
        ({"weights": "group128", "weight_symmetric": False}, "weights in groups of 128", "int4-weights"),
        ({"weight_symmetric": False}, "one zero point for all channels", '"weights": "tensor"'),
    ],
)
def test_weights_that_no_kernel_takes_are_unsupported(
    tmp_path: Path, options: dict[str, Any], message: str, fix: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        quantized(conv_add_mul(tmp_path / "m.onnx"), RANGES, tmp_path / "q.onnx", **options)
    assert fix in caught.value.fix and not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(("weights_option", "opset"), [("channel", 13), ("tensor", 11)])
def test_an_old_operator_set_is_raised_as_far_as_needed(
    tmp_path: Path, weights_option: str, opset: int
) -> None:
    """DequantizeLinear has an axis since operator set 13."""
    path = activations(tmp_path, opset=11)
    samples = [{"x": np.random.default_rng(1).standard_normal((1, 3, 6, 6)).astype(np.float32)}]
    ranges = onnx_ranges(path, samples)
    model, _, _ = quantized(path, ranges, tmp_path / "q.onnx", weights=weights_option)
    assert [o.version for o in model.opset_import if not o.domain] == [opset]
    wanted, out = (run_onnx(p, samples)[0][0] for p in (path, tmp_path / "q.onnx"))
    assert sqnr_db(wanted, out) > 30


# layers kept in float


@pytest.mark.parametrize(
    ("pattern", "kept", "quantized_activations"),
    [
        ("conv", ["conv"], {"r", "x2", "s", "y"}),
        ("type:Mul", ["mul"], {"x", "r", "x2", "s"}),
        ("m*", ["mul"], {"x", "r", "x2", "s"}),
        # the Relu would be absorbed by the convolution: both stay
        ("type:RELU", ["conv", "relu"], {"r", "x2", "s", "y"}),
    ],
)
def test_layers_are_kept_in_float(
    tmp_path: Path, pattern: str, kept: list[str], quantized_activations: set[str]
) -> None:
    path = conv_add_mul(tmp_path / "m.onnx")
    model, constants, notes = quantized(path, RANGES, tmp_path / "q.onnx", keep_float=[pattern])
    assert notes == (f"left in float32 as asked (keep_float): {', '.join(kept)}",)
    assert set(activation_parameters(model, constants)) == quantized_activations
    assert ("w_quantized" in constants) == ("conv" not in kept)
    found = _onnx.census(tmp_path / "q.onnx", {"x": (1, 3, 8, 8), "x2": (1, 4, 8, 8)})
    assert found.float_nodes == (("conv",) if "conv" in kept else ())


def test_an_absorbed_activation_with_sentinel_values_takes_its_convolution_along(tmp_path: Path) -> None:
    model, constants, notes = quantized(
        conv_add_mul(tmp_path / "m.onnx"), {**RANGES, "r": Range(0.0, 1e5)}, tmp_path / "q.onnx"
    )
    assert set(activation_parameters(model, constants)) == {"s", "y"}
    assert len(notes) == 1 and notes[0].endswith(": conv, relu, add")


def test_a_pattern_without_a_match_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'convv' matches no operator") as caught:
        quantized(conv_add_mul(tmp_path / "m.onnx"), RANGES, tmp_path / "q.onnx", keep_float=["convv"])
    assert "'conv'" in caught.value.fix and not (tmp_path / "q.onnx").exists()


# transformers


def transformer_block(path: Path) -> Path:
    """y = n + gelu-less feed-forward of n, n = LayerNormalization(x); tensors x, n, up, r, down, y."""
    rng = np.random.default_rng(6)
    constants = {
        "gain": np.ones(16, np.float32),
        "w1": (rng.standard_normal((16, 32)) / 4).astype(np.float32),
        "w2": (rng.standard_normal((32, 16)) / 4).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "w1"], ["up"], "up_product"),
        helper.make_node("Tanh", ["up"], ["r"], "squash"),
        helper.make_node("MatMul", ["r", "w2"], ["down"], "down_product"),
        helper.make_node("Add", ["n", "down"], ["y"], "residual"),
    ]
    return write_onnx(path, nodes, {"x": ["batch", 4, 16]}, {"y": ["batch", 4, 16]}, constants)


def test_of_a_transformer_only_what_products_read_is_quantized(tmp_path: Path) -> None:
    path = transformer_block(tmp_path / "m.onnx")
    assert _qdq.tapped_tensors(path) == ["n", "r"]
    ranges = {"n": Range(-4.0, 4.0), "r": Range(-1.0, 1.0)}
    model, constants, _ = quantized(path, ranges, tmp_path / "q.onnx")
    assert set(activation_parameters(model, constants)) == {"n", "r"}
    found = _onnx.census(tmp_path / "q.onnx", {"x": (1, 4, 16)})
    assert found.integer_macs == found.macs == 2 * 4 * 16 * 32
    # the sum beside the products reads the float tensor
    [residual] = [n for n in model.graph.node if n.name == "residual"]
    assert "n" in residual.input
    x = np.random.default_rng(7).standard_normal((3, 4, 16)).astype(np.float32)
    wanted, out = (run_onnx(p, [{"x": x}])[0][0] for p in (path, tmp_path / "q.onnx"))
    assert sqnr_db(wanted, out) > 30
