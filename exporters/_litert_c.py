"""LiteRT's C API through ctypes, as far as its profiler needs it: the Python package hides the profiler.

``libLiteRt.so`` lies in the wheel of ai-edge-litert and is what applications on devices link. Tried with 2.3.0.
Source: litert/c/*.h of google-ai-edge/LiteRT (litert_compiled_model.h, litert_profiler.h, litert_profiler_event.h,
litert_tensor_buffer.h, litert_opaque_options.h). No Python header describes the structures, so their size is checked
against what the library writes.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any, List, NamedTuple

from portcall.targets.agent.errors import CellFailed, UnavailableError

CPU = 1
READ, WRITE = 0, 1
RANKED_TYPE_BYTES = 512
"""At least the size of LiteRtRankedTensorType, which is passed on unread."""
OPERATOR, DELEGATE_OPERATOR, DELEGATE_PROFILED = 1 << 1, 1 << 2, 1 << 3
"""Kinds of events: a kernel of LiteRT itself, and operators inside of a delegate.

Source: ``tflite::Profiler::EventType``.
"""
_LIBRARY = {"darwin": "libLiteRt.dylib", "win32": "libLiteRt.dll"}
_Pointer = ctypes.c_void_p


class Event(NamedTuple):
    """One timed event of an inference. number: of the operator in the flatbuffer's subgraph, or in the delegate."""

    tag: str
    kind: int
    elapsed_us: int
    number: int
    subgraph: int


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_size_t), ("in_use", ctypes.c_size_t), ("private", ctypes.c_size_t)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("before", _Memory),
        ("after", _Memory),
        ("index", ctypes.c_uint64),
        ("subgraph", ctypes.c_uint64),
        ("source", ctypes.c_int),
    ]


