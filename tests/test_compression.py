"""A pruned model keeps its zeros: layers found across formats, planted losses named, parametrizations folded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import portcall.api
from portcall import compression
from portcall.artifact import read_manifest
from portcall.exporters import _half_weights
from portcall.exporters._coreml_weights import table_with_zero
from portcall.parametrizations import fold, training_parts
from portcall.targets.agent.contents import Contents, Weight
from portcall.targets.agent.errors import BadInput, VerificationFailed
from portcall.targets.agent.stored import Stored, weight
from tests import sparse_models

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(8)

INT8 = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "coreml", "tflite", "tflite_micro")
OTHERS = ("onnxruntime:fp16", "coreml:palette4")
LAYERS = {"stem.0": 432, "depthwise.0": 144, "pointwise.0": 256, "head": 160}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of the half pruned network, its masks still on, by cell."""
    cells = [*(f"{b}:int8" for b in INT8), *OTHERS]
    return _exported("pruned", cells, tmp_path_factory.mktemp("pruned model"))


def _exported(factory: str, cells: Sequence[str], output: Path) -> dict[str, dict[str, Any]]:
    answer = portcall.api.export(
        f"tests.sparse_models:{factory}", cells, output, data="tests.sparse_models:few"
    )
    return {f"{r['backend']}:{r['precision']}": r for r in answer["results"]}


def _artifact(results: dict[str, dict[str, Any]], cell: str) -> dict[str, Any]:
    result = results[cell]
    if result["outcome"] == "unavailable":
        pytest.skip(f"{cell} is unavailable here: {result['reason']}; fix: {result['fix']}")
    assert result["outcome"] == "artifact", result["reason"]
    return result


@pytest.mark.parametrize("cell", [*(f"{b}:int8" for b in INT8), *OTHERS])
def test_the_zeros_of_masks_survive(pruned: dict[str, dict[str, Any]], cell: str) -> None:
    result = _artifact(pruned, cell)
    found = result["compression"]
    assert found == read_manifest(Path(result["path"]))["compression"]
    assert found["compared_layers"] == found["pruned_layers"] == 4 and not found["unmatched"]
    share = found["zero_fraction"]
    assert share["before"] == pytest.approx(0.5, abs=0.001) and share["after"] >= share["before"]
    assert not any(e["lost"] or e["failed"] for e in found["layers"])
    assert found["quantize_nodes"]["before"] == 0
    assert (found["quantize_nodes"]["after"] > 0) == cell.endswith(":int8")
    [note] = [n for n in result["notes"] if n.startswith("folded")]
    assert note.startswith("folded torch.nn.utils.prune of stem.0.weight, depthwise.0.weight")


def test_two_of_four_stays(tmp_path: Path) -> None:
    cells = ["onnxruntime:int8"]
    results = _exported("two_of_four", cells, tmp_path)
    for cell in cells:
        result = _artifact(results, cell)
        found = portcall.api.inspect(result["path"])["layers"]
        patterns = {(layer["elements"], layer["pattern"]) for layer in found}
        assert {(256, "2:4"), (160, "2:4")} <= patterns
        assert result["compression"]["pruned_layers"] == 2


def test_weight_norm_of_both_kinds_is_folded_and_said(tmp_path: Path) -> None:
    result = _artifact(_exported("normed", ["onnxruntime:fp32"], tmp_path), "onnxruntime:fp32")
    assert result["parity"]["sqnr_db"] > 100, "the reference ran it unfolded"
    assert "folded weight_norm of head.weight into plain weights" in result["notes"]
    assert "folded parametrization WeightNorm of stem.0.weight into plain weights" in result["notes"]
    manifest = read_manifest(Path(result["path"]))
    assert manifest["notes"] == result["notes"] and manifest["compression"]["pruned_layers"] == 0


def test_parts_in_training_mode_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"parts in training mode: stem\.1 \(BatchNorm2d\)") as caught:
        portcall.api.export("tests.sparse_models:partly_training", "onnxruntime:fp32", tmp_path)
    assert "model.eval()" in caught.value.fix


# planted losses, from end to end

