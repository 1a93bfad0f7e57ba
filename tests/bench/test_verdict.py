"""Ratios of pairs, and the verdicts that follow from their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from portcall.bench.verdict import (
    Pair,
    Ratio,
    Verdict,
    judge,
    p50_ratio,
    percentile_ratio,
    smallest_effect,
)


def made_pairs(count: int, ratio: float, drift: float = 0.0, turns: int = 20, burst: int = 5) -> list[Pair]:
    """Return pairs whose two sides share a drift from turn to turn; *ratio* is candidate / base."""
    rng = np.random.default_rng(3)
    pairs = []
    for _ in range(count):
        level = 5e6 * np.exp(drift * rng.standard_normal((turns, 1)))
        base, candidate = (level * np.exp(0.01 * rng.standard_normal((turns, burst))) for _ in range(2))
        pairs.append(Pair(base, ratio * candidate, base, ratio * candidate))
    return pairs


def test_drift_that_both_sides_share_cancels() -> None:
    steady, drifting = (p50_ratio(made_pairs(8, 1.05, drift)) for drift in (0.0, 0.5))
    for ratio in (steady, drifting):
        assert math.exp(ratio.center) == pytest.approx(1.05, rel=0.01)
    assert np.std(drifting.values) < 2 * np.std(steady.values)


def test_one_value_per_pair_is_the_unit() -> None:
    assert len(p50_ratio(made_pairs(4, 1.0)).values) == 4
    assert p50_ratio(made_pairs(2, 1.0)).interval is None


@pytest.mark.parametrize(
    ("interval", "verdict", "clear"),
    [
        ((-0.02, 0.02), Verdict.UNCHANGED, Verdict.UNCHANGED),
        ((0.04, 0.06), Verdict.REGRESSED, Verdict.REGRESSED),
        ((0.01, 0.09), Verdict.REGRESSED, Verdict.INCONCLUSIVE),
        ((-0.01, 0.11), Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        ((0.005, 0.035), Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        ((0.001, 0.02), Verdict.UNCHANGED, Verdict.UNCHANGED),
        ((-0.06, -0.04), Verdict.IMPROVED, Verdict.IMPROVED),
        ((-0.09, -0.01), Verdict.IMPROVED, Verdict.INCONCLUSIVE),
        ((-0.5, 0.5), Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts_at_a_margin_of_three_percent(
    interval: tuple[float, float], verdict: Verdict, clear: Verdict
) -> None:
    ratio = Ratio([sum(interval) / 2], interval)
    assert judge(ratio, 0.03) == verdict
    assert judge(ratio, 0.03, clear=True) == clear


def test_without_an_interval_nothing_is_said() -> None:
    assert judge(Ratio([0.5, 0.5], None), 0.03) == Verdict.INCONCLUSIVE
    assert smallest_effect(Ratio([0.5, 0.5], None), 0.03) is None


def test_the_smallest_effect_is_found_in_about_four_of_five_runs() -> None:
    rng = np.random.default_rng(5)
    pairs, spread, found = 8, 0.03, 0
    from portcall.bench.sequential import sequential_half_width, sequential_interval

    needed = sequential_half_width(pairs) * spread + 0.8416 * spread / math.sqrt(pairs)
    for _ in range(1000):
        values = needed + spread * rng.standard_normal(pairs)
        found += judge(Ratio(list(values), sequential_interval(values)), 0.03) == Verdict.REGRESSED
    assert 0.7 < found / 1000 < 0.9
    values = spread * rng.standard_normal(1000)
    effects = [
        smallest_effect(Ratio(list(v), sequential_interval(v)), 0.03) for v in values.reshape(-1, pairs)
    ]
    assert np.median([e for e in effects if e is not None]) == pytest.approx(math.expm1(needed), rel=0.15)


def test_a_percentile_that_n_does_not_support_is_absent() -> None:
    assert percentile_ratio(made_pairs(2, 1.0, turns=5), 0.99) is None
    assert percentile_ratio([], 0.5) is None


def test_percentiles_have_one_value_per_group_of_pairs_that_supports_them() -> None:
    pairs = made_pairs(11, 1.2, turns=6)  # 30 inferences a side: P95 needs 59, two pairs
    ratio = percentile_ratio(pairs, 0.95)
    assert ratio is not None and ratio.interval is not None
    base, candidate = (
        np.quantile(np.concatenate([x.ravel() for x in side]), 0.95)
        for side in ([p.base for p in pairs[2:4]], [p.candidate for p in pairs[2:4]])
    )
    assert len(ratio.values) == 5
    assert ratio.values[1] == pytest.approx(math.log(candidate / base))
    assert ratio.interval[0] < math.log(1.2) < ratio.interval[1]


def test_heavy_tails_raise_no_alarm_however_often_one_looks() -> None:
    """Two alike sides, of which one turn in twelve takes many times as long."""
    rng = np.random.default_rng(11)
    runs, alarms = 100, 0
    for _ in range(runs):
        pairs = []
        for _ in range(24):
            sides = []
            for _ in range(2):
                slow = 1 + (rng.random((30, 1)) < 1 / 12) * rng.pareto(1.1, (30, 1))
                sides.append(5e6 * slow * np.exp(0.02 * rng.standard_normal((30, 2))))
            pairs.append(Pair(*sides, *sides))
        ratios = [percentile_ratio(pairs[:n], 0.95) for n in range(1, len(pairs) + 1)]
        alarms += any(
            r is not None and judge(r, 0.03) in (Verdict.REGRESSED, Verdict.IMPROVED) for r in ratios
        )
    assert alarms / runs <= 0.05
