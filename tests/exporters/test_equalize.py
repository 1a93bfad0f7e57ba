"""Cross-layer equalization: the float function stays, the ranges become equal, and nothing inexact is touched."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import helper, numpy_helper

from portcall.exporters import _equalize, _onnx, _qdq, _tflite
from portcall.exporters._equalize import Layer, balance, equalize, notes
from portcall.targets.agent.contract import Graph
from portcall.targets.agent.errors import UnsupportedError
from tests.exporters.contract import Exports, random_inputs
from tests.exporters.graphs import Array, graph_of, write_onnx
from tests.exporters.ranges import onnx_ranges, run_onnx, sqnr_db

BACKENDS = ("onnxruntime", "tflite")
FACTORS = np.asarray([0.01, 0.3, 1.0, 30.0, 200.0, 7.0])


def spread(rng: Any, *shape: int, axis: int = 0) -> Array:
    """Normal weights whose channels along *axis* differ in size by four orders of magnitude."""
    factors = np.resize(FACTORS, shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    weight: Array = (rng.standard_normal(shape) * factors).astype(np.float32)
    return weight


def chain(path: Path, activation: str = "Relu", bias: bool = True, **changes: Any) -> Path:
    """conv -> activation -> depthwise conv -> conv with two groups: three layers, two pairs."""
    rng = np.random.default_rng(0)
    held = {
        "w1": spread(rng, 6, 3, 3, 3),
        "w2": spread(rng, 6, 1, 3, 3),
        "w3": spread(rng, 4, 3, 1, 1, axis=1),
    }
    if bias:
        held.update({f"b{i}": rng.standard_normal(n).astype(np.float32) for i, n in ((1, 6), (2, 6), (3, 4))})
    nodes = [
        helper.make_node("Conv", ["x", "w1", *(["b1"] if bias else [])], ["c"], "one"),
        helper.make_node(activation, ["c"], ["r"], "activation"),
        helper.make_node("Conv", ["r", "w2", *(["b2"] if bias else [])], ["d"], "two", group=6, pads=[1] * 4),
        helper.make_node("Conv", ["d", "w3", *(["b3"] if bias else [])], ["y"], "three", group=2),
    ]
    outputs: dict[str, Any] = {"y": ["batch", 4, 6, 6], **changes.get("outputs", {})}
    nodes += changes.get("nodes", [])
    return write_onnx(path, nodes, {"x": ["batch", 3, 8, 8]}, outputs, held)


def images(count: int = 3) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def constants(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("bias", [True, False])
def test_the_float_function_stays_and_pairs_become_equal(tmp_path: Path, bias: bool) -> None:
    graph = graph_of(chain(tmp_path / "m.onnx", bias=bias))
    (tmp_path / "out").mkdir()
    found = equalize(graph, tmp_path / "out")
    assert found.path == tmp_path / "out" / "graph.onnx" and found.kind == "onnx"
    assert found.sha256 == _onnx.graph_sha256(found.path) != graph.sha256
    assert (found.source, found.names) == (graph.source, graph.names)
    for a, b in zip(run_onnx(graph.path, images()), run_onnx(found.path, images()), strict=True):
        np.testing.assert_allclose(b[0], a[0], rtol=1e-5, atol=1e-5 * np.abs(a[0]).max())
    held = constants(found.path)
    made = {n: np.abs(held[n]).reshape(len(held[n]), -1).max(1) for n in ("w1", "w2")}
    np.testing.assert_allclose(made["w1"], np.abs(held["w2"]).max((1, 2, 3)), rtol=5e-3)
    read = np.concatenate([np.abs(held["w3"][:2]).max((0, 2, 3)), np.abs(held["w3"][2:]).max((0, 2, 3))])
    np.testing.assert_allclose(made["w2"], read, rtol=5e-3)
    before = constants(graph.path)
    assert {k for k in held if not np.array_equal(held[k], before[k])} == set(held) - {"b3"}
    assert notes(graph) == notes(found) == ("equalized 2 pairs of convolutions",)


def test_the_graph_itself_is_not_touched(tmp_path: Path) -> None:
    graph = graph_of(chain(tmp_path / "m.onnx"))
    before = graph.path.read_bytes()
    equalize(graph, tmp_path / "..")
    (tmp_path / ".." / "graph.onnx").unlink()
    assert graph.path.read_bytes() == before


def test_equalized_channels_need_no_scales_of_their_own(tmp_path: Path) -> None:
    """Weights per tensor are what the method was made for: channels small in one layer and large in the next."""
    rng = np.random.default_rng(2)
    factors = 10.0 ** rng.uniform(-2, 2, 16)
    first = rng.standard_normal((16, 3, 3, 3)) * factors.reshape(-1, 1, 1, 1)
    second = rng.standard_normal((4, 16, 1, 1)) / factors.reshape(1, -1, 1, 1)
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "one"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w2"], ["y"], "two"),
    ]
    held = {"w1": first.astype(np.float32), "w2": second.astype(np.float32)}
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": ["batch", 3, 8, 8]}, {"y": ["batch", 4, 6, 6]}, held)
    (tmp_path / "out").mkdir()
    found = []
    for graph in (graph_of(path), equalize(graph_of(path), tmp_path / "out")):
        ranges = onnx_ranges(graph.path, images(8))
        _qdq.quantize(graph, ranges, tmp_path / "q.onnx", {"weights": "tensor"})
        wanted, out = (run_onnx(p, images(8)) for p in (path, tmp_path / "q.onnx"))
        found.append(sqnr_db([r[0] for r in wanted], [r[0] for r in out]))
    plain, equalized = found
    assert plain < 10 and equalized > 30


def test_factors_are_the_papers(tmp_path: Path) -> None:
    """s = sqrt(r1 / r2): the first layer is divided by it, bias included, the second multiplied."""
    first = Layer(
        np.asarray([[[[8.0]]], [[[-2.0]]], [[[0.0]]], [[[5.0]]]]), np.asarray([1.0, 2.0, 3.0, 4.0]), 1
    )
    second = Layer(np.asarray([[[[0.5]], [[-2.0]], [[7.0]], [[0.0]]]]), None, 1)
    balance([(first, second)])
    wanted = ([2.0, -2.0, 0.0, 5.0], [0.25, 2.0, 3.0, 4.0], [2.0, -2.0, 7.0, 0.0])
    for found, values in zip((first.weight, first.bias, second.weight), wanted, strict=True):
        np.testing.assert_allclose(np.ravel(found), np.asarray(values))


def test_chains_settle(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    layers = [Layer(spread(rng, 6, 6, 1, 1, axis=i % 2), None, 1) for i in range(6)]
    balance(list(itertools.pairwise(layers)))
    for first, second in itertools.pairwise(layers):
        np.testing.assert_allclose(first.output_ranges(), second.input_ranges(), rtol=0.01)


def relu6(path: Path) -> Path:
    rng = np.random.default_rng(0)
    held = {
        "w1": spread(rng, 6, 3, 3, 3),
        "w2": spread(rng, 4, 6, 1, 1),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "one"),
        helper.make_node("Clip", ["c", "low", "high"], ["r"], "relu6"),
        helper.make_node("Conv", ["r", "w2"], ["y"], "two"),
    ]
    arrays = {k: np.asarray(v) for k, v in held.items()}
    return write_onnx(path, nodes, {"x": ["batch", 3, 8, 8]}, {"y": ["batch", 4, 6, 6]}, arrays)


def test_a_relu6_in_between_is_counted_and_left_alone(tmp_path: Path) -> None:
    graph = graph_of(relu6(tmp_path / "m.onnx"))
    assert notes(graph) == (
        "equalized 0 pairs of convolutions",
        "1 pairs with a ReLU6 or another Clip in between cannot be equalized exactly",
    )
    (tmp_path / "out").mkdir()
    before, after = constants(graph.path), constants(equalize(graph, tmp_path / "out").path)
    assert all(np.array_equal(before[k], after[k]) for k in before)


def pair_count(path: Path) -> int:
    return len(_equalize._onnx_pairs(onnx.load(str(path)).graph)[0])


def test_inexact_pairs_are_left_alone(tmp_path: Path) -> None:
    """What else sees a tensor in between would see it scaled."""
    path = tmp_path / "m.onnx"
    assert pair_count(chain(path)) == 2
    assert pair_count(chain(path, "Sigmoid")) == 1  # two -> three remains
    extra = helper.make_node("Neg", ["c"], ["n"], "reader of c")
    assert pair_count(chain(path, nodes=[extra], outputs={"n": None})) == 1
    extra = helper.make_node("Neg", ["r"], ["n"], "reader of r")
    assert pair_count(chain(path, nodes=[extra], outputs={"n": None})) == 1
    assert pair_count(chain(path, outputs={"r": None})) == 1
    assert pair_count(chain(path, outputs={"d": None})) == 1
    extra = helper.make_node("Neg", ["w1"], ["n"], "reader of a weight")
    assert pair_count(chain(path, nodes=[extra], outputs={"n": None})) == 1
    extra = helper.make_node("Neg", ["b2"], ["n"], "reader of a bias")
    assert pair_count(chain(path, nodes=[extra], outputs={"n": None})) == 0


def test_a_kind_that_cannot_be_equalized_is_refused(tmp_path: Path) -> None:
    graph = replace(graph_of(chain(tmp_path / "m.onnx")), kind="torch")
    with pytest.raises(UnsupportedError, match="no equalization of torch graphs") as caught:
        equalize(graph, tmp_path)
    assert caught.value.fix


# flatbuffers


def tflite_graph(path: Path, source: Graph) -> Graph:
    return Graph("tflite", path, "0", source.source, source.names)


def fused(model: Any, activation: int) -> None:
    """Give every convolution this fused activation."""
    for op, kind in _tflite.operators(model):
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            op.builtinOptions.fusedActivationFunction = activation


@pytest.fixture
def image(exports: Exports, tmp_path: Path) -> Graph:
    """The tiny CNN, its channels of very different size."""
    path = tmp_path / "graph.tflite"
    model = _tflite._read((exports.artifact("image", "tflite") / "model.tflite").read_bytes())
    for op, kind in _tflite.operators(model):
        weight = _tflite.weight_of(model, op, kind)
        if weight is not None and kind != "FULLY_CONNECTED":
            axis = _tflite.CHANNEL_AXES[kind]
            shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
            scaled = weight * np.resize(FACTORS, weight.shape[axis]).reshape(shape)
            _tflite.set_constant(model, model.subgraphs[0].tensors[op.inputs[1]].buffer, scaled)
    path.write_bytes(_tflite._write(model))
    return tflite_graph(path, graph_of(chain(tmp_path / "m.onnx")))


@pytest.mark.parametrize("activation", ["NONE", "RELU", "RELU6"])
def test_flatbuffers_are_equalized_between_fused_activations(
    image: Graph, tmp_path: Path, activation: str
) -> None:
    model = _tflite._read(image.path.read_bytes())
    fused(model, getattr(schema.ActivationFunctionType, activation))
    image.path.write_bytes(_tflite._write(model))
    (tmp_path / "out").mkdir()
    found = equalize(image, tmp_path / "out")
    assert found.path.name == "graph.tflite" and found.sha256 != image.sha256
    before, after = (_tflite._read(g.path.read_bytes()) for g in (image, found))
    changed = [
        kind
        for (a, kind), (b, _) in zip(_tflite.operators(before), _tflite.operators(after), strict=True)
        if kind in _tflite.CHANNEL_AXES
        and not np.array_equal(
            np.asarray(_tflite.weight_of(before, a, kind)), np.asarray(_tflite.weight_of(after, b, kind))
        )
    ]
    # stem (its output also goes to the addition), depthwise -> pointwise
    assert changed == ([] if activation == "RELU6" else ["DEPTHWISE_CONV_2D", "CONV_2D"])
    assert notes(image) == notes(found)
    assert notes(found)[0] == f"equalized {0 if activation == 'RELU6' else 1} pairs of convolutions"
    inputs = random_inputs("image", 1)
    wanted, out = (run_tflite(g.path.read_bytes(), inputs) for g in (image, found))
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def run_tflite(flatbuffer: bytes, inputs: dict[str, Array]) -> Array:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=flatbuffer, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
    )
    found: Array = interpreter.get_signature_runner()(**inputs)["output"]
    return found
