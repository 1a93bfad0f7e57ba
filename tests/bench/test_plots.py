"""Plots as their readers see them: the SVG's texts and series, never its pixels."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall.bench import plots
from portcall.bench.saved import SavedResult, load_results
from portcall.bench.tradeoff import pareto_front, tradeoff
from tests.saved_benches import measured, samples, save, unavailable

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'portcall[plot]'")

WRITERS = {"ecdf": plots.write_ecdf, "series": plots.write_series, "tradeoff": plots.write_tradeoff}
HOSTILE = "_<script>\x07&amp; $\\frac{1}{2}$ 日本語"
SHOWN = HOSTILE.replace("\x07", "\ufffd")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def results(tmp_path: Path) -> list[SavedResult]:
    """Two measured cells, the second with a hostile name, and one that could not run."""
    one, two = samples(), samples(4, n=700, base_ns=4_000_000, seed=1)
    hostile = measured(two, artifact=f"out/{HOSTILE}", precision="as is", size_bytes=3_000_000)
    return load_results(save(tmp_path / "b", [(measured(one), one), (unavailable(), []), (hostile, two)]))


def draw(name: str, results: list[SavedResult], folder: Path) -> tuple[list[str], list[str]]:
    """Return the texts and the identifiers of the groups in the SVG."""
    WRITERS[name](results, folder / f"{name}.svg")
    root = ET.parse(folder / f"{name}.svg").getroot()
    texts = ["".join(e.itertext()).strip() for e in root.iter(f"{SVG}text")]
    groups = [e.get("id") or "" for e in root.iter(f"{SVG}g")]
    return texts, groups


def count(groups: list[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, g) is not None for g in groups)


def test_the_distribution_has_a_curve_per_artifact_with_its_percentiles(
    results: list[SavedResult], tmp_path: Path
) -> None:
    texts, groups = draw("ecdf", results, tmp_path)
    assert count(groups, r"ecdf-\d+") == 2
    assert count(groups, r"percentile-0-p\d+_ns") == 4, "P50, P90, P95, P99"
    assert count(groups, r"interval-\d-p\d+_ns") == sum(
        len(r.latency["ci"].keys() & plots.MARKED) for r in results if r.measured
    )
    assert "onnxruntime:int8, n=1200, 3 processes" in texts
    assert f"{SHOWN}, n=2800, 4 processes" in texts
    assert {"P50", "P90", "P95", "P99"} <= set(texts) and "P99.9" not in texts
    assert any(t.startswith("latency of one inference, ms") for t in texts)


def test_a_percentile_that_n_does_not_support_is_not_marked(tmp_path: Path) -> None:
    wall = samples(2, n=20)
    found = load_results(save(tmp_path / "b", [(measured(wall), wall)]))
    texts, groups = draw("ecdf", found, tmp_path)
    assert count(groups, r"percentile-0-p\d+_ns") == 2 and "P99" not in texts


def test_the_series_has_a_line_per_process(results: list[SavedResult], tmp_path: Path) -> None:
    texts, groups = draw("series", results, tmp_path)
    assert [count(groups, rf"process-{i}-\d+") for i in (0, 1)] == [3, 4]
    assert count(groups, r"p50-\d") == 2
    assert "onnxruntime:int8 n=1200, 3 processes; dashed: P50" in [" ".join(t.split()) for t in texts]


def test_an_outlier_and_a_step_survive_in_a_long_series() -> None:
    values = np.full(300_000, 1000)
    values[200_000:] = 1500
    values[123_456], values[7] = 90_000, 10
    index, kept = plots._envelope(values, 2000)
    assert index.size <= 2000
    assert {123_456, 7} <= set(index.tolist())
    np.testing.assert_array_equal(values[index], kept)
    assert kept[index < 200_000].min() == 10 and set(kept[index >= 200_000]) == {1500}
    ranks = plots._ranks(300_000)
    assert ranks.size <= 2000 and ranks[0] == 0 and (ranks[-100:] == np.arange(299_900, 300_000)).all()


def test_the_tradeoff_has_a_point_per_artifact(results: list[SavedResult], tmp_path: Path) -> None:
    texts, groups = draw("tradeoff", results, tmp_path)
    assert count(groups, r"point-\d") == 2 and count(groups, "front") == 1
    assert "agreement with the source, %" in texts
    assert "onnxruntime:int8, 1.50 MB, n=1200" in texts and f"{SHOWN}, 3.00 MB, n=2800" in texts
    assert any("accuracy: n=64" in t for t in texts)


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_not_measured_is_said(name: str, results: list[SavedResult], tmp_path: Path) -> None:
    texts, _ = draw(name, results, tmp_path)
    assert any("tflite:int8: not measured. unavailable: ai-edge-litert is not installed" in t for t in texts)


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_measured_is_a_picture_that_says_so(name: str, tmp_path: Path) -> None:
    texts, groups = draw(name, load_results(save(tmp_path / "b", [(unavailable(), [])])), tmp_path)
    assert any("nothing was measured" in t or "no artifact has" in t for t in texts)
    assert any("ai-edge-litert is not installed" in t for t in texts)
    assert not count(groups, r"(ecdf|process|point)-.*")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_same_results_give_the_same_bytes(
    name: str, suffix: str, results: list[SavedResult], tmp_path: Path
) -> None:
    import matplotlib

    first, second = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    WRITERS[name](results, first)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):  # the user's own style
        WRITERS[name](results, second)
        assert matplotlib.rcParams["font.size"] == 30, "and it is left alone"
    assert first.read_bytes() == second.read_bytes()


def test_no_display_is_looked_for(
    results: list[SavedResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test may have loaded it
    draw("ecdf", results, tmp_path)
    assert "matplotlib.pyplot" not in sys.modules


# ------------------------------------------------------------------------------------------- the Pareto front


def test_the_front_holds_what_nothing_beats() -> None:
    points: list[tuple[float, ...]] = [(1, 5, 1), (2, 4, 1), (2, 5, 1), (3, 3, 3), (3, 3, 3), (1, 5, 2)]
    assert pareto_front(points) == [True, True, False, True, True, False]
    assert pareto_front([]) == [] and pareto_front([(1.0,)]) == [True]


def cell(precision: str, base_ns: int, **changes: Any) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
    wall = samples(base_ns=base_ns)
    return measured(wall, precision=precision, **changes), wall


def test_accuracy_on_labels_comes_before_parity(tmp_path: Path) -> None:
    top1 = {"metric": "top1", "n": 500, "reference": 0.97, "value": 0.96, "ci95": [-0.02, 0.001]}
    cells = [
        cell("fp32", 3_000_000, eval={**top1, "value": 0.97}, size_bytes=4_000_000),
        cell("int8", 1_000_000, eval=top1, size_bytes=1_000_000),
        cell("fp16", 3_500_000, eval=top1, size_bytes=2_000_000),
        cell("int16x8", 1_000_000),
        (unavailable(), []),
    ]
    found = tradeoff(load_results(save(tmp_path / "b", cells)))
    assert found.axis == "top-1 accuracy, %"
    assert [(p.name, p.accuracy, p.front) for p in found.points] == [
        ("onnxruntime:fp32", 97.0, True),
        ("onnxruntime:int8", 96.0, True),
        ("onnxruntime:fp16", 96.0, False),
    ]
    assert found.points[1].interval == pytest.approx((95.0, 97.1))
    assert found.points[1].samples == (1200, 500)
    assert [name for name, _ in found.left_out] == ["onnxruntime:int16x8", "tflite:int8"]
    assert found.left_out[0][1] == "no top-1 accuracy, %"


def test_sqnr_where_nothing_has_classes(tmp_path: Path) -> None:
    parity = {"n": 8, "samples": "held-out", "sqnr_db": 41.0, "agreement": None}
    found = tradeoff(load_results(save(tmp_path / "b", [cell("int8", 1000, parity=parity)])))
    assert found.axis == "SQNR against the source, dB" and found.points[0].accuracy == 41.0


def test_no_accuracy_at_all_is_said(tmp_path: Path) -> None:
    found = tradeoff(load_results(save(tmp_path / "b", [cell("as is", 1000, parity=None)])))
    assert found.points == () and found.left_out[0][1].startswith("no accuracy")


def test_what_is_emulated_or_interpreted_says_so(tmp_path: Path) -> None:
    parity = {"n": 8, "agreement": 0.9, "interpreted": True}
    results = load_results(save(tmp_path / "b", [cell("int8", 1000, parity=parity, emulated=True)]))
    texts, _ = draw("ecdf", results, tmp_path)
    assert any(t.startswith("onnxruntime:int8 (emulated), n=") for t in texts)
    texts, _ = draw("tradeoff", results, tmp_path)
    assert any(t.startswith("onnxruntime:int8 (emulated) (accuracy by an interpreter)") for t in texts)
