"""Quantized flatbuffers: ranges and weights as given, bias correction, layers kept in float, what is unsupported."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from onnx import numpy_helper

from portcall.calibration import weights
from portcall.exporters import _qdq, _tflite, _tflite_quantize
from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from tests.exporters.contract import Array, Exports, random_inputs
from tests.exporters.graphs import conv_add_mul, graph_of
from tests.exporters.ranges import sqnr_db, tflite_ranges

# ai-edge-quantizer asks LiteRT for it and LiteRT warns that it takes memory.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*experimental_preserve_all_tensors:UserWarning")

BACKENDS = ("tflite",)
QUANTIZED = ("int8", "int16x8", "int8-dynamic", "int8-weights")


@pytest.fixture
def image(exports: Exports) -> Path:
    return exports.artifact("image", "tflite") / "model.tflite"


@pytest.fixture
def two_inputs(exports: Exports) -> Path:
    return exports.artifact("two_inputs", "tflite") / "model.tflite"


def ranges_of(path: Path) -> dict[str, Range]:
    """Return a different range for every tapped tensor; the first one does not hold zero."""
    names = list(_tflite.tapped_tensors(path).values())
    return {n: Range(-1 - i / 8, 2 + i / 4) if i else Range(0.5, 2.0) for i, n in enumerate(names)}


def operators(model: Any) -> list[tuple[str, list[int], list[int]]]:
    return [
        (kind, [int(i) for i in op.inputs], [int(i) for i in op.outputs])
        for op, kind in _tflite.operators(model)
    ]


def run(flatbuffer: bytes, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run with the reference kernels, whose results do not depend on where a weight lies in memory."""
    interpreter = Interpreter(
        model_content=flatbuffer, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
    )
    found: dict[str, Array] = interpreter.get_signature_runner()(**inputs)
    return found


def samples(count: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("precision", ["int8", "int16x8", "int8-dynamic", "fp16"])
def test_the_quantizers_file_and_ours_give_the_same_bits(
    image: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    read: list[bytes] = []
    original = _tflite._read

    def recorded(flatbuffer: bytes) -> Any:
        read.append(flatbuffer)
        return original(flatbuffer)

    monkeypatch.setattr(_tflite, "_read", recorded)
    ours, _ = _tflite_quantize.quantize(image, precision, ranges_of(image))
    inputs = random_inputs("image", 1)
    theirs = read[-1]
    assert theirs != ours
    np.testing.assert_array_equal(run(theirs, inputs)["output"], run(ours, inputs)["output"])


@pytest.mark.parametrize("precision", ["int8", "int16x8"])
def test_quantization_parameters_follow_from_the_ranges(image: Path, precision: str) -> None:
    ranges = ranges_of(image)
    flatbuffer, notes = _tflite_quantize.quantize(image, precision, ranges)
    model = _tflite._read(flatbuffer)
    tensors = model.subgraphs[0].tensors
    names = {i: t.name.decode() for i, t in enumerate(tensors)}
    checked = 0
    for operator, inputs, outputs in operators(model):
        found = tensors[outputs[0]].quantization
        if operator == "DEQUANTIZE":
            continue
        scale, zero = float(found.scale[0]), int(found.zeroPoint[0])
        if operator in ("TRANSPOSE", "PAD"):  # move values: their scale is their input's
            before = tensors[inputs[0]].quantization
            assert (scale, zero) == (float(before.scale[0]), int(before.zeroPoint[0]))
            continue
        given = ranges[names[inputs[0] if operator == "QUANTIZE" else outputs[0]]]
        low, high = min(given.minimum, 0.0), max(given.maximum, 0.0)
        if precision == "int8":
            assert scale == np.float32((high - low) / 255)
            assert zero == -128 + round(-low / scale)
        else:
            assert scale == np.float32(max(-low, high) / 32767) and zero == 0
        checked += 1
    assert checked == 7 and notes == ()  # the input, three convolutions, the addition, the mean, the readout


def test_a_missing_range_is_named(image: Path) -> None:
    ranges = ranges_of(image)
    missing = list(ranges)[3]
    del ranges[missing]
    with pytest.raises(CellFailed) as caught:
        _tflite_quantize.quantize(image, "int8", ranges)
    assert repr(missing) in caught.value.message and "Calibrate again" in caught.value.fix


def test_operators_with_sentinel_values_stay_in_float_and_are_named(image: Path) -> None:
    ranges = ranges_of(image)
    output = list(ranges)[-1]
    flatbuffer, notes = _tflite_quantize.quantize(
        image, "int8", {**ranges, output: replace(ranges[output], minimum=-1e9)}
    )
    last = _tflite._read(flatbuffer).subgraphs[0].tensors[operators(_tflite._read(flatbuffer))[-1][2][0]]
    assert last.type == schema.TensorType.FLOAT32
    assert len(notes) == 1 and output in notes[0]


def test_a_tensor_has_the_same_scale_in_onnx_and_tflite(image: Path, tmp_path: Path) -> None:
    for low, high in ((-1.2345, 6.789), (0.0, 1 / 3), (-1e-3, 2e4 / 7), (-5.0, 0.0)):
        given = Range(low, high)
        path = conv_add_mul(tmp_path / "m.onnx")
        ranges = {n: given for n in _qdq.tapped_tensors(path)}
        _qdq.quantize(graph_of(path), ranges, tmp_path / "q.onnx")
        held = {
            t.name: numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "q.onnx")).graph.initializer
        }
        ranges = {n: given for n in _tflite.tapped_tensors(image).values()}
        model = _tflite._read(_tflite_quantize.quantize(image, "int8", ranges)[0])
        [found] = [
            model.subgraphs[0].tensors[outputs[0]].quantization
            for kind, _, outputs in operators(model)
            if kind == "QUANTIZE"
        ]
        assert float(found.scale[0]) == float(held["x_scale"])
        assert int(found.zeroPoint[0]) == int(held["x_zero_point"]) - 128


