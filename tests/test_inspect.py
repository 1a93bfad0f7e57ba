"""``portcall inspect``: its table and JSON, what it takes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import portcall.api
from portcall.core import BadInput
from portcall.inspection import sizes
from tests.conftest import Portcall
from tests.exporters.contract import run_python

KEYS = {
    "schema", "path", "kind", "backend", "precision", "format", "inputs", "outputs", "operators", "quantize_nodes",
    "parameters", "nonzero", "weights", "macs", "layers", "notes", "size",
}  # fmt: skip
LAYER_KEYS = {
    "name", "operator", "tensor", "shape", "dtype", "bits", "elements", "zeros", "zero_fraction", "pattern",
    "output_axis", "input_axis", "zero_outputs", "zero_inputs", "scales", "scale_min", "scale_max", "zero_point",
    "macs",
}  # fmt: skip
MACS = {"first": 16 * 8 * 8 * 27, "second": 16 * 8 * 8 * 16, "head": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Path:
    """Artifacts of a CNN whose second layer is half zero, in a folder with a space; the model beside them."""
    place = tmp_path_factory.mktemp("a folder")
    model = onnx.load(tiny_onnx)
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            values = numpy_helper.to_array(tensor).copy()
            values.reshape(-1)[np.abs(values).reshape(-1).argsort()[:128]] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, "w2"))
    path = place / "pruned model.onnx"
    onnx.save(model, path)
    data = place / "data.npz"
    np.savez(data, x=np.random.default_rng(1).standard_normal((8, 3, 16, 16)).astype(np.float32))
    portcall.api.export(path, ["onnxruntime:int8", "openvino:int8"], place / "out", data=data)
    return place


def _layers(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in answer["layers"]}


def test_json_tells_what_the_model_holds(folder: Path, portcall: Portcall) -> None:
    done = portcall("inspect", folder / "pruned model.onnx", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == KEYS
    assert (answer["schema"], answer["kind"], answer["format"], answer["backend"]) == (
        1,
        "file",
        "onnx",
        None,
    )
    assert answer["inputs"] == [{"name": "x", "shape": ["batch", 3, 16, 16], "dtype": "float32"}]
    assert answer["operators"]["Conv"] == 2 and answer["quantize_nodes"] == 0
    assert answer["parameters"] == 432 + 16 + 256 + 160 + 10
    assert answer["nonzero"] == answer["parameters"] - 128
    assert answer["weights"] == {"elements": 848, "zeros": 128, "zero_fraction": 128 / 848}
    layers = _layers(answer)
    assert {k: v["macs"] for k, v in layers.items()} == MACS and answer["macs"] == sum(MACS.values())
    assert set(layers["second"]) == LAYER_KEYS
    assert layers["second"]["pattern"] == "unstructured" and layers["first"]["pattern"] == "dense"
    assert layers["second"]["shape"] == [16, 16, 1, 1] and layers["second"]["bits"] == 32
    size = answer["size"]
    assert size["bytes"] == (folder / "pruned model.onnx").stat().st_size > size["compressed_bytes"] > 0
    assert size["method"] in ("zstd-3", "zlib-6") and answer["notes"] == []


def test_the_table_has_a_line_per_layer_and_totals(folder: Path, portcall: Portcall) -> None:
    done = portcall("inspect", folder / "out" / "onnxruntime-int8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("onnxruntime-int8 (artifact, onnxruntime:int8)")
    [header] = [line for line in lines if line.startswith("layer")]
    for word in ("operator", "shape", "params", "zeros %", "pattern", "bits", "scale range", "MACs"):
        assert word in header
    [second] = [line for line in lines if line.startswith("second")]
    assert "16x16x1x1" in second and "50.00" in second and "8 int8" in second and "16,384" in second
    assert any(line.startswith("multiply-accumulates: 44,") for line in lines)
    assert any(line.startswith("size: ") and "compressed" in line for line in lines)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_artifact_shows_its_integers(folder: Path, backend: str) -> None:
    answer = portcall.api.inspect(folder / "out" / f"{backend}-int8")
    assert (answer["kind"], answer["backend"], answer["precision"]) == ("artifact", backend, "int8")
    layers = answer["layers"]
    assert [layer["zeros"] for layer in layers if layer["elements"] == 256] == [128]
    assert all(layer["bits"] == 8 and layer["dtype"] == "int8" for layer in layers)
    assert all(0 < layer["scale_min"] <= layer["scale_max"] and layer["scales"] > 1 for layer in layers)
    assert answer["quantize_nodes"] > 0 and answer["macs"] == sum(MACS.values())


def test_a_bare_file_is_what_its_artifact_holds(folder: Path) -> None:
    inside = portcall.api.inspect(folder / "out" / "openvino-int8")
    bare = portcall.api.inspect(folder / "out" / "openvino-int8" / "model.xml")
    assert bare["kind"] == "file" and bare["precision"] is None
    assert bare["layers"] == inside["layers"] and bare["size"] == inside["size"]


def test_the_parent_loads_no_runtime(folder: Path) -> None:
    code = f"""
