"""The HTML report of saved results: one file, no script, nothing loaded from elsewhere, every text escaped.

Tables hold every cell, measured or not; what a newer portcall adds to a result is shown under "Details" as it is.
"""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from portcall import __version__
from portcall.bench import plots
from portcall.bench.report import ABSENT, accuracy_text
from portcall.bench.report_html_style import METHODS, STYLE
from portcall.bench.saved import SavedResult, names, visible
from portcall.targets.agent.fingerprint import identity

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LONGEST = 100
"""How many values of a list are shown."""

_SHOWN_ELSEWHERE = frozenset(
    {
        "artifact", "backend", "precision", "target", "outcome", "error_kind", "reason", "fix", "cpu",
        "load_ns", "first_ns", "throughput_per_s", "environment", "size_bytes", "warnings", "raw", "schema",
    }
)  # fmt: skip


def write_html(results: Sequence[SavedResult], path: Path) -> None:
    """Write the report of *results* to *path*. Without matplotlib it has no plots, and says how to get them."""
    path.write_text(html_report(results), encoding="utf-8")


def html_report(results: Sequence[SavedResult]) -> str:
    """Return the report as one HTML document (UTF-8)."""
    title = "portcall bench"
    measured = sum(r.measured for r in results)
    times = sorted(t for r in results if isinstance(t := r.get("environment", "state", "after", "time"), str))
    first, last = (f"{t[:10]} {t[11:16]}" for t in (times[0], times[-1])) if times else ("", "")
    when = f", {first} to {last} UTC" if times else ""
    targets = ", ".join(dict.fromkeys(r.result["target"] for r in results))
    sections = [
        f"<h1>{title}</h1>",
        _paragraph(
            f"{measured} of {len(results)} cells measured on {targets}{when}. Written by portcall {__version__}."
        ),
        _warnings(results),
        "<h2>Latency</h2>",
        _table("Latency of one inference in ms, with 95 % intervals over processes", _LATENCY, results),
        "<h2>Cost and accuracy</h2>",
        _table("Memory, size, start and accuracy", _COST, results),
        "<h2>Plots</h2>",
        *_figures(results),
        "<h2>Where it was measured</h2>",
        *_environments(results),
        "<h2>Details</h2>",
        *_details(results),
        "<h2>What the figures mean</h2>",
        METHODS,
    ]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
    )
    return head + "<body>\n<main>\n" + "\n".join(s for s in sections if s) + "\n</main>\n</body>\n</html>\n"


def _text(value: Any) -> str:
    return escape(visible(str(value)), quote=True)


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


# ---------------------------------------------------------------------------------------------------- tables

Column = tuple[str, Callable[[SavedResult], str | None]]


def _ms(result: SavedResult, *path: str) -> str | None:
    value = result.number(*path)
    return None if value is None else f"{value / 1e6:.4g}"


def _percentile(key: str) -> Callable[[SavedResult], str | None]:
    def cell(result: SavedResult) -> str | None:
        value, interval = _ms(result, "latency", key), result.interval(key)
        if value is None or interval is None:
            return value
        return f"{value}\n[{interval[0] / 1e6:.4g}, {interval[1] / 1e6:.4g}]"

    return cell


def _scaled(digits: int, scale: float, *path: str) -> Callable[[SavedResult], str | None]:
    def cell(result: SavedResult) -> str | None:
        value = result.number(*path)
        return None if value is None else f"{value * scale:.{digits}f}"

    return cell


def _memory(result: SavedResult) -> str | None:
    peak, method = result.number("memory", "peak_bytes"), result.get("memory", "method")
    return None if peak is None else f"{peak / 1e6:.2f}" + (f" ({method})" if method else "")


def _parity(result: SavedResult) -> str | None:
    sqnr, agreement = result.number("parity", "sqnr_db"), result.number("parity", "agreement")
    parts = [] if sqnr is None else [f"{sqnr:.1f} dB"]
    parts += [] if agreement is None else [f"{100 * agreement:.1f} % agree"]
    if not parts:
        return None
    told = f"n={result.get('parity', 'n')}, {result.get('parity', 'samples')}"
    return ", ".join(parts) + f" ({told}{', interpreted' if result.get('parity', 'interpreted') else ''})"


