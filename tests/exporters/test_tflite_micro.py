"""TensorFlow Lite Micro: the arena, budgets, operators, an integer interface, layers that differ, the session.

The interpreter that judges is TFLM's own, with reference kernels on the host: no figure here is a device's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import portcall.api
from portcall import artifact as artifacts
from portcall.exporters import _tflite, _tflite_quantize, _tflm_arena, _tflm_layers, _tflm_model, tflite_micro
from portcall.targets.agent.contract import (
    Artifact,
    Exported,
    Graph,
    Ranges,
    Recipe,
    Source,
    TensorSpec,
    Workload,
)
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from tests.exporters.contract import Array, Exports
from tests.exporters.ranges import tflite_ranges

# The interpreter of LiteRT says so where every tensor is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*experimental_preserve_all_tensors:UserWarning")

BACKENDS = ("tflite_micro",)
PRECISIONS = ("fp32", "int8", "int16x8")
SHAPE = (1, 3, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def _tflm() -> None:
    pytest.importorskip(
        "tflite_micro.python.tflite_micro.runtime",
        reason="tflite_micro is not installed; fix: pip install 'portcall[tflite_micro]'",
    )


def samples(count: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def graph(exports: Exports) -> Graph:
    """The float flatbuffer of the small CNN, as lowering leaves it."""
    path = exports.artifact("image", "tflite_micro") / "model.tflite"
    x, y = TensorSpec("x", SHAPE, "float32"), TensorSpec("output", (1, 10), "float32")
    source = Source("tiny", "torch", path, "0" * 64, (x,), (y,), {"x": SHAPE})
    return Graph("tflite", path, "0" * 64, source, {"x": "x", "output": "output"})


def export(graph: Graph, folder: Path, precision: str = "int8", **options: Any) -> Exported:
    ranges: Ranges | None = None if precision == "fp32" else tflite_ranges(graph.path, samples(8))
    folder.mkdir(exist_ok=True)
    return tflite_micro.export(graph, Recipe(precision, options=options), ranges, folder)


def changed(graph: Graph, folder: Path, change: Any) -> Graph:
    """Return the graph with *change* applied to its object model."""
    model = _tflite._read(graph.path.read_bytes())
    change(model)
    path = folder / "changed.tflite"
    path.write_bytes(_tflite._write(model))
    return replace(graph, path=path)


# the arena


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bisected_arena_works_and_16_bytes_less_does_not(exports: Exports, precision: str) -> None:
    artifact = exports.artifact("image", "tflite_micro", precision)
    arena = json.loads((artifact / "memory.json").read_text())["arena"]
    model, found = artifact / "model.tflite", arena["bytes"]
    works, fails = _tflm_arena.failures(model, [found, found - 16])
    assert found % 16 == 0 and works is None
    assert fails is not None and "allocate" in fails


def test_tflms_own_account_adds_up(exports: Exports) -> None:
    artifact = exports.artifact("image", "tflite_micro", "int8")
    arena = json.loads((artifact / "memory.json").read_text())["arena"]
    assert arena["head_bytes"] + arena["tail_bytes"] == arena["reported_bytes"] <= arena["bytes"]
    assert arena["tail_bytes"] // 2 < sum(arena["parts"].values()) <= arena["tail_bytes"]
    assert arena["reported_bytes"] // 2 < arena["estimate_32bit_bytes"] < arena["bytes"]


def test_an_arena_that_crashes_the_interpreter_is_an_answer(exports: Exports) -> None:
    model = exports.artifact("image", "tflite_micro", "int8") / "model.tflite"
    for reason in _tflm_arena.failures(model, [0, 16, 96]):
        assert reason is not None and ("allocate" in reason or "signal" in reason)


def test_a_file_that_tflm_does_not_run_fails_with_tflms_own_words(tmp_path: Path, graph: Graph) -> None:
    hybrid = tmp_path / "hybrid.tflite"
    hybrid.write_bytes(_tflite_quantize.quantize(graph.path, "int8-dynamic", None)[0])
    with pytest.raises(CellFailed, match=r"does not run this model: .*[Hh]ybrid") as caught:
        _tflm_arena.measure(hybrid, 1 << 20)
    assert caught.value.fix


def test_the_margin_goes_into_the_firmware_and_is_said(graph: Graph, tmp_path: Path) -> None:
    written = {}
    for margin in (0.0, 0.5):
        exported = export(graph, tmp_path / str(margin), arena_margin=margin)
        memory = json.loads((tmp_path / str(margin) / "memory.json").read_text())["arena"]
        config = (tmp_path / str(margin) / "firmware" / "portcall_config.h").read_text()
        assert f"#define PORTCALL_ARENA_BYTES {memory['with_margin_bytes']}\n" in config
        [said] = [n for n in exported.notes if "by bisection on the host" in n]
        assert str(memory["bytes"]) in said and f"margin of {margin:.0%}" in said
        assert any(
            "estimate" in note and str(memory["estimate_32bit_bytes"]) in note for note in exported.notes
        )
        written[margin] = memory
    assert written[0.0]["with_margin_bytes"] == written[0.0]["bytes"]
    assert written[0.5]["with_margin_bytes"] == _tflm_arena.rounded(1.5 * written[0.0]["bytes"])
    with pytest.raises(BadInput, match=r"arena_margin is -0\.1"):
        export(graph, tmp_path / "negative", arena_margin=-0.1)


def test_rounding_is_up_to_the_alignment() -> None:
    assert [_tflm_arena.rounded(n) for n in (0, 1, 16, 16.1, 17, 32)] == [0, 16, 16, 32, 32, 32]


# budgets


@pytest.mark.parametrize(("option", "what"), [("flash_kb", "model.tflite"), ("ram_kb", "the arena")])
def test_a_budget_that_is_exceeded_says_both_numbers_and_what_takes_the_space(
    graph: Graph, tmp_path: Path, option: str, what: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"is 1024 bytes .{option}=1., {what} takes ") as caught:
        export(graph, tmp_path / "small", **dict[str, Any]({option: 1}))
    needed = int(caught.value.message.partition(f"{what} takes ")[2].partition(";")[0])
    assert needed > 1024 and "largest tensors in bytes: '" in caught.value.message and caught.value.fix
    enough = -(-needed // 1024)
    assert export(graph, tmp_path / "fits", **dict[str, Any]({option: enough})).entry == "model.tflite"
    with pytest.raises(BadInput, match=f"{option} is 0"):
        export(graph, tmp_path / "none", **dict[str, Any]({option: 0}))


def test_options_come_through_the_api(tmp_path: Path) -> None:
    model, data = "tests.models:tiny_cnn", "tests.models:tiny_cnn_data"
    own = {"tflite_micro.ram_kb": "64", "tflite_micro.io": "int8", "tflite_micro.core": "cortex-m55"}
    [result] = portcall.api.export(model, "tflite_micro:int8", tmp_path, data=data, options=own)["results"]
    assert result["outcome"] == "artifact", result["reason"]
    assert result["parity"]["sqnr_db"] > 18
    folder = Path(result["path"])
    assert result["size_bytes"] == (folder / "model.tflite").stat().st_size
    assert "CORE ?= cortex-m55\n" in (folder / "firmware" / "Makefile").read_text()
    manifest = artifacts.read_manifest(folder)
    assert [t["dtype"] for t in (*manifest["inputs"], *manifest["outputs"])] == ["int8", "int8"]
    done = subprocess.run([sys.executable, folder / "example.py"], capture_output=True, text=True, check=True)
    assert "output (1, 10)" in done.stdout and "largest difference from the source model" in done.stdout


# operators and types


ASK = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from ai_edge_litert import schema_py_generated as schema
from portcall.exporters import _tflite, _tflm_arena
_tflm_arena.TRY_S = 2  # a pool of size 0 never ends
known = []
for name, code in vars(schema.BuiltinOperator).items():
    if not isinstance(code, int) or name in ("CUSTOM", "PLACEHOLDER_FOR_GREATER_OP_CODES"):
        continue
    model, operator_code = schema.ModelT(), schema.OperatorCodeT()
    graph, operator = schema.SubGraphT(), schema.OperatorT()
    operator_code.builtinCode, operator_code.deprecatedBuiltinCode, operator_code.version = code, min(code, 127), 1
    graph.tensors = []
    for tensor_name in (b"in", b"out"):
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.name, tensor.buffer = [1], schema.TensorType.FLOAT32, tensor_name, 0
        graph.tensors.append(tensor)
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [1]
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [schema.BufferT()], [operator_code], [graph]
    if "Didn't find op" not in _tflm_arena._attempt(_tflite._write(model), 1 << 20)[1]:
        known.append(name)
print(json.dumps(known))
"""


