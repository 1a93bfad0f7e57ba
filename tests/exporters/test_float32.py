"""Models that compute in float16: float32 inside, the interface and the values stay, and int8 works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from portcall.exporters import _float32, _onnx, _qdq
from portcall.targets.agent.contract import Graph, Range, TensorSpec
from portcall.targets.agent.errors import UnsupportedError
from tests.exporters.graphs import Array, conv_add_mul, source_of, write_onnx
from tests.exporters.ranges import onnx_ranges, sqnr_db

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def run(path: Path, **inputs: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, inputs)[0]
    return found


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """The model of ``conv_add_mul`` as onnxruntime makes it float16, inputs and output included."""
    model = convert_float_to_float16(onnx.load(str(conv_add_mul(tmp_path / "float.onnx"))))
    path = tmp_path / "half.onnx"
    onnx.save(model, str(path))
    return path


def inputs(seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((2, c, 8, 8)).astype(np.float16) for name, c in (("x", 3), ("x2", 4))}


def element_types(model: Any) -> dict[str, int]:
    return {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}


def lowered(half: Path, folder: Path) -> Graph:
    """Return the canonical graph of a float16 model."""
    folder.mkdir(exist_ok=True)
    source = source_of(half)
    source = replace(
        source,
        inputs=tuple(TensorSpec(t.name, t.shape, "float16") for t in source.inputs),
        outputs=tuple(TensorSpec(t.name, t.shape, "float16") for t in source.outputs),
    )
    return _onnx.lower(source, folder)


def test_values_and_interface_stay(half: Path, tmp_path: Path) -> None:
    path = _float32.converted(half, tmp_path / "single.onnx")
    assert path == tmp_path / "single.onnx"
    model = onnx.load(str(path))
    assert element_types(model) == {"x": HALF, "x2": HALF, "y": HALF}
    assert {t.data_type for t in model.graph.initializer} == {SINGLE}
    assert [n.op_type for n in model.graph.node] == ["Cast", "Cast", "Conv", "Relu", "Add", "Mul", "Cast"]
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(half)).graph.initializer}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), weights[tensor.name].astype(np.float32))
    found, wanted = run(path, **inputs()), run(half, **inputs())
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)


def test_a_float32_model_is_left_where_it_is(tmp_path: Path) -> None:
    path = conv_add_mul(tmp_path / "m.onnx")
    assert _float32.converted(path, tmp_path / "other.onnx") == path
    assert not (tmp_path / "other.onnx").exists()


def test_a_model_can_be_converted_where_it_lies(half: Path) -> None:
    wanted = run(half, **inputs())
    assert _float32.converted(half, half) == half
    assert not any(t.data_type == HALF for t in onnx.load(str(half)).graph.initializer)
    np.testing.assert_allclose(run(half, **inputs()), wanted, rtol=2e-3, atol=2e-3)


def test_casts_and_constants_inside_become_float32(tmp_path: Path) -> None:
    half_value = numpy_helper.from_array(np.asarray([0.5], np.float16))
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "down", to=HALF),
        helper.make_node("Cast", ["w"], ["wh"], "weight", to=SINGLE),
        helper.make_node("Cast", ["h"], ["s"], "up", to=SINGLE),
        helper.make_node("MatMul", ["s", "wh"], ["p"], "product"),
        helper.make_node("Constant", [], ["k"], "constant", value=half_value),
        helper.make_node("Cast", ["k"], ["ks"], "constant_up", to=SINGLE),
        helper.make_node("Mul", ["p", "ks"], ["y"], "mul"),
    ]
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float16)
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 4]}, {"y": [2, 3]}, {"w": weight})
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    wanted = run(path, x=x)
    converted = _float32.converted(path, tmp_path / "single.onnx")
    model = onnx.load(str(converted))
    kinds = {n.name: n for n in model.graph.node}
    assert "weight" not in kinds  # the Cast of a weight is folded into it
    assert [(t.name, t.data_type) for t in model.graph.initializer] == [("wh", SINGLE)]
    assert kinds["down"].attribute[0].i == SINGLE and kinds["constant"].attribute[0].t.data_type == SINGLE
    np.testing.assert_allclose(run(converted, x=x), wanted, rtol=2e-3, atol=2e-3)


def test_control_flow_is_not_entered(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("Add", ["w", "w"] if name == "then" else ["w", "zero"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, HALF, [2])])

    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        helper.make_node("Cast", ["m"], ["condition"], "cast", to=TensorProto.BOOL),
        helper.make_node(
            "If", ["condition"], ["h"], "if", then_branch=branch("then"), else_branch=branch("else")
        ),
        helper.make_node("Cast", ["h"], ["y"], "up", to=SINGLE),
    ]
    weights = {"w": np.ones(2, np.float16), "zero": np.zeros(2, np.float16)}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2]}, {"y": [2]}, weights)
    assert _float32.converted(path, tmp_path / "single.onnx") == path


def test_int8_of_a_float16_model_computes_on_integers(half: Path, tmp_path: Path) -> None:
    graph = lowered(half, tmp_path / "canonical")
    model = onnx.load(str(graph.path))
    assert [n.op_type for n in model.graph.node if n.op_type != "Cast"] == ["Conv", "Relu", "Add", "Mul"]
    names = _qdq.tapped_tensors(graph.path)
    assert "c" not in names and {"r", "s"} <= set(names)
    _qdq.quantize(graph, onnx_ranges(graph.path, [inputs()]), tmp_path / "q.onnx")
    quantized = onnx.load(str(tmp_path / "q.onnx"))
    assert element_types(quantized) == {"x": HALF, "x2": HALF, "y": HALF}
    found = _onnx.census(tmp_path / "q.onnx", {"x": (1, 3, 8, 8), "x2": (1, 4, 8, 8)})
    assert found.integer_macs == found.macs == 4 * 8 * 8 * 27 and not found.float_nodes
    assert sqnr_db(run(half, **inputs()), run(tmp_path / "q.onnx", **inputs())) > 30


def test_a_model_that_was_converted_before_is_taken(half: Path, tmp_path: Path) -> None:
    once = _float32.converted(half, tmp_path / "once.onnx")
    graph = lowered(once, tmp_path / "canonical")
    np.testing.assert_allclose(
        np.asarray(run(Path(graph.path), **inputs()), np.float32),
        np.asarray(run(half, **inputs()), np.float32),
        rtol=2e-2,
        atol=2e-2,
    )


def test_int8_refuses_what_still_holds_float16_weights(half: Path, tmp_path: Path) -> None:
    graph = Graph("onnx", half, "0", source_of(half), {})
    ranges = {n: Range(-1.0, 1.0) for n in _qdq.tapped_tensors(half)}
    with pytest.raises(UnsupportedError, match="2 weights of this graph are float16, first 'w'") as caught:
        _qdq.quantize(graph, ranges, tmp_path / "q.onnx")
    assert "float32" in caught.value.fix and not (tmp_path / "q.onnx").exists()
