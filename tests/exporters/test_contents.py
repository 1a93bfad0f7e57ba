"""What the readers find in files whose weights are known; the same network in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import portcall.api
from portcall.artifact import open_artifact
from portcall.exporters import _contents_onnx, get_backend
from portcall.exporters._contents_torch import read as read_torch
from portcall.source_torch import open_torch
from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import Artifact
from portcall.targets.agent.errors import BadInput
from portcall.targets.agent.stored import pattern_of, signs_of, spread, swapped, unpacked
from tests.exporters.graphs import write_onnx

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(5)


def _sparse(*shape: int, share: float = 0.5) -> Array:
    values = RNG.standard_normal(shape).astype(np.float32)
    values[RNG.random(shape) < share] = 0
    return values


def _write(
    path: Path, nodes: list[Any], weights: dict[str, Array], shape: list[Any], opset: int = 21
) -> Path:
    tensors = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return path


# patterns


def _signs(*shape: int) -> Array:
    return np.ones(shape, np.int8)


def test_a_dense_weight_has_under_a_tenth_of_zeros() -> None:
    signs = _signs(10, 10)
    assert pattern_of(signs) == ("dense", 0, 0)
    signs.reshape(-1)[::11] = 0  # 10 of 100, no whole channel
    assert pattern_of(signs)[0] == "unstructured"
    signs[0, 0] = 1
    assert pattern_of(signs)[0] == "dense"


def test_two_of_four_holds_along_the_input_channels_of_every_kernel_position() -> None:
    signs = _signs(3, 8, 2, 2)
    signs[:, [0, 3, 5, 6]] = 0
    signs[1, [1, 2]], signs[1, [0, 3]] = 0, 1  # no input channel is zero as a whole ...
    signs[2, [4, 7]], signs[2, [5, 6]] = 0, 1
    assert pattern_of(signs) == ("2:4", 0, 0)
    signs[1, 1, 1, 0] = 1  # ... and one more non-zero is one too many
    assert pattern_of(signs)[0] == "unstructured"


def test_two_of_four_needs_whole_groups() -> None:
    signs = _signs(8, 6)
    signs[::2, ::2] = 0
    signs[1::2, 1::2] = 0
    assert pattern_of(signs)[0] == "unstructured"
    assert pattern_of(signs[:, :4])[0] == "2:4"


def test_whole_channels_outrank_scattered_zeros() -> None:
    outputs = _signs(8, 4, 3, 3)
    outputs[[1, 5]] = 0
    assert pattern_of(outputs) == ("channels", 2, 0)
    inputs = _signs(8, 4, 3, 3)
    inputs[:, 2] = 0
    assert pattern_of(inputs) == ("channels", 0, 1)
    scattered = np.where(RNG.random((8, 5, 3, 3)) < 0.5, 0, 1).astype(np.int8)
    scattered[3] = 0
    assert pattern_of(scattered) == ("unstructured", 1, 0)


def test_an_input_channel_of_a_grouped_convolution_lies_in_its_group() -> None:
    signs = _signs(4, 2, 3)
    signs[:2, 1] = 0
    assert pattern_of(signs, groups=2) == ("channels", 0, 1)
    assert pattern_of(signs, groups=1)[2] == 0


def test_an_empty_or_one_element_weight_is_dense() -> None:
    assert pattern_of(_signs(0, 4)) == ("dense", 0, 0)
    assert pattern_of(_signs(1, 1)) == ("dense", 0, 0)
    assert pattern_of(np.zeros((1, 1), np.int8)) == ("channels", 1, 1)


# stored values


def test_nan_is_no_zero_and_negative_zero_is_one() -> None:
    found = signs_of(np.array([np.nan, -0.0, 0.0, -1e-45, np.inf], np.float32))
    assert found.tolist() == [1, 0, 0, -1, 1]


def test_blocks_of_scales_cover_a_shorter_last_one() -> None:
    assert spread(np.array([[1, 2]]), (1, 5), 1, 3).tolist() == [[1, 1, 1, 2, 2]]
    assert spread([4], (2, 3), 0).shape == ()


@pytest.mark.parametrize("signed", [True, False])
def test_unpacks_four_bits_lowest_first(signed: bool) -> None:
    found = unpacked(bytes([0x8F, 0x07]), 4, 3, signed)
    assert found.tolist() == ([-1, -8, 7] if signed else [15, 8, 7])


def test_swaps_each_group_of_a_transposed_convolution() -> None:
    weight = np.arange(4 * 3 * 2).reshape(4, 3, 2)  # two groups of 2 inputs and 3 outputs
    found = swapped(weight, 2)
    assert found.shape == (6, 2, 2)
    np.testing.assert_array_equal(found[3 + 1, 1], weight[2 + 1, 1])


# ONNX


def _only(contents: Contents) -> Any:
    [weight] = contents.weights
    return weight


def test_reads_a_float16_weight_behind_a_cast(tmp_path: Path) -> None:
    values = _sparse(8, 4, 3, 3).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "wide"], ["y"], "conv"),
    ]
    found = _only(_contents_onnx.read(_write(tmp_path / "m.onnx", nodes, {"w": values}, [1, 4, 8, 8]), {}))
    assert (found.name, found.operator, found.dtype, found.bits) == ("conv", "Conv", "float16", 16)
    assert found.zeros == np.count_nonzero(values == 0) and found.shape == (8, 4, 3, 3)
    np.testing.assert_array_equal(found.signs, np.sign(values))


def test_zero_of_asymmetric_integers_is_their_zero_point(tmp_path: Path) -> None:
    integers = RNG.integers(0, 8, (4, 6)).astype(np.uint8)
    weights: dict[str, Array] = {
        "w": integers,
        "scale": np.array([0.5, 1, 2, 4, 8, 16], np.float32),
        "zero": np.array([0, 1, 2, 3, 4, 5], np.uint8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["f"], "dq", axis=1),
        helper.make_node("MatMul", ["x", "f"], ["y"], "product"),
    ]
    path = _write(tmp_path / "m.onnx", nodes, weights, [2, 4])
    contents = _contents_onnx.read(path, {"x": (2, 4)})
    found = _only(contents)
    assert found.zeros == np.count_nonzero(integers == weights["zero"])
    assert (found.scales, found.scale_min, found.scale_max, found.zero_point) == (6, 0.5, 16.0, (0, 5))
    assert (found.output_axis, found.input_axis) == (1, 0) and found.signs.shape == (6, 4)
    assert contents.quantize_nodes == 1 and found.macs == contents.macs == 2 * 4 * 6


def test_a_weight_that_the_graph_rounds_has_the_zeros_of_the_rounded_one(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.04, 0.3], [-0.04, -1.0, 0.06]], np.float32)
    weights: dict[str, Any] = {"w": values, "scale": np.float32(0.1), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["f"], "dq"),
        helper.make_node("Gemm", ["x", "f"], ["y"], "head", transB=1),
    ]
    arrays = {k: np.asarray(v) for k, v in weights.items()}
    found = _only(_contents_onnx.read(_write(tmp_path / "m.onnx", nodes, arrays, [1, 3]), {}))
    assert found.signs.tolist() == [[0, 0, 1], [0, -1, 1]]


def test_reads_groups_of_four_bits(tmp_path: Path) -> None:
    import ml_dtypes

    integers = RNG.integers(-2, 3, (64, 8)).astype(np.int8)
    weights = {"w": integers.astype(ml_dtypes.int4), "scale": RNG.random((2, 8)).astype(np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["f"], "dq", axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "f"], ["y"], "product"),
    ]
    found = _only(_contents_onnx.read(_write(tmp_path / "m.onnx", nodes, weights, [1, 64]), {}))
    assert (found.dtype, found.bits, found.scales) == ("int4", 4, 16)
    np.testing.assert_array_equal(found.signs, np.sign(integers.T))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_reads_what_onnxruntimes_own_tool_packs(tmp_path: Path, bits: int, symmetric: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    values = _sparse(70, 5)  # the last block is shorter
    path = _write(
        tmp_path / "f.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"w": values},
        [1, 70],
    )
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits)
    tool = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    tool.process()
    packed = tmp_path / "q.onnx"
    onnx.save(tool.model.model, packed)
    contents = _contents_onnx.read(packed, {"x": (1, 70)})
    found = _only(contents)
    assert (found.operator, found.bits, found.elements) == ("MatMulNBits", bits, 350)
    assert contents.macs == 350
    held = values.T == 0
    assert np.all(found.signs[held] == 0), "each zero stays one"
    kept = (found.signs != 0) & ~held
    assert np.array_equal(found.signs[kept], np.sign(values.T)[kept]) and kept.sum() > 100


def test_reads_integer_operators_with_their_own_zero_points(tmp_path: Path) -> None:
    integers = RNG.integers(126, 131, (4, 3, 3, 3)).astype(np.uint8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "quantize"),
        helper.make_node("ConvInteger", ["q", "w", "z", "wz"], ["i"], "conv"),
        helper.make_node("Cast", ["i"], ["y"], "cast", to=TensorProto.FLOAT),
    ]
    weights = {"w": integers, "wz": np.asarray(np.uint8(128))}
    contents = _contents_onnx.read(_write(tmp_path / "m.onnx", nodes, weights, [1, 3, 8, 8]), {})
    assert _only(contents).zeros == np.count_nonzero(integers == 128)
    assert contents.quantize_nodes == 2 and contents.other_parameters == 0


def test_counts_biases_and_embeddings_but_no_shapes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("Gemm", ["e", "w", "b"], ["r"], "head"),
        helper.make_node("Reshape", ["r", "shape"], ["y"], "reshape"),
    ]
    weights = {
        "table": _sparse(20, 6),
        "w": _sparse(6, 4),
        "b": np.array([0, 1, 2, 3], np.float32),
        "shape": np.array([-1], np.int64),
        "ids": np.array([1, 2], np.int64),
    }
    contents = _contents_onnx.read(_write(tmp_path / "m.onnx", nodes, weights, [1]), {})
    assert [w.operator for w in contents.weights] == ["Gather", "Gemm"]
    assert contents.elements == 20 * 6 + 6 * 4
    assert (contents.other_parameters, contents.other_zeros) == (4, 1)


def test_a_weight_that_two_layers_share_counts_once(tmp_path: Path) -> None:
    values = _sparse(6, 6)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "second"),
    ]
    contents = _contents_onnx.read(_write(tmp_path / "m.onnx", nodes, {"w": values}, [1, 6]), {})
    assert len(contents.weights) == 2 and contents.elements == 36


def test_a_file_that_is_no_model_is_bad_input(tmp_path: Path) -> None:
    for name, backend in (("m.onnx", "onnxruntime"), ("m.tflite", "tflite"), ("m.xml", "openvino")):
        (tmp_path / name).write_bytes(b"\0\1garbage that is long enough to be looked at" * 3)
        read = get_backend(backend).contents
        assert read is not None
        with pytest.raises(BadInput, match=name):
            read(Artifact(tmp_path, name, backend, "as is"), {})


def test_a_truncated_flatbuffer_is_bad_input(tmp_path: Path, every: dict[str, Path]) -> None:
    whole = (every["tflite"] / "model.tflite").read_bytes()
    (tmp_path / "cut.tflite").write_bytes(whole[: len(whole) // 2])
    read = get_backend("tflite").contents
    assert read is not None
    with pytest.raises(BadInput, match=r"cut\.tflite"):
        read(Artifact(tmp_path, "cut.tflite", "tflite", "as is"), {})


# one network in every format

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tflite", "coreml")
MODELS = {"coreml": "tests.sparse_models:layouts_without_transposed"}
"""Core ML's converter refuses the transposed convolution."""


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fp32 artifacts of a network whose every layer has its own shape."""
    output = tmp_path_factory.mktemp("every format")
    results = []
    for model in ("tests.sparse_models:layouts", *MODELS.values()):
        cells = [f"{b}:fp32" for b in BACKENDS if MODELS.get(b, "tests.sparse_models:layouts") == model]
        results += portcall.api.export(model, cells, output / model.rpartition(":")[2])["results"]
    failed = {r["backend"]: r["reason"] for r in results if r["outcome"] not in ("artifact", "unavailable")}
    assert not failed
    return {r["backend"]: Path(r["path"]) for r in results if r["outcome"] == "artifact"}


def _source(backend: str, directory: Path) -> Contents:
    return read_torch(open_torch(MODELS.get(backend, "tests.sparse_models:layouts"), "torch", directory))


def test_the_source_names_its_layers_and_counts_by_hand(tmp_path: Path) -> None:
    source = _source("tflite", tmp_path)
    assert [(w.name, w.macs) for w in source.weights] == [
        ("plain", 12 * 6 * 6 * 4 * 9),
        ("grouped", 8 * 6 * 6 * 6 * 9),
        ("depthwise", 16 * 6 * 6 * 9),
        ("up", 16 * 6 * 6 * 5 * 4),
        ("head", 5 * 12 * 12 * 7),
    ]
    assert source.macs == sum(w.macs or 0 for w in source.weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_format_holds_the_signs_of_the_source(
    every: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    """Not a statistic: each element in its place, whatever the layout of the file."""
    if backend not in every:
        pytest.skip(f"{backend} is not installed here; fix: pip install 'portcall[{backend}]'")
    artifact, _ = open_artifact(every[backend])
    source = _source(backend, tmp_path)
    read = get_backend(backend).contents
    assert read is not None
    found = read(artifact, {"x": (1, 4, 6, 6)})
    wanted = {w.signs.reshape((*w.signs.shape[:2], -1)).shape: w for w in source.weights}
    seen = set()
    for weight in found.weights:
        key = weight.signs.reshape((*weight.signs.shape[:2], -1)).shape
        if key not in wanted:
            assert backend == "tflite" and weight.name, "LiteRT may cut a grouped convolution up"
            continue
        np.testing.assert_array_equal(weight.signs.reshape(key), wanted[key].signs.reshape(key), weight.name)
        assert weight.zeros == wanted[key].zeros and weight.dtype == "float32" and weight.bits == 32
        assert weight.macs == wanted[key].macs, weight.name
        seen.add(key)
    assert len(seen) == len(wanted)
    assert [t.shape[1:] for t in found.inputs] == [t.shape[1:] for t in source.inputs]
    assert found.macs == source.macs
    assert found.other_parameters >= 12 + 8 + 5 + 7  # biases, and what a converter adds


def test_write_onnx_is_read_with_its_inputs(tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "factor"], ["y"], "mul")
    path = write_onnx(tmp_path / "with spaces.onnx", [node], {"x": [1, 4], "factor": []}, {"y": [1, 4]}, {})
    found = _contents_onnx.read(Path(path), {})
    assert [t.name for t in found.inputs] == ["x", "factor"] and not found.weights
    assert found.zero_fraction is None
