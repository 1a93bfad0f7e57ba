"""From a histogram to a clipping range: minmax, percentile, entropy, mse. Pure functions of what was observed.

An asymmetric range holds zero, which has to be exactly representable; its scale is (maximum - minimum) / (2**bits - 1).
A symmetric range is [-T, T] with the scale T / (2**(bits - 1) - 1). No range goes beyond what was observed, zero
included. Above 8 bits (16 in practice, where a step is finer than a bin) clipping has no use: every method then returns
minmax, as it does for a constant tensor.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from portcall.calibration.histogram import Array, Histogram
from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import BadInput

METHODS = ("minmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99
SCALES = 2048
"""Scales that ``mse`` tries, evenly spaced up to that of the full range."""

_TINY = 1e-300  # lets 0 / 0 be 1, changes no quotient of counts
_BLOCK = 128  # candidates evaluated at once, so that the arrays in work stay in the cache


def minmax(h: Histogram, symmetric: bool = False, bits: int = 8) -> tuple[float, float]:
    """Return the range of everything observed, from the exact minimum and maximum; *bits* plays no part."""
    if symmetric:
        return _symmetric(h, max(-h.minimum, h.maximum))
    return min(h.minimum, 0.0), max(h.maximum, 0.0)


def percentile(
    h: Histogram, symmetric: bool = False, bits: int = 8, q: float = PERCENTILE
) -> tuple[float, float]:
    """Return the range that holds the middle *q* per cent of the values; symmetric: of their magnitudes.

    Asymmetric: from the (100 - q) / 2 to the 100 - (100 - q) / 2 percentile, extended to zero. Percentiles are those
    of ``numpy.percentile`` (linear, type 7 of Hyndman and Fan, "Sample Quantiles in Statistical Packages", 1996), with
    the values of a bin taken as evenly spread over it: at most one bin width from those of the values themselves.
    Raises BadInput unless 50 < q <= 100.
    """
    if not 50 < q <= 100:  # false for NaN, too
        raise BadInput(f"percentile {q:g} is not above 50 and at most 100", "Give a percentage, like 99.99")
    if _is_minmax(h, bits):
        return minmax(h, symmetric)
    if symmetric:
        return _symmetric(h, _percentile(_magnitudes(h), q))
    tail = (100 - q) / 2
    return _asymmetric(h, _percentile(h, tail), _percentile(h, 100 - tail))


def entropy(h: Histogram, symmetric: bool = False, bits: int = 8) -> tuple[float, float]:
    """Return the range whose quantized histogram diverges least from the observed one.

    Source: Szymon Migacz, "8-bit Inference with TensorRT", GTC 2017. Of n bins from zero on, the candidate that keeps
    the first m has P = those bins, with everything beyond added to the last of them, and Q = those bins without what is
    beyond, summed over *levels* equal intervals and spread again over the bins of each that hold something. The m of
    least KL(P || Q), both normalized, gives the threshold (m + 0.5) * bin width, here cut to what was observed. A
    candidate is out (infinite) where its last bin holds only what is beyond. m runs from *levels* to n, and of equal
    divergences (to 12 decimals) the largest m is taken, as in NVIDIA's pytorch-quantization and modelopt
    (``calib/histogram.py``). Like theirs, the search replaces bin 0 by bin 1: exact zeros, half of all values after a
    ReLU, cost nothing at any scale and would make it clip far too much.
    levels: symmetric 2**(bits - 1), on the magnitudes; asymmetric 2**bits - 1. A histogram of 4096 bins or more is
    merged by a power of two, to 2048 bins or more; one of fewer bins than levels gives minmax.

    Not in the source: candidates that keep less than half of the values are left out. Values that all lie far from zero
    (5 to 10, say) have a candidate that keeps a single bin, which Q describes perfectly: the published search then
    clips nearly everything.

    Values of both signs, asymmetric: a candidate keeps the bins [low, high), low <= 0 < high, with *levels* intervals
    over all of them, and what is beyond either end is added to the bin there. From the full range on, each end in turn
    is searched exactly while the other is held, until nothing changes: no move of one end improves the result. Where
    no value is negative low has one candidate, 0, and what remains is the one-sided search above. Where none is
    positive that search is made on the mirror image.
    """
    if _is_minmax(h, bits):
        return minmax(h, symmetric)
    if symmetric:
        return _symmetric(h, _least_divergence(_magnitudes(h), 2 ** (bits - 1))[1])
    if h.maximum <= 0:
        return _asymmetric(h, -_least_divergence(_magnitudes(h), 2**bits - 1)[1], 0.0)
    return _asymmetric(h, *_least_divergence(h, 2**bits - 1))


def mse(h: Histogram, symmetric: bool = False, bits: int = 8) -> tuple[float, float]:
    """Return the range with the least sum of squared quantization errors, searched exactly over a grid.

    Every value counts at the center of its bin: a step of the full range is 16 to 32 bins, given 8 bits and more than
    4096 bins. Those in bin 0, [0, width), count as zero, which costs nothing: else hundreds of millions of exact zeros
    could, half a bin off, outweigh the few other values of a sparse tensor.
    Candidates are the quantizers {s * (k - z)}, k = 0 .. steps, with s = j / SCALES * full range / steps for
    j = 1 .. SCALES, and every integer z that keeps the quantizer within the observed range; at the full range, j =
    SCALES, the z that minmax gets, rint(-minimum / s). So the result is never worse than minmax, and a quantizer made
    from the range has this s and z.
    Symmetric: the same on the magnitudes with 2**(bits - 1) - 1 steps, where z is 0.

    Source: the criterion is old (J. Max, "Quantizing for minimum distortion", 1960); the search is our own, see
    ``_least_squares``.
    """
    if _is_minmax(h, bits):
        return minmax(h, symmetric)
    if symmetric:
        return _symmetric(h, _least_squares(_magnitudes(h), 2 ** (bits - 1) - 1)[1])
    return _asymmetric(h, *_least_squares(h, 2**bits - 1))


def derive(h: Histogram, method: str, symmetric: bool = False, bits: int = 8) -> Range:
    """Return the range of one tensor by *method*, a name in METHODS; "percentile:99.9" carries its argument.

    Raises BadInput for another name, and for "auto", which a histogram cannot decide.
    """
    name, q = _parse(method)
    if name == "auto":
        raise BadInput(
            "method 'auto' is decided by running the model, not from a histogram",
            "Run: portcall calibrate --auto",
        )
    if name == "percentile":
        low, high = percentile(h, symmetric, bits, q)
    else:
        low, high = {"minmax": minmax, "entropy": entropy, "mse": mse}[name](h, symmetric, bits)
    return Range(low, high, symmetric)


def check_method(name: str) -> None:
    """Raise BadInput unless *name* is "auto" or a method, with a valid argument: what there is, the nearest name."""
    _parse(name)


def _parse(method: str) -> tuple[str, float]:
    """Return the method's name and the q of percentile."""
    name, colon, argument = method.partition(":")
    known = (*METHODS, "auto")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(f"no calibration method {name!r}", f"There are: {', '.join(known)}.{hint}")
    if not colon:
        return name, PERCENTILE
    if name != "percentile":
        raise BadInput(f"method {name!r} takes no argument, found {argument!r}", f"Write {name!r}")
    try:
        q = float(argument)
    except ValueError:
        q = math.nan
    if not 50 < q <= 100:
        raise BadInput(
            f"percentile takes a number above 50 and at most 100, found {argument!r}",
            "Write it like 'percentile:99.9'",
        )
    return name, q


