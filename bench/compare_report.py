"""The table of ``compare``: one line per metric, the verdict on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portcall.bench.report import ABSENT, align

HEADER = ("metric", "verdict", "ratio", "95 % CI", "note")


def compare_table(answer: Mapping[str, Any]) -> str:
    """Return what ``compare`` found, for people."""
    base, candidate = answer["base"], answer["candidate"]
    lines = [
        f"{answer['verdict']}: {_sentence(answer)}",
        "",
        *(f"{name:9} {_side(side)}" for name, side in (("base", base), ("candidate", candidate))),
        "",
        align(HEADER, [_row(m) for m in answer["metrics"]]),
        "",
        _how(answer),
    ]
    for row in answer["difference"]["stack"]:
        lines.append(f"differs: {row['key']}: {row['a']} -> {row['b']}")
    lines += [f"warning: {w}" for w in answer["warnings"]]
    return "\n".join(lines)


def _how(answer: Mapping[str, Any]) -> str:
    margin = f"margin {100 * answer['margin']:g} %, {answer['interval']} intervals"
    if answer["stopped"] == "saved":
        return f"two saved benches of {answer['target']}, {margin}"
    clear = "; stopped because the verdict was clear" if answer["stopped"] == "clear" else ""
    return (
        f"{answer['pairs']} pairs of fresh processes on {answer['target']} in {answer['seconds']:.1f} s, "
        f"{margin}{clear}"
    )


def _sentence(answer: Mapping[str, Any]) -> str:
    metric = next(m for m in answer["metrics"] if m["name"] == answer["metric"])
    if metric["ratio"] is None:
        return f"{metric['name']}: {metric['reason']}"
    if answer["verdict"] == "incomparable":
        return "the machines or the workloads differ"
    change = 100 * (metric["ratio"] - 1)
    text = f"{metric['name']} {change:+.1f} %"
    if answer["verdict"] == "inconclusive":
        effect = metric["smallest_effect"]
        seen = "is too short" if effect is None else f"would have found a slow-down of {100 * effect:.1f} %"
        more = "more --processes" if answer["stopped"] == "saved" else "more time with --max-time"
        text += f"; this run {seen}: allow {more}"
    return text


def _side(side: Mapping[str, Any]) -> str:
    peak = side["peak_bytes"]
    memory = "" if peak is None else f", peak {peak / 1e6:.1f} MB"
    return (
        f"{side['artifact']} ({side['backend']}:{side['precision']}): P50 {side['p50_ns'] / 1e6:.3f} ms, "
        f"n={side['n']}/{side['processes']}p{memory}"
    )


def _row(metric: Mapping[str, Any]) -> list[str]:
    if metric["ratio"] is None:
        return [metric["name"], ABSENT, ABSENT, ABSENT, metric["reason"]]
    interval, effect = metric["ci"], metric["smallest_effect"]
    note = metric["reason"] or ""
    return [
        metric["name"],
        metric["verdict"],
        f"{metric['ratio']:.4f}",
        ABSENT if interval is None else f"{interval[0]:.4f}-{interval[1]:.4f}",
        note if effect is None else f"would have found {100 * effect:+.1f} %",
    ]
