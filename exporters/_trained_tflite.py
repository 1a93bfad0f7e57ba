"""Trained scales in a flatbuffer: which of its tensors holds which tensor of the quantized source.

The float flatbuffer comes from the float ONNX graph. Names change on the way (layouts, fused operators), values do not:
both graphs run on the same random inputs, and tensors belong together if they hold the same numbers in whatever order.
What has no trained scale takes that of the tensor whose values it moves, or the range that its operator has by design.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from portcall.exporters._trained import Entry, Quantization
from portcall.targets.agent.contract import Range, Ranges, Source
from portcall.targets.agent.errors import UnsupportedError

FILE = "trained.json"
"""Beside the float flatbuffer: see ``attach``."""
FLOAT = "float.onnx"
"""The float ONNX graph that the flatbuffer is made from."""
SAMPLES = 2
TOLERANCE = 1e-4
"""Of the largest magnitude: float32 kernels add in orders of their own."""
INSIDE = (
    "AVERAGE_POOL_2D",
    "BATCH_TO_SPACE_ND",
    "BROADCAST_TO",
    "DEPTH_TO_SPACE",
    "EXPAND_DIMS",
    "GATHER",
    "MAX_POOL_2D",
    "MEAN",
    "PAD",
    "RESHAPE",
    "RESIZE_BILINEAR",
    "RESIZE_NEAREST_NEIGHBOR",
    "SLICE",
    "SPACE_TO_BATCH_ND",
    "SPACE_TO_DEPTH",
    "SPLIT",
    "SQUEEZE",
    "STRIDED_SLICE",
    "TILE",
    "TRANSPOSE",
    "UNPACK",
)
"""Operators whose results lie within the range of their first input and zero."""
FIXED: Mapping[str, Range] = {
    "LOGISTIC": Range(0.0, 255 / 256),
    "SOFTMAX": Range(0.0, 255 / 256),
    "TANH": Range(-1.0, 127 / 128),
}
"""Operators whose int8 kernels have one scale: LiteRT's 8-bit quantization specification."""
CLIPPING = ("RELU", "RELU6", "RELU_N1_TO_1")


def write_float(path: Path, directory: Path) -> Path:
    """Write the float graph of the quantized ONNX graph at *path*, and FILE with what was trained, for ``attach``."""
    import onnx

    from portcall.exporters import _onnx, _trained_rewrite

    model = onnx.load(str(path))
    entries = _trained_rewrite.split(model)
    target = directory / FLOAT
    _onnx.save(model, target)
    (directory / FILE).write_text(json.dumps({"entries": [e.to_json() for e in entries]}))
    return target


def attach(source: Source, flatbuffer: Path) -> None:
    """Write FILE beside *flatbuffer*, in place of that of ``write_float``, whose graph is deleted.

    It holds the tensors of the source, and what each tensor of the flatbuffer takes: "entries"; "activations" and
    "weights" (flatbuffer's tensor -> "source", "quantization", "same": all trained tensors of its values); "derived"
    (tensor -> "source", "range"); "missing": tensors whose ranges only data can tell.
    Raises UnsupportedError, naming the layer, for a weight that the conversion changed.
    """
    from portcall.exporters import _tflite

    float_onnx = flatbuffer.parent / FLOAT
    entries = [Entry.from_json(e) for e in load(flatbuffer)["entries"]]
    model = _tflite._read(flatbuffer.read_bytes())
    tapped = _tflite.tapped_tensors(flatbuffer)
    twins = _activations(source, float_onnx, entries, flatbuffer, tapped)
    activations = {name: found[0] for name, found in twins.items()}
    derived = _derived(model, tapped, activations)
    missing = [n for n in dict.fromkeys(tapped.values()) if n not in activations and n not in derived]
    answer = {
        "entries": [e.to_json() for e in entries],
        "activations": {
            n: {**_plain(e, e.quantization), "same": [t.tensor for t in twins[n]]}
            for n, e in activations.items()
        },
        "derived": {n: {"source": s, "range": r.to_json()} for n, (s, r) in derived.items()},
        "weights": _weights(model, float_onnx, entries),
        "missing": missing,
    }
    (flatbuffer.parent / FILE).write_text(json.dumps(answer))
    for file in (float_onnx, float_onnx.with_name(FLOAT + ".data")):
        file.unlink(missing_ok=True)


def load(flatbuffer: Path) -> Dict[str, Any]:
    """Return what ``attach`` wrote beside *flatbuffer*."""
    found: Dict[str, Any] = json.loads((flatbuffer.parent / FILE).read_text())
    return found


