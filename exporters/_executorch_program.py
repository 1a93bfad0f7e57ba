"""A .pte file as it lies on disk: the operators of its XNNPACK delegates, what runs outside of them, its arithmetic."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Census
from portcall.targets.agent.errors import CellFailed

QUANTIZED = ("xnn_datatype_qint8", "xnn_datatype_quint8", "xnn_datatype_qdint8")
"""Types of activations on integers; the last one is quantized at run time."""
WEIGHTS = ("xnn_datatype_qint8", "xnn_datatype_qcint8", "xnn_datatype_qcint4", "xnn_datatype_qbint4")
PRODUCTS = ("Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "BatchMatrixMultiply")
KERNEL_PRODUCTS = ("aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::linear")
METHOD = "operators of the .pte file's XNNPACK delegates"


class Value(NamedTuple):
    """A tensor of a delegate. scale: None for floats, and where it is per channel or found at run time."""

    datatype: str
    dims: Tuple[int, ...]
    scale: Optional[float]
    zero_point: Optional[int]
    data: Optional[str]
    """The key of a constant in the file's named data."""
    scales: Tuple[float, ...] = ()
    """Per channel, where they stand beside the tensor."""
    scales_data: Optional[str] = None
    """Per channel: their key in the file's named data."""


class Operator(NamedTuple):
    """An operator of a delegate; *kind* as XNNPACK calls it. fields: of the file's schema (kernel sizes, flags)."""

    kind: str
    inputs: Tuple[Value, ...]
    outputs: Tuple[Value, ...]
    fields: Mapping[str, Any]

    @property
    def is_on_integers(self) -> bool:
        types = [v.datatype for v in self.inputs[:2]]
        if self.kind in PRODUCTS:
            return len(types) == 2 and types[0] in QUANTIZED and types[1] in WEIGHTS
        return any(v.datatype in QUANTIZED for v in (*self.inputs, *self.outputs))


class Program(NamedTuple):
    """delegates: operators of each. outside: portable operators with the sizes of their tensors. data: named data.

    payloads: of the delegates, as they lie in the file. Scales of single tensors in *delegates* have six decimals
    (flatc writes no more), in a payload all of float32's bits.
    """

    delegates: Tuple[Tuple[Operator, ...], ...]
    outside: Tuple[Tuple[str, Tuple[Tuple[int, ...], ...]], ...]
    data: Mapping[str, bytes]
    payloads: Tuple[bytes, ...] = ()


def read(path: Path) -> Program:
    """Return what the file at *path* holds. Raises CellFailed for a file that is damaged or no ExecuTorch program."""
    from portcall.exporters._executorch import first_line, quiet

    with quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        try:
            file = deserialize_pte_binary(path.read_bytes())
            return _program(file)
        except Exception as error:  # struct, flatbuffers and flatc raise many kinds
            raise CellFailed(
                f"{path.name} is no readable ExecuTorch program: {first_line(error)}", "Export it again"
            ) from error


def _program(file: Any) -> Program:
    from executorch.exir.schema import DelegateCall, KernelCall, Tensor

    [plan] = [p for p in file.program.execution_plan if p.name == "forward"]
    delegates: List[Tuple[Operator, ...]] = []
    outside: List[Tuple[str, Tuple[Tuple[int, ...], ...]]] = []
    payloads: List[bytes] = []
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if isinstance(call, DelegateCall):
                delegate = plan.delegates[call.delegate_index]
                content = bytes(file.program.backend_delegate_data[delegate.processed.index].data)
                payloads.append(content)
                delegates.append(_operators(content) if delegate.id == "XnnpackBackend" else ())
            elif isinstance(call, KernelCall):
                op = plan.operators[call.op_index]
                values = [plan.values[i].val for i in call.args]
                sizes = tuple(tuple(v.sizes) for v in values if isinstance(v, Tensor))
                outside.append((f"{op.name}.{op.overload}" if op.overload else op.name, sizes))
    named = file.named_data
    data = {} if named is None else {k: _bytes(named, entry) for k, entry in named.pte_data.items()}
    return Program(tuple(delegates), tuple(outside), data, tuple(payloads))


def _bytes(named: Any, entry: Any) -> bytes:
    buffer = named.buffers[entry.buffer_index]
    return bytes(buffer)


