"""The canonical ONNX graph: what is folded, how it is saved, and how its arithmetic is counted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from portcall.exporters import _onnx
from tests.exporters.graphs import Array, conv_add_mul, source_of, write_onnx


def run(path: Path, **inputs: Array) -> list[Array]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, inputs)
    return found


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


# The brute-force count: without padding, cropping or bias, a product of ones sums up to its multiply-accumulates.
COUNTED: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "conv": ("Conv", {}, (2, 3, 9, 8), (5, 3, 3, 2)),
    "conv, groups": ("Conv", {"group": 4, "strides": [2, 1]}, (1, 8, 7, 7), (12, 2, 3, 3)),
    "conv, depthwise": ("Conv", {"group": 6}, (1, 6, 5, 5), (6, 1, 3, 3)),
    "conv, dilated": ("Conv", {"dilations": [2, 2]}, (1, 2, 9, 9), (3, 2, 3, 3)),
    "conv, 1-D": ("Conv", {}, (2, 3, 9), (4, 3, 4)),
    "conv, 3-D": ("Conv", {}, (1, 2, 4, 5, 6), (3, 2, 2, 2, 2)),
    "transposed conv": ("ConvTranspose", {"strides": [2, 2]}, (2, 4, 5, 5), (4, 6, 3, 3)),
    "transposed conv, groups": ("ConvTranspose", {"group": 2}, (1, 4, 5, 5), (4, 3, 2, 2)),
    "gemm": ("Gemm", {}, (3, 5), (5, 7)),
    "gemm, transA": ("Gemm", {"transA": 1}, (5, 3), (5, 7)),
    "gemm, transB": ("Gemm", {"transB": 1}, (3, 5), (7, 5)),
    "gemm, both": ("Gemm", {"transA": 1, "transB": 1}, (5, 3), (7, 5)),
    "matmul": ("MatMul", {}, (3, 5), (5, 7)),
    "matmul, batched left": ("MatMul", {}, (2, 4, 3, 5), (5, 7)),
    "matmul, batched both": ("MatMul", {}, (2, 4, 3, 5), (2, 4, 5, 7)),
    "matmul, broadcast": ("MatMul", {}, (2, 1, 3, 5), (4, 5, 7)),
    "matmul, vector": ("MatMul", {}, (5,), (5, 7)),
    "matmul, by vector": ("MatMul", {}, (3, 5), (5,)),
}


@pytest.mark.parametrize("constant", [True, False], ids=["weights", "activations"])
@pytest.mark.parametrize("case", COUNTED)
def test_census_equals_a_brute_force_count(tmp_path: Path, case: str, constant: bool) -> None:
    op, attributes, left, right = COUNTED[case]
    node = helper.make_node(op, ["x", "w"], ["y"], "product", **attributes)
    inputs = {"x": left} if constant else {"x": left, "w": right}
    weights = {"w": ones(*right)} if constant else {}
    path = write_onnx(tmp_path / "m.onnx", [node], inputs, {"y": None}, weights)
    feeds = {k: ones(*s) for k, s in inputs.items()}
    macs = int(run(path, **feeds)[0].sum())
    found = _onnx.census(path, dict(inputs))
    assert (found.macs, found.integer_macs, found.float_nodes) == (macs, 0, ("product",))
    assert found.quantize_nodes == 0


def test_census_counts_padding_and_the_shapes_of_the_run(tmp_path: Path) -> None:
    path = conv_add_mul(tmp_path / "m.onnx")
    for batch in (1, 5):
        found = _onnx.census(path, {"x": (batch, 3, 8, 8), "x2": (batch, 4, 8, 8)})
        assert found.macs == batch * 4 * 8 * 8 * 27


def test_census_sees_shapes_that_inference_loses(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], "where"),
        helper.make_node("Cast", ["where"], ["floats"], "cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "floats"], ["y"], "product"),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [3, 4]}, {"y": [5, "n"]}, {"w": ones(5, 2)})
    # As many columns as x has nonzero values; the counting run is on zeros.
    assert _onnx.census(path, {"x": (3, 4)}).macs == 0


@pytest.mark.parametrize(
    ("dequantized", "integer"), [("both", True), ("weight", False), ("activation", False), ("neither", False)]
)
def test_a_product_is_on_integers_only_if_both_operands_were_dequantized(
    tmp_path: Path, dequantized: str, integer: bool
) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], "dq"),
        helper.make_node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"], "wdq"),
        helper.make_node(
            "MatMul",
            [
                "xd" if dequantized in ("both", "activation") else "x",
                "wd" if dequantized in ("both", "weight") else "w",
            ],
            ["y"],
            "product",
        ),
    ]
    weights = {"scale": np.float32(0.1), "zero": np.int8(0), "wq": np.ones((5, 7), np.int8), "w": ones(5, 7)}
    held = {k: np.asarray(v) for k, v in weights.items()}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [3, 5]}, {"y": [3, 7]}, held)
    found = _onnx.census(path, {"x": (3, 5)})
    assert found.quantize_nodes == 3 and found.macs == 105
    assert found.integer_macs == (105 if integer else 0)
    assert found.float_nodes == (() if integer else ("product",))


def test_integer_operators_count_as_integer(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "scale", "zero"], "quantize"),
        helper.make_node("ConvInteger", ["xq", "w", "zero"], ["i"], "conv", group=2),
        helper.make_node("Cast", ["i"], ["y"], "cast", to=onnx.TensorProto.FLOAT),
    ]
    weights = {"w": np.ones((4, 1, 3, 3), np.uint8)}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [1, 2, 6, 6]}, {"y": [1, 4, 4, 4]}, weights)
    found = _onnx.census(path, {"x": (1, 2, 6, 6)})
    assert (found.macs, found.integer_macs, found.float_nodes) == (4 * 16 * 9, 4 * 16 * 9, ())
    assert found.quantize_nodes == 1


def conv_bn(path: Path, opset: int = 18, ir_version: int = 9) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), **dict.fromkeys("gbmv", (4,))}
    weights = {k: rng.uniform(0.5, 2.0, s) for k, s in shapes.items()}
    return write_onnx(
        path,
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], "norm"),
            helper.make_node("Relu", ["n"], ["y"], "relu"),
        ],
        {"x": ["batch", 3, 6, 6]},
        {"y": ["batch", 4, 4, 4]},
        {k: v.astype(np.float32) for k, v in weights.items()},
        opset,
        ir_version,
    )


def lowered(path: Path, folder: Path) -> tuple[Any, Path]:
    folder.mkdir()
    graph = _onnx.lower(source_of(path), folder)
    assert graph.sha256 == _onnx.graph_sha256(graph.path)
    return onnx.load(str(graph.path)), graph.path


def test_canonical_graph_folds_batch_normalization(tmp_path: Path) -> None:
    path = conv_bn(tmp_path / "m.onnx")
    before = path.read_bytes()
    model, canonical = lowered(path, tmp_path / "out")
    assert path.read_bytes() == before
    assert [n.op_type for n in model.graph.node] == ["Conv", "Relu"]
    assert all(n.name for n in model.graph.node) and not model.graph.value_info
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    assert {o.domain for o in model.opset_import} == {""}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["graph.onnx"]
    x = np.random.default_rng(1).standard_normal((3, 3, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(canonical, x=x)[0], run(path, x=x)[0], rtol=1e-4, atol=1e-4)


def test_canonical_graph_drops_stale_value_info(tmp_path: Path) -> None:
    path = conv_add_mul(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.value_info.append(helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [1, 4, 8, 8]))
    onnx.save(model, path)
    assert not lowered(path, tmp_path / "out")[0].graph.value_info


@pytest.mark.parametrize(("opset", "ir_version"), [(13, 7), (15, 8), (18, 8), (19, 9), (21, 10)])
def test_files_carry_the_lowest_ir_version_of_their_opset(
    tmp_path: Path, opset: int, ir_version: int
) -> None:
    model, _ = lowered(conv_bn(tmp_path / "m.onnx", opset, ir_version=10), tmp_path / "out")
    assert model.ir_version == ir_version
    assert [o.version for o in model.opset_import] == [opset]


def test_equal_graphs_have_equal_hashes(tmp_path: Path) -> None:
    path = conv_bn(tmp_path / "m.onnx")
    first, second = (lowered(path, tmp_path / name)[1] for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_weights_above_the_threshold_go_to_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"x": [1, 64]},
        {"y": [1, 32]},
        {"w": np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)},
    )
    size = 64 * 32 * 4
    monkeypatch.setattr(_onnx, "EXTERNAL_ABOVE_BYTES", size)
    assert _onnx.save(onnx.load(str(path)), tmp_path / "inside.onnx") == ("inside.onnx",)
    monkeypatch.setattr(_onnx, "EXTERNAL_ABOVE_BYTES", size - 1)
    folder = tmp_path / "out"
    _, canonical = lowered(path, folder)
    data = folder / "graph.onnx.data"
    assert data.stat().st_size == size and canonical.stat().st_size < 1000
    assert {p.name for p in folder.iterdir()} == {"graph.onnx", "graph.onnx.data"}
    both = hashlib.sha256(canonical.read_bytes() + data.read_bytes()).hexdigest()
    assert _onnx.graph_sha256(canonical) == both
    assert _onnx.save(onnx.load(str(canonical)), folder / "again.onnx") == ("again.onnx", "again.onnx.data")
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    np.testing.assert_allclose(run(folder / "again.onnx", x=x)[0], run(path, x=x)[0], rtol=1e-5)
    assert _onnx.census(canonical, {"x": (1, 64)}).macs == 64 * 32


def test_saving_sorts_and_leaves_a_sorted_graph_as_it_is(tmp_path: Path) -> None:
    path = conv_add_mul(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    order = [n.name for n in model.graph.node]
    nodes = list(model.graph.node)
    for shuffled in (nodes, nodes[::-1], [nodes[i] for i in (2, 0, 3, 1)]):
        del model.graph.node[:]
        model.graph.node.extend(shuffled)
        _onnx.save(model, tmp_path / "sorted.onnx")
        assert [n.name for n in onnx.load(str(tmp_path / "sorted.onnx")).graph.node] == order
