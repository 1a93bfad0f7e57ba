"""Symmetric Q/DQ: where the pairs stand, what they hold, and that TensorRT's builder takes the files.

Long because placement is tested operator by operator.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from portcall.calibration import weights
from portcall.exporters import _encodings, _onnx, _qdq, _qdq_symmetric, tensorrt
from portcall.targets.agent.contract import Artifact, Range, Recipe, Source, Workload
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from tests.exporters.contract import BLOCKER, run_python
from tests.exporters.graphs import Array, conv_add_mul, graph_of, write_onnx

QDQ = ("QuantizeLinear", "DequantizeLinear")


def constants_of(model: Any) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def run(path: Path, inputs: Mapping[str, Array]) -> Array:
    """Run a file in ONNX Runtime as it is written, without fusions."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(inputs))[0])


def sqnr_db(reference: Array, found: Array) -> float:
    exact = reference.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


def observed(path: Path, inputs: Mapping[str, Array]) -> dict[str, Range]:
    """Return the symmetric min-max range of every tensor that needs one."""
    tensors = _qdq_symmetric.quantized_tensors(path)
    model = onnx.load(str(path))
    watched = [t for t in tensors if t not in inputs]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(t) for t in watched)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(watched, dict(inputs)) if watched else []  # an empty list would mean all outputs
    values = {**inputs, **dict(zip(watched, found, strict=True))}
    limits = {t: float(np.abs(values[t].astype(np.float64)).max()) for t in tensors}
    return {t: Range(-limit, limit, True) for t, limit in limits.items()}


def quantized(
    path: Path, inputs: Mapping[str, Array], options: Mapping[str, Any] | None = None
) -> tuple[Path, Any, tuple[str, ...]]:
    """Quantize with the ranges that *inputs* give; return the file, its model and the notes."""
    output = path.with_name(f"{path.stem}_quantized.onnx")
    files, notes = _qdq_symmetric.quantize(graph_of(path), observed(path, inputs), output, options or {})
    assert files == (output.name,)
    return output, onnx.load(str(output)), notes


