"""The inputs and outputs that a device sees: floats or integers, in the source's order of axes or the operators'."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Tuple

from portcall.targets.agent.contract import BoundTensor, Source, TensorSpec
from portcall.targets.agent.errors import UnsupportedError

TYPES: Mapping[str, str] = {"int8": "INT8", "int16x8": "INT16"}
"""Precisions with integer activations -> the type of those."""


def with_interface(
    flatbuffer: bytes, precision: str, options: Mapping[str, Any], backend: str
) -> Tuple[bytes, Dict[str, Tuple[int, ...]], Tuple[str, ...]]:
    """Return the flatbuffer with the inputs and outputs that the options io and layout ask for; permutations; notes.

    Raises UnsupportedError for integers that the precision has not, and for what ``with_integer_interface`` refuses.
    """
    from portcall.exporters import _tflite_layout

    notes: Tuple[str, ...] = ()
    permutations: Dict[str, Tuple[int, ...]] = {}
    wanted = options.get("io") or "float"
    if wanted != "float":
        if TYPES[precision].lower() != wanted:
            raise UnsupportedError(
                f"{backend}.io={wanted} does not go with {precision}", "int8 has int8, int16x8 has int16"
            )
        flatbuffer, notes = with_integer_interface(flatbuffer, precision)
    if options.get("layout") == "channels_last":
        flatbuffer, permutations = _tflite_layout.with_channels_last(flatbuffer)
        moved = ", ".join(f"{name} {list(order)}" for name, order in permutations.items())
        notes += (f"channels last, axes of the source's tensors: {moved or 'none needed it'}",)
    return flatbuffer, permutations, notes


def bound(
    flatbuffer: bytes, permutations: Mapping[str, Tuple[int, ...]], source: Source
) -> Tuple[Tuple[BoundTensor, ...], Tuple[BoundTensor, ...]]:
    """Return the inputs and the outputs of the flatbuffer beside the source's."""
    found = interface(flatbuffer)

    def one(spec: TensorSpec) -> BoundTensor:
        dtype, shape, scale, zero_point = found[spec.name]
        return BoundTensor(spec.name, spec.name, shape, dtype, permutations.get(spec.name), scale, zero_point)

    return tuple(map(one, source.inputs)), tuple(map(one, source.outputs))


def with_integer_interface(flatbuffer: bytes, precision: str) -> Tuple[bytes, Tuple[str, ...]]:
    """Return the flatbuffer without the QUANTIZE after its inputs and the DEQUANTIZE before its outputs, and notes.

    Inputs and outputs that are no floats stay; so does a DEQUANTIZE that operators read as well.
    Raises UnsupportedError for a float one that something else than that operator reads or makes: it stayed in float.
    """
    from ai_edge_litert.schema_py_generated import TensorType

    from portcall.exporters import _tflite

    model = _tflite._read(flatbuffer)
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    wanted = getattr(TensorType, TYPES[precision])
    kinds = _tflite.operators(model)
    dropped: List[Any] = []
    replaced: Dict[str, Dict[int, int]] = {"input": {}, "output": {}}
    for end, indices in (("input", graph.inputs), ("output", graph.outputs)):
        for index in map(int, indices):
            if graph.tensors[index].type != TensorType.FLOAT32:
                continue
            beside = [
                (op, kind)
                for op, kind in kinds
                if index in [int(i) for i in (op.inputs if end == "input" else op.outputs)]
            ]
            expected = "QUANTIZE" if end == "input" else "DEQUANTIZE"
            inner = [
                int((op.outputs if end == "input" else op.inputs)[0]) for op, k in beside if k == expected
            ]
            fits = len(inner) == len(beside) and all(graph.tensors[i].type == wanted for i in inner)
            if not fits or len({_scale(graph.tensors[i]) for i in inner}) != 1:
                name = next(
                    m.name.decode() for m in [*signature.inputs, *signature.outputs] if m.tensorIndex == index
                )
                raise UnsupportedError(
                    f"{end} {name!r} is used in floating point: {', '.join(k for _, k in beside)}",
                    'Use "io": "float", or let the operators beside it be quantized',
                )
            read = end == "output" and any(index in [int(i) for i in op.inputs] for op, _ in kinds)
            dropped += [] if read else [op for op, _ in beside]
            replaced[end][index] = inner[0]
            for other in inner[1:]:  # several readers, each with a QUANTIZE of its own
                for op, _ in kinds:
                    op.inputs = [inner[0] if int(i) == other else int(i) for i in op.inputs]
    if not any(replaced.values()):
        raise UnsupportedError("no input or output is in floating point", 'Use "io": "float"')
    graph.operators = [op for op in graph.operators if all(op is not other for other in dropped)]
    for end, maps in (("input", signature.inputs), ("output", signature.outputs)):
        for entry in maps:
            entry.tensorIndex = replaced[end].get(int(entry.tensorIndex), int(entry.tensorIndex))
    graph.inputs = [replaced["input"].get(int(i), int(i)) for i in graph.inputs]
    graph.outputs = [replaced["output"].get(int(i), int(i)) for i in graph.outputs]
    return _tflite._write(model), (f"inputs and outputs are {TYPES[precision].lower()}",)


def _scale(tensor: Any) -> Tuple[float, int]:
    return float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])


def interface(flatbuffer: bytes) -> Dict[str, Tuple[str, Tuple[int, ...], Any, Any]]:
    """Return every named input and output: its dtype, shape, and scale and zero point (None for floats)."""
    from ai_edge_litert.schema_py_generated import TensorType

    from portcall.exporters import _tflite

    names = {v: k.lower() for k, v in vars(TensorType).items() if isinstance(v, int)}
    model = _tflite._read(flatbuffer)
    found: Dict[str, Tuple[str, Tuple[int, ...], Any, Any]] = {}
    for entry in [*model.signatureDefs[0].inputs, *model.signatureDefs[0].outputs]:
        tensor = model.subgraphs[0].tensors[entry.tensorIndex]
        shape = () if tensor.shape is None else tuple(int(d) for d in tensor.shape)
        quantized = tensor.quantization is not None and tensor.quantization.scale is not None
        integers = (
            quantized and names[tensor.type] in ("int8", "int16", "uint8") and len(tensor.quantization.scale)
        )
        scale, zero = _scale(tensor) if integers else (None, None)
        found[entry.name.decode()] = (names[tensor.type], shape, scale, zero)
    return found
