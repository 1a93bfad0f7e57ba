"""ONNX graphs as torch modules: every operator against ONNX Runtime without optimizations, then whole graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from portcall.exporters import _onnx_to_torch
from portcall.targets.agent.errors import BadInput, UnsupportedError

Array = np.ndarray[Any, Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # torch.export itself
]


@dataclass(frozen=True, slots=True)
class Case:
    """One node: inputs come in as they are, constants are initializers; None is an input left out."""

    op_type: str
    inputs: Sequence[Array]
    constants: Sequence[Array | None] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    tolerance: float = 2e-6

    def __str__(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.attributes.items() if not hasattr(v, "dims"))
        return f"{self.op_type}-{self.opset}-{'x'.join(map(str, self.inputs[0].shape))}-{shown}"[:90]


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: Any) -> Array:
    return np.array(values, np.int64)


def scalar(value: Any) -> Array:
    return np.array(value, np.float32)


def write(path: Path, case: Case) -> Path:
    arrays = {f"x{i}": a for i, a in enumerate(case.inputs)}
    constants = {f"c{i}": a for i, a in enumerate(case.constants) if a is not None}
    names = [*arrays, *("" if a is None else f"c{i}" for i, a in enumerate(case.constants))]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op_type, names, outputs, "the node", **case.attributes)
    graph = helper.make_graph(
        [node],
        "one node",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for k, a in arrays.items()
        ],
        [onnx.ValueInfoProto(name=k) for k in outputs],
        [numpy_helper.from_array(a, k) for k, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=9)
    onnx.save(model, path)
    return path


def run_ort(path: Path, inputs: Sequence[Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(
        None, {v.name: a for v, a in zip(session.get_inputs(), inputs, strict=True)}
    )
    return found


def three_ways(module: Any, inputs: Sequence[Array]) -> dict[str, tuple[Any, ...]]:
    args = tuple(torch.from_numpy(a.copy()) for a in inputs)
    with torch.no_grad():
        return {
            "eager": module(*args),
            "torch.export": torch.export.export(module, args).module()(*args),
            "torch.jit.trace": torch.jit.trace(module, args, check_trace=False)(*args),  # type: ignore[no-untyped-call]
        }


def assert_equal(found: Sequence[Any], wanted: Sequence[Array], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for tensor, array in zip(found, wanted, strict=True):
        result = tensor.numpy()
        assert (result.dtype, result.shape) == (array.dtype, array.shape)
        if array.dtype.kind == "f":
            limit = tolerance * max(1.0, float(np.abs(array).max(initial=0)))
            np.testing.assert_allclose(result, array, rtol=tolerance, atol=limit)
        else:
            np.testing.assert_array_equal(result, array)


X4 = floats(2, 6, 9, 8)
POSITIVE = np.abs(floats(2, 3, 4)) + 0.5
SIGNED = floats(2, 3, 4) * 3
WHOLE = np.array([[-7, -2, 0], [3, 5, 9]], np.int64)
TRUTH = np.array([[True, False, True], [False, False, True]])

UNARY = {
    "Abs": SIGNED, "Acos": SIGNED / 20, "Acosh": POSITIVE + 1, "Asin": SIGNED / 20, "Asinh": SIGNED, "Atan": SIGNED,
    "Atanh": SIGNED / 20, "Ceil": SIGNED, "Cos": SIGNED, "Cosh": SIGNED, "Elu": SIGNED, "Erf": SIGNED, "Exp": SIGNED,
    "Floor": SIGNED, "HardSigmoid": SIGNED, "HardSwish": SIGNED, "Identity": SIGNED, "LeakyRelu": SIGNED,
    "Log": POSITIVE, "Mish": SIGNED, "Neg": SIGNED, "Reciprocal": POSITIVE, "Relu": SIGNED,
    "Round": np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1.2], np.float32), "Selu": SIGNED, "Sigmoid": SIGNED,
    "Sign": np.array([-2, 0, 3], np.float32), "Sin": SIGNED, "Sinh": SIGNED, "Softplus": SIGNED, "Softsign": SIGNED,
    "Sqrt": POSITIVE, "Tan": SIGNED / 9, "Tanh": SIGNED, "ThresholdedRelu": SIGNED, "Celu": SIGNED, "Not": TRUTH,
    "IsNaN": np.array([0, np.nan, np.inf], np.float32), "IsInf": np.array([0, -np.inf, np.inf], np.float32),
    "GlobalAveragePool": X4, "GlobalMaxPool": X4, "Flatten": X4, "Transpose": X4, "Shape": X4, "Size": X4,
    "Dropout": SIGNED, "Softmax": SIGNED, "LogSoftmax": SIGNED, "LpNormalization": SIGNED,
    "MeanVarianceNormalization": X4,
}  # fmt: skip

CASES = [
    *(Case(name, [x]) for name, x in UNARY.items()),
    # activations
    Case("HardSigmoid", [SIGNED], attributes={"alpha": 1 / 6, "beta": 0.5}),
    Case("Gelu", [SIGNED], opset=20),
    Case("Gelu", [SIGNED], attributes={"approximate": "tanh"}, opset=20),
    Case("Selu", [SIGNED], attributes={"alpha": 1.5, "gamma": 1.1}),
    Case("PRelu", [X4], [floats(6, 1, 1)]),
    Case("PRelu", [X4], [floats(8)]),
    Case("PRelu", [X4], [floats(1)]),
    Case("Clip", [SIGNED], [scalar(0), scalar(6)]),
    Case("Clip", [SIGNED], [None, scalar(1)]),
    Case("Clip", [SIGNED, scalar(-1), scalar(1)]),
    Case("Clip", [WHOLE], [ints(-3)[0], ints(4)[0]]),
    Case("Softmax", [X4], attributes={"axis": 1}, opset=11),
    Case("Softmax", [X4], attributes={"axis": 3}, opset=11),
    Case("LogSoftmax", [X4], opset=11),
    Case("Softmax", [X4], attributes={"axis": 1}),
    # arithmetic
    *(
        Case(name, [floats(2, 3, 1), floats(3, 4, seed=1)])
        for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")
    ),
    Case("Mean", [floats(2, 3), floats(2, 3, seed=1), floats(3, seed=2)]),
    Case("Div", [WHOLE], [ints(2, -2, 4)]),
    Case("Mod", [WHOLE], [ints(2, -3, 4)]),
    Case("Mod", [SIGNED], [scalar(1.5)], {"fmod": 1}),
    *(Case("Pow", [POSITIVE], [scalar(e)]) for e in (2, 0.5, -1, 3.3)),
    Case("Pow", [POSITIVE, floats(3, 4)]),
    Case("Pow", [WHOLE], [ints(2)[0]]),
    *(
        Case(name, [floats(2, 3).round(), floats(3, seed=1).round()])
        for name in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
    ),
    *(Case(name, [TRUTH, TRUTH[::-1].copy()]) for name in ("And", "Or", "Xor")),
    Case("Where", [TRUTH, floats(2, 3), floats(3, seed=1)]),
    Case("BitwiseAnd", [WHOLE, ints(3, 5, 6)]),
    Case("Cast", [SIGNED], attributes={"to": TensorProto.INT64}),
    Case("Cast", [WHOLE], attributes={"to": TensorProto.BOOL}),
    Case("Cast", [SIGNED], attributes={"to": TensorProto.FLOAT16}),
    Case("CastLike", [SIGNED], [ints(1)]),
    # products
    Case("MatMul", [floats(2, 5, 3)], [floats(3, 4)]),
    Case("MatMul", [floats(2, 5, 3), floats(2, 3, 4)]),
    Case("MatMul", [floats(3)], [floats(3, 4)]),
    Case("Gemm", [floats(5, 3)], [floats(4, 3), floats(4)], {"transB": 1}),
    Case("Gemm", [floats(3, 5)], [floats(3, 4), floats(1, 4)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [floats(5, 3)], [floats(3, 4), floats(5, 1)]),
    Case("Gemm", [floats(5, 3)], [floats(3, 4)]),
    Case("Einsum", [floats(2, 3, 4), floats(2, 4, 5)], attributes={"equation": "bij,bjk->bik"}),
    # convolutions
    Case("Conv", [floats(2, 4, 9)], [floats(6, 4, 3), floats(6)], {"pads": [1, 1]}),
    Case("Conv", [X4], [floats(4, 6, 3, 2), floats(4)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    Case("Conv", [X4], [floats(12, 3, 3, 3)], {"group": 2, "dilations": [2, 2], "pads": [2, 2, 2, 2]}),
    Case("Conv", [X4], [floats(6, 1, 3, 3)], {"group": 6, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", [X4], [floats(6, 6, 2, 4)], {"auto_pad": "SAME_LOWER"}),
    Case("Conv", [X4], [floats(6, 6, 3, 3)], {"auto_pad": "VALID"}),
    Case("Conv", [floats(1, 2, 5, 6, 7)], [floats(3, 2, 3, 3, 3)], {"pads": [1] * 6}),
    Case("ConvTranspose", [X4], [floats(6, 4, 3, 3), floats(4)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case(
        "ConvTranspose", [X4], [floats(6, 2, 3, 3)], {"group": 2, "strides": [2, 2], "output_padding": [1, 1]}
    ),
    Case("ConvTranspose", [X4], [floats(6, 4, 3, 3)], {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    Case("ConvTranspose", [X4], [floats(6, 4, 4, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", [X4], [floats(6, 4, 3, 3)], {"strides": [2, 2], "output_shape": [18, 16]}),
    Case("ConvTranspose", [floats(2, 3, 7)], [floats(3, 4, 3)], {"dilations": [2]}),
    # pooling
    *(
        Case("MaxPool", [X4], attributes={"kernel_shape": [3, 2], **more})
        for more in (
            {},
            {"strides": [2, 2], "pads": [1, 1, 1, 1]},
            {"strides": [2, 2], "pads": [0, 0, 1, 1]},
            {"strides": [2, 3], "ceil_mode": 1},
            {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
            {"dilations": [2, 2]},
            {"strides": [3, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
        )
    ),
    *(
        Case("AveragePool", [X4], attributes={"kernel_shape": [3, 2], **more})
        for more in (
            {},
            {"strides": [2, 2], "pads": [1, 1, 1, 1]},
            {"strides": [2, 2], "pads": [0, 0, 1, 1]},
            {"strides": [2, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1},
            {"strides": [2, 3], "ceil_mode": 1},
            {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
            {"pads": [1, 1, 1, 1], "count_include_pad": 1},
        )
    ),
    Case("MaxPool", [floats(2, 3, 9)], attributes={"kernel_shape": [2], "strides": [2]}),
    Case("AveragePool", [floats(1, 2, 5, 6, 7)], attributes={"kernel_shape": [2, 2, 2]}),
    # normalization
    Case("BatchNormalization", [X4], [floats(6), floats(6), floats(6), np.abs(floats(6))]),
    Case("LayerNormalization", [X4], [floats(8), floats(8)], opset=17),
    Case("LayerNormalization", [X4], [floats(9, 8)], {"axis": 2, "epsilon": 1e-3}, opset=17),
    Case("InstanceNormalization", [X4], [floats(6), floats(6)], tolerance=1e-5),
    Case("GroupNormalization", [X4], [floats(3), floats(3)], {"num_groups": 3}, tolerance=1e-5),
    Case("GroupNormalization", [X4], [floats(6), floats(6)], {"num_groups": 3}, opset=21, tolerance=1e-5),
    Case("LpNormalization", [X4], attributes={"p": 1, "axis": 1}),
    Case("LRN", [X4], attributes={"size": 3, "alpha": 0.1, "beta": 0.7, "bias": 1.5}),
    # reductions
    *(
        Case(f"Reduce{kind}", [POSITIVE], [ints(0, 2)], {"keepdims": keep})
        for kind in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare", "Sum")
        for keep in (0, 1)
    ),
    Case("ReduceMean", [X4], attributes={"axes": [2, 3], "keepdims": 0}, opset=13),
    Case("ReduceMax", [X4], attributes={"axes": [-1]}, opset=13),
    Case("ReduceSum", [X4]),
    Case("ReduceSum", [WHOLE], [ints(1)]),
    Case("ReduceSum", [X4], attributes={"noop_with_empty_axes": 1}),
    Case("ArgMax", [X4], attributes={"axis": 1}),
    Case("ArgMin", [X4], attributes={"axis": -1, "keepdims": 0}),
    Case("ArgMax", [np.ones((2, 3), np.float32)], attributes={"axis": 1, "select_last_index": 1}),
    Case("TopK", [X4], [ints(3)], {"axis": 1}, outputs=2),
    Case("TopK", [X4], [ints(3)], {"axis": -1, "largest": 0}, outputs=2),
    *(
        Case("CumSum", [X4], [ints(1)[0]], {"exclusive": e, "reverse": r}, tolerance=1e-5)
        for e in (0, 1)
        for r in (0, 1)
    ),
    # moving
    Case("Reshape", [X4], [ints(0, -1, 4)]),
    Case("Flatten", [X4], attributes={"axis": 0}),
    Case("Flatten", [X4], attributes={"axis": -1}),
    Case("Transpose", [X4], attributes={"perm": [0, 2, 3, 1]}),
    Case("Squeeze", [floats(1, 3, 1, 2)], [ints(0, -2)]),
    Case("Squeeze", [floats(1, 3, 1, 2)]),
    Case("Squeeze", [floats(1, 3, 1, 2)], attributes={"axes": [2]}, opset=11),
    Case("Unsqueeze", [floats(3, 2)], [ints(0, -1)]),
    Case("Unsqueeze", [floats(3, 2)], attributes={"axes": [1]}, opset=11),
    Case("Concat", [floats(2, 3), floats(2, 1)], attributes={"axis": -1}),
    Case("Split", [floats(2, 7)], [ints(3, 4)], {"axis": 1}, outputs=2),
    Case("Split", [floats(2, 7)], attributes={"axis": 1, "num_outputs": 3}, outputs=3),
    Case("Split", [floats(2, 6)], attributes={"axis": 1}, opset=11, outputs=3),
    Case("Split", [floats(2, 6)], attributes={"axis": 1, "split": [2, 4]}, opset=11, outputs=2),
    Case("Slice", [X4], [ints(1, -3), ints(2**62, -1), ints(1, 2), ints(2, 1)]),
    Case("Slice", [X4], [ints(-1), ints(-(2**62)), ints(3), ints(-1)]),
    Case("Slice", [X4], [ints(6, 5), ints(0, -20), ints(3, 2), ints(-2, -3)]),
    Case("Slice", [X4], [ints(0, 1), ints(1, 3)]),
    Case("Gather", [X4], [ints(2, 0, -1)], {"axis": 2}),
    Case("Gather", [X4], [np.array(-1)], {"axis": 1}),
    Case("Gather", [X4], [np.array([[0, 1], [2, 3]])], {"axis": 1}),
    Case("Gather", [floats(7, 3), np.array([[0, 6], [2, 3]])]),
    Case("Gather", [X4, np.array([[0, -1], [2, 3]])], attributes={"axis": 1}),
    Case("GatherElements", [floats(3, 4), np.array([[0, -1, 2, 1], [1, 1, 0, 0]])], attributes={"axis": 0}),
    Case("GatherND", [floats(3, 4, 2), np.array([[0, 1], [2, -1]])]),
    Case("ScatterND", [floats(3, 4), np.array([[0, 1], [2, 3]]), floats(2)]),
    Case("ScatterElements", [floats(3, 4), np.array([[0, -1, 2, 1]]), floats(1, 4)], attributes={"axis": 0}),
    Case(
        "ScatterElements",
        [floats(3, 4), np.array([[0, 0, 2, 1]]), floats(1, 4)],
        attributes={"reduction": "add"},
    ),
    Case("Expand", [floats(3, 1)], [ints(2, 1, 4)]),
    Case("Tile", [floats(2, 3)], [ints(2, 3)]),
    Case("Pad", [X4], [ints(0, 1, 2, 3, 0, 0, 1, 2), scalar(1.5)]),
    Case("Pad", [X4], [ints(0, 0, -1, 1, 0, 0, 2, -2)]),
    *(Case("Pad", [X4], [ints(0, 0, 2, 1, 0, 0, 1, 2)], {"mode": m}) for m in ("reflect", "edge")),
    *(Case("Pad", [X4], [ints(1, 2, 2, 1, 0, 1, 1, 2)], {"mode": m}) for m in ("reflect", "edge")),
    Case("Pad", [X4], [ints(1, 2), None, ints(-1)], {"mode": "wrap"}, opset=19),
    Case("DepthToSpace", [floats(2, 8, 3, 2)], attributes={"blocksize": 2}),
    Case("DepthToSpace", [floats(2, 8, 3, 2)], attributes={"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [floats(2, 3, 4, 6)], attributes={"blocksize": 2}),
    Case("Trilu", [floats(4, 5)], [np.array(1)]),
    Case("Trilu", [floats(2, 4, 5)], attributes={"upper": 0}),
    Case("OneHot", [ints(0, -1, 2)], [ints(4)[0], floats(2)]),
    Case("OneHot", [np.array([[0, 2], [1, 1]])], [ints(3)[0], floats(2)], {"axis": 1}),
    Case("Shape", [X4], attributes={"start": 1, "end": -1}),
    # resizing
    Case(
        "Resize",
        [X4],
        [None, scalar([1, 1, 2, 2])],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    Case("Resize", [X4], [None, scalar([1, 1, 2, 3])]),
    Case("Resize", [X4], [None, scalar([1, 1, 0.6, 1.7])], {"nearest_mode": "ceil"}),
    Case(
        "Resize", [X4], [None, None, ints(2, 6, 5, 13)], {"coordinate_transformation_mode": "align_corners"}
    ),
    Case(
        "Resize",
        [X4],
        [None, None, ints(2, 6, 5, 13)],
        {"coordinate_transformation_mode": "half_pixel_symmetric"},
        opset=19,
    ),
    Case("Resize", [X4], [None, None, ints(5, 13)], {"axes": [2, 3], "mode": "linear"}),
    Case("Resize", [X4], [None, scalar([1, 1, 2, 2])], {"mode": "linear"}),
    Case("Resize", [X4], [None, scalar([1, 1, 0.6, 1.7])], {"mode": "linear"}),
    Case(
        "Resize",
        [X4],
        [None, None, ints(2, 6, 17, 5)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    *(
        Case(
            "Resize",
            [X4],
            [None, scalar([1, 1, 2, 0.5])],
            {"mode": "linear", "coordinate_transformation_mode": mode},
        )
        for mode in ("asymmetric", "pytorch_half_pixel", "half_pixel")
    ),
    Case("Upsample", [X4], [scalar([1, 1, 2, 2])], {"mode": "linear"}, opset=9),
    Case("Resize", [floats(2, 3, 7)], [None, scalar([1, 1, 2])], {"mode": "linear"}),
    Case("Resize", [floats(1, 2, 3, 4, 5)], [None, scalar([1, 1, 2, 2, 2])], {"mode": "linear"}),
    Case("Resize", [X4], [None, scalar([1, 1, 2, 2])], {"mode": "cubic"}, tolerance=1e-5),
    Case("Resize", [X4], [scalar([1, 1, 2, 2])], opset=10),
    Case("Upsample", [X4], [scalar([1, 1, 2, 2])], opset=9),
    Case("GridSample", [X4, np.clip(floats(2, 4, 5, 2), -1.2, 1.2)], tolerance=1e-5),
    # recurrence
    *(
        Case(
            "LSTM",
            [floats(5, 2, 3)],
            [floats(n, 16, 3), floats(n, 16, 4), floats(n, 32)],
            {"hidden_size": 4, "direction": d},
            outputs=3,
        )
        for d, n in (("forward", 1), ("reverse", 1), ("bidirectional", 2))
    ),
    Case(
        "LSTM",
        [floats(5, 2, 3)],
        [floats(1, 16, 3), floats(1, 16, 4), None, None, floats(1, 2, 4), floats(1, 2, 4)],
        {"hidden_size": 4},
    ),
    Case(
        "GRU",
        [floats(5, 2, 3)],
        [floats(1, 12, 3), floats(1, 12, 4), floats(1, 24)],
        {"hidden_size": 4, "linear_before_reset": 1},
        outputs=2,
    ),
    # quantization; the inputs avoid ties, where torch multiplies by 1 / scale
    Case("QuantizeLinear", [SIGNED], [scalar(0.05), np.array(3, np.uint8)]),
    Case("QuantizeLinear", [SIGNED], [scalar(0.05), np.array(0, np.int8)]),
    Case(
        "QuantizeLinear",
        [X4],
        [np.linspace(0.01, 0.1, 6, dtype=np.float32), np.zeros(6, np.int8)],
        {"axis": 1},
    ),
    Case(
        "DequantizeLinear",
        [np.arange(24, dtype=np.uint8).reshape(2, 3, 4)],
        [scalar(0.1), np.array(7, np.uint8)],
    ),
    Case(
        "DequantizeLinear",
        [np.arange(24, dtype=np.int8).reshape(4, 6)],
        [np.linspace(0.01, 0.1, 4, dtype=np.float32)],
        {"axis": 0},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_onnx_runtime(tmp_path: Path, case: Case) -> None:
    path = write(tmp_path / "m.onnx", case)
    wanted = run_ort(path, case.inputs)
    for found in three_ways(_onnx_to_torch.to_module(path), case.inputs).values():
        assert_equal(found, wanted, case.tolerance)


def graph(
    path: Path,
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    weights: Mapping[str, Array],
    opset: int = 18,
) -> Path:
    made = helper.make_graph(
        list(nodes),
        "some nodes",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in inputs.items()],
        [onnx.ValueInfoProto(name=k) for k in outputs],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def flatten_by_shape(path: Path) -> Path:
    """[batch, 6, *] -> [batch, -1] as torch's older exporter writes it: ten nodes of arithmetic on the shape."""
    make = helper.make_node
    nodes = [
        make("Shape", ["x"], ["shape"]),
        make("Gather", ["shape", "zero"], ["batch"]),
        make("Gather", ["shape", "ones"], ["inner"]),
        make("ReduceProd", ["inner"], ["product"], keepdims=1),
        make("Unsqueeze", ["batch", "axis"], ["batch1"]),
        make("Cast", ["product"], ["product64"], to=TensorProto.INT64),
        make("Concat", ["batch1", "product64"], ["wanted"], axis=0),
        make("Reshape", ["x", "wanted"], ["flat"]),
        make("ConstantOfShape", ["wanted"], ["zeros"]),
        make("Add", ["flat", "zeros"], ["y"]),
    ]
    weights = {"zero": np.array(0), "ones": ints(1, 2), "axis": ints(0)}
    return graph(path, nodes, {"x": ["batch", 6, 4]}, ["y", "wanted"], weights)


