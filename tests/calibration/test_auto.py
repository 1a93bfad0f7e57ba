"""auto: what is held back, when a tensor leaves the common method, and that it measures the exports' arithmetic.

Long because each kind of arithmetic has its network here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from ai_edge_litert.interpreter import Interpreter
from onnx import helper, numpy_helper

import portcall.api
from portcall import artifact as artifacts
from portcall.calibration import _auto_onnx, auto
from portcall.calibration.histogram import Accumulator
from portcall.calibration.table import CalibrationTable, Choice, DataRecord, Section, is_held
from portcall.exporters import _encodings, _qdq
from portcall.targets.agent.contract import Graph, Range
from portcall.targets.agent.errors import BadInput
from tests.exporters.graphs import graph_of, write_onnx

Array = np.ndarray[Any, Any]
Run = Any  # the fixture of conftest.py; its type is not importable under importlib mode
MODEL = "tests.models:tiny_cnn"


def heavy_tailed(count: int, shape: tuple[int, ...] = (3, 16, 16)) -> Array:
    """Samples of different loudness, with rare large values: what makes methods differ."""
    rng = np.random.default_rng(7)
    loudness = np.exp(rng.standard_normal((count, *(1 for _ in shape))) / 2)
    return (rng.standard_normal((count, *shape)) * loudness).astype(np.float32)


# which samples


@pytest.mark.parametrize(
    ("n", "every"), [(0, 0), (1, 0), (2, 2), (9, 9), (10, 10), (11, 10), (640, 10), (641, 11), (64_000, 1000)]
)
def test_held_every(n: int, every: int) -> None:
    assert auto.held_every(n) == every


@pytest.mark.parametrize("n", [2, 3, 9, 10, 25, 100, 639, 641, 1000, 50_000])
def test_some_samples_are_held_back_and_never_most(n: int) -> None:
    held = [i for i in range(n) if is_held(i, auto.held_every(n))]
    assert 1 <= len(held) <= min(64, max(1, n // 2))
    if n >= 10:
        assert len(held) <= n // 10


# when a tensor leaves the common method


def errors(**by_method: list[float]) -> dict[str, Array]:
    return {name: np.array(values) for name, values in by_method.items()}


def test_the_common_method_stays_without_evidence() -> None:
    # differences 3, -1, 3, -1: mean 1, standard deviation 2.31, standard error 1.155: 1 < 2.31
    noisy = errors(base=[5.0, 5.0, 5.0, 5.0], other=[2.0, 6.0, 2.0, 6.0])
    assert noisy["other"].mean() < noisy["base"].mean()
    assert auto._significantly_best(noisy, "base") == "base"


def test_a_method_better_by_two_standard_errors_is_taken() -> None:
    # differences 1.5, 0.5, 1.5, 0.5: mean 1, standard deviation 0.577, twice the standard error 0.577
    assert auto._significantly_best(errors(base=[5.0] * 4, other=[3.5, 4.5, 3.5, 4.5]), "base") == "other"
    # the comparison is paired: samples that are hard for both say nothing
    assert auto._significantly_best(errors(base=[1.0, 100.0, 3.0], other=[0.9, 99.9, 2.9]), "base") == "other"


def test_of_several_better_ones_the_least_error_wins() -> None:
    found = errors(base=[4.0, 4.0], mild=[3.0, 3.0], best=[2.0, 2.0], wild=[0.0, 3.9])
    assert auto._significantly_best(found, "base") == "best"  # "wild" has the least mean, and proves nothing


def test_one_sample_proves_nothing_and_equal_is_not_better() -> None:
    assert auto._significantly_best(errors(base=[4.0], other=[1.0]), "base") == "base"
    assert auto._significantly_best(errors(base=[4.0, 4.0], other=[4.0, 4.0]), "base") == "base"


# the same values in another graph


def section_of(tensors: Mapping[str, Array], choices: Mapping[str, Choice] | None = None) -> Section:
    histograms = {}
    for name, values in tensors.items():
        accumulator = Accumulator()
        accumulator.add(values.astype(np.float32))
        histograms[name] = accumulator.histogram()
    record = DataRecord("d.npz", None, 0, None, "d" * 64, 4)
    return Section(
        "onnx", "g", "s", record, (0, 4), ((0, 4),), histograms, held_every=2, choices=choices or {}
    )


def test_choices_go_to_the_tensor_with_the_same_values() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(100) * k for k in (1, 2, 3))
    methods = {"a": "mse", "b": "entropy", "c": "minmax", "d": "minmax"}
    choice = Choice(methods, 7, {"auto": 30.0})
    chosen = section_of({"a": a, "b": b, "c": c, "d": c * 5}, {"asymmetric": choice})
    other = section_of(
        {
            "one": b,
            "two": a * (1 + 1e-6),  # other kernels: equal but for the last bits
            "far": a * 1.01,  # no twin: the method that most tensors have
            "short": b[np.argsort(b)[[0, 50, -1]]],  # equal extremes, but not as many values
        }
    )
    found = auto.transferred(other, chosen)
    assert dict(found.choices["asymmetric"].methods) == {
        "one": "entropy",
        "two": "mse",
        "far": "minmax",
        "short": "minmax",
    }
    assert (found.choices["asymmetric"].n, found.choices["asymmetric"].sqnr_db) == (7, {"auto": 30.0})
    assert set(found.choices) == {"asymmetric"} and found.histograms is other.histograms


def test_the_nearest_twin_wins() -> None:
    values = np.linspace(-1, 1, 50)
    methods = {"near": "mse", "nearer": "entropy"}
    chosen = section_of(
        {"near": values * (1 + 3e-5), "nearer": values}, {"symmetric": Choice(methods, 1, {})}
    )
    found = auto.transferred(section_of({"t": values}), chosen)
    assert found.choices["symmetric"].methods == {"t": "entropy"}


# the fake quantizers


def test_a_quantizer_has_the_scale_and_zero_point_that_exports_write() -> None:
    rng = np.random.default_rng(1)
    for low, high in np.abs(rng.standard_normal((500, 2))) * 10.0 ** rng.uniform(-6, 4, (500, 1)) * (-1, 1):
        scale, zero_point = _encodings.asymmetric_scale(Range(low, high))
        inverse, step, least, most = _auto_onnx.quantizer(low, high, False)
        assert np.float32(step) == np.float32(scale) and (least, most) == (-zero_point, 255 - zero_point)
        assert inverse == pytest.approx(1 / scale, rel=1e-6)
        _, step, least, most = _auto_onnx.quantizer(-high, high, True)
        assert np.float32(step) == np.float32(_encodings.symmetric_scale(Range(-high, high, True)))
        assert (least, most) == (-127, 127)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("extent", [0.0, 1e-45, 1e-38])
def test_a_range_of_nothing_gives_zero(symmetric: bool, extent: float) -> None:
    """The inverse of a scale stays finite in float32: zero times infinity would be NaN."""
    parameters = np.array(_auto_onnx.quantizer(-extent, extent, symmetric), np.float32)
    assert np.isfinite(parameters).all()
    assert _encodings.symmetric_scale(Range(-extent, extent, True)) == 1.0
    assert np.clip(np.round(np.float32(extent) * parameters[0]), *parameters[2:]) * parameters[1] == 0.0


def test_one_sided_ranges() -> None:
    assert _auto_onnx.quantizer(0.0, 2.55, False)[2:] == (0, 255)
    assert _auto_onnx.quantizer(-2.55, 0.0, False)[2:] == (-255, 0)


class Fake:
    """A graph with fake quantizers, and its plain self; both without optimizations of the runtime."""

    def __init__(self, graph: Graph, tensors: list[str]) -> None:
        planned = _auto_onnx.plan({"graph": graph.to_json(), "tensors": tensors}, None)
        self.tensors, self._graph = tensors, graph
        self._plain, self._faked = session(str(graph.path)), session(planned["path"])

    def plain(self, sample: Mapping[str, Array]) -> dict[str, Array]:
        return run(self._plain, sample)

    def faked(self, sample: Mapping[str, Array], parameters: list[Any]) -> dict[str, Array]:
        given = np.array(parameters, np.float32).reshape(-1)
        return run(self._faked, {**sample, _auto_onnx.PARAMETERS: given})


def session(path: str) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, sample: Mapping[str, Array]) -> dict[str, Array]:
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(sample)), strict=True))


def extents(graph: Graph, sample: Mapping[str, Array], tensors: list[str]) -> dict[str, tuple[float, float]]:
    """Return what each tensor of the graph held for *sample*."""
    model = onnx.load(str(graph.path))
    present = {v.name for v in model.graph.output}
    inputs = {v.name for v in model.graph.input}
    wanted = [t for t in tensors if t not in present and t not in inputs]
    model.graph.output.extend(helper.make_empty_tensor_value_info(t) for t in wanted)
    whole = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    arrays = {**sample, **run(whole, sample)}
    return {t: (float(arrays[t].min()), float(arrays[t].max())) for t in tensors}


def test_quantizers_that_are_off_change_nothing(tiny_onnx: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_onnx, tmp_path / "m.onnx"))
    graph = graph_of(path)
    tensors = _qdq.tapped_tensors(path)
    fake = Fake(graph, tensors)
    sample = {"x": heavy_tailed(1)}
    found = extents(graph, sample, tensors)
    plain = fake.plain(sample)["y"].astype(np.float64)
    faked = fake.faked(sample, [_auto_onnx.off(max(-low, high)) for low, high in found.values()])["y"]
    assert np.abs(faked - plain).max() <= 1e-5 * np.abs(plain).max()
    # and quantizers that are on do: the test above can fail
    coarse = fake.faked(sample, [_auto_onnx.quantizer(low, high, False) for low, high in found.values()])["y"]
    assert np.abs(coarse - plain).max() > 1e-4 * np.abs(plain).max()
    assert path.read_bytes() == tiny_onnx.read_bytes()


def activations_only(path: Path) -> Path:
    """Write a graph of operators without weights; an input and an inner tensor are read twice."""
    nodes = [
        helper.make_node("Add", ["x", "x2"], ["s"], "add"),
        helper.make_node("Mul", ["s", "x2"], ["m"], "mul"),
        helper.make_node("Add", ["m", "x"], ["p"], "again"),
        helper.make_node("MatMul", ["s", "m"], ["q"], "product"),
    ]
    inputs: Any = {"x": [1, 2, 16, 16], "x2": [1, 2, 16, 16]}
    return write_onnx(path, nodes, inputs, {"p": [1, 2, 16, 16], "q": [1, 2, 16, 16]}, {})


def test_quantizers_that_are_on_are_the_exports(tmp_path: Path) -> None:
    """Nothing here has weights, so that ONNX Runtime's Q/DQ of the same ranges is all there is to the export."""
    path = activations_only(tmp_path / "m.onnx")
    graph = graph_of(path)
    tensors = _qdq.tapped_tensors(path)
    assert set(tensors) == {"x", "x2", "s", "m", "p", "q"}
    rng = np.random.default_rng(4)
    sample = {k: rng.standard_normal((1, 2, 16, 16)).astype(np.float32) for k in ("x", "x2")}
    found = extents(graph, sample, tensors)
    # clipping too: ranges of 0.8 of what there is
    ranges = {t: Range(min(0.8 * low, 0.0), max(0.8 * high, 0.0)) for t, (low, high) in found.items()}
    _qdq.quantize(graph, ranges, tmp_path / "q.onnx")
    exported = session(str(tmp_path / "q.onnx"))
    model = onnx.load(str(tmp_path / "q.onnx"))
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph.node) >= len(tensors)
    wanted = run(exported, sample)
    parameters = [_auto_onnx.quantizer(r.minimum, r.maximum, False) for r in ranges.values()]
    fake = Fake(graph, tensors)
    answer = fake.faked(sample, parameters)
    plain = fake.plain(sample)
    for name in ("p", "q"):
        step = parameters[tensors.index(name)][1]
        difference = np.abs(answer[name] - wanted[name])
        assert difference.max() <= 1.001 * step, name  # a value between two steps may go to either
        assert (difference > 1e-4 * step).mean() < 0.01, name
        assert np.abs(answer[name] - plain[name]).max() > 2 * step, name  # the quantization itself is larger
    scales = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_scale")}
    zero_points = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, (_, scale, least, _) in zip(tensors, parameters, strict=True):
        assert scales[f"{name}_scale"] == np.float32(scale), name
        assert int(zero_points[f"{name}_zero_point"]) == -least, name


