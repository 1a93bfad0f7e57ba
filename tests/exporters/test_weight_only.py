"""Weight-only int8 and int4: our integers behind a DequantizeLinear, what ONNX Runtime makes of them, and the notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from portcall.calibration import weights
from portcall.exporters import _onnx, _weight_only, onnxruntime
from portcall.targets.agent.contract import Artifact, Graph, Recipe
from portcall.targets.agent.errors import BadInput, UnsupportedError
from tests.exporters.graphs import Array, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx, sqnr_db

SLOW = _weight_only._SLOW.format(2)
GROUPS = {"group32": 32, "group64": 64, "group128": 128}


def model(folder: Path, opset: int = 18, ir_version: int = 9) -> Path:
    """Conv, ConvTranspose, MatMul and two Gemms (one transposed); 100 and 72 inputs make short last groups."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv_w": (8, 3, 3, 3),
        "conv_b": (8,),
        "up_w": (8, 4, 2, 2),
        "product_w": (100, 72),
        "gemm_w": (72, 40),
        "turned_w": (16, 40),
        "turned_b": (16,),
    }
    held: dict[str, Array] = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    held["shape"] = np.asarray([1, 4, 100], np.int64)
    nodes = [
        helper.make_node("Conv", ["x", "conv_w", "conv_b"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("ConvTranspose", ["r", "up_w"], ["u"], "up", strides=[2, 2]),
        helper.make_node("Reshape", ["u", "shape"], ["s"], "reshape"),
        helper.make_node("MatMul", ["s", "product_w"], ["p"], "product"),
        helper.make_node("Reshape", ["p", "flat"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "gemm_w"], ["g"], "gemm"),
        helper.make_node("Gemm", ["g", "turned_w", "turned_b"], ["y"], "turned", transB=1),
    ]
    held["flat"] = np.asarray([4, 72], np.int64)
    return write_onnx(folder / "m.onnx", nodes, {"x": [1, 3, 7, 7]}, {"y": [4, 16]}, held, opset, ir_version)


def images(count: int = 4) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, 7, 7)).astype(np.float32)} for _ in range(count)]


def export(
    folder: Path, precision: str, graph: Graph | None = None, ranges: Any = None, **options: Any
) -> tuple[Any, dict[str, Array], tuple[str, ...]]:
    """Return the model written, its constants by name, and the notes."""
    graph = graph or graph_of(model(folder))
    files, notes = _weight_only.quantize(graph, precision, ranges, folder / "q.onnx", options)
    assert files == ("q.onnx",)
    written = onnx.load(str(folder / "q.onnx"))
    return written, {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}, notes


def as_int4(array: Array) -> Array:
    found: Array = array.astype(np.int8)
    return found


CASES: list[tuple[str, dict[str, Any], int]] = [
    ("int8-weights", {}, 18),
    ("int8-weights", {"weights": "tensor"}, 18),
    ("int8-weights", {"weight_symmetric": False}, 18),
    ("int8-weights", {"weights": "group64"}, 21),
    ("int4-weights", {}, 21),
    ("int4-weights", {"weights": "group128"}, 21),
    ("int4-weights", {"weights": "channel"}, 21),
    ("int4-weights", {"weights": "tensor", "weight_symmetric": False}, 21),
    ("int4-weights", {"weights": "group32", "weight_symmetric": False}, 21),
]


@pytest.mark.parametrize(("precision", "options", "opset"), CASES)
def test_integers_are_those_of_calibration_weights(
    tmp_path: Path, precision: str, options: dict[str, Any], opset: int
) -> None:
    written, held, _ = export(tmp_path, precision, **options)
    assert [o.version for o in written.opset_import] == [opset]
    assert written.ir_version == (10 if opset == 21 else 8)
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "m.onnx")).graph.initializer}
    default = "group32" if precision == "int4-weights" else "channel"
    granularity, symmetric = options.get("weights", default), options.get("weight_symmetric", True)
    block = GROUPS.get(granularity, 0)
    nodes = {n.input[0]: n for n in written.graph.node if n.op_type == "DequantizeLinear"}
    # (name in the file, float weight, channel axis, reduction axis or None for convolutions)
    for name, weight, channels, inputs in (
        ("conv_w", before["conv_w"], 0, None),
        ("up_w", before["up_w"], 1, None),
        ("product_w", before["product_w"], 1, 0),
        ("gemm_w", before["gemm_w"], 1, 0),
        ("turned_w_transposed", before["turned_w"].T, 1, 0),
    ):
        bits = 4 if precision == "int4-weights" and inputs is not None else 8
        groups = block if inputs is not None else 0
        axis = inputs if groups else None if granularity == "tensor" else channels
        wanted = weights.quantize(weight, bits, symmetric, axis, groups)
        integers = held[f"{name}_dequantized_quantized"]
        np.testing.assert_array_equal(as_int4(integers), wanted.integers)
        np.testing.assert_array_equal(held[f"{name}_dequantized_scale"], wanted.scale)
        zero_point = held.get(f"{name}_dequantized_zero_point")
        assert (zero_point is None) == (not wanted.zero_point.any())
        if zero_point is not None:
            np.testing.assert_array_equal(as_int4(zero_point), wanted.zero_point)
        node = nodes[f"{name}_dequantized_quantized"]
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes.get("block_size", 0) == groups
        assert attributes.get("axis") == axis
        assert (integers.dtype == np.int8) == (bits == 8)


