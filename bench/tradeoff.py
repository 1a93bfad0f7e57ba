"""Size, latency and accuracy of artifacts beside each other, and which of them no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from portcall.bench.saved import SavedResult, names


@dataclass(frozen=True, slots=True)
class Point:
    """One measured artifact. interval: of the accuracy, 95 %, or None. samples: that latency, and that accuracy, have.
    front: no other artifact is at least as good
    in size, latency and accuracy, and better in one of them."""

    name: str
    p50_ns: float
    p50_interval_ns: tuple[float, float] | None
    size_bytes: float
    accuracy: float
    interval: tuple[float, float] | None
    samples: tuple[int, int]
    front: bool


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """axis: what the accuracy is, with its unit. left_out: (name, why) of each result that has no point."""

    axis: str
    points: tuple[Point, ...]
    left_out: tuple[tuple[str, str], ...]


def tradeoff(results: Sequence[SavedResult]) -> Tradeoff:
    """Return the points of *results* on one accuracy axis: the first of these that any of them has.

    The metric of ``--eval`` (top-1 in %, or the user's own), agreement with the source in %, SQNR in dB. Results that
    lack that one are left out with the reason: two metrics on one axis would compare nothing.
    """
    axis, found = _axis(results)
    points: list[Point] = []
    left_out = []
    for name, result, accuracy in zip(names(results), results, found, strict=True):
        p50, size = result.number("latency", "p50_ns"), result.number("size_bytes")
        if not result.measured:
            left_out.append((name, f"{result.result['outcome']}: {result.get('reason')}"))
        elif p50 is None or size is None:
            left_out.append((name, f"n={result.latency['n']}: no P50" if p50 is None else "size unknown"))
        elif accuracy is None:
            left_out.append((name, f"no {axis}" if axis else "no accuracy: neither --eval nor parity"))
        else:
            value, interval, n = accuracy
            if result.get("parity", "interpreted"):
                name += " (accuracy by an interpreter)"
            points.append(
                Point(
                    name,
                    p50,
                    result.interval("p50_ns"),
                    size,
                    value,
                    interval,
                    (result.latency["n"], n),
                    False,
                )
            )
    kept = pareto_front([(p.p50_ns, p.size_bytes, -p.accuracy) for p in points])
    marked = (
        Point(p.name, p.p50_ns, p.p50_interval_ns, p.size_bytes, p.accuracy, p.interval, p.samples, front)
        for p, front in zip(points, kept, strict=True)
    )
    return Tradeoff(axis, tuple(marked), tuple(left_out))


def pareto_front(costs: Sequence[tuple[float, ...]]) -> list[bool]:
    """Return per point whether none dominates it: at most its cost in every coordinate, and less in one.

    Points with the same costs are all on the front.
    """

    def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [not any(dominates(other, cost) for other in costs) for cost in costs]


_Accuracy = tuple[float, tuple[float, float] | None, int]


def _axis(results: Sequence[SavedResult]) -> tuple[str, list[_Accuracy | None]]:
    metrics = [
        r.get("eval", "metric") for r in results if r.measured and r.number("eval", "value") is not None
    ]
    if metrics:
        metric = metrics[0]
        percent = metric == "top1"
        axis = "top-1 accuracy, %" if percent else str(metric).rpartition(":")[2]
        scale = 100.0 if percent else 1.0
        return axis, [_scored(r, scale) if r.get("eval", "metric") == metric else None for r in results]
    for key, axis, scale in (
        ("agreement", "agreement with the source, %", 100.0),
        ("sqnr_db", "SQNR against the source, dB", 1.0),
    ):
        values = [_parity(r, key, scale) for r in results]
        if any(v is not None for v in values):
            return axis, values
    return "", [None] * len(results)


def _scored(result: SavedResult, scale: float) -> _Accuracy | None:
    """Return the score on --eval; its interval is that of the paired difference, put on the source's score."""
    value, reference = result.number("eval", "value"), result.number("eval", "reference")
    if value is None:
        return None
    ends = result.get("eval", "ci95")
    interval = None
    if reference is not None and isinstance(ends, list) and len(ends) == 2:
        interval = (scale * (reference + ends[0]), scale * (reference + ends[1]))
    return scale * value, interval, int(result.number("eval", "n") or 0)


def _parity(result: SavedResult, key: str, scale: float) -> _Accuracy | None:
    value = result.number("parity", key)
    return None if value is None else (scale * value, None, int(result.number("parity", "n") or 0))
