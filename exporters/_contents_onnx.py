"""What an ONNX file holds: float, float16 and integer weights behind Cast and DequantizeLinear, MatMulNBits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from portcall.targets.agent.contents import Contents, Weight
from portcall.targets.agent.contract import Dim, TensorSpec
from portcall.targets.agent.errors import BadInput
from portcall.targets.agent.stored import (
    Stored,
    integers,
    signs_of,
    spread,
    swapped,
    unpacked,
    upright,
    weight,
)

QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
WEIGHT_INPUTS: Mapping[str, Tuple[Tuple[int, Optional[int], Optional[int]], ...]] = {
    "Conv": ((1, None, None),),
    "FusedConv": ((1, None, None),),
    "ConvTranspose": ((1, None, None),),
    "Gemm": ((1, None, None), (0, None, None)),
    "MatMul": ((1, None, None), (0, None, None)),
    "FusedMatMul": ((1, None, None), (0, None, None)),
    "ConvInteger": ((1, None, 3),),
    "MatMulInteger": ((1, None, 3), (0, None, 2)),
    "QLinearConv": ((3, 4, 5),),
    "QLinearMatMul": ((3, 4, 5), (0, 1, 2)),
    "QGemm": ((3, 4, 5), (0, 1, 2)),
    "DynamicQuantizeMatMul": ((1, 2, 3),),
    "MatMulIntegerToFloat": ((1, 3, 5), (0, 2, 4)),
    "Gather": ((0, None, None),),
    "LSTM": ((1, None, None), (2, None, None)),
    "GRU": ((1, None, None), (2, None, None)),
    "RNN": ((1, None, None), (2, None, None)),
}
"""Operator -> the inputs that may be its weight, each with the inputs of its scale and zero point, if it has any."""
FLOATS = ("float32", "float16", "bfloat16", "float64")


def read(path: Path, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    """Return the contents of an ONNX file, external data included.

    shapes: of its inputs, for multiply-accumulates; they are counted on one run in ONNX Runtime, and None (with a note)
    where it is not installed or cannot run the file, or a shape is unknown; empty: they are not counted. Raises
    BadInput for a file that is no ONNX model.
    """
    import onnx

    try:
        model = onnx.load(str(path))
        graph_inputs = [
            v for v in model.graph.input if v.name not in {t.name for t in model.graph.initializer}
        ]
        inputs = tuple(_spec(v) for v in graph_inputs)
        outputs = tuple(_spec(v) for v in model.graph.output)
    except Exception as error:  # protobuf raises its own kinds, onnx others for external data
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} is not a readable ONNX model: {first}", "Export it again") from error
    if not model.graph.node and not model.graph.output:
        raise BadInput(f"{path} is not a readable ONNX model: it holds no graph", "Export it again")
    macs, notes = _count_macs(path, inputs, shapes) if shapes else (None, ())
    reader = _Reader(model, macs or {})
    weights = reader.weights()
    other, zeros = reader.others()
    return Contents(
        format="onnx",
        inputs=inputs,
        outputs=outputs,
        weights=tuple(weights),
        operators=Counter(n.op_type for n in reader.nodes),
        quantize_nodes=_count_quantizing(reader.nodes),
        other_parameters=other,
        other_zeros=zeros,
        macs=None if macs is None else sum(macs.values()),
        notes=notes,
    )


def _spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    dims: List[Dim] = []
    for axis, dim in enumerate(tensor.shape.dim):
        fixed = dim.HasField("dim_value") and dim.dim_value > 0
        dims.append(int(dim.dim_value) if fixed else dim.dim_param or f"dim_{axis}")
    known = tensor.elem_type not in (0, onnx.TensorProto.STRING)
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if known else "unknown"
    return TensorSpec(value.name, tuple(dims), dtype)


def _count_quantizing(nodes: List[Any]) -> int:
    from portcall.exporters import _onnx

    return sum(n.op_type in (*QUANTIZING, *_onnx.INTEGER_OPS) for n in nodes)


def _count_macs(
    path: Path, inputs: Tuple[TensorSpec, ...], shapes: Mapping[str, Tuple[int, ...]]
) -> Tuple[Optional[Dict[str, int]], Tuple[str, ...]]:
    """Return the multiply-accumulates of each product by the name of its first output, or None and why not."""
    missing = [t.name for t in inputs if t.name not in shapes]
    if missing:
        return None, (f"no multiply-accumulates: the shape of input {missing[0]!r} is dynamic; give --shape",)
    try:
        import onnxruntime
    except ImportError as error:
        return None, (
            f"no multiply-accumulates: they are counted on a run, and there is no onnxruntime: {error}",
        )
    import onnx

    from portcall.exporters import _onnx

    model = onnx.load(str(path), load_external_data=False)
    constants = {t.name: tuple(t.dims) for t in model.graph.initializer}
    products = [
        n for n in model.graph.node if n.op_type in (*_onnx.COMPUTE_OPS, *_onnx.INTEGER_OPS, "MatMulNBits")
    ]
    names = {name for n in products for name in [*n.input, *n.output] if name} - set(constants)
    try:
        found = {**constants, **_onnx.observed_shapes(path, model, names, shapes)}
        return {n.output[0]: _macs(n, found) for n in products}, ()
    except Exception as error:  # onnxruntime raises its own kinds for a file that it cannot run
        assert onnxruntime is not None
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, (f"no multiply-accumulates: ONNX Runtime cannot run it here: {first}",)


def _macs(node: Any, shapes: Mapping[str, Tuple[int, ...]]) -> int:
    from portcall.exporters import _onnx
    from portcall.exporters._operands import attribute

    if node.op_type != "MatMulNBits":
        return _onnx._macs(node, shapes)
    result = int(attribute(node, "K", 0))
    for dim in shapes[node.output[0]]:
        result *= dim
    return result


class _Reader:
    """Finds the constant weight of each layer of a model; counts what is left. macs: see ``_count_macs``."""

    def __init__(self, model: Any, macs: Mapping[str, int]) -> None:
        self.nodes: List[Any] = []
        self._constants: Dict[str, Any] = {}
        self._macs = macs
        self._collect(model.graph)
        self._made_by = {name: node for node in self.nodes for name in node.output if name}
        self._used: Set[str] = set()

    def _collect(self, graph: Any) -> None:
        """Take in a graph, and the bodies of its control flow."""
        self._constants.update({t.name: t for t in graph.initializer})
        for node in graph.node:
            self.nodes.append(node)
            if node.op_type == "Constant":
                held = [a.t for a in node.attribute if a.name == "value"]
                self._constants.update(zip(node.output, held))
            for attribute in node.attribute:
                for body in [attribute.g, *attribute.graphs]:
                    if body.node:
                        self._collect(body)

    def weights(self) -> List[Weight]:
        found = []
        for node in self.nodes:
            if node.op_type == "MatMulNBits":
                found.append(self._n_bits(node))
                continue
            for index, scale, zero in WEIGHT_INPUTS.get(node.op_type, ()):
                stored = self._stored(node.input[index]) if len(node.input) > index else None
                if (
                    stored is None
                    or stored.values.ndim < 2
                    or (node.op_type == "Gather" and not _is_table(node, stored))
                ):
                    continue
                found.append(self._described(node, index, self._with_scale(node, stored, scale, zero)))
                if node.op_type not in ("LSTM", "GRU", "RNN"):
                    break
        return found

    def _with_scale(self, node: Any, stored: Stored, scale: Optional[int], zero: Optional[int]) -> Stored:
        """Return *stored* with the scale and zero point that its operator takes as inputs."""
        scales = self._array(node, scale)
        zeros = self._array(node, zero)
        if scales is None and zeros is None:
            return stored
        axis = 0 if "Conv" in node.op_type else stored.values.ndim - 1
        return integers(stored.tensor, stored.values, scales, zeros, axis, 0, stored.dtype, stored.bits)

    def _array(self, node: Any, index: Optional[int]) -> Any:
        if index is None or len(node.input) <= index or not node.input[index]:
            return None
        return self._value(node.input[index])

    def _value(self, name: str) -> Any:
        """Return the array of a constant, which is then no parameter of its own; None where it is computed."""
        from onnx import numpy_helper

        if name not in self._constants:
            return None
        self._used.add(name)
        return numpy_helper.to_array(self._constants[name])

    def _stored(self, name: str) -> Optional[Stored]:
        """Return the constant *name*, or what a node makes of constants alone; None where it is computed."""
        import numpy as np
        import onnx
        from onnx import numpy_helper

        from portcall.exporters._operands import attribute

        if name in self._constants:
            tensor = self._constants[name]
            self._used.add(name)
            dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            array = numpy_helper.to_array(tensor)
            if array.dtype.kind == "V" or array.dtype.name.startswith(
                ("int4", "uint4", "int2", "uint2", "bfloat")
            ):
                array = array.astype(np.float32 if "float" in array.dtype.name else np.int8)
            dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
            bits = int("".join(c for c in dtype if c.isdigit()) or 8)
            return Stored(name, tuple(array.shape), dtype, bits, array)
        node = self._made_by.get(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node)
        if node.op_type not in ("Cast", "Identity", "Transpose", "Reshape"):
            return None
        held = self._stored(node.input[0])
        if held is None:
            return None
        if node.op_type == "Transpose":
            axes = attribute(node, "perm", list(range(held.values.ndim))[::-1])
            return held._replace(values=held.values.transpose(axes))
        if node.op_type == "Reshape":
            shape = self._value(node.input[1])
            return None if shape is None or 0 in shape else held._replace(values=held.values.reshape(shape))
        return held

    def _dequantized(self, node: Any) -> Optional[Stored]:
        """Return what a DequantizeLinear makes of a constant, or of one that a QuantizeLinear rounds."""
        import numpy as np

        from portcall.exporters._operands import attribute

        axis, block = int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))
        scale, zero = self._array(node, 1), self._array(node, 2)
        if scale is None:
            return None
        maker = self._made_by.get(node.input[0])
        if maker is not None and maker.op_type == "QuantizeLinear":
            held = self._stored(maker.input[0])
            if held is None or held.dtype not in FLOATS:
                return None
            steps = spread(np.asarray(scale, np.float64), held.values.shape, axis, block)
            zeros = (
                0
                if zero is None
                else spread(np.asarray(zero).astype(np.int64), held.values.shape, axis, block)
            )
            limits = np.iinfo(np.uint8 if zero is None else np.asarray(zero).dtype)
            rounded = np.clip(np.rint(held.values / steps) + zeros, limits.min, limits.max)
            return held._replace(values=signs_of(rounded, zeros), scale=scale, zero_point=zero)
        held = self._stored(node.input[0])
        if held is None:
            return None
        return integers(held.tensor, held.values, scale, zero, axis, block, held.dtype, held.bits)

    def _described(self, node: Any, index: int, stored: Stored) -> Weight:
        from portcall.exporters._operands import attribute

        name, kind, groups = node.name or node.output[0], node.op_type, int(attribute(node, "group", 1))
        macs, rank = self._macs.get(node.output[0]), stored.values.ndim
        if kind == "ConvTranspose":
            return weight(name, kind, stored, swapped(stored.values, groups), (1, 0), groups, macs)
        if "Conv" in kind:
            return weight(name, kind, stored, stored.values, (0, 1), groups, macs)
        if kind in ("Gather", "LSTM", "GRU", "RNN"):
            signs = stored.values.reshape(-1, stored.values.shape[-1])
            part = {1: ".W", 2: ".R"}.get(index, "") if kind != "Gather" else ""
            return weight(name + part, kind, stored, signs, (rank - 2, rank - 1), 1, macs)
        turned = bool(attribute(node, "transA" if index in (0,) else "transB", 0))
        left = index == 0
        # A right operand is [inputs, outputs], a left one [outputs, inputs]; an attribute turns either.
        inputs_last = left != turned
        axes = (rank - 2, rank - 1) if inputs_last else (rank - 1, rank - 2)
        return weight(name, kind, stored, upright(stored.values, inputs_last), axes, 1, macs)

    def _n_bits(self, node: Any) -> Weight:
        """Read ONNX Runtime's MatMulNBits: uint8[outputs, blocks, bytes], zero points packed alike (default: half)."""
        import numpy as np

        from portcall.exporters._operands import attribute

        bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 32))
        inputs, outputs = int(attribute(node, "K", 0)), int(attribute(node, "N", 0))
        packed = np.ascontiguousarray(self._value(node.input[1]))
        blocks = -(-inputs // block)
        values = unpacked(packed.tobytes(), bits, outputs * blocks * block, False).reshape(
            outputs, blocks, block
        )
        scale, zero = self._array(node, 2), self._array(node, 3)
        if zero is not None and zero.dtype == np.uint8:
            row = zero.size // outputs
            each = [unpacked(r.tobytes(), bits, blocks, False) for r in zero.reshape(outputs, row)]
            zero = np.stack(each).astype(np.int64)
        points = (
            np.full((outputs, blocks), 1 << (bits - 1))
            if zero is None
            else np.reshape(zero, (outputs, blocks))
        )
        signs = signs_of(values.astype(np.float64), points[:, :, None])
        # ONNX Runtime's own tool lets a scale be negative.
        signs = np.where(np.reshape(scale, (outputs, blocks, 1)) < 0, -signs, signs)
        signs = signs.reshape(outputs, -1)[:, :inputs]
        stored = Stored(node.input[1], tuple(packed.shape), f"uint{bits}", bits, signs, scale, points)
        return weight(
            node.name or node.output[0],
            node.op_type,
            stored,
            signs,
            (0, None),
            1,
            self._macs.get(node.output[0]),
        )

    def others(self) -> Tuple[int, int]:
        """Return the elements of the float constants beside weights, scales and zero points, and how many are 0.

        Biases of integers behind a DequantizeLinear count; scalars do not.
        """
        import numpy as np

        for node in self.nodes:
            if node.op_type in QUANTIZING or node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm"):
                plain = (
                    node.input[1:]
                    if node.op_type in QUANTIZING
                    else [n for n in node.input if n not in self._used]
                )
                self._used.update(n for n in plain if n)
        biases = {
            n.input[0]
            for n in self.nodes
            if n.op_type == "DequantizeLinear" and n.input[0] in self._constants
        }
        from onnx import TensorProto, numpy_helper

        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
        count = zeros = 0
        for name, tensor in self._constants.items():
            if (
                name in self._used
                or not tensor.dims
                or (tensor.data_type not in floats and name not in biases)
            ):
                continue
            array = numpy_helper.to_array(tensor)
            count += int(array.size)
            zeros += int(array.size - np.count_nonzero(array.astype(np.float64)))
        return count, zeros


def _is_table(node: Any, stored: Stored) -> bool:
    """Tell whether a Gather reads an embedding: rows of a float matrix."""
    from portcall.exporters._operands import attribute

    floats = stored.dtype in FLOATS or stored.scale is not None
    return floats and stored.values.ndim == 2 and int(attribute(node, "axis", 0)) == 0
