"""ExecuTorch programs of single operators: what XNNPACK runs on integers, and how close it stays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from portcall.calibration.weights import quantize
from portcall.exporters import executorch
from portcall.targets.agent.contract import Artifact, Census, Exported, Range, Recipe, Workload
from portcall.targets.agent.contract import Available as Present
from portcall.targets.agent.errors import CellFailed, UnsupportedError
from tests.exporters.graphs import Array, conv_add_mul, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx, sqnr_db

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao and ExecuTorch warn while they are imported
    _FOUND = executorch.probe("export")
if not isinstance(_FOUND, Present):
    pytest.skip(f"executorch: {_FOUND.reason}; fix: {_FOUND.fix}", allow_module_level=True)

from portcall.exporters import _executorch_program  # after the skip

SHAPE = [1, 8, 12, 12]


@dataclass(frozen=True, slots=True)
class Ran:
    """A converted graph: what it says of itself, and its outputs beside ONNX Runtime's on the samples."""

    exported: Exported
    program: _executorch_program.Program
    census: Census
    outputs: list[list[Array]]
    wanted: list[list[Array]]

    @property
    def sqnr_db(self) -> float:
        return min(
            sqnr_db(np.stack(w), np.stack(o))
            for w, o in zip(zip(*self.wanted, strict=True), zip(*self.outputs, strict=True), strict=True)
        )

    @property
    def kinds(self) -> list[str]:
        return [operator.kind for part in self.program.delegates for operator in part]

    def on_integers(self, kind: str) -> list[bool]:
        return [o.is_on_integers for part in self.program.delegates for o in part if o.kind == kind]


def run(
    path: Path,
    precision: str = "int8",
    options: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Array]] | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> Ran:
    """Export the graph at *path* (dynamic dimensions as 1) with exact ranges of *samples*, and run it on them."""
    graph = graph_of(path)
    rng = np.random.default_rng(5)
    samples = samples or [
        {
            t.name: rng.standard_normal(graph.source.example_shapes[t.name]).astype(np.float32)
            for t in graph.source.inputs
        }
        for _ in range(6)
    ]
    if precision == "int8" and ranges is None:
        ranges = onnx_ranges(path, samples)
    folder = path.parent / f"out {path.stem} {precision}"
    folder.mkdir(exist_ok=True)
    exported = executorch.export(graph, Recipe(precision, options=options or {}), ranges, folder)
    assert [p.name for p in folder.iterdir()] == list(exported.files)
    artifact = Artifact(folder, exported.entry, "executorch", precision, exported.inputs, exported.outputs)
    outputs = []
    with executorch.load(artifact, Workload()) as session:
        names = {t.source: t.name for t in exported.inputs}
        for sample in samples:
            session.set_inputs({names[k]: v for k, v in sample.items()})
            session.infer()
            found = session.get_outputs()
            outputs.append([found[t.name] for t in exported.outputs])
    return Ran(
        exported,
        _executorch_program.read(artifact.path),
        executorch.census(artifact, {}),
        outputs,
        run_onnx(path, samples),
    )