def quantized_weights(flatbuffer: bytes) -> list[tuple[str, Array, Array, Array]]:
    """Return type, integers, scale and zero point of every int8 weight."""
    model = _tflite._read(flatbuffer)
    tensors = model.subgraphs[0].tensors
    made_by = {outputs[0]: inputs for kind, inputs, outputs in operators(model) if kind == "DEQUANTIZE"}
    found = []
    for kind, inputs, _ in operators(model):
        if kind in _tflite.CHANNEL_AXES:
            tensor = tensors[made_by.get(inputs[1], inputs[1:])[0]]
            values = np.frombuffer(model.buffers[tensor.buffer].data, np.int8).reshape(tensor.shape)
            q = tensor.quantization
            assert q.quantizedDimension == (_tflite.CHANNEL_AXES[kind] if len(q.scale) > 1 else 0)
            found.append((kind, values, np.asarray(q.scale, np.float32), np.asarray(q.zeroPoint)))
    return found


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_integers_are_those_of_calibration_weights(
    image: Path, two_inputs: Path, precision: str, granularity: str
) -> None:
    for path in (image, two_inputs):
        if (path, precision, granularity) == (image, "int8-dynamic", "tensor"):
            continue  # depthwise: see below
        flatbuffer, _ = _tflite_quantize.quantize(path, precision, ranges_of(path), {"weights": granularity})
        before = _tflite._read(path.read_bytes())
        floats = [
            w for o, k in _tflite.operators(before) if (w := _tflite.weight_of(before, o, k)) is not None
        ]
        found = quantized_weights(flatbuffer)
        assert len(found) == len(floats) == (4 if path == image else 2)
        for (kind, integers, scale, zero_point), weight in zip(found, floats, strict=True):
            axis = _tflite.CHANNEL_AXES[kind] if granularity == "channel" else None
            wanted = weights.quantize(weight, axis=axis)
            np.testing.assert_array_equal(integers, wanted.integers)
            np.testing.assert_array_equal(scale, wanted.scale.ravel())
            assert not zero_point.any()


