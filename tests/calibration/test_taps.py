"""Taps see what a direct run sees, and a table gives the same files as the DATA that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from onnx import TensorProto, helper

import portcall.api
from portcall import artifact as artifacts
from portcall.calibration import taps
from portcall.calibration.table import CalibrationTable
from portcall.exporters import _tflite
from portcall.targets.agent.contract import Graph, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, CellFailed
from tests.exporters.graphs import conv_add_mul, graph_of, write_onnx

Array = np.ndarray[Any, Any]


def data(path: Path, **arrays: Array) -> dict[str, Any]:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its own option
    return {
        "spec": str(path),
        "preprocess": None,
        "start": 0,
        "stop": None,
        "n": len(next(iter(arrays.values()))),
    }


def observe(graph: Graph, record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Tap *graph* as a worker does; return minimum and maximum by tensor."""
    plan = taps.plan_onnx({"graph": graph.to_json()}, None) if graph.kind == "onnx" else None
    seen = taps.observe({"graph": graph.to_json(), "plan": plan, "data": record}, lambda done, total: None)
    assert seen["n"] == record["n"]
    pairs = zip(seen["minimum"], seen["maximum"], strict=True)
    return dict(zip(seen["tensors"], pairs, strict=True))


def extremes(array: Array) -> tuple[float, float]:
    return float(array.min()), float(array.max())


@pytest.fixture
def samples() -> dict[str, Array]:
    rng = np.random.default_rng(2)
    shapes = {"x": (20, 3, 8, 8), "x2": (20, 4, 8, 8)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


# ONNX


def test_onnx_taps_equal_a_direct_run(tmp_path: Path, samples: dict[str, Array]) -> None:
    import onnxruntime as ort

    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    found = observe(graph, data(tmp_path / "d.npz", **samples))
    model = onnx.load(str(graph.path))
    for name in ("c", "r", "s"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    direct: dict[str, list[Array]] = {name: [] for name in ("y", "c", "r", "s")}
    for number in range(20):
        one = {k: v[number : number + 1] for k, v in samples.items()}
        for name, array in zip(direct, session.run(list(direct), one), strict=True):
            direct[name].append(array)
    wanted = {k: extremes(np.stack(v)) for k, v in direct.items()} | {
        k: extremes(v) for k, v in samples.items()
    }
    assert found == wanted
    # and, from the convolution's output on, NumPy's float32 arithmetic gives the very same numbers
    r = np.maximum(np.concatenate(direct["c"]), np.float32(0))
    s = r + samples["x2"]
    assert (found["r"], found["s"], found["y"]) == (extremes(r), extremes(s), extremes(s * s))


def test_onnx_taps_leave_the_graph_alone(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    before = graph.path.read_bytes()
    observe(graph, data(tmp_path / "d.npz", **samples))
    assert graph.path.read_bytes() == before


def test_a_slice_of_the_data_is_what_is_observed(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    samples["x"][15] = 100.0
    record = data(tmp_path / "d.npz", **samples)
    assert observe(graph, record)["x"][1] == 100.0
    part = {**record, "start": 5, "stop": 15, "n": 10}
    assert observe(graph, part)["x"] == extremes(samples["x"][5:15])


def test_nan_inside_the_network_is_named_with_its_tensor_and_sample(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Log", ["x"], ["logarithm"], "log"),
        helper.make_node("Relu", ["logarithm"], ["r"], "relu"),
        helper.make_node("Exp", ["r"], ["y"], "exp"),
    ]
    graph = graph_of(write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 4]}, {"y": [1, 4]}, {}))
    values = np.ones((6, 4), np.float32)
    values[4, 2] = -1.0
    with pytest.raises(
        CellFailed, match="'logarithm' holds NaN or infinity for calibration sample 4"
    ) as caught:
        observe(graph, data(tmp_path / "d.npz", x=values))
    assert "check that sample and the layer" in caught.value.fix


def test_infinity_inside_the_network_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], "mul"),
        helper.make_node("Tanh", ["square"], ["y"], "tanh"),
    ]
    graph = graph_of(write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 4]}, {"y": [1, 4]}, {}))
    with pytest.raises(CellFailed, match="'square' holds NaN or infinity for calibration sample 0"):
        observe(graph, data(tmp_path / "d.npz", x=np.full((2, 4), 1e30, np.float32)))