def _is_minmax(h: Histogram, bits: int) -> bool:
    return bits > 8 or h.minimum == h.maximum


def _symmetric(h: Histogram, threshold: float) -> tuple[float, float]:
    limit = min(threshold, max(-h.minimum, h.maximum))
    return 0.0 - limit, limit


def _asymmetric(h: Histogram, low: float, high: float) -> tuple[float, float]:
    """Return [low, high] extended to zero, then cut to what was observed."""
    least, most = minmax(h)
    return max(min(low, 0.0), least), min(max(high, 0.0), most)


def _magnitudes(h: Histogram) -> Histogram:
    """Return the histogram of |x|: bin k >= 0 stays, bin k < 0 becomes -k - 1.

    Where the signs are mixed its minimum is not known, but for its bin: the lower edge of that stands for it.
    """
    if h.minimum >= 0:
        return h
    if h.first + len(h.counts) <= 0:
        counts = h.counts[::-1]
        return replace(h, first=-h.first - len(counts), counts=counts, minimum=-h.maximum, maximum=-h.minimum)
    negative, positive = h.counts[: -h.first][::-1], h.counts[-h.first :]
    counts = np.zeros(max(len(negative), len(positive)), np.int64)
    counts[: len(negative)] += negative
    counts[: len(positive)] += positive
    minimum = float(np.argmax(counts > 0)) * h.width
    return replace(h, first=0, counts=counts, minimum=minimum, maximum=max(-h.minimum, h.maximum))


