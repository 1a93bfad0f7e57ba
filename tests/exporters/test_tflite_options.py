"""Options of tflite: integer inputs and outputs, the oldest runtime; and the TRANSPOSE that are removed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

import portcall.api
from portcall import artifact as artifacts
from portcall.core import BadInput
from portcall.exporters import (
    _tflite,
    _tflite_io,
    _tflite_layout,
    _tflite_torch,
    _tflite_transpose,
    _tflite_versions,
    tflite,
)
from portcall.targets.agent.errors import UnsupportedError
from tests.exporters.contract import Array, Exports, random_inputs

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*experimental_preserve_all_tensors:UserWarning")

BACKENDS = ("tflite",)


def flatbuffer_of(exports: Exports, precision: str, model: str = "image") -> bytes:
    return (exports.artifact(model, "tflite", precision) / "model.tflite").read_bytes()


def run(flatbuffer: bytes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    interpreter = Interpreter(
        model_content=flatbuffer, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
    )
    found: dict[str, Array] = interpreter.get_signature_runner()(**inputs)
    return found


def kinds(flatbuffer: bytes) -> list[str]:
    return [kind for _, kind in _tflite.operators(_tflite._read(flatbuffer))]


# integer inputs and outputs


@pytest.mark.parametrize(("precision", "dtype"), [("int8", np.int8), ("int16x8", np.int16)])
def test_integer_interface_gives_the_same_bits(exports: Exports, precision: str, dtype: Any) -> None:
    whole = flatbuffer_of(exports, precision)
    inner, notes = _tflite_io.with_integer_interface(whole, precision)
    assert notes == (f"inputs and outputs are {np.dtype(dtype).name}",)
    assert {"QUANTIZE", "DEQUANTIZE"} <= set(kinds(whole)) and not {"QUANTIZE", "DEQUANTIZE"} & set(
        kinds(inner)
    )
    found = _tflite_io.interface(inner)
    assert [found[name][0] for name in ("x", "output")] == [np.dtype(dtype).name] * 2
    _, shape, scale, zero = found["x"]
    x = random_inputs("image", 1)["x"]
    limits = np.iinfo(dtype)
    levels = np.clip(np.rint(x / np.float32(scale)) + zero, limits.min, limits.max).astype(dtype)
    assert shape == x.shape
    [output] = run(inner, {"x": levels}).values()
    _, _, scale, zero = found["output"]
    [wanted] = run(whole, {"x": x}).values()
    np.testing.assert_array_equal((output.astype(np.float32) - zero) * np.float32(scale), wanted)


def test_integer_interface_through_the_whole_export(tmp_path: Path) -> None:
    answer = portcall.api.export(
        "tests.models:tiny_cnn", ["tflite:int8"], tmp_path / "out", data="tests.models:tiny_cnn_data",
        options={"tflite.io": "int8"},
    )  # fmt: skip
    [result] = answer["results"]
    assert result["outcome"] == "artifact", result["reason"]
    assert result["parity"]["sqnr_db"] > 18
    manifest = artifacts.read_manifest(Path(result["path"]))
    [x], [output] = manifest["inputs"], manifest["outputs"]
    assert (x["dtype"], output["dtype"]) == ("int8", "int8")
    assert x["scale"] > 0 and isinstance(x["zero_point"], int)
    assert "inputs and outputs are int8" in manifest["notes"]


def test_integers_that_do_not_go_with_the_precision_are_refused(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="concerns int8, int16x8"):
        portcall.api.export("tests.models:tiny_cnn", ["tflite:fp32"], tmp_path, options={"tflite.io": "int8"})
    with pytest.raises(UnsupportedError, match="'x' is used in floating point: TRANSPOSE"):
        _tflite_io.with_integer_interface(flatbuffer_of(exports, "fp32"), "int8")


def test_interface_of_floats_has_no_scale(exports: Exports) -> None:
    found = _tflite_io.interface(flatbuffer_of(exports, "int8", "two_inputs"))
    assert found["token_ids"] == ("int64", (1, 7), None, None)
    assert found["features"] == ("float32", (1, 4), None, None)


# channels last


class Denoiser(torch.nn.Module):
    """An image in, an image out, with a padding that no convolution of LiteRT has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.last = torch.nn.ConvTranspose2d(5, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.relu(self.first(x)))
        return y


