"""A calibrator for TensorRT 8 to 10: hands DATA to the builder in batches, and keeps the calibration cache.

TensorRT calibrates itself then, with its own entropy method, on its own fused network. (Ranges of portcall's table
reach it without a GPU by ``portcall ranges --write tensorrt-cache`` or an int8 artifact's calibration.cache: a cache
that is there is read, and no batch is asked for.) TensorRT 11 has no calibrators.

    calibrator = calibrator_class(tensorrt)(CalibrationBatches(data, inputs, 8, Path("calibration.cache")))
    config.set_flag(tensorrt.BuilderFlag.INT8)
    config.int8_calibrator = calibrator
    config.set_calibration_profile(profile)  # whose optimum has the batch of 8 in front
    plan = builder.build_serialized_network(network, config)
    calibrator.batches.check()

Source: ``IInt8EntropyCalibrator2`` in the documentation of TensorRT's Python API, 8.6 and 10.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from portcall.exporters._encodings import read_tensorrt_cache
from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput, CellFailed, PortcallError, UnsupportedError

Array = np.ndarray[Any, Any]


class DeviceMemory(Protocol):
    """Memory of the GPU, by address."""

    def allocate(self, size: int) -> int:
        """Return the address of *size* new bytes."""

    def write(self, address: int, array: Array) -> None:
        """Copy a contiguous array of the host to *address*."""

    def free(self, address: int) -> None: ...


class CudaMemory:
    """Memory of GPU 0 through ``cuda.bindings``. Unproven: run on no GPU yet."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._cuda = runtime

    def _call(self, result: tuple[Any, ...]) -> Any:
        code, *values = result
        if int(code):
            raise CellFailed(f"CUDA answers with {code.name} ({int(code)})", "Check nvidia-smi")
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        return int(self._call(self._cuda.cudaMalloc(size)))

    def write(self, address: int, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpy(address, array.ctypes.data, array.nbytes, kind))

    def free(self, address: int) -> None:
        self._call(self._cuda.cudaFree(address))