@pytest.mark.parametrize("precision", ["int8", "int16x8", "int8-weights"])
def test_weights_per_tensor_stay_close(image: Path, precision: str) -> None:
    ranges = tflite_ranges(image, samples(8))
    flatbuffer, _ = _tflite_quantize.quantize(image, precision, ranges, {"weights": "tensor"})
    wanted, out = ([run(f, s)["output"] for s in samples(4)] for f in (image.read_bytes(), flatbuffer))
    assert sqnr_db(wanted, out) > 20


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "group32"}, "no kernel for {} with weights in groups of 32"),
        ({"weight_symmetric": False}, "symmetric weights only"),
        ({"weights": "tensor", "weight_symmetric": False}, "symmetric weights only"),
    ],
)
def test_weights_without_a_kernel_are_unsupported(
    image: Path, precision: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message.format(precision)) as caught:
        _tflite_quantize.quantize(image, precision, ranges_of(image), options)
    assert caught.value.fix


def test_dynamic_depthwise_weights_per_tensor_are_unsupported(image: Path) -> None:
    """LiteRT 2.3 runs them and reads scales that are not there."""
    with pytest.raises(
        UnsupportedError, match="dynamic depthwise kernel needs a scale per channel: 1 operators"
    ):
        _tflite_quantize.quantize(image, "int8-dynamic", None, {"weights": "tensor"})


def changed(path: Path, folder: Path, kind: str, weight_factor: float, bias: float) -> Path:
    """Return a copy in which channel 3 of the first operator of *kind* has its weights scaled and its bias set."""
    model = _tflite._read(path.read_bytes())
    tensors = model.subgraphs[0].tensors
    op = next(op for op, found in _tflite.operators(model) if found == kind)
    weight, old = _tflite.constant(model, op.inputs[1]), _tflite.constant(model, op.inputs[2])
    assert weight is not None and old is not None
    weight, old = weight.copy(), old.copy()
    np.moveaxis(weight, _tflite.CHANNEL_AXES[kind], 0)[3] *= weight_factor
    old[3] = bias
    _tflite.set_constant(model, tensors[op.inputs[1]].buffer, weight)
    _tflite.set_constant(model, tensors[op.inputs[2]].buffer, old)
    copy = folder / "changed.tflite"
    copy.write_bytes(_tflite._write(model))
    return copy


