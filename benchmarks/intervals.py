"""Coverage of the paired intervals of ``--eval``: ``python -m benchmarks.intervals``.

Right or wrong outcomes: exact, by summing the multinomial probability of every count of discordant samples whose
interval holds the true difference; for the interval in use (Tango's score), beside Wald's and Bonett and Price's.
Real-valued metrics: simulated with a fixed seed; Student's t with one made-up pair (in use), plain t, and percentile
bootstrap. ``--quick`` leaves out n = 1000 and runs fewer simulations; ``--json`` prints the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from portcall.bench.paired import mean_interval, score_interval
from portcall.bench.report import align
from portcall.bench.statistics import student_t_quantile

SIZES = (100, 300, 1000)
DROPS = (0.0, 0.01, 0.03)
DISCORDANCES = (0.02, 0.03, 0.05, 0.1)
Z95 = 1.959963984540054
Interval = tuple[float, float]


def wald(lost: int, gained: int, n: int) -> Interval:
    """Return the textbook interval of a paired difference of proportions."""
    return _normal(lost, gained, n, 0)


def bonett_price(lost: int, gained: int, n: int) -> Interval:
    """Return the adjusted Wald interval: one sample is added to each discordant count."""
    return _normal(lost, gained, n, 1)


def _normal(lost: int, gained: int, n: int, added: int) -> Interval:
    total = n + 2 * added
    p, q = (gained + added) / total, (lost + added) / total
    half = Z95 * math.sqrt(max(0.0, (p + q - (p - q) ** 2) / total))
    return p - q - half, p - q + half


BINARY: dict[str, Callable[[int, int, int], Interval]] = {
    "score": score_interval,
    "wald": wald,
    "bonett-price": bonett_price,
}


def binary_rows(sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the exact coverage for every n, drop and discordance that can be (a drop needs as much discordance)."""
    for n in sizes:
        known: dict[tuple[int, int], dict[str, Interval]] = {}
        for discordance in DISCORDANCES:
            for drop in DROPS:
                if drop > discordance + 1e-12:
                    continue
                lost, gained = (discordance + drop) / 2, max(0.0, (discordance - drop) / 2)
                coverage = dict.fromkeys(BINARY, 0.0)
                width = 0.0
                for b, c, weight in _outcomes(n, lost, gained):
                    if (b, c) not in known:
                        known[b, c] = {name: interval(b, c, n) for name, interval in BINARY.items()}
                    for name, (low, high) in known[b, c].items():
                        coverage[name] += weight * (low - 1e-9 <= -drop <= high + 1e-9)
                    width += weight * (known[b, c]["score"][1] - known[b, c]["score"][0]) / 2
                yield {"n": n, "drop": drop, "discordance": discordance, "half_width": width, **coverage}


def _outcomes(n: int, lost: float, gained: float) -> Iterator[tuple[int, int, float]]:
    """Yield every (b, c) of the multinomial that weighs more than 1e-10."""

    def logs(count: int, share: float) -> float:
        return 0.0 if count == 0 else (count * math.log(share) if share > 0 else -math.inf)

    for b in range(n + 1):
        for c in range(n - b + 1):
            rest = n - b - c
            if abs(b - n * lost) > 8 * math.sqrt(n * lost + 1) or abs(c - n * gained) > 8 * math.sqrt(
                n * gained + 1
            ):
                continue
            weight = math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1) - math.lgamma(rest + 1)
            weight += logs(b, lost) + logs(c, gained) + logs(rest, 1 - lost - gained)
            if weight > -23:
                yield b, c, math.exp(weight)


def _dense(rng: np.random.Generator, n: int, drop: float) -> np.ndarray:
    return rng.normal(-drop, 0.05, n)


def _skewed(rng: np.random.Generator, n: int, drop: float) -> np.ndarray:
    return 0.05 - drop - rng.exponential(0.05, n)


def _sparse(share: float) -> Callable[[np.random.Generator, int, float], np.ndarray]:
    def draw(rng: np.random.Generator, n: int, drop: float) -> np.ndarray:
        """*share* of the samples differ, by up to 1: mean -drop."""
        size = rng.uniform(0.2, 1.0, n)  # mean 0.6
        sign = np.where(rng.random(n) < (1 + drop / (0.6 * share)) / 2, -1.0, 1.0)
        return np.where(rng.random(n) < share, size * sign, 0.0)

    return draw


def plain_t(differences: np.ndarray) -> Interval:
    """Return Student's t interval of the mean."""
    n = differences.size
    half = student_t_quantile(0.975, n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    return float(differences.mean()) - half, float(differences.mean()) + half


def bootstrap(differences: np.ndarray, rng: np.random.Generator, draws: int = 500) -> Interval:
    """Return the percentile bootstrap interval of the mean."""
    picks = rng.integers(0, differences.size, (draws, differences.size))
    low, high = np.quantile(differences[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def real_rows(sizes: Sequence[int], runs: int) -> Iterator[dict[str, Any]]:
    """Yield the simulated coverage for metrics that give real numbers."""
    shapes = {"normal": _dense, "skewed": _skewed} | {
        f"{share:.0%} of samples differ": _sparse(share) for share in (0.02, 0.03, 0.05, 0.1)
    }
    for name, draw in shapes.items():
        for n in sizes:
            for drop in DROPS:
                if name[0].isdigit() and drop > 0.6 * float(name.split("%")[0]) / 100:
                    continue
                rng = np.random.default_rng([n, round(drop * 100), len(name)])
                hits = {"adjusted t": 0, "plain t": 0, "bootstrap": 0}
                boots = max(1, runs // 10)
                for run in range(runs):
                    differences = draw(rng, n, drop)
                    adjusted = mean_interval(differences, 1.0)
                    assert adjusted is not None
                    hits["adjusted t"] += adjusted[0] <= -drop <= adjusted[1]
                    low, high = plain_t(differences)
                    hits["plain t"] += low <= -drop <= high
                    if run < boots:
                        low, high = bootstrap(differences, rng)
                        hits["bootstrap"] += low <= -drop <= high
                shares = {k: v / (boots if k == "bootstrap" else runs) for k, v in hits.items()}
                yield {"differences": name, "n": n, "drop": drop, **shares}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables and the lowest coverage of the intervals in use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sizes, runs = (SIZES[:2], 1000) if options.quick else (SIZES, 4000)
    binary, real = list(binary_rows(sizes)), list(real_rows(sizes, runs))
    if options.json:
        json.dump({"binary": binary, "real": real}, sys.stdout, indent=2)
        print()
        return
    for title, rows, used in (
        ("0/1 outcomes, exact coverage in %", binary, "score"),
        (f"real-valued differences, coverage in % over {runs} simulations", real, "adjusted t"),
    ):
        print(title)
        print(
            align(
                [k.replace("_", " ") for k in rows[0]], [[_shown(k, v) for k, v in r.items()] for r in rows]
            )
        )
        print(f"lowest of {used!r}: {min(r[used] for r in rows):.2%}\n")


def _shown(key: str, value: Any) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
