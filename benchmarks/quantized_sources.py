"""``python -m benchmarks.quantized_sources``: what exports of quantization-aware trained networks keep.

Trains the networks of ``benchmarks/quantized_networks.py``, exports each to int8 on every backend that is installed,
and prints per cell: scales kept and changed as read back from the artifact, accuracy of the fake-quantized source and
of the artifact on the same digits, and their difference with its paired standard error,
sqrt(b + c - (b - c)^2 / n) / n with b and c the samples that only one of the two has right (McNemar's counts).

Then it plants re-calibrated scales: one scale of an exported ONNX file, or flatbuffer, is multiplied by 1.1 and the
read-back must name its layer.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import portcall
from benchmarks import quantized_networks
from portcall import artifact as artifacts
from portcall.bench.report import align
from portcall.core import Graph, Workload
from portcall.exporters import _trained_check, get_backend
from portcall.progress import Reporter
from portcall.source import open_reference, open_source
from portcall.targets.agent.binding import to_runtime, to_source
from portcall.targets.agent.contract import Available, Recipe, Source
from portcall.targets.agent.errors import VerificationFailed

RECALIBRATED = 1.1


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Scales and accuracy of quantized sources on every int8 backend."
    )
    parser.add_argument(
        "--folder", type=Path, help="keep networks and artifacts here (default: a temporary one)"
    )
    parser.add_argument("--to", default=",".join(_trained_check.BACKENDS), help="backends (default: all)")
    parser.add_argument("--steps", type=int, default=600, help="of training in float (default 600)")
    parser.add_argument("--plant", type=int, default=10, help="re-calibrated scales to plant (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[quantized_networks.FOLDER] = str(folder)
        if not (folder / "evaluation.npz").is_file():
            quantized_networks.write(folder, options.steps)
        backends = options.to.split(",")
        rows = [
            row
            for name, spec in quantized_networks.sources(folder).items()
            for row in measured(name, spec, backends, folder)
        ]
        planted = plant(folder, options.plant) if options.plant else []
    print(table(rows))
    named = sum(p["named"] for p in planted)
    print(f"re-calibrated scales planted: {len(planted)}, failed with the layer named: {named}")
    if options.json:
        artifacts.write_json(options.json, {"schema": 1, "results": rows, "planted": planted})
    failed = [r for r in rows if r["outcome"] == "failed"]
    return 1 if failed or named < len(planted) else 0


def measured(name: str, spec: str, backends: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Export one network to *backends*; return a row per cell."""
    data = folder / "evaluation.npz"
    answer = portcall.export(
        spec,
        [f"{b}:int8" for b in backends],
        folder / f"artifacts of {name}",
        evaluation=data,
        reporter=Reporter(True),
    )
    with tempfile.TemporaryDirectory() as place:
        source = Source.from_json(open_source({"spec": spec, "directory": place, "shapes": {}}, None))
        run = open_reference(source)
        with np.load(data) as stored:
            images, labels = stored[source.inputs[0].name], stored["labels"]
        expected = np.array([next(iter(run({source.inputs[0].name: i}).values())).argmax() for i in images])
    rows = []
    for result in answer["results"]:
        row = {
            "network": name,
            "backend": result["backend"],
            "outcome": result["outcome"],
            "reason": result["reason"],
        }
        if result["path"] is not None:
            found = predictions(Path(result["path"]), images)
            row |= {"trained": result["trained"], "sqnr_db": result["parity"]["sqnr_db"]}
            row |= paired(expected == labels, found == labels)
        rows.append(row)
    return rows


