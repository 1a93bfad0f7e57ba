"""ONNX graphs without their weights: types of all tensors, and operator-set conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from portcall.exporters import _structure
from portcall.targets.agent.errors import UnsupportedError
from tests.exporters.graphs import Array, conv_add_mul, write_onnx


def outputs(model: Any, **inputs: Array) -> list[Array]:
    model.ir_version = 10
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, inputs)
    return found


def old_model(folder: Path) -> Any:
    """Operator set 11: Squeeze and ReduceSum took their axes as attributes, which version 13 moved to inputs."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("ReduceSum", ["p"], ["s"], "sum", axes=[1], keepdims=1),
        helper.make_node("Squeeze", ["s"], ["y"], "squeeze", axes=[1]),
    ]
    weights = {"w": np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)}
    path = write_onnx(folder / "old.onnx", nodes, {"x": ["batch", 64]}, {"y": ["batch"]}, weights, 11, 6)
    return onnx.load(str(path))


def test_types_of_all_tensors_are_inferred_without_the_weights(tmp_path: Path) -> None:
    model = onnx.load(str(conv_add_mul(tmp_path / "m.onnx")))
    found = {v.name: v.type.tensor_type for v in _structure.tensor_types(model)}
    assert set(found) >= {"c", "r", "s"}
    assert {t.elem_type for t in found.values()} == {TensorProto.FLOAT}
    assert [d.dim_value for d in found["c"].shape.dim][1:] == [4, 8, 8]


def test_the_copy_without_weights_is_small_and_the_model_stays(tmp_path: Path) -> None:
    model = old_model(tmp_path)
    before = model.SerializeToString()
    light = _structure.without_weights(model)
    assert light.ByteSize() < 1000 < len(before) and model.SerializeToString() == before
    assert [v.name for v in light.graph.input] == ["x", "w"] and not light.graph.initializer


def test_operator_set_is_raised_and_nothing_else_changes(tmp_path: Path) -> None:
    model = old_model(tmp_path)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    [before] = outputs(onnx.load(str(tmp_path / "old.onnx")), x=x)
    _structure.raise_opset(model, 21)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    onnx.checker.check_model(model)
    assert [n.name for n in model.graph.node if n.name] == ["product", "sum", "squeeze"]
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert weights["w"].shape == (64, 32)
    assert [v.name for v in model.graph.input] == ["x"]
    np.testing.assert_array_equal(outputs(model, x=x)[0], before)


def test_a_higher_operator_set_stays(tmp_path: Path) -> None:
    model = onnx.load(str(conv_add_mul(tmp_path / "m.onnx")))
    before = model.SerializeToString()
    for version in (13, 18):
        _structure.raise_opset(model, version)
        assert model.SerializeToString() == before


def test_what_onnx_cannot_convert_is_unsupported(tmp_path: Path) -> None:
    model = onnx.load(str(conv_add_mul(tmp_path / "m.onnx")))
    before = model.SerializeToString()
    with pytest.raises(UnsupportedError, match="needs ONNX operator set 1000, the model has 18") as caught:
        _structure.raise_opset(model, 1000)
    assert caught.value.fix == "Export the model with operator set 1000"
    assert model.SerializeToString() == before