# TFLite


def tflite_graph(path: Path) -> Graph:
    """y = log(x + x), hand-made: tensors x, sum, y."""
    graph, model = schema.SubGraphT(), schema.ModelT()
    graph.tensors, model.operatorCodes, graph.operators = [], [], []
    for name in ("x", "sum", "y"):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name.encode(), [1, 4], 0
        tensor.type = schema.TensorType.FLOAT32
        graph.tensors.append(tensor)
    for number, (operator, inputs, output) in enumerate((("ADD", [0, 0], 1), ("LOG", [1], 2))):
        code, op = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, operator)
        code.version = 1
        op.inputs, op.outputs, op.opcodeIndex = inputs, [output], number
        if operator == "ADD":
            op.builtinOptionsType = schema.BuiltinOptions.AddOptions
            op.builtinOptions = schema.AddOptionsT()
        model.operatorCodes.append(code)
        graph.operators.append(op)
    graph.inputs, graph.outputs = [0], [2]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    for end, index in (("inputs", 0), ("outputs", 2)):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = graph.tensors[index].name, index
        setattr(signature, end, [entry])
    model.version, model.subgraphs, model.signatureDefs = 3, [graph], [signature]
    model.buffers = [schema.BufferT()]
    path.write_bytes(_tflite._write(model))
    specs = (TensorSpec("x", (1, 4), "float32"),), (TensorSpec("y", (1, 4), "float32"),)
    return Graph(
        "tflite", path, "0", Source("m.pt2", "pt2", path, "0", *specs, {"x": (1, 4)}), {"x": "x", "y": "y"}
    )


def test_tflite_taps_equal_a_direct_run(tmp_path: Path) -> None:
    graph = tflite_graph(tmp_path / "m.tflite")
    values = np.random.default_rng(5).uniform(0.1, 3.0, (20, 4)).astype(np.float32)
    found = observe(graph, data(tmp_path / "d.npz", x=values))
    # XNNPACK's logarithm differs from the built-in one in the last bit.
    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(str(graph.path), experimental_op_resolver_type=kernels).get_signature_runner()
    direct = np.concatenate([runner(x=values[i : i + 1])["y"] for i in range(20)])
    assert found == {"x": extremes(values), "sum": extremes(values + values), "y": extremes(direct)}


def test_tflite_nan_is_named_with_its_tensor_and_sample(tmp_path: Path) -> None:
    values = np.ones((3, 4), np.float32)
    values[1, 1] = -1.0
    with pytest.raises(CellFailed, match="'y' holds NaN or infinity for calibration sample 1"):
        observe(tflite_graph(tmp_path / "m.tflite"), data(tmp_path / "d.npz", x=values))


# tables, from end to end

MODEL = "tests.models:tiny_cnn"
CELLS = ["onnxruntime:int8", "openvino:int8", "tflite:int8"]


