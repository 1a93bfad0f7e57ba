"""Windows, the slope's interval (simulated with autocorrelation), and the verdict on throttling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portcall.bench.modes_sustained import drift, slope, sustained_figures, throttling, windows_of

S = 1_000_000_000


def _arrays(p50_ns: list[float], per_window: int = 20, window_s: float = 1.0) -> dict[str, Any]:
    """A series whose every window has its own P50."""
    begin = np.concatenate(
        [(i + np.arange(per_window) / per_window) * window_s * S for i in range(len(p50_ns))]
    )
    wall = np.repeat(p50_ns, per_window)
    return {
        "begin_ns": begin.astype(np.int64),
        "wall_ns": wall.astype(np.int64),
        "cpu_ns": wall.astype(np.int64),
    }


def _observed(mhz: list[float] | None, count: int = 13, method: str = "scaling_cur_freq") -> list[Any]:
    """Readings at the ends of 1 s windows; the first one from before the series."""
    values = [None] * count if mhz is None else [mhz[0], *mhz]
    return [
        {
            "t_s": float(i),
            "cpu_mhz": None if v is None else {"min": v, "median": v, "max": v},
            "cpu_mhz_method": None if v is None else method,
            "temperatures_c": None,
            "load_average": [0.1, 0.1, 0.1],
            "absent": {} if v else {"cpu_mhz": "not told"},
        }
        for i, v in enumerate(values)
    ]


def test_an_inference_belongs_to_the_window_in_which_it_began() -> None:
    found = windows_of(_arrays([1e6, 2e6, 3e6]), _observed([2000, 1500, 1000]), 1.0)
    assert [w["t_s"] for w in found] == [0, 1, 2]
    assert [w["p50_ns"] for w in found] == [1e6, 2e6, 3e6]
    assert [w["n"] for w in found] == [20, 20, 20]
    assert [w["cpu_mhz"] for w in found] == [2000, 1500, 1000]


def test_a_short_last_window_is_left_out_and_few_inferences_have_no_p50() -> None:
    arrays = _arrays([1e6, 2e6])
    cut = {k: v[:25] for k, v in arrays.items()}
    assert len(windows_of(cut, _observed(None), 1.0)) == 1
    few = windows_of(_arrays([1e6, 1e6], per_window=4), _observed(None), 1.0)
    assert [w["p50_ns"] for w in few] == [None, None]
    assert windows_of({k: v[:0] for k, v in arrays.items()}, [], 1.0) == []


def test_the_slope_of_a_line_is_exact() -> None:
    found, ci = slope([1, 2, 3, 4, 5], [2.0, 4.0, 6.0, 8.0, 10.0])
    assert found == pytest.approx(2)
    assert ci is not None and ci[0] == pytest.approx(2, abs=1e-6) and ci[1] == pytest.approx(2, abs=1e-6)
    assert slope([1, 2, 3], [1.0, 2.0, 1.0])[1] is None
    with pytest.raises(ValueError, match="two different times"):
        slope([1, 1], [1.0, 2.0])


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.93), (0.4, 0.88)])
def test_the_slopes_interval_covers(correlation: float, least: float) -> None:
    """500 simulated series of 24 windows without drift; plain least squares covers 80 % at correlation 0.4."""
    rng = np.random.default_rng(4)
    x, covered, plain = np.arange(24) / 12, 0, 0
    for _ in range(500):
        noise = rng.standard_normal(24)
        for i in range(1, 24):
            noise[i] += correlation * noise[i - 1]
        ci = slope(list(x), list(noise))[1]
        covered += ci is not None and ci[0] <= 0 <= ci[1]
        c = x - x.mean()
        b = (c @ noise) / (c @ c)
        r = noise - noise.mean() - b * c
        plain += abs(b) <= 2.074 * np.sqrt((r @ r) / 22 / (c @ c))
    assert covered / 500 >= least
    assert covered >= plain


def test_drift_is_relative_per_minute() -> None:
    rising = [1e6 * 1.1 ** (i / 60) for i in range(12)]  # windows of 1 s, 10 % a minute
    found = drift([windows_of(_arrays(rising), _observed(None), 1.0)], 1.0)
    assert found["per_minute"] == pytest.approx(np.log(1.1), rel=1e-3)
    assert found["n"] == 12 and found["processes"] == 1
    both = drift([windows_of(_arrays(rising), _observed(None), 1.0)] * 2, 1.0)
    assert both["processes"] == 2 and "over processes" in both["method"]
    few = drift([windows_of(_arrays([1e6] * 3), _observed(None), 1.0)], 1.0)
    assert few["per_minute"] is None and "fewer than 4 windows" in few["reason"]


def _verdict(
    p50: list[float], mhz: list[float] | None, cpu: float = 1.0, method: str = "scaling_cur_freq"
) -> Any:
    arrays = _arrays([1e6 * p for p in p50])
    if cpu != 1.0:
        arrays["cpu_ns"] = np.full_like(arrays["wall_ns"], 1e6)
    observed = _observed(mhz, len(p50) + 1, method)
    return throttling([windows_of(arrays, observed, 1.0)], observed)


STEP = [1.0] * 6 + [1.2] * 6


def test_slower_at_a_lower_clock_is_throttled() -> None:
    found = _verdict(STEP, [2000.0] * 6 + [1600.0] * 6)
    assert found["throttled"] is True
    assert found["p50_ratio"] == pytest.approx(1.2)
    assert found["mhz_ratio"] == pytest.approx(0.8)


def test_slower_at_the_same_clock_is_not() -> None:
    assert _verdict(STEP, [2000.0] * 12)["throttled"] is False


def test_a_lower_clock_that_costs_nothing_is_not() -> None:
    assert _verdict([1.0] * 12, [2000.0] * 6 + [1600.0] * 6)["throttled"] is False


def test_without_a_clock_it_is_unknown_unless_only_wall_time_rose() -> None:
    found = _verdict(STEP, None)
    assert found["throttled"] is None and "does not tell the CPU clock" in found["reason"]
    assert _verdict(STEP, [2000.0] * 12, method="/proc/cpuinfo")["throttled"] is None, "a guest's constant"
    other = _verdict(STEP, None, cpu=0.0)
    assert other["throttled"] is False and "other work took the CPU" in other["reason"]
    assert _verdict([1.0] * 12, None)["throttled"] is False


def test_figures_warn_about_what_was_seen() -> None:
    observed = _observed([2000.0] * 6 + [1600.0] * 6)
    found, warnings = sustained_figures(
        [_arrays([1e6 * p for p in STEP])], [{"observed": observed, "full": True}], 1.0
    )
    assert found["n"] == 240 and found["duration_s"] == 12
    assert any(w.startswith("throttled") for w in warnings)
    assert any("is full" in w for w in warnings)