class Library:
    """The library's functions by name; each raises CellFailed with the status that it returned."""

    def __init__(self) -> None:
        import importlib.util

        found = importlib.util.find_spec("ai_edge_litert")
        path = None if found is None or found.origin is None else Path(found.origin).parent
        file = None if path is None else path / _LIBRARY.get(sys.platform, "libLiteRt.so")
        if file is None or not file.is_file():
            raise UnavailableError(
                "only ai-edge-litert from 2.3 on holds the library whose profiler sees inside of XNNPACK",
                "pip install 'ai-edge-litert>=2.3'",
            )
        self._library = ctypes.CDLL(str(file))

    def __call__(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise UnavailableError(
                f"this LiteRT has no function {name}", "pip install 'ai-edge-litert>=2.3'"
            ) from error
        function.restype = ctypes.c_int
        status = function(*arguments)
        if status:
            raise CellFailed(f"LiteRT's {name} answers with status {status}", "Its log says why")

    def handle(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Return the handle that a function writes to its last argument."""
        found = _Pointer()
        self(name, *arguments, ctypes.byref(found))
        return found

    def size(self, name: str, *arguments: Any) -> int:
        found = ctypes.c_size_t()
        self(name, *arguments, ctypes.byref(found))
        return int(found.value)


class Port(NamedTuple):
    """An input or output of the first signature: names in the signature and in the graph, and its buffer."""

    name: str
    tensor: str
    buffer: ctypes.c_void_p
    size_bytes: int


class ProfiledModel:
    """A compiled model of LiteRT on the CPU with XNNPACK, its default, and the profiler on."""

    def __init__(self, path: Path, threads: int) -> None:
        self._call = call = Library()
        self._kept: List[Any] = []
        self._environment = call.handle("LiteRtCreateEnvironment", 0, None)
        self._model = call.handle("LiteRtCreateModelFromFile", self._environment, str(path).encode())
        options = call.handle("LiteRtCreateOptions")
        call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        self._set(options, "runtime_options_string", "enable_profiling = true\n")
        self._set(options, "xnnpack", f"num_threads = {threads}\n")
        self._compiled = call.handle("LiteRtCreateCompiledModel", self._environment, self._model, options)
        self._profiler = call.handle("LiteRtCompiledModelGetProfiler", self._compiled)
        if not self._profiler:
            raise UnavailableError("this LiteRT was built without its profiler", "Use ai-edge-litert 2.3")
        signature = call.handle("LiteRtGetModelSignature", self._model, ctypes.c_size_t(0))
        self.inputs = self._ports(signature, "Input")
        self.outputs = self._ports(signature, "Output")
        self._ends = [(_Pointer * len(p))(*[port.buffer for port in p]) for p in (self.inputs, self.outputs)]
        call("LiteRtStartProfiler", self._profiler)

    def _set(self, options: ctypes.c_void_p, kind: str, toml: str) -> None:
        """Add options as TOML, which is how they cross LiteRT's C API; they are ours, so nothing frees them."""
        text = ctypes.create_string_buffer(toml.encode())
        nothing = ctypes.CFUNCTYPE(None, _Pointer)(_nothing)
        self._kept += [text, nothing]
        opaque = self._call.handle(
            "LiteRtCreateOpaqueOptions", kind.encode(), ctypes.cast(text, _Pointer), nothing
        )
        self._call("LiteRtAddOpaqueOptions", options, opaque)

    def _ports(self, signature: ctypes.c_void_p, end: str) -> List[Port]:
        call, found = self._call, []
        for number in range(call.size(f"LiteRtGetNumSignature{end}s", signature)):
            index = ctypes.c_size_t(number)
            name, tensor_name = ctypes.c_char_p(), ctypes.c_char_p()
            call(f"LiteRtGetSignature{end}Name", signature, index, ctypes.byref(name))
            tensor = call.handle(f"LiteRtGetSignature{end}TensorByIndex", signature, index)
            call("LiteRtGetTensorName", tensor, ctypes.byref(tensor_name))
            kind = (ctypes.c_byte * RANKED_TYPE_BYTES)()
            call("LiteRtGetRankedTensorType", tensor, kind)
            needs = call.handle(
                f"LiteRtGetCompiledModel{end}BufferRequirements", self._compiled, ctypes.c_size_t(0), index
            )
            buffer = call.handle(
                "LiteRtCreateManagedTensorBufferFromRequirements", self._environment, kind, needs
            )
            size = call.size("LiteRtGetTensorBufferPackedSize", buffer)
            found.append(
                Port((name.value or b"").decode(), (tensor_name.value or b"").decode(), buffer, size)
            )
        return found

    def write(self, port: Port, data: bytes) -> None:
        """Copy *data* into an input's buffer. Raises CellFailed where it has another size."""
        if len(data) != port.size_bytes:
            raise CellFailed(
                f"input {port.name!r} takes {port.size_bytes} bytes, not {len(data)}",
                "Export it again with --shape",
            )
        address = self._lock(port, WRITE)
        ctypes.memmove(address, data, len(data))
        self._call("LiteRtUnlockTensorBuffer", port.buffer)

    def read(self, port: Port) -> bytes:
        address = self._lock(port, READ)
        data = ctypes.string_at(address, port.size_bytes)
        self._call("LiteRtUnlockTensorBuffer", port.buffer)
        return data

    def _lock(self, port: Port, mode: int) -> int:
        address = _Pointer()
        self._call("LiteRtLockTensorBuffer", port.buffer, ctypes.byref(address), mode)
        return int(address.value or 0)

    def run(self) -> None:
        inputs, outputs = self._ends
        self._call(
            "LiteRtRunCompiledModel",
            self._compiled,
            ctypes.c_size_t(0),
            ctypes.c_size_t(len(inputs)),
            inputs,
            ctypes.c_size_t(len(outputs)),
            outputs,
        )

    def take_events(self) -> List[Event]:
        """Return what was recorded since the last call, and forget it."""
        count = ctypes.c_int()
        self._call("LiteRtGetNumProfilerEvents", self._profiler, ctypes.byref(count))
        events = self._events(count.value) if count.value else []
        self._call("LiteRtResetProfiler", self._profiler)
        self._call("LiteRtStartProfiler", self._profiler)
        return events

    def _events(self, count: int) -> List[Event]:
        size, mark = ctypes.sizeof(_Event), 0xEE
        room = ctypes.create_string_buffer(2 * size * count)
        ctypes.memset(room, mark, len(room))
        self._call("LiteRtGetProfilerEvents", self._profiler, count, room)
        written = len(room.raw.rstrip(bytes([mark])))
        if not size * count - 8 < written <= size * count:
            raise UnavailableError(
                f"this LiteRT writes {written} bytes for {count} profiler events, {size * count} were expected",
                "Use ai-edge-litert 2.3, whose layout portcall knows",
            )
        records = (_Event * count).from_buffer(room)
        return [
            Event((r.tag or b"").decode(errors="replace"), r.kind, r.elapsed_us, r.index, r.subgraph)
            for r in records
        ]


def _nothing(payload: object) -> None:
    return None
