"""The oldest TensorFlow Lite runtime that loads a flatbuffer, from the versions of its operators."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

from portcall.targets.agent.errors import UnsupportedError

RUNTIMES: Mapping[str, str] = {
    "ABS": "1.13 2.4 2.5 2.6 2.12", "ADD": "1.5 1.14 2.4 2.6 2.13 2.23", "ADD_N": "1.14",
    "ARG_MAX": "1.9 1.14 2.9", "ARG_MIN": "1.9 1.14 2.9", "AVERAGE_POOL_2D": "1.5 1.14 2.3",
    "BATCH_MATMUL": "2.3 2.3 2.4 2.5", "BATCH_TO_SPACE_ND": "1.6 1.14 2.3 2.12", "BROADCAST_TO": "- 2.5 2.5",
    "BROADCAST_ARGS": "2.6", "CAST": "1.5 2.7 2.8 2.9 2.12 2.15 2.17 2.21", "CEIL": "1.14",
    "CONCATENATION": "1.5 1.14 2.3 2.14 2.21", "CONV_2D": "1.5 1.14 1.14 2.3 2.4 2.9 2.11 2.15", "CONV_3D": "2.5",
    "CONV_3D_TRANSPOSE": "2.6", "COS": "1.14", "CUMSUM": "2.4", "DEPTHWISE_CONV_2D": "1.5 1.12 1.14 2.2 2.3 2.3 2.11",
    "DEPTH_TO_SPACE": "2.1 2.5", "DEQUANTIZE": "1.13.1 1.14 1.15 2.2 2.7 2.18 2.21 2.22", "DILATE": "2.15",
    "DIV": "1.6 2.3", "DYNAMIC_UPDATE_SLICE": "2.9 2.17 2.19 2.20 2.21 2.22", "ELU": "1.14",
    "EMBEDDING_LOOKUP": "1.13 1.14 1.14 2.18 2.21", "EQUAL": "1.14 1.14 2.3 2.13 2.21", "EXP": "1.7 2.12",
    "EXPAND_DIMS": "1.10", "FILL": "1.13 2.3 2.5 2.12", "FLOOR": "1.9", "FLOOR_DIV": "1.14 1.14 2.13",
    "FLOOR_MOD": "1.13 2.13", "FULLY_CONNECTED": "1.5 1.10 1.14 1.14 2.0 2.1 2.3 2.3 2.3 2.11 2.15 2.17 2.18 2.21",
    "GATHER": "1.6 1.14 1.15 2.4 2.5 2.13 2.15", "GATHER_ND": "1.14 2.3 2.5 2.13 2.16", "GELU": "2.9 2.9",
    "GREATER": "1.14 1.14", "GREATER_EQUAL": "1.14 1.14 2.13", "HARD_SWISH": "1.15", "IF": "1.15",
    "L2_NORMALIZATION": "1.5 1.14", "L2_POOL_2D": "1.5", "LEAKY_RELU": "1.13.1 2.3", "LESS": "1.14 1.14 2.13",
    "LESS_EQUAL": "1.14 1.14", "LOCAL_RESPONSE_NORMALIZATION": "1.5", "LOG": "1.14 2.15", "LOGICAL_AND": "1.11",
    "LOGICAL_NOT": "1.11", "LOGICAL_OR": "1.11", "LOGISTIC": "1.14 1.14 2.3", "LOG_SOFTMAX": "1.14 1.14",
    "LSTM": "1.7 1.10 1.14 2.3", "MAXIMUM": "1.14 1.14 2.3 2.3", "MAX_POOL_2D": "1.5 1.14 2.3",
    "MEAN": "1.6 1.14 2.4", "MINIMUM": "1.14 1.14 2.3 2.3", "MIRROR_PAD": "1.13.1 2.3 2.12",
    "MUL": "1.5 1.14 1.15 2.3 2.6 2.11 2.13 2.23", "NEG": "1.9", "NOT_EQUAL": "1.14 1.14 2.3 2.21",
    "ONE_HOT": "1.11", "PACK": "1.11 1.14 2.3 2.13", "PAD": "1.5 1.14 2.4 2.6 2.20", "PADV2": "1.9 1.14 2.4 2.6 2.20",
    "POW": "1.10", "PRELU": "1.8", "QUANTIZE": "1.14 1.15 2.7 2.21 2.21 2.21", "RANGE": "1.13 2.14", "RANK": "1.14",
    "REDUCE_ALL": "2.6", "REDUCE_ANY": "1.11", "REDUCE_MAX": "1.11 1.14 2.5", "REDUCE_MIN": "1.11 1.14 2.5",
    "REDUCE_PROD": "1.11 2.6", "RELU": "1.5 2.1 2.5", "RELU6": "1.5 1.14 2.5", "RELU_0_TO_1": "2.10",
    "RELU_N1_TO_1": "1.5", "RESHAPE": "1.5", "RESIZE_BILINEAR": "1.7 1.14 2.2 2.5",
    "RESIZE_NEAREST_NEIGHBOR": "1.13.1 1.14 2.3 2.4", "REVERSE_V2": "1.14 2.2 2.5", "ROUND": "1.14",
    "RSQRT": "1.10 2.5 2.15", "SCATTER_ND": "2.1", "SELECT": "1.14 1.14 2.12 2.12", "SELECT_V2": "2.2 2.12",
    "SHAPE": "1.10", "SIGN": "2.11 2.12", "SIN": "1.9", "SLICE": "1.14 1.14 1.14 2.4 2.5 2.14 2.21",
    "SOFTMAX": "1.5 1.14 2.3", "SPACE_TO_BATCH_ND": "1.6 1.14 2.3 2.12", "SPACE_TO_DEPTH": "1.5 1.14",
    "SPLIT": "1.5 1.14 1.14 2.3", "SPLIT_V": "1.13.1 2.3", "SQRT": "1.10 2.21", "SQUARE": "1.12",
    "SQUARED_DIFFERENCE": "1.13.1 2.5", "SQUEEZE": "1.6 2.5",
    "STRIDED_SLICE": "1.6 1.14 2.1 2.2 2.5 2.6 2.14 2.14", "SUB": "1.6 1.14 2.3 2.4 2.4", "SUM": "1.10 1.15",
    "TANH": "1.14 1.14 2.3", "TILE": "1.10.1 2.2 2.8", "TOPK_V2": "1.7 1.14 2.13",
    "TRANSPOSE": "1.6 1.14 1.15 2.3 2.4 2.12 2.14.4 2.22", "TRANSPOSE_CONV": "1.9 2.2 2.3 2.13 2.15",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "1.13.1 1.14 2.3 2.12", "UNPACK": "1.11 1.14 2.2 2.3 2.22", "WHERE": "1.14 2.8",
    "WHILE": "1.15", "ZEROS_LIKE": "1.12",
}  # fmt: skip
"""Operator -> the first runtime with its version 1, 2, ... Source: the table of FindMinimumRuntimeVersionForOp in
tensorflow/compiler/mlir/lite/tools/versioning/runtime_version.cc (state of TensorFlow 2.22)."""


INTEGERS: Mapping[str, Tuple[int, int]] = {
    **dict.fromkeys(
        ("AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "LOGISTIC", "MAX_POOL_2D", "MEAN", "MIRROR_PAD", "PACK",
         "PAD", "PADV2", "REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6", "RSQRT", "SOFTMAX", "TANH", "ADD", "ABS"),
        (2, 3),
    ),
    **dict.fromkeys(("GATHER", "MAXIMUM", "MINIMUM", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "SLICE", "UNPACK",
                     "SPLIT"), (2, 4)),
    **dict.fromkeys(("DEPTH_TO_SPACE", "L2_NORMALIZATION", "REDUCE_PROD", "SPACE_TO_DEPTH", "SQUARED_DIFFERENCE",
                     "STRIDED_SLICE", "SUM"), (2, 2)),
    "CONV_2D": (3, 4), "DEPTHWISE_CONV_2D": (3, 5), "FULLY_CONNECTED": (4, 7), "LEAKY_RELU": (1, 2), "MUL": (3, 4),
    "SUB": (2, 5), "TILE": (3, 3), "TRANSPOSE": (2, 5), "TRANSPOSE_CONV": (3, 3),
}  # fmt: skip
"""Operator -> the version that it needs at least for int8 and for int16 activations. Source: GetBuiltinOperatorVersion
in tensorflow/compiler/mlir/lite/tools/versioning/op_version.cc; for products of int16 with int8 weights, which that
leaves at 1, the version that brought int16 kernels."""

HYBRID: Mapping[str, Tuple[int, int]] = {
    "CONV_2D": (2, 5), "DEPTHWISE_CONV_2D": (4, 6), "FULLY_CONNECTED": (9, 12), "BATCH_MATMUL": (4, 4),
    "EMBEDDING_LOOKUP": (3, 4),
}  # fmt: skip
"""Operator -> the same for float activations and int8 weights of one scale, and of one per channel."""

METADATA = b"min_runtime_version"


def settle(flatbuffer: bytes, asked: Optional[str] = None) -> Tuple[bytes, Optional[str]]:
    """Return the flatbuffer with every operator in the version that it needs, and the oldest TensorFlow Lite for it.

    Quantizing leaves the versions of the float operators. asked, None where not known, and errors: see ``min_runtime``.
    """
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    from portcall.exporters import _tflite

    model = _tflite._read(flatbuffer)
    for op, kind in _tflite.operators(model):
        now = int(model.operatorCodes[op.opcodeIndex].version)
        needed = max(now, _version(model, op, kind))
        if needed != now:
            op.opcodeIndex = _tflite.operator_code(model, kind, needed)
    used = sorted({int(op.opcodeIndex) for graph in model.subgraphs for op in graph.operators})
    for graph in model.subgraphs:
        for op in graph.operators:
            op.opcodeIndex = used.index(int(op.opcodeIndex))
    model.operatorCodes = [model.operatorCodes[index] for index in used]
    oldest = min_runtime(_tflite._write(model), asked)
    entry = next((m for m in model.metadata or [] if m.name == METADATA), None)
    if entry is None:
        entry = schema.MetadataT()
        entry.name, entry.buffer = METADATA, _tflite.new_buffer(model)
        model.metadata = [*(model.metadata or []), entry]
    text = (oldest or "").encode().ljust(16, b"\0")
    model.buffers[entry.buffer].data = np.frombuffer(text, np.uint8)
    return _tflite._write(model), oldest


def _version(model: Any, op: Any, kind: str) -> int:
    """Return the version that an operator needs at least for the types of its operands."""
    from ai_edge_litert.schema_py_generated import TensorType

    tensors = model.subgraphs[0].tensors
    operands = [tensors[i] for i in op.inputs if i >= 0]
    types = [tensor.type for tensor in operands]
    result = tensors[op.outputs[0]]
    if kind == "QUANTIZE":
        return 3 if _scales(result) > 1 else 2 if result.type == TensorType.INT16 else 1
    if kind == "DEQUANTIZE":
        if types[0] in (TensorType.INT16, TensorType.FLOAT16):
            return 3
        return 5 if _scales(operands[0]) > 1 else 2 if types[0] == TensorType.INT8 else 1
    if result.type == TensorType.INT8 and TensorType.INT8 in types:
        return INTEGERS.get(kind, (1, 1))[0]
    if result.type == TensorType.INT16 and TensorType.INT16 in types:
        return INTEGERS.get(kind, (1, 1))[1]
    if (
        kind in HYBRID
        and result.type == TensorType.FLOAT32
        and types[1] in (TensorType.INT8, TensorType.INT4)
    ):
        return HYBRID[kind][_scales(operands[1]) > 1]
    return 1


def _scales(tensor: Any) -> int:
    scale = None if tensor.quantization is None else tensor.quantization.scale
    return 0 if scale is None else len(scale)


def min_runtime(flatbuffer: bytes, asked: Optional[str] = None) -> Optional[str]:
    """Return the oldest TensorFlow Lite that has every operator in its version, as "2.3.0"; None if one is not known.

    asked: a runtime that must suffice. Raises UnsupportedError where it does not: the operators that need more.
    """
    needs = _needs(flatbuffer)
    if asked is not None:
        newer = [
            f"{name} version {version} ({runtime or 'unknown'})"
            for (name, version), runtime in needs.items()
            if runtime is None or _key(runtime) > _key(asked)
        ]
        if newer:
            raise UnsupportedError(
                f"TensorFlow Lite {asked} has not: {', '.join(newer)}",
                "Ask for a newer runtime, or for another precision",
            )
    found = list(needs.values())
    known = [runtime for runtime in found if runtime is not None]
    if not known or len(known) < len(found):
        return None
    newest = max(known, key=_key)
    return ".".join([*newest.split("."), "0", "0"][:3])


def _needs(flatbuffer: bytes) -> Dict[Tuple[str, int], Optional[str]]:
    """Return the runtime that each operator and version needs, None where that is not known."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator

    from portcall.exporters import _tflite

    names = {v: k for k, v in vars(BuiltinOperator).items() if isinstance(v, int)}
    model = _tflite._read(flatbuffer)
    used = {int(op.opcodeIndex) for graph in model.subgraphs for op in graph.operators}
    codes = [code for index, code in enumerate(model.operatorCodes) if index in used]
    found: Dict[Tuple[str, int], Optional[str]] = {}
    for code in codes:
        name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        runtimes: List[str] = RUNTIMES.get(name, "").split()
        fits = 0 < code.version <= len(runtimes) and runtimes[code.version - 1] != "-"
        found[name, int(code.version)] = runtimes[code.version - 1] if fits else None
    return found


def _key(version: str) -> List[int]:
    """Return what versions are compared by; 2.3 equals 2.3.0."""
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    return [*numbers, 0, 0, 0][:3]


def parse_asked(options: Mapping[str, Any]) -> Optional[str]:
    """Return the option min_runtime. Raises UnsupportedError where it is no version."""
    asked = options.get("min_runtime")
    if asked is None:
        return None
    if not all(part.isdigit() for part in str(asked).split(".")):
        raise UnsupportedError(f"tflite.min_runtime is {asked!r}", "Give a version of TensorFlow Lite: 2.11")
    return str(asked)
