"""Patterns of keep_float: operator types, names and globs, and what is said where nothing matches."""

from __future__ import annotations

import pytest

from portcall.exporters._selection import select
from portcall.targets.agent.errors import BadInput

ONNX = [
    ("stem", "Conv"),
    ("layer.0/attention/query", "MatMul"),
    ("layer.0/attention/Softmax", "Softmax"),
    ("layer.1/attention/query", "MatMul"),
    ("odd[0]", "Add"),
    ("odd0", "Add"),
    ("head", "Gemm"),
]
TFLITE = [
    ("model.Stem;1", "CONV_2D"),
    ("model.Depth;1", "DEPTHWISE_CONV_2D"),
    ("model.Softmax;", "SOFTMAX"),
    ("output", "FULLY_CONNECTED"),
]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("stem", ["stem"]),
        (
            "*/attention/*",
            ["layer.0/attention/query", "layer.0/attention/Softmax", "layer.1/attention/query"],
        ),
        ("layer.?/attention/query", ["layer.0/attention/query", "layer.1/attention/query"]),
        ("odd[0]", ["odd[0]"]),  # a name comes before the pattern that it could be
        ("odd[01]", ["odd0"]),
        ("type:MatMul", ["layer.0/attention/query", "layer.1/attention/query"]),
        ("type:matmul", ["layer.0/attention/query", "layer.1/attention/query"]),
        ("type:FULLY_CONNECTED", ["layer.0/attention/query", "layer.1/attention/query", "head"]),
        ("type:SOFTMAX", ["layer.0/attention/Softmax"]),
        ("type:DEPTHWISE_CONV_2D", ["stem"]),
    ],
)
def test_patterns_over_onnx_nodes(pattern: str, names: list[str]) -> None:
    assert select(ONNX, [pattern]) == names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("model.Stem;1", ["model.Stem;1"]),
        ("model.*;1", ["model.Stem;1", "model.Depth;1"]),
        ("type:Conv", ["model.Stem;1", "model.Depth;1"]),
        ("type:conv_2d", ["model.Stem;1"]),
        ("type:Softmax", ["model.Softmax;"]),
        ("type:Gemm", ["output"]),
    ],
)
def test_patterns_over_tflite_operators(pattern: str, names: list[str]) -> None:
    assert select(TFLITE, [pattern]) == names


def test_names_come_once_and_in_the_order_of_the_graph() -> None:
    assert select(ONNX, ["head", "type:Gemm", "s*"]) == ["stem", "head"]
    assert select(ONNX, []) == []


@pytest.mark.parametrize(
    ("pattern", "fix"),
    [
        ("sten", "Did you mean 'stem'?"),
        ("STEM", "Did you mean 'stem'?"),
        ("*attention.query*", "'layer.0/attention/query'"),
        ("*QUERY*", "'layer.0/attention/query' or 'layer.1/attention/query'"),
        ("type:Relu", "This graph has the types: Add, Conv, Gemm, MatMul, Softmax"),
        ("zzzzzz", "Names of operators begin with: stem, layer.0/attention/query"),
        ("", "or give type:NAME"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_comes_near(pattern: str, fix: str) -> None:
    with pytest.raises(BadInput) as caught:
        select(ONNX, ["head", pattern])
    assert caught.value.message == f"keep_float {pattern!r} matches no operator of this graph"
    assert fix in caught.value.fix
