"""Raw samples as CSV and Parquet: one row per inference."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.saved import ProcessSamples, SavedResult

COLUMNS = (
    "artifact", "backend", "precision", "target", "process", "index", "wall_ns", "cpu_ns", "device_ns", "outcome",
    "reason",
)  # fmt: skip
"""process and index count from 0, in order. A cell without a measurement is one row with its outcome and reason."""

_TEXTS = ("artifact", "backend", "precision", "target")


def write_csv(results: Sequence[SavedResult], path: Path) -> None:
    """Write the samples as CSV (RFC 4180, UTF-8, with a header); what is absent is an empty field."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for result in results:
            entry = result.result
            texts = [entry[key] for key in _TEXTS]
            ending = [entry["outcome"], entry.get("reason") or ""]
            if not result.measured:
                writer.writerow([*texts, *[""] * 5, *ending])
                continue
            for process in result.processes:
                writer.writerows(_rows(texts, process, ending))


def _rows(texts: list[str], process: ProcessSamples, ending: list[str]) -> Iterator[list[Any]]:
    clocks = [
        [""] * process.wall_ns.size if clock is None else clock.tolist()
        for clock in (process.wall_ns, process.cpu_ns, process.device_ns)
    ]
    for index, times in enumerate(zip(*clocks, strict=True)):
        yield [*texts, process.number, index, *times, *ending]


def write_parquet(results: Sequence[SavedResult], path: Path) -> None:
    """Write the samples as Parquet: texts as dictionaries, counts and times as int64; what is absent is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.dictionary(pa.int32(), pa.string())
    integers = ("process", "index", "wall_ns", "cpu_ns", "device_ns")
    schema = pa.schema([(name, pa.int64() if name in integers else text) for name in COLUMNS])
    with pq.ParquetWriter(path, schema) as writer:
        for result in results:
            for n, block in _blocks(result):
                columns = [_column(block[f.name], n, f.type, text) for f in schema]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _column(value: Any, n: int, kind: Any, text: Any) -> Any:
    """Return an Arrow array of *n* rows: an array as it is, or one value (None: null) for all of them."""
    import pyarrow as pa

    if isinstance(value, np.ndarray):
        return pa.array(value, kind)
    if value is None:
        return pa.nulls(n, kind)
    return pa.repeat(pa.scalar(value, pa.string() if kind == text else kind), n).cast(kind)


def _blocks(result: SavedResult) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of one process at a time: how many, and per column an array int64[n] or what all rows share."""
    entry = result.result
    common = {**{k: entry[k] for k in _TEXTS}, "outcome": entry["outcome"], "reason": entry.get("reason")}
    if not result.measured:
        yield 1, {**common, **dict.fromkeys(("process", "index", "wall_ns", "cpu_ns", "device_ns"))}
        return
    for p in result.processes:
        n = p.wall_ns.size
        times = {"wall_ns": p.wall_ns, "cpu_ns": p.cpu_ns, "device_ns": p.device_ns}
        yield n, {**common, "process": p.number, "index": np.arange(n, dtype=np.int64), **times}