# from end to end


@dataclass
class Made:
    """A table of tiny_cnn with choices, sections onnx and tflite; its DATA; what calibrate answered."""

    table: Path
    data: Path
    answer: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTCALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        np.savez(folder / "d.npz", x=heavy_tailed(40))
        table = folder / "t.pctable"
        answer = portcall.api.calibrate(MODEL, folder / "d.npz", table, auto=True, kinds=["tflite"])
        yield Made(table, folder / "d.npz", answer)


def test_choices_cover_every_tensor_and_both_schemes(made: Made) -> None:
    sections = {s.kind: s for s in CalibrationTable.load(made.table).sections.values()}
    assert set(sections) == {"onnx", "tflite"}
    for section in sections.values():
        assert set(section.choices) == {"asymmetric", "symmetric"}
        assert (section.n, section.held_every) == (36, 10)
        for scheme, choice in section.choices.items():
            assert set(choice.methods) == set(section.histograms), (section.kind, scheme)
            assert set(choice.methods.values()) <= set(auto.CANDIDATES)
            assert choice.n == 4
            assert set(choice.sqnr_db) == {*auto.CANDIDATES, "auto"}


def test_auto_is_at_least_as_good_as_the_best_single_method(made: Made) -> None:
    for section in CalibrationTable.load(made.table).sections.values():
        for choice in section.choices.values():
            assert choice.sqnr_db["auto"] >= max(choice.sqnr_db[m] for m in auto.CANDIDATES)
            assert choice.sqnr_db["auto"] > 15  # and it is a figure of a network that works


