"""QNN: context binaries, what they hold, the emulation of the processor, encodings, and a stand-in for the SDK."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from portcall.exporters import _encodings, _qdq, _qnn, _qnn_dlc, _qnn_model, _qnn_session, qnn
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Exported,
    Graph,
    Range,
    Recipe,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from portcall.targets.agent.parity import ParityAccumulator
from tests.exporters.graphs import Array, graph_of, write_onnx

_found = qnn.probe("export")
needs_qnn = pytest.mark.skipif(
    isinstance(_found, Unavailable),
    reason=f"{_found.reason}; fix: {_found.fix}" if isinstance(_found, Unavailable) else "",
)


def cnn(path: Path) -> Graph:
    """Write y = gemm(pool(relu(conv(x)) + depthwise(relu(conv(x))))) with channels of very different weights."""
    rng = np.random.default_rng(0)
    spread = np.geomspace(0.05, 1, 8)
    weights = {
        "w": rng.standard_normal((8, 3, 3, 3)) * spread[:, None, None, None],
        "b": rng.standard_normal(8) * 0.1,
        "d": rng.standard_normal((8, 1, 3, 3)) * spread[:, None, None, None],
        "g": rng.standard_normal((5, 8)),
        "h": rng.standard_normal(5),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "d"], ["e"], "depthwise", pads=[1] * 4, group=8),
        helper.make_node("Add", ["r", "e"], ["s"], "add"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "g", "h"], ["y"], "gemm", transB=1),
    ]
    held = {k: v.astype(np.float32) for k, v in weights.items()}
    return graph_of(write_onnx(path, nodes, {"x": ["batch", 3, 8, 8]}, {"y": ["batch", 5]}, held))


def samples(n: int = 6) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(n)]


def run_float(graph: Graph, names: list[str], x: Array) -> dict[str, Array]:
    """Run the float graph; return any of its tensors."""
    import onnxruntime as ort

    model = onnx.load(str(graph.path))
    known = {o.name for o in model.graph.output}
    for name in names:
        if name not in known:
            model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def ranges_of(graph: Graph) -> dict[str, Range]:
    names = [n for n in _qdq.tapped_tensors(graph.path) if n != "x"]
    found = [{**run_float(graph, names, x), "x": x} for x in samples()]
    return {
        name: Range(min(float(f[name].min()) for f in found), max(float(f[name].max()) for f in found))
        for name in [*names, "x"]
    }


def artifact_of(folder: Path, precision: str, exported: Exported, options: Mapping[str, Any]) -> Artifact:
    return Artifact(folder, exported.entry, "qnn", precision, exported.inputs, exported.outputs, options)


def sqnr_db(graph: Graph, artifact: Artifact) -> float:
    parity = ParityAccumulator(["y"])
    with qnn.interpret(artifact, Workload()) as session:
        for x in samples():
            session.set_inputs({"x": x})
            session.infer()
            parity.add(run_float(graph, ["y"], x), session.get_outputs())
    return float(parity.result("made")["sqnr_db"])


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return cnn(tmp_path_factory.mktemp("a source") / "m.onnx")


@pytest.fixture(scope="module")
def exported(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """The int8 export with its default architectures, into a path with a space."""
    folder = tmp_path_factory.mktemp("an artifact")
    return folder, qnn.export(graph, Recipe("int8"), ranges_of(graph), folder)


# contexts


@needs_qnn
def test_a_context_per_architecture_holds_the_whole_graph(exported: tuple[Path, Exported]) -> None:
    folder, found = exported
    contexts = json.loads((folder / "contexts.json").read_text())["contexts"]
    assert [c["htp_arch"] for c in contexts] == ["73", "75"]
    for context in contexts:
        assert context["whole"] is True and context["partitions"] == 1 and context["outside"] == []
        nodes = onnx.load(str(folder / context["wrapper"])).graph.node
        assert [n.op_type for n in nodes] == ["QuantizeLinear", "EPContext", "DequantizeLinear"]
        [binary] = context["binaries"]
        assert (folder / binary).stat().st_size == context["size_bytes"] > 0
        assert {context["wrapper"], binary} <= set(found.files)
    assert found.min_runtime == found.versions["onnxruntime-qnn"] and found.versions["qnn_sdk"]
    assert sum("holds the whole graph" in note for note in found.notes) == 2
    assert any("fixed at x=1x3x8x8" in note for note in found.notes)
    assert [t.shape for t in (*found.inputs, *found.outputs)] == [(1, 3, 8, 8), (1, 5)]


@needs_qnn
def test_operators_left_outside_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {k: rng.standard_normal((4, 4, 3, 3)).astype(np.float32) for k in ("w", "v")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Shrink", ["a"], ["b"], "odd one", lambd=0.1),
        helper.make_node("Conv", ["b", "v"], ["y"], "second", pads=[1] * 4),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 4, 8, 8]}, weights)
    found = qnn.export(graph_of(path), Recipe("fp16", options={"htp_arch": "75"}), None, tmp_path)
    [context] = json.loads((tmp_path / "contexts.json").read_text())["contexts"]
    assert context["whole"] is False and context["partitions"] == 2
    assert context["outside"] == ["odd one (Shrink)"]
    [note] = [n for n in found.notes if "HTP v75" in n]
    assert "does NOT hold the whole graph: 2 parts" in note and note.endswith("odd one (Shrink)")


@needs_qnn
def test_a_graph_of_which_qnn_takes_nothing_is_refused_by_name(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"], "determinant")
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": [1, 4, 4]}, {"y": [1]}, {})
    with pytest.raises(UnsupportedError, match=r"wrote no context for HTP v73.*determinant \(Det\)"):
        qnn.export(graph_of(path), Recipe("fp16"), None, tmp_path)


@needs_qnn
def test_the_wrong_library_leaves_no_context_and_is_noticed(
    exported: tuple[Path, Exported], tmp_path: Path
) -> None:
    """A session with a backend that is not the HTP's is made all the same, and writes nothing."""
    model = tmp_path / "model.onnx"
    model.write_bytes((exported[0] / "model.onnx").read_bytes())
    wrong = {**_qnn.provider_options("73"), "backend_path": str(tmp_path / "libQnnElsewhere.so")}
    with pytest.raises((UnsupportedError, CellFailed), match=r"wrote no context|QNN refuses"):
        _qnn.build_context(model, "73", wrong)


