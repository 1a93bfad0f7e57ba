from __future__ import annotations

import ast
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns

import numpy as np
import pytest

from portcall.targets.agent import measure, memory
from portcall.targets.agent.errors import BadInput, CellFailed
from portcall.targets.agent.measure import overhead_ns, run_loop

AGENT = Path(measure.__file__).resolve().parent


class Counter:
    """An inference that counts its calls and spins for *spin_ns*."""

    def __init__(self, spin_ns: int = 0) -> None:
        self.calls = 0
        self.spin_ns = spin_ns

    def __call__(self) -> None:
        self.calls += 1
        end = perf_counter_ns() + self.spin_ns
        while perf_counter_ns() < end:
            pass

    def burn_cpu(self, amount_ns: int) -> None:
        end = time.thread_time_ns() + amount_ns
        while time.thread_time_ns() < end:
            pass


@pytest.fixture
def restored_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("name", ["measure.py", "memory.py", "fingerprint.py", "parity.py"])
def test_agent_files_keep_to_the_syntax_of_python_3_8(name: str) -> None:
    ast.parse((AGENT / name).read_text(), feature_version=(3, 8))


def test_every_inference_is_either_warm_up_or_a_sample() -> None:
    infer = Counter(spin_ns=20_000)
    samples = run_loop(infer, 0.002, 0.01)
    assert samples.warmup >= 1
    assert infer.calls == samples.warmup + samples.wall_ns.size
    assert samples.wall_ns.dtype == samples.cpu_ns.dtype == np.int64
    assert samples.wall_ns.shape == samples.cpu_ns.shape
    assert samples.wall_ns.min() >= infer.spin_ns
    assert samples.cpu_ns.min() >= 0
    assert samples.elapsed_ns >= max(10_000_000, int(samples.wall_ns.sum()))


def test_no_time_at_all_still_gives_one_warm_up_and_five_samples() -> None:
    infer = Counter()
    samples = run_loop(infer, 0.0, 0.0)
    assert (samples.warmup, samples.wall_ns.size, infer.calls) == (1, 5, 6)


def test_an_inference_longer_than_the_warm_up_is_not_repeated() -> None:
    assert run_loop(Counter(spin_ns=3_000_000), 0.004, 0.0).warmup == 1


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_max_count_ends_the_loop(count: int) -> None:
    assert run_loop(Counter(), 0.0, 60.0, max_count=count).wall_ns.size == count


def test_a_passed_deadline_gives_one_sample() -> None:
    infer = Counter()
    samples = run_loop(infer, 10.0, 60.0, deadline_ns=perf_counter_ns())
    assert (samples.warmup, samples.wall_ns.size, infer.calls) == (1, 1, 2)


def test_a_deadline_inside_the_loop_ends_it() -> None:
    deadline = perf_counter_ns() + 30_000_000
    samples = run_loop(Counter(spin_ns=1_000_000), 0.0, 60.0, deadline_ns=deadline)
    assert 1 <= samples.wall_ns.size <= 30
    assert perf_counter_ns() >= deadline


def test_a_slow_first_inference_does_not_cut_the_loop_short() -> None:
    infer = Counter(spin_ns=20_000_000)

    def slow_first() -> None:
        infer()
        infer.spin_ns = 0

    samples = run_loop(slow_first, 0.0, 0.02)
    assert samples.warmup == 1
    assert samples.elapsed_ns >= 20_000_000 or samples.wall_ns.size >= 65_536


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_collector_is_off_inside_and_restored(enabled: bool, fails: bool, restored_gc: None) -> None:
    seen = set()

    def infer() -> None:
        seen.add((gc.isenabled(), gc.get_freeze_count() > 0))
        if fails and len(seen) == 1:
            raise MemoryError("planted")

    (gc.enable if enabled else gc.disable)()
    if fails:
        with pytest.raises(MemoryError, match="planted"):
            run_loop(infer, 0.0, 0.0)
    else:
        run_loop(infer, 0.0, 0.0)
    assert seen == {(False, True)}
    assert gc.isenabled() is enabled
    assert gc.get_freeze_count() == 0