def _percentile(h: Histogram, q: float) -> float:
    """Return the *q*-th percentile: the two values around its rank, each where it lies in its bin, interpolated."""
    until = np.cumsum(h.counts)
    rank = q / 100 * float(until[-1] - 1)

    def value(index: int) -> float:
        """Return the value of that index in sorted order."""
        if index in (0, until[-1] - 1):
            return h.maximum if index else h.minimum
        i = int(np.searchsorted(until, index, side="right"))
        within = float(index - until[i] + h.counts[i] + 0.5) / float(h.counts[i])
        return min(max((h.first + i + within) * h.width, h.minimum), h.maximum)

    low, high = value(math.floor(rank)), value(math.ceil(rank))
    return low + (high - low) * (rank - math.floor(rank))


class _Sums(NamedTuple):
    """Counts of n bins, float64[n], and sums over the bins before each edge, float64[n + 1]."""

    bins: Array
    counts: Array  # of values
    filled: Array  # of bins that hold something
    plogp: Array  # of count * log(count)


def _least_divergence(h: Histogram, levels: int) -> tuple[float, float]:
    """Return the thresholds (low, high) that ``entropy`` describes. h has values above zero and is not constant."""
    begin, last, shift = min(h.first, 0), h.first + len(h.counts) - 1, 0
    while (last >> shift) - (begin >> shift) + 1 >= 4096:
        shift += 1
    index = (np.arange(h.first, last + 1) >> shift) - (begin >> shift)
    bins = np.bincount(index, weights=h.counts)
    zero, n = -(begin >> shift), len(bins)
    bins[zero] = bins[zero + 1] if zero + 1 < n else 0.0
    if n < levels or not bins.any():
        return minmax(h)
    sums = _Sums(bins, _prefix(bins), _prefix(bins > 0), _prefix(_plogp(bins)))

    def best(lows: Array, highs: Array) -> int:
        """Return the index of the [low, high) of least divergence, and of equal ones the last."""
        half = np.flatnonzero(sums.counts[highs] - sums.counts[lows] >= sums.counts[-1] / 2)
        parts = [half[i : i + _BLOCK] for i in range(0, len(half), _BLOCK)]
        divergence = np.concatenate([_divergences(sums, lows[p], highs[p], levels) for p in parts]).round(12)
        return int(half[len(half) - 1 - np.argmin(divergence[::-1])])

    low, high, before = 0, n, -1
    while low != before:
        before = low
        highs = np.arange(max(low + levels, zero + 1), n + 1)
        high = int(highs[best(np.full_like(highs, low), highs)])
        lows = np.arange(min(high - levels, zero), -1, -1)
        low = int(lows[best(lows, np.full_like(lows, high))])
    width = h.width * 2.0**shift
    return (low - zero - 0.5) * width, (high - zero + 0.5) * width


def _divergences(sums: _Sums, low: Array, high: Array, levels: int) -> Array:
    """Return KL(P || Q) of keeping the bins [low, high), as ``entropy`` describes; low, high: int64[candidates].

    With the total N and the S values inside, KL = (sum of P log P - sum of P log Q) / N + log(S / N). Within a level
    of C values in F filled bins Q is C / F, so that its bins give C log(C / F): prefix sums have all that is needed.
    """
    edges = low[:, None] + ((high - low)[:, None] * np.arange(levels + 1) + (levels - 1)) // levels
    counts, filled = np.diff(sums.counts.take(edges)), np.diff(sums.filled.take(edges))
    logs = np.log((counts + _TINY) / (filled + _TINY))  # 0 for an empty level
    total = sums.counts[-1]
    inside = sums.counts[high] - sums.counts[low]
    divergence = sums.plogp[high] - sums.plogp[low] - np.einsum("ij,ij->i", counts, logs)
    for bins, beyond, log in (
        (sums.bins[low], sums.counts[low], logs[:, 0]),
        (sums.bins[high - 1], total - sums.counts[high], logs[:, -1]),
    ):
        divergence += _plogp(bins + beyond) - _plogp(bins) - beyond * log
        divergence[(bins == 0) & (beyond > 0)] = np.inf
    result: Array = divergence / total + np.log(inside / total)
    return result


