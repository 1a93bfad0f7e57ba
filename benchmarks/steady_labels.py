"""Proposes labels for recorded series, with hindsight: ``python -m benchmarks.steady_labels`` prints them as JSON.

The rule: medians of blocks of 50 ms (at least 3 inferences), in logarithms; the whole recording is cut into levels so
that the sum of absolute deviations plus a price per level is least (dynamic programming, exact). The price is 4 times
the typical difference of neighbouring blocks, at least 0.12; a level lasts at least 3 blocks. Neighbouring levels that
differ by less than 5 % are one. It sees all 4 seconds at once and shares nothing with the detector, which sees the past
alone. Its output was looked at block by block, changed where that file says so, and committed as ``steady_labels.json``
before the detector was run.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steady_recordings import load_packed

LABELS = Path(__file__).parent / "steady_labels.json"
BLOCK_NS = 50_000_000
SAME = 0.05
LEAST_BLOCKS = 3

LABELLED = [
    *(
        f"{b}-{s}-{c}-1"
        for b in ("onnxruntime", "openvino", "tflite")
        for s in ("l", "xl", "xxl")
        for c in ("quiet", "load")
    ),
    "openvino-s-quiet-1",
    "openvino-m-quiet-1",
]
"""The 20 recordings that are labelled; the others are for splicing."""


def blocks(series: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the start in seconds and the median in ns of each block."""
    ends = np.cumsum(series)
    starts, medians, first = [], [], 0
    while first < series.size:
        begin = ends[first] - series[first]
        last = max(first + 3, int(np.searchsorted(ends, begin + BLOCK_NS)) + 1)
        if series.size - last < 3:
            last = series.size
        starts.append(begin / 1e9)
        medians.append(float(np.median(series[first:last])))
        first = last
    return np.array(starts), np.array(medians)


def levels(series: np.ndarray[Any, Any]) -> list[tuple[float, float]]:
    """Return (from second, level in ns) of each stretch of the series, by the rule above."""
    starts, medians = blocks(series)
    logs = np.log(medians)
    n = logs.size
    price = max(0.12, 4 * float(np.median(np.abs(np.diff(logs))))) if n > 1 else 0.12
    cost = np.full((n, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            if j - i >= LEAST_BLOCKS or (i == 0 and j == n):
                part = logs[i:j]
                cost[i, j] = float(np.abs(part - np.median(part)).sum())
    best, cut = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
    best[0] = 0.0
    for j in range(1, n + 1):
        totals = best[:j] + cost[:j, j] + price
        cut[j] = int(np.argmin(totals))
        best[j] = totals[cut[j]]
    ends = [n]
    while ends[-1] > 0:
        ends.append(int(cut[ends[-1]]))
    edges = ends[::-1]
    found: list[tuple[int, int]] = []
    for i, j in pairwise(edges):
        if found and abs(np.median(logs[slice(*found[-1])]) - np.median(logs[i:j])) < SAME:
            found[-1] = (found[-1][0], j)
        else:
            found.append((i, j))
    return [(round(float(starts[i]), 3), round(float(np.exp(np.median(logs[i:j]))), 1)) for i, j in found]


def main() -> None:
    recordings = load_packed()
    print(json.dumps({name: levels(recordings[name]) for name in LABELLED}, indent=1))


if __name__ == "__main__":
    main()
