"""An engine on an NVIDIA GPU as a Session: pinned host memory, CUDA events, a CUDA graph where asked for.

*trt* is ``tensorrt`` or ``tensorrt_rtx``, *cuda* is ``cuda.bindings.runtime``; both are handed in. Unproven: written
after NVIDIA's documentation and run on no GPU yet; tests run it on stand-ins for both.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple

from portcall.targets.agent.contract import Artifact, Session, TensorSpec
from portcall.targets.agent.errors import CellFailed, UnsupportedError

if TYPE_CHECKING:
    from portcall.exporters._tensorrt import Limits

Shape = Tuple[int, ...]
Rebuild = Callable[[Dict[str, Shape]], Any]
"""Makes an engine for exactly these shapes of the inputs."""


def call(result: Tuple[Any, ...]) -> Any:
    """Return what a CUDA call gave. Raises CellFailed with the name of its error."""
    code, *values = result
    if int(code):
        raise CellFailed(
            f"CUDA answers with {code.name} ({int(code)})", "Check nvidia-smi and the free memory of the GPU"
        )
    return values[0] if values else None


def device(cuda: Any) -> Any:
    """Return the properties of GPU 0: its name, and its compute capability as major and minor."""
    return call(cuda.cudaGetDeviceProperties(0))


class EngineSession(Session):
    """One engine for all shapes within its profile; *rebuild* makes another for shapes outside, bound untimed.

    ``device_times_ns`` gets the time between CUDA events around the engine alone, one per ``infer``, in order.
    Options of the artifact: "transfers" ("included": ``infer`` copies inputs to the device and outputs back, both from
    and to pinned memory; "excluded": ``set_inputs`` and ``get_outputs`` do) and "cuda_graph" (the engine is captured
    once per shape and launched as a graph). Raises UnsupportedError for shapes that no engine takes.
    """

    def __init__(
        self, trt: Any, cuda: Any, plan: Any, artifact: Artifact, origin: str, rebuild: Optional[Rebuild]
    ) -> None:
        self._trt, self._cuda, self._rebuild = trt, cuda, rebuild
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._with_copies = artifact.options.get("transfers") == "included"
        self._with_graph = bool(artifact.options.get("cuda_graph"))
        self._device: Dict[str, Any] = {}  # name -> address
        self._host: Dict[str, Any] = {}  # name -> array in pinned memory
        self._pinned: List[Any] = []
        self._shapes: Optional[Dict[str, Shape]] = None
        self._graph: Any = None
        self.device_times_ns: List[int] = []
        self._stream = call(cuda.cudaStreamCreate())
        self._before, self._after = call(cuda.cudaEventCreate()), call(cuda.cudaEventCreate())
        self._load(plan)
        self.environment = {
            "runtime": f"{trt.__name__} {trt.__version__}",
            "gpu": _text(device(cuda).name),
            "cuda_runtime": call(cuda.cudaRuntimeGetVersion()),
            "engine": origin,
            "transfers": "included, pinned memory" if self._with_copies else "excluded",
            "cuda_graph": self._with_graph,
            "device_time": "CUDA events around the engine",
        }

    def _load(self, plan: Any) -> None:
        """Deserialize an engine and read off its inputs and outputs."""
        from portcall.exporters._tensorrt import tensor_spec

        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise CellFailed(
                f"{self._trt.__name__} {self._trt.__version__} could not load the engine; its log says why",
                "An engine is for one version of TensorRT and one kind of GPU: build it again here",
            )
        self._plan_bytes = int(getattr(plan, "nbytes", None) or len(plan))
        self._context = self._engine.create_execution_context()
        specs: Dict[bool, List[TensorSpec]] = {True: [], False: []}
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            shape, dtype = self._engine.get_tensor_shape(name), self._engine.get_tensor_dtype(name)
            is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            specs[is_input].append(tensor_spec(self._trt, name, shape, dtype))
        if (
            not self._device
        ):  # a rebuilt engine is for one shape: the dynamic dimensions of the first one stay
            self.inputs, self.outputs = tuple(specs[True]), tuple(specs[False])

    def _limits(self, name: str) -> Limits:
        from portcall.exporters._tensorrt import Limits

        shape = tuple(int(d) for d in self._engine.get_tensor_shape(name))
        if min(shape, default=1) >= 0:
            return Limits(shape, shape, shape)
        return Limits(*(tuple(int(d) for d in s) for s in self._engine.get_tensor_profile_shape(name, 0)))

    def _prepare(self, shapes: Dict[str, Shape]) -> None:
        """Give every input and output its memory for *shapes*; make another engine where this one's profile ends."""
        import numpy as np

        outside = [name for name, shape in shapes.items() if not self._limits(name).hold(shape)]
        if outside:
            limits = self._limits(outside[0])
            if self._rebuild is None:
                raise UnsupportedError(
                    f"input {outside[0]!r} has shape {shapes[outside[0]]}, and the engine takes "
                    f"{limits.min} to {limits.max}",
                    'Export with an option "profile" that holds it',
                )
            self._load(self._rebuild(shapes))
            self.environment["engine"] = "built in memory for the bound shapes"
        self._free()
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if min(shape, default=1) < 0:
                raise UnsupportedError(
                    f"the shape of {spec.name!r} depends on values", "Give it a fixed shape"
                )
            size = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
            self._device[spec.name] = call(self._cuda.cudaMalloc(max(size, 1)))
            pointer = call(self._cuda.cudaHostAlloc(max(size, 1), self._cuda.cudaHostAllocDefault))
            self._pinned.append(pointer)
            memory = (ctypes.c_byte * max(size, 1)).from_address(int(pointer))
            self._host[spec.name] = np.ctypeslib.as_array(memory)[:size].view(spec.dtype).reshape(shape)
            self._context.set_tensor_address(spec.name, int(self._device[spec.name]))
        self._shapes = shapes
        if self._with_graph:
            self._execute()  # the first run may allocate, which cannot be captured
            call(self._cuda.cudaStreamSynchronize(self._stream))
            self._graph = self._captured()

    def _captured(self) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        call(self._cuda.cudaStreamBeginCapture(self._stream, mode))
        self._execute()
        graph = call(self._cuda.cudaStreamEndCapture(self._stream))
        executable = call(self._cuda.cudaGraphInstantiate(graph, 0))
        call(self._cuda.cudaGraphDestroy(graph))
        return executable

    def _execute(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise CellFailed("TensorRT could not run its engine; its log says why", "Use a newer TensorRT")

    def _copy(self, spec: TensorSpec, to_device: bool) -> None:
        kinds = self._cuda.cudaMemcpyKind
        host, address = self._host[spec.name], self._device[spec.name]
        ends = (address, host.ctypes.data) if to_device else (host.ctypes.data, address)
        kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
        call(self._cuda.cudaMemcpyAsync(*ends, host.nbytes, kind, self._stream))

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        import numpy as np

        shapes = {name: tuple(int(d) for d in array.shape) for name, array in arrays.items()}
        if shapes != self._shapes:
            self._prepare(shapes)
        for spec in self.inputs:
            # TensorRT 8 reads int64 inputs as int32.
            np.copyto(self._host[spec.name], arrays[spec.name], casting="same_kind")
            self._copy(spec, to_device=True)
        call(self._cuda.cudaStreamSynchronize(self._stream))

    def infer(self) -> None:
        cuda, stream = self._cuda, self._stream
        if self._with_copies:
            for spec in self.inputs:
                self._copy(spec, to_device=True)
        call(cuda.cudaEventRecord(self._before, stream))
        if self._graph is None:
            self._execute()
        else:
            call(cuda.cudaGraphLaunch(self._graph, stream))
        call(cuda.cudaEventRecord(self._after, stream))
        if self._with_copies:
            for spec in self.outputs:
                self._copy(spec, to_device=False)
        call(cuda.cudaStreamSynchronize(stream))
        self.device_times_ns.append(round(call(cuda.cudaEventElapsedTime(self._before, self._after)) * 1e6))

    def memory_figures(self) -> Dict[str, int]:
        """Return the size of the engine's file and of the device memory that its execution context takes."""
        figures = {"plan_bytes": self._plan_bytes}
        for name in ("device_memory_size_v2", "device_memory_size"):  # _v2 since TensorRT 10.1
            size = getattr(self._engine, name, None)
            if size is not None:
                return {**figures, "context_device_bytes": int(size)}
        return figures

    def get_outputs(self) -> Dict[str, Any]:
        for spec in self.outputs:
            self._copy(spec, to_device=False)
        call(self._cuda.cudaStreamSynchronize(self._stream))
        return {spec.name: self._host[spec.name].copy() for spec in self.outputs}

    def _free(self) -> None:
        if self._graph is not None:
            call(self._cuda.cudaGraphExecDestroy(self._graph))
            self._graph = None
        self._host = {}
        while self._pinned:
            call(self._cuda.cudaFreeHost(self._pinned.pop()))
        while self._device:
            call(self._cuda.cudaFree(self._device.popitem()[1]))

    def close(self) -> None:
        self._free()
        call(self._cuda.cudaEventDestroy(self._before))
        call(self._cuda.cudaEventDestroy(self._after))
        call(self._cuda.cudaStreamDestroy(self._stream))


def _text(name: Any) -> str:
    return name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)
