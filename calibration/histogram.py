"""A streaming histogram whose result does not depend on the order of the data: every calibration method reads it.

The bin width is a power of two and the edges are its multiples, so a finer histogram turns into a coarser one by adding
bins up: any order, chunking or sharding of the same values ends in the same bits. The two loops over the values are C
(``_histogram.c``, about 0.4 ns a value) where it was built, else NumPy (about 6 times slower), bit-equal.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BINS = 8192
"""The most bins a histogram has: a power of two, so that a bin's number modulo BINS is a mask."""
LANES = 4
"""Counters of a bin while counting; only the C kernel spreads over them (it says why)."""
MIN_EXPONENT = -100
"""Of the bin width: 2**100, which scales values to bin numbers, is still a float32."""
INDEX_BITS = 22
"""Bin numbers stay below 2**22 in magnitude: exact in float32, and whatever is that narrow counts as constant."""
FLUSH_AT = 2**32 - 1
"""Values after which the uint32 counters could overflow."""


class NonFinite(ValueError):
    """An array holds NaN or infinity, which no range can cover."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values in bins of width 2**exponent, and their exact minimum and maximum, in the tensor's own unit.

    Bin i covers [(first + i) * width, (first + i + 1) * width). counts: int64[k], 1 <= k <= BINS. Canonical: first ==
    floor(minimum / width), first + k - 1 == floor(maximum / width), and the exponent follows from minimum and maximum
    alone (``canonical_exponent``), so equal data give equal histograms. A zero is never negative.
    """

    exponent: int
    first: int
    counts: Array
    minimum: float
    maximum: float

    @property
    def width(self) -> float:
        return 2.0**self.exponent

    @property
    def n(self) -> int:
        """Return how many values were counted."""
        return int(self.counts.sum())

    @property
    def edges(self) -> Array:
        """float64[k + 1], exact."""
        return np.arange(self.first, self.first + len(self.counts) + 1) * self.width

    @property
    def centers(self) -> Array:
        """float64[k], exact."""
        return (np.arange(self.first, self.first + len(self.counts)) + 0.5) * self.width

    def merged(self, other: Histogram) -> Histogram:
        """Return the histogram of the values of both: what one accumulator would have made of all of them."""
        both = Accumulator()
        both.merge(self)
        both.merge(other)
        return both.histogram()

    def __eq__(self, other: object) -> bool:
        """Tell whether all is the same, bit for bit."""
        if not isinstance(other, Histogram):
            return NotImplemented
        mine = (self.exponent, self.first, self.minimum, self.maximum)
        theirs = (other.exponent, other.first, other.minimum, other.maximum)
        return mine == theirs and np.array_equal(self.counts, other.counts)