def ranges(trained: Mapping[str, Any], calibrated: Optional[Ranges]) -> Ranges:
    """Return the range of every tensor: trained, derived, else *calibrated*. Raises UnsupportedError without one."""
    found: Dict[str, Range] = {}
    for name, entry in trained["activations"].items():
        found[name] = Quantization.from_json(entry["quantization"]).range()
    for name, entry in trained["derived"].items():
        found[name] = Range.from_json(entry["range"])
    lacking = [n for n in trained["missing"] if calibrated is None or n not in calibrated]
    if lacking:
        raise UnsupportedError(no_range(lacking), "Give calibration DATA for these: --data")
    found.update({n: (calibrated or {})[n] for n in trained["missing"]})
    return found


def no_range(missing: Sequence[str]) -> str:
    """Return the sentence on tensors without a trained scale."""
    shown = ", ".join(map(repr, missing[:3])) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return f"LiteRT needs a scale for every tensor, and {len(missing)} have no trained one: {shown}"


def statistics(model: Any, trained: Mapping[str, Any], given: Ranges) -> Dict[str, Any]:
    """Return what ai-edge-quantizer takes as statistics, float64, so that its scales are the trained ones exactly.

    Its scales are (max - min) / 255 of activations and max / 127 of weights, rounded to float32 once.
    """
    import numpy as np

    found: Dict[str, Any] = {}
    for tensor in model.subgraphs[0].tensors:
        name = tensor.name.decode()
        rank = len(tensor.shape)
        if name in trained["weights"]:
            used = Quantization.from_json(trained["weights"][name]["quantization"]).symmetric()
            shape = [1] * rank if used.axis is None else [-1 if a == used.axis else 1 for a in range(rank)]
            largest = 127 * np.asarray(used.scales, np.float64).reshape(shape)
            found[name] = {"min": -largest, "max": largest}
        elif name in trained["activations"] or name in trained["derived"]:
            ends = given[name].minimum, given[name].maximum
            low, high = (np.full((1,) * rank, v, np.float64) for v in ends)
            found[name] = {"min": low, "max": high}
    return found


def _plain(entry: Entry, quantization: Quantization) -> Dict[str, Any]:
    return {"source": entry.tensor, "layer": entry.layer, "quantization": quantization.to_json()}


def _activations(
    source: Source, float_onnx: Path, entries: Sequence[Entry], flatbuffer: Path, tapped: Mapping[int, str]
) -> Dict[str, List[Entry]]:
    """Return the flatbuffer's tensors that hold the values of trained ones on random inputs, the nearest first."""
    import numpy as np

    trained: Dict[str, Entry] = {}
    for entry in entries:
        if not entry.is_weight:
            trained.setdefault(entry.tensor, entry)
    found: Dict[str, List[Entry]] = {}
    theirs: List[Dict[str, Any]] = []
    ours: List[Dict[int, Any]] = []
    for seed in range(SAMPLES):
        sample = _sample(source, trained, seed)
        theirs.append({k: np.sort(v, None) for k, v in _run_onnx(float_onnx, list(trained), sample).items()})
        values = _run_flatbuffer(flatbuffer, sample, list(tapped))
        ours.append({i: np.sort(v, None) for i, v in values.items()})
    for index, name in tapped.items():
        near: List[Any] = []
        for tensor in trained:
            pairs = [(t[tensor], o[index]) for t, o in zip(theirs, ours)]
            if any(a.size != b.size for a, b in pairs):
                continue
            reach = max(max(float(np.abs(a).max(initial=0)) for a, _ in pairs), 1e-30)
            apart = max(float(np.abs(a - b).max(initial=0)) for a, b in pairs) / reach
            if apart < TOLERANCE:
                near.append((apart, len(near), tensor))
        if near:
            found[name] = [trained[tensor] for _, _, tensor in sorted(near)]
    return found


def _sample(source: Source, trained: Mapping[str, Entry], seed: int) -> Dict[str, Any]:
    """Return random inputs: floats over their trained range, else standard normal; integers 0 or 1."""
    import numpy as np

    rng = np.random.default_rng(seed)
    made: Dict[str, Any] = {}
    for spec in source.inputs:
        shape, dtype = source.example_shapes[spec.name], np.dtype(spec.dtype)
        if dtype.kind != "f":
            made[spec.name] = rng.integers(0, 2, shape).astype(dtype)
        elif spec.name in trained:
            ends = trained[spec.name].quantization.range()
            made[spec.name] = rng.uniform(ends.minimum, ends.maximum, shape).astype(dtype)
        else:
            made[spec.name] = rng.standard_normal(shape).astype(dtype)
    return made


def _run_onnx(path: Path, tensors: Sequence[str], sample: Mapping[str, Any]) -> Dict[str, Any]:
    import onnx
    import onnxruntime as ort

    model = onnx.load(str(path))
    outputs = {v.name for v in model.graph.output}
    inputs = {v.name for v in model.graph.input}
    wanted = [t for t in tensors if t not in inputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=t) for t in wanted if t not in outputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = dict(zip(wanted, session.run(wanted, {k: v for k, v in sample.items() if k in inputs})))
    return {t: sample[t] if t in inputs else values[t] for t in tensors}


