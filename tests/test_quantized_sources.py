"""Quantization-aware trained models from end to end: exported without data, with their scales, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import portcall.api
from portcall.core import BadInput
from portcall.targets.agent.errors import UnsupportedError

pytest.importorskip("sklearn", reason="no scikit-learn here: pip install scikit-learn")
pytest.importorskip("torchao", reason="no torchao here: pip install torchao")

from benchmarks import quantized_networks, quantized_sources  # after what they need is known to be there

CELLS = ["onnxruntime:int8", "tflite:int8", "executorch:int8"]
pytestmark = pytest.mark.filterwarnings(  # torch.ao and torchao warn of their own age
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:Please use quant_min:UserWarning",
    "ignore:.*preserve_all_tensors:UserWarning",  # of ai-edge-quantizer's own interpreter
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three networks that were trained for a few steps: what is tested is what becomes of their scales."""
    place = tmp_path_factory.mktemp("quantized networks")
    quantized_networks.write(place, steps=30)
    with np.load(place / "evaluation.npz") as stored:
        few: dict[str, Any] = {name: stored[name][:16] for name in stored.files}
    np.savez(place / "few.npz", **few)
    return place


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv(quantized_networks.FOLDER, str(folder))
    return quantized_networks.sources(folder)


@pytest.mark.parametrize("name", ["pt2e", "fx", "onnx"])
def test_trained_scales_are_exported_without_data(
    name: str, models: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    answer = portcall.api.export(models[name], CELLS, tmp_path / "out", evaluation=folder / "evaluation.npz")
    for result in answer["results"]:
        assert result["outcome"] == "artifact", result["reason"]
        trained = result["trained"]
        assert trained["weights"] == 5 and trained["activations"] >= 7
        assert trained["kept"] == trained["weights"] + trained["activations"] - len(trained["changed"])
        assert all(c["used"] is None for c in trained["changed"]), trained["changed"]
        assert result["parity"]["sqnr_db"] > 25 and result["parity"]["samples"] == "eval"
        manifest = json.loads((Path(result["path"]) / "manifest.json").read_text())
        assert manifest["trained"] == trained and manifest["calibration"] is None
        assert result["arithmetic"]["integer_macs_share"] == 1.0


@pytest.mark.parametrize("name", ["pt2e", "fx", "onnx"])
def test_a_context_binary_is_built_with_the_trained_scales(
    name: str, models: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    answer = portcall.api.export(models[name], "qnn:int8", tmp_path / "out", evaluation=folder / "few.npz")
    [result] = answer["results"]
    if result["outcome"] == "unavailable":
        pytest.skip(f"qnn: {result['reason']}; fix: {result['fix']}")
    assert result["outcome"] == "artifact", result["reason"]
    assert result["trained"]["changed"] == [] and result["parity"]["sqnr_db"] > 25
    assert sum("holds the whole graph" in note for note in result["notes"]) == 2
    assert not any("not checked" in note for note in result["notes"])


def test_the_saved_weights_are_the_trained_integers(models: dict[str, str], tmp_path: Path) -> None:
    import onnx

    portcall.api.export(models["pt2e"], "onnxruntime:int8", tmp_path / "out")
    saved = onnx.load(str(tmp_path / "out" / "onnxruntime-int8" / "model.onnx"))
    arrays = [onnx.numpy_helper.to_array(t) for t in saved.graph.initializer]
    from portcall.source_torch import load_program

    state = load_program(Path(models["pt2e"])).state_dict
    integers = [v.numpy() for v in state.values() if v.dtype == torch.int8 and v.ndim > 1]
    assert len(integers) == 5
    for wanted in integers:
        assert any(a.dtype == np.int8 and np.array_equal(a, wanted) for a in arrays)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "entropy"}, "--method entropy"),
        ({"equalize": True}, "--equalize"),
        ({"bias_correction": True}, "--bias-correction"),
        ({"weights": "tensor"}, "--weights"),
        ({"keep_float": ["stem"]}, "--keep-float"),
    ],
)
def test_options_that_choose_scales_are_refused(
    options: dict[str, Any], named: str, models: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"quantized already.*{named} would change"):
        portcall.api.export(models["onnx"], CELLS[0], tmp_path / "out", **options)


