"""From the interval of a ratio to a verdict, and the ratios of a series of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from portcall.bench.sequential import sequential_half_width, sequential_interval
from portcall.bench.statistics import percentile, supported_percentile
from portcall.core import BadInput

Array = np.ndarray[Any, Any]

TAILS = {"p95": 0.95, "p99": 0.99}
"""Metrics that are a percentile which a pair may be too short for."""

METRICS = ("p50", *TAILS, "cpu", "memory")
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

    values: one natural logarithm per pair, or group of pairs. interval: of their mean, None while there is none.
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
    """Return the ratio of percentile *q*: one value per group of pairs; None where n does not support it.

    A group is as few consecutive pairs as support q together; pairs that do not fill one do not count yet. Its value is
    the log ratio of the percentiles of its pooled samples. Two sides that are alike give it either sign with the same
    chance, however heavy the tail, and groups are independent. (The jackknife over pairs looks better and is not: it is
    inconsistent for percentiles, R. G. Miller, "The jackknife: a review", Biometrika 61 (1974) 1-15; on recorded pairs
    it called up to one in four A/A comparisons by P99 a change.)
    """
    values: list[float] = []
    group: list[Pair] = []
    for pair in pairs:
        group.append(pair)
        if supported_percentile(q, sum(p.base.size for p in group)):
            base, candidate = (
                percentile(np.concatenate([side.ravel() for side in sides]), q)
                for sides in ([p.base for p in group], [p.candidate for p in group])
            )
            values.append(math.log(candidate / base))
            group = []
    return Ratio(values, sequential_interval(values)) if values else None


def metric_json(
    name: str, ratio: Ratio | None, reason: str | None, margin: float, incomparable: bool
) -> dict[str, Any]:
    """Return one entry of "metrics"; reason: why there is no ratio, or no interval."""
    found: dict[str, Any] = dict.fromkeys(("ratio", "ci", "verdict", "smallest_effect"))
    if ratio is None:
        return {"name": name, **found, "reason": reason}
    verdict = Verdict.INCOMPARABLE if incomparable else judge(ratio, margin)
    found["ratio"] = float(np.exp(ratio.center))
    found["ci"] = None if ratio.interval is None else [float(np.exp(v)) for v in ratio.interval]
    found["verdict"] = verdict.value
    if verdict == Verdict.INCONCLUSIVE:
        found["smallest_effect"] = smallest_effect(ratio, margin)
    return {"name": name, **found, "reason": reason}


def top_verdict(metrics: Sequence[Mapping[str, Any]], primary: str) -> str:
    """Return the verdict of the metric *primary*; inconclusive where it has none."""
    found = next(m["verdict"] for m in metrics if m["name"] == primary)
    return str(found or Verdict.INCONCLUSIVE.value)


def check_metric(name: str) -> None:
    """Raise BadInput for a metric that does not exist."""
    if name not in METRICS:
        raise BadInput(f"no metric {name!r}", f"There are: {', '.join(METRICS)}")
