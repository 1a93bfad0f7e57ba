"""The Core ML backend on small graphs: options, notes, dtypes, what is refused; parity by the interpreter."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from portcall.exporters import _coreml, _coreml_options, _coreml_weights, _qdq_symmetric, coreml
from portcall.exporters._mil import Program
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Exported,
    Graph,
    Range,
    Recipe,
    Source,
    TensorSpec,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from tests.exporters.graphs import Array, conv_add_mul, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx, sqnr_db

if importlib.util.find_spec("coremltools") is None:
    pytest.skip("coremltools is not installed: pip install 'portcall[coreml]'", allow_module_level=True)

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Take what is loaded out of garbage collection: ct.convert collects at every call."""
    gc.freeze()
    yield
    gc.unfreeze()


def export(
    graph: Graph, precision: str, folder: Path, ranges: Mapping[str, Range] | None = None, **options: Any
) -> tuple[Artifact, Exported]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = coreml.export(graph, Recipe(precision, options=options), ranges, folder)
    assert sorted(made.files) == sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    )
    artifact = Artifact(
        folder, made.entry, "coreml", precision, made.inputs, made.outputs, options, made.min_runtime
    )
    return artifact, made


def infer(artifact: Artifact, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the interpreter's outputs by source name, for arrays by source name."""
    with coreml.interpret(artifact, Workload()) as session:
        session.set_inputs({t.name: arrays[t.source] for t in artifact.inputs})
        session.infer()
        found = session.get_outputs()
    return {t.source: found[t.name] for t in artifact.outputs}


def wide(path: Path) -> Graph:
    """y = relu(conv(x)) pooled, times a matrix of 64 x 20, plus 20 x 20: x float32[batch, 8, 12, 12]."""
    weights = {
        "conv.w": RNG.standard_normal((64, 8, 3, 3)) * np.geomspace(0.02, 0.5, 64).reshape(-1, 1, 1, 1),
        "conv.b": RNG.standard_normal(64),
        "m1": RNG.standard_normal((64, 20)) / 8,
        "m2": RNG.standard_normal((20, 20)) / 4,
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["c"], "/body/conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "/body/relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "/pool"),
        helper.make_node("Flatten", ["p"], ["f"], "/flatten"),
        helper.make_node("MatMul", ["f", "m1"], ["h"], "/head/first"),
        helper.make_node("Relu", ["h"], ["hr"], "/head/relu"),
        helper.make_node("MatMul", ["hr", "m2"], ["y"], "/head/second"),
    ]
    plain = {k: v.astype(np.float32) for k, v in weights.items()}
    return graph_of(write_onnx(path, nodes, {"x": ["batch", 8, 12, 12]}, {"y": ["batch", 20]}, plain))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return wide(tmp_path_factory.mktemp("coreml") / "wide.onnx")


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Array]]:
    return [{"x": RNG.standard_normal((1, 8, 12, 12)).astype(np.float32)} for _ in range(4)]


def compared(graph: Graph, artifact: Artifact, samples: list[dict[str, Array]]) -> float:
    wanted = [run[0] for run in run_onnx(graph.path, samples)]
    return sqnr_db(wanted, [infer(artifact, s)["y"] for s in samples])


FLOORS = {
    "fp32": (120.0, 1.0),
    "fp16": (55.0, 0.52),
    "int8-weights": (35.0, 0.29),
    "int4-weights": (20.0, 0.24),
    "palette4": (17.0, 0.2),
    "palette6": (28.0, 0.25),
}


