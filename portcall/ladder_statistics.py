"""Where an artifact computes something else than its source: residuals of operators against what rounding explains.

Each tensor that the artifact shows is recomputed in floats from the artifact's own inputs of the operator
("teacher forcing"), so that an error does not travel: what is left is the rounding of this one step. Its expected
energy is known: a grid of step s adds s^2 / 12 per element (Widrow and Kollar, "Quantization Noise", 2008); the
rounding of the weights is simulated, once as the recipe asks for and once not at all (a layer may stay in float),
and the better fit counts. A tensor diverges where the root mean square of the residual exceeds the expectation by
``threshold``: over the whole tensor, in one channel, or along the border. An error that is uniform in a step never
exceeds sqrt(3) = 1.73 times its root mean square: few elements cannot exceed the larger threshold by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portcall.targets.agent.contract import Range, Shown
from portcall.targets.agent.parity import decibels

Array = np.ndarray[Any, Any]

MANY = 512
"""Elements from which the root mean square of a residual is within a few per cent of its expectation."""
FEW = 16
"""A part of a tensor with fewer elements is not judged by itself."""
ABOVE_MANY, ABOVE_FEW = 1.5, 2.0
SAME_WEIGHTS = 0.25
"""Share of the weights' rounding noise that is allowed where the recipe's rounding is known exactly."""
OTHER_WEIGHTS = 3.0
"""The same where an exporter rounds in a way of its own (sums kept, biases corrected)."""
FLOAT_FLOOR = 2e-4
"""Relative error of float32 sums in another order, with activation functions by approximation."""
INTERPOLATED = 1e-3
"""Relative error of LiteRT's int16 RSQRT: 513 values of a table with lines between them (1.6e-3 at most, measured)."""
SLACK = 0.15
"""Of a step: integer kernels round their multipliers and biases too."""
EXACT = 0.02
"""Relative difference below which two scales are the same."""
FIXED_SCALES = (1 / 256, 1 / 128, 1 / 32768, 1 / 255)
"""Of softmax, logistic and tanh in LiteRT: its kernels know no others."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What values a tensor may take: multiples of *step* within low..high. explained: it is the recipe's own."""

    step: float
    low: float
    high: float
    explained: bool = True

    @staticmethod
    def of(shown: Shown) -> Grid | None:
        if shown.scale is None:
            return None
        low, high = ((level - shown.zero_point) * shown.scale for level in shown.levels)
        return Grid(shown.scale, low, high)


def recipe_grid(found: Range, shown: Shown) -> Grid:
    """Return the grid that a recipe's range gives to a tensor of the artifact's integer type."""
    steps = shown.levels[1] - shown.levels[0]
    low, high = min(found.minimum, 0.0), max(found.maximum, 0.0)
    if found.symmetric or (shown.zero_point == 0 and shown.levels[0] < 0 and steps > 255):  # LiteRT: int16
        step = max(-low, high) / shown.levels[1] or 1.0
        return Grid(step, shown.levels[0] * step, shown.levels[1] * step)
    step = (high - low) / steps or 1.0
    start = round(low / step) * step
    return Grid(step, start, start + steps * step)


def expected_grid(shown: Shown, ranges: Mapping[str, Range], ties: Mapping[str, int]) -> Grid | None:
    """Return the grid that the recipe gives to a shown tensor, or to one whose scale it shares; None for floats.

    Where the artifact's own grid is neither, the recipe's is returned as not explained. Without a range the artifact's
    own is all there is.
    """
    own = Grid.of(shown)
    if own is None:
        return None
    group = ties.get(shown.name)
    names = [shown.name, *(n for n in ranges if group is not None and ties.get(n) == group)]
    grids = [recipe_grid(ranges[n], shown) for n in names if n in ranges]
    if (
        not grids
        or any(_same(own, g) for g in grids)
        or any(math.isclose(own.step, s, rel_tol=1e-3) for s in FIXED_SCALES)
    ):
        return own
    return Grid(grids[0].step, grids[0].low, grids[0].high, explained=False)


def _same(one: Grid, other: Grid) -> bool:
    # The zero point is rounded: the ends may differ by a step.
    return abs(one.step / other.step - 1) <= EXACT and abs(one.low - other.low) <= 1.5 * other.step


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What is allowed: a share of the weights' rounding noise, and the relative step of a half type (0: float32)."""

    weights: float
    half: float = 0.0


