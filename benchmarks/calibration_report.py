"""The rows of ``make bench-calibration``: trials, the aligned table and the JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.calibration_contenders import Contender
from portcall.bench.report import align
from portcall.targets.agent import fingerprint


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of one contender.

    seconds: part -> wall seconds; process_s: wall seconds of its whole processes, start to exit. peak_rss_bytes:
    part -> VmHWM of its process at the end of the part.
    """

    round: int
    seconds: dict[str, float]
    process_s: float
    peak_rss_bytes: dict[str, int]
    tensors: int | None
    versions: dict[str, str]

    @property
    def import_s(self) -> float:
        return sum(s for part, s in self.seconds.items() if part.startswith("import"))

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values()) - self.import_s

    @property
    def peak_bytes(self) -> int:
        return max(self.peak_rss_bytes.values())


@dataclass(slots=True)
class Row:
    """One contender at one number of images. reason: why there are no trials, or fewer than rounds."""

    contender: Contender
    images: int
    rounds: int
    trials: list[Trial] = field(default_factory=list)
    reason: str = ""

    def ratios(self, limit: Row | None) -> list[float]:
        """Return total seconds as multiples of the limit's in the same round."""
        if limit is None:
            return []
        base = {t.round: t.total_s for t in limit.trials}
        return [t.total_s / base[t.round] for t in self.trials if t.round in base]


HEADER = (
    "contender", "images", "n", "seconds", "x limit", "least..most", "ranges s", "peak MB", "import s", "process s",
    "tensors", "included",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return the aligned table: medians over n rounds, one line per row including those without a result."""
    limits = _limits(rows)
    lines = [_line(row, limits.get(row.images)) for row in rows]
    return align(HEADER, lines, left=1)


def _limits(rows: Sequence[Row]) -> dict[int, Row]:
    return {row.images: row for row in rows if row.contender.name == "limit"}


def _line(row: Row, limit: Row | None) -> list[str]:
    trials, ratios = row.trials, row.ratios(limit)
    head = [row.contender.name, str(row.images), f"{len(trials)}"]
    if not trials:
        return [*head, *["-"] * (len(HEADER) - 4), row.reason]
    ranges = [t.seconds["ranges"] for t in trials if "ranges" in t.seconds]
    notes = [row.contender.included]
    if row.contender.heavy:
        notes.append(f"heavy: {row.contender.heavy}")
    if row.reason:
        notes.append(f"n < {row.rounds}: {row.reason}")
    return [
        *head,
        f"{statistics.median(t.total_s for t in trials):.2f}",
        f"{statistics.median(ratios):.2f}" if ratios else "-",
        f"{min(ratios):.2f}..{max(ratios):.2f}" if ratios else "-",
        f"{statistics.median(ranges):.3f}" if ranges else "-",
        f"{statistics.median(t.peak_bytes for t in trials) / 1e6:.0f}",
        f"{statistics.median(t.import_s for t in trials):.2f}",
        f"{statistics.median(t.process_s for t in trials):.2f}",
        "-" if trials[0].tensors is None else str(trials[0].tensors),
        "; ".join(notes),
    ]


def to_json(rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return every raw figure in order, and medians; null where there is no result."""
    limits = _limits(rows)
    results = []
    for row in rows:
        ratios = row.ratios(limits.get(row.images))
        trials = row.trials
        results.append(
            {
                "contender": row.contender.name,
                "images": row.images,
                "outcome": "measurement" if trials else "failed",
                "reason": row.reason or None,
                "included": row.contender.included,
                "versions": trials[0].versions if trials else {},
                "tensors": trials[0].tensors if trials else None,
                "n": len(trials),
                "seconds": statistics.median(t.total_s for t in trials) if trials else None,
                "peak_rss_bytes": statistics.median(t.peak_bytes for t in trials) if trials else None,
                "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                if ratios
                else None,
                "trials": [
                    {
                        "round": t.round,
                        "seconds": t.seconds,
                        "process_s": t.process_s,
                        "peak_rss_bytes": t.peak_rss_bytes,
                    }
                    for t in trials
                ],
            }
        )
    return {
        "schema": 1,
        "machine": fingerprint.machine(),
        "stack": fingerprint.stack(),
        **settings,
        "results": results,
    }


def footer(rows: Sequence[Row], threads: int, busy: float) -> str:
    """Return what the table was measured with."""
    machine, stack = fingerprint.machine(), fingerprint.stack()
    versions = {d: v for row in rows for t in row.trials for d, v in t.versions.items()}
    listed = ", ".join(f"{d} {v}" for d, v in sorted(versions.items()))
    return (
        f"\nmedians over n rounds; seconds without imports; peak MB is VmHWM with imports (1 MB = 10^6 bytes)\n"
        f"{machine['cpu_model']}, {threads} CPUs, load {busy:.1f} at the start, {stack['kernel']}, "
        f"Python {stack['python']}\n{listed}"
    )