import sys, portcall.api
answer = portcall.api.inspect({str(folder / "out" / "onnxruntime-int8")!r})
print(len(answer["layers"]), sorted({{"onnx", "onnxruntime", "torch", "openvino"}} & set(sys.modules)))
"""
    assert run_python(code).strip() == "3 []"


def test_a_factory_is_read_by_its_modules_names() -> None:
    answer = portcall.api.inspect("tests.sparse_models:pruned")
    assert answer["kind"] == "source" and answer["format"] == "torch"
    assert [layer["name"] for layer in answer["layers"]] == ["stem.0", "depthwise.0", "pointwise.0", "head"]
    assert answer["weights"]["zero_fraction"] == 0.5
    assert any(n.startswith("folded torch.nn.utils.prune") for n in answer["notes"])


def test_dynamic_dimensions_need_shapes_for_macs(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    values = np.ones((4, 5), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, "w")],
    )
    path = tmp_path / "dynamic.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    unknown = portcall.api.inspect(path)
    assert unknown["macs"] is None and "input 'x' is dynamic" in unknown["notes"][0]
    answer = portcall.api.inspect(path, shapes={"x": (2, 3, 4)})
    assert answer["macs"] == 2 * 3 * 4 * 5
    with pytest.raises(BadInput, match="names no input 'z'"):
        portcall.api.inspect(path, shapes={"z": (1,)})
    with pytest.raises(BadInput, match="does not fit"):
        portcall.api.inspect(path, shapes={"x": (2, 3, 5)})


def _refused(portcall: Portcall, path: str | Path) -> dict[str, str]:
    done = portcall("inspect", path, "--json")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    error: dict[str, str] = json.loads(done.stdout)["error"]
    assert error["kind"] == "bad_input" and error["fix"]
    return error


def test_bad_input_gets_one_clear_error(tmp_path: Path, folder: Path, portcall: Portcall) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    (tmp_path / "engine.plan").write_bytes(b"\0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.mlpackage").write_text("a file, no folder")
    cases = {
        tmp_path / "gone.onnx": "no file",
        tmp_path / "no.onnx": "not a readable ONNX model",
        tmp_path / "engine.plan": "built for one device",
        tmp_path / "empty": "is no artifact",
        tmp_path / "fake.mlpackage": "cannot inspect",
        folder / "data.npz": "cannot inspect",
        folder / "out": "is no artifact",
    }
    for path, said in cases.items():
        assert said in _refused(portcall, path)["message"], path
    assert "onnxruntime-int8" in _refused(portcall, folder / "out")["fix"]


def test_a_changed_artifact_is_told(tmp_path: Path, folder: Path, portcall: Portcall) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "out" / "onnxruntime-int8", copy)
    with (copy / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    done = portcall("inspect", copy, "--json")
    assert done.returncode == 4
    assert "sha256 differs" in json.loads(done.stdout)["error"]["message"]


def test_size_is_that_of_all_files_as_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(b"\0" * 3_000_000)
    second.write_bytes(bytes(range(256)))
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    expected = len(zlib.compress(b"\0" * 3_000_000 + bytes(range(256)), 6))
    assert sizes([first, second]) == {"bytes": 3_000_256, "compressed_bytes": expected, "method": "zlib-6"}
    assert sizes([])["bytes"] == 0


def test_size_by_zstandard_where_it_is_installed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard; fix: pip install 'portcall[zstd]'")
    path = tmp_path / "a.bin"
    path.write_bytes(b"weights " * 100_000)
    found = sizes([path])
    assert found["method"] == "zstd-3"
    assert abs(found["compressed_bytes"] - len(zstandard.compress(path.read_bytes(), 3))) < 64