def operators_of(program: Any) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_arithmetic_on_shapes_leaves_no_operator_behind(tmp_path: Path) -> None:
    path = flatten_by_shape(tmp_path / "m.onnx")
    x = floats(3, 6, 4)
    module = _onnx_to_torch.to_module(path)
    for found in three_ways(module, [x]).values():
        assert_equal(found, run_ort(path, [x]), 0)
    program = torch.export.export(module, (torch.from_numpy(x),))
    moving = [o for o in operators_of(program) if "lift_fresh" not in o and "detach" not in o]
    assert moving == ["aten.reshape.default", "aten.add.Tensor"]


def test_a_dynamic_batch_stays_dynamic(tmp_path: Path) -> None:
    path = flatten_by_shape(tmp_path / "m.onnx")
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        _onnx_to_torch.to_module(path), (torch.zeros(3, 6, 4),), dynamic_shapes=(({0: batch},),)
    )
    for size in (2, 5):
        x = floats(size, 6, 4)
        assert_equal(program.module()(torch.from_numpy(x)), run_ort(path, [x]), 0)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_a_dynamic_batch_stays_dynamic_through_a_resize(tmp_path: Path, mode: str) -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], "n", mode=mode)
    path = graph(tmp_path / "m.onnx", [node], {"x": ["batch", 3, 4, 5]}, ["y"], {"scales": scales})
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        _onnx_to_torch.to_module(path), (torch.zeros(3, 3, 4, 5),), dynamic_shapes=(({0: batch},),)
    )
    x = floats(5, 3, 4, 5)
    assert_equal(program.module()(torch.from_numpy(x)), run_ort(path, [x]), 1e-6)


