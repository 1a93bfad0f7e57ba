"""Taps see what a direct run sees, and a table gives the same files as the DATA that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, helper

import portcall.api
from portcall import artifact as artifacts
from portcall.calibration import taps
from portcall.calibration.histogram import Accumulator
from portcall.calibration.table import MEAN_UNIT, CalibrationTable, DataRecord, Section
from portcall.exporters import _tflite
from portcall.targets.agent.contract import Graph, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from tests.exporters.graphs import conv_add_mul, graph_of, write_onnx

Array = np.ndarray[Any, Any]


def data(path: Path, **arrays: Array) -> DataRecord:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its own option
    largest = {k: [1, *v.shape[1:]] for k, v in arrays.items()}
    return DataRecord(str(path), None, 0, None, "d" * 64, len(next(iter(arrays.values()))), largest)


def tap(graph: Graph, record: DataRecord, folder: Path, **changes: Any) -> Section:
    """Tap *graph* as a worker does."""
    budget, threads = changes.pop("budget_bytes", 1 << 28), changes.pop("threads", 2)
    shapes = record.largest
    job = {"graph": graph.to_json(), "shapes": shapes, "budget_bytes": budget, "threads": threads}
    plan = taps.plan_onnx(job, None) if graph.kind == "onnx" else None
    output = folder / "out.pctable"
    arguments = {
        "graph": graph.to_json(),
        "plan": plan,
        "data": record.to_json(),
        "planned": [0, record.n],
        "shard": [0, record.n],
        "step": 1,
        "held_every": 0,
        "threads": threads,
        "checkpoint": None,
        "output": str(output),
        **changes,
    }
    seen = taps.observe(arguments, lambda done, total: None)
    assert seen["peak_rss_bytes"] > 1 << 20
    assert plan is None or seen["passes"] == len(plan["passes"])
    return CalibrationTable.load(output).sections[graph.sha256]


def observe(graph: Graph, record: DataRecord, **changes: Any) -> dict[str, tuple[float, float]]:
    """Return minimum and maximum by tensor."""
    found = tap(graph, record, Path(record.spec).parent, **changes).histograms
    return {name: (h.minimum, h.maximum) for name, h in found.items()}


def same(one: Section, other: Section) -> bool:
    means = [{k: v.tolist() for k, v in s.means.items()} for s in (one, other)]
    return one.histograms == other.histograms and means[0] == means[1] and one.observed == other.observed


def extremes(array: Array) -> tuple[float, float]:
    return float(array.min()), float(array.max())


@pytest.fixture
def samples() -> dict[str, Array]:
    rng = np.random.default_rng(2)
    shapes = {"x": (20, 3, 8, 8), "x2": (20, 4, 8, 8)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


# ONNX


def direct_run(graph: Graph, samples: dict[str, Array], names: list[str]) -> dict[str, Array]:
    """Return tensors of a graph for all samples, stacked, from a session of its own."""
    import onnxruntime as ort

    model = onnx.load(str(graph.path))
    present = {v.name for v in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in present)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    count = len(next(iter(samples.values())))
    runs = [
        session.run(names, {k: v[number : number + 1] for k, v in samples.items()}) for number in range(count)
    ]
    return {name: np.stack(arrays) for name, arrays in zip(names, zip(*runs, strict=True), strict=True)}


def test_onnx_taps_equal_a_direct_run(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    section = tap(graph, data(tmp_path / "d.npz", **samples), tmp_path)
    direct = direct_run(graph, samples, ["r", "s", "y"]) | samples
    assert set(section.histograms) == set(direct)  # not "c": the quantizer gives it the range of "r"
    for name, values in direct.items():
        wanted = Accumulator()
        wanted.add(values)
        assert section.histograms[name] == wanted.histogram(), name
    # and, from the convolution's output on, NumPy's float32 arithmetic gives the very same numbers
    s = direct["r"][:, 0] + samples["x2"]
    assert np.array_equal(direct["s"][:, 0], s) and np.array_equal(direct["y"][:, 0], s * s)
    assert section.n == 20 and section.is_complete


def test_channel_means_are_those_of_what_meets_weights(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    section = tap(graph, data(tmp_path / "d.npz", **samples), tmp_path)
    assert set(section.means) == {"x"}
    wanted = samples["x"].mean(axis=(0, 2, 3), dtype=np.float64)
    found = section.ranges("minmax")["x"].channel_mean
    assert found is not None and np.allclose(found, wanted, rtol=0, atol=1e-6)
    assert section.means["x"].dtype == np.int64 and MEAN_UNIT < 1e-8


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3, 5, 7), 1), ((2, 3, 5, 7), -1), ((4, 6), -1), ((4, 6), 1), ((1, 1, 9), -1)]
)
def test_a_channel_mean_is_numpys(shape: tuple[int, ...], axis: int) -> None:
    array = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    others = tuple(a for a in range(array.ndim) if a != axis % array.ndim)
    assert np.allclose(taps.channel_mean(array, axis), array.mean(axis=others, dtype=np.float64), atol=1e-6)
    halves = array.astype(np.float16)
    wanted = halves.astype(np.float64).mean(axis=others)
    assert np.allclose(taps.channel_mean(halves, axis), wanted, atol=1e-3)


def test_threads_and_passes_change_nothing(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    record = data(tmp_path / "d.npz", **samples)
    one = tap(graph, record, tmp_path, threads=1)
    assert same(one, tap(graph, record, tmp_path, threads=4))
    # a budget below one tensor's size (4 KB here in part): a pass for each
    assert same(one, tap(graph, record, tmp_path, budget_bytes=1024))


def test_many_samples_or_few_the_plan_keeps_to_its_budget(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    record = data(tmp_path / "d.npz", **samples)

    def plan(budget: int, threads: int = 4) -> Any:
        job = {"graph": graph.to_json(), "shapes": record.largest, "budget_bytes": budget, "threads": threads}
        return taps.plan_onnx(job, None)

    one = plan(1 << 30)
    assert one["bytes"] == 3 * 4 * 8 * 8 * 4 and (len(one["passes"]), one["width"], one["threads"]) == (
        1,
        4,
        1,
    )
    assert [plan(k * one["bytes"])["width"] for k in (1, 2, 3)] == [1, 2, 3]
    assert plan(2 * one["bytes"])["threads"] == 2
    split = plan(one["bytes"] - 1)
    assert [p["tensors"] for p in split["passes"]] == [["x", "x2", "r", "s"], ["y"]]
    assert (split["width"], split["threads"]) == (1, 4)


def test_shards_add_up_to_the_very_same_table(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    record = data(tmp_path / "d.npz", **samples)
    parts = [tap(graph, record, tmp_path, shard=[a, b]) for a, b in ((0, 7), (7, 13), (13, 20))]
    assert not any(p.is_complete for p in parts)
    joined = CalibrationTable({"g": parts[1].merged(parts[2]).merged(parts[0])})
    whole = CalibrationTable({"g": tap(graph, record, tmp_path)})
    joined.save(tmp_path / "a")
    whole.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("budget_bytes", [1 << 28, 1024], ids=["one pass", "several passes"])
@pytest.mark.parametrize("stop_at", [2, 7, 18])
def test_an_interrupted_run_goes_on_from_what_it_saved(
    tmp_path: Path,
    samples: dict[str, Array],
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    budget_bytes: int,
) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    record = data(tmp_path / "d.npz", **samples)
    whole = tap(graph, record, tmp_path, budget_bytes=budget_bytes)
    monkeypatch.setattr(taps, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(taps, "BLOCK", 3)
    checkpoint = tmp_path / "checkpoint"
    original, runs = CalibrationTable.save, 0

    def save(table: CalibrationTable, path: Path) -> None:
        nonlocal runs
        original(table, path)
        runs += 1
        if runs == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(CalibrationTable, "save", save)
    tensors = (
        [5] if budget_bytes > 1024 else [3, 1, 1]
    )  # per pass; each saves after 3, 6, ... 18 and 20 samples
    passes_done, blocks_done = divmod(stop_at, 7)
    interrupted = passes_done < len(tensors)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            tap(graph, record, tmp_path, checkpoint=str(checkpoint), budget_bytes=budget_bytes)
    monkeypatch.setattr(CalibrationTable, "save", original)
    seen: list[int] = []
    first = taps._Observer.add

    def count(observer: Any, name: str, array: Array) -> None:
        seen.append(1)
        first(observer, name, array)

    monkeypatch.setattr(taps._Observer, "add", count)
    resumed = tap(graph, record, tmp_path, checkpoint=str(checkpoint), budget_bytes=budget_bytes)
    assert same(resumed, whole)
    if interrupted:
        done = 20 * sum(tensors[:passes_done]) + 3 * blocks_done * tensors[passes_done]
        assert len(seen) == 20 * 5 - done


def test_a_checkpoint_that_cannot_be_read_is_no_obstacle(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    record = data(tmp_path / "d.npz", **samples)
    (tmp_path / "checkpoint").write_bytes(b"PK cut off")
    found = tap(graph, record, tmp_path, checkpoint=str(tmp_path / "checkpoint"))
    assert same(found, tap(graph, record, tmp_path))


def test_counting_every_kth_value_keeps_the_extremes(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    record = data(tmp_path / "d.npz", **samples)
    whole, part = tap(graph, record, tmp_path), tap(graph, record, tmp_path, step=8)
    for name, histogram in whole.histograms.items():
        other = part.histograms[name]
        assert (other.minimum, other.maximum) == (histogram.minimum, histogram.maximum)
        assert (
            histogram.n // 12 <= other.n <= histogram.n // 8
        )  # a step from 8 on without a factor of the size
        # the largest distance of the two distribution functions, within what the table says of it
        distance = np.abs(np.cumsum(other.counts) / other.n - np.cumsum(histogram.counts) / histogram.n).max()
        assert distance <= np.sqrt(np.log(2 / 0.05) / (2 * other.n)), name


def test_data_that_ends_early_is_refused(tmp_path: Path, samples: dict[str, Array]) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    record = replace(data(tmp_path / "d.npz", **samples), n=25)
    with pytest.raises(BadInput, match="DATA ended early: 20 of 25 samples came"):
        tap(graph, record, tmp_path)


def test_samples_of_different_shapes(tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "x"], ["y"], "square")
    graph = graph_of(write_onnx(tmp_path / "m.onnx", [node], {"x": [1, "n"]}, {"y": [1, "n"]}, {}))
    folder = tmp_path / "x"
    folder.mkdir()
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal((1, n)).astype(np.float32) for n in (3, 7, 7, 2, 9, 9, 9, 1)]
    for number, array in enumerate(arrays):
        np.save(folder / f"{number:03}.npy", array)
    record = DataRecord(str(folder), None, 0, None, "d" * 64, len(arrays), {"x": [1, 9]})
    found = tap(graph, record, tmp_path).histograms
    for name, values in (("x", arrays), ("y", [a * a for a in arrays])):
        wanted = Accumulator()
        for array in values:
            wanted.add(array)
        assert found[name] == wanted.histogram()


def test_control_flow_is_refused_by_name(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["one"], value_float=1.0)],
        "branch",
        [],
        [helper.make_tensor_value_info("one", TensorProto.FLOAT, [])],
    )
    nodes = [
        helper.make_node("Greater", ["x", "x"], ["g"]),
        helper.make_node("ReduceMax", ["gi"], ["m"], keepdims=0),
        helper.make_node("Cast", ["g"], ["gi"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["i"], "choose", then_branch=branch, else_branch=branch),
        helper.make_node("Mul", ["x", "i"], ["y"], "scale"),
    ]
    nodes[1], nodes[2] = nodes[2], nodes[1]
    graph = graph_of(write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 4]}, {"y": [1, 4]}, {}))
    with pytest.raises(UnsupportedError, match="choose"):
        tap(graph, data(tmp_path / "d.npz", x=np.ones((2, 4), np.float32)), tmp_path)


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
    part = replace(record, start=5, stop=15, n=10)
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
        CellFailed,
        match="tensor 'logarithm', made by Log 'log', holds NaN or infinity for calibration sample 4",
    ) as caught:
        observe(graph, data(tmp_path / "d.npz", x=values))
    assert "check that sample and the layer" in caught.value.fix


def test_infinity_inside_the_network_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], "mul"),
        helper.make_node("Tanh", ["square"], ["y"], "tanh"),
    ]
    graph = graph_of(write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 4]}, {"y": [1, 4]}, {}))
    with pytest.raises(
        CellFailed, match="'square', made by Mul 'mul', holds NaN or infinity for calibration sample 0"
    ):
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
    runner = Interpreter(str(graph.path)).get_signature_runner()
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
        s.kind: (len(s.histograms), 16) for s in table.sections.values()
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
