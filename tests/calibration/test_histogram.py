"""The streaming histogram: its definition, that no order or sharding shows, and that C and NumPy agree bit for bit."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from portcall.calibration import histogram as module
from portcall.calibration.histogram import BINS, KERNEL, NUMPY, Accumulator, Histogram, NonFinite, is_compiled

Array = np.ndarray[Any, np.dtype[Any]]
TINY = 2.0**-149
HUGE = float(np.finfo(np.float32).max)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def _cases() -> dict[str, Array]:
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(6000).astype(np.float32)
    bits = rng.integers(0, 2**32, 6000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(4 * normal, 0, 6),
        "negative only": -np.abs(normal) - 3,
        "far from zero": normal + 1000,
        "constant": np.full(5000, 0.1, np.float32),
        "zeros": np.zeros(5000, np.float32),
        "one value": f32(-2.5),
        "signed zeros": f32(-0.0, 0.0, -0.0, 0.0, -0.0),
        "negative zero": f32(-0.0),
        "subnormal": (rng.integers(-1000, 1000, 3000) * TINY).astype(np.float32),
        "huge": normal * np.float32(3e37),
        "both ends": f32(-HUGE, HUGE),
        "greatest": f32(HUGE),
        "tiny beside huge": f32(-TINY, TINY, -1e-38, 1e-38, -1.0, 0.0, 3e38),
        "every magnitude": bits[np.isfinite(bits)],
        "edges": np.arange(-4096, 4096).astype(np.float32) / 64,
        "one more than the bins": np.arange(8193).astype(np.float32),
        "narrow": np.float32(1 << 21) + np.arange(3, dtype=np.float32) / 4,
        "growing": (normal * 2.0 ** (np.arange(6000) // 60)).astype(np.float32),
    }


CASES = _cases()
KERNELS = {"c": KERNEL, "numpy": NUMPY}
case = pytest.mark.parametrize("values", CASES.values(), ids=CASES)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Count by C or by NumPy."""
    if request.param == "c" and not is_compiled():
        pytest.skip("NumPy counts here: the C kernel is turned off or not built (pip install -e .)")
    monkeypatch.setattr(module, "KERNEL", KERNELS[request.param])
    return str(request.param)


def counted(*arrays: Array, step: int = 1) -> Histogram:
    accumulator = Accumulator(step)
    for values in arrays:
        accumulator.add(values)
    return accumulator.histogram()


def same(left: Histogram, right: Histogram) -> bool:
    """Compare bit for bit, without Histogram's own comparison."""

    def plain(h: Histogram) -> Any:
        ends = np.array([h.minimum, h.maximum])
        return h.exponent, h.first, ends.tobytes(), h.counts.dtype, h.counts.shape, h.counts.tobytes()

    return bool(plain(left) == plain(right))


def through(size: int, step: int) -> int:
    """The step that is taken through an array: of no common factor with its size, unless it is beyond it."""
    while step < size and any(size % d == 0 and step % d == 0 for d in range(2, step + 1)):
        step += 1
    return step


def by_definition(values: Array, step: int = 1) -> Histogram:
    """The histogram as its docstrings define it: Python integers and a dictionary, from wide bins to narrow ones."""

    def bin_of(x: float, exponent: int) -> int:
        return math.floor(math.ldexp(x, -exponent))

    low, high = float(values.min()) + 0.0, float(values.max()) + 0.0

    def holds(exponent: int) -> bool:
        spans = bin_of(high, exponent) - bin_of(low, exponent) + 1
        return spans <= 8192 and max(abs(low), abs(high)) < 2.0 ** (exponent + 22)

    exponent = 120
    while exponent > -100 and holds(exponent - 1):
        exponent -= 1
    first, last = bin_of(low, exponent), bin_of(high, exponent)
    table = dict.fromkeys(range(first, last + 1), 0)
    for x in values.ravel()[:: through(values.size, step)].tolist():
        table[bin_of(x, exponent)] += 1
    return Histogram(exponent, first, np.array(list(table.values()), np.int64), low, high)


