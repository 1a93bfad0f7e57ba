"""The distribution of a part over processes, and states of the page cache that could not be made."""

from __future__ import annotations

from typing import Any

import pytest

from portcall.bench.modes_cold import KEYS, cold_figures, distribution

MB = 1 << 20


@pytest.mark.parametrize("n", [0, 1, 2, 5, 29])
def test_only_what_n_supports_is_given(n: int) -> None:
    found = distribution([1e6 + i for i in range(n)])
    assert found["n"] == n
    assert (found["min_ns"] is None) == (n == 0)
    assert (found["ci"] is None) == (n < 2)
    assert (found["p50_ns"] is None) == (n < 5)
    assert (found["p90_ns"] is None) == (n < 29)
    assert found["p99_ns"] is None


def test_a_part_of_no_time_has_no_geometric_mean() -> None:
    found = distribution([0, 5])
    assert found["geomean_ns"] is None and found["ci"] is None and found["min_ns"] == 0


def _answer(total: int) -> dict[str, Any]:
    return dict.fromkeys(KEYS, 1000) | {"total_ns": total}


def _drop(method: str | None = "posix_fadvise", left: int | None = 0) -> dict[str, Any]:
    return {
        "method": method, "reason": None if method else "cannot write it", "files": 2, "bytes": 8 * MB,
        "resident_before_bytes": 8 * MB, "resident_after_bytes": left,
    }  # fmt: skip


def test_dropped_stands_beside_warm() -> None:
    answers = {"warm": [_answer(100), _answer(100)], "artifact": [_answer(300), _answer(300)]}
    found, warnings = cold_figures(["warm", "artifact"], answers, {"artifact": [_drop(), _drop()]})
    warm, dropped = found["caches"]
    assert (warm["method"], warm["ratio"], warm["dropped"]) == (None, None, None)
    assert (dropped["method"], dropped["n"]) == ("posix_fadvise", 2)
    assert dropped["ratio"] == pytest.approx(3)
    assert dropped["dropped"]["resident_after_bytes"] == 0
    assert not warnings


def test_what_could_not_be_dropped_is_absent_with_the_reason() -> None:
    found, warnings = cold_figures(
        ["warm", "system"], {"warm": [_answer(100)] * 2}, {"system": [_drop(None)]}
    )
    entry = found["caches"][1]
    assert (entry["parts"], entry["reason"], entry["method"]) == (None, "cannot write it", None)
    assert warnings == ["page cache system: cannot write it"]


def test_what_stayed_in_the_page_cache_is_said() -> None:
    answers = {"artifact": [_answer(100)] * 2}
    assert "stayed" in cold_figures(["artifact"], answers, {"artifact": [_drop(left=MB)]})[1][0]
    assert "does not tell" in cold_figures(["artifact"], answers, {"artifact": [_drop(left=None)]})[1][0]