def test_a_wrapper_without_its_binary_is_refused(tmp_path: Path) -> None:
    for name, message in (
        ("lost.bin", "which is not there"),
        ("../m.onnx", "which is not there"),
        ("", "wraps no"),
    ):
        node = helper.make_node("EPContext", ["x"], ["y"], "c", domain="com.microsoft", ep_cache_context=name)
        path = write_onnx(tmp_path / "m.onnx", [node], {"x": [1]}, {"y": [1]}, {}, domains=["com.microsoft"])
        with pytest.raises(CellFailed, match=message):
            _qnn.read_context(path, "73", 0.0)


def test_only_quantization_at_the_edge_counts_as_boundary(tmp_path: Path) -> None:
    (tmp_path / "c.bin").write_bytes(b"1")
    scale: dict[str, Array] = {"s": np.asarray(1, np.float32), "z": np.asarray(0, np.uint8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["a"], "at the edge"),
        helper.make_node(
            "EPContext",
            ["a"],
            ["b"],
            "c",
            domain="com.microsoft",
            ep_cache_context="c.bin",
            ep_sdk_version="v2",
        ),
        helper.make_node("DequantizeLinear", ["b", "s", "z"], ["d"], "inside"),
        helper.make_node("Relu", ["d"], ["y"], "relu"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1]}, {"y": [1]}, scale, domains=["com.microsoft"])
    context = _qnn.read_context(path, "73", 0.5)
    assert context.boundary == ("at the edge (QuantizeLinear)",)
    assert context.outside == ("inside (DequantizeLinear)", "relu (Relu)") and not context.is_whole
    assert context.sdk == "v2" and context.size_bytes == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("73,99", "no HTP architecture '99'"),
        ("", "no HTP architecture ''"),
        ("68", "v68 does not compute in float16"),
    ],
)
def test_unknown_architectures_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        _qnn.architectures(text, float16=True)


def test_architectures_are_read_with_and_without_v() -> None:
    assert _qnn.architectures("v75, 73,V75", float16=True) == ["75", "73"]
    assert _qnn.architectures("68", float16=False) == ["68"]


