"""The plot of a profile: a horizontal bar per operator, the longest on top, as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BARS = 30
"""Operators that get a bar of their own; the others share the last one."""
LONGEST_LABEL = 60
ON_UNIT, OFF_UNIT, OTHERS = "#4477aa", "#cc3311", "#bbbbbb"
"""Distinct for colour-blind readers too. Source: P. Tol, "Colour Schemes", SRON/EPS/TN/09-002 (2021)."""
FIX = "pip install 'portcall[plot]'"


def plot(answer: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Write ``profile.svg`` and ``profile.png`` into *output*; return {"files", "reason": why there are none}."""
    if answer["sum_ns"] is None:
        return {"files": [], "reason": f"there are no times to plot: {answer['placement']['reason']}"}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return {"files": [], "reason": f"matplotlib is not installed ({error}): {FIX}"}
    bars = _bars(answer)
    figure = Figure(figsize=(10, 1.6 + 0.28 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = range(len(bars))
    axes.barh(positions, [b[1] for b in bars], color=[b[2] for b in bars])
    axes.set_yticks(list(positions), [b[0] for b in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"us per inference, profiler on; together {100 * answer['coverage']:.0f} % of the profiled inference, "
        f"{100 * answer['coverage_of_p50']:.0f} % of the P50 without profiler (n={answer['inferences']})",
        fontsize=9,
    )
    axes.set_title(f"{answer['backend']}:{answer['precision']}; red: not on {answer['unit']}", fontsize=10)
    files = []
    for suffix in ("svg", "png"):
        stream = io.BytesIO()
        # No date in it: the same profile gives the same file.
        figure.savefig(stream, format=suffix, dpi=120, metadata={"Date": None} if suffix == "svg" else {})
        path = output / f"profile.{suffix}"
        part = output / f".profile.{suffix}.part"
        try:
            part.write_bytes(stream.getvalue())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        files.append(str(path))
    return {"files": files, "reason": None}


def _bars(answer: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    operators = answer["operators"]
    bars = [(_label(o), o["time_ns"] / 1e3, ON_UNIT if o["on_unit"] else OFF_UNIT) for o in operators[:BARS]]
    if len(operators) > BARS:
        rest = operators[BARS:]
        bars.append((f"{len(rest)} others", sum(o["time_ns"] for o in rest) / 1e3, OTHERS))
    return bars


def _label(operator: Mapping[str, Any]) -> str:
    layer = operator["layers"][0] if operator["layers"] else operator["name"]
    text = f"{layer}  {operator['operator']}"
    # "$" would begin a formula.
    return (text if len(text) <= LONGEST_LABEL else f"...{text[3 - LONGEST_LABEL :]}").replace("$", r"\$")
