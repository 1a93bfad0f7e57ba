"""Graphs typed float16 or bfloat16: which tensors are half, what stays in float32, and what the result computes.

Long because what stays in float32 is tested graph by graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from portcall.exporters import _half, _half_interpret, _half_weights, _onnx, tensorrt
from portcall.targets.agent.contract import Artifact, Recipe, Workload
from portcall.targets.agent.errors import BadInput
from tests.exporters.graphs import Array, graph_of, write_onnx
from tests.exporters.test_qdq_symmetric import attention, image, observed, residual_net, run, sqnr_db, tokens

PRECISIONS = ("fp16", "bf16")
DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def converted(path: Path, precision: str, *keep_float: str) -> tuple[Path, Any, tuple[str, ...]]:
    """Convert a file; return the new one, its model, checked with inferred types, and the notes."""
    model = onnx.load(str(path))
    notes = _half.convert(model, precision, keep_float)
    output = path.with_name(f"{path.stem}_{precision}.onnx")
    _onnx.save(model, output)
    onnx.checker.check_model(str(output), full_check=True)
    return output, onnx.load(str(output)), notes


def interpreted(path: Path, inputs: Mapping[str, Array]) -> Array:
    rounding = path.with_name(f"{path.stem}_rounding.onnx")
    _half_interpret.write_rounding(path, rounding)
    return run(rounding, inputs)


def types_of(model: Any) -> dict[str, int]:
    values = [
        *onnx.shape_inference.infer_shapes(model).graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ]
    return {v.name: v.type.tensor_type.elem_type for v in values}


def half_nodes(model: Any, precision: str) -> set[str]:
    """Return the names of the nodes whose first output is half, casts aside."""
    types, half = types_of(model), _half.element_type(precision)
    nodes = [n for n in model.graph.node if n.op_type != "Cast" and types.get(n.output[0]) == half]
    return {n.name for n in nodes}


# types


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_computes_in_half_between_two_casts(precision: str, tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    output, model, notes = converted(path, precision)
    assert notes == ()
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    types = types_of(model)
    assert types["x"] == types["y"] == TensorProto.FLOAT
    assert [n.op_type for n in model.graph.node].count("Cast") == 2
    assert half_nodes(model, precision) == {n.name for n in onnx.load(str(path)).graph.node}
    assert {t.data_type for t in model.graph.initializer} == {_half.element_type(precision)}
    # The first operator set with bfloat16 convolutions is 22.
    assert [o.version for o in model.opset_import] == [22 if precision == "bf16" else 18]
    floor = 55 if precision == "fp16" else 35
    assert floor < sqnr_db(run(path, image(9)), interpreted(output, image(9))) < floor + 30


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_transformer_block_stays_close(precision: str, tmp_path: Path) -> None:
    path = attention(tmp_path / "m.onnx")
    output, model, notes = converted(path, precision)
    names = {n.name for n in onnx.load(str(path)).graph.node}
    kept = {"masked"} if precision == "fp16" else set()  # its mask is -1e9
    assert half_nodes(model, precision) == names - kept
    assert notes == tuple(f"left in float32, a constant beyond 65504: {name}" for name in kept)
    floor = 50 if precision == "fp16" else 32
    assert sqnr_db(run(path, tokens(9)), interpreted(output, tokens(9))) > floor


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_result_is_a_value_of_the_half_type(precision: str, tmp_path: Path) -> None:
    output, _, _ = converted(residual_net(tmp_path / "m.onnx"), precision)
    found = interpreted(output, image())
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.astype(DTYPES[precision]).astype(np.float32))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_at_most_1_db_below_torchs_own_half(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(6)]
    network = torch.nn.Sequential(*(m for conv in layers for m in (conv, torch.nn.ReLU()))).eval()
    weights: dict[str, Array] = {}
    for i, conv in enumerate(layers):
        assert conv.bias is not None
        weights |= {f"w{i}": conv.weight.detach().numpy(), f"b{i}": conv.bias.detach().numpy()}
    nodes = []
    for i in range(6):
        source = f"r{i - 1}" if i else "x"
        nodes.append(helper.make_node("Conv", [source, f"w{i}", f"b{i}"], [f"c{i}"], f"c{i}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{i}"], ["y" if i == 5 else f"r{i}"], f"relu{i}"))
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [8, 3, 16, 16]}, {"y": [8, 16, 16, 16]}, weights)
    x = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    reference = run(path, {"x": x})
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.no_grad():
        torchs = network.to(dtype)(torch.from_numpy(x).to(dtype)).float().numpy()
    ours = interpreted(converted(path, precision)[0], {"x": x})
    assert sqnr_db(reference, ours) > sqnr_db(reference, torchs) - 1


def test_half_inputs_and_outputs_of_the_source_keep_their_type(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    for values in (model.graph.input, model.graph.output):
        values[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in model.graph.node:
        node.input[:] = ["x_single" if n == "x" else n for n in node.input]
        node.output[:] = ["y_single" if n == "y" else n for n in node.output]
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x_single"], "first", to=TensorProto.FLOAT))
    model.graph.node.append(helper.make_node("Cast", ["y_single"], ["y"], "last", to=TensorProto.FLOAT16))
    ends = tmp_path / "ends.onnx"
    onnx.save(model, ends)
    feeds = {k: v.astype(np.float16) for k, v in image().items()}
    for precision in PRECISIONS:
        output, model, _ = converted(ends, precision)
        assert types_of(model)["x"] == types_of(model)["y"] == TensorProto.FLOAT16
        found = interpreted(output, feeds)
        assert found.dtype == np.float16
        assert sqnr_db(run(ends, feeds), found) > (50 if precision == "fp16" else 32)


# what stays in float32


def mask_of(op: str, sentinel: float, path: Path) -> Path:
    """softmax(x + mask) or softmax(where(keep, x, sentinel)), of 0-or-1 float input *keep*."""
    shape: dict[str, Sequence[int | str]] = {"x": ["n", 4], "keep": ["n", 4]}
    constants = {"big": np.array(sentinel, np.float32), "one": np.array(1, np.float32)}
    if op == "add":
        nodes = [
            helper.make_node("Sub", ["one", "keep_whole"], ["drop"], "sub"),
            helper.make_node("Mul", ["drop", "big"], ["mask"], "mul"),
            helper.make_node("Add", ["x", "mask"], ["once"], "once"),
            helper.make_node("Add", ["once", "mask"], ["masked"], "twice"),
        ]
    else:
        nodes = [
            helper.make_node("Cast", ["keep"], ["keep_bool"], "bool", to=TensorProto.BOOL),
            helper.make_node("Where", ["keep_bool", "x", "big"], ["masked"], "where"),
        ]
    first = helper.make_node("Cast", ["keep"], ["keep_int"], "int", to=TensorProto.INT64)
    whole = helper.make_node("Cast", ["keep_int"], ["keep_whole"], "whole", to=TensorProto.FLOAT)
    last = helper.make_node("Softmax", ["masked"], ["y"], "softmax", axis=-1)
    return write_onnx(path, [first, whole, *nodes, last], shape, {"y": ["n", 4]}, constants)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("op", ["add", "where"])
@pytest.mark.parametrize("sentinel", [-1e9, float(np.finfo(np.float32).min)])
def test_masks_stay_finite_where_everything_is_masked(
    op: str, sentinel: float, precision: str, tmp_path: Path
) -> None:
    if op == "add" and sentinel < -1e38:
        sentinel /= 4  # two of them have to stay finite in float32 too
    path = mask_of(op, sentinel, tmp_path / "m.onnx")
    output, _, notes = converted(path, precision)
    feeds: dict[str, Array] = {
        "x": np.array([[1, 2, -30, 3], [0, 0, 0, 0]], np.float32),
        "keep": np.array([[1, 0, 1, 1], [0, 0, 0, 0]], np.float32),
    }
    found, wanted = interpreted(output, feeds), run(path, feeds)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, atol=0.01)
    if -sentinel > _half.LARGEST[precision]:
        assert notes == (
            f"left in float32, a constant beyond {_half.LARGEST[precision]:g}: {'mul' if op == 'add' else 'where'}",
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_causal_mask_of_the_size_of_its_input_stays_finite(precision: str, tmp_path: Path) -> None:
    least = numpy_helper.from_array(np.array([np.finfo(np.float32).min]))
    nodes = [
        helper.make_node("Shape", ["x"], ["size"], "size"),
        helper.make_node("ConstantOfShape", ["size"], ["full"], "full", value=least),
        helper.make_node("Trilu", ["full", "one"], ["mask"], "triangle", upper=1),
        helper.make_node("Add", ["x", "mask"], ["masked"], "masked"),
        helper.make_node("Softmax", ["masked"], ["y"], "softmax", axis=-1),
    ]
    constants: dict[str, Array] = {"one": np.array(1, np.int64)}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": ["n", "n"]}, {"y": ["n", "n"]}, constants)
    output, model, notes = converted(path, precision)
    assert half_nodes(model, precision) == {"masked", "softmax"}
    assert notes == (f"left in float32, a constant beyond {_half.LARGEST[precision]:g}: full",)
    x = np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32)
    np.testing.assert_allclose(interpreted(output, {"x": x}), run(path, {"x": x}), atol=0.01)


def test_bounds_of_a_clip_are_no_sentinels(tmp_path: Path) -> None:
    constants = {"low": np.array(0, np.float32), "high": np.array(3.4e38, np.float32)}
    nodes = [helper.make_node("Clip", ["x", "low", "high"], ["y"], "clip")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [4]}, {"y": [4]}, constants)
    output, model, notes = converted(path, "fp16")
    assert notes == () and half_nodes(model, "fp16") == {"clip"}
    x = np.array([-1, 0, 2, 60000], np.float32)
    np.testing.assert_array_equal(interpreted(output, {"x": x}), [0, 0, 2, 60000])


def test_a_layer_normalization_in_pieces_squares_in_float32(tmp_path: Path) -> None:
    constants = {
        "two": np.array(2, np.float32),
        "eps": np.array(1e-5, np.float32),
        "scale": np.ones(8, np.float32),
    }
    axes = {"axes": np.array([-1], np.int64)}
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], "mean"),
        helper.make_node("Sub", ["x", "mean"], ["d"], "sub"),
        helper.make_node("Pow", ["d", "two"], ["square"], "pow"),
        helper.make_node("ReduceMean", ["square", "axes"], ["variance"], "variance"),
        helper.make_node("Add", ["variance", "eps"], ["v"], "add"),
        helper.make_node("Sqrt", ["v"], ["deviation"], "sqrt"),
        helper.make_node("Div", ["d", "deviation"], ["normal"], "div"),
        helper.make_node("Mul", ["normal", "scale"], ["y"], "mul"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 8]}, {"y": [2, 8]}, {**constants, **axes})
    output, model, notes = converted(path, "fp16")
    assert half_nodes(model, "fp16") == {"mean", "sub", "div", "mul"}
    assert notes == ("left in float32, values may outgrow or lose their place in half: pow",)
    x = 2000 * np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    assert sqnr_db(run(path, {"x": x}), interpreted(output, {"x": x})) > 50


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nodes_stay_in_float_on_request(precision: str, tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    output, model, notes = converted(path, precision, "c3", "type:Gemm")
    all_names = {n.name for n in onnx.load(str(path)).graph.node}
    assert half_nodes(model, precision) == all_names - {"c3", "gemm"}
    assert notes == ("left in float32 as asked (keep_float): c3, gemm",)
    kept = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert kept == {"w_c3", "b_c3", "w_gemm", "b_gemm"}
    assert sqnr_db(run(path, image(9)), interpreted(output, image(9))) > 35
    with pytest.raises(BadInput, match="'nothing' matches no operator"):
        converted(path, precision, "nothing")


def test_control_flow_stays_whole_and_reads_float32(tmp_path: Path) -> None:
    def branch(name: str, op: str) -> Any:
        value = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [2, 4])
        nodes = [helper.make_node(op, ["h", "w"], [f"{name}_y"], f"{name}_{op}")]
        return helper.make_graph(nodes, name, [], [value])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matmul"),
        helper.make_node("ReduceMax", ["h"], ["top"], "top", keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["positive"], "greater"),
        helper.make_node(
            "If",
            ["positive"],
            ["z"],
            "if",
            then_branch=branch("a", "MatMul"),
            else_branch=branch("b", "Gemm"),
        ),
        helper.make_node("Relu", ["z"], ["y"], "relu"),
    ]
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((4, 4)).astype(np.float32), "zero": np.array(0, np.float32)}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 4]}, {"y": [2, 4]}, constants)
    output, model, _ = converted(path, "fp16")
    assert "matmul" in half_nodes(model, "fp16") and "if" not in half_nodes(model, "fp16")
    feeds = {"x": rng.standard_normal((2, 4)).astype(np.float32)}
    assert sqnr_db(run(path, feeds), interpreted(output, feeds)) > 45


def test_tables_tensors_read_twice_and_intermediate_outputs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {
        "table": rng.standard_normal((5, 4)).astype(np.float32),
        "w": rng.standard_normal((4, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Constant", [], ["ids"], "ids", value=numpy_helper.from_array(np.array([0, 3]))),
        helper.make_node("Gather", ["table", "ids"], ["rows"], "gather"),
        helper.make_node("Add", ["rows", "x"], ["h"], "add"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "matmul"),
        helper.make_node("Exp", ["h"], ["e"], "exp"),
        helper.make_node("Identity", ["x"], ["same"], "same"),
    ]
    shapes = {"h": [2, 4], "y": [2, 4], "e": [2, 4], "same": [2, 4]}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 4]}, shapes, constants)
    output, model, notes = converted(path, "fp16")
    assert half_nodes(model, "fp16") == {"gather", "add", "matmul", "same"}
    assert notes == ("left in float32, values may outgrow or lose their place in half: exp",)
    rounding = tmp_path / "rounding.onnx"
    _half_interpret.write_rounding(output, rounding)
    feeds = {"x": rng.standard_normal((2, 4)).astype(np.float32)}
    sessions = [ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (path, rounding)]
    for wanted, found in zip(*(s.run(list(shapes), feeds) for s in sessions), strict=True):
        assert found.dtype == np.float32 and sqnr_db(wanted, found) > 50


# weights


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("shape", "axis"), [((16, 8, 3, 3), 0), ((64, 24), 1), ((4, 1), 0)])
def test_weights_round_to_a_neighbour_and_keep_their_sum(
    shape: tuple[int, ...], axis: int, precision: str
) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = _half_weights.rounded(weight, precision, axis)
    nearest = _half.to_half(weight, precision)
    assert found.dtype == DTYPES[precision] and found.shape == shape
    exact, error = weight.astype(np.float64), found.astype(np.float64) - weight
    unit = {"fp16": 2.0**-10, "bf16": 2.0**-7}[precision]
    assert np.all(np.abs(error) <= unit * np.abs(exact))  # a whole step, not more
    others = tuple(a for a in range(weight.ndim) if a != axis)
    sums, before = np.abs(error.sum(others)), np.abs((nearest.astype(np.float64) - exact).sum(others))
    assert np.all(sums <= before)
    if weight.size // shape[axis] > 8:
        assert sums.mean() < before.mean() / 5 and np.mean(found != nearest) < 0.2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exact_zero_large_and_tiny_weights_are_kept(precision: str) -> None:
    largest = _half.LARGEST[precision]
    weight = np.array([[0, 1, -0.5, largest, -largest, 1e-45, 2]], np.float32)
    found = _half_weights.rounded(weight, precision, 0)
    np.testing.assert_array_equal(
        found.astype(np.float32), _half.to_half(weight, precision).astype(np.float32)
    )


def test_weights_without_one_axis_of_channels_round_to_nearest(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    constants = {
        "w": rng.standard_normal((4, 4)),
        "v": rng.standard_normal((2, 4, 4)),
        "k": rng.standard_normal((4, 2, 1)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Gemm", ["a", "w"], ["b"], "second", transB=1),
        helper.make_node("MatMul", ["b", "v"], ["c"], "third"),
        helper.make_node("ConvTranspose", ["c", "k"], ["y"], "fourth", group=2),
    ]
    held = {k: v.astype(np.float32) for k, v in constants.items()}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [4, 4]}, {"y": [2, 4, 4]}, held)
    assert _half_weights.channel_axes(onnx.load(str(path)).graph) == {}
    _, model, _ = converted(path, "fp16")
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), held[tensor.name].astype(np.float16))


# the backend


@pytest.mark.parametrize("precision", PRECISIONS)
def test_artifacts_are_interpreted_and_counted(precision: str, tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    folder = tmp_path / "artifact"
    folder.mkdir()
    exported = tensorrt.export(graph_of(path), Recipe(precision), None, folder)
    assert exported.files == ("model.onnx", "build.json", "trtexec.txt") and exported.min_runtime == "10.0"
    artifact = Artifact(folder, exported.entry, "tensorrt", precision, exported.inputs, exported.outputs)
    with tensorrt.interpret(artifact, Workload()) as session:
        session.set_inputs(image())
        session.infer()
        found = session.get_outputs()["y"]
        assert session.environment["arithmetic"] == "float32, rounded to half after every operator"
    assert sqnr_db(run(path, image()), found) > (50 if precision == "fp16" else 32)
    counted = tensorrt.census(artifact, {"x": (1, 8, 8, 8)})
    assert counted.macs and counted.integer_macs == 0 and "c1" in counted.float_nodes


def test_int8_with_float16_for_the_rest(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    folder = tmp_path / "artifact"
    folder.mkdir()
    recipe = Recipe("int8", options={"float": "fp16", "keep_float": ["gemm"]})
    exported = tensorrt.export(graph_of(path), recipe, observed(path, image()), folder)
    assert (
        exported.notes[0] == "left in float32 as asked (keep_float): gemm" and exported.min_runtime == "10.0"
    )
    model = onnx.load(str(folder / "model.onnx"))
    types = types_of(model)
    made = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    assert {types[n] for n in made} == {TensorProto.FLOAT16}
    assert {"c1", "r1", "a1", "pool"} <= half_nodes(model, "fp16") and "gemm" not in half_nodes(model, "fp16")
    artifact = Artifact(folder, exported.entry, "tensorrt", "int8", exported.inputs, exported.outputs)
    counted = tensorrt.census(artifact, {"x": (1, 8, 8, 8)})
    assert counted.float_nodes == ("gemm",) and counted.integer_macs == (counted.macs or 0) - 60
    with tensorrt.interpret(artifact, Workload()) as session:
        session.set_inputs(image())
        session.infer()
        assert sqnr_db(run(path, image()), session.get_outputs()["y"]) > 30