def denoiser() -> tuple[Any, ...]:
    torch.manual_seed(0)
    return Denoiser().eval(), (torch.randn(1, 3, 8, 12),)


def denoiser_data() -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((1, 3, 8, 12)).astype("f4")} for _ in range(8)]


HERE = "tests.exporters.test_tflite_options"


@pytest.mark.parametrize("backend", ["tflite", "tflite_micro"])
@pytest.mark.parametrize(("precision", "io"), [("fp32", None), ("int8", "float"), ("int8", "int8")])
def test_channels_last_drops_the_transposes_and_nothing_else(
    tmp_path: Path, backend: str, precision: str, io: str | None
) -> None:
    def exported(layout: str) -> dict[str, Any]:
        options = {f"{backend}.layout": layout, **({f"{backend}.io": io} if io else {})}
        answer = portcall.api.export(
            f"{HERE}:denoiser", [f"{backend}:{precision}"], tmp_path / layout,
            data=f"{HERE}:denoiser_data", options=options,
        )  # fmt: skip
        result: dict[str, Any] = answer["results"][0]
        assert result["outcome"] == "artifact", result["reason"]
        return result

    plain, last = exported("source"), exported("channels_last")
    assert plain["parity"] == last["parity"]
    counts = [kinds((Path(r["path"]) / "model.tflite").read_bytes()) for r in (plain, last)]
    assert counts[0].count("TRANSPOSE") == 2
    assert sorted(counts[1]) == sorted(k for k in counts[0] if k != "TRANSPOSE")
    manifest = artifacts.read_manifest(Path(last["path"]))
    [x], [output] = manifest["inputs"], manifest["outputs"]
    assert (x["shape"], x["permutation"]) == ([1, 8, 12, 3], [0, 2, 3, 1])
    assert (output["shape"], output["permutation"]) == ([1, 8, 12, 4], [0, 2, 3, 1])
    said = [
        subprocess.run(
            [sys.executable, Path(r["path"]) / "example.py"], capture_output=True, text=True, check=True
        ).stdout
        for r in (plain, last)
    ]
    differences = [line.rpartition(": ")[2] for text in said for line in text.splitlines() if ": " in line]
    assert len(differences) == 2 and differences[0] == differences[1]


def test_an_input_that_others_read_keeps_its_layout(exports: Exports) -> None:
    flatbuffer = flatbuffer_of(exports, "int8", "two_inputs")
    same, permutations = _tflite_layout.with_channels_last(flatbuffer)
    assert permutations == {} and kinds(same) == kinds(flatbuffer)


# the oldest runtime


OLDEST = {
    "fp32": "2.0.0",
    "fp16": "2.0.0",
    "int8-weights": "2.7.0",
    "int8-dynamic": "2.17.0",
    "int16x8": "2.4.0",
}


@pytest.mark.parametrize("precision", list(OLDEST))
def test_oldest_runtime_follows_from_the_operators(exports: Exports, precision: str) -> None:
    artifact = exports.artifact("image", "tflite", precision)
    assert artifacts.read_manifest(artifact)["min_runtime"] == OLDEST[precision]
    flatbuffer = (artifact / "model.tflite").read_bytes()
    assert _tflite_versions.min_runtime(flatbuffer) == OLDEST[precision]
    model = _tflite._read(flatbuffer)
    [entry] = [m for m in model.metadata if m.name == b"min_runtime_version"]
    assert bytes(model.buffers[entry.buffer].data).rstrip(b"\0").decode() == OLDEST[precision]


def test_operators_of_integers_get_their_versions(exports: Exports) -> None:
    def versions(precision: str) -> dict[str, int]:
        model = _tflite._read(flatbuffer_of(exports, precision))
        return {k: int(model.operatorCodes[op.opcodeIndex].version) for op, k in _tflite.operators(model)}

    found = versions("int8")
    assert found["CONV_2D"] == found["DEPTHWISE_CONV_2D"] == 3 and found["ADD"] == found["MEAN"] == 2
    assert found["QUANTIZE"] == 1 and found["DEQUANTIZE"] == 2
    found = versions("int16x8")
    assert found["CONV_2D"] == 4 and found["DEPTHWISE_CONV_2D"] == 5 and found["QUANTIZE"] == 2
    found = versions("int8-dynamic")
    assert found["CONV_2D"] == 5 and found["DEPTHWISE_CONV_2D"] == 6 and found["FULLY_CONNECTED"] == 12
    assert versions("fp32")["CONV_2D"] == 1


