"""Scales as they stand in exported files: ONNX, OpenVINO's IR, Core ML packages and flatbuffers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.exporters import _trained
from portcall.exporters._trained import Entry, Quantization

Key = Tuple[str, bool]
"""A trained tensor's name, and whether it is a weight."""
Found = Dict[Key, List[Quantization]]
"""What an artifact holds of each."""


def in_onnx(path: Path) -> Found:
    import onnx

    from portcall.exporters import _onnx

    model = onnx.load(str(path))
    _onnx.sort(model.graph)
    found: Found = {}
    for entry in _trained.read(model):
        found.setdefault((entry.tensor, entry.is_weight), []).append(entry.quantization)
    return found


def in_flatbuffer(path: Path, stored: Mapping[str, Any]) -> Found:
    from ai_edge_litert.schema_py_generated import TensorType

    from portcall.exporters import _tflite

    integers: Dict[str, Quantization] = {}
    for tensor in _tflite._read(path.read_bytes()).subgraphs[0].tensors:
        held = tensor.quantization
        if tensor.type != TensorType.INT8 or held is None or held.scale is None:
            continue
        scales, zeros = tuple(map(float, held.scale)), tuple(map(int, held.zeroPoint))
        axis = int(held.quantizedDimension) if len(scales) > 1 else None
        integers[tensor.name.decode()] = Quantization(scales, zeros, -128, 127, axis)
    found: Found = {}
    for kind in ("activations", "weights"):
        for name, entry in stored[kind].items():
            for candidate in (name, f"{name}_quantized"):
                if candidate in integers:
                    for source in entry.get("same", [entry["source"]]):
                        key = (source, kind == "weights")
                        found.setdefault(key, []).append(integers[candidate])
    return found


def _pair_ends(model: Any, entries: Sequence[Entry]) -> Dict[str, Key]:
    """Return what every DequantizeLinear of *model* gives -> the trained tensor that it belongs to."""
    known = {(e.tensor, e.is_weight) for e in entries}
    roots: Dict[str, str] = {}
    ends: Dict[str, Key] = {}
    for node in model.graph.node:
        name = node.input[0] if node.input else ""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            roots[node.output[0]] = roots.get(name, name)
        if node.op_type == "DequantizeLinear":
            key = (roots[node.output[0]], False)
            ends[node.output[0]] = key if key in known else (node.output[0], True)
    return {name: key for name, key in ends.items() if key in known}


def in_openvino(path: Path, model: Any, entries: Sequence[Entry]) -> Found:
    """Read FakeQuantize (activations) and the products of stored integers with their scales (weights) from the IR."""
    import numpy as np

    ends = _pair_ends(model, entries)
    net: Any = ElementTree.parse(str(path)).getroot()
    data = path.with_suffix(".bin").read_bytes()
    layers: Dict[Any, Any] = {layer.get("id"): layer for layer in net.iter("layer")}
    makers = {(e.get("to-layer"), e.get("to-port")): e.get("from-layer") for e in net.iter("edge")}
    kinds = {"f32": np.float32, "i8": np.int8, "u8": np.uint8, "f16": np.float16}

    def read(layer: Any, number: int) -> Any:
        """Return the constant behind input *number*, or None."""
        ports = layer.findall("input/port")
        maker = layers.get(makers.get((layer.get("id"), ports[number].get("id"))))
        while maker is not None and maker.get("type") in ("Convert", "Reshape"):
            first = maker.findall("input/port")[0].get("id")
            maker = layers.get(makers.get((maker.get("id"), first)))
        if maker is None or maker.get("type") != "Const":
            return None
        held = maker.find("data")
        kind = kinds.get(held.get("element_type"))
        if kind is None:
            return None
        offset, size = int(held.get("offset")), int(held.get("size"))
        return np.frombuffer(data[offset : offset + size], kind)

    found: Found = {}
    for layer in layers.values():
        names = [
            name
            for port in layer.findall("output/port")
            for name in re.split(r"(?<!\\),", port.get("names", ""))
        ]
        keys = list(
            dict.fromkeys(ends[n.replace("\\,", ",")] for n in names if n.replace("\\,", ",") in ends)
        )
        if not keys:
            continue
        used: Optional[Quantization] = None
        if layer.get("type") == "FakeQuantize":
            low, high = (read(layer, number) for number in (3, 4))
            steps = int(layer.find("data").get("levels")) - 1
            if low is not None and high is not None:
                scale = (float(high[0]) - float(low[0])) / steps
                used = Quantization((scale,), (round(-128 - float(low[0]) / scale),), -128, 127)
        elif layer.get("type") == "Multiply":
            scales = read(layer, 1)
            if scales is not None:
                zeros = _subtracted(layer, layers, makers, read)
                zeros = np.zeros(1) if zeros is None else zeros
                plain = tuple(int(z) for z in zeros.reshape(-1))
                used = Quantization(tuple(float(s) for s in scales), plain, -128, 127)
                used = _on_kind(used, keys, entries)
        if used is not None:
            for key in keys:
                found.setdefault(key, []).append(used)
    return found


