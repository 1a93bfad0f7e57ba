"""Plots of saved results as SVG and PNG, through matplotlib (the extra ``plot``); no display is needed.

The same results give the same bytes: no date, fixed identifiers, matplotlib's defaults whatever the user's style is.
Texts in SVG are texts. Names are never read as mathematics.
"""

from __future__ import annotations

import contextlib
import itertools
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.saved import SavedResult, names
from portcall.bench.tradeoff import Point, tradeoff

IMAGES = (".svg", ".png")

MARKED = {"p50_ns": 0.5, "p90_ns": 0.9, "p95_ns": 0.95, "p99_ns": 0.99, "p999_ns": 0.999}
"""Percentiles that are marked where the result has them."""

# Okabe and Ito, "Color Universal Design" (2008): told apart by people who are colour-blind. Yellow is left out.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_POINTS = 2000
"""Points that a curve is drawn with at most: the file stays small, and no outlier is lost."""

_WIDTH = 8.0  # inches

Draw = Callable[[Sequence[SavedResult]], Any]


def write_ecdf(results: Sequence[SavedResult], path: Path) -> None:
    """Write the latency distribution: one ECDF per artifact, with its percentiles and their 95 % intervals."""
    _save(_ecdf, results, path, "Latency distribution")


def write_series(results: Sequence[SavedResult], path: Path) -> None:
    """Write every inference in order, one panel per artifact, its processes end to end in alternating shades."""
    _save(_series, results, path, "Latency over time")


def write_tradeoff(results: Sequence[SavedResult], path: Path) -> None:
    """Write P50 against accuracy, with the size as area; filled circles are on the Pareto front of all three."""
    _save(_tradeoff, results, path, "Size, latency and accuracy")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "portcall",
                "text.parse_math": False,
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
            }
        )
        # A name in a script that the font lacks: viewers of SVG find another font, PNG shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _save(draw: Draw, results: Sequence[SavedResult], path: Path, title: str) -> None:
    with _style():
        figure = draw(results)
        kind = path.suffix.lstrip(".")
        metadata = (
            {"Title": title, "Date": None} if kind == "svg" else {"Title": title, "Software": "portcall"}
        )
        figure.savefig(path, format=kind, dpi=144, metadata=metadata)


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: nothing is registered, no display is looked for

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _measured(results: Sequence[SavedResult]) -> tuple[list[tuple[str, SavedResult]], list[tuple[str, str]]]:
    """Return the named results with samples, and the names of the others with why they have none."""
    shown, absent = [], []
    for name, result in zip(names(results), results, strict=True):
        if result.measured and any(p.wall_ns.size for p in result.processes):
            shown.append((name, result))
        else:
            absent.append((name, f"{result.result['outcome']}: {result.get('reason') or 'no samples'}"))
    return shown, absent


def _say_absent(figure: Any, absent: Sequence[tuple[str, str]], rows: int = 0) -> None:
    """Write below the plot which cells are not in it, and why."""
    lines = [line for name, why in absent for line in textwrap.wrap(f"{name}: not measured. {why}", 110)]
    if not lines:
        return
    text = "\n".join(lines)
    figure.supxlabel(text, fontsize=7, ha="left", x=0.01, gid="absent")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.14 * len(lines))


