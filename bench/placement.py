"""Placement: the share of an artifact's operators, and of its time, that runs on the unit it was exported for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portcall.targets.agent.errors import BadInput, BudgetBroken, CellFailed, PortcallError

OPERATORS, TIME = "operators", "time"
BUDGETS: Mapping[str, str] = {OPERATORS: "share", TIME: "time_share"}
"""What ``--min-placement`` may name -> the key of ``placement`` that it is held against."""
NAMED = 8
"""Operators that a message names; the JSON holds all."""
FIX = "Replace these operators in the model, or export with other options; portcall profile shows what they cost"


def placement_of(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``placement`` of the JSON contract from what the job ``profile`` answered.

    {"unit": the intended one, "operators": all, "on_unit": those on it, "share", "time_share": fractions, "rest":
    [{"name", "operator", "unit", "reason", "time_share"}] in the order of execution, "method", "reason": why a figure
    is None}. Operators are those that the runtime executes; where a delegate hides them, those of the file.
    """
    operators = profile["operators"]
    counted = profile["counted"] or [len(operators), sum(o["on_unit"] for o in operators)]
    timed = profile["untimed"] is None
    total_ns = sum(o["time_ns"] or 0.0 for o in operators) if timed else 0.0
    reason = profile["untimed"]
    if not counted[0]:
        reason = "the runtime executes no operator"
    elif timed and not total_ns:
        reason = "no time: every operator is faster than the microsecond that the profiler counts in"

    def share(time_ns: float | None) -> float | None:
        return (time_ns or 0.0) / total_ns if total_ns else None

    return {
        "unit": profile["unit"],
        "operators": counted[0],
        "on_unit": counted[1],
        "share": counted[1] / counted[0] if counted[0] else None,
        "time_share": share(sum(o["time_ns"] or 0.0 for o in operators if o["on_unit"])),
        "rest": [
            {
                "name": o["name"],
                "operator": o["operator"],
                "unit": o["unit"],
                "reason": o["reason"],
                "time_share": share(o["time_ns"]),
            }
            for o in operators
            if not o["on_unit"]
        ],
        "method": profile["method"],
        "reason": reason,
    }


def no_placement(error: PortcallError) -> dict[str, Any]:
    """Return ``placement`` where nothing could be told: all None, and the reason with its fix."""
    keys = ("unit", "operators", "on_unit", "share", "time_share", "rest", "method")
    return {**dict.fromkeys(keys), "reason": str(error)}


def check_budgets(given: Mapping[str, float] | None, placement: bool) -> dict[str, float]:
    """Return the budgets for ``judge``. Raises BadInput for one that cannot be kept, or judged without *placement*."""
    found = dict(given or {})
    for word, least in found.items():
        if word not in BUDGETS or not 0 <= least <= 1:
            raise BadInput(
                f"min_placement has {word}={least}", f"Give a share from 0 to 1 for {' or '.join(BUDGETS)}"
            )
    if found and not placement:
        raise BadInput("a budget on placement needs the placement", "Leave out --no-placement")
    return found


def judge(placement: Mapping[str, Any], budgets: Mapping[str, float]) -> PortcallError | None:
    """Return BudgetBroken for a share below its budget, CellFailed for one that is unknown, else None.

    budgets: "operators" or "time" -> the least share, 0 to 1.
    """
    for word, least in budgets.items():
        found = placement[BUDGETS[word]]
        if found is None:
            return CellFailed(
                f"--min-placement {word}={least:.4g}: the share of {word} is unknown: {placement['reason']}",
                "Leave the budget out for this artifact",
            )
        if found < least:
            return BudgetBroken(_broken(placement, word, least), FIX)
    return None


def _broken(placement: Mapping[str, Any], word: str, least: float) -> str:
    """Name the operators, those that take longest first."""
    rest = sorted(placement["rest"], key=lambda r: -(r["time_share"] or 0.0))
    names = ", ".join(f"{r['name']} ({r['operator']}: {r['reason']})" for r in rest[:NAMED])
    more = f" and {len(rest) - NAMED} more" if len(rest) > NAMED else ""
    counts = f" ({placement['on_unit']} of {placement['operators']})" if word == OPERATORS else ""
    found = placement[BUDGETS[word]]
    return (
        f"{_percent(found)} of the {word}{counts} run on {placement['unit']}, the budget is {_percent(least)}; "
        f"not on it: {names}{more}"
    )


def _percent(share: float) -> str:
    """``94.9%``, never rounded up to the budget that it misses."""
    return f"{int(share * 1000) / 10:g}%"


def placement_line(label: str, placement: Mapping[str, Any]) -> str:
    """Return the line of the table's foot: ``tflite:int8: 41 of 43 operators and 97.1 % of the time on XNNPACK``."""
    if placement["share"] is None:
        return f"{label}: placement unknown: {placement['reason']}"
    time_share = placement["time_share"]
    text = f"{label}: {placement['on_unit']} of {placement['operators']} operators"
    if time_share is not None:
        text += f" and {100 * time_share:.1f} % of the time"
    text += f" on {placement['unit']}"
    kinds = list(dict.fromkeys(r["operator"] for r in placement["rest"]))
    return text + (f"; not: {', '.join(kinds[:NAMED])}" if kinds else "")