def dequantized_inputs(model: Any) -> set[tuple[str, int, str]]:
    """Return what reads a dequantized tensor: (node, input number, the float tensor or weight behind it)."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    found = set()
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if node.op_type not in QDQ and name in made_by and made_by[name].op_type == "DequantizeLinear":
                integers = made_by[name].input[0]
                source = made_by[integers].input[0] if integers in made_by else integers
                found.add((node.name, index, source.removesuffix("_quantized")))
    return found


def conv(name: str, source: str, **attributes: Any) -> Any:
    return helper.make_node(
        "Conv", [source, f"w_{name}", f"b_{name}"], [name], name, pads=[1, 1, 1, 1], **attributes
    )


def relu(name: str, source: str) -> Any:
    return helper.make_node("Relu", [source], [name], name)


def residual_net(path: Path) -> Path:
    """A ResNet in small: a block with an identity shortcut, one with a projection, pooling and a classifier.

    x -> c1, r1, c2; a1 = c2 + x; r2 -> c3, r3, c4; p = projection of r2; a2 = c4 + p; r4 -> pool, flatten, gemm.
    """
    rng = np.random.default_rng(0)
    shapes = {"c1": (8, 8), "c2": (8, 8), "c3": (12, 8), "c4": (12, 12), "p": (12, 8)}
    constants = {f"w_{k}": rng.normal(0, 0.15, (*v, 3, 3)) for k, v in shapes.items()}
    constants |= {f"b_{k}": rng.normal(0, 0.2, v[0]) for k, v in shapes.items()}
    constants |= {"w_gemm": rng.normal(0, 0.3, (5, 12)), "b_gemm": rng.normal(0, 0.1, 5)}
    nodes = [
        conv("c1", "x"),
        relu("r1", "c1"),
        conv("c2", "r1"),
        helper.make_node("Add", ["c2", "x"], ["a1"], "a1"),
        relu("r2", "a1"),
        conv("c3", "r2", strides=[2, 2]),
        relu("r3", "c3"),
        conv("c4", "r3"),
        conv("p", "r2", strides=[2, 2]),
        helper.make_node("Add", ["c4", "p"], ["a2"], "a2"),
        relu("r4", "a2"),
        helper.make_node("GlobalAveragePool", ["r4"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "w_gemm", "b_gemm"], ["y"], "gemm", transB=1),
    ]
    return write_onnx(
        path,
        nodes,
        {"x": ["batch", 8, 8, 8]},
        {"y": ["batch", 5]},
        {k: v.astype(np.float32) for k, v in constants.items()},
    )


def image(seed: int = 1, batch: int = 16) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 8, 8, 8)).astype(np.float32)}


def attention(path: Path) -> Path:
    """A transformer block: four projections, two products of activations, an additive mask, a feed-forward net."""
    rng = np.random.default_rng(2)
    size, heads, inner = 32, 4, 64
    constants: dict[str, Array] = {
        f"w_{k}": rng.normal(0, 0.2, (size, size)).astype(np.float32) for k in ("q", "k", "v", "o")
    }
    constants |= {
        "w_up": rng.normal(0, 0.2, (size, inner)).astype(np.float32),
        "w_down": rng.normal(0, 0.2, (inner, size)).astype(np.float32),
        "b_up": rng.normal(0, 0.1, inner).astype(np.float32),
        "split": np.array([0, -1, heads, size // heads]),
        "join": np.array([0, -1, size]),
        "root": np.array(np.sqrt(size // heads), np.float32),
        "mask": np.triu(np.full((6, 6), -1e9, np.float32), 1),
        "one": np.ones(size, np.float32),
    }

    def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(op, list(inputs), [output], output, **attributes)

    nodes = []
    for k in ("q", "k", "v"):
        order = [0, 2, 3, 1] if k == "k" else [0, 2, 1, 3]
        nodes += [node("MatMul", ("x", f"w_{k}"), k), node("Reshape", (k, "split"), f"{k}_split")]
        nodes += [node("Transpose", (f"{k}_split",), f"{k}_heads", perm=order)]
    nodes += [
        node("MatMul", ("q_heads", "k_heads"), "scores"),
        node("Div", ("scores", "root"), "scaled"),
        node("Add", ("scaled", "mask"), "masked"),
        node("Softmax", ("masked",), "weights", axis=-1),
        node("MatMul", ("weights", "v_heads"), "mixed"),
        node("Transpose", ("mixed",), "back", perm=[0, 2, 1, 3]),
        node("Reshape", ("back", "join"), "joined"),
        node("MatMul", ("joined", "w_o"), "attended"),
        node("Add", ("x", "attended"), "residual"),
        node("LayerNormalization", ("residual", "one"), "normal"),
        node("MatMul", ("normal", "w_up"), "up"),
        node("Add", ("up", "b_up"), "biased"),
        node("Relu", ("biased",), "hidden"),
        node("MatMul", ("hidden", "w_down"), "down"),
        node("Add", ("normal", "down"), "y"),
    ]
    shape: Sequence[int | str] = ["batch", 6, size]
    return write_onnx(path, nodes, {"x": shape}, {"y": shape}, constants)


def tokens(seed: int = 3) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((8, 6, 32)).astype(np.float32)}


# placement


def test_pairs_stand_where_tensorrt_fuses_a_residual_network(tmp_path: Path) -> None:
    _, model, notes = quantized(residual_net(tmp_path / "m.onnx"), image())
    assert dequantized_inputs(model) == {
        ("c1", 0, "x"),
        ("c1", 1, "w_c1"),
        ("c2", 0, "r1"),
        ("c2", 1, "w_c2"),
        ("a1", 1, "x"),  # the identity shortcut; c2 goes into the addition as it is
        ("c3", 0, "r2"),
        ("c3", 1, "w_c3"),
        ("c4", 0, "r3"),
        ("c4", 1, "w_c4"),
        ("p", 0, "r2"),
        ("p", 1, "w_p"),
        ("a2", 1, "p"),  # of two convolutions the shorter path is the shortcut
        ("pool", 0, "r4"),
        ("gemm", 0, "flat"),
        ("gemm", 1, "w_gemm"),
    }
    by_type = [node.op_type for node in model.graph.node]
    assert by_type.count("QuantizeLinear") == 7  # x, r1, r2, r3, p, r4, flat: x and r2 are read twice
    assert by_type.count("DequantizeLinear") == 7 + 6
    assert notes == () and not model.graph.value_info
    raw = {node.name: list(node.input) for node in model.graph.node if node.op_type in ("Relu", "Add")}
    assert {k: raw[k][0] for k in raw} == {
        "r1": "c1",
        "a1": "c2",
        "r2": "a1",
        "r3": "c3",
        "a2": "c4",
        "r4": "a2",
    }


def test_the_order_of_an_additions_inputs_does_not_matter(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    for node in model.graph.node:
        if node.op_type == "Add":
            node.input[:] = list(reversed(node.input))
    onnx.save(model, path)
    _, model, _ = quantized(path, image())
    assert {use for use in dequantized_inputs(model) if use[0] in ("a1", "a2")} == {
        ("a1", 0, "x"),
        ("a2", 0, "p"),
    }


def test_an_addition_behind_no_convolution_of_its_own_is_left_alone(tmp_path: Path) -> None:
    _, model, _ = quantized(
        conv_add_mul(tmp_path / "relu.onnx"), {**small_image(), "x2": small_image(4)["x"]}
    )
    assert dequantized_inputs(model) == {("conv", 0, "x"), ("conv", 1, "w")}  # a Relu lies between
    path = residual_net(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.output.append(helper.make_tensor_value_info("c2", onnx.TensorProto.FLOAT, ["n", 8, 8, 8]))
    onnx.save(model, path)
    _, model, _ = quantized(path, image())
    assert not {use for use in dequantized_inputs(model) if use[0] == "a1"}  # c2 has to be written anyway


def small_image(channels: int = 3) -> dict[str, Array]:
    return {"x": np.random.default_rng(5).standard_normal((4, channels, 8, 8)).astype(np.float32)}


def test_both_operands_of_a_product_of_activations_are_quantized(tmp_path: Path) -> None:
    path = attention(tmp_path / "m.onnx")
    activations = ["x", "q_heads", "k_heads", "weights", "v_heads", "joined", "normal", "hidden"]
    assert _qdq_symmetric.quantized_tensors(path) == activations
    _, model, _ = quantized(path, tokens())
    found = dequantized_inputs(model)
    assert {("scores", 0, "q_heads"), ("scores", 1, "k_heads"), ("mixed", 0, "weights")} <= found
    assert not {use for use in found if use[0] in ("residual", "y", "masked")}
    assert [n.op_type for n in model.graph.node].count("QuantizeLinear") == len(activations)


@pytest.mark.parametrize("make", [residual_net, attention, conv_add_mul], ids=lambda f: f.__name__)
def test_the_tap_watches_what_is_quantized(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path / "m.onnx")
    assert set(_qdq_symmetric.quantized_tensors(path)) <= set(_qdq.tapped_tensors(path))


def test_integer_products_and_computed_weights_are_left_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["w"], ["positive"], "exp"),
        helper.make_node("Mul", ["positive", "x2"], ["kernel"], "mul"),
        helper.make_node("Conv", ["x", "kernel"], ["c"], "conv"),
        helper.make_node("Shape", ["c"], ["shape"], "shape"),
        helper.make_node("MatMul", ["shape", "integers"], ["product"], "integer_product"),
        helper.make_node("Reshape", ["c", "product"], ["flat"], "reshape"),
        helper.make_node("MatMul", ["flat", "v"], ["y"], "matmul"),
    ]
    # [1, 4, 6, 6] times this is [4, 36]
    integers = np.array([[4, 0], [0, 0], [0, 6], [0, 0]], np.int64)
    given: dict[str, Array] = {
        "w": np.zeros((4, 3, 3, 3), np.float32),
        "integers": integers,
        "v": np.ones((36, 2), np.float32),
    }
    shapes: dict[str, Sequence[int | str]] = {"x": [1, 3, 8, 8], "x2": [1]}
    path = write_onnx(tmp_path / "m.onnx", nodes, shapes, {"y": [4, 2]}, given)
    feeds = {"x": small_image()["x"][:1], "x2": np.array([0.5], np.float32)}
    _, model, notes = quantized(path, feeds)
    assert dequantized_inputs(model) == {("matmul", 0, "flat"), ("matmul", 1, "v")}
    assert notes == ("left in float32, their weights are computed at run time: conv",)


def test_what_is_quantized_already_stays_as_it_is(tmp_path: Path) -> None:
    path, model, _ = quantized(residual_net(tmp_path / "m.onnx"), image())
    assert _qdq_symmetric.quantized_tensors(path) == []
    _qdq_symmetric.quantize(graph_of(path), {}, tmp_path / "again.onnx", {})
    assert onnx.load(str(tmp_path / "again.onnx")).graph == model.graph


# scales and weights


def test_scales_are_symmetric_weights_int8_and_biases_float(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    ranges = observed(path, image())
    _, model, _ = quantized(path, image())
    found, floats = constants_of(model), constants_of(onnx.load(str(path)))
    for name, range_ in ranges.items():
        assert found[f"{name}_scale"].dtype == np.float32
        assert found[f"{name}_scale"] == np.float32(np.float32(range_.maximum) / 127)
    for name in (f"w_{k}" for k in ("c1", "c2", "c3", "c4", "p", "gemm")):
        expected = weights.quantize(floats[name], axis=0)
        np.testing.assert_array_equal(found[f"{name}_quantized"], expected.integers)
        np.testing.assert_array_equal(found[f"{name}_scale"], expected.scale)
        assert found[f"{name}_quantized"].dtype == np.int8 and expected.scale.shape == floats[name].shape[:1]
        assert name not in found  # the float weight is gone
    for name in (k for k in floats if k.startswith("b_")):
        np.testing.assert_array_equal(found[name], floats[name])
    zeros = [value for name, value in found.items() if name.endswith("_zero_point")]
    assert len(zeros) == 13 and all(z.dtype == np.int8 and not z.any() for z in zeros)


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "axis"),
    [
        ("Conv", (6, 4, 3, 3), {}, 0),
        ("Conv", (8, 1, 3, 3), {"group": 4}, 0),
        ("ConvTranspose", (4, 6, 3, 3), {}, 1),
        ("ConvTranspose", (4, 3, 3, 3), {"group": 2}, 1),
        ("Gemm", (4, 6), {}, 1),
        ("Gemm", (6, 4), {"transB": 1}, 0),
        ("MatMul", (4, 6), {}, 1),
        ("MatMul", (2, 4, 6), {}, None),
        ("MatMul", (4,), {}, None),
    ],
)
def test_channels_of_every_kind_of_weight(
    op: str, shape: tuple[int, ...], attributes: dict[str, int], axis: int | None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    weight = (rng.standard_normal(shape) * np.geomspace(0.01, 1, shape[-1])).astype(np.float32)
    nodes = [helper.make_node(op, ["x", "w"], ["y"], "node", **attributes)]
    dims = [2, 4, 5, 5] if "Conv" in op else [2, 4] if op == "Gemm" else [2, 3, 4]
    rank = len(dims) - (len(shape) == 1)
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": dims}, {"y": list("abcd")[:rank]}, {"w": weight})
    feeds = {"x": rng.standard_normal(dims).astype(np.float32)}
    output, model, _ = quantized(path, feeds)
    [node] = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "w_quantized"]
    written = {a.name: a.i for a in node.attribute}
    assert written == ({} if axis is None else {"axis": axis})
    expected = weights.quantize(weight, axis=axis)
    found = constants_of(model)
    np.testing.assert_array_equal(found["w_scale"], expected.scale)
    np.testing.assert_array_equal(found["w_quantized"], expected.integers)
    assert sqnr_db(run(path, feeds), run(output, feeds)) > 30


def test_one_scale_for_all_channels_on_request(tmp_path: Path) -> None:
    _, model, _ = quantized(residual_net(tmp_path / "m.onnx"), image(), {"weights": "tensor"})
    assert all(a.name != "axis" for n in model.graph.node if n.op_type in QDQ for a in n.attribute)
    assert constants_of(model)["w_c1_scale"].shape == ()


@pytest.mark.parametrize("options", [{"weights": "group32"}, {"weight_symmetric": False}])
def test_weights_without_an_integer_kernel_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="TensorRT's int8 kernels take no weights by") as caught:
        quantized(residual_net(tmp_path / "m.onnx"), image(), options)
    assert '"weights": "channel"' in caught.value.fix


def test_a_weight_that_others_read_too_stays_and_is_quantized_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "w"], ["b"], "second"),
        helper.make_node("Gemm", ["b", "w"], ["c"], "third", transB=1),
        helper.make_node("Add", ["c", "w"], ["y"], "add"),
    ]
    constants = {"w": rng.standard_normal((4, 4)).astype(np.float32)}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [4, 4]}, {"y": [4, 4]}, constants)
    output, model, _ = quantized(path, {"x": rng.standard_normal((4, 4)).astype(np.float32)})
    found = constants_of(model)
    assert {"w", "w_quantized", "w_2_quantized"} <= set(found)  # along axis 1 for two, along axis 0 for one
    by_type = [n.op_type for n in model.graph.node]
    assert by_type.count("DequantizeLinear") == 3 + 2 and output.exists()


def test_new_names_are_new(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    for node in model.graph.node:  # r1 becomes x_scale, the name that the scale of x would get
        for names in (node.input, node.output):
            names[:] = ["x_scale" if n == "r1" else n for n in names]
    onnx.save(model, path)
    plain = residual_net(tmp_path / "plain.onnx")
    first, second = quantized(path, image())[0], quantized(plain, image())[0]
    np.testing.assert_array_equal(run(first, image()), run(second, image()))


# what it computes


def test_a_residual_network_computes_on_integers_and_stays_close(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    output, _, _ = quantized(path, image())
    counted = _onnx.census(output, {"x": (1, 8, 8, 8)})
    conv_macs = 8 * 64 * 8 * 9 * 2 + 12 * 16 * 9 * (8 + 12 + 8)
    assert (counted.macs, counted.integer_macs, counted.float_nodes) == (conv_macs + 60, conv_macs + 60, ())
    assert sqnr_db(run(path, image(9)), run(output, image(9))) > 30


def test_a_transformer_block_computes_on_integers_and_stays_close(tmp_path: Path) -> None:
    path = attention(tmp_path / "m.onnx")
    output, _, _ = quantized(path, tokens())
    counted = _onnx.census(output, {"x": (1, 6, 32)})
    assert counted.float_nodes == () and counted.macs == counted.integer_macs
    assert counted.macs == 6 * 32 * 32 * 4 + 2 * 4 * 6 * 6 * 8 + 2 * 6 * 32 * 64
    assert sqnr_db(run(path, tokens(9)), run(output, tokens(9))) > 30


def test_float16_graphs_keep_their_type(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(str(residual_net(tmp_path / "m.onnx")))), path)
    feeds = {k: v.astype(np.float16) for k, v in image().items()}
    output, model, _ = quantized(path, feeds)
    assert [o.version for o in model.opset_import if o.domain == ""] == [19]
    found = constants_of(model)
    assert {v.dtype for k, v in found.items() if k.endswith("_scale")} == {np.dtype(np.float16)}
    assert sqnr_db(run(path, feeds), run(output, feeds)) > 30
    small = {t: Range(-1e-7, 1e-7, True) for t in _qdq_symmetric.quantized_tensors(path)}
    _qdq_symmetric.quantize(graph_of(path), small, tmp_path / "small.onnx", {})
    assert np.isfinite(run(tmp_path / "small.onnx", feeds)).all()  # no scale is 0


def test_old_operator_sets_are_raised(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "conv"), relu("y", "c")]
    constants = {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32)}
    sizes = {"x": [4, 3, 8, 8]}
    path = write_onnx(
        tmp_path / "m.onnx", nodes, sizes, {"y": [4, 4, 6, 6]}, constants, opset=11, ir_version=6
    )
    output, model, _ = quantized(path, small_image())
    assert [o.version for o in model.opset_import] == [13]
    assert sqnr_db(run(path, small_image()), run(output, small_image())) > 30


def test_bias_correction_takes_the_weights_shift_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    weight = rng.normal(0, 0.02, (4, 3, 3, 3)).astype(np.float32)
    weight[:, 0, 0, 0] = 1.0  # coarse steps for all others
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [64, 3, 8, 8]}, {"y": [64, 4, 6, 6]}, {"w": weight})
    x = rng.normal(1.0, 0.1, (64, 3, 8, 8)).astype(np.float32)
    limit = float(np.abs(x).max())
    ranges = {"x": Range(-limit, limit, True, tuple(x.mean((0, 2, 3)).tolist()))}
    shifts = []
    for wanted in (False, True):
        output = tmp_path / f"{wanted}.onnx"
        _, notes = _qdq_symmetric.quantize(graph_of(path), ranges, output, {"bias_correction": wanted})
        assert bool(notes) == wanted
        shifts.append(np.abs((run(output, {"x": x}) - run(path, {"x": x})).mean((0, 2, 3))).max())
    assert shifts[1] < 0.1 * shifts[0]


# what stays in float


def test_a_missing_range_is_named(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    ranges = {k: v for k, v in observed(path, image()).items() if k not in ("r2", "p")}
    with pytest.raises(CellFailed, match="lacks 2 tensors of this graph, first 'r2'") as caught:
        _qdq_symmetric.quantize(graph_of(path), ranges, tmp_path / "q.onnx", {})
    assert "Calibrate again" in caught.value.fix and not (tmp_path / "q.onnx").exists()


def test_nodes_kept_in_float_are_named_and_lose_their_shortcut(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    _, model, notes = quantized(path, image(), {"keep_float": ["c2", "type:Gemm"]})
    gone = {"c2", "gemm", "a1"}  # c2 is no integer convolution any more, so a1 has nothing to fuse with
    full = dequantized_inputs(quantized(path, image())[1])
    assert dequantized_inputs(model) == {use for use in full if use[0] not in gone}
    assert len(notes) == 1 and notes[0].endswith(": c2, gemm")
    with pytest.raises(BadInput, match="'nothing' matches no operator"):
        quantized(path, image(), {"keep_float": ["nothing"]})


def test_nodes_with_sentinel_values_stay_in_float_and_are_named(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    ranges = {**observed(path, image()), "r3": Range(-1e9, 1e9, True)}
    _, notes = _qdq_symmetric.quantize(graph_of(path), ranges, tmp_path / "q.onnx", {})
    found = dequantized_inputs(onnx.load(str(tmp_path / "q.onnx")))
    assert {use[0] for use in found} == {
        "c1",
        "c2",
        "a1",
        "c3",
        "p",
        "pool",
        "gemm",
    }  # nor a2, which c4 fuses with
    assert len(notes) == 1 and notes[0].endswith(": c4")


# the backend, as far as it goes without a GPU


def test_an_artifact_holds_graph_and_cache_and_can_be_interpreted(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    folder = tmp_path / "artifact"
    folder.mkdir()
    ranges = observed(path, image())
    exported = tensorrt.export(graph_of(path), Recipe("int8"), ranges, folder)
    assert exported.files == ("model.onnx", "calibration.cache", "build.json", "trtexec.txt")
    assert {p.name for p in folder.iterdir()} == set(exported.files)
    cache = _encodings.read_tensorrt_cache((folder / "calibration.cache").read_text())
    found = constants_of(onnx.load(str(folder / "model.onnx")))
    assert cache == {name: float(found[f"{name}_scale"]) for name in ranges}
    artifact = Artifact(folder, exported.entry, "tensorrt", "int8", exported.inputs, exported.outputs)
    with tensorrt.interpret(artifact, Workload()) as session:
        session.set_inputs(image())
        session.infer()
        outputs = session.get_outputs()["y"]
    np.testing.assert_allclose(outputs, run(folder / "model.onnx", image()), atol=0.05)
    assert sqnr_db(run(path, image()), outputs) > 30


PROBE = """
from portcall.exporters.tensorrt import probe
print(probe("run"))
"""


@pytest.mark.parametrize("version", ["8.5.3", "8.6.1", "10.3.0"])
def test_probe_says_what_is_missing_below_tensorrt(version: str, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text(f"__version__ = {version!r}")  # the real one is no package here
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{PROBE}"
    if version == "8.5.3":
        assert "TensorRT 8.5.3 is older than 8.6" in run_python(code)
    elif ctypes.util.find_library("cuda") is None:
        assert "no NVIDIA driver: libcuda.so.1" in run_python(code)
    else:
        pytest.skip("this machine has an NVIDIA driver; fix: run it on one without")


def test_probe_without_tensorrt_says_how_to_get_it() -> None:
    found = run_python(BLOCKER.format(missing=["tensorrt"], broken=[]) + PROBE)
    assert "not installed: tensorrt" in found and "pip install 'portcall[tensorrt]'" in found


# TensorRT's own parser and builder

BUILD = """
import pathlib
import tensorrt_rtx
from portcall.exporters._tensorrt import EngineBuilder, Limits
from portcall.targets.agent.errors import UnsupportedError
class ForAda(EngineBuilder):
    def configure(self, config):
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return super().configure(config)
try:
    profile = {{name: Limits(shape, shape, shape) for name, shape in {shapes!r}.items()}}
    print(len(bytes(ForAda(tensorrt_rtx, pathlib.Path({path!r})).build(profile))))