@pytest.mark.parametrize("precision", FLOORS)
def test_precisions_and_their_sizes(
    graph: Graph,
    samples: list[dict[str, Array]],
    tmp_path: Path,
    precision: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    artifact, made = export(graph, precision, tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    floor, share = FLOORS[precision]
    assert compared(graph, artifact, samples) >= floor
    blob = artifact.path / "Data/com.apple.CoreML/weights/weight.bin"
    assert blob.stat().st_size < share * 4 * (64 * 8 * 9 + 64 * 20 + 20 * 20 + 64) + 1500
    assert made.min_runtime == _coreml_weights.NEEDS[precision]
    assert Program(artifact.path).spec.specificationVersion == _coreml_options.TARGETS[made.min_runtime]
    assert len(infer(artifact, {"x": np.zeros((3, 8, 12, 12), np.float32)})["y"]) == 3  # the batch is dynamic


def test_int8_computes_on_the_integers_of_our_ranges(
    graph: Graph, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    ranges = {
        name: Range(-max(-r.minimum, r.maximum), max(-r.minimum, r.maximum), True)
        for name, r in onnx_ranges(graph.path, samples).items()
    }
    artifact, made = export(graph, "int8", tmp_path / "a", ranges)
    _qdq_symmetric.quantize(graph, ranges, tmp_path / "q.onnx", {})
    wanted = [run[0] for run in run_onnx(tmp_path / "q.onnx", samples)]
    found = [infer(artifact, s)["y"] for s in samples]
    assert sqnr_db(wanted, found) > 38  # float16 moves a few values over the edge of a step
    assert 25 < compared(graph, artifact, samples) < 50
    counted = coreml.census(artifact, {"x": (1, 8, 12, 12)})
    assert counted.macs == counted.integer_macs == 64 * 144 * 72 + 64 * 20 + 20 * 20
    assert counted.quantize_nodes == 2 * 4 and counted.float_nodes == ()
    assert any("A17 Pro" in note for note in made.notes)
    kinds = [s.kind for s in Program(artifact.path).steps]
    assert kinds[:4] == ["cast", "quantize", "dequantize", "conv"]
    text = str(Program(artifact.path).spec.mlProgram)
    assert text.count('type: "constexpr_affine_dequantize"') == 3


def test_int8_weights_in_groups_have_no_integer_product(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="int8 products take no weights by"):
        export(graph, "int8", tmp_path / "a", {}, weights="group32")


def test_the_same_model_gives_the_same_bytes(graph: Graph, tmp_path: Path) -> None:
    first, _ = export(graph, "int4-weights", tmp_path / "a")
    second, _ = export(graph, "int4-weights", tmp_path / "b")
    for file in first.path.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (second.path / file.relative_to(first.path)).read_bytes(), file.name


def test_what_has_no_multiple_of_the_block_is_named(graph: Graph, tmp_path: Path) -> None:
    _, made = export(graph, "int4-weights", tmp_path / "a")
    [note] = [n for n in made.notes if "multiple" in n]
    assert note == "int8 weights per channel, the inputs are no multiple of 32: /body/conv, /head/second"
    _, made = export(graph, "int8-weights", tmp_path / "b", weights="group32")
    assert note in made.notes and made.min_runtime == "iOS18"


def test_four_bits_per_channel(graph: Graph, samples: list[dict[str, Array]], tmp_path: Path) -> None:
    blocks, _ = export(graph, "int4-weights", tmp_path / "a")
    artifact, made = export(graph, "int4-weights", tmp_path / "b", weights="channel", bias_correction=True)
    assert made.notes[0].startswith("no bias correction")
    sizes = [sum(f.stat().st_size for f in a.path.rglob("*") if f.is_file()) for a in (artifact, blocks)]
    assert 10 < compared(graph, artifact, samples) < 30 and sizes[0] < sizes[1]


def test_padding_on_one_side_belongs_to_the_convolution(tmp_path: Path) -> None:
    constants = {
        "w": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "same", pads=[0, 0, 1, 1], strides=[2, 2]),
        helper.make_node("Pad", ["x", "pads"], ["p"], "pad"),
        helper.make_node("Conv", ["p", "w"], ["d"], "padded", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["p"], ["e"], "reads_it_too"),
    ]
    shape: list[int | str] = ["batch", 3, 8, 8]
    outputs: dict[str, list[int | str] | None] = {
        "c": ["batch", 4, 4, 4],
        "d": ["batch", 4, 9, 10],
        "e": ["batch", 3, 9, 10],
    }
    graph = graph_of(write_onnx(tmp_path / "m.onnx", nodes, {"x": shape}, outputs, constants))
    x = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
    artifact, _ = export(graph, "fp32", tmp_path / "a")
    found = infer(artifact, {"x": x})
    for name, wanted in zip(outputs, run_onnx(graph.path, [{"x": x}])[0], strict=True):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5)
    steps = {s.outputs[0][0]: s for s in Program(artifact.path).steps}
    assert [list(steps[n].inputs["pad"]) for n in ("c", "d")] == [[0, 1, 0, 1], [2, 1, 1, 3]]
    ranges = {"x": Range(-4.0, 4.0, True)}
    artifact, _ = export(graph, "int8", tmp_path / "b", {**ranges, "p": Range(-4.0, 4.0, True)})
    counted = coreml.census(artifact, {"x": (1, 3, 8, 8)})
    assert counted.integer_macs == counted.macs == 16 * 4 * 27 + 90 * 4 * 27


def test_a_scale_too_small_for_float16_stays_in_float32(tmp_path: Path) -> None:
    weight = (RNG.standard_normal((4, 3, 1, 1)) * 1e3).astype(np.float32)
    path = write_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        {"x": [1, 3, 8, 8]},
        {"y": [1, 4, 8, 8]},
        {"w": weight},
    )
    graph = graph_of(path)
    x = (RNG.standard_normal((1, 3, 8, 8)) * 1e-5).astype(np.float32)
    artifact, _ = export(graph, "int8", tmp_path / "a", {"x": Range(-4e-5, 4e-5, True)})
    assert 30 < sqnr_db(run_onnx(path, [{"x": x}])[0][0], infer(artifact, {"x": x})["y"]) < 60