def _operators(content: bytes) -> Tuple[Operator, ...]:
    """Return the operators of a delegate's payload: a header, a flatbuffer of XNNPACK's schema, constants."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    header = XNNHeader.from_bytes(content[: XNNHeader.EXPECTED_LENGTH])
    end = header.flatbuffer_offset + header.flatbuffer_size
    graph = _json(content[header.flatbuffer_offset : end])
    keys = [entry.get("named_key") or None for entry in graph["constant_data"]]
    values = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        tensor, scales = value.get("tensor_value", value), value.get("quant_params", {})
        number = tensor["constant_buffer_idx"]
        found, place = scales.get("scale"), scales.get("scale_buffer_idx", -1)
        values[tensor["id_out"]] = Value(
            tensor["datatype"],
            tuple(tensor["dims"]),
            found if isinstance(found, (int, float)) else None,
            scales.get("zero_point"),
            keys[number] if number < len(keys) else None,
            tuple(found) if isinstance(found, list) else (),
            keys[place] if 0 <= place < len(keys) else None,
        )
    return tuple(_operator(node, values) for node in graph["xnodes"])


def _operator(node: Mapping[str, Any], values: Mapping[int, Value]) -> Operator:
    fields = node["xnode_union"]
    names = ("input_id", "input1_id", "filter_id", "input2_id", "bias_id", "input3_id", "input4_id")
    inputs = tuple(values[fields[n]] for n in names if fields.get(n) in values)
    outputs = tuple(values[fields[n]] for n in ("output_id",) if fields.get(n) in values)
    return Operator(node["xnode_union_type"][len("XNN") :], inputs, outputs, fields)


def _json(flatbuffer: bytes) -> Dict[str, Any]:
    """Return a flatbuffer of XNNPACK's schema as JSON, by the flatc of ExecuTorch's package."""
    import json
    import tempfile

    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schema.fbs").write_bytes(_get_schema_bytes())
        (folder / "graph.bin").write_bytes(flatbuffer)
        _flatc_decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        text = (folder / "graph.json").read_text()
    # flatc writes infinite bounds as bare words, which JSON does not have.
    found: Dict[str, Any] = json.loads(re.sub(r":\s*(-?)\+?inf\b", r": \g<1>1e999", text))
    return found


def census(path: Path) -> Census:
    """Count the arithmetic of the file at *path*: a product is on integers if its input and its weights are.

    A file has no names: products in float are named by kind, number and sizes.
    """
    program = read(path)
    total = integer = quantized = 0
    floats: List[str] = []
    for number, operator in enumerate(op for ops in program.delegates for op in ops):
        quantized += operator.is_on_integers
        if operator.kind not in PRODUCTS:
            continue
        macs = macs_of(operator)
        total += macs
        if operator.is_on_integers:
            integer += macs
        else:
            floats.append(f"{operator.kind} {number} {list(operator.inputs[1].dims)}")
    for name, sizes in program.outside:
        if name.partition(".")[0] in KERNEL_PRODUCTS:
            total += _kernel_macs(name, sizes)
            floats.append(f"{name} {list(sizes[0])}")
    return Census(quantized, total, integer, tuple(floats), METHOD)


def macs_of(operator: Operator) -> int:
    """Return the multiply-accumulates of a product."""
    fields, first, made = operator.fields, operator.inputs[0].dims, operator.outputs[0].dims
    if operator.kind in ("FullyConnected", "BatchMatrixMultiply"):
        return math.prod(made) * first[-1]
    kernel = int(fields["kernel_height"]) * int(fields["kernel_width"])
    if operator.kind == "ConvTranspose2d":
        return math.prod(first) * kernel * int(fields["group_output_channels"])
    return math.prod(made) * kernel * int(fields["group_input_channels"])


def _kernel_macs(name: str, sizes: Sequence[Tuple[int, ...]]) -> int:
    """Return the multiply-accumulates of a portable kernel; its output is its last tensor."""
    if name.startswith("aten::convolution"):
        return math.prod(sizes[-1]) * math.prod(sizes[1][1:])
    first = sizes[1] if name.startswith("aten::addmm") else sizes[0]
    return math.prod(sizes[-1]) * first[-1]
