"""Whether an export kept what its source was compressed to: the exact zeros of every layer, position by position."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall.targets.agent.contents import CHANNELS, DENSE, TWO_OF_FOUR, UNSTRUCTURED, Contents, Weight
from portcall.targets.agent.contract import Graph, Source
from portcall.targets.agent.errors import PortcallError, VerificationFailed

Array = np.ndarray[Any, Any]

TOLERANCE = 0.001
"""Share of a layer's elements that may be lost where only their number can be compared: 0.1 points."""
ALIKE = 0.8
"""Agreement of signs from which on two weights are one and the same layer."""
SURE = 0.95
SAMPLED = (64, 1024)
"""Rows (output channels), and elements of each, that are looked at to find a layer."""
CONTENTS, SIGNS = "contents.json", "signs.npz"

Key = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer of the source and the same one in the artifact.

    how: "signs" (the signs of the weights agree), or "order" (of layers of one shape: nothing better was found).
    """

    before: Weight
    after: Weight
    how: str


# What runs in workers.


def read_source(arguments: Mapping[str, Any], progress: object) -> None:
    """Write what the source holds into ``directory``, for ``compare``."""
    contents = source_contents(Source.from_json(arguments["source"]), Graph.from_json(arguments["graph"]))
    store(contents, Path(arguments["directory"]))


def source_contents(source: Source, graph: Graph | None) -> Contents:
    """Return what the source itself holds; of a Keras model, what its float flatbuffer *graph* holds."""
    if source.format == "onnx":
        from portcall.exporters import _contents_onnx

        return _contents_onnx.read(source.path, {})
    if source.format in ("pt2", "torch"):
        from portcall.exporters import _contents_torch

        return _contents_torch.read(source)
    from portcall.exporters import _contents_tflite

    assert graph is not None and graph.kind == "tflite"
    return _contents_tflite.read(graph.path)


def compared(contents: Contents, directory: str) -> dict[str, Any]:
    """Return what became of the source whose contents lie in *directory*: see ``compare``."""
    return compare(load(Path(directory)), contents)


def store(contents: Contents, directory: Path) -> None:
    """Write *contents* as JSON, the signs beside it in two bits each."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    for number, weight in enumerate(contents.weights):
        arrays[f"shape_{number}"] = np.asarray(weight.signs.shape)
        arrays[f"zero_{number}"] = np.packbits(weight.signs.reshape(-1) == 0)
        arrays[f"negative_{number}"] = np.packbits(weight.signs.reshape(-1) < 0)
    np.savez(directory / SIGNS, **arrays)
    text = {"weights": [w.to_json() for w in contents.weights], "quantize_nodes": contents.quantize_nodes}
    (directory / CONTENTS).write_text(json.dumps(text))


def load(directory: Path) -> Contents:
    """Return what ``store`` wrote: the weights with their signs, and the number of quantizing nodes."""
    held = json.loads((directory / CONTENTS).read_text())
    weights = []
    with np.load(directory / SIGNS) as stored:
        for number, entry in enumerate(held["weights"]):
            shape = tuple(int(d) for d in stored[f"shape_{number}"])
            count = int(np.prod(shape))
            signs = np.ones(count, np.int8)
            signs[np.unpackbits(stored[f"negative_{number}"], count=count) == 1] = -1
            signs[np.unpackbits(stored[f"zero_{number}"], count=count) == 1] = 0
            weights.append(replace(Weight.from_json(entry), signs=signs.reshape(shape)))
    return Contents("", (), (), tuple(weights), {}, held["quantize_nodes"], 0, 0, None)


# What is compared, and how.


def compare(before: Contents, after: Contents) -> dict[str, Any]:
    """Return the manifest's ``compression``: what became of the zeros of *before* in *after*.

    zero_fraction: before and after, over the layers found in both. quantize_nodes: before and after. pruned_layers: how
    many layers of the source had structural zeros (see ``Weight.is_structural``). layers: those whose zeros or
    pattern differ; "lost" counts zeros that are not zero any more (matched by signs: position by position). unmatched:
    layers with structural zeros that were not found in the artifact, so that nothing is known of them.
    """
    pairs = match(before.weights, after.weights)
    entries = [_entry(pair) for pair in pairs]
    found = {id(pair.before) for pair in pairs}
    totals = {
        "before": (sum(p.before.zeros for p in pairs), sum(p.before.elements for p in pairs)),
        "after": (sum(p.after.zeros for p in pairs), sum(p.after.elements for p in pairs)),
    }
    return {
        "zero_fraction": {k: zeros / n if n else None for k, (zeros, n) in totals.items()},
        "quantize_nodes": {"before": before.quantize_nodes, "after": after.quantize_nodes},
        "compared_layers": len(pairs),
        "pruned_layers": sum(w.is_structural for w in before.weights),
        "layers": [e for e in entries if _differs(e)],
        "unmatched": [w.name for w in before.weights if w.is_structural and id(w) not in found],
    }


def _differs(entry: Mapping[str, Any]) -> bool:
    zeros, pattern = entry["zeros"], entry["pattern"]
    return bool(zeros["before"] != zeros["after"] or pattern["before"] != pattern["after"] or entry["lost"])


def _entry(pair: Pair) -> dict[str, Any]:
    before, after = pair.before, pair.after
    if pair.how == "signs":
        shape = key_of(before)
        turned = (before.signs.reshape(shape) == 0) & (after.signs.reshape(shape) != 0)
        lost = int(np.count_nonzero(turned))
        failed = lost > 0
    else:
        lost = max(0, before.zeros - after.zeros)
        failed = lost > TOLERANCE * before.elements or _weaker(before.pattern, after.pattern)
    return {
        "layer": before.name,
        "artifact_layer": after.name,
        "matched_by": pair.how,
        "elements": before.elements,
        "zeros": {"before": before.zeros, "after": after.zeros},
        "pattern": {"before": before.pattern, "after": after.pattern},
        "lost": lost,
        "failed": bool(failed and before.is_structural),
    }