def test_tables_for_groups_of_channels(graph: Graph, samples: list[dict[str, Array]], tmp_path: Path) -> None:
    one, _ = export(graph, "palette4", tmp_path / "a")
    groups, made = export(graph, "palette4", tmp_path / "b", palette_group=8)
    assert made.min_runtime == "iOS18"
    assert any(
        n == "one table for the whole tensor, its channels are no multiple of 8: /head/first, /head/second"
        for n in made.notes
    )
    assert compared(graph, groups, samples) > compared(graph, one, samples)


def test_keep_float_keeps_a_weight(graph: Graph, tmp_path: Path) -> None:
    artifact, _ = export(graph, "int8-weights", tmp_path / "a", keep_float=["/head/*", "type:Relu"])
    made = [s.made_from["weight"] for s in Program(artifact.path).steps if "weight" in s.made_from]
    assert made == ["constexpr_affine_dequantize", "const", "const"]
    with pytest.raises(UnsupportedError, match="no convolution or product with a constant weight left"):
        export(graph, "palette4", tmp_path / "b", keep_float=["type:Conv", "type:MatMul"])
    with pytest.raises(BadInput, match="keep_float 'nothing' matches no operator"):
        export(graph, "palette4", tmp_path / "c", keep_float=["nothing"])


def test_operators_carry_the_names_of_the_onnx_nodes(graph: Graph, tmp_path: Path) -> None:
    artifact, _ = export(graph, "fp32", tmp_path / "a")
    counted = coreml.census(artifact, {"x": (1, 8, 12, 12)})
    assert counted.float_nodes == ("body_conv", "head_first", "y")
    assert counted.quantize_nodes == counted.integer_macs == 0


# deployment targets


@pytest.mark.parametrize(
    ("given", "found"), [(None, "iOS16"), ("iOS17", "iOS17"), ("macOS13", "iOS16"), ("watchOS11", "iOS18")]
)
def test_targets(given: str | None, found: str) -> None:
    assert _coreml_options.target_of(given, "iOS16", "x") == found


