"""The quantization of a Q/DQ graph: read, taken off, made symmetric, and found again in artifacts that were changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall.core import UnsupportedError, VerificationFailed
from portcall.exporters import _trained, _trained_check, _trained_rewrite, get_backend
from portcall.exporters._trained import Entry, Quantization
from portcall.targets.agent.contract import Graph, Recipe, Source

onnx = pytest.importorskip("onnx", reason="no onnx here: pip install onnx")
ort = pytest.importorskip("onnxruntime", reason="no onnxruntime here: pip install onnxruntime")

X = np.random.default_rng(0).uniform(-2.3, 2.3, (5, 3, 4, 4)).astype(np.float32)
WEIGHT = np.random.default_rng(1).standard_normal((4, 3, 1, 1)).astype(np.float32)
SCALES = (np.abs(WEIGHT).max((1, 2, 3)) / 127).astype(np.float32)


def model(stored: bool = False, int32_bias: bool = False, zero: Any = None, moving: str = "MaxPool") -> Any:
    """image -> pair -> Conv (weight stored or before a pair) -> Relu -> Q -> MaxPool -> DQ, with a space in a name."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    zero = np.uint8(120) if zero is None else zero
    arrays: dict[str, Any] = {
        "sx": np.float32(0.02),
        "zx": zero,
        "sy": np.float32(0.05),
        "zy": np.uint8(0),
        "sw": SCALES,
        "zw": np.zeros(4, np.int8),
        "b": np.array([0.5, -0.25, 0.0, 1.0], np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["the image", "sx", "zx"], ["xq"], "Q0"),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"], "DQ0"),
    ]
    if stored:
        arrays["wq"] = np.rint(WEIGHT / SCALES.reshape(-1, 1, 1, 1)).astype(np.int8)
    else:
        arrays["w"] = WEIGHT
        nodes.append(helper.make_node("QuantizeLinear", ["w", "sw", "zw"], ["wq"], "QW", axis=0))
    nodes.append(helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], "DQW", axis=0))
    bias = "b"
    if int32_bias:
        arrays["sb"] = np.float32(0.02) * SCALES
        arrays["bq"] = np.rint(arrays.pop("b") / arrays["sb"]).astype(np.int32)
        bias = "bd"
        nodes.append(helper.make_node("DequantizeLinear", ["bq", "sb"], ["bd"], "DQB", axis=0))
    nodes += [
        helper.make_node("Conv", ["xd", "wd", bias], ["c"], "the conv"),
        helper.make_node("Relu", ["c"], ["r"], "the relu"),
        helper.make_node("QuantizeLinear", ["r", "sy", "zy"], ["rq"], "Q1"),
        helper.make_node("MaxPool", ["rq"], ["pq"], "pool", kernel_shape=[2, 2], strides=[2, 2])
        if moving == "MaxPool"
        else helper.make_node("Add", ["rq", "rq"], ["pq"], "sum of integers"),
        helper.make_node("DequantizeLinear", ["pq", "sy", "zy"], ["y"], "DQ1"),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("the image", kind, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def run(made: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(made.SerializeToString(), options).run(None, {"the image": X})[0]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("int32_bias", [True, False])
def test_scales_are_read_whatever_way_weights_are_stored(stored: bool, int32_bias: bool) -> None:
    entries = {e.tensor: e for e in _trained.read(model(stored, int32_bias))}
    assert set(entries) == {"the image", "wd", "r"}
    assert entries["the image"].quantization == Quantization((float(np.float32(0.02)),), (120,), 0, 255)
    assert entries["r"].layer == "the relu" and entries["the image"].layer == "the image"
    weight = entries["wd"]
    assert weight.is_weight and weight.layer == "the conv" and weight.quantization.axis == 0
    assert weight.quantization.scales == tuple(map(float, SCALES))


@pytest.mark.parametrize("stored", [True, False])
def test_normalizing_changes_no_output(stored: bool) -> None:
    made = model(stored)
    before = run(made)
    _trained_rewrite.normalize(made)
    assert not any(n.name == "QW" for n in made.graph.node)
    np.testing.assert_array_equal(run(made), before)


def test_the_float_graph_holds_no_pair_and_is_near() -> None:
    made = model(int32_bias=True)
    before = run(made)
    entries = _trained_rewrite.split(made)
    assert len(entries) == 3
    assert not any("Quantize" in n.op_type for n in made.graph.node)
    assert np.abs(run(made) - before).max() <= 0.05 + 0.02 * np.abs(WEIGHT).sum(1).max()


def test_symmetric_scales_are_kept_where_the_integers_fit() -> None:
    made = model()
    _trained_rewrite.normalize(made)
    _trained_rewrite.make_symmetric(made)
    found = {e.tensor: e.quantization for e in _trained.read(made)}
    assert found["wd"].scales == tuple(map(float, SCALES)) and set(found["wd"].zero_points) == {0}
    assert found["r"].scales[0] == pytest.approx(0.05 * 255 / 127) and found["r"].zero_points == (0,)
    centred = model(zero=np.uint8(128))
    _trained_rewrite.normalize(centred)
    _trained_rewrite.make_symmetric(centred)
    kept = {e.tensor: e.quantization for e in _trained.read(centred)}
    assert kept["the image"].scales == (float(np.float32(0.02)),)


def test_the_range_of_a_quantization_gives_its_scale_back() -> None:
    found = Quantization((float(np.float32(0.0371)),), (17,), 0, 255).range()
    assert np.float32((found.maximum - found.minimum) / 255) == np.float32(0.0371)
    assert round(-found.minimum / float(np.float32(0.0371))) == 17


def test_operators_that_compute_on_integers_are_named() -> None:
    with pytest.raises(UnsupportedError, match="sum of integers"):
        _trained.read(model(moving="Add"))


def test_computed_scales_are_refused() -> None:
    made = model()
    made.graph.node.insert(0, onnx.helper.make_node("Abs", ["sx"], ["s2"], "abs"))
    next(n for n in made.graph.node if n.name == "Q0").input[1] = "s2"
    with pytest.raises(UnsupportedError, match=r"'Q0' has a scale .* computed at run time: 's2'"):
        _trained.read(made)


def test_halves_of_a_pair_that_differ_are_refused() -> None:
    made = model()
    next(n for n in made.graph.node if n.name == "DQ0").input[1] = "sy"
    with pytest.raises(UnsupportedError, match="'DQ0' dequantizes by"):
        _trained.read(made)


def exported(folder: Path, backend: str) -> tuple[Graph, Path]:
    """Export the model with *backend*'s own functions; return its graph and the file to read back."""
    from portcall.source_onnx import open_onnx

    path = folder / "a model.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model()), str(path))
    found = open_onnx(str(path))
    assert found.quantized
    source = Source.from_json({**found.to_json(), "example_shapes": {"the image": [1, 3, 4, 4]}})
    for place in ("low", "out"):
        (folder / place).mkdir()
    graph = get_backend(backend).lower(source, folder / "low")
    made = get_backend(backend).export(graph, Recipe("int8"), None, folder / "out")
    return graph, folder / "out" / made.entry


def test_a_recalibrated_scale_is_a_failure_with_its_layer(tmp_path: Path) -> None:
    graph, path = exported(tmp_path, "onnxruntime")
    record, notes = _trained_check.check("onnxruntime", graph, path)
    assert (record["kept"], record["changed"]) == (3, [])
    assert notes == ("trained scales: 3 of 3 kept (read back from the artifact)",)
    for tensor, layer in (("sx", "the image"), ("sy", "the relu"), ("sw", "the conv")):
        made = onnx.load(str(path))
        scale = next(t for t in made.graph.initializer if t.name == tensor)
        scale.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.01), tensor)
        )
        changed = tmp_path / f"changed {tensor}.onnx"
        onnx.save(made, str(changed))
        with pytest.raises(VerificationFailed, match=f"layer '{layer}' has .* in the artifact, trained was"):
            _trained_check.check("onnxruntime", graph, changed)


