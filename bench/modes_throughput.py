"""The figures of the throughput mode: samples per second of every point, and the knee of the sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portcall.bench.statistics import process_interval, summarize

KNEE_SHARE = 0.95
"""Of the greatest throughput, which the knee reaches with the fewest samples in flight."""

_SHORT_NS = 200_000
"""Inferences shorter than this may wait a visible share of their time for Python's interpreter lock."""

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


def busy_rate(begins: Sequence[Any], ends: Sequence[Any]) -> float | None:
    """Return the inferences per second while all streams are busy; None where they never are together.

    begins, ends: one int64 array of ns per stream. The window opens when the last stream begins its first inference and
    closes when the first stream ends its last one. An inference that lies partly outside counts with the part inside,
    so that neither the start nor the last inferences in flight bias the rate.
    """
    opened = max(int(b[0]) for b in begins)
    closed = min(int(e[-1]) for e in ends)
    if closed <= opened:
        return None
    done = 0.0
    for begin, end in zip(begins, ends, strict=True):
        took = np.maximum(end - begin, 1)
        inside = np.minimum(end, closed) - np.maximum(begin, opened)
        done += float((np.clip(inside, 0, None) / took).sum())
    return done * 1e9 / (closed - opened)


def point_figures(
    batch: int, streams: int, threads: int, cpus: int, samples: Sequence[Arrays]
) -> tuple[dict[str, Any], list[str]]:
    """Return one line of the sweep from the raw arrays of its processes, and warnings.

    threads: of each stream. samples_per_s is the geometric mean over processes, "ci" its 95 % t interval on log values
    (None below 2 processes). latency: of one inference while all streams run, all streams pooled.
    """
    rates, latencies = [], []
    for arrays in samples:
        begins = [arrays[f"begin_ns_{i}"] for i in range(streams)]
        ends = [arrays[f"end_ns_{i}"] for i in range(streams)]
        rate = busy_rate(begins, ends)
        if rate:
            rates.append(rate * batch)
        latencies.append(np.concatenate([e - b for b, e in zip(begins, ends, strict=True)]))
    latency, warnings = summarize(latencies)
    ci = process_interval(rates)
    where = _where(batch, streams)
    lost = len(samples) - len(rates)
    if lost:
        warnings.append(
            f"in {lost} of {len(samples)} processes the streams never ran together: more --min-time"
        )
    p50 = latency["p50_ns"]
    if streams > 1 and p50 is not None and p50 < _SHORT_NS:
        warnings.append(
            f"P50 is {p50 / 1e3:.0f} us with {streams} streams: waiting for Python's interpreter lock is part of it"
        )
    return {
        "batch": batch,
        "streams": streams,
        "threads": threads,
        "in_flight": batch * streams,
        "oversubscribed": streams * threads > cpus,
        "outcome": "measurement",
        "reason": None,
        "fix": None,
        "samples_per_s": math.exp(float(np.mean(np.log(rates)))) if rates else None,
        "ci": None if ci is None else list(ci),
        "n": latency["n"],
        "processes": len(rates),
        "latency": latency,
    }, [f"{where}: {w}" for w in warnings]


def knee(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {"best", "knee", "certain", "reason"} of a sweep's points; best and knee are indices into *points*.

    The knee is the point with the fewest samples in flight (batch * streams; of equals the lower P50) that reaches
    95 % of the greatest throughput: what lies beyond buys latency, not throughput. There is none, and the reason says
    why, with fewer than 3 points; where no point with more in flight was measured (throughput may still rise); and
    where the least point is there already (nothing rises). certain: no point with fewer in flight could reach the 95 %
    by its interval; None without intervals.
    Source: the saturation point of a closed system, E. D. Lazowska et al., Quantitative System Performance (1984),
    ch. 5, read off measured points. Curvature methods (V. Satopaa et al., "Finding a kneedle in a haystack", 2011) need
    a smooth curve of many points; a sweep has a handful of noisy ones.
    """
    measured = [i for i, p in enumerate(points) if p["samples_per_s"] is not None]
    none: dict[str, Any] = {"best": None, "knee": None, "certain": None, "reason": "nothing was measured"}
    if not measured:
        return none
    best = max(measured, key=lambda i: float(points[i]["samples_per_s"]))
    none["best"] = best
    if len(measured) < 3:
        return {**none, "reason": f"{len(measured)} points: a knee needs 3"}
    enough = KNEE_SHARE * points[best]["samples_per_s"]

    def load(i: int) -> tuple[int, float]:
        return points[i]["in_flight"], points[i]["latency"]["p50_ns"] or math.inf

    found = min((i for i in measured if points[i]["samples_per_s"] >= enough), key=load)
    flights = [points[i]["in_flight"] for i in measured]
    if points[found]["in_flight"] == min(flights):
        where = _where(points[found]["batch"], points[found]["streams"])
        return {**none, "reason": f"{where} reaches 95 % of the greatest throughput: more gains nothing"}
    if points[found]["in_flight"] == max(flights):
        return {
            **none,
            "reason": "throughput still rises at the end of the sweep: extend --batches or --streams",
        }
    less = [points[i] for i in measured if points[i]["in_flight"] < points[found]["in_flight"]]
    known = all(p["ci"] is not None for p in less)
    certain = all(p["ci"][1] < enough for p in less) if known else None
    return {"best": best, "knee": found, "certain": certain, "reason": None}


def throughput_figures(
    points: Sequence[dict[str, Any]], warnings: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the "throughput" object of a result, and its warnings."""
    found = knee(points)
    said = list(warnings)
    if found["certain"] is False:
        said.append("a smaller point may reach the knee too: rerun with more --processes")
    return {
        "unit": "samples/s",
        "method": "inferences in the window in which all streams are busy; geometric mean over fresh processes",
        "points": list(points),
        **found,
    }, said


def _where(batch: int, streams: int) -> str:
    return f"batch {batch}, {streams} stream{'s' if streams > 1 else ''}"