def predictions(path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the class of every image by the artifact's runtime, else by its interpreter."""
    artifact, _ = artifacts.open_artifact(path.resolve())
    backend = get_backend(artifact.backend)
    can_run = isinstance(backend.probe("run"), Available)
    load = backend.load if can_run or backend.interpret is None else backend.interpret
    [bound], [output] = artifact.inputs, artifact.outputs
    found = []
    with load(artifact, Workload(threads=1)) as session:
        for image in images:
            session.set_inputs({bound.name: to_runtime(bound, image)})
            session.infer()
            found.append(int(to_source(output, session.get_outputs()[output.name]).argmax()))
    return np.array(found)


def paired(source: np.ndarray[Any, Any], artifact: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return both accuracies, their difference in points and its paired standard error, from bool[n] each."""
    n = len(source)
    lost, won = int((source & ~artifact).sum()), int((artifact & ~source).sum())
    error = math.sqrt(lost + won - (lost - won) ** 2 / n) / n
    return {
        "n": n,
        "source": float(source.mean()),
        "artifact": float(artifact.mean()),
        "difference_points": 100 * (won - lost) / n,
        "standard_error_points": 100 * error,
        "within_one": abs(won - lost) / n <= error,
    }


def plant(folder: Path, count: int) -> list[dict[str, Any]]:
    """Multiply one scale after the other in exported files, and read them back; return whether the layer was named."""
    import onnx
    from onnx import numpy_helper

    from portcall.exporters import _tflite, _trained, _trained_tflite

    spec = quantized_networks.sources(folder)["onnx"]
    made = []
    with tempfile.TemporaryDirectory() as place:
        source = Source.from_json(open_source({"spec": spec, "directory": place, "shapes": {}}, None))
        for name in ("onnxruntime", "tflite"):
            backend = get_backend(name)
            work = Path(place) / name
            (work / "out").mkdir(parents=True)
            graph: Graph = backend.lower(source, work)
            exported = backend.export(graph, Recipe("int8"), None, work / "out")
            path = work / "out" / exported.entry
            whole = path.read_bytes()
            rng = np.random.default_rng(0)
            if name == "onnxruntime":
                entries = _trained.read(onnx.load(str(path)))
            else:
                stored = _trained_tflite.load(graph.path)
                held = {e["source"] for k in ("activations", "weights") for e in stored[k].values()}
                entries = [e for e in map(_trained.Entry.from_json, stored["entries"]) if e.tensor in held]
            for index in rng.permutation(len(entries))[: (count + (name == "onnxruntime")) // 2]:
                entry = entries[index]
                if name == "onnxruntime":
                    model = onnx.load(str(path))
                    for node in model.graph.node:
                        own = entry.tensor in (*node.input, *node.output)
                        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and own:
                            scale = next(t for t in model.graph.initializer if t.name == node.input[1])
                            changed = numpy_helper.to_array(scale) * np.float32(RECALIBRATED)
                            model.graph.initializer.append(
                                numpy_helper.from_array(changed, f"{scale.name} again")
                            )
                            for half in model.graph.node:
                                half.input[:] = [
                                    f"{scale.name} again" if i == scale.name else i for i in half.input
                                ]
                            break
                    path.write_bytes(model.SerializeToString())
                else:
                    flatbuffer = _tflite._read(whole)
                    kind = "weights" if entry.is_weight else "activations"
                    names = {n for n, e in stored[kind].items() if e["source"] == entry.tensor}
                    for tensor in flatbuffer.subgraphs[0].tensors:
                        held_scale = getattr(tensor.quantization, "scale", None)
                        if (
                            tensor.name.decode().removesuffix("_quantized") in names
                            and held_scale is not None
                        ):
                            tensor.quantization.scale = [float(s) * RECALIBRATED for s in held_scale]
                    path.write_bytes(_tflite._write(flatbuffer))
                made.append({"backend": name, "layer": entry.layer, "tensor": entry.tensor})
                made[-1] |= _found(name, graph, path, entry.layer)
                path.write_bytes(whole)
            _trained_check.check(name, graph, path)  # untouched, it passes
    return made


def _found(backend: str, graph: Graph, path: Path, layer: str) -> dict[str, Any]:
    try:
        _trained_check.check(backend, graph, path)
    except VerificationFailed as error:
        return {"named": repr(layer) in error.message, "message": error.message}
    return {"named": False, "message": "passed"}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures as text; accuracies in per cent, differences in points."""
    head = [
        "network",
        "backend",
        "kept",
        "changed",
        "n",
        "source %",
        "artifact %",
        "difference",
        "SE",
        "SQNR dB",
    ]
    lines: list[list[str]] = []
    for row in rows:
        cells = [row["network"], row["backend"]]
        if "trained" not in row:
            lines.append([*cells, *[""] * 7, f"{row['outcome']}: {row['reason']}"[:90]])
            continue
        changed = row["trained"]["changed"]
        lines.append(
            [
                *cells,
                str(row["trained"]["kept"]),
                str(len(changed)),
                str(row["n"]),
                f"{100 * row['source']:.2f}",
                f"{100 * row['artifact']:.2f}",
                f"{row['difference_points']:+.2f}",
                f"{row['standard_error_points']:.2f}",
                f"{row['sqnr_db']:.1f}",
            ]
        )
    return align(head, lines)


if __name__ == "__main__":
    sys.exit(main())