LOSSY = '''
"""A converter that undoes pruning: it changes the weight of one node before the real backend exports."""
import dataclasses, os
from portcall.exporters import onnxruntime

def export(graph, recipe, ranges, directory):
    import numpy as np, onnx
    from onnx import numpy_helper
    from portcall.exporters._operands import weighted_nodes
    kind, number = os.environ["LOSS"].split()
    model = onnx.load(str(graph.path))
    _, tensor = list(weighted_nodes(model.graph))[int(number)]
    values = numpy_helper.to_array(tensor).copy()
    zeros = np.flatnonzero(values == 0)
    chosen = zeros[:1] if kind == "zero" else zeros
    values.reshape(-1)[chosen] = np.abs(values).max() / 2
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = directory / "spoilt.onnx"
    onnx.save(model, str(path))
    done = onnxruntime.export(dataclasses.replace(graph, path=path), recipe, ranges, directory)
    path.unlink()
    return done

BACKEND = dataclasses.replace(onnxruntime.BACKEND, name="lossy", export=export)
'''


@pytest.mark.parametrize(
    ("kind", "number", "layer"), [("zero", 1, "depthwise.0"), ("mask", 2, "pointwise.0")]
)
def test_a_converter_that_undoes_pruning_fails_the_export_with_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int, layer: str
) -> None:
    (tmp_path / "lossy.py").write_text(LOSSY)
    monkeypatch.setattr("portcall.exporters.__path__", [*portcall.exporters.__path__, str(tmp_path)])
    monkeypatch.setenv("LOSS", f"{kind} {number}")
    [result] = portcall.api.export("tests.sparse_models:pruned", "lossy:fp32", tmp_path / "out")["results"]
    assert (result["outcome"], result["error_kind"]) == ("failed", "verification")
    turned = 1 if kind == "zero" else LAYERS[layer] // 2
    assert f"layer {layer!r} had {LAYERS[layer] // 2} zeros of {LAYERS[layer]}" in result["reason"]
    assert f"{turned} turned non-zero" in result["reason"]
    assert result["reason"].count("layer '") == 1 and "keep-float" in result["fix"]
    assert not (tmp_path / "out" / "lossy-fp32").exists()


# which layer is which


def _layer(name: str, signs: Array, operator: str = "Conv") -> Weight:
    stored = Stored(name, tuple(signs.shape), "float32", 32, signs)
    return weight(name, operator, stored, signs, (0, 1))


def _random(*shape: int, zeros: float = 0.5) -> Array:
    signs = RNG.choice(np.array([-1, 1], np.int8), shape)
    signs[RNG.random(shape) < zeros] = 0
    return signs


def _contents(weights: Sequence[Weight], quantize_nodes: int = 0) -> Contents:
    return Contents("test", (), (), tuple(weights), {}, quantize_nodes, 0, 0, None)


def _names(pairs: Sequence[compression.Pair]) -> dict[str, str]:
    return {p.after.name: p.before.name for p in pairs}


def test_layers_of_one_shape_are_found_in_any_order() -> None:
    before = [_layer(f"layer{i}", _random(16, 8, 3, 3, zeros=0.9)) for i in range(12)]
    shuffled = RNG.permutation(12)
    after = [_layer(f"other{i}", before[i].signs) for i in shuffled]
    assert _names(compression.match(before, after)) == {f"other{i}": f"layer{i}" for i in range(12)}


def test_channels_turned_by_batch_normalization_are_the_same_layer() -> None:
    before = [_layer(f"layer{i}", _random(16, 8, 3, 3)) for i in range(4)]
    turn = RNG.choice(np.array([-1, 1], np.int8), (16, 1, 1, 1))
    after = [_layer(f"other{i}", before[i].signs * turn) for i in (2, 0, 3, 1)]
    pairs = compression.match(before, after)
    assert _names(pairs) == {f"other{i}": f"layer{i}" for i in range(4)}
    assert {p.how for p in pairs} == {"signs"}


def test_a_densified_layer_is_still_found() -> None:
    before = [_layer(f"layer{i}", _random(8, 8, 3, 3)) for i in range(6)]
    dense = before[4].signs.copy()
    dense[dense == 0] = 1
    after = [_layer(f"other{i}", dense if i == 4 else before[i].signs) for i in (4, 5, 0, 1, 2, 3)]
    assert _names(compression.match(before, after))["other4"] == "layer4"
    [entry] = compression.compare(_contents(before), _contents(after))["layers"]
    assert entry["layer"] == "layer4" and entry["failed"]
    assert entry["lost"] == entry["zeros"]["before"] and entry["zeros"]["after"] == 0


