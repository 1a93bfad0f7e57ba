"""``portcall compare`` from end to end: fresh processes in pairs, verdicts, and what can go wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import portcall.api
from portcall.bench.compare import CompareOptions
from portcall.bench.compare_report import compare_table
from portcall.core import BadInput, CellFailed, Workload
from tests.exporters.graphs import write_onnx

QUICK = CompareOptions(
    budget_s=60.0, turns_s=0.2, most_pairs=6, memory=False, workload=Workload(warmup_s=0.05)
)


def chain(path: Path, length: int) -> Path:
    """Write *length* products of 192 x 192 matrices, one after the other."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": (rng.standard_normal((192, 192)) / 14).astype(np.float32) for i in range(length)}
    nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], f"m{i}") for i in range(length)]
    return write_onnx(path, nodes, {"t0": [192, 192]}, {f"t{length}": [192, 192]}, weights)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain(tmp_path_factory.mktemp("a path with spaces") / "short.onnx", 4)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain(tmp_path_factory.mktemp("long") / "long.onnx", 8)


def metric(answer: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in answer["metrics"] if m["name"] == name)
    return found


def test_twice_the_work_is_a_regression_and_half_an_improvement(short: Path, long: Path) -> None:
    slower = portcall.api.compare(short, long, options=QUICK)
    assert slower["verdict"] == "regressed"
    assert metric(slower, "p50")["ratio"] > 1.3
    assert slower["stopped"] in ("clear", "pairs")
    faster = portcall.api.compare(long, short, options=QUICK)
    assert faster["verdict"] == "improved"
    assert faster["base"]["processes"] == faster["pairs"] == len({*range(faster["pairs"])})


def test_a_planted_slowdown_shows_in_wall_and_cpu_time(short: Path) -> None:
    answer = portcall.api.compare(short, short, options=replace(QUICK, slowdown=0.6))
    assert answer["verdict"] == "regressed"
    for name in ("p50", "cpu"):
        assert 1.3 < metric(answer, name)["ratio"] < 1.9
    assert answer["candidate"]["slowdown"] == 0.6


def test_memory_is_compared_too(short: Path) -> None:
    options = replace(QUICK, memory=True, metric="memory", most_pairs=3)
    answer = portcall.api.compare(short, short, options=options)
    assert metric(answer, "memory")["ratio"] == pytest.approx(1.0, abs=0.05)
    assert answer["base"]["peak_bytes"] > 1e6


def test_several_threads_get_no_verdict_on_cpu_time(short: Path) -> None:
    options = replace(QUICK, most_pairs=3, workload=Workload(threads=2, warmup_s=0.05))
    found = metric(portcall.api.compare(short, short, options=options), "cpu")
    assert found["verdict"] is None and "one thread" in found["reason"]


def test_fixed_intervals_take_the_asked_for_pairs(short: Path) -> None:
    options = replace(QUICK, fixed=True, most_pairs=4, budget_s=0.001)
    answer = portcall.api.compare(short, short, options=options)
    assert (answer["pairs"], answer["interval"], answer["stopped"]) == (4, "fixed-sample", "pairs")


def test_judged_by_a_percentile_every_pair_supports_it(tmp_path: Path) -> None:
    file = chain(tmp_path / "slow.onnx", 60)
    options = replace(QUICK, turns_s=0.001, most_pairs=6, fixed=True)
    by_p50, by_p95 = (
        portcall.api.compare(file, file, options=replace(options, metric=name)) for name in ("p50", "p95")
    )
    assert by_p50["base"]["n"] < 6 * 59 <= by_p95["base"]["n"]
    assert "--metric p95 takes more" in metric(by_p50, "p95")["reason"]
    assert metric(by_p95, "p95")["ci"] is not None
    p99 = metric(by_p95, "p99")  # all pairs together support it, once
    assert (p99["ratio"] is not None, p99["ci"], p99["verdict"]) == (True, None, "inconclusive")
    assert "groups of pairs that support p99: 1" in p99["reason"]
    assert p99["reason"] in compare_table(by_p95)


def test_a_pair_takes_no_more_than_its_share_of_the_budget(tmp_path: Path) -> None:
    file = chain(tmp_path / "slow.onnx", 60)
    options = replace(QUICK, metric="p99", turns_s=0.001, most_pairs=3, budget_s=2.0)
    answer = portcall.api.compare(file, file, options=options)
    assert answer["base"]["n"] < answer["pairs"] * 299
    assert (answer["verdict"], metric(answer, "p99")["ci"]) == ("inconclusive", None)


def test_the_budget_ends_it_undecided(portcall: Callable[..., Any], short: Path) -> None:
    done = portcall("compare", short, short, "--max-time", "0.1", "--margin", "0.01%", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 3
    assert (answer["verdict"], answer["stopped"], answer["pairs"]) == ("inconclusive", "budget", 3)
    p99 = metric(answer, "p99")
    assert p99["ratio"] is not None or "support no p99" in p99["reason"]


def test_the_command_exits_with_one_on_a_regression(
    portcall: Callable[..., Any], short: Path, long: Path
) -> None:
    done = portcall("compare", short, long, "--max-time", "30")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("regressed: p50 +")


def test_another_environment(
    portcall: Callable[..., Any], short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "portcall.toml").write_text(f'[environments.other]\npython = "{sys.executable}"\n')
    monkeypatch.chdir(tmp_path)
    import portcall.api as api

    answer = api.compare(f"{short}@other", short, options=replace(QUICK, most_pairs=3))
    assert answer["base"]["artifact"].endswith("@other")
    assert answer["pairs"] == 3
    with pytest.raises(BadInput, match="no environment 'newer'") as found:
        api.compare(short, f"{short}@newer", options=QUICK)
    assert "It has: other" in found.value.fix


def test_a_metric_or_a_side_that_does_not_exist(short: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no metric 'p42'"):
        portcall.api.compare(short, short, options=replace(QUICK, metric="p42"))
    with pytest.raises(BadInput, match="no artifact or model file"):
        portcall.api.compare(short, tmp_path / "none.onnx", options=QUICK)


def test_a_side_that_cannot_be_loaded_is_named(short: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(CellFailed):
        portcall.api.compare(short, broken, options=QUICK)


def test_a_process_that_dies_in_its_turn_is_named(short: Path, tmp_path: Path) -> None:
    """An interpreter that kills itself a while after its start: the pair ends with an error, not with a hang."""
    dying = tmp_path / "python-that-dies"
    dying.write_text(
        f'#!/bin/sh\n"{sys.executable}" "$@" &\nwhile kill -0 $!; do sleep 1.5; kill -9 $!; done\n'
    )
    dying.chmod(0o755)
    (tmp_path / "portcall.toml").write_text(f'[environments.dying]\npython = "{dying}"\n')
    import os

    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(CellFailed) as found:
            portcall.api.compare(
                short, f"{short}@dying", options=replace(QUICK, turns_s=20.0, most_pairs=1, budget_s=60)
            )
    finally:
        os.chdir(before)
    assert "candidate" in str(found.value) or "worker" in str(found.value)