def test_samples_held_back_are_not_in_the_histograms(made: Made) -> None:
    values = np.load(made.data)["x"]
    seen = values[[i for i in range(40) if i % 10 != 9]]
    for section in CalibrationTable.load(made.table).sections.values():
        name = next(n for n, h in section.histograms.items() if h.minimum == seen.min())
        assert section.histograms[name].n == seen.size and section.histograms[name].maximum == seen.max()


def test_the_answer_tells_what_was_chosen(made: Made) -> None:
    for said in made.answer["sections"]:
        for choice in said["choices"].values():
            assert sum(choice["methods"].values()) == said["tensors"]
            assert choice["n"] == 4 and choice["sqnr_db"]["auto"] >= choice["sqnr_db"]["minmax"]


def test_every_backend_takes_the_choices(made: Made, tmp_path: Path) -> None:
    """From a table whose choices are known: of three methods in turn, taken over by the other section."""
    sections = {s.kind: s for s in CalibrationTable.load(made.table).sections.values()}
    turns = ("minmax", "percentile:99.9", "mse")
    methods = {name: turns[i % 3] for i, name in enumerate(sections["onnx"].histograms)}
    choice = Choice(methods, 4, {"auto": 30.0})
    onnx_section = replace(sections["onnx"], choices={"asymmetric": choice, "symmetric": choice})
    other = auto.transferred(sections["tflite"], onnx_section)
    assert set(other.choices["asymmetric"].methods.values()) == set(turns)
    table = CalibrationTable({}).with_section(onnx_section).with_section(other)
    table.save(tmp_path / "t.pctable")
    cells = [f"{b}:int8" for b in ("onnxruntime", "openvino", "tflite", "tensorrt")]
    answer = portcall.api.export(
        MODEL, cells, tmp_path / "out", table=tmp_path / "t.pctable", method="auto", evaluation=made.data
    )
    assert [r["outcome"] for r in answer["results"]] == ["artifact"] * 4, answer["results"]
    for result in answer["results"]:
        record = artifacts.read_manifest(Path(result["path"]))["calibration"]
        assert (record["method"], record["n"]) == ("auto", 36)
        assert result["parity"]["sqnr_db"] > 15
    for backend, symmetric in (("onnxruntime", False), ("tensorrt", True)):
        written = scales_of(tmp_path / "out" / f"{backend}-int8" / "model.onnx")
        seen = set()
        for name, found in onnx_section.ranges("auto", symmetric).items():
            scale = _encodings.symmetric_scale(found) if symmetric else _encodings.asymmetric_scale(found)[0]
            if name in written and methods[name] != "minmax":
                assert written[name] == np.float32(scale), (backend, name)
                seen.add(methods[name])
        assert seen == {"percentile:99.9", "mse"}, backend
    (file,) = (tmp_path / "out" / "tflite-int8").glob("*.tflite")
    details = Interpreter(str(file)).get_tensor_details()
    scales = {float(s) for d in details for s in d["quantization_parameters"]["scales"]}
    wanted = other.ranges("auto")
    for name in (n for n, m in other.choices["asymmetric"].methods.items() if m != "minmax"):
        scale = (wanted[name].maximum - wanted[name].minimum) / 255
        assert min(abs(s - scale) for s in scales) <= 1e-5 * scale, name