def test_a_target_older_than_the_precision_is_refused(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        export(graph, "int4-weights", tmp_path / "a", min_runtime="macOS13")
    assert caught.value.message == "coreml:int4-weights needs iOS18 (macOS15); min_runtime is macOS13"
    with pytest.raises(BadInput, match="min_runtime is 'iOS9'") as unknown:
        export(graph, "fp32", tmp_path / "a", min_runtime="iOS9")
    assert "iOS15, iOS16" in unknown.value.fix
    artifact, made = export(graph, "fp32", tmp_path / "a", min_runtime="macOS14")
    assert made.min_runtime == "iOS17" and Program(artifact.path).spec.specificationVersion == 8


def test_an_older_macos_is_refused_with_both_versions() -> None:
    for needed, version in (("iOS16", "13.2.1"), ("iOS15", "15.0"), (None, "11.0")):
        _coreml_options.check_macos(needed, version)
    with pytest.raises(UnsupportedError, match=r"needs iOS18 \(macOS15\); this is macOS 14\.6"):
        _coreml_options.check_macos("iOS18", "14.6")


# shapes


def test_fixed_shapes(graph: Graph, tmp_path: Path) -> None:
    artifact, made = export(graph, "fp32", tmp_path / "a", shapes="fixed")
    assert made.inputs[0].shape == (1, 8, 12, 12)
    assert Program(artifact.path).inputs[0].shape == (1, 8, 12, 12)
    assert not any("flexible" in n for n in made.notes)
    flexible, made = export(graph, "fp32", tmp_path / "b")
    assert made.inputs[0].shape == ("batch", 8, 12, 12)
    assert Program(flexible.path).inputs[0].shape == ("dim_0", 8, 12, 12)
    assert any("Neural Engine" in n for n in made.notes)


def test_a_dimension_that_the_conversion_froze_is_found(graph: Graph, tmp_path: Path) -> None:
    artifact, _ = export(graph, "fp32", tmp_path / "a", shapes="fixed")
    module, _ = _coreml.to_program(graph.path, graph.source, False)
    saved = Program(artifact.path)
    with pytest.raises(UnsupportedError, match="froze a dynamic dimension") as caught:
        coreml._check_dynamic(saved, module, graph.source, {}, "fp32")
    assert "--shape" in caught.value.fix


# images


@pytest.mark.parametrize("color", ["RGB", "BGR", "GRAY"])
def test_an_image_input_takes_the_sources_floats(tmp_path: Path, color: str) -> None:
    channels = 1 if color == "GRAY" else 3
    weight = RNG.standard_normal((4, channels, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv")]
    shape = [1, channels, 8, 10]
    graph = graph_of(write_onnx(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": [1, 4, 6, 8]}, {"w": weight}))
    bias = "-1" if color == "GRAY" else "-1/-0.9/-1.1"
    artifact, made = export(
        graph, "fp32", tmp_path / "a", image=f"x:scale=0.0078125,bias={bias},color={color}"
    )
    [feature] = Program(artifact.path).spec.description.input
    assert feature.type.WhichOneof("Type") == "imageType"
    assert f"x is a {color} image of 8 bits, x = 0.0078125 * pixel + {bias}" in made.notes[0]
    pixels = RNG.integers(0, 256, shape)
    offsets = np.array([float(b) for b in bias.split("/")], np.float32).reshape(-1, 1, 1)
    x = (pixels * 0.0078125 + offsets).astype(np.float32)
    wanted = run_onnx(graph.path, [{"x": x}])[0][0]
    np.testing.assert_allclose(infer(artifact, {"x": x})["y"], wanted, rtol=1e-4, atol=1e-5)
    between = infer(artifact, {"x": x + np.float32(0.003)})["y"]  # less than half a step: the same pixels
    np.testing.assert_array_equal(between, infer(artifact, {"x": x})["y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:scale=a", "cannot read 'scale=a'"),
        ("x:color=CMYK", "cannot read 'color=CMYK'"),
        ("x:size=3", "cannot read 'size=3'"),
        ("x:scale=0", "has scale 0"),
        ("x:bias=1/2", "2 values of bias"),
        ("x:bias=1/2/3,color=GRAY", "3 values of bias"),
        ("z:scale=1", "names 'z', no input"),
        ("x:color=GRAY", "is no GRAY image"),
        ("x", "is no RGB image"),
    ],
)
def test_images_that_cannot_be(graph: Graph, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        export(graph, "fp32", tmp_path / "a", image=text)
    assert caught.value.fix


def test_an_image_fixes_the_batch(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], "relu")]
    shape: list[int | str] = ["batch", 3, 8, 8]
    graph = graph_of(write_onnx(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": shape}, {}))
    artifact, made = export(graph, "fp32", tmp_path / "a", image="x")
    assert made.inputs[0].shape == (1, 3, 8, 8)
    np.testing.assert_array_equal(infer(artifact, {"x": np.full((1, 3, 8, 8), 7, np.float32)})["y"], 7)


def test_two_images_with_their_defaults() -> None:
    assert _coreml_options.parse_images("a;b:scale=2") == {
        "a": _coreml_options.Image(),
        "b": _coreml_options.Image(2.0),
    }
    assert _coreml_options.parse_images("") == {}


# types


def typed(path: Path) -> Graph:
    """ids int64[n], mask bool[n], x float64[n] -> y float64[n] = table[ids] * mask + x; big bool[n]; index int64[n]."""
    inputs = [("ids", TensorProto.INT64), ("mask", TensorProto.BOOL), ("x", TensorProto.FLOAT)]
    outputs = [("y", TensorProto.FLOAT), ("big", TensorProto.BOOL), ("twice", TensorProto.INT64)]
    table = RNG.standard_normal(9).astype(np.float32)
    constants = {"table": table, "one": np.array(1, np.float32), "two": np.array(2, np.int64)}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["g"], "gather"),
            helper.make_node("Cast", ["mask"], ["m"], "cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", ["g", "m"], ["gm"], "mask_it"),
            helper.make_node("Add", ["gm", "x"], ["y"], "add"),
            helper.make_node("Greater", ["y", "one"], ["big"], "greater"),
            helper.make_node("Mul", ["ids", "two"], ["twice"], "double"),
        ],
        "typed",
        [helper.make_tensor_value_info(n, t, ["n"]) for n, t in inputs],
        [helper.make_tensor_value_info(n, t, ["n"]) for n, t in outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    names = {TensorProto.INT64: "int64", TensorProto.BOOL: "bool", TensorProto.FLOAT: "float32"}
    ins, outs = (tuple(TensorSpec(n, ("n",), names[t]) for n, t in some) for some in (inputs, outputs))
    source = Source(str(path), "onnx", path, "0", ins, outs, {t.name: (5,) for t in ins})
    return Graph("onnx", path, "0", source, {t.name: t.name for t in ins + outs})


def test_types_that_core_ml_has_not_are_cast_by_the_session(tmp_path: Path) -> None:
    graph = typed(tmp_path / "m.onnx")
    artifact, made = export(graph, "fp32", tmp_path / "a")
    assert [t.dtype for t in made.inputs] == ["int64", "bool", "float32"]
    assert [t.dtype for t in Program(artifact.path).inputs] == ["int32", "int32", "float32"]
    arrays: dict[str, Array] = {
        "ids": np.array([8, 0, 3, 3, 1, 2]),
        "mask": np.array([True, False, True, True, False, True]),
        "x": RNG.standard_normal(6).astype(np.float32),
    }
    found = infer(artifact, arrays)
    wanted = dict(zip(["y", "big", "twice"], run_onnx(graph.path, [arrays])[0], strict=True))
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, rtol=1e-6)
    assert any("mask is bool in the model and int32 in the package" in n for n in made.notes)


def test_scalars_stay_scalars(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["y"], "mul"),
        helper.make_node("Neg", ["factor"], ["z"], "neg"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 4], "factor": []}, {"y": [1, 4], "z": []}, {})
    artifact, made = export(graph_of(path), "fp32", tmp_path / "a")
    assert made.inputs[1].shape == ()
    found = infer(artifact, {"x": np.ones((1, 4), np.float32), "factor": np.asarray(3, np.float32)})
    np.testing.assert_array_equal(found["y"], np.full((1, 4), 3))
    assert found["z"].shape == () and found["z"] == -3


def test_a_mask_beyond_float16_makes_no_nan(tmp_path: Path) -> None:
    constants = {"one": np.array(1, np.float32), "least": np.array(np.finfo(np.float32).min)}
    nodes = [
        helper.make_node("Sub", ["one", "mask"], ["inverse"], "invert"),
        helper.make_node("Mul", ["inverse", "least"], ["bias"], "scale"),
        helper.make_node("Add", ["x", "bias"], ["scores"], "add"),
        helper.make_node("Softmax", ["scores"], ["y"], "softmax", axis=-1),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 8], "mask": [2, 8]}, {"y": [2, 8]}, constants)
    graph = graph_of(path)
    artifact, _ = export(graph, "fp16", tmp_path / "a")
    mask = np.array([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8], np.float32)
    arrays = {"x": RNG.standard_normal((2, 8)).astype(np.float32), "mask": mask}
    found = infer(artifact, arrays)["y"]
    assert np.all(np.isfinite(found)) and np.all(found[0, 3:] == 0)
    assert sqnr_db(run_onnx(path, [arrays])[0][0], found) > 50