class Accumulator:
    """Counts arrays as they come. Holds 192 KB; an accumulator belongs to one thread at a time.

    step k: only every k-th element of an array (flattened in C order, from its element 0) is counted, or of the next
    step that has no factor in common with the array's size, so that no column of an image is left out; the minimum
    and the maximum stay exact over all.

    Counting takes bin numbers modulo BINS: values that span at most BINS bins never share a slot, so a range that
    shifts or grows moves nothing until it needs wider bins.
    """

    __slots__ = ("_counts", "_exponent", "_maximum", "_minimum", "_pending", "_step", "_table")

    def __init__(self, step: int = 1) -> None:
        if step < 1:
            raise ValueError(f"the step is {step}; it counts elements and is at least 1")
        self._step = step
        self._exponent = MIN_EXPONENT
        self._minimum = math.inf
        self._maximum = -math.inf
        self._counts = np.zeros(BINS, np.int64)
        self._table = np.zeros(BINS * LANES, np.uint32)
        self._pending = 0  # values in the table that are not in counts yet

    def add(self, values: Array) -> None:
        """Count *values*: float32 or float16, any shape, contiguous or not. Empty arrays are ignored.

        Raises NonFinite for NaN or infinity, and TypeError for other types; the accumulator is then unchanged.
        """
        if values.dtype.type is not np.float32 and values.dtype.type is not np.float16:
            raise TypeError(f"histograms are of float32 or float16 values, found {values.dtype}")
        if values.size == 0:
            return
        flat = _flat(values)
        low, high = KERNEL.extent(flat)
        if not (math.isfinite(low) and math.isfinite(high)):
            nan, infinite = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
            raise NonFinite(f"of {flat.size} values {nan} are NaN and {infinite} infinite")
        self._cover(low + 0.0, high + 0.0)  # turns -0.0 into 0.0: which of them comes first would show
        step = _step_through(flat.size, self._step)
        block = step * FLUSH_AT
        for start in range(0, flat.size, block):
            part = flat[start : start + block]
            counted = -(-part.size // step)
            if self._pending + counted > FLUSH_AT:
                self._flush()
            KERNEL.count(part, self._table, self._exponent, step)
            self._pending += counted

    def merge(self, other: Histogram | None) -> None:
        """Add what *other* has counted, as if it had been counted here."""
        if other is None:
            return
        self._cover(other.minimum, other.maximum)
        self._pour(other)

    def histogram(self) -> Histogram:
        """Return what was counted so far. Raises ValueError when nothing was seen."""
        if self._minimum > self._maximum:
            raise ValueError("no value was seen, so there is no histogram")
        self._flush()
        first, last = _bins(self._minimum, self._maximum, self._exponent)
        counts = self._counts[np.arange(first, last + 1) & (BINS - 1)]
        return Histogram(self._exponent, first, counts, self._minimum, self._maximum)

    def _cover(self, low: float, high: float) -> None:
        """Extend the range to [low, high], and widen the bins where it then needs wider ones."""
        if self._minimum <= low and high <= self._maximum:
            return
        low, high = min(low, self._minimum), max(high, self._maximum)
        exponent = canonical_exponent(low, high, self._exponent)
        if exponent == self._exponent:
            self._minimum, self._maximum = low, high
            return
        before = self.histogram() if self._minimum <= self._maximum else None
        self._exponent, self._minimum, self._maximum = exponent, low, high
        if before is not None:
            self._counts[:] = 0
            self._pour(before)

    def _pour(self, histogram: Histogram) -> None:
        """Add counts whose bins are at most as wide as those here, and within the range."""
        wider = min(self._exponent - histogram.exponent, 63)  # >> 63 is already the sign
        bins = np.arange(histogram.first, histogram.first + len(histogram.counts)) >> wider
        np.add.at(self._counts, bins & (BINS - 1), histogram.counts)

    def _flush(self) -> None:
        if self._pending:
            for lane in range(LANES):
                self._counts += self._table[lane::LANES]
            self._table[:] = 0
            self._pending = 0


def _flat(values: Array) -> Array:
    """Return *values* as contiguous native float32[n], without a copy where they are that."""
    flat = np.ascontiguousarray(values, values.dtype.type).reshape(-1)
    return flat if flat.dtype == np.float32 else _halves().take(flat.view(np.uint16))


@functools.cache
def _halves() -> Array:
    """float32[65536]: every float16 by its bits. Looking up takes a seventh of NumPy's conversion."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _step_through(size: int, step: int) -> int:
    while math.gcd(step, size) > 1 and step < size:
        step += 1
    return step


def _bins(low: float, high: float, exponent: int) -> tuple[int, int]:
    """Return the numbers of the bins that hold *low* and *high*. Exact: float64 scales a float32 without rounding."""
    scale = 2.0**-exponent
    return math.floor(low * scale), math.floor(high * scale)


def canonical_exponent(low: float, high: float, at_least: int = MIN_EXPONENT) -> int:
    """Return the smallest exponent >= *at_least* whose bins hold [low, high]: float32 values, low <= high.

    Holding it means: it spans at most BINS bins, and their numbers are below 2**INDEX_BITS in magnitude. What holds a
    range at one exponent does so at every greater one, and any part of it: a range that grows never needs finer bins.
    """
    exponent = at_least
    while True:
        first, last = _bins(low, high, exponent)
        if last - first < BINS and max(-low, high) < 2.0 ** (exponent + INDEX_BITS):
            return exponent
        exponent += 1


# ---------------------------------------------------------------------------------------------------- the two loops


@dataclass(frozen=True, slots=True)
class Kernel:
    """extent(float32[n]) -> (least, greatest), not finite where any value is not.

    count(float32[n], uint32[BINS * LANES], exponent, step): adds 1 to any lane of each value's bin modulo BINS.
    """

    extent: Callable[[Array], tuple[float, float]]
    count: Callable[[Array, Array, int, int], None]


def _extent(values: Array) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _count(values: Array, table: Array, exponent: int, step: int) -> None:
    picked = values[::step]
    for start in range(0, len(picked), 1 << 16):
        scaled = picked[start : start + (1 << 16)].astype(np.float64) * 2.0**-exponent
        bins = np.floor(scaled).astype(np.int64) & (BINS - 1)
        table[::LANES] += np.bincount(bins, minlength=BINS).astype(np.uint32)


NUMPY = Kernel(_extent, _count)


def _load() -> Kernel:
    if os.environ.get("PORTCALL_NO_EXTENSION") == "1":
        return NUMPY
    try:
        from portcall.calibration import _histogram
    except ImportError:
        return NUMPY
    return Kernel(_histogram.extent, _histogram.count)


KERNEL = _load()


def is_compiled() -> bool:
    """Tell whether the C kernel counts, or NumPy."""
    return KERNEL is not NUMPY
