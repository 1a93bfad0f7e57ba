"""Reads the scales back from what was exported, and compares them with the trained ones: none may change silently.

What a format cannot express is no loss: those changes are known beforehand (``expected``) and listed. Anything else, a
scale that was calibrated anew or a pair that vanished, is a failed export with its layer named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.exporters import _trained, _trained_read, _trained_rewrite
from portcall.exporters._trained import Entry, Quantization
from portcall.targets.agent.contract import Graph
from portcall.targets.agent.errors import VerificationFailed

BACKENDS = (
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "coreml",
    "tflite",
    "tflite_micro",
    "qnn",
    "executorch",
)
"""Backends that take quantized sources: those whose artifacts are read back here."""
HALF = "rounded to float16"
ROUNDING = 4e-7
"""Relative, of a scale in OpenVINO's files, which hold the ends of its range as float32."""


def check(backend: str, graph: Graph, entry: Path) -> Tuple[Dict[str, Any], Tuple[str, ...]]:
    """Return the record of the manifest and notes in words, read from the artifact's file or folder *entry*.

    The record: "activations" and "weights" of the source, "kept" of both, and "changed": [{"tensor", "layer",
    "trained", "used", "reason"}], used None where the format has no such tensor (a fused operator's inner one).
    Raises VerificationFailed with the layers whose scales are neither the trained nor the expected ones.
    """
    import onnx

    from portcall.exporters import _trained_executorch, _trained_tflite

    if graph.kind == "tflite":
        stored = _trained_tflite.load(graph.path)
        entries = [Entry.from_json(e) for e in stored["entries"]]
        found = _trained_read.in_flatbuffer(entry, stored)
        absent = _absent(entries, stored)
    else:
        model = onnx.load(str(graph.path))
        _trained_rewrite.normalize(model)
        entries = _trained.read(model)
        if backend == "openvino":
            found = _trained_read.in_openvino(entry, model, entries)
        elif backend == "coreml":
            found = _trained_read.in_coreml(entry, model, entries)
        elif backend == "executorch":
            found = _trained_executorch.found(entry, entries)
        else:
            found = _trained_read.in_onnx(entry)
        absent = _trained_executorch.left_out(entry, entries) if backend == "executorch" else set()
    changed, lost = [], []
    for trained in entries:
        key = (trained.tensor, trained.is_weight)
        if key in absent:
            changed.append(_change(trained, None, "the format has no tensor of its own for it"))
            continue
        wrong, used = _compare(backend, trained, found.get(key, []))
        if wrong is not None:
            lost.append(f"{trained.label} {wrong}")
        elif used is not None:
            half = backend == "coreml"
            changed.append(_change(trained, used, HALF if half else "the format needs zero point 0"))
    if lost:
        shown = "; ".join(lost[:3]) + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise VerificationFailed(
            f"the export lost the trained quantization: {shown}",
            "Report this: an exporter must keep what was trained. Export to another backend meanwhile",
        )
    record = {
        "activations": sum(not e.is_weight for e in entries),
        "weights": sum(e.is_weight for e in entries),
        "kept": len(entries) - len(changed),
        "changed": changed,
    }
    return record, _notes(record)


def _change(entry: Entry, used: Optional[Quantization], reason: str) -> Dict[str, Any]:
    return {
        "tensor": entry.tensor,
        "layer": entry.layer,
        "trained": str(entry.quantization),
        "used": None if used is None else str(used),
        "reason": reason,
    }


def _notes(record: Mapping[str, Any]) -> Tuple[str, ...]:
    total = record["activations"] + record["weights"]
    notes = [f"trained scales: {record['kept']} of {total} kept (read back from the artifact)"]
    rounded = [c for c in record["changed"] if c["reason"] == HALF]
    if rounded:
        notes.append(f"trained scales rounded to float16, in which this format computes: {len(rounded)}")
    others = [c for c in record["changed"] if c["reason"] != HALF]
    for change in others[:8]:
        became = change["used"] or "has no tensor of its own in this format"
        notes.append(f"trained scale of {change['tensor']!r}: {change['trained']}, used: {became}")
    if len(others) > 8:
        notes.append(f"{len(others) - 8} more trained scales changed: see trained.changed")
    return tuple(notes)


def expected(backend: str, entry: Entry) -> List[Quantization]:
    """Return what a backend may make of a trained quantization: the first is preferred, the others are rounded."""
    found = entry.quantization
    if backend in ("tensorrt", "tensorrt_rtx"):
        return [found.symmetric()]
    if backend in ("tflite", "tflite_micro", "executorch"):
        return [found.symmetric() if entry.is_weight else found.as_int8()]
    if backend == "coreml":
        return [found, found.half()]
    return [found]


def _compare(
    backend: str, trained: Entry, found: Sequence[Quantization]
) -> Tuple[Optional[str], Optional[Quantization]]:
    """Return what is wrong, or None; and what is used where it is not what was trained."""
    if not found:
        return "has no scale in the artifact: its Q/DQ pair vanished", None
    rounding = ROUNDING if backend == "openvino" else 0.0
    allowed = expected(backend, trained)
    used: Optional[Quantization] = None
    for one in found:
        fitting = next((a for a in allowed if _equal(a, one, rounding)), None)
        if fitting is None:
            if any(_equal(a, other, rounding) for a in allowed for other in found):
                continue  # another pair on the same tensor
            return f"has {one} in the artifact, trained was {trained.quantization}", None
        if not _equal(trained.quantization, one, rounding):
            used = one
    return None, used


def _equal(one: Quantization, other: Quantization, rounding: float) -> bool:
    one, other = one.as_int8(), other.as_int8()
    scales, others = one.scales, other.scales
    zeros, other_zeros = one.zero_points, other.zero_points
    count = max(len(scales), len(others))
    scales, others = _spread(scales, count), _spread(others, count)
    zeros, other_zeros = _spread(zeros, count), _spread(other_zeros, count)
    return (
        len(scales) == len(others)
        and zeros == other_zeros
        and all(abs(a - b) <= rounding * abs(a) for a, b in zip(scales, others))
    )


def _spread(values: Tuple[Any, ...], count: int) -> Tuple[Any, ...]:
    return values * count if len(values) == 1 else values


def _absent(entries: Sequence[Entry], stored: Mapping[str, Any]) -> Any:
    """Return the activations that no tensor of the float flatbuffer holds with their quantization."""
    held = {
        (name, str(entry["quantization"]))
        for entry in stored["activations"].values()
        for name in entry["same"]
    }
    return {
        (e.tensor, False)
        for e in entries
        if not e.is_weight and (e.tensor, str(e.quantization.to_json())) not in held
    }
