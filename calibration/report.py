"""What ``calibrate`` and ``ranges`` print for people: what was observed, a histogram with ranges over it, ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from portcall.bench.report import align

BLOCKS = " ▁▂▃▄▅▆▇█"
HEIGHT = 8


def calibration_lines(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each section, and one for what ``auto`` chose in it."""
    lines = []
    for s in sections:
        shard = "" if s["complete"] else " (a shard)"
        passes = f"{s['passes']} pass{'es' if s['passes'] > 1 else ''}"
        line = f"{s['kind']}: {s['tensors']} tensors, n={s['n']}{shard}, {passes}"
        if s["at_once"] is not None:
            watched, budget = s["watched_bytes_per_sample"] / 1e6, s["memory_budget_bytes"] / 1e6
            line += f", {s['at_once']} at once, {watched:.0f} MB watched per sample (budget {budget:.0f} MB)"
        line += f", peak {s['peak_rss_bytes'] / 1e6:.0f} MB, {s['seconds']:.1f} s"
        if s["resumed_from"]:
            line += f", resumed after {s['resumed_from']} runs of a sample"
        lines.append(line)
        if s["quantile_error"] is not None:
            lines.append(
                f"  every {s['step']}th value counted: quantiles are off by at most {s['quantile_error']:.2g} in rank "
                "at 95 % (Dvoretzky-Kiefer-Wolfowitz, for independent values); extremes are exact"
            )
        for scheme, choice in s["choices"].items():
            tally = ", ".join(f"{m} {n}" for m, n in choice["methods"].items())
            figures = ", ".join(f"{m} {db:.1f}" for m, db in choice["sqnr_db"].items())
            lines.append(f"  auto, {scheme}: {tally}")
            lines.append(f"    SQNR dB of all activations quantized, n={choice['n']} held back: {figures}")
    return lines


def ranges_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of ``ranges``."""
    header = ["tensor", "method", "minimum", "maximum", "observed minimum", "observed maximum", ""]
    keys = ("minimum", "maximum", "observed_minimum", "observed_maximum")
    return align(header, [[e["tensor"], e["method"], *(f"{e[k]:.6g}" for k in keys), ""] for e in entries])


def histogram_plot(shown: Mapping[str, Any], columns: int) -> str:
    """Return a histogram as text, log scale, with a bar per method below: what ``api.show`` returned.

    columns: of the terminal. Counts are joined to as many columns as there is room for.
    """
    counts, low, high = shown["counts"], shown["edges"][0], shown["edges"][-1]
    label = max(len(_label(name, scheme)) for name in shown["ranges"] for scheme in shown["ranges"][name]) + 1
    width = max(20, min(columns, 200) - label)
    joined = [0] * width
    for number, count in enumerate(counts):
        joined[min(width - 1, number * width // len(counts))] += count
    top = math.log1p(max(joined))
    levels = [0 if not c else max(1, round(math.log1p(c) / top * HEIGHT * 8)) for c in joined]
    lines = [
        f"{shown['tensor']} ({shown['kind']} graph): {shown['n']:,} values, "
        f"from {shown['minimum']:.6g} to {shown['maximum']:.6g}; log scale, highest column {max(joined):,}"
    ]
    for row in range(HEIGHT - 1, -1, -1):
        cells = (BLOCKS[min(8, max(0, level - 8 * row))] for level in levels)
        lines.append((" " * label + "".join(cells)).rstrip())
    for name, schemes in shown["ranges"].items():
        for scheme, (least, most) in schemes.items():
            first, last = (_column(x, low, high, width) for x in (least, most))
            bar = "".join(
                "├" if i == first and least >= low else "┤" if i == last and most <= high else "─"
                for i in range(first, last + 1)
            )
            chosen = " (auto)" if shown["chosen"].get(scheme) == name else ""
            figures = f" {least:.5g} .. {most:.5g}{chosen}"
            lines.append(f"{_label(name, scheme):{label}}{' ' * first}{bar}")
            lines.append(f"{'':{label}}{' ' * first}{figures.strip()}")
    return "\n".join(lines)


def _label(method: str, scheme: str) -> str:
    return f"{method} {scheme[:4]}."


def _column(value: float, low: float, high: float, width: int) -> int:
    return min(width - 1, max(0, int((value - low) / (high - low) * width))) if high > low else 0