def _prefix(values: Array) -> Array:
    """Return the sums of the values before each edge, float64[n + 1]."""
    return np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))


def _plogp(values: Array) -> Array:
    return values * np.log(np.maximum(values, 1))


def _least_squares(h: Histogram, steps: int) -> tuple[float, float]:
    """Return the range (low, high) that ``mse`` describes; h is not constant.

    Lengths in bin widths. The quantizer with levels a * s .. (a + steps) * s, a = -z, has for a value x the error
    (x - a * s)**2 - 2 * s * (the sum of x - m over the midpoints m = (k - 1/2) * s below x, a < k <= a + steps),
    because from one level to the next the squared error changes by -2 * s * (x - m). Summed over the values, the first
    part needs only their moments, and the second the excess over m, the sum of max(x - m, 0), which suffix
    sums of count and count * x give at once. Sums of the excess over k then serve all a of a scale.

    s runs downwards, and stops where what the range cuts off costs more than the best quantizer so far, whatever a is:
    the range only shrinks as s does, so that this can only grow.
    """
    low, high = (end / h.width for end in minmax(h))
    unit = (high - low) / (SCALES * steps)
    bins = np.arange(h.first, h.first + len(h.counts))
    x, counts = bins + 0.5, np.where(bins == 0, 0.0, h.counts)
    moments = [float((counts * x**p).sum()) for p in range(3)]
    # At index i: summed over the bins from i on.
    above = [np.append(np.cumsum((counts * x**p)[::-1])[::-1], 0.0) for p in range(3)]

    def first_above(at: Array) -> Array:
        """Return the index of the first center above each value."""
        return np.clip(np.floor(at + (0.5 - h.first)), 0, len(x)).astype(np.int64)

    def around(at: Array) -> Array:
        """Return the sum of (x - at)**2."""
        return moments[2] - 2 * at * moments[1] + at**2 * moments[0]

    def cut_off(s: float) -> float:
        """Return the least that values beyond the ends can cost at the scale s, over all a."""
        lowest = np.arange(-steps, 1) * s
        highest = lowest + steps * s
        i, k = first_above(lowest), first_above(highest)
        below = around(lowest) - (above[2][i] - 2 * lowest * above[1][i] + lowest**2 * above[0][i])
        beyond = above[2][k] - 2 * highest * above[1][k] + highest**2 * above[0][k]
        return float((below + beyond).min())

    best, result = math.inf, (low, high)
    for top in range(SCALES, 0, -_BLOCK):
        j = np.arange(top, max(top - _BLOCK, 0), -1)
        s = j[:, None] * unit
        fit = SCALES * steps / j[:, None]  # scale of the full range / s * steps
        least = np.maximum(np.ceil(low / (high - low) * fit), -steps)
        most = np.minimum(np.floor(high / (high - low) * fit) - steps, 0)
        if top == SCALES:
            least[0] = most[0] = -np.rint(-low / s[0])
        a = np.arange(least.min(), most.max() + 1)
        if not len(a):
            continue
        midpoints = (np.arange(a[0] + 1, a[-1] + steps + 1) - 0.5) * s
        i = first_above(midpoints)
        excess = above[1].take(i) - midpoints * above[0].take(i)
        until = np.pad(np.cumsum(excess, axis=1), ((0, 0), (1, 0)))
        error = around(a * s) - 2 * s * (until[:, steps:] - until[:, : len(a)])
        error[(a < least) | (a > most)] = np.inf
        row, column = np.unravel_index(int(np.argmin(error)), error.shape)
        if error[row, column] < best:
            best = float(error[row, column])
            full = j[row] == SCALES
            result = (low, high) if full else (a[column] * s[row, 0], (a[column] + steps) * s[row, 0])
        if cut_off(float(s[-1, 0])) > best:
            break
    return float(result[0]) * h.width, float(result[1]) * h.width