@pytest.mark.parametrize(("precision", "options", "opset"), CASES)
def test_the_model_computes_with_the_rounded_weights(
    tmp_path: Path, precision: str, options: dict[str, Any], opset: int
) -> None:
    """Without ONNX Runtime's fusions, the file gives what a float model of rounded weights gives."""
    export(tmp_path, precision, **options)
    written = onnx.load(str(tmp_path / "q.onnx"))
    session_options = ort.SessionOptions()
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        written.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
    )
    outputs = [o for n in written.graph.node if n.op_type == "DequantizeLinear" for o in n.output]
    rounded = onnx.load(str(tmp_path / "m.onnx"))
    tensors = {t.name: t for t in rounded.graph.initializer}
    probe = onnx.load(str(tmp_path / "q.onnx"))
    for name in outputs:
        probe.graph.output.append(helper.make_empty_tensor_value_info(name))
    values = ort.InferenceSession(
        probe.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
    ).run(outputs, images(1)[0])
    for name, value in zip(outputs, values, strict=True):
        weight = name.removesuffix("_dequantized")
        turned = weight.endswith("_transposed")
        target = tensors[weight.removesuffix("_transposed")]
        target.CopyFrom(numpy_helper.from_array(value.T.copy() if turned else value, target.name))
    onnx.save(rounded, str(tmp_path / "rounded.onnx"))
    for sample, wanted in zip(images(), run_onnx(tmp_path / "rounded.onnx", images()), strict=True):
        [found] = session.run(None, sample)
        np.testing.assert_allclose(found, wanted[0], rtol=1e-4, atol=1e-4 * np.abs(wanted[0]).max())


@pytest.mark.parametrize(("precision", "floor_db"), [("int8-weights", 30.0), ("int4-weights", 12.0)])
def test_files_shrink_and_stay_close(tmp_path: Path, precision: str, floor_db: float) -> None:
    rng = np.random.default_rng(0)
    held = {"w": rng.standard_normal((512, 256)).astype(np.float32), "b": np.ones(256, np.float32)}
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm")
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": [2, 512]}, {"y": [2, 256]}, held)
    export(tmp_path, precision, graph_of(path))
    bits = (tmp_path / "q.onnx").stat().st_size * 8 / (512 * 256)
    assert bits < (8.4 if precision == "int8-weights" else 5.2)  # 4 bits and a float32 scale for every 32
    samples = [{"x": rng.standard_normal((2, 512)).astype(np.float32)} for _ in range(4)]
    wanted, out = ([r[0] for r in run_onnx(p, samples)] for p in (path, tmp_path / "q.onnx"))
    assert sqnr_db(wanted, out) > floor_db


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_onnx_runtime_fuses_products_whichever_way_their_weight_lay(tmp_path: Path, precision: str) -> None:
    export(tmp_path, precision)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert kinds.count("MatMulNBits") == 3 and "Gemm" not in kinds and "MatMul" not in kinds


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_census_counts_no_integer_arithmetic(tmp_path: Path, precision: str) -> None:
    graph = graph_of(model(tmp_path))
    exported = onnxruntime.export(graph, Recipe(precision), None, tmp_path)
    artifact = Artifact(tmp_path, exported.entry, "onnxruntime", precision, exported.inputs, exported.outputs)
    found = onnxruntime.census(artifact, {"x": (1, 3, 7, 7)})
    floats = onnxruntime.census(Artifact(tmp_path, "m.onnx", "onnxruntime", "fp32"), {"x": (1, 3, 7, 7)})
    assert found.macs == floats.macs and found.integer_macs == 0 and found.quantize_nodes == 0
    assert found.float_nodes == floats.float_nodes == ("conv", "up", "product", "gemm", "turned")
    kind = onnxruntime.BACKEND.capabilities.precisions[precision]
    assert not kind.integer and not kind.calibrated


