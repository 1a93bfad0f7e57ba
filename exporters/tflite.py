"""LiteRT (TFLite): fp32, fp16, int8-weights, int8-dynamic, int8 and int16x8, all from one float flatbuffer."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union

from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    BoundTensor,
    Capabilities,
    Census,
    Exported,
    Graph,
    Precision,
    Ranges,
    Recipe,
    Session,
    Source,
    TensorSpec,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import UnsupportedError
from portcall.targets.agent.probing import probe_modules


def probe(role: str) -> Union[Available, Unavailable]:
    if role == "run":
        return probe_modules("tflite", ["ai_edge_litert.interpreter"], distribution="ai-edge-litert")
    return probe_modules(
        "tflite",
        ["ai_edge_litert.interpreter", "ai_edge_quantizer"],
        found=["torch", "litert_torch"],
        distribution="ai-edge-litert",
    )


def lower(source: Source, directory: Path) -> Graph:
    """Convert the exported program to a float flatbuffer of fixed shapes, in the source's layout and names."""
    import litert_torch
    import torch

    from portcall.exporters import _tflite
    from portcall.source_torch import flat_examples

    program = torch.export.load(source.path)
    leaves = []
    for spec, example in zip(source.inputs, flat_examples(program)):
        shape = source.example_shapes[spec.name]
        same = tuple(example.shape) == shape
        leaves.append(example if same else torch.zeros(shape, dtype=example.dtype))
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    model = litert_torch.convert(program.module(check_guards=False), tuple(args), dict(kwargs) or None)
    path = directory / "graph.tflite"
    model.export(str(path))
    path.write_bytes(_tflite.with_source_interface(path.read_bytes(), source))
    names = {t.name: t.name for t in [*source.inputs, *source.outputs]}
    return Graph("tflite", path, hashlib.sha256(path.read_bytes()).hexdigest(), source, names)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    from importlib.metadata import version

    from portcall.exporters import _tflite, _tflite_quantize

    flatbuffer = graph.path.read_bytes()
    notes: Tuple[str, ...] = ()
    if recipe.precision != "fp32":
        flatbuffer, notes = _tflite_quantize.quantize(graph.path, recipe.precision, ranges, recipe.options)
    path = directory / "model.tflite"
    path.write_bytes(flatbuffer)
    source, shapes = graph.source, _tflite.signature_shapes(path)
    inputs = tuple(BoundTensor(t.name, t.name, shapes[t.name], t.dtype) for t in source.inputs)
    outputs = tuple(BoundTensor(t.name, t.name, shapes[t.name], t.dtype) for t in source.outputs)
    versions = {d: version(d) for d in ("ai-edge-litert", "ai-edge-quantizer", "litert-torch")}
    return Exported(path.name, (path.name,), inputs, outputs, versions, notes)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _tflite

    return _tflite.census(artifact.path)


class LiteRtSession(Session):
    """An Interpreter with XNNPACK (its default delegate); inputs and outputs go by their signature names."""

    def __init__(self, path: Path, workload: Workload) -> None:
        from importlib.metadata import version

        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(path), num_threads=workload.threads)
        self._interpreter.allocate_tensors()
        signatures = self._interpreter.get_signature_list()
        key = next(iter(signatures), None)
        if key is None:
            inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
            self._inputs = {d["name"]: d for d in inputs}
            self._outputs = {d["name"]: d for d in outputs}
        else:
            runner = self._interpreter.get_signature_runner(key)
            self._inputs, self._outputs = runner.get_input_details(), runner.get_output_details()
        self.inputs = tuple(_spec(n, d) for n, d in self._inputs.items())
        self.outputs = tuple(_spec(n, d) for n, d in self._outputs.items())
        self.environment = {
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
            "threads": workload.threads,
            "delegate": "XNNPACK (default)",
        }

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        for name, detail in self._inputs.items():
            fixed = tuple(int(d) for d in detail["shape"])
            if fixed != arrays[name].shape:
                raise UnsupportedError(
                    f"input {name!r} has shape {arrays[name].shape}, this flatbuffer only {fixed}",
                    "Export it again with --shape",
                )
            self._interpreter.set_tensor(detail["index"], arrays[name])

    def infer(self) -> None:
        self._interpreter.invoke()

    def get_outputs(self) -> Dict[str, Any]:
        return {name: self._interpreter.get_tensor(detail["index"]) for name, detail in self._outputs.items()}


def _spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    import numpy as np

    signature = detail.get("shape_signature", detail["shape"])
    shape = tuple(int(d) if d >= 0 else f"dim_{i}" for i, d in enumerate(signature))
    return TensorSpec(name, shape, np.dtype(detail["dtype"]).name)


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    yield LiteRtSession(artifact.path, workload)


EXAMPLE = '''"""Run this artifact with LiteRT alone: pip install ai-edge-litert numpy"""
import pathlib

import numpy
from ai_edge_litert.interpreter import Interpreter

@COMMON@


runner = Interpreter(str(here / "@ENTRY@")).get_signature_runner()
for name, value in runner(**{name: samples[name][0] for name in runner.get_input_details()}).items():
    show(name, value)
'''

BACKEND = Backend(
    name="tflite",
    graph="tflite",
    capabilities=Capabilities(
        source_formats=("pt2", "torch"),
        precisions={
            "fp32": Precision("float32"),
            "fp16": Precision("storage: fp16 on disk, float32 arithmetic"),
            "int8-dynamic": Precision(
                "hybrid: int8 weights, activations quantized at run time", integer=True
            ),
            "int8-weights": Precision("storage: int8 weights per channel, float activations"),
            "int8": Precision(
                "int8 asymmetric activations, int8 per-channel weights", calibrated=True, integer=True
            ),
            "int16x8": Precision(
                "int16 symmetric activations, int8 per-channel weights", calibrated=True, integer=True
            ),
        },
        suffixes=(".tflite",),
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    example=EXAMPLE,
)
