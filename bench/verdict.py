"""From the interval of a ratio to a verdict, and the ratios of a series of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from portcall.bench.sequential import sequential_half_width, sequential_interval
from portcall.bench.statistics import percentile, supported_percentile
from portcall.core import BadInput

Array = np.ndarray[Any, Any]

METRICS = ("p50", "p95", "p99", "cpu", "memory")
"""What ``compare`` compares: percentiles of wall time, P50 of CPU time, the peak of resident memory."""


class Verdict(StrEnum):
    """What a comparison found."""

    IMPROVED = "improved"
    UNCHANGED = "unchanged"
    REGRESSED = "regressed"
    INCONCLUSIVE = "inconclusive"
    INCOMPARABLE = "incomparable"


@dataclass(frozen=True, slots=True)
class Pair:
    """Raw times in ns of one pair, in order: int64[turns, inferences of a turn] of each side."""

    base: Array
    candidate: Array
    base_cpu: Array
    candidate_cpu: Array


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio candidate / base of one metric after some pairs.

    values: one natural logarithm per pair (or one jackknife pseudo-value). interval: of the mean of values, None while
    there is none.
    """

    values: Sequence[float]
    interval: tuple[float, float] | None

    @property
    def center(self) -> float:
        return float(np.mean(self.values))


def judge(ratio: Ratio, margin: float, clear: bool = False) -> Verdict:
    """Return the verdict on a cost (smaller is better); *margin* is a share, such as 0.03.

    unchanged: the whole interval lies within the margin, so that equivalence was shown. regressed, improved: the
    interval lies above (below) no change at all, and the ratio itself beyond the margin. Else inconclusive. clear: a
    change counts only where the whole interval lies beyond the margin: what more pairs will hardly take back.
    """
    if ratio.interval is None:
        return Verdict.INCONCLUSIVE
    low, high = ratio.interval
    edge = math.log1p(margin)
    if -edge < low and high < edge:
        return Verdict.UNCHANGED
    limit = edge if clear else 0.0
    if low > limit and ratio.center > edge:
        return Verdict.REGRESSED
    if high < -limit and ratio.center < -edge:
        return Verdict.IMPROVED
    return Verdict.INCONCLUSIVE


def smallest_effect(ratio: Ratio, margin: float) -> float | None:
    """Return the smallest slow-down, as a share, that these pairs would have found in 80 of 100 runs; None without n.

    It had to move the interval above no change, and the ratio above the margin (one-sided, normal).
    """
    n = len(ratio.values)
    half = sequential_half_width(n)
    if not math.isfinite(half):
        return None
    spread = float(np.std(ratio.values, ddof=1))
    needed = max(math.log1p(margin), half * spread)
    return math.expm1(needed + 0.8416 * spread / math.sqrt(n))


def p50_ratio(pairs: Sequence[Pair], cpu: bool = False) -> Ratio:
    """Return the ratio of P50 of wall (or CPU) time: one value per pair.

    A pair's value is the median over turns of log(median of the candidate's turn / median of the base's next to it):
    what drifts or bursts longer than a turn cancels.
    """
    values = []
    for pair in pairs:
        base, candidate = (pair.base_cpu, pair.candidate_cpu) if cpu else (pair.base, pair.candidate)
        turns = np.log(np.median(candidate, axis=1)) - np.log(np.median(base, axis=1))
        values.append(float(np.median(turns)))
    return Ratio(values, sequential_interval(values))


def percentile_ratio(pairs: Sequence[Pair], q: float) -> Ratio | None:
    """Return the ratio of percentile *q* of the pooled samples, with jackknife pseudo-values over pairs; None where n
    does not support it.

    Source: B. Efron and C. Stein, "The jackknife estimate of variance", Annals of Statistics 9 (1981) 586-596; the unit
    left out is the pair, since samples of one process are not independent.
    """
    n = len(pairs)
    if n < 2 or not supported_percentile(q, sum(p.base.size for p in pairs)):
        return None

    def log_ratio(chosen: Sequence[Pair]) -> float:
        return math.log(
            percentile(np.concatenate([p.candidate.ravel() for p in chosen]), q)
            / percentile(np.concatenate([p.base.ravel() for p in chosen]), q)
        )

    return _jackknife(pairs, log_ratio)


def _jackknife(pairs: Sequence[Pair], statistic: Callable[[Sequence[Pair]], float]) -> Ratio:
    n, whole = len(pairs), statistic(pairs)
    left_out = [statistic([*pairs[:i], *pairs[i + 1 :]]) for i in range(n)]
    values = [n * whole - (n - 1) * value for value in left_out]
    return Ratio(values, sequential_interval(values))


def metric_json(
    name: str, ratio: Ratio | None, reason: str | None, margin: float, incomparable: bool
) -> dict[str, Any]:
    """Return one entry of "metrics"; reason: why there is no ratio."""
    found: dict[str, Any] = dict.fromkeys(("ratio", "ci", "verdict", "smallest_effect"))
    if ratio is None:
        return {"name": name, **found, "reason": reason}
    verdict = Verdict.INCOMPARABLE if incomparable else judge(ratio, margin)
    found["ratio"] = float(np.exp(ratio.center))
    found["ci"] = None if ratio.interval is None else [float(np.exp(v)) for v in ratio.interval]
    found["verdict"] = verdict.value
    if verdict == Verdict.INCONCLUSIVE:
        found["smallest_effect"] = smallest_effect(ratio, margin)
    return {"name": name, **found, "reason": None}


def top_verdict(metrics: Sequence[Mapping[str, Any]], primary: str) -> str:
    """Return the verdict of the metric *primary*; inconclusive where it has none."""
    found = next(m["verdict"] for m in metrics if m["name"] == primary)
    return str(found or Verdict.INCONCLUSIVE.value)


def check_metric(name: str) -> None:
    """Raise BadInput for a metric that does not exist."""
    if name not in METRICS:
        raise BadInput(f"no metric {name!r}", f"There are: {', '.join(METRICS)}")
