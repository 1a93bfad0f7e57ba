"""Tables of the modes beside latency: one block per mode, one line per point, with n and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portcall.bench.report import ABSENT, align

Result = Mapping[str, Any]


def mode_table(results: Sequence[Result]) -> str:
    """Return the table of ``bench --mode NAME`` for results of one mode; warnings stand below it."""
    name = results[0]["mode"]["name"] if results else ""
    header, lines = _TABLES[name]
    rows: list[list[str]] = []
    for result in results:
        cell = [result["backend"], result["precision"]]
        if name not in result:
            reason = f"{result['outcome']}: {result['reason']}"
            rows.append([*cell, *[ABSENT] * (len(header) - 3), reason])
            continue
        rows += [[*cell, *line] for line in lines(result[name])]
    table = align(header, rows)
    notes = [f"{r['backend']}:{r['precision']}: {w}" for r in results for w in r["warnings"]]
    return table + ("\n\n" + "\n".join(notes) if notes else "")


def _throughput(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for number, p in enumerate(found["points"]):
        latency = p["latency"] or {}
        marks = [] if p["reason"] is None else [f"{p['outcome']}: {p['reason']}"]
        marks += ["knee"] if number == found["knee"] else []
        marks += ["greatest"] if number == found["best"] else []
        marks += ["more threads than CPUs"] if p["oversubscribed"] else []
        rows.append(
            [
                *(str(p[k]) for k in ("batch", "streams", "threads")),
                _plain(p["samples_per_s"]),
                _interval(p["ci"], 1.0),
                f"{p['n']}/{p['processes']}p",
                *(_scaled(latency.get(k), 1e6) for k in ("p50_ns", "p99_ns")),
                ", ".join(marks),
            ]
        )
    if found["reason"]:
        rows.append([*[ABSENT] * 8, f"no knee: {found['reason']}"])
    return rows


def _cold(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for entry in found["caches"]:
        parts = entry["parts"]
        if parts is None:
            rows.append([entry["cache"], *[ABSENT] * 9, entry["reason"] or "not measured"])
            continue
        keys = ("interpreter_ns", "import_ns", "load_ns", "bind_ns", "first_ns", "harness_ns")
        rows.append(
            [
                entry["cache"],
                _scaled(parts["total_ns"]["geomean_ns"], 1e6),
                _interval(parts["total_ns"]["ci"], 1e6),
                *(_scaled(parts[k]["geomean_ns"], 1e6) for k in keys),
                f"{entry['n']}p",
                entry["method"] or "",
            ]
        )
    return rows


def _sustained(found: Mapping[str, Any]) -> list[list[str]]:
    drift = found["drift"]
    p50 = [w["p50_ns"] for windows in found["windows"] for w in windows if w["p50_ns"]]
    throttled = {True: "yes", False: "no", None: "unknown"}[found["throttled"]]
    return [
        [
            f"{found['duration_s']:g}",
            *(_scaled(v, 1e6) for v in ((p50[0], min(p50), max(p50), p50[-1]) if p50 else [None] * 4)),
            ABSENT if drift["per_minute"] is None else f"{100 * drift['per_minute']:+.2f}",
            _interval(drift["ci"], 0.01),
            f"{found['n']}/{found['processes']}p",
            throttled,
            found["reason"],
        ]
    ]


def _arrival(found: Mapping[str, Any]) -> list[list[str]]:
    saturated = {True: "yes", False: "no", None: "unknown"}[found["saturated"]]
    rows = []
    for kind in ("response", "service"):
        values = found[kind]
        rows.append(
            [
                kind,
                _plain(found["rate_per_s"]),
                *(_scaled(values[k], 1e6) for k in ("p50_ns", "p90_ns", "p95_ns", "p99_ns", "mean_ns")),
                _interval(values["ci"].get("p50_ns"), 1e6),
                f"{values['n']}/{values['processes']}p",
                _percent(found["utilization"]["mean"]),
                _percent(found["offered_load"]["mean"]),
                saturated,
            ]
        )
    return rows


_CELL = ["backend", "precision"]
_TABLES = {
    "throughput": (
        [
            *_CELL, "batch", "streams", "threads", "samples/s", "95 % CI", "n", "P50 ms", "P99 ms", "note",
        ],
        _throughput,
    ),
    "cold": (
        [
            *_CELL, "page cache", "total ms", "95 % CI ms", "interpreter", "import", "load", "bind", "first",
            "harness", "n", "dropped by",
        ],
        _cold,
    ),
    "sustained": (
        [
            *_CELL, "s", "P50 ms first", "least", "most", "last", "drift %/min", "95 % CI", "n", "throttled", "note",
        ],
        _sustained,
    ),
    "arrival": (
        [
            *_CELL, "time", "requests/s", "P50 ms", "P90 ms", "P95 ms", "P99 ms", "mean ms", "P50 95 % CI ms", "n",
            "busy %", "load %", "saturated",
        ],
        _arrival,
    ),
}  # fmt: skip
"""Per mode: the header, and a function from the mode's object to lines without the first two cells."""


def _plain(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _scaled(value: float | None, unit: float) -> str:
    return ABSENT if value is None else f"{value / unit:.3f}" if value < 1e9 else f"{value / unit:.0f}"


def _interval(ci: Sequence[float] | None, unit: float) -> str:
    return ABSENT if ci is None else "..".join(f"{v / unit:.4g}" for v in ci)


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"