def scales_of(path: Path) -> dict[str, np.float32]:
    """Return the scale that each tensor of a Q/DQ file is quantized with."""
    graph = onnx.load(str(path)).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {
        n.input[0]: constants[n.input[1]].reshape(-1)[0]
        for n in graph.node
        if n.op_type == "QuantizeLinear" and constants[n.input[1]].size == 1
    }


def test_without_choices_auto_is_refused_with_the_fix(
    portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path
) -> None:
    table = tmp_path / "without.pctable"
    assert portcall("calibrate", tiny_onnx, "--data", tiny_data, "-o", table).returncode == 0
    done = portcall(
        "export", tiny_onnx, "--to", "onnxruntime:int8", "--table", table,
        "--method", "auto", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "holds no choice of methods for asymmetric ranges" in error["message"]
    assert "portcall calibrate with --auto" in error["fix"]
    assert not list((tmp_path / "out").glob("onnx*"))


def test_data_alone_will_do(tiny_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=heavy_tailed(24))
    answer = portcall.api.export(
        tiny_onnx,
        ["onnxruntime:int8", "tensorrt:int8"],
        tmp_path / "out",
        data=tmp_path / "d.npz",
        method="auto",
    )
    assert [r["outcome"] for r in answer["results"]] == ["artifact"] * 2, answer["results"]
    record = artifacts.read_manifest(Path(answer["results"][0]["path"]))["calibration"]
    # 22 of 24 samples calibrate, the rest is for parity; of those 22 two choose
    assert (record["method"], record["n"]) == ("auto", 20)


def test_the_same_choice_twice(tiny_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=heavy_tailed(30))
    tables = [tmp_path / name for name in ("one", "two")]
    for table in tables:
        portcall.api.calibrate(tiny_onnx, tmp_path / "d.npz", table, auto=True)
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_one_sample_cannot_choose(tiny_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=heavy_tailed(1))
    with pytest.raises(BadInput, match="DATA has one sample") as caught:
        portcall.api.calibrate(tiny_onnx, tmp_path / "d.npz", tmp_path / "t", auto=True)
    assert "two samples" in caught.value.fix and not (tmp_path / "t").exists()
    with pytest.raises(BadInput, match="DATA has one sample"):
        portcall.api.export(
            tiny_onnx, "onnxruntime:int8", tmp_path / "out", data=tmp_path / "d.npz", method="auto"
        )


def test_two_samples_can(tiny_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=heavy_tailed(2))
    portcall.api.calibrate(tiny_onnx, tmp_path / "d.npz", tmp_path / "t", auto=True)
    (section,) = CalibrationTable.load(tmp_path / "t").sections.values()
    assert (section.n, section.held_every, section.choices["symmetric"].n) == (1, 2, 1)
    # one held-back sample proves nothing: the method that is best for all
    assert all(len(set(choice.methods.values())) == 1 for choice in section.choices.values())


def test_an_output_of_nothing_but_zeros_is_no_obstacle(tmp_path: Path) -> None:
    """The energy that errors are relative to is zero."""
    node = helper.make_node("Mul", ["x", "x"], ["y"], "square")
    model = write_onnx(tmp_path / "m.onnx", [node], {"x": [1, 8]}, {"y": [1, 8]}, {})
    np.savez(tmp_path / "d.npz", x=np.zeros((20, 8), np.float32))
    portcall.api.calibrate(model, tmp_path / "d.npz", tmp_path / "t", auto=True)
    (section,) = CalibrationTable.load(tmp_path / "t").sections.values()
    assert set(section.choices["asymmetric"].methods) == {"x", "y"}
    assert section.ranges("auto")["y"].maximum == 0.0
