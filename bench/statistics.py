"""Latency statistics: percentiles only where n supports them, intervals with the process as the unit.

Fresh processes of one file differ by 4 to 6 % in P50, whatever is done inside each: samples of one process
are not independent, so every interval here is over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

PERCENTILES = {"p50_ns": 0.5, "p90_ns": 0.9, "p95_ns": 0.95, "p99_ns": 0.99, "p999_ns": 0.999}
_SPOKEN = {key: key[:-3] for key in PERCENTILES} | {"p999_ns": "p99.9"}

TRIM = 0.1
"""Share of the samples that the trimmed mean leaves out at each end."""

_MISS = 0.05
"""Greatest chance that all n samples lie below the percentile, so that none tells anything about it."""

_VARIES = 0.05
"""Spread of the processes' medians above which a warning says so: what quiet machines show at most."""


def supported_percentile(q: float, n: int) -> bool:
    """Return whether n samples support percentile *q* (a fraction): q^n <= 0.05.

    That is n >= 5 for P50, 29 for P90, 59 for P95, 299 for P99, 2995 for P99.9.
    """
    return _fraction(q) ** n <= _MISS


def samples_needed(q: float) -> int:
    """Return the smallest n that supports percentile *q*, a fraction."""
    n = max(1, math.ceil(math.log(_MISS) / math.log(_fraction(q))) - 1)
    return n if supported_percentile(q, n) else n + 1


def percentile(samples: np.ndarray, q: float) -> float:
    """Return percentile *q*, a fraction, by linear interpolation between order statistics (NumPy's "linear").

    It does not ask whether n supports it. Raises ValueError for no samples.
    """
    if np.size(samples) == 0:
        raise ValueError("percentile of no samples")
    return float(np.quantile(samples, _fraction(q), method="linear"))


