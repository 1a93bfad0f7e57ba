"""ONNX Runtime on the CPU: fp32, fp16 (storage), int8-dynamic, static int8 as Q/DQ, int8 and int4 weights."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union

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
from portcall.targets.agent.probing import probe_modules
from portcall.targets.agent.profiling import Profiler

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({t})": t for t in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


def probe(role: str) -> Union[Available, Unavailable]:
    return probe_modules("onnxruntime", ["onnxruntime"] if role == "run" else ["onnxruntime", "onnx"])


def lower(source: Source, directory: Path) -> Graph:
    from portcall.exporters import _onnx

    return _onnx.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    import onnx
    import onnxruntime as ort

    from portcall.exporters import (
        _dynamic,
        _half_weights,
        _onnx,
        _opset,
        _qdq,
        _trained_rewrite,
        _weight_only,
    )

    path = directory / "model.onnx"
    notes: Tuple[str, ...] = ()
    if graph.source.quantized:
        files = _trained_rewrite.write(graph.path, path)
    elif recipe.precision == "int8":
        assert ranges is not None
        files, notes = _qdq.quantize(graph, ranges, path, recipe.options)
    elif recipe.precision == "int8-dynamic":
        files, notes = _dynamic.quantize(graph, path, recipe.options, ranges)
    elif recipe.precision in _weight_only.BITS:
        files, notes = _weight_only.quantize(graph, recipe.precision, ranges, path, recipe.options)
    elif recipe.precision == "fp16":
        model = onnx.load(str(graph.path))
        _half_weights.store(model)
        files = _onnx.save(model, path)
    else:
        files = _onnx.save(onnx.load(str(graph.path)), path)
    needed = _opset.settle(path, recipe.options)
    inputs, outputs = _onnx.bound_tensors(graph)
    versions = {"onnxruntime": str(ort.__version__), "onnx": str(onnx.__version__)}
    return Exported(path.name, files, inputs, outputs, versions, notes, needed)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _onnx, _weight_only

    found = _onnx.census(artifact.path, shapes)
    # A DequantizeLinear before a weight alone is storage, not integer arithmetic.
    return replace(found, quantize_nodes=0) if artifact.precision in _weight_only.BITS else found


class OnnxRuntimeSession(Session):
    """An InferenceSession with inputs and outputs bound once, so that ``infer`` copies nothing in Python.

    spinning: of threads that wait for work; None for the runtime's default (one thread has nobody to wait for).
    """

    no_memory_figures = "ONNX Runtime's Python API does not tell its arena's statistics (the C API does)"

    def __init__(self, path: Path, threads: int, spinning: Optional[bool] = None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        spinning = threads > 1 if spinning is None else spinning
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", "1" if spinning else "0")
        options.log_severity_level = 3
        self._session = self._open(path, options)
        self._binding: Any = None
        self.inputs = tuple(_spec(v) for v in self._session.get_inputs())
        self.outputs = tuple(_spec(v) for v in self._session.get_outputs())
        self.environment = {
            "runtime": f"onnxruntime {ort.__version__}",
            "providers": self._session.get_providers(),
            "threads": threads,
            "spinning": spinning,
            "build": ort.get_build_info(),
        }

    def _open(self, path: Path, options: Any) -> Any:
        import onnxruntime as ort

        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        import onnxruntime as ort

        self._binding = self._session.io_binding()
        self._held = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in arrays.items()}
        for name, value in self._held.items():
            self._binding.bind_ortvalue_input(name, value)
        for spec in self.outputs:
            self._binding.bind_output(spec.name)

    def infer(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def get_outputs(self) -> Dict[str, Any]:
        values = self._binding.copy_outputs_to_cpu()
        return {spec.name: value.copy() for spec, value in zip(self.outputs, values)}


def _spec(value: Any) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else str(d or f"dim_{i}") for i, d in enumerate(value.shape))
    return TensorSpec(value.name, shape, DTYPES.get(value.type, value.type))


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    yield OnnxRuntimeSession(artifact.path, workload.threads, workload.spinning)


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_onnx

    return _contents_onnx.read(artifact.path, shapes)


@contextmanager
def trace(artifact: Artifact, workload: Workload) -> Iterator[Trace]:
    from portcall.exporters._trace_onnx import OnnxTrace

    yield OnnxTrace(artifact, artifact.path, workload.threads, "the file operator by operator")


@contextmanager
def profile(artifact: Artifact, workload: Workload) -> Iterator[Profiler]:
    import tempfile

    from portcall.exporters._profile_onnxruntime import OnnxRuntimeProfiler

    with tempfile.TemporaryDirectory(prefix="portcall-profile-") as folder:
        yield OnnxRuntimeProfiler(artifact, workload, Path(folder))


EXAMPLE = '''"""Run this artifact with ONNX Runtime alone: pip install onnxruntime numpy"""
import pathlib

import numpy
import onnxruntime

@COMMON@


session = onnxruntime.InferenceSession(str(here / "@ENTRY@"), providers=["CPUExecutionProvider"])
feeds = {i.name: samples[i.name][0] for i in session.get_inputs()}
for output, value in zip(session.get_outputs(), session.run(None, feeds)):
    show(output.name, value)
'''

BACKEND = Backend(
    name="onnxruntime",
    graph="onnx",
    capabilities=Capabilities(
        source_formats=("onnx", "pt2", "torch"),
        precisions={
            "fp32": Precision("float32"),
            "fp16": Precision("storage: fp16 on disk, float32 arithmetic"),
            "int8-dynamic": Precision(
                "uint8 weights (per channel in convolutions), activations quantized at run time", integer=True
            ),
            "int8": Precision(
                "Q/DQ: uint8 asymmetric activations, int8 per-channel weights", calibrated=True, integer=True
            ),
            "int8-weights": Precision(
                "storage: int8 weights per channel, float activations (the MatMulNBits kernel may round them)"
            ),
            "int4-weights": Precision(
                "storage: int4 weights in groups of 32, int8 per channel in convolutions, float activations "
                "(the MatMulNBits kernel may round them)"
            ),
        },
        suffixes=(".onnx",),
        options={
            "opset": Option("operator set of the file, instead of the lowest that suffices", kind="int"),
            "min_runtime": Option("version of ONNX Runtime that has to load the artifact, e.g. 1.16"),
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
