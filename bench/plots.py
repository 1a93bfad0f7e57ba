"""Plots of saved results: latency distribution, time series, and size against latency and accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.plotting import (
    COLORS,
    legend_below,
    log_ticks,
    look,
    new_figure,
    save_plot,
    say_absent,
    say_nothing,
    short,
    split_measured,
)
from portcall.bench.saved import SavedResult
from portcall.bench.tradeoff import Point, tradeoff

MARKED = {"p50_ns": 0.5, "p90_ns": 0.9, "p95_ns": 0.95, "p99_ns": 0.99, "p999_ns": 0.999}
"""Percentiles that are marked where the result has them."""

_POINTS = 2000
"""Points that a curve is drawn with at most: the file stays small, and no outlier is lost."""


def write_ecdf(results: Sequence[SavedResult], path: Path) -> None:
    """Write the latency distribution: one ECDF per artifact, with its percentiles and their 95 % intervals."""
    save_plot(lambda: _ecdf(results), path, "Latency distribution")


def write_series(results: Sequence[SavedResult], path: Path) -> None:
    """Write every inference in order, one panel per artifact, its processes end to end in alternating shades."""
    save_plot(lambda: _series(results), path, "Latency over time")


def write_tradeoff(results: Sequence[SavedResult], path: Path) -> None:
    """Write P50 against accuracy, with the size as area; filled circles are on the Pareto front of all three."""
    save_plot(lambda: _tradeoff(results), path, "Size, latency and accuracy")


# ---------------------------------------------------------------------------------------------- distribution


def _ecdf(results: Sequence[SavedResult]) -> Any:
    shown, absent = split_measured(results)
    figure = new_figure(4 + 0.18 * len(shown))
    axes = figure.add_subplot()
    if not shown:
        say_nothing(axes, "nothing was measured")
    handles, labels, smallest, largest = [], [], [], []
    for number, (name, result) in enumerate(shown):
        values = np.sort(np.concatenate([p.wall_ns for p in result.processes])) / 1e6
        ranks = _ranks(values.size)
        (line,) = axes.plot(
            values[ranks],
            (ranks + 1) / values.size,
            drawstyle="steps-post",
            lw=1.2,
            gid=f"ecdf-{number}",
            **look(number),
        )
        _mark(axes, result, number)
        handles.append(line)
        labels.append(f"{name}, n={result.latency['n']}, {result.latency['processes']} processes")
        smallest.append(values[0])
        largest.append(float(np.quantile(values, 0.995)))
    if shown:
        beyond = _limits(axes, min(smallest), max(largest))
        axes.set_title("dots: percentiles; bars: their 95 % intervals over processes", fontsize=8, loc="left")
        axes.set_xlabel(f"latency of one inference, ms{beyond}")
        axes.set_ylabel("share of inferences at most that slow")
        axes.set_ylim(0, 1.01)
        for key, q in MARKED.items():
            if any(r.number("latency", key) is not None for _, r in shown):
                axes.axhline(q, color="0.85", lw=0.6, zorder=0)
                axes.annotate(
                    f"P{100 * q:g}", (1.005, q), xycoords=("axes fraction", "data"), fontsize=6, va="center"
                )
        legend_below(axes, handles, labels)
    say_absent(figure, absent)
    return figure


def _ranks(n: int) -> np.ndarray[Any, Any]:
    """Return the ranks that an ECDF of *n* samples is drawn through: evenly spread, and all of the slowest."""
    if n <= _POINTS:
        return np.arange(n)
    spread = np.linspace(0, n - 1, _POINTS - _POINTS // 10).astype(np.int64)
    return np.unique(np.concatenate([spread, np.arange(n - _POINTS // 10, n)]))


def _mark(axes: Any, result: SavedResult, number: int) -> None:
    color = look(number)["color"]
    for key, q in MARKED.items():
        value, interval = result.number("latency", key), result.interval(key)
        if value is None:
            continue
        axes.plot([value / 1e6], [q], "o", ms=3.5, color=color, gid=f"percentile-{number}-{key}")
        if interval is not None:
            ends = [interval[0] / 1e6, interval[1] / 1e6]
            axes.plot(
                ends, [q, q], "-|", lw=2.5, ms=6, alpha=0.45, color=color, gid=f"interval-{number}-{key}"
            )


def _limits(axes: Any, low: float, high: float) -> str:
    """Set the range of x, logarithmic where it is wide; return what the axis has to say about its end."""
    if low > 0 and high / low > 10:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, (1.0, 2.0, 5.0))
        axes.set_xlim(0.9 * low, 1.2 * high)
        return " (logarithmic; the slowest 0.5 % may lie beyond the right end)"
    margin = 0.05 * (high - low) or 0.05 * high
    axes.set_xlim(low - margin, high + margin)
    return " (the slowest 0.5 % may lie beyond the right end)"


# ----------------------------------------------------------------------------------------------- time series


def _series(results: Sequence[SavedResult]) -> Any:
    shown, absent = split_measured(results)
    figure = new_figure(1.0 + 1.9 * max(1, len(shown)))
    panels = figure.subplots(max(1, len(shown)), 1, squeeze=False)[:, 0]
    if not shown:
        say_nothing(panels[0], "nothing was measured")
    for number, (axes, (name, result)) in enumerate(zip(panels, shown, strict=bool(shown))):
        _panel(axes, name, result, number)
    if shown:
        panels[-1].set_xlabel("inference, in order; the processes end to end, each in its shade")
    say_absent(figure, absent)
    return figure


def _panel(axes: Any, name: str, result: SavedResult, number: int) -> None:
    processes = [p for p in result.processes if p.wall_ns.size]
    budget = max(50, _POINTS // len(processes))
    shades, start = (1.0, 0.55), 0
    for i, process in enumerate(processes):
        x, y = _envelope(process.wall_ns, budget)
        axes.plot(
            x + start,
            y / 1e6,
            lw=0.6,
            color=COLORS[0],
            alpha=shades[i % 2],
            gid=f"process-{number}-{process.number}",
        )
        if len(processes) <= 20:
            middle = start + process.wall_ns.size / 2
            axes.annotate(
                str(process.number), (middle, 0.98), xycoords=("data", "axes fraction"), fontsize=6, va="top"
            )
        start += process.wall_ns.size
    values = np.concatenate([p.wall_ns for p in processes])
    if values.min() > 0 and values.max() > 5 * np.median(values):
        axes.set_yscale("log")
        log_ticks(axes.yaxis, (1.0,))
        axes.set_ylabel("ms (log)")
    else:
        axes.set_ylabel("ms")
    p50 = result.number("latency", "p50_ns")
    if p50 is not None:
        axes.axhline(p50 / 1e6, color=COLORS[1], lw=0.7, ls="--", gid=f"p50-{number}")
    n = f"n={result.latency['n']}, {len(processes)} processes; dashed: P50"
    axes.set_title(f"{short(name, 80)}  {n}", fontsize=8, loc="left")
    axes.set_xlim(0, start)


def _envelope(values: np.ndarray[Any, Any], budget: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return (index, value) of at most about *budget* points that keep the least and greatest of every stretch."""
    n = values.size
    if n <= budget:
        return np.arange(n), values
    edges = np.linspace(0, n, budget // 2 + 1).astype(np.int64)
    kept = []
    for low, high in itertools.pairwise(edges):
        part = values[low:high]
        kept += sorted({low + int(part.argmin()), low + int(part.argmax())})
    index = np.array(kept)
    return index, values[index]


# --------------------------------------------------------------------------------- size, latency, accuracy


def _tradeoff(results: Sequence[SavedResult]) -> Any:
    found = tradeoff(results)
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    if not found.points:
        say_nothing(axes, "no artifact has both a latency and an accuracy")
    else:
        _bubbles(axes, found.points, found.axis.endswith("%"))
        axes.set_xlabel("P50 latency, ms" + (" (logarithmic)" if axes.get_xscale() == "log" else ""))
        axes.set_ylabel(found.axis)
        samples = sorted({p.samples[1] for p in found.points})
        n = f"n={samples[0]}" if len(samples) == 1 else f"n={samples[0]} to {samples[-1]}"
        title = f"area: size; filled: on the Pareto front of size, latency and accuracy (accuracy: {n})"
        axes.set_title(title, fontsize=8, loc="left")
    say_absent(figure, found.left_out)
    return figure


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


def _bubbles(axes: Any, points: Sequence[Point], percent: bool) -> None:
    largest = max(p.size_bytes for p in points) or 1.0
    latencies = [p.p50_ns / 1e6 for p in points]
    if min(latencies) > 0 and max(latencies) > 5 * min(latencies):
        axes.set_xscale("log")
        log_ticks(axes.xaxis, (1.0, 2.0, 5.0))
    front = sorted((p for p in points if p.front), key=lambda p: p.p50_ns)
    axes.plot(
        [p.p50_ns / 1e6 for p in front],
        [p.accuracy for p in front],
        ":",
        color="0.6",
        lw=1,
        gid="front",
        zorder=1,
    )
    for number, p in enumerate(points):
        x, color = p.p50_ns / 1e6, COLORS[number % len(COLORS)]
        if p.interval is not None:
            axes.plot(
                [x, x], p.interval, "-", lw=1, alpha=0.4, color=color, gid=f"accuracy-interval-{number}"
            )
        if p.p50_interval_ns is not None:
            ends = [end / 1e6 for end in p.p50_interval_ns]
            axes.plot(
                ends, [p.accuracy] * 2, "-", lw=1, alpha=0.4, color=color, gid=f"latency-interval-{number}"
            )
        bubble = axes.scatter(
            [x], [p.accuracy], s=20 + 380 * p.size_bytes / largest, lw=1.5,
            facecolor=color if p.front else "none", edgecolor=color, alpha=0.8, zorder=2,
        )  # fmt: skip
        bubble.set_gid(f"point-{number}")
        label = f"{short(p.name, 80)}, {_size(p.size_bytes)}, n={p.samples[0]}"
        # Labels go up and down in turn: artifacts of one model often have nearly the same accuracy.
        lift = 9 + 9 * (number // 2)
        axes.annotate(
            label, (x, p.accuracy), xytext=(6, lift if number % 2 == 0 else -lift - 4), textcoords="offset points",
            fontsize=7, color=color,
        )  # fmt: skip
    axes.margins(x=0.3, y=0.25)
    low, high = axes.get_ylim()
    if percent:  # there is nothing above 100 %, and nothing to see where all are alike
        axes.set_ylim(min(low, high - 2), min(high, 101))