def process_interval(per_process_values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return the t interval of a figure over processes, on log values, or None below 2 processes.

    per_process_values: one positive figure per fresh process, such as its P50. The interval is for the figure
    of a typical process (the geometric mean); equal values give an interval of width 0. With 5 processes it
    covers 95 % where 95 % is meant; a percentile bootstrap over processes covers 84 % (measured on real
    processes of one int8 file; a test simulates both). From 20 processes on it is still t: a bootstrap over 20
    processes covers less in every case tried (normal logs 92 % against 95 %, exponential ones 91 % against 92 %, one
    process in ten up to a third slower 86 % against 89 %), and the two agree from about 50 on.
    """
    values = np.asarray(per_process_values, dtype=np.float64)
    if values.size and not (np.isfinite(values).all() and values.min() > 0):
        raise ValueError(f"the interval needs finite values above 0: {values.tolist()}")
    if values.size < 2:
        return None
    logs = np.log(values)
    center = float(logs.mean())
    error = float(logs.std(ddof=1)) / math.sqrt(values.size)
    half = student_t_quantile(0.5 + level / 2, values.size - 1) * error
    return math.exp(center - half), math.exp(center + half)


def trimmed_mean(samples: np.ndarray, share: float = TRIM) -> float:
    """Return the mean without the lowest and the highest *share* of the samples (each rounded down to whole samples).

    Raises ValueError for no samples.
    """
    if np.size(samples) == 0:
        raise ValueError("trimmed mean of no samples")
    values = np.sort(np.asarray(samples, dtype=np.float64))
    cut = int(share * values.size)
    return float(values[cut : values.size - cut].mean())


def relative_width(interval: Sequence[float], value: float) -> float:
    """Return how wide an interval is: upper minus lower end, over *value*. 0.01 is 1 %."""
    return (interval[1] - interval[0]) / value


def processes_for_width(per_process_values: Sequence[float], width: float, level: float = 0.95) -> int | None:
    """Return about how many processes an interval of that relative *width* needs, spread as these; None below 2.

    From the spread of the log values: the interval is exp(center +- half), so its width over its center is
    2 sinh(half). Raises ValueError as ``process_interval`` does.
    """
    if process_interval(per_process_values) is None:
        return None
    spread = float(np.log(np.asarray(per_process_values, dtype=np.float64)).std(ddof=1))
    half = math.asinh(width / 2)
    n = 2
    while student_t_quantile(0.5 + level / 2, n - 1) * spread > half * math.sqrt(n) and n < 1_000_000:
        n += max(1, n // 50)
    return n


def summarize(processes: Sequence[np.ndarray]) -> tuple[dict[str, Any], list[str]]:
    """Return the "latency" object of the bench JSON, and warnings; *processes*: each one's samples in ns.

    The figures pool all samples; what n does not support is None, and a warning says what it needs. "ci"
    holds 95 % intervals over processes (see ``process_interval``) of the mean and of each percentile that
    every process supports by its own n. A pooled figure weighs processes by their n: it is not the interval's
    center and, with unequal processes, may lie outside.
    """
    given = [np.asarray(p, dtype=np.float64) for p in processes]
    groups = [p for p in given if p.size]
    pooled = np.concatenate(groups) if groups else np.empty(0)
    n = pooled.size
    warnings = []
    if len(groups) < len(given):
        warnings.append(f"{len(given) - len(groups)} of {len(given)} processes gave no samples")
    latency: dict[str, Any] = {"n": n, "processes": len(groups), "min_ns": int(pooled.min()) if n else None}
    for key, q in PERCENTILES.items():
        supported = supported_percentile(q, n)
        latency[key] = percentile(pooled, q) if supported else None
        if not supported:
            warnings.append(f"n={n}: no {_SPOKEN[key]} (needs {samples_needed(q)})")
    latency["mean_ns"] = float(pooled.mean()) if n else None
    latency["trimmed_mean_ns"], latency["trim"] = (trimmed_mean(pooled) if n else None), TRIM
    latency["stdev_ns"] = float(pooled.std(ddof=1)) if n > 1 else None
    latency["ci"] = _intervals(groups, latency, warnings)
    return latency, warnings


def _intervals(
    groups: list[np.ndarray], latency: dict[str, Any], warnings: list[str]
) -> dict[str, list[float]]:
    if not groups:
        return {}
    if len(groups) == 1:
        warnings.append("1 process: no interval; rerun with --processes 5")
        return {}
    if any(p.min() <= 0 for p in groups):
        warnings.append(
            "some latencies are 0 ns: no interval; the clock is too coarse, measure a larger batch"
        )
        return {}
    shortest = min(p.size for p in groups)
    figures = {
        "mean_ns": [float(p.mean()) for p in groups],
        "trimmed_mean_ns": [trimmed_mean(p) for p in groups],
    }
    for key, q in PERCENTILES.items():
        if supported_percentile(q, shortest):
            figures[key] = [percentile(p, q) for p in groups]
        elif latency[key] is not None:
            warnings.append(
                f"no interval for {_SPOKEN[key]}: a process has n={shortest} (needs {samples_needed(q)})"
            )
    medians = np.array([percentile(p, 0.5) for p in groups])
    varies = float(medians.std(ddof=1) / medians.mean())
    if varies > _VARIES:
        more = max(10, 2 * len(groups))
        warnings.append(
            f"P50 varies {100 * varies:.1f} % between processes: rerun with --processes {more}, or pin clocks"
        )
    intervals = {key: process_interval(values) for key, values in figures.items()}
    return {key: list(ci) for key, ci in intervals.items() if ci is not None}


@lru_cache(maxsize=256)
def student_t_quantile(p: float, df: float) -> float:
    """Return x with P(T <= x) = *p* for Student's t with *df* > 0 degrees of freedom.

    The incomplete beta function inverted by Newton's method inside a bracket. A test compares it with SciPy's
    ``t.ppf`` to 1e-10 for df up to 200; p nearer to 0 or 1 than 1e-15 is not tested.
    """
    if not (0 < p < 1 and df > 0):
        raise ValueError(f"need 0 < p < 1 and df > 0: p={p}, df={df}")
    if p < 0.5:
        return -_upper_t_quantile(p, df)
    return _upper_t_quantile(1 - p, df)


def _upper_t_quantile(tail: float, df: float) -> float:
    """Return x >= 0 with P(T > x) = tail, for tail <= 0.5."""
    if tail == 0.5:
        return 0.0
    low, high = 0.0, 1.0
    while _t_tail(high, df) > tail:
        low, high = high, 2 * high
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    x = min(max(-NormalDist().inv_cdf(tail), low), high)
    for _ in range(200):
        excess = _t_tail(x, df) - tail
        low, high = (x, high) if excess > 0 else (low, x)
        density = math.exp(log_scale - (df + 1) / 2 * math.log1p(x * x / df))
        step = x + excess / density
        step = step if low < step < high else (low + high) / 2
        if abs(step - x) <= 1e-15 * x:
            break
        x = step
    return x


def _t_tail(x: float, df: float) -> float:
    """Return P(T > x) for x >= 0."""
    return 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + x * x), x * x / (df + x * x))


def _incomplete_beta(a: float, b: float, x: float, complement: float) -> float:
    """Return the regularized I_x(a, b); complement = 1 - x, given apart so that neither loses digits."""
    if x <= 0:
        return 0.0
    if complement <= 0:
        return 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log(complement))
    # The continued fraction converges fast on one side of the mean only; the other follows by symmetry.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, complement) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of I_x(a, b) (DLMF 8.17.22) by the modified Lentz method."""
    tiny = 1e-300
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d, tiny)
            c = _nonzero(1 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1) < 4e-16:
            break
    return value


def _nonzero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def _fraction(q: float) -> float:
    if not 0 < q < 1:
        raise ValueError(f"a percentile is given as a fraction between 0 and 1: {q}")
    return q
