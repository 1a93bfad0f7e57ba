"""The figures of the sustained mode: P50 per window as a time series, its drift, and whether the device throttled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portcall.bench.statistics import percentile, student_t_quantile, supported_percentile

SLOWER = 1.05
"""Ratio of P50, last third of the windows to the first, from which the series counts as slowed."""

RULE = (
    "throttled: P50 of the last third of the windows is at least 5 % above the first third's, and the CPU clock fell "
    "by at least 5 % in the same span; where the clock is not told: unknown, but no where only wall time rose"
)

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


def windows_of(
    arrays: Arrays, observed: Sequence[Mapping[str, Any]], window_s: float
) -> list[dict[str, Any]]:
    """Return one line per window: its start, n, P50 of wall and CPU time, and what was read at its end.

    An inference belongs to the window in which it began. A last window shorter than half is left out; a P50 that n does
    not support is None.
    """
    begin, wall, cpu = arrays["begin_ns"], arrays["wall_ns"], arrays["cpu_ns"]
    if not begin.size:
        return []
    step = int(window_s * 1e9)
    index = begin // step
    last_end = int(begin[-1] + wall[-1])
    found = []
    for number in range(int(index[-1]) + 1):
        if number and last_end - number * step < step / 2:
            break
        inside = index == number
        n = int(inside.sum())
        supported = supported_percentile(0.5, n)
        end_s = (number + 1) * window_s
        # What was read nearest to the window's end; the first reading is from before the series.
        state = min(observed[1:] or observed, key=lambda o: abs(o["t_s"] - end_s), default={})
        mhz = state.get("cpu_mhz")
        found.append(
            {
                "t_s": number * window_s,
                "n": n,
                "p50_ns": percentile(wall[inside], 0.5) if supported else None,
                "cpu_p50_ns": percentile(cpu[inside], 0.5) if supported else None,
                "max_ns": int(wall[inside].max()) if n else None,
                "cpu_mhz": mhz["median"] if isinstance(mhz, Mapping) else None,
                "temperatures_c": state.get("temperatures_c"),
                "load_average": state.get("load_average"),
            }
        )
    return found


def slope(minutes: Sequence[float], values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return the least-squares slope of *values* and its 95 % interval (None where the series holds too little).

    Neighbouring windows resemble each other, so the interval counts n (1 - r) / (1 + r) of them, r the lag-1
    autocorrelation of the residuals (not below 0), its bias of -(2 + 4 r) / n removed first; below 3 such windows there
    is none. Of simulated series of 24 windows it covers 94 % at a true r of 0.4, 91 % at 0.6 (plain: 80 and 70 %).
    Source: B. D. Santer et al., "Statistical significance of trends and trend differences in layer-average atmospheric
    temperature time series", J. Geophysical Research 105 (2000) 7337-7356, section 5; the bias with a linear trend: P.
    Shaman and R. A. Stine, "The bias of autoregressive coefficient estimators", JASA 83 (1988) 842-848.
    """
    x, y = np.asarray(minutes, np.float64), np.asarray(values, np.float64)
    x = x - x.mean()
    spread = float((x * x).sum())
    if x.size < 2 or spread == 0:
        raise ValueError("a slope needs two different times")
    found = float((x * y).sum()) / spread
    residuals = y - y.mean() - found * x
    energy = float((residuals * residuals).sum())
    if x.size < 4:
        return found, None
    if energy == 0:
        return found, (found, found)
    r = float((residuals[1:] * residuals[:-1]).sum()) / energy
    r = max(0.0, r + (2 + 4 * r) / x.size)
    effective = x.size * (1 - r) / (1 + r)
    if effective < 3:
        return found, None
    half = student_t_quantile(0.975, effective - 2) * math.sqrt(energy / (effective - 2) / spread)
    return found, (found - half, found + half)


