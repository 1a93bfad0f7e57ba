"""Dynamic int8: per-channel convolution weights, and nothing lost from the graph around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from portcall.exporters import _dynamic
from tests.exporters.graphs import conv_add_mul, graph_of, write_onnx


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, inputs)[0]
    return found


def test_convolutions_become_integer_with_a_scale_per_channel(tmp_path: Path) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    assert _dynamic.quantize(graph, tmp_path / "q.onnx") == ("q.onnx",)
    model = onnx.load(str(tmp_path / "q.onnx"))
    kinds = [n.op_type for n in model.graph.node]
    assert "Conv" not in kinds and kinds.count("ConvInteger") == 1
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    assert shapes["conv_weight_scale"] == (1, 4, 1, 1) and "w" not in shapes
    rng = np.random.default_rng(1)
    x, x2 = (rng.standard_normal((2, c, 8, 8)).astype(np.float32) for c in (3, 4))
    wanted, found = run(graph.path, x=x, x2=x2), run(tmp_path / "q.onnx", x=x, x2=x2)
    assert 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()) > 30


def test_weights_that_only_a_branch_uses_are_kept(tmp_path: Path) -> None:
    def branch(node: onnx.NodeProto) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [1, 4, 6, 6])
        return helper.make_graph([node], node.output[0], [], [output])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["positive"], "greater"),
        helper.make_node(
            "If",
            ["positive"],
            ["y"],
            "if",
            then_branch=branch(helper.make_node("Add", ["c", "k"], ["added"])),
            else_branch=branch(helper.make_node("Identity", ["c"], ["same"])),
        ),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "k": np.full(1, 5, np.float32),
        "zero": np.zeros((), np.float32),
    }
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 6, 6]}, weights)
    _dynamic.quantize(graph_of(path), tmp_path / "q.onnx")
    x = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "q.onnx", x=x), run(path, x=x), atol=0.3)