def weight(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conv(output: str, out: int = 8, kernel: int = 3, source: str = "x", **attributes: Any) -> Any:
    attributes.setdefault("pads", [kernel // 2] * 4)
    return helper.make_node("Conv", [source, "w", "b"], [output], f"conv_{output}", **attributes)


def floats(name: str, values: Any) -> Array:
    return np.asarray(values, np.float32)


W = {"w": weight(8, 8, 3, 3), "b": weight(8, seed=1)}

# name -> nodes, weights, inputs, kinds of XNNPACK operators that have to compute on integers
ONE: dict[str, tuple[list[Any], dict[str, Array], dict[str, Sequence[int]], list[str]]] = {
    "conv": ([conv("y")], W, {"x": SHAPE}, ["Conv2d"]),
    "conv_strided": ([conv("y", strides=[2, 2], dilations=[1, 1])], W, {"x": SHAPE}, ["Conv2d"]),
    "conv_padded_behind": (
        [conv("y", strides=[2, 2], pads=[0, 0, 1, 1])], W, {"x": SHAPE}, ["StaticConstantPad", "Conv2d"],
    ),
    "conv_grouped": (
        [conv("y", group=2)], {"w": weight(8, 4, 3, 3), "b": weight(8)}, {"x": SHAPE}, ["Conv2d"],
    ),
    "depthwise": (
        [conv("y", group=8)], {"w": weight(8, 1, 3, 3), "b": weight(8)}, {"x": SHAPE}, ["DepthwiseConv2d"],
    ),
    "conv_1d": (
        [conv("y", pads=[1, 1])], {"w": weight(8, 8, 3), "b": weight(8)}, {"x": [1, 8, 30]}, ["Conv2d"],
    ),
    "conv_relu": ([conv("c"), helper.make_node("Relu", ["c"], ["y"], "relu")], W, {"x": SHAPE}, ["Conv2d"]),
    "conv_relu6": (
        [conv("c"), helper.make_node("Clip", ["c", "low", "high"], ["y"], "clip")],
        {**W, "low": floats("low", 0), "high": floats("high", 6)}, {"x": SHAPE}, ["Conv2d"],
    ),
    "conv_clip": (
        [conv("c"), helper.make_node("Clip", ["c", "", "high"], ["y"], "clip")],
        {**W, "high": floats("high", 2)}, {"x": SHAPE}, ["Conv2d"],
    ),
    "conv_transpose": (
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", strides=[2, 2], pads=[1, 1, 1, 1])],
        {"w": weight(8, 4, 4, 4)}, {"x": SHAPE}, ["ConvTranspose2d"],
    ),
    "gemm": (
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)],
        {"w": weight(5, 16), "b": weight(5)}, {"x": [1, 16]}, ["FullyConnected"],
    ),
    "matmul": (
        [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")],
        {"w": weight(16, 5)}, {"x": [1, 7, 16]}, ["FullyConnected"],
    ),
    "add": ([conv("c"), helper.make_node("Add", ["c", "x"], ["y"], "add")], W, {"x": SHAPE}, ["Conv2d", "Add"]),
    "sub": ([conv("c"), helper.make_node("Sub", ["c", "x"], ["y"], "sub")], W, {"x": SHAPE}, ["Conv2d"]),
    "mul": ([conv("c"), helper.make_node("Mul", ["c", "x"], ["y"], "mul")], W, {"x": SHAPE}, ["Multiply"]),
    "concat": (
        [conv("c"), helper.make_node("Concat", ["c", "x"], ["y"], "concat", axis=1)], W, {"x": SHAPE},
        ["Conv2d", "Concatenate2"],
    ),
    "max_pool": (
        [conv("c"), helper.make_node("MaxPool", ["c"], ["y"], "pool", kernel_shape=[2, 2], strides=[2, 2])],
        W, {"x": SHAPE}, ["Conv2d", "MaxPooling2d"],
    ),
    "global_pool": (
        [conv("c"), helper.make_node("GlobalAveragePool", ["c"], ["y"], "pool")], W, {"x": SHAPE},
        ["Conv2d", "GlobalAvgPooling2d"],
    ),
    "reshape_transpose": (
        [conv("c"), helper.make_node("Reshape", ["c", "s"], ["r"], "reshape"),
         helper.make_node("Transpose", ["r"], ["y"], "transpose", perm=[0, 2, 1])],
        {**W, "s": np.asarray([1, 8, 144], np.int64)}, {"x": SHAPE}, ["Conv2d", "StaticReshape"],
    ),
    "sigmoid": ([conv("c"), helper.make_node("Sigmoid", ["c"], ["y"], "sigmoid")], W, {"x": SHAPE}, ["Conv2d"]),
    "resize": (
        [conv("c"), helper.make_node("Resize", ["c", "", "k"], ["y"], "resize", mode="nearest",
                                     coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {**W, "k": floats("k", [1, 1, 2, 2])}, {"x": SHAPE}, ["Conv2d"],
    ),
    "average_pool": (
        [conv("c"), helper.make_node("AveragePool", ["c"], ["y"], "pool", kernel_shape=[2, 2], strides=[2, 2])],
        W, {"x": SHAPE}, ["Conv2d"],
    ),
    "relu_beside": (
        [conv("c"), helper.make_node("Relu", ["c"], ["r"], "relu"), helper.make_node("Add", ["c", "r"], ["y"], "a")],
        W, {"x": SHAPE}, ["Conv2d", "Clamp", "Add"],
    ),
}  # fmt: skip


def single(folder: Path, name: str) -> Path:
    nodes, weights, inputs, _ = ONE[name]
    return write_onnx(folder / f"{name}.onnx", nodes, inputs, {"y": None}, weights)


@pytest.mark.parametrize("name", ONE)
def test_operator_on_integers(tmp_path: Path, name: str) -> None:
    ran = run(single(tmp_path, name))
    assert ran.sqnr_db >= 30.0
    for kind in ONE[name][3]:
        assert ran.on_integers(kind) and all(ran.on_integers(kind)), f"{kind}: {ran.kinds}"
    assert ran.census.float_nodes == () and ran.census.integer_macs == ran.census.macs


def test_encodings_are_those_of_the_ranges(tmp_path: Path) -> None:
    path = single(tmp_path, "conv")
    ran = run(path, ranges={"x": Range(-1.0, 3.0), "y": Range(-20.0, 31.0)})
    [operator] = [o for part in ran.program.delegates for o in part if o.kind == "Conv2d"]
    assert operator.inputs[0].scale == pytest.approx(4 / 255, rel=1e-4)  # flatc writes six digits
    assert operator.inputs[0].zero_point == -128 + round(255 / 4)
    assert operator.outputs[0].scale == pytest.approx(51 / 255, rel=1e-4)
    assert operator.outputs[0].zero_point == -128 + (20 * 5)


def test_pruned_weights_keep_their_zeros(tmp_path: Path) -> None:
    weights = {"w": weight(8, 8, 3, 3), "b": weight(8)}
    weights["w"][np.random.default_rng(4).random((8, 8, 3, 3)) < 0.6] = 0
    path = write_onnx(tmp_path / "pruned.onnx", [conv("y")], {"x": SHAPE}, {"y": None}, weights)
    ran = run(path)
    [operator] = [o for part in ran.program.delegates for o in part if o.kind == "Conv2d"]
    key = operator.inputs[1].data
    assert key is not None
    stored = np.frombuffer(ran.program.data[key], np.int8)[: weights["w"].size].reshape(8, 3, 3, 8)
    assert np.all(stored.transpose(0, 3, 1, 2)[weights["w"] == 0] == 0)
    np.testing.assert_array_equal(stored.transpose(0, 3, 1, 2), quantize(weights["w"], axis=0).integers)


def test_two_inputs_and_sum(tmp_path: Path) -> None:
    ran = run(conv_add_mul(tmp_path / "two inputs.onnx"))
    assert [(t.source, t.name) for t in ran.exported.inputs] == [("x", "input_0"), ("x2", "input_1")]
    assert [t.shape for t in ran.exported.outputs] == [(1, 4, 8, 8)]
    assert ran.sqnr_db >= 25.0 and all(ran.on_integers("Add")) and all(ran.on_integers("Multiply"))
    assert ran.census.macs == ran.census.integer_macs == 4 * 8 * 8 * 27
    assert "its dynamic dimensions are fixed at the example's sizes" in ran.exported.notes[-1]


def test_kept_in_float(tmp_path: Path) -> None:
    ran = run(single(tmp_path, "add"), options={"keep_float": ["type:Add"]})
    assert ran.on_integers("Conv2d") == [True] and ran.on_integers("Add") == [False]
    assert "left in float32 as asked (keep_float): add" in ran.exported.notes


def test_sentinels_stay_in_float(tmp_path: Path) -> None:
    samples = [{"x": weight(*SHAPE, seed=i)} for i in range(3)]
    for sample in samples:
        sample["x"][0, 0, 0, 0] = -3e5
    nodes = [conv("c"), helper.make_node("Add", ["c", "x"], ["y"], "add")]
    path = write_onnx(tmp_path / "mask.onnx", nodes, {"x": SHAPE}, {"y": None}, W)
    with pytest.raises(UnsupportedError, match="XNNPACK computes no operator of this model on integers"):
        run(path, samples=samples)


def test_per_tensor_weights_and_corrected_biases(tmp_path: Path) -> None:
    nodes = [conv("c"), helper.make_node("Relu", ["c"], ["y"], "relu")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": SHAPE}, {"y": SHAPE}, W)
    ran = run(path, options={"weights": "tensor", "bias_correction": True})
    [operator] = [o for part in ran.program.delegates for o in part if o.kind == "Conv2d"]
    assert operator.is_on_integers and operator.inputs[1].scale is not None
    assert ran.sqnr_db >= 28.0 and any("bias" in note for note in ran.exported.notes)


def test_at_run_time(tmp_path: Path) -> None:
    nodes = [
        conv("c", group=8),
        helper.make_node("Conv", ["c", "w2"], ["d"], "ordinary"),
        helper.make_node("GlobalAveragePool", ["d"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["y"], "gemm"),
    ]
    weights = {"w": weight(8, 1, 3, 3), "b": weight(8), "w2": weight(16, 8, 1, 1), "w3": weight(16, 5)}
    path = write_onnx(tmp_path / "dynamic.onnx", nodes, {"x": SHAPE}, {"y": None}, weights)
    ran = run(path, "int8-dynamic")
    assert ran.on_integers("DepthwiseConv2d") == [False]
    assert ran.on_integers("Conv2d") == ran.on_integers("FullyConnected") == [True]
    assert ran.census.macs == 8 * 144 * 9 + 16 * 144 * 8 + 16 * 5
    assert ran.census.integer_macs == ran.census.macs - 8 * 144 * 9
    assert "left in float32, XNNPACK has no such integer kernel for them: conv_c" in ran.exported.notes
    assert ran.sqnr_db >= 30.0


def test_what_runs_outside_is_named(tmp_path: Path) -> None:
    nodes = [conv("c"), helper.make_node("Slice", ["c", "s", "e", "a", "t"], ["y"], "every_other")]
    numbers = {"s": [0, 0], "e": [12, 12], "a": [2, 3], "t": [2, 2]}
    weights = {**W, **{k: np.asarray(v, np.int64) for k, v in numbers.items()}}
    path = write_onnx(tmp_path / "outside.onnx", nodes, {"x": SHAPE}, {"y": None}, weights)
    ran = run(path)
    assert [name for name, _ in ran.program.outside] == ["aten::slice_copy.Tensor_out"] * 2
    [note] = [n for n in ran.exported.notes if "run outside" in n]
    assert note.startswith("2 operators run outside of XNNPACK") and "every_other" in note
    assert ran.sqnr_db >= 30.0


def test_transformer_quantizes_products_at_run_time(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "o"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "w"], ["m"], "product"),
        helper.make_node("Add", ["m", "x"], ["y"], "residual"),
    ]
    weights = {"g": weight(16), "o": weight(16), "w": weight(16, 16)}
    path = write_onnx(tmp_path / "norm.onnx", nodes, {"x": [1, 5, 16]}, {"y": None}, weights)
    ran = run(path)
    assert ran.on_integers("FullyConnected") == [True] and ran.on_integers("Add") == [False]
    assert "matrix products that quantize their input at run time: product" in ran.exported.notes


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "groups": ("int8", {"weights": "group32"}, "XNNPACK's int8 kernels take no weights by group32"),
    "asymmetric": ("int8", {"weight_symmetric": False}, "take no weights by channel, asymmetric"),
    "one scale": ("int8-dynamic", {"weights": "tensor"}, "int8-dynamic kernels take no weights by tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_weights_without_a_kernel(tmp_path: Path, name: str) -> None:
    precision, options, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        run(single(tmp_path, "conv"), precision, options)


def test_refuses_a_pair_that_no_operator_takes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], "dequantize"),
    ]
    path = write_onnx(tmp_path / "q.onnx", nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"s": floats("s", 0.1)})
    with pytest.raises(UnsupportedError, match="XNNPACK left a quantized operator of this graph aside"):
        run(path, "fp32")


def test_refuses_an_operator_without_a_kernel(tmp_path: Path) -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], "pool_of_three_axes", kernel_shape=[2, 2, 2])
    path = write_onnx(tmp_path / "pool.onnx", [node], {"x": [1, 2, 4, 4, 4]}, {"y": None}, {})
    with pytest.raises(UnsupportedError, match=r"no kernel for torch's aten.avg_pool3d .*pool_of_three_axes"):
        run(path, "fp32")


def test_refuses_missing_ranges_and_control_flow(tmp_path: Path) -> None:
    with pytest.raises(CellFailed, match="the calibration table lacks 1 tensors of this graph, first 'y'"):
        run(single(tmp_path, "conv"), ranges={"x": Range(-1.0, 1.0)})
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"], "same")],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4])],
    )
    nodes = [
        helper.make_node("Cast", ["flag"], ["condition"], "cast", to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], "choice", then_branch=branch, else_branch=branch),
    ]
    path = write_onnx(tmp_path / "if.onnx", nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"flag": floats("flag", 1)})
    with pytest.raises(UnsupportedError, match="control flow"):
        run(path, ranges={"x": Range(-1.0, 1.0)})
