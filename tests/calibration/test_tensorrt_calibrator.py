"""The calibrator of TensorRT 8 to 10 without TensorRT: batches, what is left out, the cache, what goes wrong.

``IInt8EntropyCalibrator2`` itself is in no package that these tests install: a class of its form stands in for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from portcall.calibration.data import open_data
from portcall.calibration.tensorrt_calibrator import CalibrationBatches, binding_inputs, calibrator_class
from portcall.exporters._encodings import tensorrt_cache
from portcall.targets.agent.contract import Range, TensorSpec
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError

Array = np.ndarray[Any, Any]
IDS, MASK = TensorSpec("ids", ("batch", 4), "int64"), TensorSpec("mask", ("batch", 4), "float32")
CACHE = tensorrt_cache({"x": Range(-1.0, 1.0, True)}, "8.6.1").encode()


class HostMemory:
    """Addresses on the host: what was copied to each."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.held: dict[int, Array] = {}

    def allocate(self, size: int) -> int:
        address = 4096 * (1 + len(self.sizes))
        self.sizes[address] = size
        return address

    def write(self, address: int, array: Array) -> None:
        assert array.flags.c_contiguous and array.nbytes == self.sizes[address]
        self.held[address] = array.copy()

    def free(self, address: int) -> None:
        del self.sizes[address]


class EntropyCalibrator2:
    """Takes its ``__init__`` only as ``IInt8EntropyCalibrator2.__init__(self)``, like a pybind11 class."""

    def __init__(self) -> None:
        self.made = True


TRT_8 = SimpleNamespace(__name__="tensorrt", __version__="8.6.1", IInt8EntropyCalibrator2=EntropyCalibrator2)


def samples(count: int) -> Iterator[dict[str, Array]]:
    for i in range(count):
        yield {
            "mask": np.full((1, 4), i / 2, np.float32),
            "ids": np.arange(i, i + 4)[None],
            "other": np.zeros(3),
        }


def taken(batches: CalibrationBatches, memory: HostMemory, names: Sequence[str]) -> list[list[Array]]:
    """Ask for batches until there is none, as TensorRT does."""
    found = []
    while (addresses := batches.get_batch(names)) is not None:
        found.append([memory.held[a] for a in addresses])
    return found


def test_batches_hold_the_samples_in_order_and_the_rest_is_left_out() -> None:
    memory = HostMemory()
    batches = CalibrationBatches(samples(8), (IDS, MASK), 3, memory=memory)
    assert batches.get_batch_size() == 3
    first, second = taken(batches, memory, ("mask", "ids"))
    np.testing.assert_array_equal(first[0], np.repeat([[0], [0.5], [1]], 4, 1).astype(np.float32))
    np.testing.assert_array_equal(first[1], [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]])
    assert first[0].dtype == np.float32 and second[1].dtype == np.int64 and second[1][0, 0] == 3
    assert (batches.batches, batches.samples, batches.left_out) == (2, 6, 2)
    assert batches.get_batch(("mask", "ids")) is None
    assert len(memory.sizes) == 2  # one buffer an input, written again
    batches.check()
    assert not memory.sizes


def test_nothing_is_left_out_of_full_batches() -> None:
    memory = HostMemory()
    batches = CalibrationBatches(samples(6), (IDS, MASK), 3, memory=memory)
    assert len(taken(batches, memory, ("ids", "mask"))) == 2 and batches.left_out == 0


def test_our_data_goes_in_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((5, 3, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=values)
    inputs = (TensorSpec("x", ("batch", 3, 2, 2), "float32"),)
    memory = HostMemory()
    batches = CalibrationBatches(open_data(str(tmp_path / "data.npz"), inputs), inputs, 2, memory=memory)
    found = taken(batches, memory, ("x",))
    np.testing.assert_array_equal(np.concatenate([b[0] for b in found]), values[:4])
    assert batches.left_out == 1


def test_tensorrt_8_reads_int64_as_int32() -> None:
    inputs = binding_inputs(TRT_8, (IDS, MASK))
    assert [t.dtype for t in inputs] == ["int32", "float32"]
    assert binding_inputs(SimpleNamespace(__version__="10.3.0"), (IDS, MASK)) == (IDS, MASK)
    memory = HostMemory()
    [[ids]] = taken(CalibrationBatches(samples(2), inputs, 2, memory=memory), memory, ("ids",))
    assert ids.dtype == np.int32
    large = [{"ids": np.full((1, 4), 2**40), "mask": np.zeros((1, 4), np.float32)}]
    with pytest.raises(BadInput, match="input 'ids' holds 1099511627776, and TensorRT reads int32 there"):
        CalibrationBatches(large, inputs, 1)


def test_fewer_samples_than_a_batch_are_refused() -> None:
    for count in (0, 2):
        with pytest.raises(
            BadInput, match=f"DATA holds {count} samples, and the calibrator takes 3"
        ) as caught:
            CalibrationBatches(samples(count), (IDS, MASK), 3)
        assert caught.value.fix
    with pytest.raises(BadInput, match="the batch of a calibrator is 0"):
        CalibrationBatches(samples(3), (IDS, MASK), 0)


def test_samples_of_other_inputs_types_or_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match="sample 0 has no input 'x'; it has: mask, ids, other"):
        CalibrationBatches(samples(3), (TensorSpec("x", (1, 4), "float32"),), 2)
    with pytest.raises(BadInput, match="input 'mask' is float32, and TensorRT reads int32 there"):
        CalibrationBatches(samples(3), (TensorSpec("mask", (1, 4), "int32"),), 2)
    ragged = [{"ids": np.zeros((1, n), np.int64)} for n in (4, 4, 5)]
    with pytest.raises(
        BadInput, match=r"sample 2: input 'ids' has shape \(1, 5\), the first sample's is \(1, 4\)"
    ):
        CalibrationBatches(ragged, (IDS,), 3)


