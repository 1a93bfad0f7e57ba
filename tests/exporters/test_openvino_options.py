"""OpenVINO's int8 takes a recipe's options through our Q/DQ: weights, layers kept in float, bias correction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from portcall.exporters import openvino
from portcall.targets.agent.contract import Artifact, Recipe, Workload
from portcall.targets.agent.errors import UnsupportedError
from tests.exporters.graphs import Array, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx, sqnr_db


def two_convolutions(path: Path) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "v": (4, 8, 1, 1)}
    held = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "first"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "v"], ["y"], "second"),
    ]
    return write_onnx(path, nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 6, 6]}, held)


def images() -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "floats", "notes"),
    [
        ({}, 0, ()),
        ({"weights": "tensor"}, 0, ()),
        ({"bias_correction": True}, 0, ("bias corrected in 2 layers",)),
        ({"keep_float": ["second"]}, 1, ("left in float32 as asked (keep_float): second",)),
    ],
)
def test_options_reach_the_compiled_model(
    tmp_path: Path, options: dict[str, Any], floats: int, notes: tuple[str, ...]
) -> None:
    graph = graph_of(two_convolutions(tmp_path / "m.onnx"))
    folder = tmp_path / "out"
    folder.mkdir()
    exported = openvino.export(
        graph, Recipe("int8", options=options), onnx_ranges(graph.path, images()), folder
    )
    assert exported.notes == notes and {p.name for p in folder.iterdir()} == {"model.xml", "model.bin"}
    artifact = Artifact(folder, exported.entry, "openvino", "int8", exported.inputs, exported.outputs)
    found = openvino.census(artifact, {"x": (1, 3, 8, 8)})
    assert found.macs == 8 * 36 * 27 + 4 * 36 * 8
    assert found.integer_macs == (8 * 36 * 27 if floats else found.macs) and len(found.float_nodes) == floats
    outputs = []
    with openvino.load(artifact, Workload()) as session:
        for sample in images():
            session.set_inputs({session.inputs[0].name: sample["x"]})
            session.infer()
            outputs.append(session.get_outputs()[session.outputs[0].name])
    assert sqnr_db([r[0] for r in run_onnx(graph.path, images())], outputs) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "tensor", "weight_symmetric": False}, "asymmetric weights in float32"),
        ({"weights": "group32"}, "groups of 32"),
    ],
)
def test_weights_that_stay_in_float_are_unsupported(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    graph = graph_of(two_convolutions(tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedError, match=message) as caught:
        openvino.export(graph, Recipe("int8", options=options), onnx_ranges(graph.path, images()), tmp_path)
    assert caught.value.fix
