"""TensorRT for RTX: fp32, fp16, bf16 and int8 engines, built ahead of time, without a GPU, one per compute capability.

An engine holds the graph with its kernels chosen; a GPU of its capability compiles them when it loads it (just in
time). model.onnx beside the engines is what they were built from: parity is interpreted on it, and a GPU of another
capability builds its engine from it. An engine of TensorRT itself is another format.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterator, List, Mapping, Optional, Tuple, Union

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
    Trace,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import BadInput, CellFailed
from portcall.targets.agent.probing import probe_modules
from portcall.targets.agent.profiling import Profiler

CAPABILITIES = "8.6,8.9,12.0"


def probe(role: str) -> Union[Available, Unavailable]:
    """Tell whether engines can be built here (no GPU needed), or run."""
    if role == "export":
        return probe_modules("tensorrt_rtx", ["tensorrt_rtx", "onnx", "onnxruntime"])
    found = probe_modules("tensorrt_rtx", ["tensorrt_rtx"])
    if isinstance(found, Unavailable):
        return found
    from portcall.exporters.tensorrt import probe_gpu

    return probe_gpu("tensorrt_rtx", found)


def lower(source: Source, directory: Path) -> Graph:
    from portcall.exporters import _onnx

    return _onnx.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    """Write model.onnx, build.json and model.smNN.engine for each capability; notes give seconds and bytes of each.

    Raises UnsupportedError with the names of the nodes that the parser refuses, BadInput for a capability that this
    version does not build for.
    """
    import time

    import tensorrt_rtx as trt

    from portcall.exporters import _tensorrt, _tensorrt_recipe, tensorrt

    chosen = capabilities(trt, str(recipe.options.get("compute_capability", CAPABILITIES)))
    profile = _tensorrt.chosen_profile(recipe.options, graph.source.inputs, graph.source.example_shapes)
    path = directory / "model.onnx"
    files, notes = tensorrt.write_model(graph, recipe, ranges, path)
    typed = recipe.precision in ("fp16", "bf16")
    _tensorrt_recipe.write_build(directory, recipe.precision, typed, profile)
    files = (*files, _tensorrt_recipe.BUILD)
    for capability in chosen:
        start = time.perf_counter()
        plan = bytes(_build(trt, path, profile, capability))
        seconds = time.perf_counter() - start
        (directory / engine_name(capability)).write_bytes(plan)
        files = (*files, engine_name(capability))
        notes = (
            *notes,
            f"engine for compute capability {capability}: {len(plan)} bytes, built in {seconds:.2f} s without a GPU",
        )
    found = tensorrt.exported(graph, path.name, files, notes, str(trt.__version__))
    return replace(found, versions={**found.versions, "tensorrt_rtx": str(trt.__version__)})


def capabilities(trt: Any, text: str) -> List[str]:
    """Return the compute capabilities of "8.6,8.9". Raises BadInput for those that *trt* does not build for."""
    known = {
        f"{name[2:-1]}.{name[-1]}"
        for name in dir(trt.ComputeCapability)
        if name[:2] == "SM" and name[2:].isdigit()
    }
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [w for w in wanted if w not in known]
    if unknown:
        raise BadInput(
            f"TensorRT-RTX {trt.__version__} builds nothing for compute capability {unknown[0]!r}",
            f"It builds for: {', '.join(sorted(known, key=float))}",
        )
    return wanted


def engine_name(capability: str) -> str:
    return f"model.sm{capability.replace('.', '')}.engine"


def _build(trt: Any, path: Path, profile: Any, capability: Optional[str]) -> Any:
    """Return the serialized engine of an ONNX file; for this machine's GPU where *capability* is None."""
    from portcall.exporters._tensorrt import EngineBuilder

    class For(EngineBuilder):
        def configure(self, config: Any) -> Any:
            kinds = trt.ComputeCapability
            wanted = (
                kinds.CURRENT if capability is None else getattr(kinds, f"SM{capability.replace('.', '')}")
            )
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(wanted, 0):
                raise CellFailed(
                    f"TensorRT-RTX refuses compute capability {capability}", "Choose another one"
                )
            return super().configure(config)

    return For(trt, path).build(profile)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import tensorrt

    return tensorrt.census(artifact, shapes)


def interpret(artifact: Artifact, workload: Workload) -> ContextManager[Session]:
    """Run model.onnx in ONNX Runtime on the CPU, as the backend tensorrt does."""
    from portcall.exporters import tensorrt

    return tensorrt.interpret(artifact, workload)


def trace(artifact: Artifact, workload: Workload) -> ContextManager[Trace]:
    """Show the tensors of model.onnx, which the engines were built from; an engine shows none of its own."""
    from portcall.exporters import tensorrt

    return tensorrt.trace(artifact, workload)


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run the engine for this GPU's capability, else one built here. Unproven: see ``_tensorrt_session``."""
    from portcall.exporters._tensorrt_session import EngineSession

    with _engine(artifact, workload, EngineSession) as session:
        yield session


