"""Tables for people: aligned columns, units in headers, one line per cell including those that could not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Sequence[str]
ABSENT = "-"
INTERPRETED = "parity by an interpreter or emulation, not on its device"


def align(header: Row, rows: Sequence[Row], left: int = 2) -> str:
    """Return an aligned table; the first *left* columns and the last one are flush left, numbers flush right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Row) -> str:
        last = len(cells) - 1
        shown = [
            cell.ljust(width) if i < left or i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(shown).rstrip()

    return "\n".join(line(cells) for cells in [header, *rows])


def export_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of ``export`` and ``verify``."""
    header = [
        "backend",
        "precision",
        "outcome",
        "size MB",
        "SQNR dB",
        "worst dB",
        "agree %",
        "n",
        "int MACs %",
        "accuracy [95 % CI]",
        "note",
    ]
    rows = []
    for r in results:
        parity, accuracy = r.get("parity"), r.get("eval")
        arithmetic = r.get("arithmetic") or {}
        rows.append(
            [
                r["backend"],
                r["precision"],
                r["outcome"],
                _megabytes(r["size_bytes"]),
                _number(parity and parity["sqnr_db"], 1),
                _number(parity and parity["worst_sqnr_db"], 1),
                _percent(parity and parity["agreement"]),
                str(parity["n"]) if parity else ABSENT,
                _percent(arithmetic.get("integer_macs_share"), 0),
                _accuracy(accuracy) if accuracy else ABSENT,
                _note(r),
            ]
        )
    return align(header, rows) + _samples_line(results)


def bench_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of ``bench``; *results* may hold failed cells and, for the demo, cells that never ran."""
    header = [
        "backend", "precision", "outcome", "size MB", "P50 ms", "P95 ms", "P99 ms", "n", "P50 95 % CI ms",
        "peak MB", "agree %", "SQNR dB", "note",
    ]  # fmt: skip
    rows = []
    for r in results:
        latency = r.get("latency") or {}
        interval = (latency.get("ci") or {}).get("p50_ns")
        parity, memory = r.get("parity"), r.get("memory")
        rows.append(
            [
                r["backend"],
                r["precision"],
                r["outcome"],
                _megabytes(r["size_bytes"]),
                *(_milliseconds(latency.get(key)) for key in ("p50_ns", "p95_ns", "p99_ns")),
                f"{latency['n']}/{latency['processes']}p" if latency else ABSENT,
                "-".join(map(_milliseconds, interval)) if interval else ABSENT,
                _megabytes(memory and memory["peak_bytes"]),
                _percent(parity and parity["agreement"]),
                _number(parity and parity["sqnr_db"], 1),
                _note(r),
            ]
        )
    return align(header, rows) + _samples_line(results) + _placement_lines(results)


def _placement_lines(results: Sequence[Mapping[str, Any]]) -> str:
    """Say, for each artifact whose placement is known, what of it runs on its unit."""
    from portcall.bench.placement import placement_line

    known = [r for r in results if (r.get("placement") or {}).get("share") is not None]
    lines = [placement_line(f"{r['backend']}:{r['precision']}", r["placement"]) for r in known]
    return "\n\n" + "\n".join(lines) if lines else ""


def _samples_line(results: Sequence[Mapping[str, Any]]) -> str:
    """Say what parity was measured on, and agreement on confident samples where there is one."""
    parities = [(f"{r['backend']}:{r['precision']}", r["parity"]) for r in results if r.get("parity")]
    if not parities:
        return ""
    first = parities[0][1]
    text = f"\n\nparity against the source model in float32 on {first['n']} {first['samples']} samples"
    sure = [(name, p["agreement_margin"]) for name, p in parities if p.get("agreement_margin")]
    if sure:
        margin, n = sure[0][1]["margin"], sure[0][1]["n"]
        shares = ", ".join(f"{name} {m['agreement']:.1%}" for name, m in sure)
        text += f"\nagreement where the source's top-1 margin is at least {margin} (n={n}): {shares}"
    return text


STATES: Mapping[str, str] = {
    "run": "exported and run here",
    "interpreted": "exported here, proven by an interpreter; it runs on its device",
    "blind": "exported here, where nothing can run it",
    "no": "not exported here: see its reason",
}
"""What a cell of doctor's matrix says."""


def doctor_table(answer: Mapping[str, Any], options: bool = False) -> str:
    """Return what ``doctor`` found: the matrix of precisions and backends, then reasons and fixes.

    options: list the options of each backend too.
    """
    backends = answer["backends"]
    words = list(dict.fromkeys(word for b in backends for word in b["precisions"]))
    matrix = [[w, *(b["state"] if w in b["precisions"] else ABSENT for b in backends)] for w in words]
    used = {b["state"] for b in backends}
    parts = [
        align(["precision", *(b["name"] for b in backends)], matrix, left=len(backends) + 1),
        "\n".join(f"{state}: {meaning}" for state, meaning in STATES.items() if state in used),
    ]
    rows = []
    for b in backends:
        for role in ("export", "run"):
            found = b[role]
            state = f"yes ({found['version']})" if found["available"] else "no"
            rows.append([b["name"], role, state, found["reason"] or "", found["fix"] or ""])
    parts.append(align(["backend", "role", "available", "reason", "fix"], rows, left=5))
    if options:
        entries = [
            [f"{b['name']}.{o['name']}", ", ".join(o["choices"]) or o["kind"], o["meaning"]]
            for b in backends
            for o in b["options"]
        ]
        parts.append(align(["option", "values", "meaning"], entries, left=3))
    targets = [[t["name"], t["description"]] for t in answer["targets"]]
    parts.append(align(["target", "description"], targets))
    calibration = answer["calibration"]
    fix = f"; fix: {calibration['fix']}" if calibration["fix"] else ""
    parts.append(f"calibration counts with the kernel: {calibration['kernel']}{fix}")
    return "\n\n".join(parts)


def accuracy_text(found: Mapping[str, Any]) -> str:
    """``top1 97.8 -> 97.5 (-0.3 [-0.9, +0.2])``, top-1 in percent, another metric in its own units."""
    is_top1 = found["metric"] == "top1"
    scale, digits = (100, 1) if is_top1 else (1, 4)
    name = str(found["metric"]).rpartition(":")[2]
    text = f"{name} {scale * found['reference']:.{digits}f} -> {scale * found['value']:.{digits}f}"
    interval = found.get("ci95")
    if interval is not None:
        low, high = (f"{scale * x:+.{digits}f}" for x in interval)
        text += f" ({scale * found['difference']:+.{digits}f} [{low}, {high}])"
    return text


def _accuracy(found: Mapping[str, Any]) -> str:
    text = accuracy_text(found)
    return text if found["verdict"] in (None, "within") else f"{text} {found['verdict']}"


def _note(result: Mapping[str, Any]) -> str:
    if result["reason"]:
        return f"{result['reason']}; fix: {result['fix']}" if result["fix"] else str(result["reason"])
    told = [INTERPRETED] if (result.get("parity") or {}).get("interpreted") else []
    # Why an interval of another percentile is absent is told in the JSON; the table shows that of P50 only.
    told += [
        w
        for w in result.get("warnings") or result.get("notes") or []
        if not w.startswith("no interval for p9") and ": no p99.9 " not in w
    ]
    return "; ".join(told)


def _milliseconds(nanoseconds: float | None) -> str:
    """Two decimals, or three significant digits below 1 ms."""
    if nanoseconds is None:
        return ABSENT
    value = nanoseconds / 1e6
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _megabytes(size: float | None) -> str:
    return ABSENT if size is None else f"{size / 1e6:.2f}"


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _percent(share: float | None, digits: int = 1) -> str:
    return ABSENT if share is None else f"{share * 100:.{digits}f}"
