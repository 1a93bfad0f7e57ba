"""TensorRT 10 and newer: fp32, and int8 as explicit symmetric Q/DQ. The engine is built on the device, from ONNX.

Older versions take a calibration cache instead, which lies beside the int8 model.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union

from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
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
from portcall.targets.agent.errors import CellFailed, UnsupportedError
from portcall.targets.agent.probing import probe_modules

CACHE = "calibration.cache"
CACHE_NOTE = (
    f"{CACHE} is for TensorRT up to 10 without Q/DQ: give it with the model.onnx of the fp32 artifact, "
    "its first line changed to that TensorRT's version (8.6.1 is TRT-8601, 10.3.0 is TRT-100300)"
)


def probe(role: str) -> Union[Available, Unavailable]:
    if role == "export":
        return probe_modules("onnxruntime", ["onnx", "onnxruntime"])
    found = probe_modules("tensorrt", ["tensorrt"])
    if isinstance(found, Unavailable):
        return found
    if found.version.partition(".")[0] in ("5", "6", "7", "8", "9"):
        return Unavailable(f"TensorRT {found.version} is older than 10", "pip install 'tensorrt>=10'")
    problem = _no_gpu()
    if problem is not None:
        return Unavailable(problem, "Run it where nvidia-smi shows a GPU")
    cuda = probe_modules("tensorrt", ["cuda.bindings.runtime"], distribution="cuda-bindings")
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
    import onnx
    import onnxruntime as ort

    from portcall.exporters import _encodings, _onnx, _qdq_symmetric

    path = directory / "model.onnx"
    notes: Tuple[str, ...] = ()
    if recipe.precision == "int8":
        assert ranges is not None
        files, notes = _qdq_symmetric.quantize(graph, ranges, path, recipe.options)
        (directory / CACHE).write_text(_encodings.tensorrt_cache(ranges), encoding="utf-8")
        files, notes = (*files, CACHE), (*notes, CACHE_NOTE)
    else:
        files = _onnx.save(onnx.load(str(graph.path)), path)
    inputs, outputs = _onnx.bound_tensors(graph)
    versions = {"onnx": str(onnx.__version__), "onnxruntime": str(ort.__version__)}
    return Exported(path.name, files, inputs, outputs, versions, notes)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _onnx

    return _onnx.census(artifact.path, shapes)


class EngineBuilder:
    """An ONNX file as a strongly typed network of *trt*: the module ``tensorrt``, or another with its interface.

    Raises UnsupportedError with the parser's words where it refuses the file.
    """

    def __init__(self, trt: Any, path: Path) -> None:
        self._trt = trt
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._builder = trt.Builder(self._logger)
        # TensorRT 11 knows no other networks.
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser = trt.OnnxParser(self._network, self._logger)
        if not self._parser.parse_from_file(str(path)):
            first = self._parser.get_error(0)
            raise UnsupportedError(
                f"TensorRT's ONNX parser refuses {path.name} at {first.node_name()!r}: {first.desc().rstrip('.')}",
                "Keep that node in float (keep_float), or use a newer TensorRT",
            )
        network = self._network
        self.inputs = tuple(self._spec(network.get_input(i)) for i in range(network.num_inputs))
        self.outputs = tuple(self._spec(network.get_output(i)) for i in range(network.num_outputs))

    def _spec(self, tensor: Any) -> TensorSpec:
        import numpy as np

        shape = tuple(f"dim_{i}" if d < 0 else int(d) for i, d in enumerate(tensor.shape))
        return TensorSpec(tensor.name, shape, np.dtype(self._trt.nptype(tensor.dtype)).name)

    def configure(self, config: Any) -> Any:
        """Return *config* set up: float32 stays float32, it is no TensorFloat-32."""
        config.clear_flag(self._trt.BuilderFlag.TF32)
        return config

    def build(self, shapes: Mapping[str, Tuple[int, ...]]) -> Any:
        """Return the serialized engine for exactly these *shapes* of the inputs. Raises CellFailed without one."""
        config = self.configure(self._builder.create_builder_config())
        profile = self._builder.create_optimization_profile()
        for spec in self.inputs:
            if any(isinstance(d, str) for d in spec.shape):
                profile.set_shape(spec.name, shapes[spec.name], shapes[spec.name], shapes[spec.name])
        config.add_optimization_profile(profile)
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise CellFailed("TensorRT built no engine; its log says why", "Use a newer TensorRT, or fp32")
        return plan


class TensorRtSession(Session):
    """An engine for the shapes that are bound; others make a new engine. That, and the copies between host and device,
    lie outside the timed inference (as in trtexec).

    Unproven: written after TensorRT 10's documentation, and run on no GPU yet. ``EngineBuilder`` is tested.
    """

    def __init__(self, artifact: Artifact, workload: Workload) -> None:
        import tensorrt as trt
        from cuda.bindings import runtime as cuda

        self._trt, self._cuda = trt, cuda
        self._engines = EngineBuilder(trt, artifact.path)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._stream = self._call(cuda.cudaStreamCreate())
        self._buffers: Dict[str, Tuple[Any, Any]] = {}  # name -> device address, host array
        self._shapes: Optional[Dict[str, Tuple[int, ...]]] = None
        self.inputs, self.outputs = self._engines.inputs, self._engines.outputs
        self.environment = {
            "runtime": f"tensorrt {trt.__version__}",
            "gpu": self._call(cuda.cudaGetDeviceProperties(0)).name.decode(),
            "copies": "outside the timed inference",
        }
        sources = {t.name: t.source for t in artifact.inputs}
        shapes = {t.name: workload.shapes.get(sources.get(t.name, t.name), t.shape) for t in self.inputs}
        shapes = {
            k: (workload.batch, *v[1:]) if v and isinstance(v[0], str) else v for k, v in shapes.items()
        }
        if not any(isinstance(d, str) for shape in shapes.values() for d in shape):
            self._prepare({k: tuple(int(d) for d in v) for k, v in shapes.items()})

    def _call(self, result: Tuple[Any, ...]) -> Any:
        """Return what a CUDA call gave. Raises CellFailed with the name of its error."""
        code, *values = result
        if int(code):
            raise CellFailed(
                f"CUDA answers with {code.name} ({int(code)})",
                "Check nvidia-smi and the free memory of the GPU",
            )
        return values[0] if values else None

    def _prepare(self, shapes: Dict[str, Tuple[int, ...]]) -> None:
        """Build the engine for *shapes* and give every input and output its memory on the device."""
        import numpy as np

        self._free()
        self._engine = self._runtime.deserialize_cuda_engine(self._engines.build(shapes))
        if self._engine is None:
            raise CellFailed("TensorRT could not load its engine; its log says why", "Check nvidia-smi")
        self._context = self._engine.create_execution_context()
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if min(shape, default=1) < 0:
                raise UnsupportedError(
                    f"the shape of {spec.name!r} depends on values", "Give it a fixed shape"
                )
            array = np.empty(shape, spec.dtype)
            address = self._call(self._cuda.cudaMalloc(max(array.nbytes, 1)))
            self._buffers[spec.name] = (address, array)
            self._context.set_tensor_address(spec.name, int(address))
        self._shapes = shapes

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        shapes = {name: tuple(int(d) for d in array.shape) for name, array in arrays.items()}
        if shapes != self._shapes:
            self._prepare(shapes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        for name, array in arrays.items():
            address = self._buffers[name][0]
            self._call(self._cuda.cudaMemcpy(address, array.ctypes.data, array.nbytes, kind))

    def infer(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise CellFailed("TensorRT could not run its engine; its log says why", "Use a newer TensorRT")
        self._call(self._cuda.cudaStreamSynchronize(self._stream))

    def get_outputs(self) -> Dict[str, Any]:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        found = {}
        for spec in self.outputs:
            address, array = self._buffers[spec.name]
            self._call(self._cuda.cudaMemcpy(array.ctypes.data, address, array.nbytes, kind))
            found[spec.name] = array.copy()
        return found

    def _free(self) -> None:
        for address, _ in self._buffers.values():
            self._call(self._cuda.cudaFree(address))
        self._buffers = {}

    def close(self) -> None:
        self._free()
        self._call(self._cuda.cudaStreamDestroy(self._stream))


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Build the engine and run it on the GPU. Unproven: see ``TensorRtSession``."""
    session = TensorRtSession(artifact, workload)
    try:
        yield session
    finally:
        session.close()


@contextmanager
def interpret(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run the ONNX file, Q/DQ and all, in ONNX Runtime on the CPU."""
    from portcall.exporters.onnxruntime import OnnxRuntimeSession

    yield OnnxRuntimeSession(artifact.path, workload.threads)


EXAMPLE = '''"""Run this artifact with TensorRT alone: pip install tensorrt cuda-python numpy"""
import pathlib

import numpy
import tensorrt as trt
from cuda.bindings import runtime as cuda

@COMMON@


logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
network = builder.create_network(0 if typed is None else 1 << int(typed))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(str(here / "@ENTRY@")):
    raise SystemExit(parser.get_error(0).desc())
config = builder.create_builder_config()
config.clear_flag(trt.BuilderFlag.TF32)
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
            "int8": Precision(
                "Q/DQ: int8 symmetric activations, int8 per-channel weights, float bias",
                calibrated=True,
                symmetric=True,
                integer=True,
            ),
        },
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    example=EXAMPLE,
    interpret=interpret,
)
