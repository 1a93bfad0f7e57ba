"""What a .pte file holds in its XNNPACK delegates. It has no names: layers go by kind and number."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Dict, List, Mapping, Tuple

from portcall.exporters._executorch_program import (
    KERNEL_PRODUCTS,
    PRODUCTS,
    Operator,
    Program,
    census,
    macs_of,
)
from portcall.exporters._executorch_program import read as read_program
from portcall.targets.agent.contents import Contents, Weight
from portcall.targets.agent.contract import Artifact, TensorSpec
from portcall.targets.agent.stored import Stored, integers, weight

LAYOUTS: Mapping[str, Tuple[Tuple[int, ...], int, int]] = {
    "Conv2d": ((0, 3, 1, 2), 0, 3),
    "DepthwiseConv2d": ((3, 0, 1, 2), 3, 0),
    "ConvTranspose2d": ((0, 3, 1, 2), 0, 3),
    "FullyConnected": ((0, 1), 0, 1),
}
"""Operator -> the order of axes that gives [outputs, inputs, *kernel], and the axes of outputs and inputs."""
DTYPES: Mapping[str, Tuple[str, str]] = {
    "xnn_datatype_fp32": ("float32", "float32"),
    "xnn_datatype_fp16": ("float16", "float16"),
    "xnn_datatype_qint8": ("int8", "int8"),
    "xnn_datatype_qcint8": ("int8", "int8"),
}
"""XNNPACK's type of a constant -> NumPy's, and what it is called."""


def read(artifact: Artifact) -> Contents:
    """Return the contents of the program of *artifact*. Raises CellFailed for a file that is damaged or none."""
    program = read_program(artifact.path)
    operators = [op for ops in program.delegates for op in ops]
    weights: List[Weight] = []
    unread = 0
    for number, operator in enumerate(operators):
        stored = _stored(program, operator) if operator.kind in LAYOUTS else None
        if stored is not None:
            weights.append(_described(operator, number, stored))
        elif operator.kind in PRODUCTS and operator.kind != "BatchMatrixMultiply":
            unread += 1
    found = census(artifact.path)
    notes: List[str] = []
    if unread:
        notes.append(f"{unread} weights are of a type that is not read")
    kernels = Counter(name.partition(".")[0] for name, _ in program.outside)
    weighted = sorted({*KERNEL_PRODUCTS, "aten::embedding"} & set(kernels))
    if weighted:
        notes.append(f"weights of operators outside of XNNPACK are not read: {', '.join(weighted)}")
    used = {w.tensor for w in weights}
    biases = [
        v for op in operators for v in op.inputs[2:] if v.data is not None and v.data not in used and v.dims
    ]
    return Contents(
        format="executorch",
        inputs=tuple(TensorSpec(t.name, t.shape, t.dtype) for t in artifact.inputs),
        outputs=tuple(TensorSpec(t.name, t.shape, t.dtype) for t in artifact.outputs),
        weights=tuple(weights),
        operators={**Counter(op.kind for op in operators), **kernels},
        quantize_nodes=found.quantize_nodes,
        other_parameters=sum(math.prod(v.dims) for v in biases),
        other_zeros=sum(_zeros(program.data, v) for v in biases),
        macs=found.macs,
        notes=tuple(notes),
    )


def _stored(program: Program, operator: Operator) -> Any:
    """Return the constant weight of an operator, or None."""
    import numpy as np

    value = operator.inputs[1] if len(operator.inputs) > 1 else None
    if value is None or value.data not in program.data or value.datatype not in DTYPES:
        return None
    kind, name = DTYPES[value.datatype]
    array = np.frombuffer(program.data[str(value.data)], kind)[: math.prod(value.dims)].reshape(value.dims)
    if name != "int8":
        return Stored(str(value.data), tuple(value.dims), name, 8 * array.itemsize, array)
    axis = LAYOUTS[operator.kind][1]
    scales: Any = value.scale if value.scale is not None else value.scales
    if value.scales_data in program.data:  # the buffer may be longer
        scales = np.frombuffer(program.data[str(value.scales_data)], np.float32)[: value.dims[axis]]
    return integers(str(value.data), array, np.asarray(scales, np.float32), None, axis, 0, name, 8)


def _described(operator: Operator, number: int, stored: Stored) -> Weight:
    order, outputs, inputs = LAYOUTS[operator.kind]
    groups = int(operator.fields.get("groups", 1))
    name = f"{operator.kind} {number}"
    signs = stored.values.transpose(order)
    return weight(name, operator.kind, stored, signs, (outputs, inputs), groups, macs_of(operator))


def _zeros(data: Mapping[str, bytes], value: Any) -> int:
    """Return the zeros of a bias: float32 or int32."""
    import numpy as np

    kinds: Dict[str, Any] = {"xnn_datatype_fp32": np.float32}
    found = np.frombuffer(data[value.data], kinds.get(value.datatype, np.int32))[: math.prod(value.dims)]
    return int(found.size - np.count_nonzero(found))
