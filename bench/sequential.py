"""An interval that may be looked at after every pair: a confidence sequence of the mean of normal values.

A fixed-sample interval covers at one look; who looks after every pair and stops when the answer pleases is wrong far
more often. This one covers the true mean at all looks together, so that ``compare`` can stop when the verdict is clear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from portcall.bench.statistics import student_t_quantile

PRIOR = 5.0
"""Variance of the mixture, in units of the values' variance: narrowest at about 6 to 20 pairs, the usual count."""


def sequential_interval(
    values: Sequence[float] | np.ndarray[Any, Any], level: float = 0.95, prior: float = PRIOR
) -> tuple[float, float] | None:
    """Return the interval of the mean after these values; None while there is none (with fewer than 4).

    values: independent, of one normal distribution whose variance is unknown. Over all n together the chance that an
    interval misses the mean is at most 1 - level.
    Source: the Bayes factor of the t test with a normal prior of the effect size (T. L. Lai, "On confidence sequences",
    Annals of Statistics 4 (1976) 265-280) is a martingale of the scale-invariant data (H. Wang and A. Ramdas,
    "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance", Sequential Analysis 44
    (2025)); Ville's inequality bounds it, and t is solved for. A test simulates it.
    """
    x = np.asarray(values, dtype=np.float64)
    half = sequential_half_width(x.size, level, prior)
    if not math.isfinite(half):
        return None
    center, half = float(x.mean()), half * float(x.std(ddof=1))
    return center - half, center + half


def sequential_half_width(n: int, level: float = 0.95, prior: float = PRIOR) -> float:
    """Return the half width of ``sequential_interval`` after *n* values, in standard deviations; inf below 4."""
    if n < 3:
        return math.inf
    scale = 1 + n * prior
    growth = (math.sqrt(scale) / (1 - level)) ** (2 / n)
    if growth >= scale:
        return math.inf
    return math.sqrt((n - 1) * (growth - 1) / (1 - growth / scale) / n)


def fixed_interval(
    values: Sequence[float] | np.ndarray[Any, Any], level: float = 0.95
) -> tuple[float, float] | None:
    """Return Student's t interval of the mean, for a count that was set beforehand; None below 2 values."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return None
    half = student_t_quantile(0.5 + level / 2, x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return float(x.mean()) - half, float(x.mean()) + half