def test_what_goes_wrong_later_ends_the_calibration_and_is_raised_by_check() -> None:
    memory = HostMemory()
    ragged = [{"ids": np.zeros((1, n), np.int64)} for n in (4, 4, 5, 4)]
    batches = CalibrationBatches(ragged, (IDS,), 2, memory=memory)
    assert len(taken(batches, memory, ("ids",))) == 1
    with pytest.raises(BadInput, match=r"sample 2: input 'ids' has shape \(1, 5\)"):
        batches.check()
    assert not memory.sizes


def test_a_name_that_data_lacks_is_raised_by_check() -> None:
    batches = CalibrationBatches(samples(3), (IDS, MASK), 2, memory=HostMemory())
    assert batches.get_batch(("ids", "images")) is None
    with pytest.raises(BadInput, match="TensorRT asks for input 'images', and DATA holds ids, mask"):
        batches.check()


def test_a_cache_is_written_whole_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    batches = CalibrationBatches(samples(4), (IDS, MASK), 2, path, HostMemory())
    assert batches.read_calibration_cache() is None
    batches.write_calibration_cache(memoryview(CACHE))
    assert path.read_bytes() == CACHE and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert CalibrationBatches((), (IDS, MASK), 2, path).read_calibration_cache() == CACHE  # no data needed
    nowhere = CalibrationBatches(samples(4), (IDS, MASK), 2)
    nowhere.write_calibration_cache(CACHE)
    assert nowhere.read_calibration_cache() is None


def test_a_cache_that_tensorrt_does_not_take_needs_data(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    path.write_bytes(CACHE)
    memory = HostMemory()
    assert len(taken(CalibrationBatches(samples(4), (IDS,), 2, path, memory), memory, ("ids",))) == 2
    batches = CalibrationBatches((), (IDS,), 2, path, memory)
    assert batches.get_batch(("ids",)) is None
    with pytest.raises(BadInput, match="DATA holds 0 samples, and the calibrator takes 2"):
        batches.check()


def test_other_files_are_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for content, message in ((b"\xff\x00", "it is no text"), (b"data", "not a TensorRT calibration cache")):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=message):
            CalibrationBatches(samples(4), (IDS,), 2, path)
    path.unlink()
    batches = CalibrationBatches(samples(4), (IDS,), 2, path)
    path.write_bytes(b"data")  # while TensorRT runs
    assert batches.read_calibration_cache() is None
    with pytest.raises(BadInput, match="not a TensorRT calibration cache"):
        batches.check()


def test_a_cache_that_cannot_be_written_is_raised_by_check(tmp_path: Path) -> None:
    batches = CalibrationBatches(samples(4), (IDS,), 2, tmp_path / "missing" / "calibration.cache")
    batches.write_calibration_cache(CACHE)
    with pytest.raises(CellFailed, match=r"cannot write .*: No such file or directory"):
        batches.check()


def test_the_class_for_tensorrt_hands_on_to_the_batches(tmp_path: Path) -> None:
    memory, path = HostMemory(), tmp_path / "calibration.cache"
    calibrator: Any = calibrator_class(TRT_8)(CalibrationBatches(samples(4), (IDS, MASK), 2, path, memory))
    assert issubclass(type(calibrator), EntropyCalibrator2) and calibrator.made
    assert calibrator.get_batch_size() == 2 and calibrator.read_calibration_cache() is None
    [address] = calibrator.get_batch(["ids"])
    assert memory.held[address][1, 0] == 1
    calibrator.write_calibration_cache(CACHE)
    assert calibrator.read_calibration_cache() == CACHE
    assert calibrator.get_batch(["ids"]) and calibrator.get_batch(["ids"]) is None


def test_tensorrt_11_has_no_calibrators() -> None:
    with pytest.raises(UnsupportedError, match=r"tensorrt 11\.0\.1 has no calibrators") as caught:
        calibrator_class(SimpleNamespace(__name__="tensorrt", __version__="11.0.1"))
    assert "Q/DQ" in caught.value.fix


def test_the_rtx_library_has_no_calibrators() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="not installed; fix: pip install tensorrt-rtx")
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx [\d.]+ has no calibrators"):
        calibrator_class(rtx)
