"""LiteRT (TFLite): fp32, fp16, int8-weights, int8-dynamic, int8 and int16x8, all from one float flatbuffer."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterator, Mapping, Optional, Tuple, Union

from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    Capabilities,
    Census,
    Exported,
    Graph,
    Option,
    Precision,
    Ranges,
    Recipe,
    Session,
    Source,
    TensorSpec,
    Trace,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import UnsupportedError
from portcall.targets.agent.probing import probe_modules
from portcall.targets.agent.profiling import Profiler

RUNTIMES = (
    ("ai_edge_litert.interpreter", "ai-edge-litert"),
    ("tflite_runtime.interpreter", "tflite-runtime"),
    ("tensorflow", "tensorflow"),
)
"""Modules with an Interpreter, the first that is there is used -> their distributions."""


def probe(role: str) -> Union[Available, Unavailable]:
    if role == "run":
        module, distribution = _runtime()
        found = probe_modules("tflite", [module], distribution=distribution)
        if isinstance(found, Available) and distribution == "ai-edge-litert":
            # Its own numbers: they do not compare with those of TensorFlow Lite, of which min_runtime is one.
            return Available(f"ai-edge-litert {found.version}")
        return found
    return probe_modules(
        "tflite",
        ["ai_edge_litert.interpreter", "ai_edge_quantizer"],
        found=["torch", "litert_torch"],
        distribution="ai-edge-litert",
    )


def _runtime() -> Tuple[str, str]:
    """Return the module with the Interpreter and its distribution; LiteRT's where none is installed."""
    import importlib.util

    for module, distribution in RUNTIMES:
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            return module, distribution
    return RUNTIMES[0]


def lower(source: Source, directory: Path) -> Graph:
    """Convert the source to a float flatbuffer of fixed shapes, in its layout and names.

    A TRANSPOSE that a RESHAPE can replace is replaced: see ``_tflite_transpose``.
    """
    from portcall.exporters import _tflite, _tflite_keras, _tflite_torch, _tflite_transpose, _trained_tflite

    if source.format in ("keras", "savedmodel"):
        flatbuffer = _tflite_keras.convert(source)
    else:
        flatbuffer = _tflite_torch.convert(source, directory)
    model = _tflite._read(_tflite.with_source_interface(flatbuffer, source))
    _tflite_transpose.simplify(model)
    path = directory / "graph.tflite"
    path.write_bytes(_tflite._write(model))
    if source.quantized:
        _trained_tflite.attach(source, path)
    names = {t.name: t.name for t in [*source.inputs, *source.outputs]}
    return Graph("tflite", path, hashlib.sha256(path.read_bytes()).hexdigest(), source, names)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    from importlib.metadata import version

    from portcall.exporters import (
        _tflite_io,
        _tflite_quantize,
        _tflite_transpose,
        _tflite_versions,
        _trained_tflite,
    )

    options = recipe.options
    asked = _tflite_versions.parse_asked(options)
    flatbuffer = graph.path.read_bytes()
    notes: Tuple[str, ...] = ()
    trained = _trained_tflite.load(graph.path) if graph.source.quantized else None
    if recipe.precision != "fp32":
        flatbuffer, notes = _tflite_quantize.quantize(
            graph.path, recipe.precision, ranges, options, trained=trained
        )
    flatbuffer, permutations, more = _tflite_io.with_interface(
        flatbuffer, recipe.precision, options, "tflite"
    )
    notes += more
    notes += _tflite_transpose.notes(flatbuffer)
    flatbuffer, oldest = _tflite_versions.settle(flatbuffer, asked)
    path = directory / "model.tflite"
    path.write_bytes(flatbuffer)
    inputs, outputs = _tflite_io.bound(flatbuffer, permutations, graph.source)
    return Exported(
        path.name,
        (path.name,),
        inputs,
        outputs,
        {d: version(d) for d in _converters(graph.source.format)},
        notes,
        oldest,
    )


def _converters(source_format: str) -> Tuple[str, ...]:
    """Return the distributions that made the flatbuffer."""
    if source_format not in ("keras", "savedmodel"):
        return ("ai-edge-litert", "ai-edge-quantizer", "litert-torch")
    from importlib.metadata import packages_distributions

    return ("ai-edge-litert", "ai-edge-quantizer", packages_distributions()["tensorflow"][0])


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _tflite

    return _tflite.census(artifact.path)


class LiteRtSession(Session):
    """An Interpreter with XNNPACK (its default delegate); inputs and outputs go by their signature names.

    The runtime is LiteRT's, else TensorFlow Lite's own, else the one inside TensorFlow.
    """

    no_memory_figures = "the interpreter's Python API does not tell the size of its arena, nor XNNPACK's"

    def __init__(self, path: Path, workload: Workload) -> None:
        import importlib

        module, distribution = _runtime()
        found = importlib.import_module(module)
        Interpreter = found.lite.Interpreter if module == "tensorflow" else found.Interpreter
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
            "runtime": f"{distribution} {_version(distribution, found)}",
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


def _version(distribution: str, module: Any) -> str:
    """Return the version of a runtime's distribution; TensorFlow has several of other names."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))


def _spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    import numpy as np

    signature = detail.get("shape_signature", detail["shape"])
    shape = tuple(int(d) if d >= 0 else f"dim_{i}" for i, d in enumerate(signature))
    return TensorSpec(name, shape, np.dtype(detail["dtype"]).name)


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    if artifact.options.get("api") == "compiled_model":  # asked for by bench --witness alone
        from portcall.exporters._tflite_compiled import CompiledModelSession

        yield CompiledModelSession(artifact.path, workload)
    else:
        yield LiteRtSession(artifact.path, workload)


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_tflite

    return _contents_tflite.read(artifact.path)


def trace(artifact: Artifact, workload: Workload) -> ContextManager[Trace]:
    from portcall.exporters import _trace_tflite

    return _trace_tflite.trace(artifact, workload)


@contextmanager
def profile(artifact: Artifact, workload: Workload) -> Iterator[Profiler]:
    from portcall.exporters._profile_tflite import LiteRtProfiler

    yield LiteRtProfiler(artifact, workload)


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
        source_formats=("onnx", "pt2", "torch", "keras", "savedmodel"),
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
        options={
            "io": Option(
                "type of inputs and outputs; integers are round(x / scale) + zero_point of the manifest",
                ("float", "int8", "int16"),
                precisions=("int8", "int16x8"),
            ),
            "layout": Option(
                "order of axes of inputs and outputs: the source's, or channels last where that saves a TRANSPOSE",
                ("source", "channels_last"),
            ),
            "min_runtime": Option("version of TensorFlow Lite that has to load the artifact, e.g. 2.11"),
        },
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    contents=contents,
    example=EXAMPLE,
    trace=trace,
    profile=profile,
)