def test_an_older_runtime_is_refused(graph: Graph, tmp_path: Path) -> None:
    if isinstance(_found, Unavailable):
        pytest.skip(f"{_found.reason}; fix: {_found.fix}")
    with pytest.raises(UnsupportedError, match=r"min_runtime is 1\.0"):
        qnn.export(graph, Recipe("fp16", options={"min_runtime": "1.0"}), None, tmp_path)


# what is computed


@needs_qnn
@pytest.mark.parametrize(("precision", "floor_db"), [("fp16", 50.0), ("int8", 25.0), ("int16x8", 32.0)])
def test_the_emulated_processor_computes_the_source(
    graph: Graph, tmp_path: Path, precision: str, floor_db: float
) -> None:
    options = {"htp_arch": "75"}
    ranges = None if precision == "fp16" else ranges_of(graph)
    found = qnn.export(graph, Recipe(precision, options=options), ranges, tmp_path)
    artifact = artifact_of(tmp_path, precision, found, options)
    assert sqnr_db(graph, artifact) >= floor_db
    with qnn.interpret(artifact, Workload()) as session:
        assert session.environment["arithmetic"] == "x86 emulation of HTP v75"
        assert session.environment["providers"][0] == _qnn.PROVIDER


@needs_qnn
def test_the_context_binary_is_what_parity_runs(
    graph: Graph, exported: tuple[Path, Exported], tmp_path: Path
) -> None:
    """A wrong scale shows once the context is built of it, and not before; a broken binary does not load."""
    folder, found = exported
    emulated = sqnr_db(graph, artifact_of(folder, "int8", found, {}))
    on_cpu = sqnr_db(graph, artifact_of(folder, "int8", found, {"parity": "cpu"}))
    assert emulated != on_cpu and abs(emulated - on_cpu) < 6  # rounding differs, precision does not
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    artifact = artifact_of(copy, "int8", found, {})
    model = onnx.load(str(copy / "model.onnx"))
    [scale] = [t for t in model.graph.initializer if t.name == "s_scale"]
    wrong = onnx.numpy_helper.to_array(scale) * np.float32(0.5)
    scale.CopyFrom(onnx.numpy_helper.from_array(wrong, scale.name))
    onnx.save(model, str(copy / "model.onnx"))
    assert sqnr_db(graph, artifact) == emulated
    for name in ("model_v73.onnx", "model_v73_qnn.bin"):
        (copy / name).unlink()
    _qnn.build_context(copy / "model.onnx", "73")
    assert sqnr_db(graph, artifact) < emulated - 6
    other = copy / "model_v75_qnn.bin"
    other.write_bytes(other.read_bytes()[:4096])
    with pytest.raises(CellFailed, match=r"QNN refuses model_v75\.onnx"):
        sqnr_db(graph, artifact)


@needs_qnn
@pytest.mark.parametrize("parity", ["emulated", "cpu"])
def test_other_shapes_are_refused_by_name(exported: tuple[Path, Exported], parity: str) -> None:
    folder, found = exported
    with qnn.interpret(artifact_of(folder, "int8", found, {"parity": parity}), Workload()) as session:
        with pytest.raises(
            UnsupportedError, match=r"input 'x' has shape \(2, 3, 8, 8\), this artifact only"
        ) as caught:
            session.set_inputs({"x": np.concatenate(samples(2))})
        assert caught.value.fix.endswith("--shape x=2x3x8x8")


@needs_qnn
def test_contexts_round_as_their_architecture_does(graph: Graph, tmp_path: Path) -> None:
    """v69 and v73 requantize differently, v73 and v75 alike: each context is compiled for what was asked."""
    found = qnn.export(graph, Recipe("int8", options={"htp_arch": "69,73,75"}), ranges_of(graph), tmp_path)
    outputs: dict[str, list[Array]] = {}
    for name in ("69", "73", "75"):
        session = _qnn_session.EmulatedSession(tmp_path / f"model_v{name}.onnx", 1, name)
        outputs[name] = []
        for x in samples(20):
            session.set_inputs({found.inputs[0].name: x})
            session.infer()
            outputs[name].append(session.get_outputs()["y"])
    np.testing.assert_array_equal(outputs["73"], outputs["75"])
    assert not np.array_equal(outputs["69"], outputs["73"])