def pieces(values: Array, rng: np.random.Generator) -> list[Array]:
    """Split *values* at up to 12 random places; pieces may be empty."""
    return np.split(values, np.sort(rng.integers(0, len(values) + 1, int(rng.integers(0, 13)))))


# ---------------------------------------------------------------------------------------------------- the definition


@case
def test_it_is_what_the_definition_says(values: Array, kernel: str) -> None:
    found = counted(values)
    assert same(found, by_definition(values))
    assert found.n == len(values)
    assert 1 <= len(found.counts) <= BINS == 8192
    # min() would do with either zero; a histogram holds the positive one.
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert all(math.copysign(1, x) == 1 for x in (found.minimum, found.maximum) if x == 0)


@case
@pytest.mark.parametrize("step", [2, 3, 64, 100_000])
def test_a_step_counts_every_so_many_and_keeps_the_exact_range(values: Array, step: int, kernel: str) -> None:
    found = counted(values, step=step)
    assert same(found, by_definition(values, step))
    assert found.n == -(-len(values) // through(len(values), step))


@pytest.mark.parametrize("step", [2, 4, 8, 16, 100])
def test_a_step_leaves_no_column_of_an_image_out(step: int, kernel: str) -> None:
    columns = np.broadcast_to(np.arange(16, dtype=np.float32), (3, 32, 16))
    found = counted(np.ascontiguousarray(columns), step=step)
    assert np.count_nonzero(found.counts) == min(16, found.n) and found.n == -(-1536 // through(1536, step))


def test_a_step_starts_at_the_first_element_of_each_array(kernel: str) -> None:
    found = counted(np.arange(10, dtype=np.float32).reshape(2, 5), f32(20, 30, 40, 50), step=3)
    centers = found.centers[found.counts > 0]
    assert [math.floor(c) for c in centers] == [0, 3, 6, 9, 20, 50]
    assert (found.n, found.maximum) == (6, 50)


def test_random_data_of_every_scale_is_what_the_definition_says(kernel: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(40):
        scale = 2.0 ** int(rng.integers(-149, 120))
        values = (
            rng.standard_normal(int(rng.integers(1, 300))) * scale + rng.integers(-2, 3) * scale * 16
        ).astype(np.float32)
        step = int(rng.integers(1, 4))
        assert same(counted(values, step=step), by_definition(values, step))


def test_a_constant_has_one_bin_that_holds_it(kernel: str) -> None:
    for value in (0.0, 1.0, -1.0, 0.1, TINY, -TINY, HUGE, -HUGE, 6.0):
        found = counted(np.full(9, value, np.float32))
        assert same(found, by_definition(f32(*[value] * 9)))
        assert found.counts.tolist() == [9]
        assert found.edges[0] <= found.minimum == found.maximum < found.edges[1]
        assert -(2**22) <= found.first < 2**22


def test_a_tiny_negative_beside_huge_values_is_below_zero(kernel: str) -> None:
    """Divided by the bin width it underflows in float32; it still belongs to the bin below zero."""
    found = counted(f32(-TINY, 0.0, TINY, 3e38))
    assert found.first == -1
    assert found.counts[:2].tolist() == [1, 2]


def test_edges_and_centers_are_exact() -> None:
    found = counted(f32(-1.0, 0.3, 2.0))
    assert found.width == 2.0**found.exponent
    assert found.edges.dtype == found.centers.dtype == np.float64
    assert len(found.edges) == len(found.counts) + 1
    assert found.edges[0] == -1.0 and found.edges[-2] == 2.0
    assert (found.edges % found.width == 0).all()
    assert (np.diff(found.edges) == found.width).all()
    assert (found.centers - found.edges[:-1] == found.width / 2).all()


def test_bins_are_as_narrow_as_they_may_be() -> None:
    """8192 bins span just what fits; one value more needs bins of double the width."""
    assert (counted(np.arange(8192, dtype=np.float32)).exponent, len(counted(CASES["edges"]).counts)) == (
        0,
        8192,
    )
    assert counted(np.arange(8193, dtype=np.float32)).exponent == 1


# ------------------------------------------------------------------------------------------- no order and no sharding


@case
def test_no_order_and_no_chunking_shows(values: Array, kernel: str) -> None:
    rng = np.random.default_rng(1)
    expected = by_definition(values)
    for _ in range(6):
        assert same(counted(*pieces(rng.permutation(values), rng)), expected)
    assert same(counted(np.sort(values)), expected)
    assert same(counted(*np.sort(values)[::-1][:, None][:400], np.sort(values)[::-1][400:]), expected)


@case
def test_no_sharding_shows(values: Array, kernel: str) -> None:
    """Shards merged in any order and grouping, as histograms and into accumulators that go on counting."""
    rng = np.random.default_rng(2)
    expected = by_definition(values)
    for _ in range(6):
        parts = [p for p in pieces(rng.permutation(values), rng) if len(p)]
        shards = [counted(p) for p in parts]
        while len(shards) > 1:
            left = shards.pop(int(rng.integers(len(shards))))
            right = shards.pop(int(rng.integers(len(shards))))
            assert same(left.merged(right), right.merged(left))
            shards.append(left.merged(right))
        assert same(shards[0], expected)
        mixed = Accumulator()
        for part in parts:
            if rng.random() < 0.5:
                mixed.add(part)
            else:
                mixed.merge(counted(part))
        assert same(mixed.histogram(), expected)


def test_ranges_that_grow_by_many_powers_of_two_merge_exactly(kernel: str) -> None:
    rng = np.random.default_rng(3)
    scales = [2.0**e for e in range(-149, 126, 11)]
    arrays = [(rng.uniform(-1, 1, 50) * s).astype(np.float32) for s in scales]
    expected = by_definition(np.concatenate(arrays))
    assert same(counted(*arrays), expected)
    assert same(counted(*arrays[::-1]), expected)
    total = counted(arrays[-1])
    for values in arrays[:-1]:
        total = counted(values).merged(total)
    assert same(total, expected)


def test_looking_at_a_histogram_changes_nothing(kernel: str) -> None:
    accumulator = Accumulator()
    for part in np.split(CASES["growing"], 10):
        accumulator.add(part)
        once, twice = accumulator.histogram(), accumulator.histogram()
        assert same(once, twice) and once.counts is not twice.counts
        once.counts[:] = 0
    assert same(accumulator.histogram(), by_definition(CASES["growing"]))


def test_merging_leaves_both_as_they_were() -> None:
    left, right = counted(f32(1, 2, 3)), counted(f32(-1000))
    before = pickle.dumps((left, right))
    assert left.merged(right).n == 4
    assert pickle.dumps((left, right)) == before


def test_nothing_to_merge_is_ignored() -> None:
    accumulator = Accumulator()
    accumulator.merge(None)
    accumulator.add(f32(1.0))
    accumulator.merge(None)
    assert accumulator.histogram() == counted(f32(1.0))


def test_histograms_compare_by_all_they_hold() -> None:
    one = counted(f32(1, 2, 3))
    assert one == counted(f32(3, 2, 1)) and pickle.loads(pickle.dumps(one)) == one
    for change in (
        {"exponent": 0},
        {"first": 1},
        {"minimum": 0.5},
        {"maximum": 4.0},
        {"counts": one.counts * 2},
    ):
        assert one != replace(one, **change)
    assert one != "a histogram"


# ---------------------------------------------------------------------------------------------------------- C and NumPy


def test_c_and_numpy_agree_bit_for_bit() -> None:
    """Also beyond one internal chunk, and for sizes that leave a rest in every loop."""
    if not is_compiled():
        pytest.skip("NumPy counts here: the C kernel is turned off or not built (pip install -e .)")
    rng = np.random.default_rng(5)
    sizes = [*range(1, 40), 255, 256, 257, 1279, 1280, 1281, 65_535, 65_536, 65_537, 200_003]
    arrays = [*CASES.values(), *(np.maximum(rng.standard_normal(n), 0).astype(np.float32) for n in sizes)]
    for values in arrays:
        assert KERNEL.extent(values) == NUMPY.extent(values)
        exponent = counted(values).exponent
        for step in (1, 2, 7):
            tables = [np.zeros(BINS * module.LANES, np.uint32) for _ in range(2)]
            KERNEL.count(values, tables[0], exponent, step)
            NUMPY.count(values, tables[1], exponent, step)
            left, right = (t.reshape(BINS, module.LANES).sum(axis=1) for t in tables)
            assert np.array_equal(left, right) and left.sum() == -(-len(values) // step)


def _in_fresh_interpreter(**environment: str) -> list[str]:
    code = (
        "import hashlib, numpy as np; from portcall.calibration.histogram import Accumulator, is_compiled; "
        "a = Accumulator(); r = np.random.default_rng(0); "
        "[a.add((r.standard_normal(1000) * 3.0 ** i).astype(np.float32)) for i in range(20)]; h = a.histogram(); "
        "digest = hashlib.sha256(h.counts.tobytes()).hexdigest(); "
        "print(is_compiled(), digest, h.exponent, h.first, h.minimum, h.maximum)"
    )
    kept = {k: v for k, v in os.environ.items() if k != "PORTCALL_NO_EXTENSION"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_extension_can_be_turned_off() -> None:
    on, off = _in_fresh_interpreter(), _in_fresh_interpreter(PORTCALL_NO_EXTENSION="1")
    assert off[0] == "False"
    assert on[1:] == off[1:]


def test_the_kernel_is_built_where_a_compiler_is() -> None:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None or sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip(f"no {compiler} here, or a free-threaded Python: NumPy counts")
    assert _in_fresh_interpreter()[0] == "True", "a C compiler is here, yet no kernel: pip install -e ."


def test_the_kernel_refuses_what_it_would_overrun() -> None:
    if not is_compiled():
        pytest.skip("NumPy counts here: the C kernel is turned off or not built (pip install -e .)")
    table = np.zeros(BINS * module.LANES, np.uint32)
    for wrong in (table[:-1], table[:0], table.astype(np.int64)):
        with pytest.raises(ValueError, match="wants a table of 131072 bytes"):
            KERNEL.count(f32(1.0), wrong, 0, 1)
    with pytest.raises(ValueError, match="a step of at least 1, got 131072 and 0"):
        KERNEL.count(f32(1.0), table, 0, 0)
    KERNEL.count(
        f32(1e30, -1e30, math.inf, math.nan), table, -100, 1
    )  # out of every range: still in the table
    assert table.sum() == 4


# ------------------------------------------------------------------------------------------------------ what is given

LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "three axes": lambda v: v.reshape(2, 5, -1),
    "Fortran order": lambda v: np.asfortranarray(v.reshape(10, -1)),
    "transposed": lambda v: v.reshape(10, -1).T,
    "every second": lambda v: np.repeat(v, 2)[::2],
    "backwards": lambda v: v[::-1],
    "broadcast": lambda v: np.broadcast_to(v[:100, None], (100, 7)),
    "big endian": lambda v: v.astype(">f4"),
    "unaligned": lambda v: np.frombuffer(b"x" + v.tobytes(), np.float32, offset=1),
    "half": lambda v: v.astype(np.float16),
    "half, big endian, transposed": lambda v: v.astype(">f2").reshape(10, -1).T,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("step", [1, 3])
def test_layout_and_type_do_not_matter(layout: Callable[[Array], Array], step: int, kernel: str) -> None:
    values = layout(CASES["normal"])
    values.setflags(write=False)
    assert same(counted(values, step=step), by_definition(values.astype(np.float32), step))


def test_every_half_is_itself(kernel: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    assert same(counted(finite), by_definition(finite.astype(np.float32)))
    for value in halves[~np.isfinite(halves)][::97]:
        with pytest.raises(NonFinite):
            counted(np.array([value]))


def test_a_scalar_array_is_one_value(kernel: str) -> None:
    assert counted(np.array(1.5, np.float32)).counts.tolist() == [1]
    assert counted(np.array(1.5, np.float16)).counts.tolist() == [1]


def test_empty_arrays_are_ignored(kernel: str) -> None:
    accumulator = Accumulator()
    for empty in (np.zeros(0, np.float32), np.zeros((3, 0), np.float16)):
        accumulator.add(empty)
        with pytest.raises(ValueError, match="no value was seen"):
            accumulator.histogram()
    accumulator.add(f32(2.0))
    accumulator.add(np.zeros(0, np.float32))
    assert accumulator.histogram().n == 1


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_not_finite_is_refused_and_changes_nothing(bad: float, dtype: type, kernel: str) -> None:
    accumulator = Accumulator(step=2)
    with pytest.raises(NonFinite):
        accumulator.add(np.array([bad], dtype))
    with pytest.raises(ValueError, match="no value was seen"):
        accumulator.histogram()
    accumulator.add(f32(-1, 0, 1))
    before = accumulator.histogram()
    for place in (0, 1, 15, 16, 4999, 9999):
        values: Array = np.full(10_000, 50, dtype)
        values[place] = bad
        kind = "1 are NaN and 0 infinite" if math.isnan(bad) else "0 are NaN and 1 infinite"
        with pytest.raises(NonFinite, match=f"of 10000 values {kind}"):
            accumulator.add(values)
        assert same(accumulator.histogram(), before)
    assert issubclass(NonFinite, ValueError)


def test_nan_beside_both_infinities_is_refused(kernel: str) -> None:
    with pytest.raises(NonFinite, match="of 4 values 1 are NaN and 2 infinite"):
        Accumulator().add(f32(math.inf, math.nan, -math.inf, 0.0))


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64, np.bool_, np.complex64])
def test_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(TypeError, match=f"of float32 or float16 values, found {np.dtype(dtype)}"):
        Accumulator().add(np.ones(3, dtype))


@pytest.mark.parametrize("step", [0, -1])
def test_a_step_below_one_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"the step is {step}"):
        Accumulator(step)


# ------------------------------------------------------------------------------------------------- much of it, at once


@pytest.mark.parametrize("step", [1, 3])
def test_counters_are_emptied_before_they_overflow(
    step: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table never holds more values than a single counter can."""
    count, held = module.KERNEL.count, []

    def watched(values: Array, table: Array, exponent: int, step: int) -> None:
        count(values, table, exponent, step)
        held.append(int(table.sum()))

    monkeypatch.setattr(module, "FLUSH_AT", 1000)
    monkeypatch.setattr(module, "KERNEL", replace(module.KERNEL, count=watched))
    values = CASES["growing"]
    assert same(counted(values, step=step), by_definition(values, step))  # one array of more than that
    assert counted(*np.split(values, 10), step=step).n == 10 * -(-600 // through(600, step))
    assert same(counted(*np.split(values, 10)), by_definition(values))
    assert counted(*[np.ones(400, np.float32)] * 10).n == 4000
    assert 600 < max(held) <= 1000


def test_a_full_counter_does_not_wrap(kernel: str) -> None:
    accumulator = Accumulator()
    accumulator.add(f32(1.0))
    [used] = np.flatnonzero(accumulator._table)
    accumulator._table[used] = accumulator._pending = 2**32 - 1
    accumulator.add(f32(1.0))
    assert accumulator.histogram().counts.tolist() == [2**32]


def test_counts_hold_as_much_as_the_largest_calibration() -> None:
    """4096 samples of a tensor with 100 million values, all in one bin."""
    one = replace(counted(f32(0.0)), counts=np.array([4096 * 10**8 // 2], np.int64))
    assert one.merged(one).n == 4096 * 10**8


def test_threads_count_side_by_side(kernel: str) -> None:
    rng = np.random.default_rng(9)
    arrays = [(rng.standard_normal(50_000) * 2.0**i).astype(np.float32) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda values: counted(*[values] * 5), arrays))
    for values, histogram in zip(arrays, found, strict=True):
        once = by_definition(values)
        assert same(histogram, replace(once, counts=once.counts * 5))