def test_inputs_outputs_and_nodes_keep_their_names(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["m"], "/block.0/dense/MatMul"),
        helper.make_node("Add", ["m", "b"], ["s"], "/block.0/dense.MatMul"),
        helper.make_node("MatMul", ["m", "w"], ["t"], "training"),
    ]
    weights = {"w": floats(4, 4), "unused": floats(5)}
    path = graph(tmp_path / "m.onnx", nodes, {"a": [2, 4], "b": [4]}, ["t", "s", "b", "w"], weights)
    module = _onnx_to_torch.to_module(path)
    assert (module.input_names, module.output_names) == (("a", "b"), ("t", "s", "b", "w"))
    assert list(module.node_names.values()) == [n.name for n in nodes]
    assert {name for name, _ in module.nodes.named_children()} == set(module.node_names)
    assert all(name.isidentifier() for name in module.node_names)
    # One matrix for both products, and itself as an output.
    assert sorted(tuple(b.shape) for b in module.buffers()) == [(4, 4), (4, 4)]
    inputs = [floats(2, 4, seed=1), floats(4, seed=2)]
    for found in three_ways(module, inputs).values():
        assert_equal(found, run_ort(path, inputs), 2e-6)


def test_constants_of_every_kind(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Constant", [], ["ints"], value_ints=[2, -1]),
        make("Constant", [], ["float"], value_float=0.5),
        make("Constant", [], ["tensor"], value=numpy_helper.from_array(floats(6))),
        make("Reshape", ["x", "ints"], ["r"]),
        make("Mul", ["r", "float"], ["m"]),
        make("Add", ["m", "tensor"], ["y"]),
    ]
    path = graph(tmp_path / "m.onnx", nodes, {"x": [3, 4]}, ["y"], {})
    x = floats(3, 4, seed=4)
    for found in three_ways(_onnx_to_torch.to_module(path), [x]).values():
        assert_equal(found, run_ort(path, [x]), 0)