def test_layers_that_signs_cannot_tell_apart_are_taken_in_order() -> None:
    """A depthwise 1x1 convolution has one weight per channel: a turned channel tells nothing."""
    before = [_layer(f"layer{i}", _random(8, 1, zeros=0)) for i in range(3)]
    after = [_layer(f"other{i}", -w.signs) for i, w in enumerate(before)]
    assert _names(compression.match(before, after)) == {f"other{i}": f"layer{i}" for i in range(3)}


def test_kernels_of_one_and_matrices_have_one_key() -> None:
    signs = _random(6, 4)
    pairs = compression.match([_layer("conv", signs[:, :, None, None])], [_layer("linear", signs)])
    assert [p.how for p in pairs] == ["signs"]


def test_an_artifact_that_holds_a_layer_twice_is_held_to_both() -> None:
    signs = _random(16, 16)
    lost = signs.copy()
    lost[np.unravel_index(np.flatnonzero(signs == 0)[0], signs.shape)] = 1
    found = compression.compare(
        _contents([_layer("shared", signs)]), _contents([_layer("first", signs), _layer("second", lost)])
    )
    assert found["compared_layers"] == 2
    assert [(e["artifact_layer"], e["lost"]) for e in found["layers"]] == [("second", 1)]


def test_ten_of_each_loss_are_named_and_no_more() -> None:
    before = [_layer(f"layer{i}", _random(16, 16, 3, 3)) for i in range(10)]
    for number, chosen in enumerate(before):
        for most in (1, chosen.elements):
            signs = chosen.signs.copy()
            places = np.flatnonzero(signs == 0)[:most]
            signs.reshape(-1)[places] = 1
            after = [_layer(f"x{i}", signs if i == number else w.signs) for i, w in enumerate(before)]
            found = compression.compare(_contents(before), _contents(after))
            with pytest.raises(VerificationFailed, match=f"layer 'layer{number}' had ") as caught:
                compression.check_kept("backend:int8", found)
            assert caught.value.message.count("layer 'layer") == 1


def test_more_zeros_are_reported_and_no_failure() -> None:
    signs = _random(16, 16)
    rounded = signs.copy()
    rounded.reshape(-1)[np.flatnonzero(signs)[:5]] = 0
    found = compression.compare(_contents([_layer("a", signs)]), _contents([_layer("b", rounded)], 7))
    [entry] = found["layers"]
    assert entry["lost"] == 0 and entry["zeros"]["after"] == entry["zeros"]["before"] + 5
    assert found["quantize_nodes"] == {"before": 0, "after": 7}
    compression.check_kept("backend:int8", found)


def test_a_few_zeros_of_a_dense_layer_are_nobodys_pruning() -> None:
    signs = np.ones((20, 20), np.int8)
    signs[3, 4] = 0
    found = compression.compare(
        _contents([_layer("a", signs)]), _contents([_layer("b", np.ones_like(signs))])
    )
    assert found["pruned_layers"] == 0 and found["layers"][0]["lost"] == 1
    compression.check_kept("backend:int8", found)


def test_a_pruned_layer_that_is_not_found_is_told() -> None:
    found = compression.compare(_contents([_layer("gone", _random(8, 8))]), _contents([]))
    assert found["unmatched"] == ["gone"] and found["zero_fraction"] == {"before": None, "after": None}
    [note] = compression.notes(found)
    assert note.endswith("could not be followed into the artifact: gone")


def test_where_signs_do_not_agree_numbers_are_compared() -> None:
    """The gates of an LSTM change places between formats."""
    signs = _random(32, 32)
    moved = np.roll(signs, 8, axis=0)
    [pair] = compression.match([_layer("a", signs)], [_layer("b", moved)])
    assert pair.how == "order"
    found = compression.compare(_contents([_layer("a", signs)]), _contents([_layer("b", moved)]))
    assert found["layers"] == []
    moved[moved == 0] = 1
    found = compression.compare(_contents([_layer("a", signs)]), _contents([_layer("b", moved)]))
    assert found["layers"][0]["failed"] and found["layers"][0]["matched_by"] == "order"


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    weights = [
        _layer("a", _random(5, 3, 3)),
        _layer("b", np.zeros((4, 4), np.int8)),
        _layer("c", _random(1, 7)),
    ]
    before = _contents(weights, 3)
    compression.store(before, tmp_path / "with spaces")
    after = compression.load(tmp_path / "with spaces")
    assert after.weights == before.weights and after.quantize_nodes == 3
    for one, other in zip(before.weights, after.weights, strict=True):
        np.testing.assert_array_equal(one.signs, other.signs)


