"""TensorRT 8.6 to 11: fp32, fp16 and bf16 by the types of the graph, int8 as explicit symmetric Q/DQ.

The engine is built on the device, from ONNX and a recipe. A calibration cache for TensorRT up to 10 lies beside the
int8 model; a calibrator for it is in ``calibration/tensorrt_calibrator.py``.
"""

from __future__ import annotations

from contextlib import contextmanager
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
    Trace,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import UnsupportedError
from portcall.targets.agent.probing import probe_modules
from portcall.targets.agent.profiling import Profiler

ENGINE = "model.engine"
ENGINE_SUFFIXES = (".engine", ".plan")


def probe(role: str) -> Union[Available, Unavailable]:
    """Tell whether TensorRT exports or runs here; where there is no GPU its own Runtime is not asked, it crashes."""
    if role == "export":
        return probe_modules("onnxruntime", ["onnx", "onnxruntime"])
    found = probe_modules("tensorrt", ["tensorrt"])
    if isinstance(found, Unavailable):
        return found
    numbers = [int(part) for part in found.version.split(".")[:2] if part.isdigit()]
    if len(numbers) == 2 and numbers < [8, 6]:
        return Unavailable(f"TensorRT {found.version} is older than 8.6", "pip install 'tensorrt>=10'")
    return probe_gpu("tensorrt", found)


def probe_gpu(extra: str, found: Available) -> Union[Available, Unavailable]:
    """Return *found*, or what its GPU, the driver or the CUDA bindings lack."""
    problem = _no_gpu()
    if problem is not None:
        return Unavailable(problem, "Run it where nvidia-smi shows a GPU")
    cuda = probe_modules(extra, ["cuda.bindings.runtime"], distribution="cuda-bindings")
    return cuda if isinstance(cuda, Unavailable) else found


def _no_gpu() -> Optional[str]:
    """Say what is missing below TensorRT, or return None: asked of the driver, since a Runtime without it crashes."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver: {error}"
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"the NVIDIA driver answers with CUDA error {code}"
    return None if count.value else "the NVIDIA driver shows no GPU"


def lower(source: Source, directory: Path) -> Graph:
    from portcall.exporters import _onnx

    return _onnx.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    from portcall.exporters import _encodings, _tensorrt, _tensorrt_recipe

    options = recipe.options
    oldest = _tensorrt_recipe.oldest_runtime(recipe.precision, options)
    profile = _tensorrt.chosen_profile(options, graph.source.inputs, graph.source.example_shapes)
    files, notes = write_model(graph, recipe, ranges, directory / "model.onnx")
    version = _tensorrt_recipe.cache_version(options)
    cached = ranges is not None and version is not None
    if ranges is not None and version is not None:
        text = _encodings.tensorrt_cache(ranges, version)
        (directory / _tensorrt_recipe.CACHE).write_text(text, encoding="utf-8")
        files, notes = (*files, _tensorrt_recipe.CACHE), (*notes, _cache_note(version))
    texts, told = _tensorrt_recipe.write(directory, recipe.precision, profile, options, cached)
    notes = (*notes, *_tensorrt_recipe.opset_notes(directory / "model.onnx", options), *told)
    return exported(graph, "model.onnx", (*files, *texts), notes, oldest)


def _cache_note(version: str) -> str:
    return f"calibration.cache is for TensorRT {version} without Q/DQ: see trtexec.txt; trt_version makes another"


def write_model(
    graph: Graph, recipe: Recipe, ranges: Optional[Ranges], path: Path
) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write *graph* as the ONNX file of a precision; return the names of its files, and notes."""
    import onnx

    from portcall.exporters import _half, _onnx, _qdq_symmetric, _trained_rewrite

    options, half = recipe.options, recipe.precision
    if recipe.precision == "fp32":
        return _onnx.save(onnx.load(str(graph.path)), path), ()
    files: Tuple[str, ...] = ()
    notes: Tuple[str, ...] = ()
    source = graph.path
    if graph.source.quantized:
        if options.get("float") == "fp16":
            raise UnsupportedError(
                "the option float=fp16 rounds the scales that this model was trained with", "Leave it out"
            )
        return _trained_rewrite.write(graph.path, path, symmetric=True), ()
    if recipe.precision == "int8":
        assert ranges is not None
        files, notes = _qdq_symmetric.quantize(graph, ranges, path, options)
        if options.get("float") != "fp16":
            return files, notes
        source, half = path, "fp16"
    model = onnx.load(str(source))
    told = _half.convert(model, half, options.get("keep_float", ()))
    for name in files:
        (path.parent / name).unlink()
    return _onnx.save(model, path), tuple(dict.fromkeys((*notes, *told)))


def exported(
    graph: Graph, entry: str, files: Tuple[str, ...], notes: Tuple[str, ...], oldest: Optional[str]
) -> Exported:
    import onnx
    import onnxruntime as ort

    from portcall.exporters import _onnx

    inputs, outputs = _onnx.bound_tensors(graph)
    versions = {"onnx": str(onnx.__version__), "onnxruntime": str(ort.__version__)}
    return Exported(entry, files, inputs, outputs, versions, notes, oldest)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _onnx

    with _runnable(artifact.path) as path:
        return _onnx.census(path, shapes)


@contextmanager
def _runnable(path: Path) -> Iterator[Path]:
    """Yield *path*, or a version of it for ONNX Runtime's CPU where it computes in a half type."""
    import tempfile

    from portcall.exporters import _half_interpret

    if not _half_interpret.is_half(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="portcall-half-") as folder:
        target = Path(folder) / path.name
        _half_interpret.write_rounding(path, target)
        yield target