@contextmanager
def profile(artifact: Artifact, workload: Workload) -> Iterator[Profiler]:
    """Like ``load``, with a profiler. Unproven: see ``_profile_tensorrt``."""
    from portcall.exporters._profile_tensorrt import EngineProfiler

    with _engine(artifact, workload, EngineProfiler) as session:
        yield session


@contextmanager
def _engine(artifact: Artifact, workload: Workload, kind: Any) -> Iterator[Any]:
    """Yield a session of class *kind* for the engine."""
    import tensorrt_rtx as trt
    from cuda.bindings import runtime as cuda

    from portcall.exporters import _tensorrt, _tensorrt_recipe
    from portcall.exporters._tensorrt_session import device

    def rebuild(shapes: Dict[str, Tuple[int, ...]]) -> Any:
        return _build(trt, artifact.path, {n: _tensorrt.Limits(s, s, s) for n, s in shapes.items()}, None)

    gpu = device(cuda)
    engine = artifact.directory / engine_name(f"{gpu.major}.{gpu.minor}")
    if engine.is_file():
        session = kind(trt, cuda, engine.read_bytes(), artifact, engine.name, rebuild)
    else:
        profile = _tensorrt_recipe.read(artifact.directory)["profile"]
        tuned = _tensorrt.tuned_profile(profile, artifact, workload)
        plan = _build(trt, artifact.path, tuned, None)
        session = kind(trt, cuda, plan, artifact, "built in memory", rebuild)
    try:
        yield session
    finally:
        session.close()


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_onnx

    return _contents_onnx.read(artifact.path, shapes)


EXAMPLE = '''"""Run this artifact with TensorRT for RTX alone: pip install tensorrt-rtx cuda-python numpy"""
import pathlib

import numpy
import tensorrt_rtx as trt
from cuda.bindings import runtime as cuda

@COMMON@


gpu = cuda.cudaGetDeviceProperties(0)[1]
path = here / f"model.sm{gpu.major}{gpu.minor}.engine"
if not path.exists():
    raise SystemExit(f"no {path.name} here: export with compute_capability={gpu.major}.{gpu.minor}")
engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
context = engine.create_execution_context()
names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
outputs = [name for name in names if name not in inputs]
arrays = {name: numpy.ascontiguousarray(samples[name][0]) for name in inputs}
for name, array in arrays.items():
    context.set_input_shape(name, array.shape)
for name in outputs:
    dtype = trt.nptype(engine.get_tensor_dtype(name))
    arrays[name] = numpy.empty(tuple(context.get_tensor_shape(name)), dtype)
addresses = {name: cuda.cudaMalloc(max(array.nbytes, 1))[1] for name, array in arrays.items()}
for name, address in addresses.items():
    context.set_tensor_address(name, int(address))
for name in inputs:
    array, to_device = arrays[name], cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.cudaMemcpy(addresses[name], array.ctypes.data, array.nbytes, to_device)
context.execute_async_v3(0)
cuda.cudaDeviceSynchronize()
for name in outputs:
    array, to_host = arrays[name], cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.cudaMemcpy(array.ctypes.data, addresses[name], array.nbytes, to_host)
    show(name, array)
'''

BACKEND = Backend(
    name="tensorrt_rtx",
    graph="onnx",
    capabilities=Capabilities(
        source_formats=("onnx", "pt2", "torch"),
        precisions={
            "fp32": Precision("float32 (TensorFloat-32 off)"),
            "fp16": Precision("compute: float16 tensors and weights, float32 sums (typed network)"),
            "bf16": Precision("compute: bfloat16 tensors and weights, float32 sums (typed network)"),
            "int8": Precision(
                "Q/DQ: int8 symmetric activations, int8 per-channel weights, float bias",
                calibrated=True,
                symmetric=True,
                integer=True,
            ),
        },
        options={
            "compute_capability": Option(f"of the GPUs to build engines for (default: {CAPABILITIES})"),
            "profile": Option(
                "shapes that one engine takes: INPUT:MIN..OPT..MAX, e.g. x:1x3x224x224..1x3x224x224..8x3x224x224 "
                "(default: around the example, up to 8 along the first axis)"
            ),
            "float": Option(
                "what stays float in int8 computes in this", choices=("fp32", "fp16"), precisions=("int8",)
            ),
            "transfers": Option(
                "copies between host and device inside the timed inference", choices=("excluded", "included")
            ),
            "cuda_graph": Option("launch the engine as a CUDA graph", kind="bool"),
        },
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    contents=contents,
    example=EXAMPLE,
    interpret=interpret,
    trace=trace,
    profile=profile,
)
