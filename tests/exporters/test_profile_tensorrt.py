"""The profile of an engine on stand-ins for TensorRT and CUDA: no GPU is there to run it on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from portcall.core import Artifact
from portcall.exporters._profile_tensorrt import EngineProfiler
from tests.exporters.test_tensorrt_session import FROM_1_TO_8, Context, Cuda, Engine, Trt

LAYERS = [
    {
        "Name": "first + relu",
        "LayerType": "CaskConvolution",
        "TacticName": "sm80_xmma_fprop_int8",
        "Inputs": [
            {"Name": "x", "Format/Datatype": "Channel major FP32"},
            {"Format/Datatype": "Int8 NC/32HW32"},
        ],
    },
    {"Name": "sum", "LayerType": "CumSum", "Inputs": [{"Format/Datatype": "Row major FP32"}]},
    {"Name": "Reformatting", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Row major FP32"}]},
]


class ProfiledContext(Context):
    """Reports 100 us for the first layer of a run, 200 for the second, ..."""

    profiler: Any = None

    def execute_async_v3(self, stream: int) -> bool:
        for number, layer in enumerate(self.engine.facts["layers"]):
            name = layer["Name"] if isinstance(layer, dict) else layer
            self.profiler.report_layer_time(name, 0.1 * (number + 1))
        return super().execute_async_v3(stream)


class ProfiledEngine(Engine):
    def create_execution_context(self) -> Context:
        return ProfiledContext(self)

    def create_engine_inspector(self) -> Any:
        told = json.dumps({"Layers": self.facts["layers"], "Bindings": ["x", "y"]})
        return SimpleNamespace(get_engine_information=lambda form: told)


class ProfiledTrt(Trt):
    LayerInformationFormat = SimpleNamespace(JSON="json")

    class IProfiler:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return ProfiledEngine(self, plan)


def _profiler(precision: str, layers: list[Any], **options: Any) -> EngineProfiler:
    cuda = Cuda()
    plan = json.dumps({**json.loads(FROM_1_TO_8), "layers": layers}).encode()
    artifact = Artifact(Path(), "model.onnx", "tensorrt", precision, options=options)
    found = EngineProfiler(ProfiledTrt(cuda), cuda, plan, artifact, "as given", None)
    found.set_inputs({"x": np.ones((2, 3), np.float32)})
    for _ in range(3):
        found.infer()
        found.collect()
    found.forget()
    for _ in range(2):
        found.infer()
        found.collect()
    return found


def test_layers_with_times_kernels_and_types() -> None:
    profiler = _profiler("int8", LAYERS)
    np.testing.assert_array_equal(profiler.get_outputs()["y"], np.full((2, 3), 2.0))
    placed = profiler.placed([0, 1])
    assert placed.unit == "GPU, int8 layers" and placed.notes == ()
    assert [o.time_ns for o in placed.operators] == pytest.approx([1e5, 2e5, 3e5])
    first, total, moved = placed.operators
    assert (first.kernel, first.layers, first.on_unit) == ("sm80_xmma_fprop_int8", ("first", "relu"), True)
    assert (total.operator, total.on_unit) == ("CumSum", False)
    assert total.reason == "its inputs are Row major FP32, none of them int8"
    assert moved.on_unit


def test_an_engine_without_details_tells_names_and_times() -> None:
    placed = _profiler("int8", ["first + relu", "sum"]).placed([0, 1])
    assert placed.unit == "GPU" and all(o.on_unit for o in placed.operators)
    assert "built without detailed layers" in placed.notes[0]


def test_floats_are_all_on_the_gpu_and_a_graph_is_not_launched() -> None:
    profiler = _profiler("fp16", LAYERS, cuda_graph=True)
    placed = profiler.placed([0, 1])
    assert placed.unit == "GPU" and all(o.on_unit for o in placed.operators)
    assert profiler.environment["cuda_graph"] is False
    assert "without the CUDA graph" in placed.notes[0]
