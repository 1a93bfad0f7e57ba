"""The figures of the arrival mode: response times from the intended arrival on, utilization, saturation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portcall.bench.statistics import (
    PERCENTILES,
    percentile,
    process_interval,
    samples_needed,
    summarize,
    supported_percentile,
)

START_SHARE = 0.1
"""Of each process's arrivals, the first ones are not counted: the queue starts empty."""

_ENOUGH = 20
"""Requests in the second half below which nothing is said about saturation."""

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


def response_times(arrays: Arrays) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return response and service times in ns (float64) of the counted arrivals; what was never served is infinite.

    Response: from the intended arrival to the end, so a request that had to wait because the server was slow counts
    with its wait (G. Tene's "coordinated omission" leaves it out). Service: from its own begin to its end.
    """
    due, begin, end = (arrays[k].astype(np.float64) for k in ("due_ns", "begin_ns", "end_ns"))
    served = end.size
    response = np.full(due.size, np.inf)
    response[:served] = end - due[:served]
    first = int(due.size * START_SHARE)
    return response[first:], (end - begin)[first:]


def lateness_ns(arrays: Arrays) -> np.ndarray[Any, Any]:
    """Return how late each request began although it could have: after it was due and the one before had ended."""
    due, begin, end = (arrays[k].astype(np.float64) for k in ("due_ns", "begin_ns", "end_ns"))
    ready = due[: end.size].copy()
    ready[1:] = np.maximum(ready[1:], end[:-1])
    return np.asarray(np.maximum(begin - ready, 0.0))


def drained(arrays: Arrays) -> bool | None:
    """Tell whether the queue was ever empty in the second half of the arrivals; None with too few of them.

    It was empty where a request arrived after all before it had ended.
    """
    due, end = arrays["due_ns"], arrays["end_ns"]
    half = due.size // 2
    if due.size - half < _ENOUGH:
        return None
    if end.size <= half:
        return False
    before = end[half - 1 : -1]
    return bool((due[half : end.size] >= before[: end.size - half]).any())


def greatest_queue(arrays: Arrays) -> int:
    """Return the most requests that were waiting as another one arrived, the one being served not counted."""
    due, begin = arrays["due_ns"], arrays["begin_ns"]
    # As request i arrives, those before it wait that have not begun.
    begun = np.minimum(np.searchsorted(begin, due, side="right"), np.arange(due.size))
    return int((np.arange(due.size) - begun).max(initial=0))


def _summary(groups: Sequence[np.ndarray[Any, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return ``summarize``, or, where requests were never served, the percentiles that lie below those."""
    if all(np.isfinite(g).all() for g in groups):
        return summarize(groups)
    pooled = np.concatenate(groups)
    n, finite = pooled.size, pooled[np.isfinite(pooled)]
    found: dict[str, Any] = {
        "n": n,
        "processes": len(groups),
        "min_ns": int(finite.min()) if finite.size else None,
        "mean_ns": None,
        "stdev_ns": None,
        "ci": {},
    }
    warnings = [f"{n - finite.size} of {n} requests were never served: no mean, no intervals"]
    pooled = np.sort(pooled)
    for key, q in PERCENTILES.items():
        above = pooled[min(n - 1, int(np.ceil(q * (n - 1))))]
        if not supported_percentile(q, n):
            found[key] = None
            warnings.append(f"n={n}: no {key[:-3]} (needs {samples_needed(q)})")
        else:
            found[key] = percentile(pooled, q) if np.isfinite(above) else None
            if found[key] is None:
                warnings.append(f"no {key[:-3]}: it lies among the requests that were never served")
    return found, warnings


def arrival_figures(
    samples: Sequence[Arrays], rate_per_s: float, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the "arrival" object of a result, and warnings.

    utilization: share of the time in which an inference ran, from the first counted arrival to the last end.
    offered_load: rate times mean service time; at 1 the queue grows for ever. Both are means over processes, with the t
    interval on log values. mg1_wait_ns: the mean wait that queueing theory gives for these service times (Pollaczek and
    Khinchine: rate * E[S^2] / (2 (1 - load)); None from load 1 on), beside mean_wait_ns as measured.
    """
    pairs = [response_times(s) for s in samples]
    services = [s for _, s in pairs]
    response, warnings = _summary([r for r, _ in pairs])
    service, _ = summarize(services)
    utilizations, loads = [], []
    for arrays, (_, counted) in zip(samples, pairs, strict=True):
        if counted.size:
            opened = int(arrays["due_ns"][int(arrays["due_ns"].size * START_SHARE)])
            busy = np.clip(arrays["end_ns"] - np.maximum(arrays["begin_ns"], opened), 0, None)
            utilizations.append(float(busy.sum()) / max(1, int(arrays["end_ns"][-1]) - opened))
            loads.append(rate_per_s * float(counted.mean()) / 1e9)
    pooled = np.concatenate(services)
    load = float(np.mean(loads)) if loads else None
    wait = None
    if load is not None and load < 1:
        wait = rate_per_s / 1e9 * float((pooled**2).mean()) / (2 * (1 - load))
    states = [drained(s) for s in samples]
    never = sum(s is False for s in states)
    told = [s for s in states if s is not None]
    unfinished = sum(int(s["due_ns"].size - s["end_ns"].size) for s in samples)
    if not told:
        saturated, reason = None, f"fewer than {2 * _ENOUGH} requests in each process: longer --duration"
    else:
        saturated = 2 * never > len(told)
        reason = f"in {never} of {len(told)} processes the queue was never empty in the second half of the arrivals"
    late = np.concatenate([lateness_ns(s) for s in samples])
    lateness = {
        f"p{round(100 * q)}_ns": percentile(late, q) if supported_percentile(q, late.size) else None
        for q in (0.5, 0.95, 0.99)
    }
    if saturated:
        warnings.insert(
            0,
            f"saturated: {reason}; response times grow with --duration: give a lower --rate"
            + ("" if load is None else f" than {rate_per_s / load:.3g}"),
        )
    elif saturated is None:
        warnings.append(f"saturation unknown: {reason}")
    p95 = lateness["p95_ns"]
    if p95 is not None and service["p50_ns"] and p95 > 0.1 * service["p50_ns"] and not saturated:
        warnings.append(
            f"P95 of lateness is {p95 / 1e3:.0f} us: this machine woke the server late, and responses hold that"
        )
    gaps = [(int(s["end_ns"].size), float(s["end_ns"][-1])) for s in samples if s["end_ns"].size]
    return {
        "method": "open loop, Poisson arrivals, one server, first come first served; response from the intended "
        "arrival on",
        "rate_per_s": rate_per_s,
        "seed": seed,
        "n": response["n"],
        "processes": len(samples),
        "not_counted": sum(int(s["due_ns"].size * START_SHARE) for s in samples),
        "unfinished": unfinished,
        "served_per_s": sum(n for n, _ in gaps) * 1e9 / sum(t for _, t in gaps) if gaps else None,
        "response": response,
        "service": service,
        "utilization": _mean(utilizations),
        "offered_load": _mean(loads),
        "saturated": saturated,
        "saturated_reason": reason,
        "greatest_queue": max((greatest_queue(s) for s in samples), default=None),
        "mean_wait_ns": None
        if response["mean_ns"] is None or service["mean_ns"] is None
        else response["mean_ns"] - service["mean_ns"],
        "mg1_wait_ns": wait,
        "lateness": lateness,
    }, warnings


def _mean(values: Sequence[float]) -> dict[str, Any]:
    ci = process_interval(values) if values and min(values) > 0 else None
    return {
        "mean": float(np.mean(values)) if values else None,
        "ci": None if ci is None else list(ci),
        "processes": len(values),
    }