def test_settling_twice_changes_nothing(exports: Exports) -> None:
    once, oldest = _tflite_versions.settle(flatbuffer_of(exports, "int8"))
    assert _tflite_versions.settle(once) == (once, oldest)


def test_a_runtime_that_is_too_old_is_refused(exports: Exports) -> None:
    dynamic = flatbuffer_of(exports, "int8-dynamic")
    assert _tflite_versions.min_runtime(dynamic, "2.17") == "2.17.0"
    with pytest.raises(UnsupportedError, match=r"2\.14 has not: FULLY_CONNECTED version 12 \(2\.17\)"):
        _tflite_versions.min_runtime(dynamic, "2.14")
    with pytest.raises(UnsupportedError, match=r"tflite\.min_runtime is 'new'"):
        _tflite_versions.parse_asked({"min_runtime": "new"})


def test_an_operator_without_a_known_runtime_leaves_it_open(exports: Exports) -> None:
    model = _tflite._read(flatbuffer_of(exports, "fp32"))
    model.operatorCodes[0].version = 99
    assert _tflite_versions.min_runtime(_tflite._write(model)) is None


def test_versions_are_compared_as_numbers() -> None:
    assert _tflite_versions._key("2.9") < _tflite_versions._key("2.11") == _tflite_versions._key("2.11.0")
    assert set(_tflite_versions.INTEGERS) | set(_tflite_versions.HYBRID) <= set(_tflite_versions.RUNTIMES)
    assert set(_tflite_versions.RUNTIMES) <= set(vars(schema.BuiltinOperator))


# TRANSPOSE


class Net(torch.nn.Module):
    """A convolution, then one of several ways from the image to a vector."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.conv, self.head = way, torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        if self.way == "mean":
            y = y.mean((2, 3))
        elif self.way == "max":
            y = y.amax((2, 3))
        elif self.way == "pool":
            y = torch.nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
        elif self.way == "patches":
            y = y.flatten(2).transpose(1, 2)
        found: torch.Tensor = y.flatten(1) if self.way == "flatten" else self.head(y)
        return found


def float_flatbuffer(module: torch.nn.Module, example: torch.Tensor, keep: bool = True) -> bytes:
    import litert_torch

    program = torch.export.export(module.eval(), (example,)).module(check_guards=False)
    if keep:
        _tflite_torch._keep_reduced_axes(program)
    return bytes(litert_torch.convert(program, (example,)).model_content())


@pytest.mark.parametrize(
    ("way", "left"), [("mean", 1), ("max", 1), ("pool", 1), ("patches", 1), ("flatten", 2)]
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_no_transpose_is_left_that_is_not_needed(way: str, left: int) -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net = Net(way)
    converted = float_flatbuffer(net, x)
    model = _tflite._read(converted)
    gone = _tflite_transpose.simplify(model)
    simplified = _tflite._write(model)
    # One for the input, which stays [1, 3, 8, 8]; one for the order in which a flattened image is read.
    assert kinds(simplified).count("TRANSPOSE") == left == kinds(converted).count("TRANSPOSE") - gone
    assert (gone > 0) == (way == "patches")
    [before], [after] = [list(run(f, {"args_0": x.numpy()}).values()) for f in (converted, simplified)]
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(after, net(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_reductions_keep_their_axes_for_the_converter() -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert kinds(float_flatbuffer(Net("mean"), x, keep=False)).count("TRANSPOSE") == 2


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"), [(4, 2, 1, 0), (3, 2, 1, 1), ((3, 4), (2, 1), (0, 2), 0)]
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_padding_of_transposed_convolutions_is_cut_off(
    kernel: Any, stride: Any, padding: Any, extra: Any
) -> None:
    import litert_torch

    torch.manual_seed(0)
    net = torch.nn.ConvTranspose2d(3, 4, kernel, stride, padding, extra).eval()
    x = torch.randn(1, 3, 6, 7)
    program = torch.export.export(net, (x,)).module(check_guards=False)
    _tflite_torch._cut_padding(program)
    [found] = run(bytes(litert_torch.convert(program, (x,)).model_content()), {"args_0": x.numpy()}).values()
    np.testing.assert_allclose(found, net(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def moves(*steps: tuple[str, list[int]], shape: tuple[int, ...]) -> bytes:
    """Return a flatbuffer of TRANSPOSE (with a permutation) and RESHAPE (with a shape)."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.subgraphs, model.buffers = 3, [graph], [schema.BufferT()]
    model.operatorCodes, graph.operators, graph.tensors = [], [], []

    def tensor(name: str, size: list[int], kind: int, data: Array | None = None) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name.encode(), size, kind, 0
        if data is not None:
            made.buffer = _tflite.new_buffer(model)
            model.buffers[made.buffer].data = np.frombuffer(data.astype(np.int32).tobytes(), np.uint8)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    last = tensor("x", list(shape), schema.TensorType.FLOAT32)
    graph.inputs = [last]
    now = np.zeros(shape)
    for number, (kind, values) in enumerate(steps):
        now = now.transpose(values) if kind == "TRANSPOSE" else now.reshape(values)
        operand = tensor(f"c{number}", [len(values)], schema.TensorType.INT32, np.array(values))
        result = tensor(f"Net/m.Layer_{number};{number}", list(now.shape), schema.TensorType.FLOAT32)
        op = schema.OperatorT()
        op.opcodeIndex = _tflite.operator_code(model, kind)
        op.inputs, op.outputs, last = [last, operand], [result], result
        op.builtinOptionsType = getattr(schema.BuiltinOptions, f"{kind.title()}Options")
        op.builtinOptions = getattr(schema, f"{kind.title()}OptionsT")()
        if kind == "RESHAPE":
            op.builtinOptions.newShape = values
        graph.operators.append(op)
    graph.outputs = [last]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    signature.inputs, signature.outputs = [schema.TensorMapT()], [schema.TensorMapT()]
    signature.inputs[0].name, signature.inputs[0].tensorIndex = b"x", graph.inputs[0]
    signature.outputs[0].name, signature.outputs[0].tensorIndex = b"y", last
    model.signatureDefs = [signature]
    return _tflite._write(model)