@needs_qnn
def test_a_matmul_has_one_scale_and_a_convolution_one_per_channel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 1, 1)), "m": rng.standard_normal((8, 6))}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("MatMul", ["c", "m"], ["y"], "product"),
    ]
    held = {k: v.astype(np.float32) for k, v in weights.items()}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4, 8, 6]}, held)
    ranges = {n: Range(-4.0, 4.0) for n in _qdq.tapped_tensors(path)}
    for bias_correction in (False, True):
        options = {"htp_arch": "73", "bias_correction": bias_correction}
        given = {n: replace(r, channel_mean=(0.1,) * (3 if n == "x" else 8)) for n, r in ranges.items()}
        folder = tmp_path / str(bias_correction)
        folder.mkdir()
        qnn.export(graph_of(path), Recipe("int8", options=options), given, folder)
        _, parameters = _qnn_model.read_encodings(folder / "model.onnx")
        assert len(parameters["w"][2]) == 4 and len(parameters["m"][2]) == 1
        [context] = json.loads((folder / "contexts.json").read_text())["contexts"]
        assert context["whole"] is True


@needs_qnn
def test_outputs_of_other_shapes_are_fixed_too(tmp_path: Path) -> None:
    node = helper.make_node("Transpose", ["x"], ["y"], "turn", perm=[1, 0])
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": ["a", "b"]}, {"y": ["b", "a"]}, {})
    graph = graph_of(path)
    shaped = replace(graph, source=replace(graph.source, example_shapes={"x": (3, 7)}))
    fixed = _qnn_model.fix_shapes(shaped, tmp_path)
    inputs, outputs = _qnn_model.bound_tensors(shaped, fixed.path)
    assert inputs[0].shape == (3, 7) and outputs[0].shape == (7, 3)


def test_shapes_that_depend_on_the_data_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["n"], "which"),
        helper.make_node("Cast", ["n"], ["y"], "cast", to=onnx.TensorProto.FLOAT),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [4]}, {"y": [1, "n"]}, {})
    with pytest.raises(UnsupportedError, match="output 'y' depends on the data"):
        _qnn_model.fix_shapes(graph_of(path), tmp_path)


# encodings


@needs_qnn
def test_encodings_are_the_scales_of_the_file_and_of_the_ranges(
    graph: Graph, exported: tuple[Path, Exported]
) -> None:
    folder, found = exported
    assert "encodings.json" in found.files
    written = json.loads((folder / "encodings.json").read_text())
    wanted = _encodings.qnn_encodings(ranges_of(graph))["activation_encodings"]
    assert written["version"] == "0.6.1"
    # Absorbed by the Relu; the Flatten takes over what it reads.
    assert set(wanted) <= set(written["activation_encodings"])
    differing = [n for n in wanted if written["activation_encodings"][n] != wanted[n]]
    assert set(differing) <= {"f", "p"}  # the quantizer lets a Flatten share one scale
    weights = written["param_encodings"]
    assert {k: len(v) for k, v in weights.items()} == {"w": 8, "d": 8, "g": 5}
    assert all(e["offset"] == -128 and e["is_symmetric"] == "True" for e in weights["w"])


@needs_qnn
def test_16_bit_encodings_span_65536_values(graph: Graph, tmp_path: Path) -> None:
    qnn.export(graph, Recipe("int16x8", options={"htp_arch": "73"}), ranges_of(graph), tmp_path)
    written = json.loads((tmp_path / "encodings.json").read_text())
    [x] = written["activation_encodings"]["x"]
    assert x["bitwidth"] == 16 and written["param_encodings"]["w"][0]["bitwidth"] == 8
    span = ranges_of(graph)["x"]
    assert x["max"] - x["min"] == pytest.approx(span.maximum - span.minimum, rel=1e-6)


# the SDK's converter: a stand-in, so that this checks the command line and the files, not a conversion

STAND_IN = """#!{python}
import pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert pathlib.Path(arguments["--input_network"]).is_file()
print("converting")
{behaviour}
"""
WRITES = 'pathlib.Path(arguments["--output_path"]).write_bytes(b"dlc")'


