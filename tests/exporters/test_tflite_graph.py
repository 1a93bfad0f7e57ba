"""The flatbuffer side of tflite: alignment, names and dtypes, tap points, and the count of its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from portcall.exporters import _tflite
from portcall.targets.agent.contract import Source, TensorSpec
from portcall.targets.agent.errors import UnsupportedError
from tests.exporters.contract import Array, Exports, random_inputs

# ai-edge-quantizer asks LiteRT for it and LiteRT warns that it takes memory.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*experimental_preserve_all_tensors:UserWarning")

BACKENDS = ("tflite",)
PRECISIONS = ("fp32", "fp16", "int8-dynamic", "int8-weights", "int8", "int16x8")


@pytest.fixture
def image(exports: Exports) -> Path:
    return exports.artifact("image", "tflite") / "model.tflite"


@pytest.fixture
def two_inputs(exports: Exports) -> Path:
    return exports.artifact("two_inputs", "tflite") / "model.tflite"


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


def data_offsets(flatbuffer: bytes) -> Iterator[int]:
    """Yield where in the file the data of each buffer starts."""
    model = schema.Model.GetRootAs(flatbuffer, 0)
    for number in range(model.BuffersLength()):
        buffer = model.Buffers(number)
        if buffer.DataLength():
            yield buffer._tab.Vector(buffer._tab.Offset(4))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_buffer_is_aligned_to_16_bytes(exports: Exports, precision: str) -> None:
    for model in ("image", "two_inputs"):
        if model == "two_inputs" and precision not in ("fp32", "int8"):
            continue
        flatbuffer = (exports.artifact(model, "tflite", precision) / "model.tflite").read_bytes()
        offsets = list(data_offsets(flatbuffer))
        assert len(offsets) > 4 and all(offset % 16 == 0 for offset in offsets)
        assert flatbuffer[4:8] == b"TFL3"


@pytest.mark.parametrize("extra", range(1, 17))
def test_alignment_does_not_depend_on_the_sizes_of_other_buffers(image: Path, extra: int) -> None:
    model = _tflite._read(image.read_bytes())
    added = schema.BufferT()
    added.data = np.zeros(extra, np.uint8)
    model.buffers.append(added)
    model.description = b"x" * extra
    assert all(offset % 16 == 0 for offset in data_offsets(_tflite._write(model)))


def test_weights_are_inside_the_flatbuffer(exports: Exports) -> None:
    for precision in PRECISIONS:
        path = exports.artifact("image", "tflite", precision) / "model.tflite"
        model = schema.Model.GetRootAs(path.read_bytes(), 0)
        buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
        assert all(b.Offset() == b.Size() == 0 for b in buffers), "TFLite-Micro cannot read outside buffers"


def test_writing_again_changes_no_bit_of_any_output(image: Path, two_inputs: Path) -> None:
    for name, path in (("image", image), ("two_inputs", two_inputs)):
        inputs = random_inputs(name, 1)
        before = path.read_bytes()
        after = _tflite._write(_tflite._read(before))
        for output, array in run(before, inputs).items():
            np.testing.assert_array_equal(array, run(after, inputs)[output])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_interface_is_float_in_every_precision(exports: Exports, precision: str) -> None:
    path = exports.artifact("image", "tflite", precision) / "model.tflite"
    runner = Interpreter(str(path)).get_signature_runner()
    for details in (runner.get_input_details(), runner.get_output_details()):
        assert [d["dtype"] for d in details.values()] == [np.float32]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_int64_inputs_stay_int64_by_a_cast(exports: Exports, precision: str) -> None:
    path = exports.artifact("two_inputs", "tflite", precision) / "model.tflite"
    model = _tflite._read(path.read_bytes())
    tensors = model.subgraphs[0].tensors
    [entry] = [m for m in model.signatureDefs[0].inputs if m.name == b"token_ids"]
    assert tensors[entry.tensorIndex].type == schema.TensorType.INT64
    assert entry.tensorIndex in list(model.subgraphs[0].inputs)
    [cast] = [o for o in operators(model) if o[0] == "CAST" and o[1] == [entry.tensorIndex]]
    assert tensors[cast[2][0]].type == schema.TensorType.INT32
    details = Interpreter(str(path)).get_signature_runner().get_input_details()
    assert {k: np.dtype(d["dtype"]).name for k, d in details.items()} == {
        "token_ids": "int64",
        "features": "float32",
    }


def source(inputs: dict[str, str], outputs: dict[str, str]) -> Source:
    specs = (
        tuple(TensorSpec(k, (1,), v) for k, v in inputs.items()),
        tuple(TensorSpec(k, (1,), v) for k, v in outputs.items()),
    )
    return Source("m.pt2", "pt2", Path("m.pt2"), "0", *specs, {})


def test_interface_takes_the_names_of_the_source(image: Path) -> None:
    renamed = _tflite.with_source_interface(
        image.read_bytes(), source({"pixels": "float32"}, {"scores": "float32"})
    )
    runner = Interpreter(model_content=renamed).get_signature_runner()
    assert list(runner.get_input_details()) == ["pixels"]
    assert list(runner.get_output_details()) == ["scores"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"a": "float32", "b": "float32"}, {"y": "float32"}, "kept 1 of 2 inputs"),
        ({"a": "float32"}, {"y": "float32", "z": "float32"}, "kept 1 of 2 outputs"),
        ({"a": "float64"}, {"y": "float32"}, "LiteRT has no input of a: float64"),
        ({"a": "float32"}, {"y": "int64"}, "LiteRT has no output of y: int64"),
    ],
)
def test_an_interface_that_cannot_be_kept_is_refused(
    image: Path, inputs: dict[str, str], outputs: dict[str, str], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        _tflite.with_source_interface(image.read_bytes(), source(inputs, outputs))
    assert caught.value.fix


def test_weighted_inputs_are_what_meets_constant_weights(image: Path, two_inputs: Path) -> None:
    for path, expected in ((image, 4), (two_inputs, 2)):
        model = _tflite._read(path.read_bytes())
        tensors = model.subgraphs[0].tensors
        found = _tflite.weighted_inputs(path)
        assert set(found.values()) == {-1} and len(found) == expected
        kinds = [
            kind for op, kind in _tflite.operators(model) if tensors[op.inputs[0]].name.decode() in found
        ]
        assert {"FULLY_CONNECTED"} <= set(kinds)
        assert set(found) <= set(_tflite.tapped_tensors(path).values())


# the census, on hand-made operators


def flatbuffer_of(
    operator: str, shapes: list[tuple[int, ...]], output: tuple[int, ...], weight: int
) -> bytes:
    """Return a flatbuffer of one operator; *weight* is the type of its second input."""
    graph, model, op, code = schema.SubGraphT(), schema.ModelT(), schema.OperatorT(), schema.OperatorCodeT()
    graph.tensors = []
    for number, shape in enumerate([*shapes, output]):
        tensor = schema.TensorT()
        tensor.shape, tensor.buffer = list(shape), 0
        tensor.name = b"result" if number == len(shapes) else f"input_{number}".encode()
        tensor.type = weight if number == 1 else schema.TensorType.FLOAT32
        graph.tensors.append(tensor)
    op.inputs, op.outputs, op.opcodeIndex = [*range(len(shapes)), -1], [len(shapes)], 0
    graph.operators, graph.inputs, graph.outputs = [op], [0], [len(shapes)]
    code.builtinCode = getattr(schema.BuiltinOperator, operator)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [schema.BufferT()]
    return _tflite._write(model)


COUNTED = [
    ("CONV_2D", [(1, 9, 9, 3), (8, 3, 2, 3)], (1, 7, 8, 8), 7 * 8 * 8 * 3 * 2 * 3),
    ("CONV_2D", [(1, 9, 9, 6), (8, 3, 3, 2)], (1, 7, 7, 8), 7 * 7 * 8 * 3 * 3 * 2),  # three groups
    ("DEPTHWISE_CONV_2D", [(2, 9, 9, 4), (1, 3, 3, 8)], (2, 7, 7, 8), 2 * 7 * 7 * 8 * 3 * 3),
    ("TRANSPOSE_CONV", [(4,), (6, 3, 2, 5), (1, 4, 4, 5)], (1, 9, 8, 6), 4 * 4 * 5 * 3 * 2 * 6),
    ("CONV_3D", [(1, 4, 5, 6, 2), (2, 3, 2, 2, 7)], (1, 3, 3, 5, 7), 3 * 3 * 5 * 7 * 2 * 3 * 2 * 2),
    ("FULLY_CONNECTED", [(4, 20), (5, 20)], (4, 5), 4 * 5 * 20),
    ("FULLY_CONNECTED", [(1, 7, 20), (5, 20)], (1, 7, 5), 7 * 5 * 20),
    ("BATCH_MATMUL", [(2, 3, 4, 5), (2, 3, 5, 6)], (2, 3, 4, 6), 2 * 3 * 4 * 6 * 5),
]


@pytest.mark.parametrize(("operator", "shapes", "output", "macs"), COUNTED)
@pytest.mark.parametrize("kind", ["FLOAT32", "INT8", "INT4", "UINT8"])
def test_census_counts_multiply_accumulates(
    tmp_path: Path,
    operator: str,
    shapes: list[tuple[int, ...]],
    output: tuple[int, ...],
    macs: int,
    kind: str,
) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(flatbuffer_of(operator, shapes, output, getattr(schema.TensorType, kind)))
    found = _tflite.census(path)
    assert found.macs == macs
    if kind == "FLOAT32":
        assert (found.integer_macs, found.float_nodes, found.quantize_nodes) == (0, ("result",), 0)
    else:
        assert (found.integer_macs, found.float_nodes, found.quantize_nodes) == (macs, (), 1)


@pytest.mark.parametrize("precision", ["fp16", "int8-weights"])
def test_census_takes_no_storage_for_quantization(exports: Exports, precision: str) -> None:
    found = _tflite.census(exports.artifact("image", "tflite", precision) / "model.tflite")
    assert found.quantize_nodes == 0 and found.integer_macs == 0 and len(found.float_nodes) == 4


def test_census_counts_batch_matmul_with_its_left_operand_transposed(tmp_path: Path) -> None:
    model = _tflite._read(
        flatbuffer_of("BATCH_MATMUL", [(2, 5, 4), (2, 5, 6)], (2, 4, 6), schema.TensorType.FLOAT32)
    )
    op = model.subgraphs[0].operators[0]
    op.builtinOptionsType = schema.BuiltinOptions.BatchMatMulOptions
    op.builtinOptions = schema.BatchMatMulOptionsT()
    op.builtinOptions.adjX = True
    path = tmp_path / "m.tflite"
    path.write_bytes(_tflite._write(model))
    assert _tflite.census(path).macs == 2 * 4 * 6 * 5