T, R = "TRANSPOSE", "RESHAPE"


@pytest.mark.parametrize(
    ("steps", "shape", "left"),
    [
        ([(T, [0, 2, 3, 1]), (T, [0, 3, 1, 2])], (2, 3, 4, 5), [R]),
        ([(T, [0, 3, 1, 2])], (1, 4, 4, 1), [R]),
        ([(T, [0, 2, 1]), (R, [3, 8])], (3, 1, 8), [R]),
        ([(T, [1, 0]), (R, [3, 2, 2]), (T, [1, 2, 0])], (4, 3), [R]),
        ([(T, [1, 0])], (2, 3), [T]),
        ([(T, [1, 0]), (R, [6]), (R, [2, 3])], (2, 3), [T, R, R]),
    ],
)
def test_chains_that_keep_the_order_become_one_reshape(
    steps: list[tuple[str, list[int]]], shape: tuple[int, ...], left: list[str]
) -> None:
    before = moves(*steps, shape=shape)
    model = _tflite._read(before)
    gone = _tflite_transpose.simplify(model)
    after = _tflite._write(model)
    assert kinds(after) == left and gone == len([s for s in steps if s[0] == T]) - left.count(T)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(run(before, {"x": x})["y"], run(after, {"x": x})["y"])


def test_what_is_left_is_named(exports: Exports) -> None:
    assert _tflite_transpose.notes(moves((T, [1, 0]), shape=(2, 3))) == (
        "1 TRANSPOSE, for the layout of: Layer_0",
    )
    assert _tflite_transpose.notes(moves((R, [6]), shape=(2, 3))) == ()
    manifest = json.loads((exports.artifact("image", "tflite") / "manifest.json").read_text())
    assert "1 TRANSPOSE, for the layout of: Conv2d_0" in manifest["notes"]


# runtimes


def test_the_version_of_litert_is_not_taken_for_one_of_tensorflow_lite() -> None:
    found = tflite.probe("run")
    assert str(getattr(found, "version", "")).startswith("ai-edge-litert ")