def _weaker(before: str, after: str) -> bool:
    """Tell whether a pattern that hardware makes use of is gone."""
    return before in (TWO_OF_FOUR, CHANNELS) and after in (DENSE, UNSTRUCTURED)


def match(before: Sequence[Weight], after: Sequence[Weight]) -> list[Pair]:
    """Return the layers of *after*, each with the layer of *before* that it was made from.

    Names differ from format to format, and shapes repeat. What stays is the sign of each weight that is not zero:
    quantization keeps it, batch normalization turns whole output channels, equalization scales with positive factors.
    So two weights of one shape are the same layer where the signs agree in (nearly) every output channel; of several
    such, the nearest in the order of the graph. A layer that an artifact holds twice is found twice. What is left of
    one shape, as many on both sides, is matched by order.
    """
    groups: dict[Key, tuple[list[int], list[int]]] = {}
    for side, weights in enumerate((before, after)):
        for number, weight in enumerate(weights):
            groups.setdefault(key_of(weight), ([], []))[side].append(number)
    found: dict[int, Pair] = {}
    for ours, theirs in groups.values():
        if ours and theirs:
            chosen = _match_group([before[i] for i in ours], [after[i] for i in theirs])
            for pair, position in chosen:
                found[theirs[position]] = pair
    return [found[i] for i in sorted(found)]


def key_of(weight: Weight) -> Key:
    """Return the shape that a layer has in every format: outputs, inputs, and the kernel without sizes of 1."""
    outputs, inputs, *kernel = weight.signs.shape
    return (outputs, inputs, *(d for d in kernel if d != 1))


def _match_group(before: Sequence[Weight], after: Sequence[Weight]) -> Iterator[tuple[Pair, int]]:
    """Yield pairs of layers of one shape, with the position in *after*."""
    samples = [_sample(w) for w in before], [_sample(w) for w in after]
    scores = np.array([[_agreement(a, b) for a in samples[0]] for b in samples[1]])
    lost = np.array([[np.mean((a == 0) & (b != 0)) for a in samples[0]] for b in samples[1]])
    order = sorted(
        ((i, j) for i in range(len(after)) for j in range(len(before)) if scores[i, j] >= ALIKE),
        key=lambda ij: (
            after[ij[0]].name != before[ij[1]].name,
            -round(float(scores[ij]), 1),
            round(float(lost[ij]), 2),
            abs(ij[0] - ij[1]),
        ),
    )
    left_after, left_before = dict.fromkeys(range(len(after))), dict.fromkeys(range(len(before)))
    for i, j in order:
        if i in left_after and j in left_before:
            del left_after[i], left_before[j]
            yield Pair(before[j], after[i], "signs"), i
    for i in list(left_after):
        j = int(np.argmax(scores[i]))
        if scores[i, j] >= SURE:
            del left_after[i]
            yield Pair(before[j], after[i], "signs"), i
    if len(left_after) == len(left_before):
        for i, j in zip(left_after, left_before, strict=True):
            yield Pair(before[j], after[i], "order"), i


def _sample(weight: Weight) -> Array:
    """Return the signs at fixed places of a weight: float32[rows, elements]."""
    matrix = weight.signs.reshape(weight.signs.shape[0], -1)
    places = [
        np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))
        for n, most in zip(matrix.shape, SAMPLED, strict=True)
    ]
    return np.asarray(matrix[np.ix_(*places)], np.float32)


def _agreement(first: Array, second: Array) -> float:
    """Return how far the signs of two weights agree, 0 to 1, where both are not zero; a row may be turned as a whole.

    Where nothing can be compared (all is zero on one side) it is 1 if both are all zero, else 0.
    """
    both = np.count_nonzero(first * second)
    if not both:
        return float(not first.any() and not second.any())
    return float(np.abs((first * second).sum(axis=1)).sum() / both)


# The parent's side.


def check_kept(cell: object, compression: Mapping[str, Any]) -> None:
    """Raise VerificationFailed where a layer that was pruned has zeros that are not zero any more."""
    failed = [e for e in compression["layers"] if e["failed"]]
    if not failed:
        return
    shown = "; ".join(_told(e) for e in failed[:3]) + (
        f"; and {len(failed) - 3} more layers" if len(failed) > 3 else ""
    )
    raise VerificationFailed(
        f"{cell} lost zeros of the pruned model: {shown}",
        "The converter undid the pruning: keep these layers in float (--keep-float NAME), or choose another precision",
    )


def _told(entry: Mapping[str, Any]) -> str:
    zeros, pattern = entry["zeros"], entry["pattern"]
    turned = (
        f", {pattern['before']} became {pattern['after']}" if pattern["before"] != pattern["after"] else ""
    )
    return (
        f"layer {entry['layer']!r} had {zeros['before']} zeros of {entry['elements']} and has {zeros['after']}, "
        f"{entry['lost']} turned non-zero{turned}"
    )


def notes(compression: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the manifest should say of layers that could not be followed."""
    names = compression["unmatched"]
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (f"the zeros of these pruned layers could not be followed into the artifact: {shown}",)


def why_not(error: Exception) -> str:
    """Return the note of an artifact or a source whose zeros could not be read."""
    message = error.message if isinstance(error, PortcallError) else f"{type(error).__name__}: {error}"
    return f"kept zeros were not checked: {message}"
