"""``python -m benchmarks.compression``: whether a pruned ResNet-20 keeps its zeros in every int8 format.

Three prunings of the trained network (``benchmarks/resnet.py``: PORTCALL_CIFAR10_RESNET), by magnitude within each
layer and without fine-tuning: 50 % and 90 % unstructured, and 2:4 along the input channels (not in the first
convolution, which has three). Each is exported to int8 by every backend; a row tells the zero fraction of its
weights before and after, and how many layers of each pattern there are.

Then losses are planted, ten of each kind, layers and backends drawn by seed: one zero of the graph becomes half the
layer's largest weight ("zero"), or all of them small random numbers ("mask"), before the backend exports it. Each has
to be found, by the name of its layer.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import portcall
from benchmarks import resnet
from portcall import compression
from portcall.artifact import write_json
from portcall.bench.report import align
from portcall.calibration.table import CalibrationTable, Section
from portcall.exporters import get_backend
from portcall.progress import Reporter
from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import Artifact, Graph, Recipe
from portcall.targets.agent.errors import PortcallError, VerificationFailed
from portcall.workspace import lower, open_source, open_workspace

Sample = dict[str, Any]

BACKENDS = (
    "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "coreml", "tflite", "tflite_micro", "executorch", "qnn",
)  # fmt: skip
PRUNINGS = ("unstructured_50", "unstructured_90", "two_of_four")
IMAGES = 16
"""That calibrate: zeros of weights do not depend on them."""
SEED = 20
PLANTED = 10
HEADER = (
    "pruning",
    "backend",
    "zeros before %",
    "after %",
    "difference",
    "patterns before",
    "patterns after",
    "note",
)


def unstructured_50() -> tuple[Any, ...]:
    """Return ResNet-20 with the smaller half of each layer's weights zero."""
    return _pruned(0.5)


def unstructured_90() -> tuple[Any, ...]:
    """Return ResNet-20 with the smallest 90 % of each layer's weights zero."""
    return _pruned(0.9)


def two_of_four() -> tuple[Any, ...]:
    """Return ResNet-20 with the two smaller of each 4 consecutive input channels zero, where 4 divides them."""
    import torch

    module, *rest = resnet.resnet20()
    with torch.no_grad():
        for weight in _weights(module):
            if weight.shape[1] % 4:
                continue
            last = weight.movedim(1, -1).contiguous()  # input channels
            groups = last.reshape(*last.shape[:-1], -1, 4)
            kept = groups.scatter(-1, groups.abs().argsort(-1)[..., :2], 0).reshape(last.shape)
            weight.copy_(kept.movedim(-1, 1))
    return (module, *rest)


def _pruned(share: float) -> tuple[Any, ...]:
    import torch

    module, *rest = resnet.resnet20()
    with torch.no_grad():
        for weight in _weights(module):
            smallest = weight.abs().flatten().argsort()[: int(share * weight.numel())]
            weight.view(-1)[smallest] = 0
    return (module, *rest)


