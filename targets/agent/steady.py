"""Tells whether a series of latencies is stationary: warmed up, and not on its way somewhere else.

The series is cut into 20 segments of equal count. Each one's median leaves single outliers aside; the successive
differences of these medians tell the noise between segments, whatever the series' own slow changes are (von Neumann's
successive differences, with a quantile in place of the mean so that one step does not count as noise). Then every place
where a segment ends is tried as a change point: the medians before and after it are compared. A series is not
stationary where that difference is larger than both a tolerance (2 %: nobody minds less) and what the noise explains.

A drift in heavy noise hides from that: where the segments' ranks show a trend (Kendall's statistic), the medians of the
two halves must not differ by more than the tolerance either.

So a step, a ramp, a decay and a drift all show as a level that changed; noise, however heavy its tail, does not, and
neither does what repeats several times within the series. What is slower than the series itself cannot be seen in it.

Source of the parts: von Neumann, "Distribution of the ratio of the mean square successive difference to the variance"
(1941); Mann (1945) on Kendall's statistic as a test against a trend; the scan over all change points as in Pettitt
(1979). ``benchmarks.steady`` measures how often the whole is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Dict, Optional

import numpy as np

SEGMENTS = 20
TOLERANCE = 0.02
"""Relative change of level that is left alone."""

SIGMAS = 4.0
"""A larger change also has to exceed this many standard errors: 19 places are tried in one series."""

TREND = 2.5
"""Standard deviations of Kendall's statistic from which on a change by more than the tolerance is a drift."""

DIFFERENCE = 0.8
"""Quantile of the absolute differences of neighbouring segments that the noise is taken from: one step is one of 19,
but what repeats within the series is in many."""

_NORMAL = 2**0.5 * NormalDist().inv_cdf((1 + DIFFERENCE) / 2)
"""That quantile in standard deviations of a normal segment."""

FEWEST = 5
"""Shorter series are not judged."""


@dataclass(frozen=True)
class Judgement:
    """Of one series: *stationary* is None where it is too short to tell, with the reason in ``reason``.

    change: the largest relative change of level found (+0.05: 5 % slower at the end). noise: standard error that a
    change of level has here by chance, relative.
    """

    stationary: Optional[bool]
    change: Optional[float]
    noise: Optional[float]
    reason: Optional[str]


def judge(wall_ns: np.ndarray) -> Judgement:
    """Judge a series of latencies in order, in ns. Takes about a millisecond per 100,000 of them."""
    if wall_ns.size < FEWEST:
        return Judgement(
            None, None, None, "n=%d: too few inferences to tell (needs %d)" % (wall_ns.size, FEWEST)
        )
    count = min(SEGMENTS, wall_ns.size)
    levels = np.log([max(float(np.median(part)), 1.0) for part in np.array_split(wall_ns, count)])
    sigma = float(np.quantile(np.abs(np.diff(levels)), DIFFERENCE)) / _NORMAL
    worst, change, noise = -np.inf, 0.0, 0.0
    for k in range(1 if count >= SEGMENTS else 2, count - 1):
        # A median of medians: 1.25 times the error of their mean.
        error = 1.2533 * sigma * (1 / k + 1 / (count - k)) ** 0.5
        step = float(np.median(levels[k:]) - np.median(levels[:k]))
        excess = abs(step) - max(TOLERANCE, SIGMAS * error)
        if excess > worst:
            worst, change, noise = excess, step, error
    if worst <= 0 and abs(_kendall(levels)) > TREND:
        step = float(np.median(levels[-(count // 2) :]) - np.median(levels[: count // 2]))
        if abs(step) > TOLERANCE:
            worst, change = abs(step), step
    relative = float(np.expm1(change))
    reason = None if worst <= 0 else "P50 moved by %+.1f %% within the series" % (100 * relative)
    return Judgement(worst <= 0, relative, noise, reason)


def _kendall(levels: np.ndarray) -> float:
    """Return Kendall's statistic of a trend in standard deviations: pairs that rise minus pairs that fall."""
    n = levels.size
    pairs = np.sign(levels[None, :] - levels[:, None])[np.triu_indices(n, 1)]
    return float(pairs.sum() / (n * (n - 1) * (2 * n + 5) / 18) ** 0.5)


@dataclass(frozen=True)
class Steady:
    """How a process got to its timed series: whether that is stationary, and what came before.

    reached: False also where the series is too short to tell (see *reason*). change: as in ``Judgement``. warmup_ns:
    wall time from the first warm-up inference to the first timed one.
    """

    reached: bool
    reason: Optional[str]
    change: Optional[float]
    warmup_ns: int

    def to_json(self) -> Dict[str, Any]:
        return {
            "reached": self.reached,
            "reason": self.reason,
            "change": self.change,
            "warmup_ns": self.warmup_ns,
        }
