"""Hand-made ONNX graphs for the tests of ``exporters`` and ``calibration``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from portcall.exporters import _onnx
from portcall.targets.agent.contract import Graph, Source, TensorSpec

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str]


def write_onnx(
    path: Path,
    nodes: Sequence[Any],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape | None],
    weights: Mapping[str, Array],
    opset: int = 18,
    ir_version: int = 9,
    domains: Sequence[str] = (),
) -> Path:
    """Write a graph of float32 inputs and outputs; weights by name."""
    graph = helper.make_graph(
        list(nodes),
        "hand-made",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), path)
    return path


def source_of(path: Path) -> Source:
    """Return the Source of a hand-made graph, dynamic dimensions taken as 1."""
    graph = onnx.load(str(path), load_external_data=False).graph

    def spec(value: Any) -> TensorSpec:
        dims = value.type.tensor_type.shape.dim
        shape = tuple(d.dim_param or d.dim_value for d in dims)
        return TensorSpec(value.name, shape, "float32")

    inputs, outputs = tuple(map(spec, graph.input)), tuple(map(spec, graph.output))
    shapes = {t.name: tuple(1 if isinstance(d, str) else d for d in t.shape) for t in inputs}
    return Source(str(path), "onnx", path, _onnx.graph_sha256(path), inputs, outputs, shapes)


def graph_of(path: Path) -> Graph:
    """Return a hand-made ONNX file as the graph that is tapped and quantized."""
    source = source_of(path)
    names = {t.name: t.name for t in (*source.inputs, *source.outputs)}
    return Graph("onnx", path, source.sha256, source, names)


def conv_add_mul(path: Path) -> Path:
    """y = (relu(conv(x)) + x2) ** 2, with tensors x, c, r, x2, s, y."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 3, 3)), "b": rng.standard_normal(4)}
    return write_onnx(
        path,
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], "relu"),
            helper.make_node("Add", ["r", "x2"], ["s"], "add"),
            helper.make_node("Mul", ["s", "s"], ["y"], "mul"),
        ],
        {"x": ["batch", 3, 8, 8], "x2": ["batch", 4, 8, 8]},
        {"y": ["batch", 4, 8, 8]},
        {k: v.astype(np.float32) for k, v in weights.items()},
    )