class CalibrationBatches:
    """What a calibrator answers, without TensorRT: batches of DATA on the device, and the cache file.

    samples: as ``calibration.data.Data`` gives them, or dicts of arrays, each with a first axis of 1. inputs: the
    network's, by their names in TensorRT, with the types that it reads there: integers that TensorRT 8 narrows from
    int64 to int32 are converted, and refused where they do not fit. All samples must have one shape, that of the
    calibration profile. TensorRT takes full batches only: samples that are left over at the end are dropped, since
    repeating some would count them twice; ``left_out`` says how many.

    TensorRT cannot pass an exception on: what goes wrong in a batch ends the calibration and is raised by ``check``.
    Raises BadInput at once where *cache* is a file of another kind, or where there is neither a cache nor a full batch.
    """

    def __init__(
        self,
        samples: Iterable[Any],
        inputs: Sequence[TensorSpec],
        batch_size: int,
        cache: Path | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        if batch_size < 1:
            raise BadInput(f"the batch of a calibrator is {batch_size}", "Give 1 or more")
        self._inputs = {t.name: t for t in inputs}
        self._batch_size = batch_size
        self._cache = cache
        self._memory = memory
        self._addresses: dict[str, int] = {}
        self._error: PortcallError | None = None
        self.batches = self.samples = self.left_out = 0
        self._next = self._full_batches(samples)
        self._first: dict[str, Array] | None = None
        if self._held() is None:
            self._first = next(self._next, None)
            if self._first is None:
                raise self._too_few()

    def _too_few(self) -> BadInput:
        return BadInput(
            f"DATA holds {self.left_out} samples, and the calibrator takes {self._batch_size} at once",
            "Give more samples or a smaller batch",
        )

    def get_batch_size(self) -> int:
        return self._batch_size

    def get_batch(self, names: Sequence[str], *_: Any) -> list[int] | None:
        """Return the device addresses of the next batch in the order of *names*, None where there is none left."""
        try:
            batch, self._first = self._first, None
            batch = next(self._next, None) if batch is None else batch
            if batch is None:
                if self.batches == 0:  # TensorRT did not take the cache
                    raise self._too_few()
                return None
            unknown = [name for name in names if name not in batch]
            if unknown:
                raise BadInput(
                    f"TensorRT asks for input {unknown[0]!r}, and DATA holds {', '.join(batch)}",
                    "Give the data under the names of the ONNX file's inputs",
                )
            addresses = [self._write(name, batch[name]) for name in names]
        except PortcallError as error:
            self._error = error
            return None
        self.batches += 1
        self.samples += self._batch_size
        return addresses

    def _write(self, name: str, array: Array) -> int:
        if self._memory is None:
            self._memory = CudaMemory()
        if name not in self._addresses:
            self._addresses[name] = self._memory.allocate(array.nbytes)
        self._memory.write(self._addresses[name], array)
        return self._addresses[name]

    def _full_batches(self, samples: Iterable[Any]) -> Iterator[dict[str, Array]]:
        rows: list[Mapping[str, Array]] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for number, sample in enumerate(samples):
            row = {name: np.asarray(array) for name, array in getattr(sample, "inputs", sample).items()}
            missing = [name for name in self._inputs if name not in row]
            if missing:
                raise BadInput(
                    f"sample {number} has no input {missing[0]!r}; it has: {', '.join(row)}",
                    "Give the data under the names of the ONNX file's inputs",
                )
            found = {name: row[name].shape for name in self._inputs}
            shapes = shapes or found
            if found != shapes:
                name = next(n for n in found if found[n] != shapes[n])
                raise BadInput(
                    f"sample {number}: input {name!r} has shape {found[name]}, the first sample's is {shapes[name]}",
                    "Pad all samples to the optimum shape of the calibration profile",
                )
            rows.append(row)
            self.left_out = len(rows)
            if len(rows) == self._batch_size:
                self.left_out = 0
                yield {name: self._joined(name, [row[name] for row in rows]) for name in self._inputs}
                rows = []

    def _joined(self, name: str, arrays: list[Array]) -> Array:
        """Return *arrays* behind each other in the type that TensorRT reads."""
        joined = np.concatenate(arrays)
        dtype = np.dtype(self._inputs[name].dtype)
        if joined.dtype.kind in "iu" and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if joined.size and (joined.min() < limits.min or joined.max() > limits.max):
                raise BadInput(
                    f"input {name!r} holds {joined.max()}, and TensorRT reads {dtype} there", "Check the data"
                )
        elif joined.dtype.kind != dtype.kind:
            raise BadInput(
                f"input {name!r} is {joined.dtype}, and TensorRT reads {dtype} there", "Check the data"
            )
        return np.ascontiguousarray(joined, dtype)

    def read_calibration_cache(self) -> bytes | None:
        """Return the cache, None where there is none.

        TensorRT takes one whose first line is its own version's, and asks for batches otherwise.
        """
        try:
            return self._held()
        except PortcallError as error:
            self._error = error
            return None

    def _held(self) -> bytes | None:
        if self._cache is None or not self._cache.is_file():
            return None
        held = self._cache.read_bytes()
        try:
            read_tensorrt_cache(held.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{self._cache} is no calibration cache: it is no text", "Delete or move it"
            ) from error
        return held

    def write_calibration_cache(self, cache: Any) -> None:
        """Write what TensorRT hands over (any buffer of bytes), whole or not at all."""
        if self._cache is None:
            return
        part = self._cache.with_name(self._cache.name + ".part")
        try:
            part.write_bytes(bytes(cache))
            part.replace(self._cache)
        except OSError as error:
            self._error = CellFailed(f"cannot write {self._cache}: {error.strerror}", "Choose another folder")

    def check(self) -> None:
        """Raise what went wrong while TensorRT calibrated; free the device memory."""
        while self._addresses:
            assert self._memory is not None
            with contextlib.suppress(CellFailed):  # the reason below matters more
                self._memory.free(self._addresses.popitem()[1])
        if self._error is not None:
            raise self._error


def calibrator_class(trt: Any) -> Any:
    """Return the class to set as ``int8_calibrator``, for the module *trt*; its instances take CalibrationBatches.

    Raises UnsupportedError for a TensorRT without calibrators (11 and newer, TensorRT for RTX).
    """
    base: Any = getattr(trt, "IInt8EntropyCalibrator2", None)
    if base is None:
        raise UnsupportedError(
            f"{trt.__name__} {trt.__version__} has no calibrators",
            "Give it the Q/DQ model of an int8 artifact",
        )

    class Calibrator(base):  # type: ignore[misc]  # known at run time only
        """Hands on to CalibrationBatches: the base class takes no methods of another class beside it."""

        def __init__(self, batches: CalibrationBatches) -> None:
            base.__init__(self)  # TensorRT insists on this form
            self.batches = batches

        def get_batch_size(self) -> int:
            return self.batches.get_batch_size()

        def get_batch(self, names: Sequence[str], *_: Any) -> list[int] | None:
            return self.batches.get_batch(names)

        def read_calibration_cache(self) -> bytes | None:
            return self.batches.read_calibration_cache()

        def write_calibration_cache(self, cache: Any) -> None:
            self.batches.write_calibration_cache(cache)

    return Calibrator


def binding_inputs(trt: Any, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return *inputs* of an ONNX file with the types that *trt* reads: up to TensorRT 9 int64 is read as int32."""
    narrows = int(str(trt.__version__).partition(".")[0]) < 10
    return tuple(
        TensorSpec(t.name, t.shape, "int32" if narrows and t.dtype == "int64" else t.dtype) for t in inputs
    )
