"""ONNX Runtime's profile: times of control flow, layers inside of fused nodes, and what counts as on integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall.core import Artifact, Workload
from portcall.exporters import get_backend
from portcall.exporters._profile_onnxruntime import _runs
from portcall.targets.agent.profiling import Placed


def _profiled(path: Path, feeds: dict[str, Any], precision: str = "as is", count: int = 3) -> Placed:
    profile = get_backend("onnxruntime").profile
    assert profile is not None
    with profile(Artifact(path.parent, path.name, "onnxruntime", precision), Workload()) as session:
        session.set_inputs(feeds)
        session.infer()
        session.collect()
        session.forget()
        for _ in range(count):
            session.infer()
            session.collect()
        return session.placed(list(range(count)))


def _model(path: Path, nodes: list[Any], constants: dict[str, np.ndarray[Any, Any]]) -> Path:
    """Write nodes from input "x" float32[n, 4] to output "y"."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_the_body_of_a_loop_is_not_counted_twice(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["again"], "inner_go"),
            helper.make_node("MatMul", ["state", "w"], ["next"], "inner_product"),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["n", 4]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["n", 4]),
        ],
    )
    path = _model(
        tmp_path / "loop.onnx",
        [
            helper.make_node("Loop", ["count", "true", "x"], ["looped"], "the_loop", body=body),
            helper.make_node("Softmax", ["looped"], ["y"], "after"),
        ],
        {"count": np.array(50, np.int64), "true": np.array(True), "w": np.eye(4, dtype=np.float32)},
    )
    placed = _profiled(path, {"x": np.ones((256, 4), np.float32)})
    assert [o.name for o in placed.operators] == ["the_loop", "after"]
    assert placed.operators[0].time_ns is not None and placed.operators[1].time_ns is not None
    assert placed.operators[0].time_ns > placed.operators[1].time_ns


def test_nodes_without_names(tmp_path: Path) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["x", "block.weight"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"]),
    ]
    path = _model(tmp_path / "m.onnx", nodes, {"block.weight": np.eye(4, dtype=np.float32)})
    placed = _profiled(path, {"x": np.ones((2, 4), np.float32)})
    assert [o.operator for o in placed.operators] == ["MatMul", "Softmax"]
    assert placed.operators[0].layers == ("block",)
    assert (placed.unit, placed.notes) == ("CPUExecutionProvider", ())


def test_a_product_that_was_meant_to_be_dynamic_and_stays_float(tmp_path: Path) -> None:
    from onnx import helper

    path = _model(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], "p")],
        {"w": np.eye(4, dtype=np.float32)},
    )
    placed = _profiled(path, {"x": np.ones((2, 4), np.float32)}, "int8-dynamic")
    [product] = placed.operators
    assert (product.on_unit, product.reason) == (False, "product in float32")
    assert placed.unit == "CPUExecutionProvider, integer kernels for products"


def _event(name: str, start: int, took: int, operator: str = "Add") -> dict[str, Any]:
    return {
        "cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": took,
        "args": {"op_name": operator, "node_index": name},
    }  # fmt: skip


def test_events_belong_to_the_run_around_them() -> None:
    runs = [{"cat": "Session", "name": "model_run", "ts": ts, "dur": 10} for ts in (100, 200)]
    events = [_event("early", 50, 1), _event("a", 101, 3), _event("b", 104, 3), *runs, _event("a", 202, 4)]
    found = _runs(events)
    assert [[e["args"]["node_index"] for e in run] for run in found] == [["a", "b"], ["a"]]


@pytest.mark.parametrize(("start", "inside"), [(101, True), (108, True), (109, False)])
def test_what_lies_inside_of_control_flow(start: int, inside: bool) -> None:
    events = [
        _event("body", start, 2),
        _event("loop", 100, 10, "Loop"),
        {"cat": "Session", "name": "model_run", "ts": 90, "dur": 100},
    ]
    [run] = _runs(events)
    assert ("body" in [e["args"]["node_index"] for e in run]) is not inside
