"""Memory and energy for people: a table under that of ``bench``, and a line where a limit or energy is absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portcall.bench.report import ABSENT, align

HEADER = (
    "memory MB", "precision", "import", "model", "load peak", "infer peak", "PSS", "runs in", "+-",
    "mJ/inference", "net mJ", "n",
)  # fmt: skip


def cost_lines(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, after an empty line; "" where no result holds memory."""
    measured = [r for r in results if r.get("memory")]
    if not measured:
        return ""
    text = "\n\n" + align(HEADER, [_row(r) for r in measured])
    return text + "".join(f"\n{line}" for line in _absences(measured))


def _row(result: Mapping[str, Any]) -> list[str]:
    memory, energy = result["memory"], result.get("energy") or {}
    limit = memory.get("limit") or {}
    keys = ("baseline_bytes", "model_bytes", "load_peak_bytes", "infer_peak_bytes", "pss_bytes")
    return [
        result["backend"],
        result["precision"],
        *(_megabytes(memory[key]) for key in keys),
        _megabytes(limit.get("limit_bytes")),
        _megabytes(limit.get("resolution_bytes")),
        _millijoules(energy.get("joules_per_inference")),
        _millijoules(energy.get("net_joules_per_inference")),
        f"{memory['processes']}p",
    ]


def _absences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say once why energy or a limit is absent."""
    found: dict[str, None] = {}
    for result in results:
        for what, answer in (
            ("energy", result.get("energy")),
            ("memory limit", result["memory"].get("limit")),
        ):
            if answer and not answer["available"]:
                fix = f"; fix: {answer['fix']}" if answer["fix"] else ""
                found[f"no {what}: {answer['reason']}{fix}"] = None
    return list(found)


def _megabytes(size: float | None) -> str:
    return ABSENT if size is None else f"{size / 1e6:.1f}"


def _millijoules(joules: float | None) -> str:
    return ABSENT if joules is None else f"{joules * 1e3:.3g}"