def test_several_inputs_and_operators(tmp_path: Path) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    artifact, _ = export(graph, "fp32", tmp_path / "a")
    arrays = {n: RNG.standard_normal((2, c, 8, 8)).astype(np.float32) for n, c in (("x", 3), ("x2", 4))}
    assert sqnr_db(run_onnx(graph.path, [arrays])[0][0], infer(artifact, arrays)["y"]) > 115


def test_an_operator_that_core_ml_lacks_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "/fine/relu"),
        helper.make_node("IsInf", ["r"], ["i"], "/odd/one"),
        helper.make_node("Cast", ["i"], ["y"], "/cast", to=TensorProto.FLOAT),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 3]}, {"y": [2, 3]}, {}, opset=20)
    with pytest.raises(
        UnsupportedError, match=r"no operator for '/odd/one' \(IsInf\), torch operator isinf\."
    ) as caught:
        export(graph_of(path), "fp32", tmp_path / "a")
    assert "another backend" in caught.value.fix


def test_what_coremltools_cannot_convert_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "/deep/conv")]
    weight = RNG.standard_normal((4, 3, 1, 1)).astype(np.float32)
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 8, 8]}, {"w": weight})
    graph = graph_of(path)
    module, program = _coreml.to_program(path, graph.source, True)
    error = _coreml._refused(
        module, program, ValueError("bad\nmore"), ["ERROR - converting 'conv2d' op (located at: '')"]
    )
    assert (
        error.message
        == "coremltools cannot convert '/deep/conv' (Conv), torch operator conv2d: ValueError: bad"
    )