def _legend(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put the legend below the axes. Labels are set afterwards: one that begins with "_" would be left out."""
    legend = axes.legend(
        handles, [str(i) for i in range(len(labels))], loc="upper left", bbox_to_anchor=(0, -0.15), fontsize=8
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(_short(label, 100))


def _short(text: str, most: int) -> str:
    """Return *text* on one line, cut in its middle where it is long: a path's end tells more than its middle."""
    line = " ".join(text.split())
    half = (most - 1) // 2
    return line if len(line) <= most else f"{line[:half]}…{line[-half:]}"


def _look(number: int) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _DASHES[number // len(_COLORS) % len(_DASHES)],
    }


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


# ---------------------------------------------------------------------------------------------- distribution


def _ecdf(results: Sequence[SavedResult]) -> Any:
    shown, absent = _measured(results)
    figure = _figure(4 + 0.18 * len(shown))
    axes = figure.add_subplot()
    if not shown:
        _nothing(axes, "nothing was measured")
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
            **_look(number),
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
        _legend(axes, handles, labels)
    _say_absent(figure, absent)
    return figure


def _ranks(n: int) -> np.ndarray[Any, Any]:
    """Return the ranks that an ECDF of *n* samples is drawn through: evenly spread, and all of the slowest."""
    if n <= _POINTS:
        return np.arange(n)
    spread = np.linspace(0, n - 1, _POINTS - _POINTS // 10).astype(np.int64)
    return np.unique(np.concatenate([spread, np.arange(n - _POINTS // 10, n)]))


def _mark(axes: Any, result: SavedResult, number: int) -> None:
    color = _look(number)["color"]
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
        _log_ticks(axes.xaxis, (1.0, 2.0, 5.0))
        axes.set_xlim(0.9 * low, 1.2 * high)
        return " (logarithmic; the slowest 0.5 % may lie beyond the right end)"
    margin = 0.05 * (high - low) or 0.05 * high
    axes.set_xlim(low - margin, high + margin)
    return " (the slowest 0.5 % may lie beyond the right end)"


def _log_ticks(axis: Any, steps: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers: matplotlib's own are mathematics."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


# ----------------------------------------------------------------------------------------------- time series


def _series(results: Sequence[SavedResult]) -> Any:
    shown, absent = _measured(results)
    figure = _figure(1.0 + 1.9 * max(1, len(shown)))
    panels = figure.subplots(max(1, len(shown)), 1, squeeze=False)[:, 0]
    if not shown:
        _nothing(panels[0], "nothing was measured")
    for number, (axes, (name, result)) in enumerate(zip(panels, shown, strict=bool(shown))):
        _panel(axes, name, result, number)
    if shown:
        panels[-1].set_xlabel("inference, in order; the processes end to end, each in its shade")
    _say_absent(figure, absent)
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
            color=_COLORS[0],
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
        _log_ticks(axes.yaxis, (1.0,))
        axes.set_ylabel("ms (log)")
    else:
        axes.set_ylabel("ms")
    p50 = result.number("latency", "p50_ns")
    if p50 is not None:
        axes.axhline(p50 / 1e6, color=_COLORS[1], lw=0.7, ls="--", gid=f"p50-{number}")
    n = f"n={result.latency['n']}, {len(processes)} processes; dashed: P50"
    axes.set_title(f"{_short(name, 80)}  {n}", fontsize=8, loc="left")
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
    figure = _figure(4.6)
    axes = figure.add_subplot()
    if not found.points:
        _nothing(axes, "no artifact has both a latency and an accuracy")
    else:
        _bubbles(axes, found.points, found.axis.endswith("%"))
        axes.set_xlabel("P50 latency, ms" + (" (logarithmic)" if axes.get_xscale() == "log" else ""))
        axes.set_ylabel(found.axis)
        samples = sorted({p.samples[1] for p in found.points})
        n = f"n={samples[0]}" if len(samples) == 1 else f"n={samples[0]} to {samples[-1]}"
        title = f"area: size; filled: on the Pareto front of size, latency and accuracy (accuracy: {n})"
        axes.set_title(title, fontsize=8, loc="left")
    _say_absent(figure, found.left_out)
    return figure


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


def _bubbles(axes: Any, points: Sequence[Point], percent: bool) -> None:
    largest = max(p.size_bytes for p in points) or 1.0
    latencies = [p.p50_ns / 1e6 for p in points]
    if min(latencies) > 0 and max(latencies) > 5 * min(latencies):
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, (1.0, 2.0, 5.0))
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
        x, color = p.p50_ns / 1e6, _COLORS[number % len(_COLORS)]
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
        label = f"{_short(p.name, 50)}, {_size(p.size_bytes)}, n={p.samples[0]}"
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