def test_a_pair_that_vanished_is_a_failure_with_its_layer(tmp_path: Path) -> None:
    graph, path = exported(tmp_path, "onnxruntime")
    made = onnx.load(str(path))
    conv = next(n for n in made.graph.node if n.op_type == "Conv")
    conv.input[0] = "the image"
    for node in [n for n in made.graph.node if n.name in ("Q0", "DQ0")]:
        made.graph.node.remove(node)
    onnx.save(made, str(path))
    with pytest.raises(VerificationFailed, match="'the image' has no scale in the artifact"):
        _trained_check.check("onnxruntime", graph, path)


def test_symmetric_formats_list_what_they_change(tmp_path: Path) -> None:
    graph, path = exported(tmp_path, "tensorrt")
    record, notes = _trained_check.check("tensorrt", graph, path)
    assert {c["tensor"] for c in record["changed"]} == {"the image", "r"} and record["kept"] == 1
    assert all(c["used"].endswith("zero point 0") for c in record["changed"])
    assert any("'r'" in note and "uint8 scale 0.05" in note for note in notes)


def test_entries_survive_json() -> None:
    for quantization in (Quantization((0.5,), (3,), 0, 255), Quantization((0.5, 1.0), (0, 0), -128, 127, 1)):
        entry = Entry("t", "l", True, quantization)
        assert Entry.from_json(entry.to_json()) == entry
