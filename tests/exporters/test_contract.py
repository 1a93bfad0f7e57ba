"""The contract of every backend: each class below states the facts of one."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from onnx import helper

import portcall.api
import portcall.exporters
from portcall.exporters import backend_names
from tests.exporters.contract import BackendContract, assert_light_imports
from tests.exporters.graphs import write_onnx


class TestNull(BackendContract):
    name = "null"
    runtime = ()
    export_needs = ("onnx",)
    models = ("copy",)
    refused_models = ("image", "two_inputs", "onnx")
    floors_db: ClassVar = {"fp32": 300.0}
    census_method = "nothing is computed"
    computes = False


class TestOnnxRuntime(BackendContract):
    name = "onnxruntime"
    runtime = ("onnxruntime",)
    export_needs = ("onnx",)
    floors_db: ClassVar = {
        "fp32": 120.0,
        "fp16": 55.0,
        "int8-dynamic": 30.0,
        "int8": 18.0,
        "int8-weights": 38.0,
        "int4-weights": 18.0,
    }
    census_method = "Q/DQ and integer operators of the ONNX graph"


class TestOpenVino(BackendContract):
    name = "openvino"
    runtime = ("openvino",)
    export_needs = ("onnx", "onnxruntime")
    floors_db: ClassVar = {"fp32": 120.0, "fp16": 55.0, "int8": 18.0}
    census_method = "runtime precision of the compiled model on this CPU"


class TestTensorRt(BackendContract):
    name = "tensorrt"
    runtime = ("tensorrt",)
    export_needs = ("onnx", "onnxruntime")
    floors_db: ClassVar = {"fp32": 120.0, "fp16": 58.0, "bf16": 42.0, "int8": 18.0}
    census_method = "Q/DQ and integer operators of the ONNX graph"
    interpreted = True


class TestTensorRtRtx(BackendContract):
    name = "tensorrt_rtx"
    runtime = ("tensorrt_rtx",)
    export_needs = ("onnx", "onnxruntime")
    floors_db: ClassVar = {"fp32": 120.0, "fp16": 58.0, "bf16": 42.0, "int8": 18.0}
    census_method = "Q/DQ and integer operators of the ONNX graph"
    interpreted = True


class TestTfLite(BackendContract):
    name = "tflite"
    runtime = ("ai_edge_litert",)
    export_needs = ("ai_edge_quantizer",)
    export_finds = ("torch", "litert_torch")
    alternatives = ("tflite_runtime", "tensorflow")
    floors_db: ClassVar = {
        "fp32": 115.0,
        "fp16": 55.0,
        "int8-weights": 38.0,
        "int8-dynamic": 30.0,
        "int8": 18.0,
        "int16x8": 18.0,
    }
    census_method = "operator types of the flatbuffer"
    dynamic = False


class TestTfLiteMicro(BackendContract):
    name = "tflite_micro"
    runtime = ("tflite_micro",)
    export_needs = ("ai_edge_litert", "ai_edge_quantizer")
    export_finds = ("torch", "litert_torch")
    models = ("image", "onnx")
    refused_models = ("two_inputs",)
    floors_db: ClassVar = {"fp32": 115.0, "int8": 18.0, "int16x8": 18.0}
    census_method = "operator types of the flatbuffer"
    dynamic = False


class TestCoreMl(BackendContract):
    name = "coreml"
    runtime = ("coremltools",)
    export_finds = ("coremltools", "torch", "onnx")
    floors_db: ClassVar = {
        "fp32": 120.0,
        "fp16": 55.0,
        "int8": 18.0,
        "int8-weights": 38.0,
        "int4-weights": 18.0,
        "palette4": 15.0,
        "palette6": 30.0,
    }
    census_method = "quantize and dequantize of the ML program"
    interpreted = True


class TestQnn(BackendContract):
    name = "qnn"
    runtime = ("onnxruntime_qnn", "onnxruntime")
    export_needs = ("onnxruntime_qnn", "onnxruntime", "onnx")
    floors_db: ClassVar = {"fp16": 50.0, "int8": 18.0, "int16x8": 18.0}
    census_method = "Q/DQ and integer operators of the ONNX graph"
    dynamic = False
    interpreted = True


class TestExecuTorch(BackendContract):
    name = "executorch"
    runtime = ("executorch", "torch")
    export_finds = ("onnx", "torchao")
    floors_db: ClassVar = {"fp32": 115.0, "int8-dynamic": 30.0, "int8": 18.0}
    census_method = "operators of the .pte file's XNNPACK delegates"
    dynamic = False
    float_macs: ClassVar = {"int8-dynamic": 16 * 8 * 8 * 9}  # XNNPACK has no such depthwise kernel


def test_every_backend_has_a_contract_class() -> None:
    assert {c.name for c in BackendContract.__subclasses__()} == set(backend_names())


@pytest.mark.parametrize(
    "path", sorted(Path(portcall.exporters.__path__[0]).glob("_*.py")), ids=lambda p: p.name
)
def test_shared_parts_can_travel_too(path: Path) -> None:
    assert_light_imports(ast.parse(path.read_text(), feature_version=(3, 8)), siblings=True)


def test_scalar_inputs_stay_scalars(tmp_path: Path) -> None:
    node = helper.make_node("Mul", ["x", "factor"], ["y"], "mul")
    model = write_onnx(tmp_path / "m.onnx", [node], {"x": [1, 4], "factor": []}, {"y": [1, 4]}, {})
    x = np.arange(4, dtype=np.float32)[None]
    answer = portcall.api.export(model, ["onnxruntime:fp32", "openvino:fp32"], tmp_path / "out")
    for result in answer["results"]:
        assert result["outcome"] == "artifact", result["reason"]
        with portcall.api.load(result["path"]) as opened:
            assert opened.inputs[1].shape == ()
            found = opened.infer({"x": x, "factor": np.asarray(3, np.float32)})
        np.testing.assert_array_equal(found["y"], 3 * x)