def test_notes_name_what_is_not_4_bits(tmp_path: Path) -> None:
    _, _, notes = export(tmp_path, "int4-weights")
    assert notes == ("int8 weights per channel, as in all convolutions: conv, up", SLOW)
    assert export(tmp_path, "int8-weights")[2] == (SLOW,)
    held = {"v": np.ones(4, np.float32), "w": np.ones((4, 4), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "matrix"),
        helper.make_node("MatMul", ["h", "v"], ["y"], "vector"),
    ]
    path = write_onnx(tmp_path / "v.onnx", nodes, {"x": [2, 4]}, {"y": [2]}, held)
    written, _, notes = export(tmp_path, "int4-weights", graph_of(path))
    assert notes == ("left in float32, the weight is a vector: vector",)
    assert "v" in {t.name for t in written.graph.initializer}


def test_layers_are_kept_in_float(tmp_path: Path) -> None:
    written, held, notes = export(tmp_path, "int8-weights", keep_float=["type:Gemm", "conv"])
    assert notes == (
        "left in float32 as asked (keep_float): conv, gemm, turned",
        _weight_only._SLOW.format(1),
    )
    assert {"conv_w", "gemm_w", "turned_w_transposed"} <= set(held) and "product_w" not in held
    assert sum(n.op_type == "DequantizeLinear" for n in written.graph.node) == 2
    with pytest.raises(BadInput, match="'type:LSTM' matches no operator"):
        export(tmp_path, "int8-weights", keep_float=["type:LSTM"])


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_a_model_without_weights_is_unsupported(tmp_path: Path, precision: str) -> None:
    node = helper.make_node("MatMul", ["x", "x"], ["y"], "two activations")
    graph = graph_of(write_onnx(tmp_path / "m.onnx", [node], {"x": [4, 4]}, {"y": [4, 4]}, {}))
    with pytest.raises(
        UnsupportedError, match=f"{precision}: this model has no Conv, Gemm or MatMul"
    ) as caught:
        export(tmp_path, precision, graph)
    assert caught.value.fix and not (tmp_path / "q.onnx").exists()
    with pytest.raises(UnsupportedError, match="left to quantize"):
        export(tmp_path, precision, graph_of(model(tmp_path)), keep_float=["*"])


def test_biases_are_corrected_where_means_are_known(tmp_path: Path) -> None:
    graph = graph_of(model(tmp_path))
    assert not any(
        "bias" in note for note in export(tmp_path, "int4-weights", graph, bias_correction=True)[2]
    )
    ranges = onnx_ranges(graph.path, images(16))
    errors = {}
    for correction in (False, True):
        _, _, notes = export(tmp_path, "int4-weights", graph, ranges, bias_correction=correction)
        wanted, out = (
            np.stack([r[0] for r in run_onnx(p, images(16))]) for p in (graph.path, tmp_path / "q.onnx")
        )
        errors[correction] = np.abs((out - wanted).mean(0)).mean()
    assert notes[2] == "bias corrected in 3 layers" and notes[3].endswith("there: product")
    assert errors[True] < 0.8 * errors[False]


def test_an_old_operator_set_is_raised_as_far_as_needed(tmp_path: Path) -> None:
    graph = graph_of(model(tmp_path, opset=11, ir_version=6))
    for precision, opset, ir_version in (("int8-weights", 13, 7), ("int4-weights", 21, 10)):
        written, _, _ = export(tmp_path, precision, graph)
        assert [o.version for o in written.opset_import] == [opset] and written.ir_version == ir_version
        wanted, out = ([r[0] for r in run_onnx(p, images())] for p in (graph.path, tmp_path / "q.onnx"))
        assert sqnr_db(wanted, out) > 10


def test_a_shared_weight_is_written_once(tmp_path: Path) -> None:
    held = {"w": np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "w"], ["g"], "two"),
        helper.make_node("Gemm", ["g", "w"], ["t"], "turned", transB=1),
        helper.make_node("Add", ["t", "w"], ["y"], "reads the float weight"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [8, 8]}, {"y": [8, 8]}, held)
    written, constants, _ = export(tmp_path, "int8-weights", graph_of(path))
    assert sum(n.op_type == "DequantizeLinear" for n in written.graph.node) == 2
    assert sorted(constants) == sorted(
        ["w"] + [f"{n}_dequantized_{p}" for n in ("w", "w_transposed") for p in ("quantized", "scale")]
    )
    samples = [{"x": np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)}]
    wanted, out = (run_onnx(p, samples)[0][0] for p in (path, tmp_path / "q.onnx"))
    assert sqnr_db(wanted, out) > 30


def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(model(tmp_path))
    monkeypatch.setattr(_onnx, "EXTERNAL_ABOVE_BYTES", 1000)
    files, _ = _weight_only.quantize(graph, "int4-weights", None, tmp_path / "q.onnx")
    assert files == ("q.onnx", "q.onnx.data")
    session = ort.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    wanted = [r[0] for r in run_onnx(graph.path, images())]
    assert sqnr_db(wanted, [session.run(None, s)[0] for s in images()]) > 10
