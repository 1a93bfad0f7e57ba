"""``compare`` of two saved benches: independent processes, machines and workloads that must match."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.api
from portcall.bench.compare_saved import _welch
from portcall.core import BadInput
from tests.saved_benches import MACHINE, Arrays, measured, save, unavailable


def drawn(level: float, seed: int, processes: int = 12, spread: float = 0.01) -> Arrays:
    """Return processes whose levels vary by *spread*, 500 inferences each."""
    rng = np.random.default_rng(seed)
    return [
        (1e6 * level * np.exp(spread * rng.standard_normal()) * (1 + 0.01 * rng.random(500))).astype(np.int64)
        for _ in range(processes)
    ]


def bench(folder: Path, wall: Arrays, **changes: Any) -> Path:
    return save(folder, [(measured(wall, **changes), wall)])


def metric(answer: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in answer["metrics"] if m["name"] == name)
    return found


def test_a_slower_one_is_found_and_the_same_is_unchanged(tmp_path: Path) -> None:
    base = bench(tmp_path / "a bench", drawn(1.0, 1))
    slower = portcall.api.compare(base, bench(tmp_path / "slow", drawn(1.1, 2)))
    assert slower["verdict"] == "regressed"
    low, high = metric(slower, "p50")["ci"]
    assert low < 1.1 < high
    same = portcall.api.compare(base, bench(tmp_path / "same", drawn(1.0, 3)))
    assert same["verdict"] == "unchanged"
    assert (same["stopped"], same["pairs"]) == ("saved", 0)


def test_another_machine_is_incomparable_and_another_stack_is_printed(
    portcall: Callable[..., Any], tmp_path: Path
) -> None:
    wall = drawn(1.0, 1)
    environment = measured(wall)["environment"]
    newer = {**environment, "stack": {**environment["stack"], "runtime": "onnxruntime 1.32.0"}}
    base = bench(tmp_path / "base", wall)
    done = portcall("compare", base, bench(tmp_path / "newer", drawn(1.0, 2), environment=newer))
    assert "differs: runtime: onnxruntime 1.31.1 -> onnxruntime 1.32.0" in done.stdout
    elsewhere = {**environment, "machine": {**MACHINE, "cpu_model": "Another CPU"}}
    other = bench(tmp_path / "other", drawn(1.0, 2), environment=elsewhere)
    done = portcall("compare", base, other, "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 3
    assert answer["verdict"] == "incomparable"
    assert answer["warnings"] == ["another machine: cpu_model: Some CPU -> Another CPU"]


def test_another_workload_is_incomparable(tmp_path: Path) -> None:
    wall = drawn(1.0, 1)
    four = bench(tmp_path / "four", wall, workload={"batch": 4, "threads": 1})
    answer = portcall.api.compare(bench(tmp_path / "one", wall), four)
    assert answer["verdict"] == "incomparable"
    assert answer["warnings"] == ["the workloads differ in batch: 1 and 4"]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    wall = drawn(1.0, 1)
    one = bench(tmp_path / "one", wall)
    two = save(tmp_path / "two", [(measured(wall), wall), (measured(wall), wall)])
    with pytest.raises(BadInput, match="holds 2 measured results"):
        portcall.api.compare(one, two)
    none = save(tmp_path / "none", [(unavailable(), [])])
    with pytest.raises(BadInput, match="holds 0 measured results"):
        portcall.api.compare(one, none)
    with pytest.raises(BadInput, match="one side is a saved bench"):
        portcall.api.compare(one, "model.onnx")


def test_one_process_gives_no_interval(tmp_path: Path) -> None:
    answer = portcall.api.compare(
        bench(tmp_path / "a", drawn(1.0, 1, processes=1)), bench(tmp_path / "b", drawn(1.0, 2))
    )
    assert answer["verdict"] == "inconclusive"
    assert "2 --processes" in metric(answer, "p50")["reason"]
    memory = metric(answer, "memory")
    assert (memory["ratio"], memory["ci"]) == (1.0, None)
    assert "one peak" in memory["reason"]


def test_the_interval_is_welchs() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed; portcall[dev] brings it")
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal(7), 2 * rng.standard_normal(15) + 1
    ratio = _welch(a, b)
    wanted = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert ratio.interval == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert math.isclose(ratio.center, b.mean() - a.mean())