def stand_in(folder: Path, name: str, behaviour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    path = folder / name
    path.write_text(STAND_IN.format(python=sys.executable, behaviour=behaviour))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a model" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(b"any")
    return path


@pytest.mark.parametrize("name", _qnn_dlc.CONVERTERS)
def test_a_converter_on_path_writes_a_dlc(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path / "an sdk", name, WRITES, monkeypatch)
    found, notes = _qnn_dlc.convert(model)
    assert found == "model.dlc" and (model.parent / found).read_bytes() == b"dlc"
    assert f"3 bytes, by {name} of the SDK on PATH; portcall has not run it anywhere" in notes[0]


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (f"{WRITES}; sys.exit('no licence')", "ended with code 1 and said: no licence"),
        ("pass", "ended with code 0 and said: converting"),
    ],
)
def test_a_converter_that_fails_is_a_note(
    behaviour: str, said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path / "sdk", "qairt-converter", behaviour, monkeypatch)
    found, notes = _qnn_dlc.convert(model)
    assert found is None and said in notes[0] and not (model.parent / "model.dlc").exists()


def test_a_converter_that_cannot_start_is_a_note(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sdk"
    folder.mkdir()
    (folder / "qairt-converter").write_bytes(b"\x7fELF broken")
    (folder / "qairt-converter").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    found, notes = _qnn_dlc.convert(model)
    assert found is None and notes[0].startswith("no model.dlc: qairt-converter failed")


def test_without_an_sdk_there_is_no_dlc(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _qnn_dlc.convert(model) == (None, ())


# probing


def test_probe_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = qnn.probe("run")
    if isinstance(_found, Available):
        assert isinstance(found, Unavailable)
        assert "Snapdragon's HTP, this is" in found.reason and "ARM64" in found.fix
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        refused = qnn.probe("export")
        assert isinstance(refused, Unavailable) and "x86-64" in refused.fix
    else:
        assert isinstance(found, Unavailable) and found.fix.startswith("pip install")


@needs_qnn
def test_probe_names_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime_qnn

    monkeypatch.setattr(onnxruntime_qnn, "LIB_DIR_FULL_PATH", str(tmp_path))
    found = qnn.probe("export")
    assert isinstance(found, Unavailable) and "lacks its library" in found.reason


@needs_qnn
def test_load_says_what_each_context_said(exported: tuple[Path, Exported]) -> None:
    """Loading is the device's: on this host the contexts are read by its emulation, or refused with a reason."""
    folder, found = exported
    artifact = artifact_of(folder, "int8", found, {})
    code = (
        "import sys, json\nfrom pathlib import Path\n"
        "from portcall.exporters import qnn\nfrom portcall.targets.agent.contract import Artifact, Workload\n"
        "from portcall.targets.agent.errors import CellFailed\n"
        "artifact = Artifact.from_json(json.loads(sys.argv[1]))\n"
        "try:\n    with qnn.load(artifact, Workload()) as session: print('loaded', session.environment['context'])\n"
        "except CellFailed as error: print('refused', error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(artifact.to_json())],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last == "loaded model_v73.onnx" or ("refused no context" in last and "v75:" in last)


@needs_qnn
def test_an_artifact_from_end_to_end(graph: Graph, tmp_path: Path) -> None:
    """Through the API: interpreted and said so, never timed here, and its example runs without portcall."""
    import portcall.api

    np.savez(tmp_path / "data.npz", x=np.concatenate(samples(20)))
    answer = portcall.api.export(
        str(graph.path), ["qnn:int8"], tmp_path / "out", data=str(tmp_path / "data.npz")
    )
    [result] = answer["results"]
    assert result["outcome"] == "artifact", result["reason"]
    assert result["parity"]["interpreted"] is True and result["parity"]["sqnr_db"] > 20
    folder = Path(shutil.copytree(result["path"], tmp_path / "moved elsewhere"))
    with pytest.raises(Exception, match="Snapdragon's HTP"), portcall.api.load(folder) as opened:
        opened.infer({"x": samples()[0]})
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "example.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "emulated on x86: model_v73.onnx" in done.stdout
    assert "largest difference from the source model" in done.stdout