def test_precisions_that_drop_the_training_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    cells = ["onnxruntime:fp32", "onnxruntime:int8-dynamic", "tflite:int16x8"]
    for result in portcall.api.export(models["onnx"], cells, tmp_path / "out")["results"]:
        assert result["outcome"] == "unsupported"
        assert "is quantized: " in result["reason"] and "int8, or give the float model" in result["fix"]


def test_a_prepared_model_is_refused_with_the_fix() -> None:
    from portcall.source_fx import refuse_unconverted

    model = quantized_networks.fx_prepared(quantized_networks.Network())
    with pytest.raises(BadInput, match=r"still observes: .* was not converted") as caught:
        refuse_unconverted(model, "m:f")
    assert "convert_fx" in caught.value.fix and "convert_pt2e" in caught.value.fix


@pytest.mark.parametrize("form", ["convert_fx", "convert_to_reference_fx"])
def test_converted_graphs_become_traceable_with_the_same_values(form: str, folder: Path) -> None:
    from torch.ao.quantization import quantize_fx

    from portcall.source_fx import traceable

    model = quantized_networks.fx_prepared(quantized_networks.Network())
    model(*quantized_networks.examples())
    model.load_state_dict(torch.load(folder / "fx.pt"))
    converted = getattr(quantize_fx, form)(model.eval())
    images = torch.from_numpy(quantized_networks.digits()[0][:50])
    floats = traceable(converted, quantized_networks.examples(), {}, "m:f")
    wanted, found = converted(images), floats(images)
    step = (wanted.unique().diff()).min()  # packed kernels round sums in another way: a step here and there
    assert (wanted != found).float().mean() < 0.2 and (wanted - found).abs().max() < 8 * step + 1e-6
    exported = torch.export.export(floats, quantized_networks.examples())
    assert any("quantize_per_tensor" in str(n.target) for n in exported.graph.nodes)


def test_dynamically_quantized_layers_are_refused_by_name() -> None:
    from torch.ao.quantization import quantize_dynamic

    from portcall.source_fx import traceable

    layers = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = quantize_dynamic(layers)  # type: ignore[no-untyped-call]  # torch.ao does not type it
    with pytest.raises(UnsupportedError, match="layer '0'"):
        traceable(model, (torch.zeros(1, 4),), {}, "m:f")


def test_ranges_that_no_scale_tells_are_asked_for_and_calibrated(tmp_path: Path) -> None:
    """x -> pair -> Gemm (int8 weight) -> output without a pair: LiteRT needs a range of the output."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "s": np.float32(0.03),
        "z": np.uint8(128),
        "w": rng.integers(-127, 128, (5, 6)).astype(np.int8),
        "sw": rng.uniform(0.01, 0.02, 5).astype(np.float32),
        "zw": np.zeros(5, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], "dw", axis=0),
        helper.make_node("Gemm", ["d", "wd"], ["y"], "product", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )
    path = tmp_path / "half.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    with pytest.raises(BadInput, match="LiteRT needs a scale for every tensor, and 1 have no trained one"):
        portcall.api.export(path, "tflite:int8", tmp_path / "out")
    data = tmp_path / "data.npz"
    np.savez(data, x=rng.uniform(-3, 3, (20, 1, 6)).astype(np.float32))
    [result] = portcall.api.export(path, "tflite:int8", tmp_path / "out", data=data)["results"]
    assert result["outcome"] == "artifact", result["reason"]
    assert result["trained"]["kept"] == 2 and result["parity"]["sqnr_db"] > 30


def test_planted_recalibration_is_named_by_layer(folder: Path, models: dict[str, str]) -> None:
    planted = quantized_sources.plant(folder, 10)
    assert len(planted) == 10 and {p["backend"] for p in planted} == {"onnxruntime", "tflite"}
    assert all(p["named"] for p in planted), [p for p in planted if not p["named"]]


def test_the_paired_standard_error_is_that_of_mcnemars_counts() -> None:
    source = np.array([True] * 90 + [False] * 10)
    artifact = source.copy()
    artifact[:3] = False
    artifact[95:96] = True
    found = quantized_sources.paired(source, artifact)
    differences = artifact.astype(float) - source
    assert found["difference_points"] == pytest.approx(100 * differences.mean())
    assert found["standard_error_points"] == pytest.approx(100 * differences.std() / 10)