def _weights(module: Any) -> Iterator[Any]:
    from torch import nn

    return (m.weight for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def images() -> Iterator[Sample]:
    return itertools.islice(resnet.calibration(), IMAGES)


def kept(pruning: str, backends: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Export one pruning to int8 by every backend below *folder*; return a row per backend."""
    answer = portcall.export(
        f"benchmarks.compression:{pruning}",
        [f"{name}:int8" for name in backends],
        folder / pruning,
        data="benchmarks.compression:images",
        reporter=Reporter(True),
    )
    rows = []
    for result in answer["results"]:
        row = {"pruning": pruning, "backend": result["backend"], "reason": result["reason"]}
        if result["outcome"] == "artifact" and result["compression"] is not None:
            found = portcall.api.inspect(result["path"])
            row["zero_fraction"] = result["compression"]["zero_fraction"]
            row["patterns"] = dict(Counter(layer["pattern"] for layer in found["layers"]))
            row["lost"] = sum(e["lost"] for e in result["compression"]["layers"])
            row["compared_layers"] = result["compression"]["compared_layers"]
        rows.append(row)
    before = portcall.api.inspect(f"benchmarks.compression:{pruning}")
    patterns = dict(Counter(layer["pattern"] for layer in before["layers"]))
    return [{**row, "patterns_before": patterns} for row in rows]


def planted(folder: Path, backends: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Plant *count* losses of each kind in the 50 % pruned network; return a row per loss: was its layer named?"""
    rng = np.random.default_rng(SEED)
    spec, table = "benchmarks.compression:unstructured_50", folder / "planted.pctable"
    folder.mkdir(parents=True, exist_ok=True)
    portcall.calibrate(spec, "benchmarks.compression:images", table, kinds=["tflite"])
    sections = CalibrationTable.load(table).sections
    rows = []
    with open_workspace(Reporter(False), 1800.0) as work:
        source = open_source(work, spec, {})
        before = compression.source_contents(source, None)
        graphs: dict[str, Graph] = {}
        for kind, number in itertools.product(("zero", "mask"), range(count)):
            name = backends[number % len(backends)]
            backend = get_backend(name)
            if backend.graph not in graphs:
                work.need(name, "export")
                graphs[backend.graph] = lower(work, source, backend)
            graph = graphs[backend.graph]
            layer = int(rng.integers(len(before.weights)))
            with tempfile.TemporaryDirectory(prefix="planted-") as place:
                changed = plant(graph, layer, kind, Path(place), rng)
                section = sections[graph.sha256]
                found = judge(name, changed, section, before, Path(place) / "artifact")
            wanted = before.weights[layer].name
            rows.append(
                {"kind": kind, "backend": name, "layer": wanted, "found": found, "named": [wanted] == found}
            )
    return rows


def plant(graph: Graph, layer: int, kind: str, directory: Path, rng: np.random.Generator) -> Graph:
    """Write *graph* into *directory* with the zeros of its product number *layer* spoilt; return that graph."""
    if graph.kind == "onnx":
        import onnx
        from onnx import numpy_helper

        from portcall.exporters._operands import weighted_nodes

        model = onnx.load(str(graph.path))
        _, tensor = list(weighted_nodes(model.graph))[layer]
        values = _spoilt(numpy_helper.to_array(tensor), kind, rng)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, str(directory / graph.path.name))
    else:
        from portcall.exporters import _tflite

        flat = _tflite._read(graph.path.read_bytes())
        found = [(op, _tflite.weight_of(flat, op, k)) for op, k in _tflite.operators(flat)]
        op, weight = [(op, w) for op, w in found if w is not None][layer]
        buffer = flat.subgraphs[0].tensors[op.inputs[1]].buffer
        _tflite.set_constant(flat, buffer, _spoilt(weight, kind, rng))
        (directory / graph.path.name).write_bytes(_tflite._write(flat))
    return replace(graph, path=directory / graph.path.name)


def _spoilt(weight: Any, kind: str, rng: np.random.Generator) -> Any:
    values = weight.copy()
    zeros = np.flatnonzero(values == 0)
    most = float(np.abs(values).max())
    if kind == "zero":
        values.reshape(-1)[rng.choice(zeros)] = most / 2
    else:
        values.reshape(-1)[zeros] = rng.normal(0, most / 10, len(zeros))
    return values


def judge(name: str, graph: Graph, section: Section, before: Contents, directory: Path) -> list[str]:
    """Export *graph* to int8 here and compare it with the source, as ``export`` does; return the layers it names."""
    backend = get_backend(name)
    precision = backend.capabilities.precisions["int8"]
    directory.mkdir()
    ranges = section.ranges("minmax", precision.symmetric, precision.bits)
    exported = backend.export(graph, Recipe("int8"), ranges, directory)
    artifact = Artifact(directory, exported.entry, name, "int8", exported.inputs, exported.outputs)
    assert backend.contents is not None
    found = compression.compare(before, backend.contents(artifact, {}))
    try:
        compression.check_kept(f"{name}:int8", found)
    except VerificationFailed as error:
        return [w.name for w in before.weights if f"layer {w.name!r} " in error.message]
    return []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of ``kept`` as an aligned table."""
    lines = []
    for row in rows:
        share = row.get("zero_fraction")
        figures = ["-"] * 3
        if share is not None:
            difference = 100 * (share["after"] - share["before"])
            figures = [f"{100 * share['before']:.3f}", f"{100 * share['after']:.3f}", f"{difference:+.3f}"]
        patterns = [_told(row["patterns_before"]), _told(row.get("patterns", {}))]
        note = row["reason"] or f"{row.get('lost', 0)} zeros lost in {row.get('compared_layers', 0)} layers"
        lines.append([row["pruning"], row["backend"], *figures, *patterns, note])
    return align(HEADER, lines)


def _told(patterns: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(patterns.items())) or "-"


def main() -> None:
    """Print both tables; see the top of this file."""
    parser = argparse.ArgumentParser(description="zeros of a pruned ResNet-20 in every int8 format")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    parser.add_argument("--prunings", default=",".join(PRUNINGS), help="default: %(default)s")
    parser.add_argument(
        "--planted", type=int, default=PLANTED, help="losses of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-compression"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if not os.environ.get(resnet.VARIABLE):
        sys.exit(
            f"error: set {resnet.VARIABLE} to the folder of the CIFAR-10 ResNets (see benchmarks/resnet.py)"
        )
    backends = arguments.backends.split(",")
    rows: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    try:
        for pruning in filter(None, arguments.prunings.split(",")):
            rows += kept(pruning, backends, arguments.folder)
            print(table(rows), file=sys.stderr, flush=True)
        if arguments.planted:
            losses = planted(arguments.folder, backends, arguments.planted)
    except PortcallError as error:
        sys.exit(f"error: {error}")
    if rows:
        print(table(rows))
    for kind in ("zero", "mask"):
        chosen = [r for r in losses if r["kind"] == kind]
        if chosen:
            print(f"planted losses ({kind}): {sum(r['named'] for r in chosen)} of {len(chosen)} named")
            for row in chosen:
                if not row["named"]:
                    print(f"  {row['backend']} {row['layer']}: found {row['found']}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"schema": 1, "results": rows, "planted": losses})


if __name__ == "__main__":
    main()