class Residual:
    """The sums of one shown tensor over the samples: of each channel, at the border and inside."""

    def __init__(self, shown: Shown, grid: Grid | None, axis: int | None, tolerance: Tolerance) -> None:
        self.shown, self.grid, self._axis, self._tolerance = shown, grid, axis, tolerance
        self.n: Array | None = None
        self._sums: dict[str, Array] = {}
        self.problem: str | None = None
        self.accumulated = [0.0, 0.0]
        self._largest = 0.0

    def add(
        self, value: Array, plain: Array, rounded: Array, coarse: Array | None, truth: Array | None
    ) -> None:
        """Add one sample: what the artifact shows, the recomputed tensor with float and with rounded weights.

        coarse: recomputed with rounded weights and inputs rounded at run time. truth: of the float graph.
        """
        if truth is not None and truth.shape == value.shape:
            self.accumulated[0] += _energy(truth)
            self.accumulated[1] += _energy(truth - value)
        if value.shape != plain.shape:
            self.problem = f"has shape {list(value.shape)}, recomputed it has {list(plain.shape)}"
            return
        if not np.isfinite(value).all():
            self.problem = "holds NaN or infinity"
            return
        low, high = (self.grid.low, self.grid.high) if self.grid is not None else (-np.inf, np.inf)
        seen = value.astype(np.float64)
        wanted = {"plain": np.clip(plain, low, high), "rounded": np.clip(rounded, low, high)}
        terms = {
            "signal": wanted["plain"].astype(np.float64) ** 2,
            "plain": (seen - wanted["plain"]) ** 2,
            "rounded": (seen - wanted["rounded"]) ** 2,
            "weights": (rounded.astype(np.float64) - plain) ** 2,
        }
        step = 0.0 if self.grid is None else self.grid.step / 2
        inside = np.zeros(value.shape, bool)
        for values in wanted.values():
            inside |= (values > low) & (values < high)
        # What is clipped on both sides has no rounding error.
        terms["active"] = (inside | (np.abs(seen - wanted["plain"]) > step)).astype(np.float64)
        if coarse is not None:
            terms["dynamic"] = (coarse.astype(np.float64) - rounded) ** 2
        border = border_mask(value.shape, self._axis)
        self._largest = max(self._largest, float(np.abs(plain).max(initial=0.0)))
        for key, term in {**terms, "n": np.ones(value.shape)}.items():
            sums = _by_part(term, border, self._axis)
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def judge(self) -> dict[str, Any]:
        """Return the figures: local and expected SQNR, the worst ratio of found to expected, where, and the verdict."""
        figures: dict[str, Any] = {
            "sqnr_db": decibels(*self.accumulated)
            if self.accumulated[0] > 0 and np.isfinite(self.accumulated).all()
            else None,
            "local_sqnr_db": None,
            "expected_sqnr_db": None,
            "ratio": None,
            "threshold": None,
            "where": None,
            "channels": [],
            "verdict": "agrees",
        }
        if self.problem is not None:
            return {**figures, "verdict": "diverges", "where": self.problem}
        if not self._sums:
            return {**figures, "verdict": "not compared"}
        found = self._sums
        allowed = self._allowed()
        fits = {
            key: _worst(found[key], allowed, found["n"], found["active"], self._explained())
            for key in ("plain", "rounded")
        }
        key = min(fits, key=lambda k: fits[k][0])
        excess, ratio, limit, where, channels = fits[key]
        signal = float(found["signal"].sum())
        figures.update(
            local_sqnr_db=decibels(signal, float(found[key].sum())),
            expected_sqnr_db=decibels(signal, float(allowed.sum())),
            ratio=round(ratio, 3),
            threshold=limit,
            where=where,
            channels=channels,
            verdict="diverges" if excess > 1 else "agrees",
        )
        return figures

    def _explained(self) -> bool:
        return self.grid is None or self.grid.explained

    def _allowed(self) -> Array:
        """Return the expected energy of the residual in each part."""
        found, tolerance = self._sums, self._tolerance
        weights = found["weights"]
        if tolerance.weights > 1:
            # One draw of a rounding may cancel in a channel where another one does not: the mean of all counts.
            share = weights.sum() / max(found["n"].sum(), 1.0)
            weights = np.maximum(weights, found["n"] * share)
        allowed = tolerance.weights**2 * weights
        if "dynamic" in found:
            allowed = allowed + 4.0 * found["dynamic"]
        relative = max(tolerance.half, FLOAT_FLOOR)
        mean_signal = found["signal"].sum() / max(found["n"].sum(), 1.0)
        allowed = allowed + relative**2 * (found["signal"] + found["n"] * mean_signal) + found["n"] * 1e-14
        if self.grid is not None:
            allowed = allowed + found["active"] * self.grid.step**2 * (1 / 12 + SLACK**2 / 12)
        return np.asarray(allowed)


