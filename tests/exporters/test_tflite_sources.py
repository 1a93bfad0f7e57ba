"""ONNX and Keras sources through the whole export: parity, names, dtypes, order, and the arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import portcall.api
from portcall import artifact as artifacts

PRECISIONS = ("fp32", "fp16", "int8-weights", "int8-dynamic", "int8", "int16x8")
FLOORS_DB = {"fp32": 115, "fp16": 55, "int8-weights": 35, "int8-dynamic": 30, "int8": 20, "int16x8": 30}

MAKE = """
import sys
import keras
from keras import layers

keras.utils.set_random_seed(0)
image, ids = keras.Input((8, 8, 3), name="pixels"), keras.Input((5,), dtype="int64", name="ids")
x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(image)
x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
x = layers.DepthwiseConv2D(3, padding="same")(x)
x = layers.GlobalAveragePooling2D()(x)
y = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8)(ids))
z = layers.Concatenate()([x, y])
outputs = {"b": layers.Dense(5, name="b")(z), "a": layers.Dense(3, name="a")(z)}
model = keras.Model([image, ids], [outputs["b"], outputs["a"]])
model.save(sys.argv[1] + "/model.keras")
"""


def export(model: Path, data: Mapping[str, Any], precisions: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Export into *folder*; one more int8 with integer inputs and outputs goes by "io"."""
    np.savez(folder / "data.npz", **data)
    cells, found = [f"tflite:{word}" for word in precisions], {}
    for name, options in (("out", {}), ("io", {"tflite.io": "int8"})):
        wanted = cells if name == "out" else ["tflite:int8"]
        answer = portcall.api.export(model, wanted, folder / name, data=folder / "data.npz", options=options)
        found.update({"io" if name == "io" else r["precision"]: r for r in answer["results"]})
    return found


@pytest.fixture(scope="module")
def keras_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip(
        "tensorflow", reason="TensorFlow is not installed; fix: pip install 'portcall[keras]'"
    )
    folder = tmp_path_factory.mktemp("keras export")
    quiet = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", MAKE, str(folder)]
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(0)
    data = {
        "pixels": rng.standard_normal((24, 8, 8, 3)).astype(np.float32),
        "ids": rng.integers(0, 20, (24, 5)),
    }
    return export(folder / "model.keras", data, PRECISIONS, folder)


