"""TensorRT for RTX: real engines, built ahead of time without a GPU, by the library's own parser and builder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from portcall.exporters import _tensorrt_recipe, tensorrt_rtx
from portcall.exporters._tensorrt import Limits
from portcall.targets.agent.contract import Artifact, Exported, Recipe, Workload
from portcall.targets.agent.errors import BadInput, UnsupportedError
from tests.exporters.contract import run_python
from tests.exporters.graphs import graph_of, write_onnx
from tests.exporters.test_qdq_symmetric import attention, image, observed, residual_net, run, sqnr_db, tokens

pytest.importorskip("tensorrt_rtx", reason="no builder to ask; fix: pip install tensorrt-rtx")

EXPORT = """
import json, pathlib, sys
from portcall.exporters import tensorrt_rtx
from portcall.targets.agent.contract import Graph, Range, Recipe
from portcall.targets.agent.errors import PortcallError
job = json.loads({job!r})
ranges = job["ranges"] and {{k: Range.from_json(v) for k, v in job["ranges"].items()}}
try:
    found = tensorrt_rtx.export(
        Graph.from_json(job["graph"]), Recipe(**job["recipe"]), ranges, pathlib.Path(job["folder"])
    )
    answer = [found.files, found.notes, found.min_runtime]
except PortcallError as error:
    answer = [type(error).__name__, error.message, error.fix]
print(json.dumps(answer))
"""


def exported_to(folder: Path, path: Path, precision: str, feeds: Any, **options: Any) -> Exported:
    """Export in a process of its own, as portcall does: the library prints where there is no GPU."""
    folder.mkdir()
    ranges = observed(path, feeds) if precision == "int8" else {}
    job = {
        "graph": graph_of(path).to_json(),
        "recipe": Recipe(precision, options=options).to_json(),
        "ranges": {k: v.to_json() for k, v in ranges.items()} or None,
        "folder": str(folder),
    }
    files, notes, last = json.loads(run_python(EXPORT.format(job=json.dumps(job))).splitlines()[-1])
    if isinstance(files, str):
        raise {"BadInput": BadInput, "UnsupportedError": UnsupportedError}[files](notes, last)
    return Exported("model.onnx", tuple(files), (), (), {}, tuple(notes), last)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_one_engine_for_each_capability(precision: str, tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    exported = exported_to(tmp_path / "a", path, precision, image())
    engines = ("model.sm86.engine", "model.sm89.engine", "model.sm120.engine")
    assert exported.files == ("model.onnx", "build.json", *engines)
    assert {p.name for p in (tmp_path / "a").iterdir()} == set(exported.files)
    for engine, note, capability in zip(engines, exported.notes[-3:], ("8.6", "8.9", "12.0"), strict=True):
        size = (tmp_path / "a" / engine).stat().st_size
        assert size > 10_000
        assert note.startswith(f"engine for compute capability {capability}: {size} bytes, built in ")
    assert exported.min_runtime is not None and exported.min_runtime.startswith("1.")
    assert _tensorrt_recipe.read(tmp_path / "a")["profile"] == {
        "x": Limits((1, 8, 8, 8), (1, 8, 8, 8), (8, 8, 8, 8))
    }
    artifact = Artifact(tmp_path / "a", "model.onnx", "tensorrt_rtx", precision)
    with tensorrt_rtx.interpret(artifact, Workload()) as session:
        session.set_inputs(image())
        session.infer()
        found = session.get_outputs()["y"]
    assert sqnr_db(run(path, image()), found) > {"fp32": 100, "fp16": 50, "bf16": 32, "int8": 30}[precision]
    counted = tensorrt_rtx.census(artifact, {"x": (1, 8, 8, 8)})
    assert counted.integer_macs == (counted.macs if precision == "int8" else 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_transformer_block_with_a_profile_of_its_own(precision: str, tmp_path: Path) -> None:
    path = attention(tmp_path / "m.onnx")
    exported = exported_to(
        tmp_path / "a",
        path,
        precision,
        tokens(),
        compute_capability="8.9",
        profile="x:1x6x32..16x6x32..64x6x32",
    )
    assert [f for f in exported.files if f.endswith(".engine")] == ["model.sm89.engine"]
    assert _tensorrt_recipe.read(tmp_path / "a")["profile"]["x"].max == (64, 6, 32)


def test_int8_with_float16_for_the_rest_is_taken_too(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    exported = exported_to(tmp_path / "a", path, "int8", image(), compute_capability="8.6", float="fp16")
    assert "model.sm86.engine" in exported.files


def test_other_capabilities_are_refused_with_those_there_are(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    for text, wrong in (("9.0", "9.0"), ("8.9,new", "new"), ("89", "89")):
        folder = tmp_path / wrong
        with pytest.raises(BadInput, match=f"builds nothing for compute capability '{wrong}'") as caught:
            exported_to(folder, path, "fp32", image(), compute_capability=text)
        assert "8.6, 8.9, 12.0" in caught.value.fix


def test_refused_nodes_are_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Det", ["r"], ["d"], "determinant"),
        helper.make_node("Relu", ["d"], ["y"], "last"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 3, 3]}, {"y": [2]}, {})
    with pytest.raises(UnsupportedError, match=r"parser refuses model\.onnx at 'determinant': ") as caught:
        exported_to(tmp_path / "a", path, "fp32", {"x": np.zeros((2, 3, 3), np.float32)})
    assert caught.value.fix