def _subtracted(layer: Any, layers: Any, makers: Any, read: Any) -> Any:
    """Return the zero points that a Subtract before a Multiply takes off, or None."""
    first = layer.findall("input/port")[0].get("id")
    before = layers.get(makers.get((layer.get("id"), first)))
    return read(before, 1) if before is not None and before.get("type") == "Subtract" else None


def _on_kind(used: Quantization, keys: Sequence[Key], entries: Sequence[Entry]) -> Quantization:
    """Return a weight's quantization on the integers of the source: OpenVINO's file keeps their type."""
    kind = next(e.quantization for e in entries if (e.tensor, e.is_weight) == keys[0])
    return replace(used, low=kind.low, high=kind.high)


def in_coreml(package: Path, model: Any, entries: Sequence[Entry]) -> Found:
    """Read the quantize and dequantize operators (activations) and the stored weights of a saved package's program.

    coremltools renames and merges them. An activation's pair is known by the operators around it, which go by their
    ONNX nodes (``_coreml._name_after_onnx``), or by its own; a weight by its integers.
    """
    import numpy as np
    from coremltools.converters.mil.frontend.milproto.load import load

    from portcall.exporters._coreml_tools import coremltools

    opened = coremltools().models.MLModel(str(package), skip_model_load=True)
    spec = opened.get_spec()
    main = load(
        spec, specification_version=spec.specificationVersion, file_weights_dir=opened.weights_dir
    ).functions["main"]
    made, read, own = _around(model, entries)
    weights = _integers(model, entries)
    origin = {value.name: name for name, value in main.inputs.items()}
    readers: Dict[str, List[str]] = {}
    for operation in main.operations:
        for value in operation.inputs.values():
            for one in value if isinstance(value, (tuple, list)) else [value]:
                if one is not None:
                    readers.setdefault(one.name, []).append(_plain(operation.name))
        source = operation.inputs.get("x") if operation.op_type == "cast" else None
        for output in operation.outputs:
            origin[output.name] = (
                origin.get(source.name, "") if source is not None else _plain(operation.name)
            )
    found: Found = {}
    for operation in main.operations:
        keys: List[Key] = []
        if operation.op_type == "constexpr_affine_dequantize":
            data = np.sort(np.asarray(operation.quantized_data.val), None)
            keys = [key for key, held in weights.items() if np.array_equal(held, data)]
        elif operation.op_type == "quantize":
            key = _by_name(made, origin.get(operation.input.name, ""))
            keys = [] if key is None else [key]
        elif operation.op_type == "dequantize":
            follows = readers.get(operation.outputs[0].name, [])
            by_reader = [k for n in follows for k in _by_name(read, n) or ()]
            keys = by_reader if len(set(by_reader)) == 1 else []
            key = _by_name(own, _plain(operation.name))
            keys += [key] if key is not None and not keys else []
        if keys:
            used = _mil_quantization(operation)
            for key in dict.fromkeys(keys):
                found.setdefault(key, []).append(used)
    return _with_merged(found, model, entries)