def _energy(result: SavedResult) -> str | None:
    joules = result.number("energy", "joules_per_inference")
    told = f"{result.get('energy', 'method')}, n={result.get('energy', 'n')}"
    return None if joules is None else f"{joules * 1e3:.4g} ({told})"


def _placement(result: SavedResult) -> str | None:
    shares = [(w, result.number("placement", k)) for w, k in (("operators", "share"), ("time", "time_share"))]
    parts = [f"{100 * share:.1f} % of {word}" for word, share in shares if share is not None]
    return f"{', '.join(parts)} on {result.get('placement', 'unit')}" if parts else None


def _accuracy(result: SavedResult) -> str | None:
    found = result.get("eval") or {}
    known = ("metric", "value", "reference", "difference")
    if any(found.get(key) is None for key in known):
        return None
    return f"{accuracy_text(found)} (n={found.get('n')})"


def _n(result: SavedResult) -> str:
    processes = result.latency["processes"]
    return f"{result.latency['n']} in\n{processes} process{'' if processes == 1 else 'es'}"


_LATENCY: tuple[Column, ...] = (
    ("n", _n),
    ("P50", _percentile("p50_ns")),
    ("P90", _percentile("p90_ns")),
    ("P95", _percentile("p95_ns")),
    ("P99", _percentile("p99_ns")),
    ("P99.9", _percentile("p999_ns")),
    ("mean", _percentile("mean_ns")),
    ("trimmed mean", _percentile("trimmed_mean_ns")),
    ("min", lambda r: _ms(r, "latency", "min_ns")),
    ("CPU time P50", lambda r: _ms(r, "cpu", "p50_ns")),
)
_COST: tuple[Column, ...] = (
    ("n", _n),
    ("size MB", _scaled(2, 1e-6, "size_bytes")),
    ("peak memory MB (method)", _memory),
    ("energy per inference mJ (method)", _energy),
    ("placement", _placement),
    ("load ms", lambda r: _ms(r, "load_ns")),
    ("first inference ms", lambda r: _ms(r, "first_ns")),
    ("samples per s", _scaled(1, 1.0, "throughput_per_s")),
    ("parity with the source", _parity),
    ("accuracy: source, artifact", _accuracy),
)


def _table(caption: str, columns: Sequence[Column], results: Sequence[SavedResult]) -> str:
    """Return a table of one row per result; a column that nobody has is left out."""
    used = [c for c in columns if any(r.measured and c[1](r) is not None for r in results)]
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title, _ in used)
    rows = []
    for name, result in zip(names(results), results, strict=True):
        row = f'<th scope="row">{_text(name)}</th>'
        if result.measured:
            row += "".join(
                f"<td>{_text(cell(result) or ABSENT).replace(chr(10), '<br>')}</td>" for _, cell in used
            )
        else:
            row += f'<td class="absent" colspan="{max(1, len(used))}">{_absence(result)}</td>'
        rows.append(f"<tr>{row}</tr>")
    return _scrolling(
        caption, f'<thead><tr><th scope="col">artifact</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
    )


def _scrolling(caption: str, rows: str) -> str:
    shown = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="wide" tabindex="0"><table>{shown}{rows}</table></div>'


def _absence(result: SavedResult) -> str:
    fix = result.get("fix")
    text = f"<strong>{_text(result.result['outcome'])}</strong>: {_text(result.get('reason') or 'no reason given')}"
    return text + (f"<br>To do: {_text(fix)}" if fix else "")


def _warnings(results: Sequence[SavedResult]) -> str:
    found = [
        f"<li><strong>{_text(name)}</strong>: {_text(warning)}</li>"
        for name, result in zip(names(results), results, strict=True)
        for warning in result.get("warnings") or []
    ]
    return f'<h2>Warnings</h2>\n<ul class="warnings">{"".join(found)}</ul>' if found else ""


