"""Did the artifact score worse than its source on the same samples? Paired intervals of the difference.

Both models see the same samples, so only those on which they differ tell anything: the intervals are of the mean of the
per-sample differences, value - reference, and never of two separate means.
``benchmarks/intervals.py`` measures the coverage of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from portcall.bench.statistics import student_t_quantile

Interval = tuple[float, float]

_Z95 = NormalDist().inv_cdf(0.975)


def score_interval(source_only: int, artifact_only: int, n: int, z: float = _Z95) -> Interval:
    """Return the interval of a paired difference of proportions, artifact - source, as fractions.

    source_only, artifact_only: samples that only one of the two got right; n: all samples, at least 1. z: normal
    quantile (default: 95 %). Never degenerate: without any discordant sample it is +- z^2 / (n + z^2).
    Source: T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17 (1998) 891-908; the score statistic is solved by bisection.
    """
    if n < 1 or min(source_only, artifact_only) < 0 or source_only + artifact_only > n:
        raise ValueError(f"no paired outcomes: {source_only} + {artifact_only} of {n}")
    found = (artifact_only - source_only) / n

    def statistic(delta: float) -> float:
        return _tango(artifact_only, source_only, n, delta)

    low = _bisect(lambda d: statistic(d) - z, -1.0, found)
    high = _bisect(lambda d: statistic(d) + z, found, 1.0)
    return low, high


def _tango(gained: int, lost: int, n: int, delta: float) -> float:
    """Return Tango's score statistic for the hypothesis that the difference is *delta*; it falls as delta rises."""
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    nuisance = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * nuisance + delta * (1 - delta))
    distance = gained - lost - n * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return float(distance / math.sqrt(variance))


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of a falling function between *low* and *high*."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def exact_mcnemar(source_only: int, artifact_only: int) -> float:
    """Return the two-sided p-value of equal proportions: the exact binomial test on the discordant samples.

    1 where there are none. Source: Q. McNemar, Psychometrika 12 (1947) 153-157, in its exact form.
    """
    total, fewer = source_only + artifact_only, min(source_only, artifact_only)
    term = tail = 1
    for k in range(1, fewer + 1):
        term = term * (total - k + 1) // k
        tail += term
    return float(min(1.0, 2 * tail / 2**total))


def mean_interval(differences: np.ndarray, spread: float, level: float = 0.95) -> Interval | None:
    """Return Student's paired t interval of the mean difference, or None below 2 samples.

    differences: float64[n], artifact - source. spread: range of all scores, which counts where no sample differs.
    One pair of made-up samples is added, one of each sign, as large as the largest difference (or as *spread*): where
    few samples differ the plain t interval and the bootstrap are far too short (80 and 77 % instead of 95 %, at
    n = 100 where 2 % of the samples differ and the drop is 0.01).
    Source: the t interval with the adjustment of D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data", J. Educational and Behavioral Statistics 37 (2012)
    479-488, carried over from 0 and 1 to real values.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:
        return None
    largest = float(np.abs(values).max()) or spread
    padded = np.concatenate([values, [largest, -largest]])
    center = float(padded.mean())
    half = student_t_quantile(0.5 + level / 2, values.size - 1)
    half *= float(padded.std(ddof=1)) / math.sqrt(padded.size)
    return center - half, center + half


def wilson_interval(successes: int, n: int, z: float = _Z95) -> Interval:
    """Return the score interval of one proportion. Source: E. B. Wilson, JASA 22 (1927) 209-212."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"no proportion: {successes} of {n}")
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def samples_for(
    n: int, interval_at: Callable[[int], Interval], decided: Callable[[Interval], bool]
) -> int | None:
    """Return about how many samples would decide, if the outcomes stay as they are; None above 10 million.

    n: samples now. interval_at: the interval for so many. decided: whether it is narrow enough. Rounded up to two
    significant digits.
    """
    needed = n
    while not decided(interval_at(needed)):
        if needed > 10_000_000:
            return None
        needed = math.ceil(1.05 * needed)
    unit = int(10 ** max(0, math.floor(math.log10(needed)) - 1))
    return math.ceil(needed / unit) * unit
