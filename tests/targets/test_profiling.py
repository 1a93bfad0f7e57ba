"""What every backend's profile shares: which inferences count, names of modules, and the job's loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from portcall.targets.agent import profiling
from portcall.targets.agent.profiling import Times, owner, undisturbed


@pytest.mark.parametrize(
    ("took", "kept"),
    [([5], [0]), ([5, 4], [1]), ([3, 9, 1, 8], [0, 2]), ([2, 2, 2], [0, 1]), ([9, 1, 1, 9, 1], [1, 2, 4])],
)
def test_the_faster_half_is_kept_in_order(took: list[float], kept: list[int]) -> None:
    assert undisturbed(took) == kept


def test_a_preempted_operator_does_not_carry_the_mean() -> None:
    rows: list[Mapping[Any, float]] = [{"a": 10.0, "b": 1.0}, {"a": 4000.0, "b": 1.0}, {"a": 12.0}]
    kept = undisturbed([sum(r.values()) for r in rows])
    assert Times(rows).mean("a", kept) == 11.0
    assert Times(rows).mean("b", kept) == 0.5, "an operator that an inference skips took nothing"
    assert Times(rows).mean("c", kept) == 0.0


@pytest.mark.parametrize(
    ("constant", "module"),
    [
        ("stem.0.weight", "stem.0"),
        ("stem.0.weight_quantized", "stem.0"),
        ("stem.0.weight_DequantizeLinear_Output", "stem.0"),
        ("stem.0.weight_bias_quantized", "stem.0"),
        ("weight", None),
        ("w1", None),
        ("layer.1.running_mean", None),
    ],
)
def test_a_constant_tells_its_module(constant: str, module: str | None) -> None:
    assert owner(constant) == module


class _Counting(profiling.Profiler):
    """Counts inferences and collections; each inference takes *seconds*."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.done, self.collected = seconds, 0, 0

    def set_inputs(self, arrays: Mapping[str, Any]) -> None: ...

    def infer(self) -> None:
        self.done += 1
        time.sleep(self.seconds)

    def collect(self) -> None:
        self.collected += 1


def test_the_loop_does_at_least_the_fewest_and_at_most_the_most() -> None:
    few, many = _Counting(0.0), _Counting(0.0)
    assert len(profiling._run(few, 10, 200, 0.0)) == few.done == few.collected == 10
    assert len(profiling._run(many, 10, 200, 60.0)) == many.done == 200


def test_a_slow_model_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "PATIENCE_S", 0.05)
    slow = _Counting(0.03)
    took = profiling._run(slow, 10, 200, 0.0)
    assert 1 <= len(took) < 10
    assert min(took) >= 30_000_000