# exporters that used to lose zeros


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_to_half_leaves_zeros_alone(precision: str) -> None:
    """To keep the sum of a channel some roundings go the other way: from 0 that was the cheapest of all."""
    values = RNG.standard_normal((32, 400)).astype(np.float32)
    values[RNG.random(values.shape) < 0.9] = 0
    rounded = np.asarray(_half_weights.rounded(values, precision, 0), np.float32)
    assert np.all(rounded[values == 0] == 0)
    assert np.abs((rounded - values).sum(1)).max() < np.abs(values).max() / 100


def test_a_palette_of_a_pruned_layer_holds_zero() -> None:
    pytest.importorskip("coremltools", reason="needs coremltools; fix: pip install 'portcall[coreml]'")
    values = RNG.standard_normal((64, 64)).astype(np.float32) / 100
    values[RNG.random(values.shape) < 0.3] = 0
    table, indices = table_with_zero(values, 4)
    assert table.size == 16 and indices.dtype == np.uint8 and indices.size == values.size
    found = table[indices].reshape(values.shape)
    assert np.all(found[values == 0] == 0)
    assert np.square(found - values).sum() < 0.02 * np.square(values).sum()
    dense = RNG.standard_normal((64, 64)).astype(np.float32)
    assert np.all(table_with_zero(dense, 4)[0] != 0)


def test_without_zeros_pinned_the_palette_loses_them() -> None:
    """The converse: what the table would be without our function."""
    pytest.importorskip("coremltools", reason="needs coremltools; fix: pip install 'portcall[coreml]'")
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    values = RNG.standard_normal((64, 64)).astype(np.float32)
    values[RNG.random(values.shape) < 0.3] = 0
    table, indices = palettize_weights._get_lut_and_indices(values, "KMEANS", 4, None)
    assert np.any(table[indices].reshape(values.shape)[values == 0] != 0)


# parametrizations


def test_folding_leaves_the_given_module_alone() -> None:
    module: Any = sparse_models.pruned()[0]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = module(x)
        folded: Any
        folded, notes = fold(module)
        np.testing.assert_array_equal(folded(x), before)
        np.testing.assert_array_equal(module(x), before)
    assert len(notes) == 1 and "weight_mask" in dict(module.stem[0].named_buffers())
    assert not list(folded.stem[0].named_buffers()) and isinstance(folded.head.weight, nn.Parameter)
    assert sparse_models.zeros_of(folded) == {n: c // 2 for n, c in LAYERS.items()}


def test_a_plain_module_is_not_copied() -> None:
    module = nn.Linear(3, 3).eval()
    assert fold(module) == (module, ())


def test_folds_spectral_norm_of_both_kinds() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.spectral_norm(module[0])
    nn.utils.spectral_norm(module[1])
    module.eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        folded, notes = fold(module)
        np.testing.assert_allclose(folded(x), module(x), rtol=1e-6)
    assert sorted(notes) == [
        "folded parametrization SpectralNorm of 0.weight into plain weights",
        "folded spectral_norm of 1.weight into plain weights",
    ]


def test_names_the_parts_in_training_mode() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    assert training_parts(module) == []
    module[1].train()
    assert training_parts(module) == ["1 (Dropout)"]


def test_a_pt2_with_its_masks_on_is_read_as_it_computes(tmp_path: Path) -> None:
    from portcall.exporters._contents_torch import read
    from portcall.source_torch import open_torch

    module, args, _ = sparse_models.pruned()
    path = tmp_path / "masked.pt2"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch does not like that masking assigns the weight
        torch.export.save(torch.export.export(module, args), path)
    found = read(open_torch(str(path), "pt2", tmp_path))
    assert {w.name: w.zeros for w in found.weights} == {n: c // 2 for n, c in LAYERS.items()}


def test_the_source_of_an_onnx_model_is_its_file(tmp_path: Path, tiny_onnx: Path, tiny_data: Path) -> None:
    model = onnx.load(tiny_onnx)
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            values = numpy_helper.to_array(tensor).copy()
            values[::2] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, "w2"))
    path = tmp_path / "pruned channels.onnx"
    onnx.save(model, path)
    [result] = portcall.api.export(path, "onnxruntime:int8", tmp_path / "out", data=tiny_data)["results"]
    assert result["outcome"] == "artifact", result["reason"]
    assert result["compression"]["pruned_layers"] == 1
    found = {w["name"]: w for w in portcall.api.inspect(path)["layers"]}
    assert (found["second"]["pattern"], found["second"]["zero_outputs"]) == ("channels", 8)
