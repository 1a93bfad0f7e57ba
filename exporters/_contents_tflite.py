"""What a flatbuffer (.tflite) holds: float, float16 and integer weights, also packed or behind DEQUANTIZE."""

from __future__ import annotations

import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from portcall.targets.agent.contents import Contents, Weight
from portcall.targets.agent.contract import Dim, TensorSpec
from portcall.targets.agent.errors import BadInput
from portcall.targets.agent.stored import Stored, integers, unpacked, upright, weight

LAYOUTS: Mapping[str, Tuple[Tuple[int, ...], int, int]] = {
    "CONV_2D": ((0, 3, 1, 2), 0, 3),
    "DEPTHWISE_CONV_2D": ((3, 0, 1, 2), 3, 0),
    "TRANSPOSE_CONV": ((0, 3, 1, 2), 0, 3),
    "CONV_3D": ((4, 3, 0, 1, 2), 4, 3),
    "FULLY_CONNECTED": ((0, 1), 0, 1),
    "EMBEDDING_LOOKUP": ((0, 1), 0, 1),
    "GATHER": ((0, 1), 0, 1),
}
"""Operator -> the order of axes that gives [outputs, inputs, *kernel], and the axes of outputs and inputs."""
WEIGHT_INPUTS: Mapping[str, Tuple[int, ...]] = {
    "GATHER": (0,),
    "BATCH_MATMUL": (1, 0),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": tuple(range(1, 9)),
    "LSTM": tuple(range(1, 9)),
    "SVDF": (1, 2),
}
"""Where that is not input 1."""
RECURRENT = ("UNIDIRECTIONAL_SEQUENCE_LSTM", "LSTM", "SVDF")
BITS: Mapping[str, int] = {
    "float32": 32, "float16": 16, "bfloat16": 16, "float64": 64, "int64": 64, "int32": 32, "int16": 16, "int8": 8,
    "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "bool": 8,
}  # fmt: skip


def read(path: Path) -> Contents:
    """Return the contents of a flatbuffer, every subgraph included. Raises BadInput for a file that is none."""
    from portcall.exporters import _tflite

    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise BadInput(f"{path} is no TFLite flatbuffer: it has no mark TFL3", "Export it again")
    try:
        model = _tflite._read(data)
        reader = _Reader(model)
        weights = reader.weights()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        # The generated code reads wherever a broken file points.
        raise BadInput(f"{path} is no readable TFLite flatbuffer: {error}", "Export it again") from error
    other, zeros = reader.others()
    graph = model.subgraphs[0]
    found = _tflite.census(path)
    return Contents(
        format="tflite",
        inputs=tuple(reader.spec(graph, int(i)) for i in graph.inputs),
        outputs=tuple(reader.spec(graph, int(i)) for i in graph.outputs),
        weights=tuple(weights),
        operators=Counter(kind for _, _, kind in reader.operators),
        quantize_nodes=found.quantize_nodes,
        other_parameters=other,
        other_zeros=zeros,
        macs=found.macs,
        notes=tuple(reader.notes),
    )


