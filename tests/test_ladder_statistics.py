"""The criterion of the ladder on residuals of known statistics."""

from __future__ import annotations

import numpy as np
import pytest

from portcall.ladder_kinds import describe
from portcall.ladder_statistics import SAME_WEIGHTS, Grid, Residual, Tolerance, expected_grid
from portcall.targets.agent.contract import Range, Shown

SHOWN = Shown("t", 0.02, 128, (0, 255))
RANGES = {"t": Range(-2.56, 2.54)}


def _quantized(values: np.ndarray, shown: Shown = SHOWN) -> np.ndarray:
    assert shown.scale is not None
    levels = np.clip(np.rint(values / shown.scale) + shown.zero_point, *shown.levels)
    return np.asarray((levels - shown.zero_point) * shown.scale, np.float32)


def _verdict(shown: Shown, value: np.ndarray, wanted: np.ndarray) -> dict[str, object]:
    residual = Residual(shown, expected_grid(shown, RANGES, {}), 1, Tolerance(SAME_WEIGHTS))
    residual.add(value, wanted, wanted, None, wanted)
    return residual.judge()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 10), (1, 16, 3, 3)])
def test_rounding_alone_is_no_divergence(seed: int, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(seed).normal(0, 0.7, shape).astype(np.float32)
    assert _verdict(SHOWN, _quantized(values), values)["verdict"] == "agrees"


@pytest.mark.parametrize("seed", range(20))
def test_sparse_small_values_are_no_divergence(seed: int) -> None:
    """Values between zero and half a step become zero: their error is a rounding error too."""
    shown = Shown("t", 0.02, 0, (0, 255))
    values = np.maximum(np.random.default_rng(seed).normal(-0.05, 0.03, (1, 4, 8, 8)), 0).astype(np.float32)
    residual = Residual(shown, Grid.of(shown), 1, Tolerance(SAME_WEIGHTS))
    residual.add(_quantized(values, shown), values, values, None, values)
    assert residual.judge()["verdict"] == "agrees"


def test_a_shift_of_one_channel_diverges_there() -> None:
    values = np.random.default_rng(0).normal(0, 0.7, (1, 4, 16, 16)).astype(np.float32)
    broken = values.copy()
    broken[:, 2] += 0.05
    found = _verdict(SHOWN, _quantized(broken), values)
    assert found["verdict"] == "diverges"
    assert found["channels"] == [2]


def test_a_change_of_the_border_diverges_at_the_border() -> None:
    values = np.random.default_rng(0).normal(0, 0.7, (1, 4, 32, 32)).astype(np.float32)
    broken = values.copy()
    broken[:, :, 0] += 0.05
    found = _verdict(SHOWN, _quantized(broken), values)
    assert found["verdict"] == "diverges"
    assert "border" in str(found["where"])


def test_another_scale_than_the_recipes_diverges_and_a_shared_one_does_not() -> None:
    values = np.random.default_rng(0).normal(0, 0.5, (1, 4, 16, 16)).astype(np.float32)
    coarse = Shown("t", 0.03, 128, (0, 255))
    assert _verdict(coarse, _quantized(values, coarse), values)["verdict"] == "diverges"
    shared = expected_grid(coarse, {**RANGES, "u": Range(-3.84, 3.81)}, {"t": 0, "u": 0})
    assert shared is not None
    assert shared.explained
    assert shared.step == coarse.scale


def test_another_shape_and_nan_diverge() -> None:
    values = np.ones((1, 4, 8, 8), np.float32)
    assert "shape" in str(_verdict(SHOWN, values[:, :, 1:], values)["where"])
    assert "NaN" in str(_verdict(SHOWN, values * np.nan, values)["where"])


def test_kinds_are_described() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.5, (1, 4, 8, 8)).astype(np.float32)
    grid = Grid.of(SHOWN)
    assert "constant" in describe(values + 0.3, values, 1, [1], grid, grid, "channel 1")
    swapped = values[:, [1, 0, 2, 3]]
    assert (
        describe(swapped, values, 1, [0, 1], grid, grid, "channels 0, 1") == "channels 0 and 1 look swapped"
    )
    assert "1.5 times" in describe(values * 1.5, values, 1, [0], grid, grid, "channel 0")
    wrong = Grid(0.01, -1.28, 1.27, explained=False)
    assert describe(values, values, 1, [], grid, wrong, "everywhere") == "wrong scale: 2 times the recipe's"
