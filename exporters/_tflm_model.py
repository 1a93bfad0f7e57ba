"""What TensorFlow Lite Micro (TFLM) takes of a flatbuffer: its operators and types.

The operators are those of TFLM's ``PythonOpsResolver`` (a test asks the installed interpreter about each), the method
that registers one those of the public class ``MicroMutableOpResolver``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Tuple

from portcall.targets.agent.errors import UnsupportedError

METHODS: Mapping[str, str] = {
    "ABS": "AddAbs",
    "ADD": "AddAdd",
    "ADD_N": "AddAddN",
    "ARG_MAX": "AddArgMax",
    "ARG_MIN": "AddArgMin",
    "ASSIGN_VARIABLE": "AddAssignVariable",
    "AVERAGE_POOL_2D": "AddAveragePool2D",
    "BATCH_MATMUL": "AddBatchMatMul",
    "BATCH_TO_SPACE_ND": "AddBatchToSpaceNd",
    "BROADCAST_ARGS": "AddBroadcastArgs",
    "BROADCAST_TO": "AddBroadcastTo",
    "CALL_ONCE": "AddCallOnce",
    "CAST": "AddCast",
    "CEIL": "AddCeil",
    "CONCATENATION": "AddConcatenation",
    "CONV_2D": "AddConv2D",
    "COS": "AddCos",
    "CUMSUM": "AddCumSum",
    "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
    "DEPTH_TO_SPACE": "AddDepthToSpace",
    "DEQUANTIZE": "AddDequantize",
    "DIV": "AddDiv",
    "DYNAMIC_UPDATE_SLICE": "AddDynamicUpdateSlice",
    "ELU": "AddElu",
    "EMBEDDING_LOOKUP": "AddEmbeddingLookup",
    "EQUAL": "AddEqual",
    "EXP": "AddExp",
    "EXPAND_DIMS": "AddExpandDims",
    "FILL": "AddFill",
    "FLOOR": "AddFloor",
    "FLOOR_DIV": "AddFloorDiv",
    "FLOOR_MOD": "AddFloorMod",
    "FULLY_CONNECTED": "AddFullyConnected",
    "GATHER": "AddGather",
    "GATHER_ND": "AddGatherNd",
    "GREATER": "AddGreater",
    "GREATER_EQUAL": "AddGreaterEqual",
    "HARD_SWISH": "AddHardSwish",
    "IF": "AddIf",
    "L2_NORMALIZATION": "AddL2Normalization",
    "L2_POOL_2D": "AddL2Pool2D",
    "LEAKY_RELU": "AddLeakyRelu",
    "LESS": "AddLess",
    "LESS_EQUAL": "AddLessEqual",
    "LOG": "AddLog",
    "LOGICAL_AND": "AddLogicalAnd",
    "LOGICAL_NOT": "AddLogicalNot",
    "LOGICAL_OR": "AddLogicalOr",
    "LOGISTIC": "AddLogistic",
    "LOG_SOFTMAX": "AddLogSoftmax",
    "MAXIMUM": "AddMaximum",
    "MAX_POOL_2D": "AddMaxPool2D",
    "MEAN": "AddMean",
    "MINIMUM": "AddMinimum",
    "MIRROR_PAD": "AddMirrorPad",
    "MUL": "AddMul",
    "NEG": "AddNeg",
    "NOT_EQUAL": "AddNotEqual",
    "PACK": "AddPack",
    "PAD": "AddPad",
    "PADV2": "AddPadV2",
    "PRELU": "AddPrelu",
    "QUANTIZE": "AddQuantize",
    "READ_VARIABLE": "AddReadVariable",
    "REDUCE_ALL": "AddReduceAll",
    "REDUCE_MAX": "AddReduceMax",
    "REDUCE_MIN": "AddReduceMin",
    "RELU": "AddRelu",
    "RELU6": "AddRelu6",
    "RESHAPE": "AddReshape",
    "RESIZE_BILINEAR": "AddResizeBilinear",
    "RESIZE_NEAREST_NEIGHBOR": "AddResizeNearestNeighbor",
    "REVERSE_V2": "AddReverseV2",
    "ROUND": "AddRound",
    "RSQRT": "AddRsqrt",
    "SELECT_V2": "AddSelectV2",
    "SHAPE": "AddShape",
    "SIN": "AddSin",
    "SLICE": "AddSlice",
    "SOFTMAX": "AddSoftmax",
    "SPACE_TO_BATCH_ND": "AddSpaceToBatchNd",
    "SPACE_TO_DEPTH": "AddSpaceToDepth",
    "SPLIT": "AddSplit",
    "SPLIT_V": "AddSplitV",
    "SQRT": "AddSqrt",
    "SQUARE": "AddSquare",
    "SQUARED_DIFFERENCE": "AddSquaredDifference",
    "SQUEEZE": "AddSqueeze",
    "STRIDED_SLICE": "AddStridedSlice",
    "SUB": "AddSub",
    "SUM": "AddSum",
    "SVDF": "AddSvdf",
    "TANH": "AddTanh",
    "TRANSPOSE": "AddTranspose",
    "TRANSPOSE_CONV": "AddTransposeConv",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "AddUnidirectionalSequenceLSTM",
    "UNPACK": "AddUnpack",
    "VAR_HANDLE": "AddVarHandle",
    "WHILE": "AddWhile",
    "ZEROS_LIKE": "AddZerosLike",
}
"""Operator of the flatbuffer -> the method of ``MicroMutableOpResolver`` that registers it."""

REPLACEMENTS: Mapping[str, str] = {
    "CONV_3D": "a 2-D convolution per slice",
    "GELU": "ReLU, Hardswish, or x * sigmoid(1.702 * x)",
    "ONE_HOT": "a fully connected layer on indices encoded outside the model",
    "POW": "a product of the tensor with itself, or sqrt",
    "REDUCE_PROD": "exp of a sum of logarithms",
    "SCATTER_ND": "concatenation or padding",
    "SELECT": "torch.where on tensors of one shape",
    "SIGN": "a comparison and a subtraction",
    "TILE": "expand or concatenation",
    "TOPK_V2": "argmax inside the model, or top-k after it",
}
"""Operators that TFLM lacks and that a converter makes of common layers -> what to write instead."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the primary subgraph: its name, its bytes, and whether it is a constant (in flash, not in RAM)."""

    name: str
    bytes: int
    constant: bool