def _run_flatbuffer(path: Path, sample: Mapping[str, Any], indices: Sequence[int]) -> Dict[int, Any]:
    from ai_edge_litert import interpreter as litert

    kinds = litert.OpResolverType
    interpreter = litert.Interpreter(
        str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner()
    runner(**{name: sample[name] for name in runner.get_input_details()})
    return {i: interpreter.get_tensor(i).copy() for i in indices}


def _derived(model: Any, tapped: Mapping[int, str], known: Mapping[str, Entry]) -> Dict[str, Any]:
    """Return what follows for other tensors: name -> (where from, its range)."""
    from portcall.exporters import _tflite

    found: Dict[str, Any] = {}

    def of(index: int) -> Optional[Range]:
        name = tapped.get(index, "")
        if name in known:
            return known[name].quantization.range()
        return found[name][1] if name in found else None

    operators = _tflite.operators(model)
    for op, kind in operators:
        source = of(int(op.inputs[0 if kind != "SPLIT" else 1])) if len(op.inputs) else None
        for index in map(int, op.outputs):
            if index not in tapped or of(index) is not None:
                continue
            if kind in FIXED:
                found[tapped[index]] = (kind, FIXED[kind])
            elif kind in (*INSIDE, *CLIPPING) and source is not None:
                found[tapped[index]] = (tapped[int(op.inputs[0 if kind != "SPLIT" else 1])], source)
    readers: Dict[int, List[Any]] = {}
    for op, kind in operators:
        for index in {int(i) for i in op.inputs}:
            readers.setdefault(index, []).append((op, kind))
    for op, _ in reversed(operators):
        for index in map(
            int, op.outputs
        ):  # what one clipping or moving operator alone reads takes its result's range
            if index not in tapped or of(index) is not None or len(readers.get(index, ())) != 1:
                continue
            [(reader, reader_kind)] = readers[index]
            result = of(int(reader.outputs[0]))
            if reader_kind in ("RELU", "RESHAPE", "TRANSPOSE", "SQUEEZE") and result is not None:
                found[tapped[index]] = (tapped[int(reader.outputs[0])], result)
    return found


def _weights(model: Any, float_onnx: Path, entries: Sequence[Entry]) -> Dict[str, Any]:
    """Return the flatbuffer's weights with their trained quantization along their own axis.

    A weight is found by its numbers, which the conversion only moves. Raises UnsupportedError where one is not there.
    """
    import onnx
    from onnx import numpy_helper

    from portcall.exporters import _tflite

    trained = [e for e in entries if e.is_weight]
    initializers = {t.name: t for t in onnx.load(str(float_onnx)).graph.initializer}
    arrays = {
        e.tensor: numpy_helper.to_array(initializers[e.tensor]) for e in trained if e.tensor in initializers
    }
    found: Dict[str, Any] = {}
    placed = set()
    for op, kind in _tflite.operators(model):
        for position, index in enumerate(map(int, op.inputs)):
            value = _tflite.constant(model, index)
            if value is None or value.ndim < 1:
                continue
            same = [e for e in trained if _holds(arrays.get(e.tensor), value)]
            axis = _tflite.CHANNEL_AXES.get(kind, 0) if position else 0
            for entry in same:
                used = _along(entry, arrays[entry.tensor], value, axis)
                if used is not None:
                    found[model.subgraphs[0].tensors[index].name.decode()] = _plain(entry, used)
                    placed.add(entry.tensor)
                    break
            placed.update(e.tensor for e in same if same and e.quantization == same[0].quantization)
    lost = [e for e in trained if e.tensor not in placed]
    if lost:
        raise UnsupportedError(
            f"the conversion changed the {lost[0].label}: its trained scale does not fit what became of it",
            "Export it with onnxruntime or openvino, which keep the source's own Q/DQ",
        )
    return found


def _holds(array: Any, value: Any) -> bool:
    import numpy as np

    return (
        array is not None
        and array.size == value.size
        and bool((np.sort(array, None) == np.sort(value, None)).all())
    )


def _along(entry: Entry, array: Any, value: Any, axis: int) -> Optional[Quantization]:
    """Return the weight's quantization for the channels of *value*; None where these are others than the trained."""
    from dataclasses import replace

    import numpy as np

    found = entry.quantization
    if found.axis is None or len(found.scales) == 1:
        count = value.shape[axis]
        return replace(found, scales=found.scales * count, zero_points=found.zero_points * count, axis=axis)
    theirs = np.sort(np.moveaxis(array, found.axis, 0).reshape(array.shape[found.axis], -1), axis=1)
    for candidate in dict.fromkeys((axis, *range(value.ndim))):
        ours = np.moveaxis(value, candidate, 0).reshape(value.shape[candidate], -1)
        if ours.shape == theirs.shape and (np.sort(ours, axis=1) == theirs).all():
            return replace(found, axis=candidate)
    return None
