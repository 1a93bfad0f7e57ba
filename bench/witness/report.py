"""The witness of a bench for people: a table of both figures, then what could not be made the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portcall.bench.report import ABSENT, align

HEADER = (
    "backend", "precision", "tool", "version", "compared", "ours ms", "theirs ms", "ratio", "95 % CI", "pairs",
    "verdict",
)  # fmt: skip


def witness_text(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the results that have a witness, and the lines below it."""
    rows, notes = [], []
    for result in results:
        found = result.get("witness")
        if found is None:  # the cell itself failed
            continue
        rows.append(_row(result, found))
        if found["reason"]:
            fix = f"; fix: {found['fix']}" if found["fix"] else ""
            notes.append(f"{_name(result)}: {found['reason']}{fix}")
        if found["command"]:
            notes.append(f"{_name(result)}: {found['command']}")
        notes += [f"  differs: {text}" for text in found["differences"]]
    if not rows:
        return "no witness: nothing was measured"
    return "\n".join([align(HEADER, rows, left=5), "", *notes]).rstrip()


def _name(result: Mapping[str, Any]) -> str:
    return f"{result['backend']}:{result['precision']}"


def _row(result: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    if found["outcome"] != "compared":
        figures = [ABSENT] * 6
        return [*_head(result, found), *figures, found["outcome"]]
    statistic, key = found["statistic"], f"{found['statistic']}_ns"
    interval = found["ci"]
    return [
        *_head(result, found),
        f"{statistic.upper() if statistic == 'p50' else statistic} ({found['clock']})",
        _milliseconds(found["ours"][key]),
        _milliseconds(found["theirs"][key]),
        f"{found[f'{statistic}_ratio']:.3f}",
        ABSENT if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}",
        str(found["pairs"]),
        found["verdict"],
    ]


def _head(result: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [result["backend"], result["precision"], found["tool"] or ABSENT, found["version"] or "not told"]


def _milliseconds(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3f}"
