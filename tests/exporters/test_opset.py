"""Files for older runtimes: the lowest operator set that means the same, and what ONNX Runtime loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from portcall.exporters import _opset
from portcall.targets.agent.errors import BadInput, UnsupportedError
from portcall.targets.agent.opening import is_older

Array = np.ndarray[Any, Any]


def write(
    path: Path,
    nodes: Sequence[Any],
    constants: Mapping[str, Array],
    opset: int = 20,
    domains: Sequence[str] = (),
) -> Path:
    """Write a graph from x[2, 3, 4] to y, as an exporter of today would."""
    rank = 2 if "shape" in constants else 3
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, rank * [None])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    onnx.save(model, str(path))
    return path


def run(path: Path) -> Array:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])


def facts(path: Path) -> tuple[int, int]:
    model = onnx.load(str(path), load_external_data=False)
    return model.opset_import[0].version, model.ir_version


AXES = {"axes": np.array([1], np.int64)}
SHAPE = {"shape": np.array([2, 12], np.int64)}
NORM = {"scale": np.linspace(0.5, 2, 4, dtype=np.float32), "bias": np.linspace(-1, 1, 4, dtype=np.float32)}

CASES: dict[str, tuple[list[Any], dict[str, Array], dict[str, Any], int, str]] = {
    # name: nodes, constants, options, operator set, ONNX Runtime
    "types only": ([helper.make_node("Relu", ["x"], ["y"], "n")], {}, {}, 11, "1.2"),
    "as asked": ([helper.make_node("Relu", ["x"], ["y"], "n")], {}, {"opset": 15}, 15, "1.9"),
    "constant axes": (
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], "n", noop_with_empty_axes=0)], AXES, {}, 11, "1.2",
    ),
    "sum over axes, in between": (
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], "n")], AXES, {"opset": 13}, 13, "1.6",
    ),
    "axes beside a newer node": (
        [helper.make_node("ReduceSum", ["x", "axes"], ["r"], "n"), helper.make_node("Gelu", ["r"], ["y"], "g")],
        AXES, {}, 20, "1.17",
    ),
    "softmax was redefined": ([helper.make_node("Softmax", ["x"], ["y"], "n", axis=1)], {}, {}, 13, "1.6"),
    "reshape to what has no 0": (
        [helper.make_node("Reshape", ["x", "shape"], ["y"], "n", allowzero=1)], SHAPE, {}, 11, "1.2",
    ),
    "gelu": ([helper.make_node("Gelu", ["x"], ["y"], "n")], {}, {}, 20, "1.17"),
    "gelu written out": ([helper.make_node("Gelu", ["x"], ["y"], "n")], {}, {"min_runtime": "1.12"}, 15, "1.9"),
    "layer normalization": (
        [helper.make_node("LayerNormalization", ["x", "scale", "bias"], ["y"], "n")], NORM, {}, 17, "1.12",
    ),
    "layer normalization written out": (
        [helper.make_node("LayerNormalization", ["x", "scale", "bias"], ["y"], "n")], NORM,
        {"min_runtime": "1.8"}, 11, "1.2",
    ),
    "softmax written out": (
        [helper.make_node("Softmax", ["x"], ["y"], "n", axis=1)], {}, {"opset": 12}, 12, "1.6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_lowest_operator_set_computes_the_same(tmp_path: Path, name: str) -> None:
    nodes, constants, options, opset, runtime = CASES[name]
    path = write(tmp_path / "m.onnx", nodes, constants)
    wanted = run(path)
    assert _opset.settle(path, options) == runtime
    found, ir = facts(path)
    assert found == opset
    newest = {version: limits for version, *limits in _opset.RUNTIMES}[runtime]
    assert found <= newest[0] and ir <= newest[1]
    np.testing.assert_allclose(run(path), wanted, rtol=1e-6, atol=1e-6)


def test_what_no_older_set_has_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Trilu", ["x"], ["y"], "upper")], {})
    held = path.read_bytes()
    for options, who in (({"opset": 12}, "opset asks for"), ({"min_runtime": "1.5"}, "onnxruntime 1.5 has")):
        with pytest.raises(
            UnsupportedError, match=rf"{who} operator set 12, and node 'upper' \(Trilu\) needs 14"
        ):
            _opset.settle(path, options)
    assert path.read_bytes() == held


def test_contrib_operators_ask_for_their_runtime(tmp_path: Path) -> None:
    packed: dict[str, Array] = {"b": np.zeros((8, 1, 16), np.uint8), "s": np.ones(8, np.float32)}
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], "n", domain="com.microsoft", K=4, N=8, bits=4, block_size=32
    )
    path = write(tmp_path / "m.onnx", [node], packed, domains=["com.microsoft"])
    with pytest.raises(
        UnsupportedError, match=r"operators MatMulNBits need onnxruntime 1.17, 1.16 was asked for"
    ):
        _opset.settle(path, {"min_runtime": "1.16"})
    assert _opset.settle(path, {"min_runtime": "1.17"}) == "1.17"


@pytest.mark.parametrize(
    "options", [{"opset": 3}, {"opset": 999}, {"min_runtime": "old"}, {"min_runtime": "1.0"}]
)
def test_bad_options(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"], "n")], {})
    with pytest.raises(BadInput, match=r"opset is|min_runtime"):
        _opset.settle(path, options)


def test_weights_in_other_files_stay(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    path = write(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": weight})
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    wanted, held = run(path), (tmp_path / "m.onnx.data").read_bytes()
    assert _opset.settle(path, {}) == "1.2"
    assert (tmp_path / "m.onnx.data").read_bytes() == held and len(path.read_bytes()) < 400
    np.testing.assert_array_equal(run(path), wanted)


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [
        ("1.16.3", "1.17", True), ("1.17", "1.17.0", False), ("1.9.1", "1.10", True), ("2.0.0rc1", "1.31", False),
        ("unknown", "1.2", False), ("15", "iOS17", False), ("1.2.3+cpu", "1.2.4", True),
    ],
)  # fmt: skip
def test_versions_compare_by_number(version: str, minimum: str, older: bool) -> None:
    assert is_older(version, minimum) is older