class Tables:
    """DATA, and a table of it with sections for onnx and tflite, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.data, self._table = folder / "calibration.npz", folder / "whole.pctable"
        self.answer: dict[str, Any] = {}

    @property
    def whole(self) -> Path:
        if not self.answer:
            self.write_data(0)
            self.answer = portcall.api.calibrate(MODEL, self.data, self._table, kinds=["tflite"])
        return self._table

    def onnx_only(self, path: Path) -> Path:
        sections = CalibrationTable.load(self.whole).sections
        CalibrationTable({k: s for k, s in sections.items() if s.kind == "onnx"}).save(path)
        return path

    def write_data(self, seed: int) -> None:
        values = np.random.default_rng(seed).standard_normal((16, 3, 16, 16)).astype(np.float32)
        np.savez(self.data, x=values)


@pytest.fixture(scope="session")
def shared_tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return Tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def tables(shared_tables: Tables) -> Iterator[Tables]:
    assert shared_tables.whole.is_file()
    yield shared_tables
    shared_tables.write_data(0)


def model_files(folder: Path) -> dict[str, bytes]:
    manifest = artifacts.read_manifest(folder)
    names = set(manifest["files"]) - {artifacts.SAMPLES, artifacts.EXAMPLE}
    return {name: (folder / name).read_bytes() for name in names}


def test_calibrate_answers_what_it_wrote(tables: Tables) -> None:
    table = CalibrationTable.load(tables.whole)
    assert tables.answer["table"] == str(tables.whole)
    assert {s["kind"]: (s["tensors"], s["n"]) for s in tables.answer["sections"]} == {
        s.kind: (len(s.tensors), 16) for s in table.sections.values()
    }
    assert {s.kind for s in table.sections.values()} == {"onnx", "tflite"}
    assert all(s.data.spec == str(tables.data) for s in table.sections.values())


def test_a_table_gives_the_same_bytes_as_its_data(tables: Tables, tmp_path: Path) -> None:
    # With --eval nothing of DATA is held out, as with calibrate.
    from_table = portcall.api.export(MODEL, CELLS, tmp_path / "t", table=tables.whole, evaluation=tables.data)
    from_data = portcall.api.export(MODEL, CELLS, tmp_path / "d", data=tables.data, evaluation=tables.data)
    for one, other in zip(from_table["results"], from_data["results"], strict=True):
        assert one["outcome"] == other["outcome"] == "artifact", (one["reason"], other["reason"])
        folders = Path(one["path"]), Path(other["path"])
        first, second = (model_files(folder) for folder in folders)
        assert first == second and first
        records = [artifacts.read_manifest(folder)["calibration"] for folder in folders]
        assert records[0]["table_sha256"] and records[1]["table_sha256"] is None
        assert {**records[0], "table_sha256": None} == records[1]


def test_a_missing_section_is_tapped_on_the_recorded_data(tables: Tables, tmp_path: Path) -> None:
    table = tables.onnx_only(tmp_path / "onnx.pctable")
    answer = portcall.api.export(MODEL, "tflite:int8", tmp_path / "a", table=table, evaluation=tables.data)
    assert [r["outcome"] for r in answer["results"]] == ["artifact"], answer["results"][0]["reason"]
    whole = portcall.api.export(
        MODEL, "tflite:int8", tmp_path / "b", table=tables.whole, evaluation=tables.data
    )
    one, other = (model_files(Path(a["results"][0]["path"])) for a in (answer, whole))
    assert one == other


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_missing_section_without_its_data_is_refused_with_the_command(
    tables: Tables, tmp_path: Path, change: str
) -> None:
    table = tables.onnx_only(tmp_path / "onnx.pctable")
    if change == "gone":
        tables.data.unlink()
    else:
        tables.write_data(1)
    with pytest.raises(BadInput, match="the table has no tflite section, and its DATA ") as caught:
        portcall.api.export(MODEL, "tflite:int8", tmp_path / "out", table=table)
    assert ("has changed since" if change == "changed" else "cannot be read") in caught.value.message
    assert caught.value.fix == f"Run: portcall calibrate {MODEL} --data DATA --for tflite -o {table}"
    assert not list((tmp_path / "out").glob("tflite*"))


def test_a_table_of_another_model_is_refused_before_anything_is_written(
    tables: Tables, tmp_path: Path, tiny_onnx: Path, tiny_data: Path
) -> None:
    for data_too in (None, tiny_data):
        with pytest.raises(BadInput, match="was made from another model") as caught:
            portcall.api.export(
                tiny_onnx, "onnxruntime:fp32,int8", tmp_path / "out", table=tables.whole, data=data_too
            )
        assert caught.value.fix.startswith(f"Run: portcall calibrate {tiny_onnx} --data ")
        assert not (tmp_path / "out").exists()