@pytest.fixture(scope="module")
def onnx_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A convolution, pooling and a product of an image, and token ids, at operator set 13."""
    folder = tmp_path_factory.mktemp("onnx export")
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 3, 3, 3)) / 5, "table": rng.standard_normal((20, 8)),
        "m": rng.standard_normal((8, 4)), "b": rng.standard_normal(4),
    }  # fmt: skip
    make = helper.make_node
    nodes = [
        make("Conv", ["pixels", "w"], ["c"], "conv", auto_pad="SAME_UPPER", strides=[2, 2]),
        make("Relu", ["c"], ["r"], "relu"),
        make("ReduceMean", ["r"], ["p"], "pool", axes=[2, 3], keepdims=0),
        make("Gather", ["table", "ids"], ["e"], "embedding"),
        make("ReduceMean", ["e"], ["f"], "mean", axes=[1], keepdims=0),
        make("Add", ["p", "f"], ["s"], "add"),
        make("MatMul", ["s", "m"], ["n"], "head"),
        make("Add", ["n", "b"], ["scores"], "bias"),
        make("ArgMax", ["scores"], ["best"], "best", axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "image and ids",
        [
            helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 8, 8]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 5]),
        ],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save(model, folder / "model.onnx")
    data = {
        "pixels": rng.standard_normal((24, 3, 8, 8)).astype(np.float32),
        "ids": rng.integers(0, 20, (24, 5)),
    }
    return export(folder / "model.onnx", data, ("fp32", "int8"), folder)


def interface(result: dict[str, Any]) -> dict[str, list[tuple[str, str, list[int]]]]:
    manifest = artifacts.read_manifest(Path(result["path"]))
    return {k: [(t["source"], t["dtype"], t["shape"]) for t in manifest[k]] for k in ("inputs", "outputs")}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_keras_in_every_precision(keras_results: dict[str, Any], precision: str) -> None:
    result = keras_results[precision]
    assert result["outcome"] == "artifact", result["reason"]
    assert result["parity"]["sqnr_db"] >= FLOORS_DB[precision]
    assert interface(result) == {
        "inputs": [("pixels", "float32", [1, 8, 8, 3]), ("ids", "int64", [1, 5])],
        "outputs": [("b", "float32", [1, 5]), ("a", "float32", [1, 3])],
    }
    assert not any("TRANSPOSE" in note for note in result["notes"])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_onnx_keeps_its_interface(onnx_results: dict[str, Any], precision: str) -> None:
    result = onnx_results[precision]
    assert result["outcome"] == "artifact", result["reason"]
    assert interface(result) == {
        "inputs": [("pixels", "float32", [1, 3, 8, 8]), ("ids", "int64", [1, 5])],
        "outputs": [("scores", "float32", [1, 4]), ("best", "int64", [1])],
    }
    assert result["notes"] == ["1 TRANSPOSE, for the layout of: Conv_conv"]
    scores = result["parity"]["outputs"][0]
    assert scores["name"] == "scores" and scores["sqnr_db"] >= FLOORS_DB[precision]


@pytest.mark.parametrize("source", ["keras_results", "onnx_results"])
def test_integer_interface_is_as_exact_as_the_float_one(request: pytest.FixtureRequest, source: str) -> None:
    results = request.getfixturevalue(source)
    assert results["io"]["outcome"] == "artifact", results["io"]["reason"]
    manifest = artifacts.read_manifest(Path(results["io"]["path"]))
    # Floats are int8 now; token ids, and the index of the largest score, which an operator computes of that, are not.
    tensors = {t["name"]: t for t in manifest["inputs"] + manifest["outputs"]}
    integers = {"ids", "best"} & set(tensors)
    assert {t["dtype"] for name, t in tensors.items() if name in integers} == {"int64"}
    assert all(t["dtype"] == "int8" and t["scale"] for name, t in tensors.items() if name not in integers)
    for one, other in zip(
        results["io"]["parity"]["outputs"], results["int8"]["parity"]["outputs"], strict=True
    ):
        assert one["sqnr_db"] == pytest.approx(other["sqnr_db"], abs=0.5)


@pytest.mark.parametrize("source", ["keras_results", "onnx_results"])
def test_products_of_int8_are_on_integers(request: pytest.FixtureRequest, source: str) -> None:
    arithmetic = request.getfixturevalue(source)["int8"]["arithmetic"]
    assert arithmetic["integer_macs"] == arithmetic["macs"] > 0 and arithmetic["float_nodes"] == []


def test_an_operator_that_litert_lacks_is_named(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Pow", ["x", "e"], ["y"], "square")
    graph = helper.make_graph(
        [node], "g", [value("x", TensorProto.INT64, [1, 3])], [value("y", TensorProto.INT64, [1, 3])],
        [numpy_helper.from_array(np.array(2), "e")],
    )  # fmt: skip
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8),
        tmp_path / "m.onnx",
    )
    [result] = portcall.api.export(tmp_path / "m.onnx", ["tflite:fp32"], tmp_path / "out")["results"]
    assert result["outcome"] == "unsupported", result["reason"]
    assert "tfl.pow" in result["reason"] and result["fix"]


def test_a_quantized_onnx_model_is_no_float_model(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize"),
    ]
    constants = [
        numpy_helper.from_array(np.array(v), n) for n, v in (("s", np.float32(0.1)), ("z", np.int8(0)))
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [1, 3])], [value("y", TensorProto.FLOAT, [1, 3])], constants
    )  # fmt: skip
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        tmp_path / "m.onnx",
    )
    [result] = portcall.api.export(tmp_path / "m.onnx", ["tflite:fp32"], tmp_path / "out")["results"]
    assert result["outcome"] == "unsupported", result["reason"]
    assert "is quantized: fp32 would drop the scales that it was trained with" in result["reason"]


def test_more_than_two_gigabytes_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    from portcall.exporters import _tflite_torch
    from portcall.targets.agent.contract import Source, TensorSpec
    from portcall.targets.agent.errors import UnsupportedError

    rows, columns = 20_000, 30_000  # 2.4 GB of float32, in a file with a hole
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, columns])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights")
    with (tmp_path / "weights").open("wb") as stream:
        stream.truncate(4 * rows * columns)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "n")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])],
        [weight],
    )
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    inputs = (TensorSpec("x", (1, rows), "float32"),)
    outputs = (TensorSpec("y", (1, columns), "float32"),)
    source = Source("m.onnx", "onnx", tmp_path / "m.onnx", "0", inputs, outputs, {"x": (1, rows)})
    with pytest.raises(UnsupportedError, match=r"m\.onnx has 2\.4 GB of weights, a flatbuffer holds 2 GB"):
        _tflite_torch.convert(source, tmp_path)
