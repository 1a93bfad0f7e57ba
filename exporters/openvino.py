"""OpenVINO on the CPU: fp32, fp16 (storage) and static int8 from our own Q/DQ graph and ranges."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    BoundTensor,
    Capabilities,
    Census,
    Dim,
    Exported,
    Graph,
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
from portcall.targets.agent.errors import CellFailed, UnsupportedError
from portcall.targets.agent.probing import probe_modules
from portcall.targets.agent.profiling import Profiler


def probe(role: str) -> Union[Available, Unavailable]:
    return probe_modules("openvino", ["openvino"] if role == "run" else ["openvino", "onnx", "onnxruntime"])


def lower(source: Source, directory: Path) -> Graph:
    from portcall.exporters import _onnx

    return _onnx.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    import onnx
    import openvino as ov

    from portcall.exporters import _half_weights, _onnx, _qdq, _trained_rewrite

    notes: Tuple[str, ...] = ()
    onnx_path = graph.path
    if graph.source.quantized:
        onnx_path = directory / "qdq.onnx"
        _trained_rewrite.write(graph.path, onnx_path)
    elif recipe.precision == "int8":
        assert ranges is not None
        if recipe.options.get("weight_symmetric", True) is False:
            raise UnsupportedError(
                "OpenVINO's CPU plugin computes convolutions with asymmetric weights in float32",
                'Leave out "weight_symmetric": false',
            )
        onnx_path = directory / "qdq.onnx"
        _, notes = _qdq.quantize(graph, ranges, onnx_path, recipe.options)
    elif recipe.precision == "fp16":
        onnx_path = directory / "rounded.onnx"
        rounded = onnx.load(str(graph.path))
        _half_weights.round_weights(rounded)
        _onnx.save(rounded, onnx_path)
    model = ov.convert_model(str(onnx_path))
    ov.save_model(model, str(directory / "model.xml"), compress_to_fp16=recipe.precision == "fp16")
    for file in (*directory.glob("qdq.onnx*"), *directory.glob("rounded.onnx*")):
        file.unlink()
    inputs, outputs = _onnx.bound_tensors(graph)
    kept = {name for port in [*model.inputs, *model.outputs] for name in port.get_names()}
    lost = [t.name for t in [*inputs, *outputs] if t.name not in kept]
    if lost:
        raise CellFailed(
            f"OpenVINO's converter renamed the tensors {lost}", "Give them other names in the model"
        )
    versions = {"openvino": str(ov.__version__)}
    return Exported("model.xml", ("model.xml", "model.bin"), inputs, outputs, versions, notes)


class OpenVinoSession(Session):
    """A compiled model with bound tensors, inference precision pinned to f32 (bf16 is the default on some CPUs)."""

    no_memory_figures = "OpenVINO's CPU plugin tells no memory figures"

    def __init__(self, artifact: Artifact, workload: Workload, streams: int = 1) -> None:
        import openvino as ov

        self._ov = ov
        core = ov.Core()
        self.compiled = core.compile_model(str(artifact.path), "CPU", self._config(workload, streams))
        precision = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if precision != "f32":
            raise CellFailed(
                f"OpenVINO took inference precision {precision}, f32 was asked for",
                "Use an OpenVINO version that honours INFERENCE_PRECISION_HINT on this CPU",
            )
        wanted = {t.name for t in [*artifact.inputs, *artifact.outputs]}
        self.inputs = tuple(_spec(port, wanted) for port in self.compiled.inputs)
        self.outputs = tuple(_spec(port, wanted) for port in self.compiled.outputs)
        self._request = self.compiled.create_infer_request()
        self.environment = {
            "runtime": f"openvino {ov.__version__}",
            "threads": int(self.compiled.get_property("INFERENCE_NUM_THREADS")),
            "inference_precision": precision,
            "streams": int(self.compiled.get_property("NUM_STREAMS")),
            "build": str(ov.get_version()),
            "plugin_capabilities": list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        }

    def another(self) -> Session:
        """Return a session with an infer request of its own on the same compiled model."""
        import copy

        session = copy.copy(self)
        session._request = self.compiled.create_infer_request()
        return session

    def _config(self, workload: Workload, streams: int) -> Dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": workload.threads * streams,
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        }

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        self._held = {}
        for index, spec in enumerate(self.inputs):
            tensor = self._ov.Tensor(arrays[spec.name], shared_memory=True)
            self._held[spec.name] = (arrays[spec.name], tensor)
            self._request.set_input_tensor(index, tensor)

    def infer(self) -> None:
        # On bound tensors, with its outputs left where they are: 2 us over the C++ call. start_async() and wait() hand
        # the work to another thread and back, which takes 12 us more.
        self._request.infer(share_outputs=True)

    def get_outputs(self) -> Dict[str, Any]:
        return {s.name: self._request.get_output_tensor(i).data.copy() for i, s in enumerate(self.outputs)}


def _spec(port: Any, wanted: Any) -> TensorSpec:
    names = sorted(port.get_names())
    name = next((n for n in names if n in wanted), names[0] if names else port.get_node().get_friendly_name())
    shape: List[Dim] = [
        f"dim_{i}" if d.is_dynamic else d.get_length() for i, d in enumerate(port.get_partial_shape())
    ]
    return TensorSpec(name, tuple(shape), str(port.get_element_type().to_dtype().name))


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    yield OpenVinoSession(artifact, workload)


@contextmanager
def load_streams(artifact: Artifact, workload: Workload, streams: int) -> Iterator[Sequence[Session]]:
    """Compile once with as many streams, and give each session an infer request of its own."""
    first = OpenVinoSession(artifact, workload, streams)
    yield [first, *(first.another() for _ in range(streams - 1))]


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    """Count from the compiled model: what this CPU plugin really executes on u8 or i8."""
    import openvino as ov

    model = ov.Core().read_model(str(artifact.path))
    bound: Dict[str, BoundTensor] = {t.source: t for t in artifact.inputs}
    model.reshape({bound[source].name: list(shape) for source, shape in shapes.items() if source in bound})
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    total = integer = quantize = 0
    known = True
    floats: List[str] = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {k: v.astype(str) for k, v in node.get_rt_info().items()}
        on_integers = info.get("runtimePrecision", "") in ("u8", "i8")
        quantize += on_integers and info["layerType"] not in ("Const", "Input", "Output")
        if info["layerType"] not in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            continue
        macs = _macs(node, info["layerType"])
        known = known and macs is not None
        total += macs or 0
        integer += (macs or 0) if on_integers else 0
        if not on_integers:
            floats.append(info.get("originalLayersNames", "").split(",")[0] or node.get_friendly_name())
    return Census(
        quantize,
        total if known else None,
        integer if known else None,
        tuple(floats),
        "runtime precision of the compiled model on this CPU",
    )


def _macs(node: Any, kind: str) -> Optional[int]:
    """Multiply-accumulates of a node of the execution graph, or None where a shape is dynamic."""
    partial = [node.get_output_partial_shape(0)]
    partial += [node.input(i).get_source_output().get_partial_shape() for i in (0, 1)]
    if any(p.is_dynamic for p in partial):
        return None
    output, first, weight = ([d.get_length() for d in p] for p in partial)
    elements = first if kind == "Deconvolution" else output
    if kind in ("Convolution", "Deconvolution"):  # weights [out, in, *kernel] or [groups, out, in, *kernel]
        per_element = weight[2:] if len(weight) > len(output) else weight[1:]
    else:
        per_element = first[-1:]
    result = 1
    for dim in [*elements, *per_element]:
        result *= dim
    return result


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_openvino

    bound = {t.source: t.name for t in artifact.inputs}
    return _contents_openvino.read(artifact.path, {bound.get(k, k): v for k, v in shapes.items()})


@contextmanager
def trace(artifact: Artifact, workload: Workload) -> Iterator[Trace]:
    from portcall.exporters._trace_openvino import OpenVinoTrace

    yield OpenVinoTrace(artifact, workload.threads)


@contextmanager
def profile(artifact: Artifact, workload: Workload) -> Iterator[Profiler]:
    from portcall.exporters._profile_openvino import OpenVinoProfiler

    yield OpenVinoProfiler(artifact, workload)


EXAMPLE = '''"""Run this artifact with OpenVINO alone: pip install openvino numpy"""
import pathlib

import numpy
import openvino

@COMMON@


model = openvino.Core().compile_model(str(here / "@ENTRY@"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
feeds = {name: samples[name][0] for port in model.inputs for name in port.get_names() if name in samples}
results = model(feeds)
for port in model.outputs:
    names = sorted(port.get_names())
    show(next((n for n in names if "reference/" + n in samples), names[0]), results[port])
'''

BACKEND = Backend(
    name="openvino",
    graph="onnx",
    capabilities=Capabilities(
        source_formats=("onnx", "pt2", "torch"),
        precisions={
            "fp32": Precision("float32 (inference precision pinned)"),
            "fp16": Precision("storage: fp16 on disk, float32 arithmetic"),
            "int8": Precision(
                "from Q/DQ: uint8 asymmetric activations, int8 per-channel weights",
                calibrated=True,
                integer=True,
            ),
        },
        suffixes=(".xml",),
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    contents=contents,
    example=EXAMPLE,
    trace=trace,
    load_streams=load_streams,
    profile=profile,
)
