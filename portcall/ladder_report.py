"""The ladder as text: the first divergence on top, then the stages and the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portcall.bench.report import align

OK, DIVERGES, FAILED = 0, 1, 4


def exit_code(answer: Mapping[str, Any]) -> int:
    """Return 1 where a divergence was found, 4 where nothing could be compared, else 0."""
    if answer["outcome"] != "compared":
        return FAILED
    return OK if answer["first_divergence"] is None else DIVERGES


def report_code(results: Sequence[Mapping[str, Any]], code: int) -> int:
    """Return the exit code of an export with its ladders: a divergence is a failed verification."""
    codes = [exit_code(r["parity_report"]) for r in results if r.get("parity_report")]
    return DIVERGES if DIVERGES in codes else code if code else max(codes, default=OK)


def report_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per exported cell: its first divergence."""
    return [
        f"{r['backend']}:{r['precision']}: {headline(r['parity_report'])}"
        for r in results
        if r.get("parity_report")
    ]


def headline(answer: Mapping[str, Any]) -> str:
    """Return the first divergence, that there is none, or why nothing could be compared."""
    if answer["outcome"] != "compared":
        return f"not compared: {answer['reason']}"
    first = answer["first_divergence"]
    if first is None:
        count = len(answer["tensors"])
        what = f"{count} tensors" if count else "outputs only, no tensors shown"
        return f"no divergence ({what}, n={answer['n']})"
    looks = f": {first['looks_like']}" if first["looks_like"] else ""
    local = (
        f", {_db(first['local_sqnr_db'])} where {_db(first['expected_sqnr_db'])} is expected"
        if first["local_sqnr_db"] is not None
        else ""
    )
    return (
        f"first divergence at {first['layer']} (tensor {first['tensor']}, {first['where']}) in the {first['stage']}: "
        f"{_db(first['sqnr_db'])} from the float graph{local}{looks}"
    )


def ladder_table(answer: Mapping[str, Any], everything: bool = False) -> str:
    """Return the whole ladder; unless *everything*, only the worst tensor of each layer."""
    lines = [headline(answer), ""]
    if answer["outcome"] != "compared":
        return "\n".join([*lines[:1], *([f"  {answer['fix']}"] if answer["fix"] else []), *_notes(answer)])
    rows = [
        [
            stage["name"],
            "reference" if stage["name"] == "source" else _db(stage["parity"] and stage["parity"]["sqnr_db"]),
            stage["reason"] or stage["how"] or "",
        ]
        for stage in answer["stages"]
    ]
    lines += [align(["stage", "SQNR", "how"], rows, left=1), ""]
    shown = answer["tensors"] if everything else _worst_of_layers(answer["tensors"])
    table = [
        [
            row["layer"],
            row["tensor"][-40:],
            "int" if row["scale"] is not None else "float",
            *(
                _number(row[k])
                for k in ("graph_sqnr_db", "fake_quantized_sqnr_db", "sqnr_db", "local_sqnr_db")
            ),
            _number(row["expected_sqnr_db"]),
            row["verdict"] + (f": {row['where']}" if row["verdict"] == "diverges" else ""),
        ]
        for row in shown
    ]
    if table:
        header = [
            "layer",
            "tensor",
            "type",
            "graph dB",
            "fake dB",
            "SQNR dB",
            "local dB",
            "expected dB",
            "verdict",
        ]
        lines += [align(header, table, left=3), ""]
        traced = answer["stages"][-1]["traced"]
        lines.append(f"tensors as shown by {traced}; n={answer['n']} samples")
    return "\n".join([*lines, *_notes(answer)])


def _notes(answer: Mapping[str, Any]) -> list[str]:
    return [f"note: {note}" for note in answer["notes"]]


def _worst_of_layers(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    worst: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        before = worst.get(row["layer"])
        if before is None or _rank(row) > _rank(before):
            worst[row["layer"]] = row
    return list(worst.values())


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    ratio = 0.0 if row["ratio"] is None else row["ratio"] / row["threshold"]
    return row["verdict"] == "diverges", ratio


def _db(value: float | None) -> str:
    return "no figure" if value is None else f"{value:.1f} dB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
