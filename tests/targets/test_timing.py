from __future__ import annotations

import gc
import mmap
import time
from pathlib import Path

import numpy as np
import pytest

from portcall.exporters import onnxruntime
from portcall.targets.agent import timing
from portcall.targets.agent.contract import Artifact, Workload


def test_overhead_of_an_empty_session() -> None:
    found = timing.overhead(count=400)
    assert 0 <= found["wall_ns"] <= found["loop_ns"]
    assert found["cpu_ns"] >= 0


class Session(timing.EmptySession):
    """Keeps *keep* bytes from its 50th inference on."""

    def __init__(self, keep: int) -> None:
        self.calls, self.keep = 0, keep

    def infer(self) -> None:
        self.calls += 1
        if self.keep and self.calls == 50:
            self.kept = mmap.mmap(
                -1, self.keep
            )  # new pages, not some that an earlier test gave back to the heap
            self.kept.write(bytes(self.keep))


def test_growth_across_the_loop_is_seen_and_there_is_none_without() -> None:
    workload = Workload(warmup_s=0.0, max_warmup_s=0.0, min_time_s=0.0, min_count=20_000)
    samples, growth = timing.timed(Session(0), workload, None)
    assert samples.wall_ns.size >= 20_000
    assert growth is not None and growth < 500_000
    _, growth = timing.timed(Session(20_000_000), workload, None)
    assert growth is not None and 19_000_000 < growth < 22_000_000


def test_outputs_are_compared_bit_for_bit() -> None:
    first = {"y": np.array([1.0, np.nan, 0.0], np.float32), "z": np.array([1, 2])}
    same = timing.compare_outputs(first, {k: v.copy() for k, v in first.items()})
    assert (same["deterministic"], same["largest_difference"], same["output"]) == (True, None, None)
    assert timing.outputs_warning(same) is None

    other = {"y": np.array([1.0, np.nan, 0.25], np.float32), "z": np.array([1, 5])}
    found = timing.compare_outputs(first, other)
    assert (found["deterministic"], found["largest_difference"], found["output"]) == (False, 3.0, "z")
    assert found["sha256"] == same["sha256"] != timing.compare_outputs(other, other)["sha256"]
    warning = timing.outputs_warning(found)
    assert warning is not None and "z by up to 3 between" in warning


def test_a_sign_of_zero_and_a_shape_count_as_differences() -> None:
    assert not timing.compare_outputs({"y": np.array([0.0])}, {"y": np.array([-0.0])})["deterministic"]
    found = timing.compare_outputs({"y": np.zeros(2)}, {"y": np.zeros(3)})
    assert (found["deterministic"], found["largest_difference"], found["output"]) == (False, None, "y")
    assert not timing.compare_outputs({"y": np.zeros(2)}, {})["deterministic"]


@pytest.mark.parametrize(("spinning", "expected"), [(None, True), (True, True), (False, False)])
def test_a_real_session_logs_nothing_and_does_not_grow(
    tiny_onnx: Path, capfd: pytest.CaptureFixture[str], spinning: bool | None, expected: bool
) -> None:
    """Two threads: spinning is the runtime's default there, and a switch."""
    pytest.importorskip(
        "onnxruntime", reason="ONNX Runtime is not installed: pip install 'portcall[onnxruntime]'"
    )
    workload = Workload(threads=2, min_time_s=0.2, warmup_s=0.05, max_warmup_s=0.1, spinning=spinning)
    artifact = Artifact(tiny_onnx.parent, tiny_onnx.name, "onnxruntime", "as is")
    with onnxruntime.load(artifact, workload) as session:
        assert session.environment["spinning"] is expected
        session.set_inputs({"x": np.ones((1, 3, 16, 16), np.float32)})
        capfd.readouterr()
        samples, growth = timing.timed(session, workload, None)
        assert capfd.readouterr() == ("", "")
    assert samples.wall_ns.size >= 5
    assert growth is not None and growth < 1 << 20


def test_warming_up_leaves_time_before_a_deadline() -> None:
    """A series that never gets steady: two thirds of the time are left for what is timed."""

    class Slower(timing.EmptySession):
        calls = 0

        def infer(self) -> None:
            self.calls += 1
            time.sleep(0.0005 * (1 + self.calls / 50))

    workload = Workload(warmup_s=0.05, max_warmup_s=60.0, min_time_s=60.0)
    gc.freeze()  # the runtimes of other tests take a while to collect
    try:
        start = time.perf_counter_ns()
        samples, _ = timing.timed(Slower(), workload, start + 900_000_000)
    finally:
        gc.unfreeze()
    assert samples.steady is not None and not samples.steady.reached
    assert samples.wall_ns.sum() > 0.3e9