def border_mask(shape: tuple[int, ...], axis: int | None) -> Array | None:
    """Return what belongs to the outermost ring of an image [N, C, H, W] (axis 1) or [N, H, W, C]; None for others."""
    if len(shape) != 4 or axis not in (1, -1, 3):
        return None
    spatial = (2, 3) if axis == 1 else (1, 2)
    if min(shape[a] for a in spatial) < 3:
        return None
    mask = np.zeros(shape, bool)
    for a in spatial:
        for end in (0, -1):
            index: list[Any] = [slice(None)] * 4
            index[a] = end
            mask[tuple(index)] = True
    return mask


def _by_part(term: Array, border: Array | None, axis: int | None) -> Array:
    """Return sums [2, channels]: inside and at the border."""
    if axis is None or term.ndim == 0:
        return np.asarray([[term.sum()], [0.0]])
    others = tuple(a for a in range(term.ndim) if a != axis % term.ndim)
    total = term.sum(others)
    at_border = np.zeros_like(total) if border is None else (term * border).sum(others)
    return np.stack([total - at_border, at_border])


def _worst(
    found: Array, allowed: Array, n: Array, active: Array, explained: bool
) -> tuple[float, float, float, str, list[int]]:
    """Return (largest ratio / threshold, that ratio, its threshold, where, channels beyond theirs)."""
    worst = (-1.0, 0.0, ABOVE_MANY, "everywhere")

    def look(f: float, a: float, count: float, moving: float, where: str) -> float:
        nonlocal worst
        if count < FEW:
            return 0.0
        limit = ABOVE_MANY if moving >= MANY else ABOVE_FEW
        if not explained:
            limit = 1.1 if moving >= MANY else 1.25
        ratio = math.sqrt(f / a)
        if ratio / limit > worst[0]:
            worst = (ratio / limit, ratio, limit, where)
        return ratio / limit

    total = look(found.sum(), allowed.sum(), n.sum(), active.sum(), "everywhere")
    sums = (found.sum(0), allowed.sum(0), n.sum(0), active.sum(0))
    excesses = [look(f, a, c, m, f"channel {i}") for i, (f, a, c, m) in enumerate(zip(*sums, strict=True))]
    channels = [i for i, e in enumerate(excesses) if e > 1]
    at_border = False
    if n[1].sum() and n[0].sum():
        inside = math.sqrt(found[0].sum() / allowed[0].sum())
        edge = math.sqrt(found[1].sum() / allowed[1].sum())
        look(found[1].sum(), allowed[1].sum(), n[1].sum(), active[1].sum(), "the border")
        for i in range(n.shape[1]):
            look(found[1, i], allowed[1, i], n[1, i], active[1, i], f"the border of channel {i}")
        within = [
            math.sqrt(f / a) > ABOVE_FEW
            for f, a, c in zip(found[0], allowed[0], n[0], strict=True)
            if c >= FEW
        ]
        at_border = not any(within) and inside < ABOVE_MANY
        if worst[0] > 1 and at_border and edge > 2 * inside:
            worst = (*worst[:3], "the border")
    if worst[0] > 1 and not ("border" in worst[3] and at_border):
        count = len(channels)
        shown = ", ".join(map(str, channels[:4])) + (f" and {count - 4} more" if count > 4 else "")
        everywhere = total > 1 and (count > n.shape[1] / 2 or not count)
        worst = (
            *worst[:3],
            "everywhere" if everywhere or not count else f"channel{'s' * (count > 1)} {shown}",
        )
    return (*worst, channels)


def _energy(values: Array) -> float:
    flat = values.astype(np.float64).ravel()
    return float(flat @ flat)
