"""TensorRT's calibration cache and AIMET's encodings: the formats, and the same scales as in the Q/DQ files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from portcall.exporters import _encodings, _qdq, _qdq_symmetric
from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import BadInput, UnsupportedError
from tests.exporters.graphs import conv_add_mul, graph_of


def symmetric(limit: float) -> Range:
    return Range(-limit, limit, True)


def written(path: Path) -> dict[str, tuple[float, int]]:
    """Return the scale and zero point of every activation that an ONNX file quantizes."""
    graph = onnx.load(str(path)).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {
        node.input[0].removesuffix("_QuantizeLinear_Input"): (
            float(constants[node.input[1]]),
            int(constants[node.input[2]]),
        )
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    }


def random_ranges(seed: int) -> dict[str, tuple[float, float]]:
    """Return ends of many magnitudes, one-sided and two-sided, for the tensors of conv_add_mul."""
    rng = np.random.default_rng(seed)
    ends = {}
    for name in ("x", "c", "r", "x2", "s", "y"):
        size = 10.0 ** rng.uniform(-6, 3)
        low, high = -size * rng.uniform(0, 1), size * rng.uniform(0, 1)
        ends[name] = [(low, high), (0.0, high), (low, 0.0)][rng.integers(3)]
    return ends


# the calibration cache

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_RANGES = {
    "images": symmetric(2.640625),
    "/features/conv1/Conv_output_0": symmetric(17.25),
    "onnx::Add_42": symmetric(0.0078125),
    "mask": symmetric(1e9),
    "logits": symmetric(31.5),
}

CACHE = """TRT-100300-EntropyCalibration2
x: 3c010204
/model.0/act/Mul_output_0: 3e6c9314
(Unnamed Layer* 4) [Fully Connected]_output: 3d65992f
scope: block: 1: 3f800000
silent: 3f800000
tiny: 295b968
"""
"""Lines as TensorRT prints them: the bits of 1 / 127, of scales from caches that it wrote, of a tensor of zeros, and
of a scale whose bits begin with a zero, which is not printed."""


def test_cache_is_what_tensorrt_writes() -> None:
    ranges = {
        "x": symmetric(1.0),
        "/model.0/act/Mul_output_0": symmetric(127 * 0.23102980852127075),
        "(Unnamed Layer* 4) [Fully Connected]_output": symmetric(127 * 0.056054290384054184),
        "scope: block: 1": symmetric(127.0),
        "silent": symmetric(0.0),
        "tiny": symmetric(127 * 2.2e-37),
    }
    assert _encodings.tensorrt_cache(ranges) == CACHE


def test_cache_round_trips() -> None:
    scales = _encodings.read_tensorrt_cache(CACHE)
    assert list(scales) == [line.rpartition(": ")[0] for line in CACHE.splitlines()[1:]]
    assert scales["x"] == np.float32(1 / 127) and scales["scope: block: 1"] == 1.0
    again = _encodings.tensorrt_cache({k: symmetric(v * 127) for k, v in scales.items()})
    assert _encodings.read_tensorrt_cache(again) == pytest.approx(scales, rel=1e-6)


def test_cache_of_another_version() -> None:
    text = _encodings.tensorrt_cache({"x": symmetric(1.0)}, "8.6.1")
    assert text == "TRT-8601-EntropyCalibration2\nx: 3c010204\n"


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("7.2.2", 7202),
        ("8.5.10", 8510),
        ("8.6.1.6", 8601),
        ("9.2.0", 9200),
        ("10.3.0", 100300),
        ("10.13", 101300),
    ],
)
def test_first_lines_are_the_version_numbers_of_tensorrts_header(version: str, number: int) -> None:
    assert _encodings.cache_header(version) == f"TRT-{number}-EntropyCalibration2"


def test_tensorrt_11_has_no_cache() -> None:
    with pytest.raises(UnsupportedError, match=r"TensorRT 11\.0\.0 reads no calibration cache") as caught:
        _encodings.tensorrt_cache({"x": symmetric(1.0)}, "11.0.0")
    assert caught.value.fix
    for text in ("10", "10.x", "TRT-8601-EntropyCalibration2", ""):
        with pytest.raises(BadInput, match="is no version of TensorRT"):
            _encodings.cache_header(text)


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_golden_caches(version: str) -> None:
    """Rewrite them, where the format is meant to change, with PYTHONPATH=. python tests/exporters/test_encodings.py"""
    golden = (GOLDEN / f"calibration-{version}.cache").read_text()
    assert _encodings.tensorrt_cache(GOLDEN_RANGES, version) == golden
    scales = _encodings.read_tensorrt_cache(golden)
    assert scales == {k: float(np.float32(r.maximum / 127)) for k, r in GOLDEN_RANGES.items() if k != "mask"}


def test_cache_takes_the_larger_side_and_leaves_sentinels_out() -> None:
    ranges = {"a": Range(-3.0, 1.0), "b": Range(0.0, 3.0), "mask": Range(-1e9, 0.0)}
    scales = _encodings.read_tensorrt_cache(_encodings.tensorrt_cache(ranges))
    assert scales == {"a": np.float32(3 / 127), "b": np.float32(3 / 127)}


def test_a_name_that_breaks_its_line_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'a\\nb' breaks its line"):
        _encodings.tensorrt_cache({"a\nb": symmetric(1.0)})


@pytest.mark.parametrize("line", ["x 3c010204", "x: ", "x: 3c010a1g", "x: 13c010204", "3c010204"])
def test_other_text_is_no_cache(line: str) -> None:
    with pytest.raises(BadInput, match="not a line of a TensorRT calibration cache") as caught:
        _encodings.read_tensorrt_cache(f"TRT-8601-EntropyCalibration2\n{line}\n")
    assert repr(line) in caught.value.message
    with pytest.raises(BadInput, match=r"it begins with 'data 2\.0'"):
        _encodings.read_tensorrt_cache("data 2.0\n")


# the same scales everywhere


@pytest.mark.parametrize("seed", range(10))
def test_cache_and_symmetric_qdq_have_the_same_scales(seed: int, tmp_path: Path) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    ranges = {k: symmetric(max(-low, high)) for k, (low, high) in random_ranges(seed).items()}
    _qdq_symmetric.quantize(graph, ranges, tmp_path / "q.onnx", {})
    found = written(tmp_path / "q.onnx")
    cache = _encodings.read_tensorrt_cache(_encodings.tensorrt_cache(ranges))
    encodings = _encodings.qnn_encodings(ranges)["activation_encodings"]
    assert set(found) == {"x"}
    for name, (scale, zero_point) in found.items():
        assert (scale, zero_point) == (cache[name], 0)
        assert encodings[name][0]["scale"] == scale


@pytest.mark.parametrize("seed", range(10))
def test_encodings_and_asymmetric_qdq_have_the_same_scales(seed: int, tmp_path: Path) -> None:
    graph = graph_of(conv_add_mul(tmp_path / "m.onnx"))
    ranges = {k: Range(low, high) for k, (low, high) in random_ranges(seed).items()}
    _qdq.quantize(graph, ranges, tmp_path / "q.onnx")
    found = written(tmp_path / "q.onnx")
    encodings = _encodings.qnn_encodings(ranges)["activation_encodings"]
    assert set(found) == set(ranges) - {"c"}
    for name, (scale, zero_point) in found.items():
        assert (encodings[name][0]["scale"], -encodings[name][0]["offset"]) == (scale, zero_point), name


def test_a_tensor_of_zeros_has_the_scale_of_the_qdq_files() -> None:
    assert _encodings.symmetric_scale(Range(0.0, 0.0)) == 1.0
    assert _encodings.asymmetric_scale(Range(0.0, 0.0)) == (1.0, 0)


# encodings

RANGES = {"image: 0": Range(-1.0, 1.55), "hidden": symmetric(6.35), "mask": Range(-1e9, 0.0)}
WEIGHTS = {"w": (np.array([0.25, 0.5], np.float32), 0)}


def test_encodings_0_6_1() -> None:
    found = _encodings.qnn_encodings(RANGES, WEIGHTS)
    scale, hidden = float(np.float32(0.01)), float(np.float32(0.05))
    common = {"bitwidth": 8, "dtype": "int"}

    def entry(is_symmetric: str, scale: float, offset: int) -> dict[str, Any]:
        limits = {"min": scale * offset, "max": scale * (255 + offset)}
        return {**common, "is_symmetric": is_symmetric, **limits, "scale": scale, "offset": offset}

    assert found == {
        "version": "0.6.1",
        "activation_encodings": {
            "image: 0": [entry("False", scale, -100)],
            "hidden": [entry("True", hidden, -128)],
        },
        "param_encodings": {"w": [entry("True", 0.25, -128), entry("True", 0.5, -128)]},
    }
    assert json.loads(json.dumps(found)) == found


def test_encodings_1_0_0() -> None:
    found = _encodings.qnn_encodings(RANGES, WEIGHTS, "1.0.0")
    old = _encodings.qnn_encodings(RANGES, WEIGHTS)["activation_encodings"]
    scales = {name: [entries[0]["scale"]] for name, entries in old.items()}
    tensor = {"enc_type": "PER_TENSOR", "dtype": "INT", "bw": 8}
    assert found == {
        "version": "1.0.0",
        "activation_encodings": [
            {"name": "image: 0", **tensor, "is_sym": False, "scale": scales["image: 0"], "offset": [-100]},
            {"name": "hidden", **tensor, "is_sym": True, "scale": scales["hidden"], "offset": [-128]},
        ],
        "param_encodings": [
            {
                "name": "w",
                "enc_type": "PER_CHANNEL",
                "dtype": "INT",
                "bw": 8,
                "is_sym": True,
                "scale": [0.25, 0.5],
                "offset": [-128, -128],
            }
        ],
    }
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("seed", range(10))
def test_encoded_limits_are_the_grid_and_hold_the_range(seed: int) -> None:
    ends = random_ranges(seed)
    ranges = {k: Range(low, high) for k, (low, high) in ends.items()}
    for name, [entry] in _encodings.qnn_encodings(ranges)["activation_encodings"].items():
        low, high = ends[name]
        assert entry["min"] == entry["scale"] * entry["offset"] <= 0 <= entry["max"]
        assert abs(entry["min"] - low) <= 0.5001 * entry["scale"]
        assert abs(entry["max"] - high) <= 0.5001 * entry["scale"]


def test_without_weights_there_are_no_parameters() -> None:
    parameters: Mapping[str, Any] = {
        v: _encodings.qnn_encodings(RANGES, version=v) for v in ("0.6.1", "1.0.0")
    }
    assert parameters["0.6.1"]["param_encodings"] == {}
    assert parameters["1.0.0"]["param_encodings"] == []


def test_other_versions_are_refused() -> None:
    with pytest.raises(BadInput, match=r"no encodings version '2\.0\.0'; there are: 0\.6\.1, 1\.0\.0"):
        _encodings.qnn_encodings(RANGES, version="2.0.0")


if __name__ == "__main__":
    for version in ("8.6.1", "10.3.0"):
        (GOLDEN / f"calibration-{version}.cache").write_text(
            _encodings.tensorrt_cache(GOLDEN_RANGES, version)
        )