def test_objects_that_the_host_froze_stay_frozen(restored_gc: None) -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    run_loop(Counter(), 0.0, 0.0)
    assert gc.get_freeze_count() >= before * 0.9 > 0


def test_a_long_loop_does_not_grow() -> None:
    sizes = np.zeros(2, dtype=np.int64)
    calls = np.zeros(1, dtype=np.int64)

    def infer() -> None:
        calls[0] += 1
        if calls[0] in (1_000, 200_000):
            sizes[int(calls[0] == 200_000)] = memory.current_rss_bytes()

    samples = run_loop(infer, 0.0, 120.0, max_count=200_000)
    assert samples.wall_ns.size == 200_000
    assert sizes[0] > 0
    # Python lists of these samples would take 13 MB.
    assert sizes[1] - sizes[0] < 1_000_000


def _fake_clock(steps: list[int]) -> Callable[[], int]:
    ticks = itertools.accumulate(itertools.chain(steps, itertools.repeat(100)), initial=1_000_000)
    return lambda: next(ticks)


# The warm-up reads the clock twice, then the loop reads it once, then twice a sample.
@pytest.mark.parametrize(
    "steps",
    [[-5000], [100, 100, 100, -5000], [100, 100, 100, 100, -5000]],
    ids=["in the warm-up", "inside an inference", "between inferences"],
)
def test_a_clock_that_goes_backwards_fails(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    monkeypatch.setattr(measure, "perf_counter_ns", _fake_clock(steps))
    with pytest.raises(CellFailed, match="went backwards by 5000 ns"):
        run_loop(lambda: None, 0.0, 1e-6)
    assert gc.isenabled()


def test_a_cpu_clock_that_goes_backwards_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "process_time_ns", _fake_clock([100, 100, -5000]))
    with pytest.raises(CellFailed, match="CPU clock went backwards"):
        run_loop(lambda: None, 0.0, 0.0)


def test_the_wall_clock_brackets_the_inference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = _fake_clock([])

    def wall() -> int:
        order.append("wall")
        return clock()

    def cpu() -> int:
        order.append("cpu")
        return 0

    monkeypatch.setattr(measure, "perf_counter_ns", wall)
    monkeypatch.setattr(measure, "process_time_ns", cpu)
    samples = run_loop(lambda: order.append("infer"), 0.0, 0.0)
    assert order[4:] == ["cpu", "wall", "infer", "wall", "cpu"] * 5
    assert samples.wall_ns.tolist() == [100] * 5


@pytest.mark.parametrize("times", [(-1.0, 1.0), (0.0, float("nan")), (float("inf"), 1.0)])
def test_times_must_be_finite_and_not_negative(times: tuple[float, float]) -> None:
    with pytest.raises(BadInput, match="finite and not negative"):
        run_loop(lambda: None, *times)
    with pytest.raises(BadInput, match="max_count must be at least 1"):
        run_loop(lambda: None, 0.0, 0.0, max_count=0)


def test_the_overhead_is_reported() -> None:
    wall, cpu = overhead_ns(count=200)
    assert wall >= 0
    assert cpu >= 0


def test_cpu_time_leaves_out_sleep() -> None:
    samples = run_loop(lambda: time.sleep(0.02), 0.0, 0.0)
    assert samples.cpu_ns.sum() < samples.wall_ns.sum() / 2


def test_cpu_time_counts_all_threads() -> None:
    """The calling thread only waits; the CPU time is the other's."""

    def infer() -> None:
        worker = threading.Thread(target=Counter(spin_ns=0).burn_cpu, args=(5_000_000,))
        worker.start()
        worker.join()

    assert run_loop(infer, 0.0, 0.0).cpu_ns.min() >= 5_000_000
