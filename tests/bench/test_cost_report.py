from __future__ import annotations

from typing import Any

from portcall.bench.cost_report import HEADER, cost_lines


def result(**given: Any) -> dict[str, Any]:
    memory = {
        "baseline_bytes": 54_000_000, "model_bytes": 29_700_000, "load_peak_bytes": None, "infer_peak_bytes": None,
        "pss_bytes": 1_000_000, "processes": 3, "limit": given.pop("limit", None),
    }  # fmt: skip
    return {"backend": "tflite", "precision": "int8", "memory": memory, "energy": None, **given}


def test_figures_stand_in_their_columns_and_what_is_absent_is_a_dash() -> None:
    energy = {"available": True, "joules_per_inference": 0.0123, "net_joules_per_inference": 0.0045}
    limit = {"available": True, "limit_bytes": 80_000_000, "resolution_bytes": 1_048_576}
    _, _, header, row = cost_lines([result(energy=energy, limit=limit)]).split("\n")
    assert row.split() == [
        "tflite",
        "int8",
        "54.0",
        "29.7",
        "-",
        "-",
        "1.0",
        "80.0",
        "1.0",
        "12.3",
        "4.5",
        "3p",
    ]
    assert header.split()[:3] == ["memory", "MB", "precision"]
    assert len(HEADER) == 12


def test_why_energy_is_absent_is_told_once() -> None:
    energy = {"available": False, "reason": "no counter", "fix": "Use a meter"}
    text = cost_lines([result(energy=energy), result(energy=energy)])
    assert text.count("no energy: no counter; fix: Use a meter") == 1


def test_nothing_measured_is_no_table() -> None:
    assert cost_lines([{"memory": None}]) == ""
