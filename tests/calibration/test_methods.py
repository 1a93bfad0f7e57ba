"""Ranges from histograms, held to the published algorithms written out in plain loops, and to explicit quantization.

Long because the four methods share the histograms that they are tried on, and are compared with one another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from portcall.calibration.histogram import Accumulator, Array, Histogram
from portcall.calibration.methods import (
    METHODS,
    SCALES,
    check_method,
    derive,
    entropy,
    minmax,
    mse,
    percentile,
)
from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import BadInput

Method = Callable[[Histogram, bool, int], tuple[float, float]]
ALL: tuple[Method, ...] = (minmax, percentile, entropy, mse)


def observe(values: Array, step: int = 1) -> Histogram:
    accumulator = Accumulator(step)
    accumulator.add(np.asarray(values, np.float32))
    return accumulator.histogram()


def bins_of(values: Array, bins: int) -> Histogram:
    """Return a histogram of about *bins* bins (half to all of them): small enough for plain loops."""
    low, high = float(values.min()), float(values.max())
    exponent = math.ceil(math.log2(max(high - low, 1e-3) / (bins - 1)))
    index = np.floor(values * 2.0**-exponent).astype(np.int64)
    first = int(index.min())
    return Histogram(exponent, first, np.bincount(index - first), low, high)


def one_sided(kind: str, r: np.random.Generator) -> Array:
    n = int(10 ** r.uniform(2.5, 5))
    normal = np.abs(r.normal(0, 1, n))
    if kind == "half-normal":
        return normal
    if kind == "Laplace":
        return np.abs(r.laplace(0, 1, n))
    if kind == "bimodal":
        return np.abs(np.append(r.normal(0.5, 0.3, n), r.normal(r.uniform(3, 6), 0.5, n)))
    if kind == "gaps":
        return np.asarray(r.choice(np.abs(r.laplace(0, 1, 90)), n))
    if kind == "spikes":
        return np.concatenate([normal, np.full(n // 3, 1.3), np.full(n // 9, 2.9), np.zeros(n)])
    assert kind == "ReLU6"
    return np.asarray(np.clip(r.normal(1, 2.5, n), 0, 6))


def two_sided(kind: str, r: np.random.Generator) -> Array:
    n = int(10 ** r.uniform(3, 5))
    if kind == "normal":
        return r.normal(r.uniform(-1, 1), 1, n)
    if kind == "heavy":
        return np.clip(r.standard_t(3, n), -30, 20)
    if kind == "skewed":
        return r.exponential(1, n) * np.where(r.random(n) < 0.8, 1, -0.3)
    if kind == "ends":
        return np.asarray(r.choice([-1.03, 0.4, 2.71], n)) + r.uniform(-0.05, 0.05, n)
    assert kind == "signed gaps"
    return np.asarray(r.choice(r.laplace(0, 1, 120), n))


def relu(seed: int, n: int = 100_000) -> Array:
    return np.maximum(np.random.default_rng(seed).normal(0, 1, n), 0)


# ---- what holds for every method


ODD: dict[str, Histogram] = {
    "ReLU": observe(relu(1)),
    "negative": observe(-relu(2) - 0.25),
    "signed": observe(np.random.default_rng(3).standard_t(4, 100_000) + 0.5),
    "far from zero": observe(np.random.default_rng(4).uniform(1000, 1000.01, 5000)),
    "away from zero": observe(np.random.default_rng(4).uniform(5, 10, 20_000)),
    "away below zero": observe(np.random.default_rng(4).uniform(-9, -7, 20_000)),
    "two values": observe(np.array([-0.5, 3.0])),
    "mask": observe(np.repeat([0.0, 1.0], [30_000, 10])),
    "huge": observe(np.random.default_rng(5).normal(0, 8e37, 5000)),
    "subnormal": observe(np.array([0, 1e-42, 3e-42])),
    "subnormal, signed": observe(np.array([-2e-42, 1e-42, 3e-42])),
    "sentinel": observe(np.concatenate([np.random.default_rng(6).normal(0, 1, 5000), [-1e9]])),
    "extremes not counted": observe(np.concatenate([relu(7, 7000), [0, 9.0]]), 7),
    "only zeros counted": observe(np.tile([0, 0, 0, 2.0], 500), 4),
    "barely negative": observe(np.concatenate([relu(8), [-1e-4]])),
    "barely positive": observe(np.concatenate([-relu(8), [1e-4]])),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("kind", ODD)
def test_ranges_are_valid_and_hold_nothing_that_was_not_observed(
    kind: str, method: Method, bits: int
) -> None:
    h = ODD[kind]
    counts = h.counts.copy()
    low, high = method(h, False, bits)
    assert min(h.minimum, 0) <= low <= 0 <= high <= max(h.maximum, 0)
    assert low < high
    low, high = method(h, True, bits)
    assert low == -high
    assert 0 < high <= max(-h.minimum, h.maximum)
    assert np.array_equal(h.counts, counts)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("values", [[0.0], [0.0] * 9, [3.5], [3.5] * 9, [-2.0], [1e-42], [-3e38]])
def test_constant_tensors_get_their_minmax(method: Method, values: list[float]) -> None:
    h = observe(np.array(values))
    assert method(h, False, 8) == (min(h.minimum, 0), max(h.maximum, 0))
    assert method(h, True, 8) == (-abs(h.maximum), abs(h.maximum))
    assert math.copysign(1, method(h, True, 8)[0]) == (-1 if values[0] else 1)  # no -0.0 in a file


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_more_than_8_bits_are_minmax(method: Method, symmetric: bool) -> None:
    h = ODD["signed"]
    assert method(h, symmetric, 16) == minmax(h, symmetric)
    assert (method(h, symmetric, 8) == minmax(h, symmetric)) == (method is minmax)


def test_minmax() -> None:
    assert minmax(observe(np.array([0.25, 2]))) == (0, 2)
    assert minmax(observe(np.array([-2, -0.25]))) == (-2, 0)
    assert minmax(observe(np.array([-3, 0.5]))) == (-3, 0.5)
    assert minmax(observe(np.array([-3, 0.5])), symmetric=True) == (-3, 3)


# ---- percentile


@pytest.mark.parametrize("q", [60, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("n", [2, 3, 30, 1000, 70_000])
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed", "signed gaps"])
def test_percentiles_are_within_a_bin_of_those_of_the_values(kind: str, n: int, q: float) -> None:
    values = two_sided(kind, np.random.default_rng(n)).astype(np.float32)[:n]
    h = observe(values)
    exact = values.astype(np.float64)
    low, high = np.percentile(exact, [(100 - q) / 2, 100 - (100 - q) / 2])
    found = percentile(h, q=q)
    assert found == pytest.approx((min(low, 0), max(high, 0)), abs=h.width, rel=0)
    assert percentile(h, True, q=q)[1] == pytest.approx(np.percentile(np.abs(exact), q), abs=h.width, rel=0)


def test_percentiles_of_one_sign_keep_zero() -> None:
    assert percentile(observe(relu(1) + 1))[0] == 0
    assert percentile(observe(-relu(1) - 1))[1] == 0


def test_percentile_100_is_minmax() -> None:
    assert percentile(ODD["signed"], q=100) == minmax(ODD["signed"])
    assert percentile(ODD["signed"], True, q=100) == minmax(ODD["signed"], True)


def test_percentile_interpolates_within_a_bin() -> None:
    """99 values in [1, 2) and one at 4: those of the bin are taken as evenly spread, the first at 1 + 0.5 / 99."""
    h = Histogram(0, 1, np.array([99, 0, 0, 1]), 1.0, 4.0)
    assert percentile(h, q=100 * 60 / 99, symmetric=True)[1] == pytest.approx(1 + 60.5 / 99)
    assert percentile(h, q=100 * 98.25 / 99, symmetric=True)[1] == pytest.approx(
        0.75 * (1 + 98.5 / 99) + 0.25 * 4
    )


# ---- entropy


def naive_divergence(bins: list[int], low: int, high: int, levels: int) -> float:
    """Return KL(P || Q) of keeping bins [low, high): the published algorithm, step by step."""
    p = [float(c) for c in bins[low:high]]
    p[0] += sum(bins[:low])
    p[-1] += sum(bins[high:])
    n = high - low
    members: list[list[int]] = [[] for _ in range(levels)]
    for k in range(n):
        members[k * levels // n].append(k)
    q = [0.0] * n
    for level in members:
        filled = [k for k in level if bins[low + k] > 0]
        for k in filled:
            q[k] = sum(bins[low + i] for i in filled) / len(filled)
    p_sum, q_sum, divergence = sum(p), sum(q), 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0 and b == 0:
            return math.inf
        if a > 0:
            divergence += a / p_sum * math.log(a / p_sum / (b / q_sum))
    return divergence


def naive_winner(bins: list[int], levels: int, keep: float) -> int:
    """Return the m of least divergence, and of equal ones the largest; *keep*: the least share inside."""
    bins = [bins[1], *bins[1:]]
    best, winner = math.inf, 0
    for m in range(levels, len(bins) + 1):
        if sum(bins[:m]) >= keep * sum(bins):
            divergence = naive_divergence(bins, 0, m, levels)
            if divergence <= best:
                best, winner = divergence, m
    return winner


def from_zero(h: Histogram) -> list[int]:
    """Return the counts of |x| from bin 0 on."""
    counts = [0] * max(h.first + len(h.counts), -h.first)
    for i, c in enumerate(h.counts.tolist()):
        k = h.first + i
        counts[k if k >= 0 else -k - 1] += c
    return counts


def threshold(h: Histogram, m: int) -> float:
    return min((m + 0.5) * h.width, max(-h.minimum, h.maximum))


KINDS = ("half-normal", "Laplace", "bimodal", "gaps", "spikes", "ReLU6")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_takes_the_bin_of_the_published_algorithm(kind: str, seed: int) -> None:
    r = np.random.default_rng([seed, *kind.encode()])
    h = bins_of(one_sided(kind, r), int(r.integers(320, 520)))
    bins = from_zero(h)
    assert entropy(h) == (0, threshold(h, naive_winner(bins, 255, 0)) if len(bins) >= 255 else h.maximum)
    assert entropy(h, True)[1] == threshold(h, naive_winner(bins, 128, 0))
    # With few levels nearly every candidate clips something, and each level holds many bins.
    assert entropy(h, bits=5) == (0, threshold(h, naive_winner(bins, 31, 0)))
    assert entropy(h, True, bits=5)[1] == threshold(h, naive_winner(bins, 16, 0))


def test_entropy_of_those_histograms_clips() -> None:
    """The agreement above would say little if the winner were mostly the last bin."""
    made = [
        bins_of(one_sided(kind, np.random.default_rng([s, 7])), 400) for kind in KINDS[:3] for s in range(4)
    ]
    assert sum(entropy(h, True)[1] < h.maximum for h in made) >= 8


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed", "signed gaps"])
def test_symmetric_entropy_folds_the_signs(kind: str) -> None:
    h = bins_of(two_sided(kind, np.random.default_rng(9)), 500)
    assert entropy(h, True, bits=7)[1] == threshold(h, naive_winner(from_zero(h), 64, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_of_negative_values_mirrors(kind: str) -> None:
    values = (
        one_sided(kind, np.random.default_rng(10)) + 2**-20
    )  # no value on an edge, where mirrored bins differ
    assert entropy(bins_of(-values, 500)) == (-entropy(bins_of(values, 500))[1], 0)


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed", "signed gaps"])
@pytest.mark.parametrize("seed", range(3))
def test_moving_one_end_of_a_two_sided_range_improves_nothing(kind: str, seed: int) -> None:
    h = bins_of(two_sided(kind, np.random.default_rng([seed, 11])), 200)
    h = replace(h, minimum=float(h.edges[0]), maximum=float(h.edges[-1]))  # so that a limit tells its bin
    low, high = entropy(h, bits=5)
    zero, bins = -h.first, h.counts.tolist()
    bins[zero] = bins[zero + 1]
    start = 0 if low == h.minimum else zero + round(low / h.width + 0.5)
    stop = len(bins) if high == h.maximum else zero + round(high / h.width - 0.5)
    half = sum(bins) / 2
    least = naive_divergence(bins, start, stop, 31)
    others = [(s, stop) for s in range(zero + 1)] + [(start, s) for s in range(zero + 1, len(bins) + 1)]
    kept = [(s, t) for s, t in others if t - s >= 31 and sum(bins[s:t]) >= half]
    assert least <= min(naive_divergence(bins, s, t, 31) for s, t in kept) + 1e-12
    assert least <= naive_divergence(bins, 0, len(bins), 31)
    assert (start, stop) != (0, len(bins))


def test_exact_zeros_do_not_move_the_entropy_range() -> None:
    """What a ReLU leaves is half zeros; a search that sees them clips far too much."""
    h = observe(relu(13))
    more = replace(h, counts=np.concatenate([[h.counts[0] + 10**9], h.counts[1:]]))
    assert entropy(h) == entropy(more)
    assert entropy(h, True) == entropy(more, True)
    assert entropy(h)[1] > 0.7 * h.maximum


@pytest.mark.parametrize("kind", ["away from zero", "away below zero"])
def test_entropy_keeps_half_where_the_published_search_clips_nearly_all(kind: str) -> None:
    values = 5 + 5 * np.random.default_rng(14).random(3000)
    h = bins_of(values if kind == "away from zero" else -values, 220)
    bins = from_zero(h)
    published = threshold(h, naive_winner(bins, 16, 0))
    assert (values > published).mean() > 0.95
    found = entropy(h, True, bits=5)[1]
    assert found == threshold(h, naive_winner(bins, 16, 0.5))
    assert (values > found).mean() < 0.05


def test_discrete_values_that_fit_the_levels_are_not_clipped() -> None:
    """Every divergence is zero then, up to rounding: the widest candidate wins."""
    for more in np.random.default_rng(14).integers(5000, 10**6, 50).tolist():
        h = observe(np.array([5.0, 10.0]))
        counts = np.where(h.counts > 0, 4000, 0)
        counts[0] = more
        assert entropy(replace(h, counts=counts)) == (0, 10)
        assert entropy(replace(h, counts=counts), True) == (-10, 10)


@pytest.mark.parametrize(("bins", "width"), [(2048, 1), (4095, 1), (4096, 2), (8190, 2), (8192, 4)])
def test_entropy_searches_at_least_2048_bins(bins: int, width: int) -> None:
    """A limit lies in the middle of a bin: m + 0.5 times its width."""
    index = np.append(
        np.abs(np.random.default_rng(15).laplace(0, bins / 25, 9000)).astype(np.int64), bins - 1
    )
    limit = entropy(Histogram(0, 0, np.bincount(index), 0.0, float(bins)))[1]
    assert limit < bins - 1
    assert limit / width % 1 == 0.5


@pytest.mark.parametrize("first", [0, -2000, -4097])
def test_entropy_merges_large_histograms_by_powers_of_two(first: int) -> None:
    """About 8000 bins, and the same values in half as many, give the same range."""
    r = np.random.default_rng(15)
    spread = np.abs(r.laplace(0, 800, 40_000)).astype(np.int64)
    index = spread * (r.choice([1, -1], 40_000) if first else 1)
    index = index[(index >= first) & (index <= first + 8000)]
    low, high = int(index.min()), int(index.max())
    fine = Histogram(0, low, np.bincount(index - low), low, high + 0.5)
    coarse = Histogram(1, low >> 1, np.bincount((index >> 1) - (low >> 1)), low, high + 0.5)
    assert len(coarse.counts) < 4096 <= len(fine.counts)
    clipped = False
    for symmetric, bits in itertools.product((False, True), (5, 8)):
        limits = entropy(fine, symmetric, bits)
        assert limits == entropy(coarse, symmetric, bits)
        clipped |= limits != minmax(fine, symmetric)
    assert clipped


# ---- mse


def cost(h: Histogram, s: float, z: Array, steps: int) -> Array:
    """Return the summed squared error of {s * (k - z)}, k = 0 .. steps, by explicit quantization; z: int[m]."""
    x = np.where((h.centers > 0) & (h.centers < h.width), 0, h.centers)
    level = np.clip(np.rint(x / s) + z[:, None], 0, steps)
    return np.asarray((h.counts * (x - s * (level - z[:, None])) ** 2).sum(axis=1))


def cost_of(h: Histogram, low: float, high: float, steps: int) -> float:
    """Return the error of the quantizer that an exporter makes of an asymmetric range."""
    s = (high - low) / steps
    return float(cost(h, s, np.array([np.rint(-low / s)]), steps)[0])


def brute_force(h: Histogram, steps: int) -> float:
    """Return the least error over all scales and zero points that stay within what was observed."""
    low, high = min(h.minimum, 0), max(h.maximum, 0)
    best = cost_of(h, low, high, steps)
    for j in range(1, SCALES):
        s = j / SCALES * (high - low) / steps
        z = np.arange(steps + 1)
        slack = 1e-9 * s
        z = z[(-z * s >= low - slack) & ((steps - z) * s <= high + slack)]
        if len(z):
            best = min(best, float(cost(h, s, z, steps).min()))
    return best


SIGNED = ("normal", "heavy", "skewed", "signed gaps", "ends")
MSE_CASES = [
    *[(kind, bins, bits) for kind in (*KINDS, *SIGNED) for bins, bits in ((40, 3), (300, 4))],
    *[
        ("half-normal", 900, 8),
        ("spikes", 4000, 8),
        ("heavy", 150, 8),
        ("skewed", 400, 8),
        ("outlier", 500, 8),
    ],
    *[("outlier", 4000, 4), ("negative", 300, 5), ("away", 300, 4)],
]


def mse_case(kind: str) -> Array:
    r = np.random.default_rng([16, *kind.encode()])
    if kind == "outlier":  # the best range is a small part of the full one
        return np.concatenate([r.normal(0, 1, 20_000), [60.0]])
    if kind == "negative":
        return -one_sided("Laplace", r)
    if kind == "away":
        return r.uniform(5, 9, 9000)
    return one_sided(kind, r) if kind in KINDS else two_sided(kind, r)


@pytest.mark.parametrize(("kind", "bins", "bits"), MSE_CASES)
def test_mse_finds_the_least_error_of_its_grid(kind: str, bins: int, bits: int) -> None:
    h, steps = bins_of(mse_case(kind), bins), 2**bits - 1
    low, high = mse(h, bits=bits)
    assert cost_of(h, low, high, steps) == pytest.approx(brute_force(h, steps), rel=1e-9)


@pytest.mark.parametrize("kind", [*KINDS, *SIGNED, "outlier", "negative"])
def test_symmetric_mse_finds_the_least_error_of_its_grid(kind: str) -> None:
    h = bins_of(mse_case(kind), 300)
    most, steps = max(-h.minimum, h.maximum), 127

    def error(t: float) -> float:
        magnitudes = np.abs(h.centers)
        magnitudes[magnitudes < h.width] = 0
        s = t / steps
        return float((h.counts * (magnitudes - s * np.clip(np.rint(magnitudes / s), 0, steps)) ** 2).sum())

    least = min(error(j / SCALES * most) for j in range(1, SCALES + 1))
    assert error(mse(h, True)[1]) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("kind", SIGNED)
def test_mse_ranges_are_windows_of_the_grid(kind: str) -> None:
    """What an exporter makes of a range has the scale and the zero point that were searched, or those of minmax."""
    clipped = 0
    for seed, bits in itertools.product(range(40), (2, 3, 4)):
        h, steps = bins_of(two_sided(kind, np.random.default_rng([17, seed]))[:500], 60), 2**bits - 1
        low, high = mse(h, bits=bits)
        if (low, high) != minmax(h):
            s = (high - low) / steps
            j, z = s * steps * SCALES / (h.maximum - h.minimum), -low / s
            assert (j, z) == pytest.approx((round(j), round(z)), abs=1e-6)
            clipped += 1
    assert clipped >= 40


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ODD)
def test_mse_is_never_worse_than_another_range(kind: str, bits: int) -> None:
    """Full-size histograms: minmax is a candidate itself, others lie at most one step of the grid from one."""
    h, steps = ODD[kind], 2**bits - 1
    found = cost_of(h, *mse(h, bits=bits), steps)
    assert found <= cost_of(h, *minmax(h), steps) * (1 + 1e-9)
    for other in (percentile(h, bits=bits), entropy(h, bits=bits)):
        assert found <= cost_of(h, *other, steps) * 1.02


def test_mse_clips_where_that_pays() -> None:
    h = observe(mse_case("outlier"))
    low, high = mse(h, bits=4)
    assert high < 5
    assert cost_of(h, low, high, 15) < cost_of(h, *minmax(h), 15) / 5


def test_mse_of_a_sparse_tensor_keeps_its_few_values() -> None:
    """Exact zeros are exact at every scale; at the center of their bin, 10**12 of them would outweigh the rest."""
    h = Histogram(-10, 0, np.concatenate([[10**12], np.zeros(6143, int), [3]]), 0.0, 6.0)
    assert mse(h)[1] > 5.9
    assert mse(h, True)[1] > 5.9


# ---- names


@pytest.mark.parametrize("symmetric", [False, True])
def test_derive_gives_what_the_methods_give(symmetric: bool) -> None:
    h = ODD["signed"]
    for name, method in zip(METHODS, ALL, strict=True):
        assert derive(h, name, symmetric) == Range(*method(h, symmetric, 8), symmetric)
        assert derive(h, name, symmetric, 6) == Range(*method(h, symmetric, 6), symmetric)
    assert derive(h, "percentile:97.5", symmetric) == Range(*percentile(h, symmetric, q=97.5), symmetric)
    assert derive(h, "percentile:97.5", symmetric) != derive(h, "percentile", symmetric)


@pytest.mark.parametrize("name", [*METHODS, "auto", "percentile:99.999", "percentile:100"])
def test_known_methods_pass(name: str) -> None:
    check_method(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zzz", r"no calibration method 'zzz'. There are: minmax, percentile, entropy, mse, auto\.$"),
        ("entorpy", "Did you mean 'entropy'"),
        ("percentil:99.9", "Did you mean 'percentile'"),
        ("", "There are: minmax"),
        ("mse:3", "takes no argument, found '3'"),
        ("auto:", "takes no argument"),
        ("percentile:", "found ''"),
        ("percentile:a", "found 'a'"),
        ("percentile:nan", "found 'nan'"),
        ("percentile:100.1", "found '100.1'"),
        ("percentile:0.9999", "above 50 and at most 100, found '0.9999'. Write it like 'percentile:99.9'"),
    ],
)
def test_unknown_methods_are_refused_in_words(name: str, said: str) -> None:
    for refused in (lambda: check_method(name), lambda: derive(ODD["ReLU"], name)):
        with pytest.raises(BadInput, match=said):
            refused()


def test_auto_is_no_function_of_a_histogram() -> None:
    with pytest.raises(BadInput, match="calibrate --auto"):
        derive(ODD["ReLU"], "auto")


@pytest.mark.parametrize("q", [50, 0.9999, 101, math.nan])
def test_percentile_refuses_what_is_no_percentage(q: float) -> None:
    with pytest.raises(BadInput, match="above 50 and at most 100"):
        percentile(ODD["ReLU"], q=q)