# ----------------------------------------------------------------------------------------------------- plots


def _figures(results: Sequence[SavedResult]) -> Iterator[str]:
    if importlib.util.find_spec("matplotlib") is None:
        yield _paragraph("No plots: matplotlib is not installed. Run: pip install 'portcall[plot]'")
        return
    if any(r.measured and r.raw is None for r in results):
        yield _paragraph(
            "No plots of samples: the raw samples are not beside the results. Run portcall bench with -o."
        )
    else:
        yield _picture(plots.write_ecdf, results, "Latency distribution", _said(results, "p50_ns", "p95_ns"))
        yield _picture(plots.write_series, results, "Latency over time", _said(results, "min_ns", "p99_ns"))
    yield _picture(
        plots.write_tradeoff, results, "Size, latency and accuracy", "The table above has the figures."
    )


def _said(results: Sequence[SavedResult], *keys: str) -> str:
    """Return the plot's message in words, for those who do not see it."""
    sentences = []
    for name, result in zip(names(results), results, strict=True):
        told = [f"{k[:-3]} {ms} ms" for k in keys if result.measured and (ms := _ms(result, "latency", k))]
        sentences.append(f"{name}: {', '.join(told) if told else result.result['outcome']}")
    return "; ".join(sentences)


def _picture(
    write: Callable[[Sequence[SavedResult], Path], None], results: Any, title: str, said: str
) -> str:
    with tempfile.TemporaryDirectory(prefix="portcall-") as folder:
        file = Path(folder) / "plot.svg"
        write(results, file)
        data = base64.b64encode(file.read_bytes()).decode()
    # As an image, an SVG runs no script and shares no identifiers with the page.
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{_text(f"{title}. {said}")}">'
    return f"<figure>{image}<figcaption>{_text(title)}</figcaption></figure>"


# ----------------------------------------------------------------------------------- environment and details


def _environments(results: Sequence[SavedResult]) -> Iterator[str]:
    """Yield machine, stack and workload, each once with the cells that share it."""
    for part in ("machine", "stack"):
        groups: dict[str, tuple[Any, list[str]]] = {}
        for name, result in zip(names(results), results, strict=True):
            found = result.get("environment", part)
            if found is not None:
                groups.setdefault(identity(found), (found, []))[1].append(name)
        if part == "machine" and len(groups) > 1:
            yield f'<p class="warnings">{len(groups)} machines: their figures do not compare.</p>'
        for value, members in groups.values():
            summary = f"{part} of {', '.join(members)}"
            yield f"<details open><summary>{_text(summary)}</summary>{_value(value)}</details>"


def _details(results: Sequence[SavedResult]) -> Iterator[str]:
    for name, result in zip(names(results), results, strict=True):
        rest = {k: v for k, v in result.result.items() if k not in _SHOWN_ELSEWHERE and v is not None}
        rest = {"artifact": result.result["artifact"], "target": result.result["target"], **rest}
        yield f"<details><summary>{_text(name)}</summary>{_value(rest)}</details>"


def _value(value: Any, depth: int = 0) -> str:
    """Return any JSON value as HTML: an object as a table of keys, a list of objects as a table of columns."""
    if isinstance(value, Mapping) and value and depth < 8:
        rows = "".join(
            f'<tr><th scope="row">{_text(k)}</th><td>{_value(v, depth + 1)}</td></tr>'
            for k, v in value.items()
        )
        return f"<table>{rows}</table>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(v, Mapping) for v in value) and depth < 8:
            keys = list(dict.fromkeys(k for v in value for k in v))
            head = "".join(f'<th scope="col">{_text(k)}</th>' for k in keys)
            rows = "".join(
                "<tr>" + "".join(f"<td>{_value(v.get(k), depth + 1)}</td>" for k in keys) + "</tr>"
                for v in value
            )
            return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        more = f", ... ({len(value)} in all)" if len(value) > _LONGEST else ""
        return _text(", ".join(map(str, value[:_LONGEST])) + more) or ABSENT
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _text(f"{value:.6g}" if isinstance(value, float) else value) or ABSENT
