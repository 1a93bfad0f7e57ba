"""What every plot here has in common: one look, the same bytes for the same results, no display, names as plain text.

matplotlib is the extra ``plot``, and is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from portcall.bench.saved import SavedResult, names, visible

IMAGES = (".svg", ".png")

# Okabe and Ito, "Color Universal Design" (2008): told apart by people who are colour-blind. Yellow is left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_WIDTH = 8.0  # inches


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


def save_plot(draw: Callable[[], Any], path: Path, title: str) -> None:
    """Write the figure that *draw* returns, as SVG or PNG by the suffix of *path*."""
    kind = path.suffix.lstrip(".")
    metadata = {"Title": title, "Date": None} if kind == "svg" else {"Title": title, "Software": "portcall"}
    with _style():
        draw().savefig(path, format=kind, dpi=144, metadata=metadata)


def new_figure(height: float) -> Any:
    """Return an empty figure of the usual width; height in inches."""
    from matplotlib.figure import Figure  # not pyplot: nothing is registered, no display is looked for

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def split_measured(
    results: Sequence[SavedResult],
) -> tuple[list[tuple[str, SavedResult]], list[tuple[str, str]]]:
    """Return the named results with samples, and the names of the others with why they have none."""
    shown, absent = [], []
    for name, result in zip(names(results), results, strict=True):
        if result.measured and any(p.wall_ns.size for p in result.processes):
            shown.append((name, result))
        else:
            absent.append((name, f"{result.result['outcome']}: {result.get('reason') or 'no samples'}"))
    return shown, absent


def say_absent(figure: Any, absent: Sequence[tuple[str, str]]) -> None:
    """Write below the plot which cells are not in it, and why."""
    lines = [
        line for name, why in absent for line in textwrap.wrap(visible(f"{name}: not measured. {why}"), 110)
    ]
    if not lines:
        return
    text = "\n".join(lines)
    figure.supxlabel(text, fontsize=7, ha="left", x=0.01, gid="absent")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.14 * len(lines))


def legend_below(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put the legend below the axes. Labels are set afterwards: one that begins with "_" would be left out."""
    legend = axes.legend(
        handles, [str(i) for i in range(len(labels))], loc="upper left", bbox_to_anchor=(0, -0.15), fontsize=8
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(short(label, 100))


def short(text: str, most: int) -> str:
    """Return *text* on one line, cut in its middle where it is long: a path's end tells more than its middle."""
    line = " ".join(visible(text).split())
    half = (most - 1) // 2
    return line if len(line) <= most else f"{line[:half]}…{line[-half:]}"


def look(number: int) -> dict[str, Any]:
    """Return colour and dashes of line *number*."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": _DASHES[number // len(COLORS) % len(_DASHES)],
    }


def say_nothing(axes: Any, why: str) -> None:
    """Let a sentence stand where a plot would."""
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def log_ticks(axis: Any, steps: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers: matplotlib's own are mathematics."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