# the rest of the backend


def test_it_runs_on_a_mac_only() -> None:
    assert isinstance(coreml.probe("export"), Available)
    found = coreml.probe("run")
    if sys.platform == "darwin":
        assert isinstance(found, Available)
    else:
        assert isinstance(found, Unavailable) and "macOS" in found.reason and "Mac" in found.fix


def test_a_bare_package_has_the_runtimes_names(graph: Graph, tmp_path: Path) -> None:
    artifact, _ = export(graph, "fp16", tmp_path / "a")
    bare = Artifact(artifact.directory, artifact.entry, "coreml", "fp16")
    with coreml.interpret(bare, Workload()) as session:
        assert [str(t) for t in session.inputs] == ["x: float32[dim_0, 8, 12, 12]"]
        session.set_inputs({"x": np.zeros((1, 8, 12, 12), np.float32)})
        session.infer()
        assert list(session.get_outputs()) == ["y"]
        assert "interpreted" in session.environment["runtime"]


def test_a_changed_byte_shows_in_the_session(
    graph: Graph, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    artifact, _ = export(graph, "fp32", tmp_path / "a")
    blob = artifact.path / "Data/com.apple.CoreML/weights/weight.bin"
    raw = bytearray(blob.read_bytes())
    raw[len(raw) // 2 | 3] ^= 0x40  # the exponent of a float
    blob.write_bytes(bytes(raw))
    assert not compared(graph, artifact, samples) > 100


def test_a_package_with_fewer_inputs_is_refused(graph: Graph, tmp_path: Path) -> None:
    artifact, _ = export(graph, "fp32", tmp_path / "a")
    two = Source("", "onnx", graph.path, "", graph.source.inputs * 2, graph.source.outputs, {})
    with pytest.raises(CellFailed, match="the package has 1 inputs and 1 outputs, the model 2 and 1"):
        coreml._bound(two, Program(artifact.path), False)