def drift(series: Sequence[Sequence[Mapping[str, Any]]], window_s: float) -> dict[str, Any]:
    """Return the relative change of P50 per minute, over one process's windows or over several processes.

    {"per_minute", "ci", "n", "processes", "method", "reason"}: a fraction (0.01 is 1 % a minute), from log P50. With 2
    processes or more the interval is Student's t over their slopes, otherwise that of ``slope``.
    """
    slopes: list[tuple[float, tuple[float, float] | None]] = []
    n = 0
    for windows in series:
        usable = [w for w in windows if w["p50_ns"]]
        if len(usable) >= 4:
            minutes = [(w["t_s"] + window_s / 2) / 60 for w in usable]
            slopes.append(slope(minutes, [math.log(w["p50_ns"]) for w in usable]))
            n += len(usable)
    answer: dict[str, Any] = {
        "per_minute": None, "ci": None, "n": n, "processes": len(slopes), "method": None, "reason": None,
    }  # fmt: skip
    if not slopes:
        return {
            **answer,
            "reason": "fewer than 4 windows with a P50 (5 inferences each): longer --window or --duration",
        }
    values = np.array([s for s, _ in slopes])
    answer["per_minute"] = float(values.mean())
    if len(slopes) == 1:
        ci = slopes[0][1]
        answer["method"] = "least squares over windows, interval with the lag-1 autocorrelation counted"
        if ci is None:
            answer["reason"] = "the windows follow each other too closely for an interval: longer --duration"
    else:
        half = student_t_quantile(0.975, len(slopes) - 1) * float(values.std(ddof=1)) / math.sqrt(len(slopes))
        ci = (answer["per_minute"] - half, answer["per_minute"] + half)
        answer["method"] = "least squares over windows, t interval over processes"
    answer["ci"] = None if ci is None else list(ci)
    return answer


def throttling(
    series: Sequence[Sequence[Mapping[str, Any]]], observed: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return {"throttled", "reason", "rule", "p50_ratio", "cpu_ratio", "mhz_ratio"}, last third to first third.

    Ratios are medians of windows within a process, geometric means over processes. throttled: True, False, or None
    where the system does not tell the clock and the reason stands beside it. Only cpufreq tells it: the "cpu MHz" of
    /proc/cpuinfo is a constant in most guests.
    """
    ratios = {key: _ratio(series, key) for key in ("p50_ns", "cpu_p50_ns", "cpu_mhz")}
    p50, cpu = ratios["p50_ns"], ratios["cpu_p50_ns"]
    told = bool(observed) and all(o.get("cpu_mhz_method") == "scaling_cur_freq" for o in observed)
    mhz = ratios["cpu_mhz"] if told else None
    answer = {"rule": RULE, "p50_ratio": p50, "cpu_ratio": cpu, "mhz_ratio": mhz}
    if p50 is None:
        return {"throttled": None, "reason": "too few windows with a P50", **answer}
    change = f"P50 of the last third of the windows is {p50:.3f} times the first third's"
    if p50 < SLOWER:
        return {"throttled": False, "reason": change, **answer}
    if mhz is not None:
        fell = mhz <= 1 / SLOWER
        return {"throttled": fell, "reason": f"{change}, the clock {mhz:.3f} times", **answer}
    if cpu is not None and cpu < SLOWER:
        reason = f"{change}, CPU time only {cpu:.3f} times: other work took the CPU"
        return {"throttled": False, "reason": reason, **answer}
    return {"throttled": None, "reason": f"{change}, and this system does not tell the CPU clock", **answer}


def _ratio(series: Sequence[Sequence[Mapping[str, Any]]], key: str) -> float | None:
    logs = []
    for windows in series:
        values = [w[key] for w in windows if w[key]]
        third = len(values) // 3
        if third:
            logs.append(math.log(np.median(values[-third:]) / np.median(values[:third])))
    return math.exp(float(np.mean(logs))) if logs else None


def sustained_figures(
    samples: Sequence[Arrays], answers: Sequence[Mapping[str, Any]], window_s: float
) -> tuple[dict[str, Any], list[str]]:
    """Return the "sustained" object of a result, and warnings."""
    series = [windows_of(s, a["observed"], window_s) for s, a in zip(samples, answers, strict=True)]
    observed = [o for a in answers for o in a["observed"]]
    found, verdict = drift(series, window_s), throttling(series, observed)
    warnings = []
    if verdict["throttled"]:
        warnings.append(f"throttled: {verdict['reason']}; cool the device, or judge it by its last windows")
    elif verdict["p50_ratio"] is not None and verdict["p50_ratio"] >= SLOWER:
        warnings.append(f"slowed: {verdict['reason']}")
    if found["reason"]:
        warnings.append(f"drift: {found['reason']}")
    if any(a["full"] for a in answers):
        warnings.append("the raw series is full (2^22 inferences): it ended before --duration")
    return {
        "window_s": window_s,
        "n": sum(int(s["wall_ns"].size) for s in samples),
        "processes": len(samples),
        "duration_s": sum(w[-1]["t_s"] + window_s for w in series if w),
        "windows": series,
        "drift": found,
        **verdict,
        "absent": dict(observed[-1]["absent"]) if observed else {},
    }, warnings
