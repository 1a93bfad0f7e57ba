"""``debug`` and ``--parity-report`` end to end: a network of this test, an artifact, faults planted into its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall import api
from portcall.targets.agent.errors import BadInput

onnx = pytest.importorskip("onnx", reason="onnx is not installed; pip install 'portcall[onnxruntime]'")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model with two inputs, a dynamic batch and other names, in a folder with a space."""
    from onnx import TensorProto, helper, numpy_helper

    folder = tmp_path_factory.mktemp("lad der")
    rng = np.random.default_rng(0)

    def constant(name: str, shape: tuple[int, ...]) -> Any:
        return numpy_helper.from_array(rng.normal(0, 0.4, shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "first_relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "mask"], ["sum"], "joined"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["scores"], "head"),
    ]
    weights = [
        constant("w1", (6, 3, 3, 3)),
        constant("b1", (6,)),
        constant("w2", (6, 6, 3, 3)),
        constant("b2", (6,)),
    ]
    weights += [constant("w3", (6, 5)), constant("b3", (5,))]
    inputs: list[tuple[str, list[Any]]] = [("image", ["n", 3, 12, 12]), ("mask", ["n", 6, 12, 12])]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 5])],
        weights,
    )
    model = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(model))
    data: dict[str, Any] = {n: rng.normal(0, 1, (24, *s[1:])).astype(np.float32) for n, s in inputs}
    np.savez(folder / "data.npz", **data)
    answer = api.export(
        model, "onnxruntime:int8,fp32", folder / "out", data=folder / "data.npz", parity_report=True
    )
    return folder, answer


def test_an_export_without_a_fault_has_no_divergence(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = exported
    for result in answer["results"]:
        assert result["parity_report"]["outcome"] == "compared"
        assert result["parity_report"]["first_divergence"] is None
    written = json.loads((folder / "out" / "logs" / "parity.json").read_text())
    assert [r["precision"] for r in written["reports"]] == ["int8", "fp32"]
    stages = {s["name"]: s for s in answer["results"][0]["parity_report"]["stages"]}
    assert list(stages) == ["source", "exported graph", "fake-quantized graph", "deployed artifact"]
    assert stages["exported graph"]["parity"]["sqnr_db"] > 100
    difference = (
        stages["fake-quantized graph"]["parity"]["sqnr_db"] - stages["deployed artifact"]["parity"]["sqnr_db"]
    )
    assert abs(difference) < 3


def _planted(folder: Path, name: str, initializer: str, change: Any) -> Path:
    from onnx import numpy_helper

    artifact = folder / name
    shutil.copytree(folder / "out" / "onnxruntime-int8", artifact)
    model = onnx.load(str(artifact / "model.onnx"))
    [tensor] = [t for t in model.graph.initializer if t.name == initializer]
    old = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(old.copy()), old.dtype), initializer))
    onnx.save(model, str(artifact / "model.onnx"))
    return artifact


@pytest.mark.parametrize(
    ("initializer", "change", "layer", "looks"),
    [
        ("b2_quantized", lambda v: v * 0, "second", "constant"),
        ("w2_quantized", lambda v: v[[0, 3, 2, 1, 4, 5]], "second", None),
        ("r1_scale", lambda v: v * 2, "first", "wrong scale: 2 times"),
        ("w1_scale", lambda v: v * 2, "first", None),
    ],
)
def test_a_planted_fault_is_named(
    exported: tuple[Path, dict[str, Any]], initializer: str, change: Any, layer: str, looks: str | None
) -> None:
    folder, _ = exported
    answer = api.debug(_planted(folder, f"planted {initializer}", initializer, change))
    first = answer["first_divergence"]
    assert first is not None
    assert layer in first["group"]
    assert first["local_sqnr_db"] < first["expected_sqnr_db"]
    assert looks is None or looks in first["looks_like"]
    assert "not the artifact that was exported" in answer["notes"][0]


def test_a_source_that_is_gone_or_has_changed_is_refused(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = exported
    model = folder / "model.onnx"
    content = model.read_bytes()
    try:
        model.unlink()
        with pytest.raises(BadInput, match="cannot be opened"):
            api.debug(folder / "out" / "onnxruntime-int8")
        changed = onnx.load_from_string(content)
        changed.graph.node[0].name = "another"
        onnx.save(changed, str(model))
        with pytest.raises(BadInput, match="has changed"):
            api.debug(folder / "out" / "onnxruntime-int8")
    finally:
        model.write_bytes(content)


def test_a_backend_without_a_runtime_here_is_no_pass() -> None:
    from portcall.core import UnavailableError
    from portcall.ladder import _nothing
    from portcall.ladder_report import exit_code, headline

    answer = _nothing(
        Path("a"), {"backend": "b", "precision": "int8"}, UnavailableError("no runtime", "install"), []
    )
    assert answer["parity"] is None
    assert exit_code(answer) == 4
    assert "not compared: no runtime" in headline(answer)
