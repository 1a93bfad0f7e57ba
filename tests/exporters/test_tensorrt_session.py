"""The session of an engine on stand-ins for TensorRT and CUDA: no GPU is there to run it on.

The stand-ins keep to the interfaces that the session uses: device memory is a buffer of the host, an engine doubles its
input, and work of a stream is done at once. What they cannot show is in docs/backends/tensorrt.md under "unproven".
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from portcall.exporters import _tensorrt_session
from portcall.exporters._tensorrt_session import EngineSession
from portcall.targets.agent.contract import Artifact
from portcall.targets.agent.errors import CellFailed, UnsupportedError

Shape = tuple[int, ...]


class Code(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Cuda:
    """``cuda.bindings.runtime``: every call answers with a code and what it gives."""

    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeGlobal=0)

    def __init__(self, memory: int = 1 << 20) -> None:
        self.left = memory
        self.held: dict[int, Any] = {}
        self.handles: list[Any] = []
        self.copies: list[int] = []
        self.now_ms = 0.0
        self.recording: list[Any] | None = None

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self.left:
            return Code.cudaErrorMemoryAllocation, None
        buffer = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(buffer)] = buffer
        return Code.cudaSuccess, ctypes.addressof(buffer)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        del self.held[address]
        return (Code.cudaSuccess,)

    cudaFreeHost = cudaFree

    def _handle(self) -> tuple[Any, ...]:
        self.handles.append(len(self.handles) + 1)
        return Code.cudaSuccess, self.handles[-1]

    cudaStreamCreate = cudaEventCreate = _handle

    def _drop(self, handle: Any) -> tuple[Any, ...]:
        self.handles.remove(handle)
        return (Code.cudaSuccess,)

    cudaStreamDestroy = cudaEventDestroy = _drop

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: Any) -> tuple[Any, ...]:
        ctypes.memmove(target, source, size)
        self.copies.append(kind)
        return (Code.cudaSuccess,)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        self.now_ms += 0.25
        return (Code.cudaSuccess,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, ...]:
        return Code.cudaSuccess, 0.25

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        return (Code.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> tuple[Any, ...]:
        self.recording = []
        return (Code.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        graph, self.recording = self.recording, None
        self.handles.append(id(graph))
        return Code.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        executable = tuple(graph)
        self.handles.append(executable)
        return Code.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return self._drop(id(graph))

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Any, ...]:
        return self._drop(executable)

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> tuple[Any, ...]:
        for work in executable:
            work()
        return (Code.cudaSuccess,)

    def cudaGetDeviceProperties(self, number: int) -> tuple[Any, ...]:
        return Code.cudaSuccess, SimpleNamespace(name=b"Stand-in GPU\0\0", major=8, minor=9)

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return Code.cudaSuccess, 13000


class Engine:
    """y = 2 x for int32 or float32 x[n, 3], within a profile."""

    num_io_tensors = 2

    def __init__(self, trt: Trt, plan: bytes) -> None:
        self.trt, self.facts = trt, json.loads(plan)

    def get_tensor_name(self, number: int) -> str:
        return ("x", "y")[number]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "x" else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.facts["dtype"])

    def get_tensor_shape(self, name: str) -> Shape:
        low, _, high = self.facts["profile"]
        return tuple(a if a == b else -1 for a, b in zip(low, high, strict=True))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        return [tuple(s) for s in self.facts["profile"]]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses = engine, dict[str, int]()
        self.shape: Shape = ()

    def set_input_shape(self, name: str, shape: Shape) -> None:
        self.shape = shape

    def get_tensor_shape(self, name: str) -> Shape:
        return (-1, 3) if self.engine.facts.get("unbounded") and name == "y" else self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        def work() -> None:
            count = int(np.prod(self.shape))
            memory = {k: (ctypes.c_byte * (4 * count)).from_address(a) for k, a in self.addresses.items()}
            x, y = (
                np.ctypeslib.as_array(memory[k]).view(self.engine.get_tensor_dtype(k)) for k in ("x", "y")
            )
            np.multiply(x, 2, out=y)

        trt = self.engine.trt
        trt.runs += 1
        if trt.cuda.recording is None:
            work()
        else:
            trt.cuda.recording.append(work)
        return not self.engine.facts.get("fails")


class Trt:
    """``tensorrt``, as far as a session uses it."""

    __name__, __version__ = "tensorrt", "10.3.0"
    TensorIOMode = SimpleNamespace(INPUT="input")
    nptype = staticmethod(np.dtype)

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.runs, self.loaded = cuda, 0, 0

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    def Runtime(self, logger: Any) -> Any:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self.loaded += 1
        return Engine(self, plan) if plan else None


def plan_for(*profile: Shape, dtype: str = "float32", **facts: Any) -> bytes:
    return json.dumps({"profile": profile * (3 // len(profile)), "dtype": dtype, **facts}).encode()


FROM_1_TO_8 = plan_for((1, 3), (2, 3), (8, 3))


def session_of(
    cuda: Cuda, plan: bytes = FROM_1_TO_8, rebuild: Any = None, **options: Any
) -> tuple[EngineSession, Trt]:
    trt = Trt(cuda)
    artifact = Artifact(Path(), "model.onnx", "tensorrt", "fp32", options=options)
    return EngineSession(trt, cuda, plan, artifact, "as given", rebuild), trt


def doubled(session: EngineSession, batch: int, dtype: str = "float32") -> None:
    x = np.random.default_rng(batch).integers(-99, 99, (batch, 3)).astype(dtype)
    session.set_inputs({"x": x})
    for _ in range(2):
        session.infer()
    found = session.get_outputs()["y"]
    np.testing.assert_array_equal(found, 2 * x)
    session.infer()
    assert not np.shares_memory(found, session.get_outputs()["y"])


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("transfers", ["excluded", "included"])
def test_one_engine_serves_all_shapes_of_its_profile(transfers: str, graph: bool) -> None:
    cuda = Cuda()
    session, trt = session_of(cuda, transfers=transfers, cuda_graph=graph)
    assert [str(t) for t in session.inputs] == ["x: float32[dim_0, 3]"]
    assert [str(t) for t in session.outputs] == ["y: float32[dim_0, 3]"]
    for batch in (2, 1, 8, 2):
        doubled(session, batch)
    assert trt.loaded == 1
    # A graph takes one run before it is captured and one that is captured, for every shape.
    assert trt.runs == (8 if graph else 12)
    assert session.device_times_ns == [250_000] * 12
    session.close()
    assert not cuda.held and not cuda.handles
    assert session.environment == {
        "runtime": "tensorrt 10.3.0",
        "gpu": "Stand-in GPU",
        "cuda_runtime": 13000,
        "engine": "as given",
        "transfers": "excluded" if transfers == "excluded" else "included, pinned memory",
        "cuda_graph": graph,
        "device_time": "CUDA events around the engine",
    }


def test_copies_are_inside_the_inference_only_where_asked_for() -> None:
    for transfers, inside in (("excluded", []), ("included", [1, 2])):
        cuda = Cuda()
        session, _ = session_of(cuda, transfers=transfers)
        session.set_inputs({"x": np.ones((2, 3), np.float32)})
        cuda.copies.clear()
        session.infer()
        assert cuda.copies == inside


def test_shapes_outside_the_profile_make_another_engine() -> None:
    asked: list[Mapping[str, Shape]] = []

    def rebuild(shapes: Mapping[str, Shape]) -> bytes:
        asked.append(shapes)
        return plan_for(shapes["x"])

    cuda = Cuda()
    session, trt = session_of(cuda, rebuild=rebuild)
    doubled(session, 4)
    doubled(session, 9)
    doubled(session, 9)
    assert asked == [{"x": (9, 3)}] and trt.loaded == 2
    assert session.environment["engine"] == "built in memory for the bound shapes"
    assert session.inputs[0].shape == ("dim_0", 3)
    session.close()
    assert not cuda.held and not cuda.handles


def test_a_bare_engine_refuses_other_shapes_with_its_limits() -> None:
    session, _ = session_of(Cuda())
    with pytest.raises(
        UnsupportedError, match=r"input 'x' has shape \(9, 3\), and the engine takes \(1, 3\) to \(8, 3\)"
    ) as caught:
        session.set_inputs({"x": np.ones((9, 3), np.float32)})
    assert '"profile"' in caught.value.fix
    fixed, _ = session_of(Cuda(), plan_for((2, 3)))
    with pytest.raises(UnsupportedError, match=r"\(3, 3\), and the engine takes \(2, 3\) to \(2, 3\)"):
        fixed.set_inputs({"x": np.ones((3, 3), np.float32)})


def test_the_engine_tells_its_size_and_what_its_context_takes() -> None:
    session, _ = session_of(Cuda())
    assert session.memory_figures() == {"plan_bytes": len(FROM_1_TO_8)}
    session._engine.device_memory_size = 4096
    assert session.memory_figures()["context_device_bytes"] == 4096
    session._engine.device_memory_size_v2 = 8192  # since TensorRT 10.1; the older one is then deprecated
    assert session.memory_figures()["context_device_bytes"] == 8192


def test_integers_are_narrowed_as_tensorrt_8_reads_them() -> None:
    session, _ = session_of(Cuda(), plan_for((1, 3), (2, 3), (8, 3), dtype="int32"))
    doubled(session, 2, "int64")
    with pytest.raises(TypeError):
        session.set_inputs({"x": np.ones((2, 3), np.float32)})


def test_failures_say_what_failed() -> None:
    with pytest.raises(CellFailed, match=r"tensorrt 10\.3\.0 could not load the engine") as caught:
        session_of(Cuda(), b"")
    assert "build it again here" in caught.value.fix
    session, _ = session_of(Cuda(), plan_for((1, 3), fails=True))
    session.set_inputs({"x": np.ones((1, 3), np.float32)})
    with pytest.raises(CellFailed, match="could not run its engine"):
        session.infer()
    session, _ = session_of(Cuda(), plan_for((1, 3), unbounded=True))
    with pytest.raises(UnsupportedError, match="the shape of 'y' depends on values"):
        session.set_inputs({"x": np.ones((1, 3), np.float32)})
    cuda = Cuda(memory=8)
    session, _ = session_of(cuda)
    with pytest.raises(CellFailed, match=r"CUDA answers with cudaErrorMemoryAllocation \(2\)"):
        session.set_inputs({"x": np.ones((1, 3), np.float32)})
    session.close()
    assert not cuda.held and not cuda.handles


def test_the_real_bindings_have_what_the_session_calls() -> None:
    runtime: Any = pytest.importorskip(
        "cuda.bindings.runtime", reason="not installed; fix: pip install cuda-bindings"
    )
    text = Path(_tensorrt_session.__file__).read_text()
    names = set(re.findall(r"cuda\.(cuda\w+)", text)) | {"cudaHostAllocDefault"}
    assert len(names) > 15 and not [n for n in names if not hasattr(runtime, n)]
    assert names <= set(dir(Cuda))
    assert runtime.cudaMemcpyKind.cudaMemcpyHostToDevice and runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