except UnsupportedError as error:
    print(error)
"""


def build(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Build an engine for compute capability 8.9, which needs no GPU; return its size in bytes, or the refusal."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: no builder to ask; fix: pip install tensorrt-rtx")
    return run_python(BUILD.format(path=str(path), shapes=dict(shapes))).splitlines()[-1]


def test_tensorrt_builds_a_residual_network(tmp_path: Path) -> None:
    output, _, _ = quantized(residual_net(tmp_path / "m.onnx"), image())
    assert int(build(output, {"x": (4, 8, 8, 8)})) > 10_000


def test_tensorrt_builds_a_transformer_block(tmp_path: Path) -> None:
    output, _, _ = quantized(attention(tmp_path / "m.onnx"), tokens())
    assert int(build(output, {"x": (4, 6, 32)})) > 10_000


def test_tensorrt_refuses_what_onnxruntimes_quantizer_writes(tmp_path: Path) -> None:
    path = conv_add_mul(tmp_path / "m.onnx")
    ranges = {t: Range(-1.0, 3.0) for t in _qdq.tapped_tensors(path)}
    _qdq.quantize(graph_of(path), ranges, tmp_path / "asymmetric.onnx")
    reason = build(tmp_path / "asymmetric.onnx", {"x": (1, 3, 8, 8), "x2": (1, 4, 8, 8)})
    assert "parser refuses asymmetric.onnx at" in reason and "ero zero point is not supported" in reason


@pytest.mark.slow
def test_tensorrt_builds_efficientnet_lite0(tmp_path: Path) -> None:
    code = f"""
import json, pathlib
from portcall.exporters import _onnx
from portcall.source_torch import open_torch
folder = pathlib.Path({str(tmp_path)!r})
source = open_torch("examples.efficientnet_lite0:model", "torch", folder)
(folder / "graph.json").write_text(json.dumps(_onnx.lower(source, folder).source.to_json()))
"""
    run_python(code, cwd=Path(__file__).parents[2])
    source = Source.from_json(json.loads((tmp_path / "graph.json").read_text()))
    path = tmp_path / "graph.onnx"
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    output, _, notes = quantized(path, {source.inputs[0].name: x})
    counted = _onnx.census(output, {source.inputs[0].name: (1, 3, 224, 224)})
    assert notes == () and counted.macs == counted.integer_macs and counted.float_nodes == ()
    assert int(build(output, {source.inputs[0].name: (2, 3, 224, 224)})) > 4_000_000