def finish(artifact: Artifact, workload: Workload, directory: Path) -> str:
    """Build the engine for the profile of build.json, tuned for *workload*. Unproven: see ``_tensorrt_session``."""
    import tensorrt as trt

    from portcall.targets.agent.finishing import cache_folder

    timing_cache = cache_folder() / f"tensorrt-{trt.__version__}.timing-cache"  # for every model built here
    (directory / ENGINE).write_bytes(bytes(_build(trt, artifact, workload, timing_cache)))
    return ENGINE


def _build(trt: Any, artifact: Artifact, workload: Workload, timing_cache: Optional[Path] = None) -> Any:
    from portcall.exporters import _tensorrt, _tensorrt_recipe

    recipe = _tensorrt_recipe.read(artifact.directory)
    profile = _tensorrt.tuned_profile(recipe["profile"], artifact, workload)
    return _builder(trt, artifact, recipe).build(profile, timing_cache)


def _builder(trt: Any, artifact: Artifact, recipe: Mapping[str, Any]) -> Any:
    from portcall.exporters import _tensorrt

    return _tensorrt.EngineBuilder(trt, artifact.path, recipe["precision"], recipe["typed"])


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run the finished engine, a bare one, or one built in memory. Unproven: see ``_tensorrt_session``."""
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
    import tensorrt as trt
    from cuda.bindings import runtime as cuda

    from portcall.exporters import _tensorrt, _tensorrt_recipe

    def rebuild(shapes: Dict[str, Tuple[int, ...]]) -> Any:
        builder = _builder(trt, artifact, _tensorrt_recipe.read(artifact.directory))
        return builder.build({name: _tensorrt.Limits(shape, shape, shape) for name, shape in shapes.items()})

    if artifact.path.suffix in ENGINE_SUFFIXES:
        session = kind(trt, cuda, artifact.path.read_bytes(), artifact, "as given", None)
    elif artifact.finished is not None:
        plan = artifact.finished.read_bytes()
        session = kind(trt, cuda, plan, artifact, "finished on this device", rebuild)
    else:
        plan = _build(trt, artifact, workload)
        session = kind(trt, cuda, plan, artifact, "built in memory", rebuild)
    try:
        yield session
    finally:
        session.close()


@contextmanager
def interpret(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run the ONNX file in ONNX Runtime on the CPU: Q/DQ as it is written, half types rounded after every operator."""
    from portcall.exporters.onnxruntime import OnnxRuntimeSession

    with _runnable(artifact.path) as path:
        session = OnnxRuntimeSession(path, workload.threads)
        if path != artifact.path:
            session.environment["arithmetic"] = "float32, rounded to half after every operator"
        yield session


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_onnx

    return _contents_onnx.read(artifact.path, shapes)


@contextmanager
def trace(artifact: Artifact, workload: Workload) -> Iterator[Trace]:
    """Show the tensors of the portable ONNX file, in ONNX Runtime: an engine shows none of its own."""
    from portcall.exporters._trace_onnx import OnnxTrace

    with _runnable(artifact.path) as path:
        yield OnnxTrace(artifact, path, workload.threads, "interpreted: the portable ONNX file")


EXAMPLE = '''"""Run this artifact with TensorRT alone: pip install tensorrt cuda-python numpy"""
import json
import pathlib

import numpy
import tensorrt as trt
from cuda.bindings import runtime as cuda

@COMMON@


logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
flags = trt.NetworkDefinitionCreationFlag.__members__
flag = flags.get("STRONGLY_TYPED", flags.get("EXPLICIT_BATCH"))
network = builder.create_network(0 if flag is None else 1 << int(flag))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(str(here / "@ENTRY@")):
    raise SystemExit(parser.get_error(0).desc())
config = builder.create_builder_config()
config.clear_flag(trt.BuilderFlag.TF32)
if "STRONGLY_TYPED" not in flags and json.loads((here / "build.json").read_text())["precision"] == "int8":
    if hasattr(trt.BuilderFlag, "INT8"):  # TensorRT 8
        config.set_flag(trt.BuilderFlag.INT8)
profile = builder.create_optimization_profile()
inputs = [network.get_input(i).name for i in range(network.num_inputs)]
outputs = [network.get_output(i).name for i in range(network.num_outputs)]
arrays = {name: numpy.ascontiguousarray(samples[name][0]) for name in inputs}
for name, array in arrays.items():
    profile.set_shape(name, array.shape, array.shape, array.shape)
config.add_optimization_profile(profile)
engine = trt.Runtime(logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
context = engine.create_execution_context()
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
    name="tensorrt",
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
        suffixes=ENGINE_SUFFIXES,
        options={
            "profile": Option(
                "shapes that one engine takes: INPUT:MIN..OPT..MAX, e.g. x:1x3x224x224..1x3x224x224..8x3x224x224 "
                "(default: around the example, up to 8 along the first axis)"
            ),
            "float": Option(
                "what stays float in int8 computes in this", choices=("fp32", "fp16"), precisions=("int8",)
            ),
            "trt_version": Option(
                "of the TensorRT that reads calibration.cache, e.g. 8.6.1 (default: 10.3.0)"
            ),
            "min_runtime": Option("the oldest TensorRT that must still build the artifact, e.g. 8.6"),
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
    finish=finish,
    trace=trace,
    profile=profile,
)