def _with_merged(found: Found, model: Any, entries: Sequence[Entry]) -> Found:
    """Return *found* with the pairs that change nothing: after an operator that moves what has the same quantization.

    coremltools moves the operator between the two halves of the first pair and drops the second.
    """
    ends = _pair_ends(model, entries)
    trained = {(e.tensor, e.is_weight): e.quantization for e in entries}
    result = dict(found)
    for node in model.graph.node:
        source = ends.get(node.input[0]) if node.input else None
        key = (node.output[0], False)
        moved = node.op_type in _trained.MOVING and key in trained and key not in result
        if moved and source in result and trained[key] == trained[source]:
            result[key] = result[source]
    return result


def _around(
    model: Any, entries: Sequence[Entry]
) -> Tuple[Dict[str, Key], Dict[str, List[Key]], Dict[str, Key]]:
    """Return the trained activations by the identifiers of the node that makes one, of its readers, and of its pair."""
    ends = {name: key for name, key in _pair_ends(model, entries).items() if not key[1]}
    known = {e.tensor for e in entries if not e.is_weight}
    made = {v.name: (v.name, False) for v in model.graph.input if v.name in known}
    read: Dict[str, List[Key]] = {}
    own: Dict[str, Key] = {}
    for node in model.graph.node:
        name = _identifier(node.name)
        if node.op_type == "DequantizeLinear":
            own.update((name, ends[o]) for o in node.output if o in ends)
            continue
        made.update((name, (o, False)) for o in node.output if o in known)
        keys = [ends[i] for i in node.input if i in ends]
        if keys:
            read[name] = keys
    return made, read, own


def _integers(model: Any, entries: Sequence[Entry]) -> Dict[Key, Any]:
    """Return the sorted integers of every trained weight of a normalized model."""
    import numpy as np
    from onnx import numpy_helper

    known = {e.tensor for e in entries if e.is_weight}
    constants = {t.name: t for t in model.graph.initializer}
    return {
        (node.output[0], True): np.sort(numpy_helper.to_array(constants[node.input[0]]), None)
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.output[0] in known and node.input[0] in constants
    }


def _mil_quantization(operation: Any) -> Quantization:
    import numpy as np
    from coremltools.converters.mil.mil import types

    scale = np.asarray(operation.scale.val, np.float32).reshape(-1)
    zero = operation.zero_point
    zeros = np.zeros(1, np.int8) if zero is None else np.asarray(zero.val).reshape(-1)
    if operation.op_type == "quantize":  # coremltools writes int8 with zero point -128 as uint8 without one
        unsigned = str(operation.output_dtype.val) == "uint8"
    elif operation.op_type == "dequantize":
        unsigned = types.nptype_from_builtin(operation.input.dtype) == np.uint8
    else:
        unsigned = np.asarray(operation.quantized_data.val).dtype == np.uint8
    low, high = (0, 255) if unsigned else (-128, 127)
    return Quantization(tuple(float(s) for s in scale), tuple(int(z) for z in zeros), low, high)


def _by_name(known: Mapping[str, Any], name: str) -> Any:
    """Return what an operator's name stands for, numbered by a converter or not; None for others."""
    return known.get(name, known.get(re.sub(r"_\d+$", "", name)))


def _plain(name: str) -> str:
    return re.sub(r"(_cast_fp16|_to_fp16)+$", "", name)


def _identifier(name: str) -> str:
    """Return an ONNX node's name as ``_onnx_to_torch`` and the package write it."""
    plain = re.sub(r"\W+", "_", name).strip("_") or "node"
    return plain if plain[0].isalpha() else f"n_{plain}"