def test_the_table_of_operators_is_what_the_installed_interpreter_has() -> None:
    command = [sys.executable, "-I", "-c", ASK, json.dumps(sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert set(json.loads(done.stdout.splitlines()[-1])) == set(_tflm_model.METHODS)
    assert len(set(_tflm_model.METHODS.values())) == len(_tflm_model.METHODS)
    assert not set(_tflm_model.REPLACEMENTS) & set(_tflm_model.METHODS)


@pytest.mark.parametrize(("code", "hint"), [("POW", "POW: use a product"), ("ATAN2", "outside the model")])
def test_a_refused_operator_is_named_with_its_layer_and_a_replacement(
    graph: Graph, tmp_path: Path, code: str, hint: str
) -> None:
    number = getattr(schema.BuiltinOperator, code)

    def replace_add(model: Any) -> None:
        [found] = [c for c in model.operatorCodes if c.builtinCode == schema.BuiltinOperator.ADD]
        found.builtinCode, found.deprecatedBuiltinCode = number, min(number, 127)

    original = _tflite._read(graph.path.read_bytes())
    [layer] = [_tflite.operator_name(original, op) for op, k in _tflite.operators(original) if k == "ADD"]
    with pytest.raises(UnsupportedError) as caught:
        export(changed(graph, tmp_path, replace_add), tmp_path / "out", "fp32")
    assert f"has no {code} in {layer!r}" in caught.value.message and hint in caught.value.fix


@pytest.mark.parametrize("kind", ["INT64", "FLOAT64"])
def test_an_input_of_a_type_that_tflm_lacks_is_refused_by_its_name(
    graph: Graph, tmp_path: Path, kind: str
) -> None:
    def other_type(model: Any) -> None:
        first = model.subgraphs[0]
        first.tensors[first.inputs[0]].type = getattr(schema.TensorType, kind)

    with pytest.raises(UnsupportedError, match=f"Micro takes no {kind.lower()}: input 'x'") as caught:
        export(changed(graph, tmp_path, other_type), tmp_path / "out", "fp32")
    assert "float32 or int32" in caught.value.fix


def test_weights_are_inside_the_file_and_aligned(exports: Exports) -> None:
    for precision in PRECISIONS:
        data = (exports.artifact("image", "tflite_micro", precision) / "model.tflite").read_bytes()
        model = schema.Model.GetRootAsModel(data, 0)
        held = [model.Buffers(i) for i in range(model.BuffersLength())]
        assert all(b.Offset() == 0 and b.Size() == 0 for b in held)
        starts = [b._tab.Vector(b._tab.Offset(4)) for b in held if b.DataLength()]
        assert len(starts) >= 8 and all(start % 16 == 0 for start in starts)


# an integer interface


def test_io_int8_takes_and_gives_what_lies_inside_of_the_float_interface(
    graph: Graph, tmp_path: Path
) -> None:
    floats, integers = (export(graph, tmp_path / io, io=io) for io in ("float", "int8"))
    operators = {
        io: json.loads((tmp_path / io / "memory.json").read_text())["operators"] for io in ("float", "int8")
    }
    assert set(operators["float"]) - set(operators["int8"]) == {"QUANTIZE", "DEQUANTIZE"}
    x, y = integers.inputs[0], integers.outputs[0]
    assert (x.name, x.dtype, y.name, y.dtype) == ("x", "int8", "output", "int8")
    assert (
        x.scale is not None and x.zero_point is not None and y.scale is not None and y.zero_point is not None
    )
    assert floats.inputs[0].scale is None and floats.inputs[0].dtype == "float32"
    with session(tmp_path / "float", floats) as inside, session(tmp_path / "int8", integers) as bare:
        for sample in samples(8):
            inside.set_inputs(sample)
            inside.infer()
            levels = np.clip(np.rint(sample["x"] / x.scale) + x.zero_point, -128, 127).astype(np.int8)
            bare.set_inputs({"x": levels})
            bare.infer()
            found = (bare.get_outputs()["output"].astype(np.float32) - y.zero_point) * np.float32(y.scale)
            np.testing.assert_array_equal(found, inside.get_outputs()["output"])


def test_io_int8_of_a_layer_that_stays_float_is_refused(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="output 'output' is used in floating point: FULLY_CONNECTED"):
        export(graph, tmp_path / "out", io="int8", keep_float=["type:FULLY_CONNECTED"])


# layers


def test_a_layer_that_differs_is_named_and_layers_behind_it_are_no_origin(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(graph, tmp_path)
    data = (tmp_path / "model.tflite").read_bytes()
    model = _tflite._read(data)
    operators = _tflite.operators(model)
    guilty = next(op for op, kind in operators if kind == "DEPTHWISE_CONV_2D")
    bias = model.subgraphs[0].tensors[guilty.inputs[2]].buffer
    values = np.frombuffer(model.buffers[bias].data.tobytes(), np.int32) + 4000
    model.buffers[bias].data = np.frombuffer(values.tobytes(), np.uint8)
    planted, original = _tflite._write(model), _tflm_layers._reference
    monkeypatch.setattr(_tflm_layers, "_reference", lambda _: original(planted))
    report = _tflm_layers.compare(data, _tflm_layers.random_inputs(model, None), 1 << 20)
    origins = [layer["name"] for layer in report["layers"] if layer["reference"]["origin"]]
    assert origins == [_tflite.operator_name(model, guilty)]
    differing = [layer["operator"] for layer in report["layers"] if layer["reference"]["max_difference"]]
    assert differing[0] == "DEPTHWISE_CONV_2D" and len(differing) > 1
    [note] = [n for n in _tflm_layers.notes(report) if "reference" in n]
    assert origins[0] in note and "integer step(s)" in note


def test_the_report_holds_every_layer_and_tflm_equals_the_reference_kernels(exports: Exports) -> None:
    artifact = exports.artifact("image", "tflite_micro", "int8")
    report = json.loads((artifact / "layers.json").read_text())
    model = _tflite._read((artifact / "model.tflite").read_bytes())
    assert [layer["operator"] for layer in report["layers"]] == [kind for _, kind in _tflite.operators(model)]
    for layer in report["layers"]:
        assert layer["reference"] == {"max_difference": 0, "share": 0.0, "origin": False}, layer["name"]
        if layer["dtype"] == "int8":
            assert layer["xnnpack"]["max_difference"] <= 3 and layer["xnnpack"]["share"] <= 1
    assert any("bit for bit in all 10 layers" in note for note in artifacts.read_manifest(artifact)["notes"])


def test_inputs_of_the_comparison_lie_in_the_calibrated_range_and_never_change(graph: Graph) -> None:
    model = _tflite._read(graph.path.read_bytes())
    ranges = tflite_ranges(graph.path, samples(8))
    name = model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]].name.decode()
    drawn = np.stack([arrays[0] for arrays in _tflm_layers.random_inputs(model, ranges)])
    again = np.stack([arrays[0] for arrays in _tflm_layers.random_inputs(model, ranges)])
    np.testing.assert_array_equal(drawn, again)
    low, high = np.float32(ranges[name].minimum), np.float32(ranges[name].maximum)
    assert low <= drawn.min() < 0.9 * low and 0.9 * high < drawn.max() <= high


# the session


def session(folder: Path, exported: Exported) -> Any:
    opened = Artifact(folder, exported.entry, "tflite_micro", "int8", exported.inputs, exported.outputs)
    return tflite_micro.load(opened, Workload())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_inference_has_the_inputs_that_were_set(graph: Graph, tmp_path: Path, precision: str) -> None:
    exported = export(graph, tmp_path, precision)
    with session(tmp_path, exported) as opened:
        opened.set_inputs(samples(1)[0])
        found = []
        for _ in range(3):
            opened.infer()
            found.append(opened.get_outputs()["output"])
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_array_equal(found[0], found[2])
        assert "not a device's latency" in opened.environment["kernels"]
        with pytest.raises(UnsupportedError, match=r"this flatbuffer only \(1, 3, 16, 16\)"):
            opened.set_inputs({"x": np.zeros((2, 3, 16, 16), np.float32)})


def test_an_inference_does_overwrite_its_inputs(graph: Graph, tmp_path: Path) -> None:
    """Why the session and the firmware put them back each time: if this fails, they need not."""
    from tflite_micro.python.tflite_micro.runtime import Interpreter

    export(graph, tmp_path, "fp32")
    interpreter = Interpreter.from_file(str(tmp_path / "model.tflite"), arena_size=1 << 20)
    interpreter.set_input(samples(1)[0]["x"], 0)
    interpreter.invoke()
    first = np.array(interpreter.get_output(0))
    interpreter.invoke()
    assert not np.array_equal(first, interpreter.get_output(0))


def test_an_arena_that_is_too_small_says_what_tflm_said(graph: Graph, tmp_path: Path) -> None:
    exported = export(graph, tmp_path)
    memory = json.loads((tmp_path / "memory.json").read_text())
    memory["arena"]["with_margin_bytes"] = memory["arena"]["bytes"] - 16
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    with pytest.raises(CellFailed, match=r"failed to allocate tensors: Failed to ") as caught:
        session(tmp_path, exported).__enter__()
    assert "tflite_micro" in caught.value.fix


def test_a_bare_file_runs_without_the_report_of_its_arena(exports: Exports, tmp_path: Path) -> None:
    shutil.copy(exports.artifact("image", "tflite_micro", "int8") / "model.tflite", tmp_path / "bare.tflite")
    bare = Artifact(tmp_path, "bare.tflite", "tflite_micro", "int8")
    with tflite_micro.load(bare, Workload()) as opened:
        found = [str(t) for t in (*opened.inputs, *opened.outputs)]
        assert found == ["x: float32[1, 3, 16, 16]", "output: float32[1, 10]"]
        opened.set_inputs(samples(1)[0])
        opened.infer()
        assert opened.get_outputs()["output"].shape == (1, 10)


def test_the_session_tells_the_arena_and_what_of_it_is_used(exports: Exports, tmp_path: Path) -> None:
    shutil.copy(exports.artifact("image", "tflite_micro", "int8") / "model.tflite", tmp_path / "bare.tflite")
    with tflite_micro.load(Artifact(tmp_path, "bare.tflite", "tflite_micro", "int8"), Workload()) as opened:
        figures = opened.memory_figures()
    assert figures["arena_total_bytes"] == figures["arena_head_bytes"] + figures["arena_tail_bytes"]
    assert 0 < figures["arena_total_bytes"] <= figures["arena_bytes"]
