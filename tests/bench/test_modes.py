"""Settings of the modes: defaults and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from portcall.bench.modes import MODES, Arrival, Cold, Mode, Sustained, Throughput, _powers, get_mode
from portcall.core import BadInput


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Throughput(batches=()), "--batches"),
        (lambda: Throughput(batches=(0,)), "--batches"),
        (lambda: Throughput(streams=(2000,)), "more than 1024"),
        (lambda: Cold(caches=("tepid",)), "knows no 'tepid'"),
        (lambda: Cold(caches=()), "empty list"),
        (lambda: Sustained(duration_s=10, window_s=5), "fewer than 4 windows"),
        (lambda: Sustained(duration_s=float("nan")), "--duration"),
        (lambda: Sustained(window_s=0), "--window"),
        (lambda: Arrival(rate_per_s=-1), "--rate"),
        (lambda: Arrival(rate_per_s=float("inf")), "--rate"),
        (lambda: Arrival(rate_per_s=1e6, duration_s=60), "more than 2000000 requests"),
        (lambda: Arrival(rate_per_s=0.1, duration_s=1), "fewer than 5 requests"),
        (lambda: Arrival(rate_per_s=10, seed=-1), "--seed"),
        (lambda: Arrival(rate_per_s=10, drain_s=-1.0), "drain_s"),
        (lambda: get_mode("arrival"), "needs a rate"),
        (lambda: get_mode("hot"), "no mode 'hot'; there are: latency"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Mode], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        make()


def test_defaults() -> None:
    assert get_mode("latency") is None
    for name in set(MODES) - {"latency", "arrival"}:
        mode = get_mode(name)
        assert mode is not None and mode.name == name and mode.to_json()["name"] == name
    assert Sustained.processes == 1, "minutes each"
    assert Arrival(10).processes == 5


@pytest.mark.parametrize(("limit", "values"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_streams_go_up_to_the_cpus(limit: int, values: tuple[int, ...]) -> None:
    assert _powers(limit) == values