def used_operators(model: Any) -> Tuple[str, ...]:
    """Return the operators of all subgraphs, sorted, each once.

    Raises UnsupportedError that names those that TFLM lacks, the layers that made them and what would replace them.
    """
    from ai_edge_litert.schema_py_generated import BuiltinOperator

    names = {v: k for k, v in vars(BuiltinOperator).items() if isinstance(v, int)}
    layers: Dict[str, List[str]] = {}
    for graph in model.subgraphs:
        for op in graph.operators:
            code = model.operatorCodes[op.opcodeIndex]
            name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
            if name == "CUSTOM":
                name = f"CUSTOM {bytes(code.customCode or b'').decode()}"
            layers.setdefault(name, []).append(graph.tensors[op.outputs[0]].name.decode())
    refused = sorted(set(layers) - set(METHODS))
    if refused:
        found = "; ".join(f"{name} in {_listed(layers[name])}" for name in refused)
        hints = [f"{name}: use {REPLACEMENTS[name]}" for name in refused if name in REPLACEMENTS]
        raise UnsupportedError(
            f"TensorFlow Lite Micro has no {found}",
            "; ".join(hints) or "Replace these layers, or run them outside the model",
        )
    return tuple(sorted(layers))


def _listed(layers: List[str]) -> str:
    shown = ", ".join(repr(name) for name in layers[:3])
    return shown if len(layers) <= 3 else f"{shown} and {len(layers) - 3} more"


def check_interface(model: Any, refused: Tuple[str, ...] = ("INT64", "FLOAT64", "STRING")) -> None:
    """Raise UnsupportedError for an input or output of a type that microcontroller kernels do not take, by name."""
    from ai_edge_litert.schema_py_generated import TensorType

    types = {v: k for k, v in vars(TensorType).items() if isinstance(v, int)}
    signature = model.signatureDefs[0]
    for end, entries in (("input", signature.inputs), ("output", signature.outputs)):
        for entry in entries:
            kind = types[model.subgraphs[0].tensors[entry.tensorIndex].type]
            if kind in refused:
                raise UnsupportedError(
                    f"TensorFlow Lite Micro takes no {kind.lower()}: {end} {entry.name.decode()!r}",
                    "Make it float32 or int32 in the model and convert outside of it",
                )


def tensors(model: Any) -> List[Tensor]:
    """Return the tensors of the primary subgraph that its operators use, the largest first."""
    from ai_edge_litert.schema_py_generated import TensorType

    sizes = {
        TensorType.FLOAT32: 32,
        TensorType.INT32: 32,
        TensorType.FLOAT16: 16,
        TensorType.INT16: 16,
        TensorType.INT64: 64,
        TensorType.FLOAT64: 64,
        TensorType.INT4: 4,
    }
    graph = model.subgraphs[0]
    used = {int(i) for op in graph.operators for i in (*op.inputs, *op.outputs) if i >= 0}
    found = []
    for index in sorted(used.union(int(i) for i in (*graph.inputs, *graph.outputs))):
        tensor, count = graph.tensors[index], 1
        for dim in tensor.shape if tensor.shape is not None else ():
            count *= int(dim)
        data = model.buffers[tensor.buffer].data
        constant = data is not None and len(data) > 0
        found.append(Tensor(tensor.name.decode(), (count * sizes.get(tensor.type, 8) + 7) // 8, constant))
    return sorted(found, key=lambda t: -t.bytes)