REFUSED = [
    (Case("NonZero", [SIGNED]), r"'the node' \(ai.onnx.NonZero, operator set 18\) has no equiv", "Where"),
    (Case("LpPool", [X4], attributes={"kernel_shape": [2, 2]}), "ai.onnx.LpPool", "AveragePool"),
    (Case("Reshape", [X4, ints(2, -1)]), "its shape is computed from data", "constant"),
    (
        Case("MaxPool", [X4], attributes={"kernel_shape": [2, 2]}, outputs=2),
        "its indices are used",
        "second output",
    ),
    (
        Case("Resize", [X4], [None, scalar([1, 1, 2, 2])], {"mode": "cubic", "cubic_coeff_a": -0.5}),
        "no such interpolation",
        "-0.75",
    ),
    (
        Case("GRU", [floats(5, 2, 3)], [floats(1, 12, 3), floats(1, 12, 4)], {"hidden_size": 4}),
        "linear_before_reset",
        "Leave that out",
    ),
    (Case("LRN", [X4], attributes={"size": 4}), "its size is 4", "odd"),
    (Case("GatherND", [X4, ints(1, 0)[:, None]], attributes={"batch_dims": 1}), "batch_dims is 1", "Gather"),
]


@pytest.mark.parametrize(("case", "message", "fix"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_torch_cannot_do_is_refused_by_name(tmp_path: Path, case: Case, message: str, fix: str) -> None:
    path = write(tmp_path / "m.onnx", case)
    with pytest.raises(UnsupportedError, match=message) as caught:
        _onnx_to_torch.to_module(path)(*map(torch.from_numpy, case.inputs))
    assert "'the node'" in caught.value.message and fix in caught.value.fix


def test_an_operator_of_another_domain_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], "mine", domain="my.company")
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [onnx.ValueInfoProto(name="y")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.company", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"'mine' \(my\.company\.Relu, operator set 18\)"):
        _onnx_to_torch.to_module(tmp_path / "m.onnx")


def test_an_unknown_operator_set_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", Case("Relu", [SIGNED], opset=6))
    with pytest.raises(BadInput, match="operator set 6") as caught:
        _onnx_to_torch.to_module(path)
    assert "convert_version" in caught.value.fix


class Attention(torch.nn.Module):
    """One layer of a transformer with token ids, a mask and positions: what BERT is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = torch.nn.Embedding(30, 16), torch.nn.Embedding(12, 16)
        self.layer = torch.nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        x = self.layer(x, src_key_padding_mask=mask == 0)
        return self.head(x[:, 0]), x.mean(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("opset", [14, 18, 20])
def test_a_transformer_equals_onnx_runtime(tmp_path: Path, opset: int) -> None:
    torch.manual_seed(0)
    tokens, mask = torch.randint(0, 30, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    names = ["tokens", "mask"]
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    torch.onnx.export(
        Attention().eval(), (tokens, mask), str(tmp_path / "m.onnx"), dynamo=False, opset_version=opset,
        input_names=names, dynamic_axes=axes,
    )  # fmt: skip
    inputs = [tokens.numpy(), mask.numpy()]
    for found in three_ways(_onnx_to_torch.to_module(tmp_path / "m.onnx"), inputs).values():
        assert_equal(found, run_ort(tmp_path / "m.onnx", inputs), 5e-6)