@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e-6])
@pytest.mark.parametrize("kind", ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_dead_channel_keeps_its_bias(
    image: Path, tmp_path: Path, precision: str, kind: str, factor: float
) -> None:
    """By itself ai-edge-quantizer gives it a scale of 1e-9 / 127: the bias is then cut off at 2**31 steps."""
    path = changed(image, tmp_path, kind, factor, 1.5)
    ranges = tflite_ranges(path, samples(8))
    flatbuffer, _ = _tflite_quantize.quantize(path, precision, ranges)
    if factor == 0:
        found = next(entry for entry in quantized_weights(flatbuffer) if entry[0] == kind)
        integers = np.moveaxis(found[1], _tflite.CHANNEL_AXES[kind], 0)[3]
        assert not integers.any() and (found[2][3] == 1.0 or precision == "int8")
    wanted, out = ([run(f, s)["output"] for s in samples(4)] for f in (path.read_bytes(), flatbuffer))
    assert sqnr_db(wanted, out) > 18


@pytest.mark.parametrize("precision", QUANTIZED)
def test_biases_are_corrected(image: Path, precision: str) -> None:
    """Weights rounded with one scale for all channels shift the mean of the outputs; the correction takes it back."""
    seen = samples(32)
    ranges = tflite_ranges(image, seen)
    granularity = "channel" if precision == "int8-dynamic" else "tensor"
    errors = {}
    for correction in (False, True):
        options = {"weights": granularity, "bias_correction": correction}
        flatbuffer, notes = _tflite_quantize.quantize(image, precision, ranges, options)
        assert notes == (("bias corrected in 4 layers",) if correction else ())
        pairs = [(run(image.read_bytes(), s)["output"], run(flatbuffer, s)["output"]) for s in seen]
        errors[correction] = float(np.abs(np.mean([b - a for a, b in pairs], 0)).mean())
    assert errors[True] < 0.7 * errors[False]


def test_means_that_were_not_measured_are_named(image: Path) -> None:
    options = {"bias_correction": True}
    _, notes = _tflite_quantize.quantize(image, "int8", ranges_of(image), options)
    assert notes[0] == "bias corrected in 0 layers" and notes[1].startswith(
        "bias not corrected, no channel means"
    )
    plain, notes = _tflite_quantize.quantize(image, "int8-dynamic", None, options)
    assert notes == () and plain == _tflite_quantize.quantize(image, "int8-dynamic", None)[0]


def without_bias(path: Path, folder: Path) -> Path:
    """Return a copy whose readout has no bias, and whose convolutions share theirs."""
    model = _tflite._read(path.read_bytes())
    ops = _tflite.operators(model)
    first = next(op for op, kind in ops if kind == "CONV_2D")
    for op, kind in ops:
        if kind == "FULLY_CONNECTED":
            op.inputs = [int(op.inputs[0]), int(op.inputs[1])]
        elif kind in _tflite.CHANNEL_AXES:
            op.inputs = [int(op.inputs[0]), int(op.inputs[1]), int(first.inputs[2])]
    copy = folder / "shared.tflite"
    copy.write_bytes(_tflite._write(model))
    return copy


def test_a_missing_bias_is_added_and_a_shared_one_is_split(image: Path, tmp_path: Path) -> None:
    path = without_bias(image, tmp_path)
    seen = samples(16)
    ranges = tflite_ranges(path, seen)
    options = {"weights": "tensor", "bias_correction": True}
    flatbuffer, notes = _tflite_quantize.quantize(path, "int8-weights", ranges, options)
    assert notes == ("bias corrected in 4 layers",)
    model = _tflite._read(flatbuffer)
    biases = [op.inputs[2] for op, kind in _tflite.operators(model) if kind in _tflite.CHANNEL_AXES]
    values = [_tflite.constant(model, int(i)) for i in biases]
    assert len(values) == 4 and all(v is not None for v in values)
    assert len({np.asarray(v).tobytes() for v in values}) == 4
    plain, _ = _tflite_quantize.quantize(path, "int8-weights", ranges, {"weights": "tensor"})
    float_outputs = [run(path.read_bytes(), s)["output"] for s in seen]
    errors = [
        np.abs(np.mean([run(f, s)["output"] - o for s, o in zip(seen, float_outputs, strict=True)], 0)).mean()
        for f in (plain, flatbuffer)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("precision", QUANTIZED)
def test_layers_are_kept_in_float(image: Path, precision: str) -> None:
    model = _tflite._read(image.read_bytes())
    names = {kind: _tflite.operator_name(model, op) for op, kind in _tflite.operators(model)}
    for pattern, kind in (
        ("type:depthwise_conv_2d", "DEPTHWISE_CONV_2D"),
        (names["FULLY_CONNECTED"], "FULLY_CONNECTED"),
    ):
        flatbuffer, notes = _tflite_quantize.quantize(
            image, precision, ranges_of(image), {"keep_float": [pattern]}
        )
        assert notes == (f"left in float32 as asked (keep_float): {names[kind]}",)
        written = _tflite._read(flatbuffer)
        floats = {
            found: _tflite.constant(written, int(op.inputs[1])) is not None
            for op, found in _tflite.operators(written)
            if found in _tflite.CHANNEL_AXES
        }
        assert floats == {k: k == kind for k in _tflite.CHANNEL_AXES}
    with pytest.raises(BadInput, match="'type:LSTM' matches no operator"):
        _tflite_quantize.quantize(image, precision, ranges_of(image), {"keep_float": ["type:LSTM"]})


def test_weights_only_without_weights_is_unsupported(image: Path) -> None:
    with pytest.raises(UnsupportedError, match="no convolution or product with a constant weight") as caught:
        _tflite_quantize.quantize(image, "int8-weights", None, {"keep_float": ["*"]})
    assert caught.value.fix


def test_a_kept_operator_takes_no_other_along_whose_name_ends_like_its_own(
    image: Path, tmp_path: Path
) -> None:
    model = _tflite._read(image.read_bytes())
    ops = [op for op, kind in _tflite.operators(model) if kind in _tflite.CHANNEL_AXES]
    ranges = ranges_of(image)
    for op, name in zip(ops, (b"b", b"ab", b"c.b", b"b2"), strict=True):
        tensor = model.subgraphs[0].tensors[op.outputs[0]]
        ranges[name.decode()] = ranges[tensor.name.decode()]
        tensor.name = name
    path = tmp_path / "renamed.tflite"
    path.write_bytes(_tflite._write(model))
    flatbuffer, notes = _tflite_quantize.quantize(path, "int8", ranges, {"keep_float": ["b"]})
    assert notes == ("left in float32 as asked (keep_float): b",)
    path.write_bytes(flatbuffer)
    assert _tflite.census(path).float_nodes == ("b",)


# transformers


class Block(torch.nn.Module):
    """A normalization, attention of one head, and a residual sum in which one channel is a thousand times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.down.bias.data[3] = 1000.0
        self.last = torch.nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        attention = torch.softmax(n @ n.transpose(1, 2), dim=-1) @ n
        y: torch.Tensor = self.last(x + self.down(torch.tanh(self.up(attention))))
        return y[:, :, 4:] * 100  # all but the large channel


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import litert_torch

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("block") / "model.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecated types
        litert_torch.convert(Block().eval(), (torch.randn(1, 6, 16),)).export(str(path))
    return path


def test_of_a_transformer_products_are_quantized_and_no_sums(block: Path) -> None:
    inputs = [{"args_0": np.random.default_rng(i).standard_normal((1, 6, 16)).astype("f4")} for i in range(8)]
    ranges = tflite_ranges(block, inputs)
    quantized, notes = _tflite_quantize.quantize(block, "int8", ranges)
    model = _tflite._read(quantized)
    kinds = {
        int(model.subgraphs[0].tensors[op.outputs[0]].type): kind
        for op, kind in _tflite.operators(model)
        if kind in ("ADD", "MUL", "RSQRT")
    }
    assert set(kinds) == {schema.TensorType.FLOAT32}
    path = block.with_name("int8.tflite")
    path.write_bytes(quantized)
    found = _tflite.census(path)
    assert found.integer_macs == found.macs
    assert (
        len(
            [
                n
                for n in notes
                if n.startswith("products with a sum in float after them quantize at run time: ")
            ]
        )
        == 1
    )
    wanted = [run(block.read_bytes(), i)["output_0"] for i in inputs]
    assert sqnr_db(wanted, [run(quantized, i)["output_0"] for i in inputs]) > 25


def test_where_no_operator_quantizes_at_run_time_those_products_stay_in_float(block: Path) -> None:
    inputs = [{"args_0": np.random.default_rng(i).standard_normal((1, 6, 16)).astype("f4")} for i in range(8)]
    quantized, _ = _tflite_quantize.quantize(block, "int8", tflite_ranges(block, inputs), hybrid=False)
    path = block.with_name("micro.tflite")
    path.write_bytes(quantized)
    found = _tflite.census(path)
    assert found.integer_macs and found.macs and 0 < found.integer_macs < found.macs
    model = _tflite._read(quantized)
    tensors = model.subgraphs[0].tensors
    mixed = [
        kind
        for op, kind in _tflite.operators(model)
        if kind == "FULLY_CONNECTED" and tensors[op.inputs[0]].type != tensors[op.inputs[1]].type
    ]
    assert mixed == []


@pytest.mark.parametrize("normalized", ["at the end", "before a product"])
def test_an_embedding_of_length_one_is_no_transformer(tmp_path: Path, normalized: str) -> None:
    """A convolutional network whose output is scaled to length 1 stays on integers, its Relu and mean too."""
    import litert_torch

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sigmoid(self.conv(x)).mean((2, 3))
            y = y if normalized == "before a product" else self.head(y)
            y = y * torch.rsqrt((y * y).sum(1, keepdim=True) + 1e-6)
            found: torch.Tensor = self.head(y) if normalized == "before a product" else y
            return found

    path = tmp_path / "model.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecated types
        litert_torch.convert(Embedding().eval(), (torch.randn(1, 3, 8, 8),)).export(str(path))
    inputs = [
        {"args_0": np.random.default_rng(i).standard_normal((1, 3, 8, 8)).astype("f4")} for i in range(4)
    ]
    model = _tflite._read(_tflite_quantize.quantize(path, "int8", tflite_ranges(path, inputs))[0])
    [kind] = [
        int(model.subgraphs[0].tensors[op.outputs[0]].type)
        for op, kind in _tflite.operators(model)
        if kind == "LOGISTIC"
    ]
    wanted = schema.TensorType.INT8 if normalized == "at the end" else schema.TensorType.FLOAT32
    assert kind == wanted