class _Reader:
    def __init__(self, model: Any) -> None:
        from ai_edge_litert.schema_py_generated import BuiltinOperator, TensorType

        self._model = model
        self._types = {v: k.lower() for k, v in vars(TensorType).items() if isinstance(v, int)}
        names = {v: k for k, v in vars(BuiltinOperator).items() if isinstance(v, int)}
        codes = [names[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in model.operatorCodes]
        self.operators = [(g, op, codes[op.opcodeIndex]) for g in model.subgraphs for op in g.operators]
        self._made_by: Dict[Tuple[int, int], Tuple[Any, str]] = {
            (id(g), int(o)): (op, kind) for g, op, kind in self.operators for o in op.outputs
        }
        self._used: Set[int] = set()
        self.notes: List[str] = []

    def spec(self, graph: Any, index: int) -> TensorSpec:
        """Return an input or output by the name that the signature gives it."""
        tensor = graph.tensors[index]
        maps = [m for s in self._model.signatureDefs or [] for m in [*s.inputs, *s.outputs]]
        name = next((m.name for m in maps if int(m.tensorIndex) == index), tensor.name).decode()
        given = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
        dims: List[Dim] = [
            int(d) if d >= 0 else f"dim_{i}" for i, d in enumerate(given if given is not None else [])
        ]
        return TensorSpec(name, tuple(dims), self._types[tensor.type])

    def weights(self) -> List[Weight]:
        found: List[Weight] = []
        for graph, op, kind in self.operators:
            if kind not in LAYOUTS and kind not in WEIGHT_INPUTS:
                continue
            for index in WEIGHT_INPUTS.get(kind, (1,)):
                stored = self._stored(graph, int(op.inputs[index])) if len(op.inputs) > index else None
                if (
                    stored is None
                    or stored.values.ndim < 2
                    or (kind == "GATHER" and not self._is_table(stored, op))
                ):
                    continue
                found.append(self._described(graph, op, kind, index, stored))
                if kind not in RECURRENT:
                    break
        return found

    @staticmethod
    def _is_table(stored: Stored, op: Any) -> bool:
        """Tell whether a GATHER reads an embedding: rows of a matrix of weights."""
        weighs = stored.dtype.startswith("float") or stored.scale is not None
        return weighs and stored.values.ndim == 2 and not getattr(op.builtinOptions, "axis", 0)

    def _stored(self, graph: Any, index: int) -> Optional[Stored]:
        """Return constant *index*, or what a DEQUANTIZE or CAST makes of one; None where it is computed."""
        import numpy as np

        if index < 0:
            return None
        maker = self._made_by.get((id(graph), index))
        if maker is not None:
            op, kind = maker
            return self._stored(graph, int(op.inputs[0])) if kind in ("DEQUANTIZE", "CAST") else None
        tensor = graph.tensors[index]
        data = self._model.buffers[tensor.buffer].data
        if data is None or not len(data):
            return None
        name, dtype = tensor.name.decode(), self._types[tensor.type]
        if tensor.sparsity is not None:
            self.notes.append(f"{name}: stored in TFLite's sparse form, which is not read")
            self._used.add(tensor.buffer)
            return None
        shape, bits = tuple(int(d) for d in tensor.shape), BITS.get(dtype)
        if bits is None:
            return None
        self._used.add(tensor.buffer)
        raw = bytes(data)
        if bits < 8:
            values = unpacked(raw, bits, math.prod(shape), not dtype.startswith("uint")).reshape(shape)
        elif dtype == "bfloat16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        else:
            values = np.frombuffer(raw, np.dtype(dtype)).reshape(shape)
        quantized = tensor.quantization
        scale = None if quantized is None else quantized.scale
        if scale is None or not len(scale):
            return Stored(name, shape, dtype, bits, values)
        zero = quantized.zeroPoint if quantized.zeroPoint is not None and len(quantized.zeroPoint) else None
        return integers(name, values, scale, zero, int(quantized.quantizedDimension), 0, dtype, bits)

    def _described(self, graph: Any, op: Any, kind: str, index: int, stored: Stored) -> Weight:
        from portcall.exporters import _tflite

        output = graph.tensors[op.outputs[0]]
        name = output.name.decode()
        options, rank = op.builtinOptions, stored.values.ndim
        macs = None
        if kind in _tflite.COMPUTE_OPS:
            shapes = [tuple(int(d) for d in graph.tensors[i].shape) for i in op.inputs if i >= 0]
            out = tuple(int(d) for d in output.shape)
            macs = _tflite._macs(kind, shapes, out, bool(getattr(options, "adjX", False)))
        if kind == "BATCH_MATMUL":
            turned = bool(getattr(options, "adjX" if index == 0 else "adjY", False))
            inputs_last = (index == 0) != turned
            axes = (rank - 2, rank - 1) if inputs_last else (rank - 1, rank - 2)
            return weight(name, kind, stored, upright(stored.values, inputs_last), axes, 1, macs)
        if kind in RECURRENT:
            return weight(f"{name}.{index}", kind, stored, stored.values, (0, 1), 1, macs)
        order, outputs, inputs = LAYOUTS[kind]
        groups = 1
        if kind == "CONV_2D":
            groups = max(1, int(graph.tensors[op.inputs[0]].shape[-1]) // stored.shape[3])
        elif kind == "DEPTHWISE_CONV_2D":
            groups = int(graph.tensors[op.inputs[0]].shape[-1])
        signs = stored.values.transpose(order)
        return weight(name, kind, stored, signs, (outputs, inputs), groups, macs)

    def others(self) -> Tuple[int, int]:
        """Return the elements of the other constants that weigh (floats, integers with scales), and their zeros."""
        import numpy as np

        count = zeros = 0
        seen = set(self._used)
        for graph in self._model.subgraphs:
            for index, tensor in enumerate(graph.tensors):
                data = self._model.buffers[tensor.buffer].data
                held = tensor.quantization
                scaled = held is not None and held.scale is not None and len(held.scale)
                floats = self._types[tensor.type].startswith(("float", "bfloat"))
                if data is None or not len(data) or tensor.buffer in seen or not (scaled or floats):
                    continue
                seen.add(tensor.buffer)
                stored = self._stored(graph, index)
                if stored is not None and stored.values.ndim:
                    count += int(stored.values.size)
                    zeros += int(stored.values.size - np.count_nonzero(stored.values))
        return count, zeros
