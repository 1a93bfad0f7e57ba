"""The benchmark of the steady-state detector on a few series, its verdicts on planted decisions, and its labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import overhead, steady, steady_recordings
from benchmarks.steady import Case, Decision, recorded_verdict, verdict
from benchmarks.steady_labels import LABELLED, LABELS


def test_labels_are_those_of_the_recordings() -> None:
    label = json.loads(LABELS.read_text())
    recordings = steady_recordings.load_packed()
    assert sorted(label["series"]) == sorted(LABELLED) and len(LABELLED) == 20
    assert not set(LABELLED) & set(steady.flat_recordings()), "a labelled recording is not for splicing"
    for name, stretches in label["series"].items():
        series = recordings[name]
        starts = [start for start, _ in stretches]
        assert starts[0] == 0 and starts == sorted(starts) and starts[-1] < series.sum() / 1e9


def test_one_series_of_every_kind() -> None:
    """Replayed as the loop sees them; most are right (how many is for the benchmark itself)."""
    cases = list(steady.spliced(5, len(steady.KINDS)))
    assert [c.kind for c in cases] == list(steady.KINDS)
    wrong = [c.kind for c in cases if verdict(c, steady.replay(c.series)) is not None]
    assert len(wrong) <= 2, wrong
    again = next(iter(steady.spliced(5, 1)))
    assert np.array_equal(again.series, cases[0].series)


STEP = np.where(np.arange(4000) < 500, 2e6, 1e6)  # 1 ms each from 1 s on
CASE = Case("step", "made", STEP, STEP / 1e6, 1.0)


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (Decision(500, 1500, True), None),
        (Decision(450, 1450, True), None),
        (Decision(200, 900, True), "early"),
        (Decision(1600, 2600, True), "late"),
        (Decision(1400, 2400, True), None),
        (Decision(1000, 2000, False), "missed"),
    ],
)
def test_what_is_wrong_with_a_step(decision: Decision, expected: str | None) -> None:
    assert verdict(CASE, decision) == expected


def test_what_is_wrong_with_a_drift() -> None:
    factor = np.exp(np.arange(4000) / 10_000)
    case = Case("drift", "made", factor * 1e6, factor, None)
    assert verdict(case, Decision(300, 1300, True)) == "never"
    assert verdict(case, Decision(300, 1300, False)) is None


def test_what_is_wrong_with_a_recording() -> None:
    label = [[0.0, 2e6], [1.0, 1e6]]
    assert recorded_verdict(STEP, label, Decision(500, 1500, True)) is None
    assert recorded_verdict(STEP, label, Decision(300, 900, True)) == "early"
    assert recorded_verdict(STEP, label, Decision(2000, 3000, False)) == "missed"


def test_recordings_survive_packing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("recordings")
    times = np.random.default_rng(0).integers(5_000, 50_000, 1000)
    np.save(folder / "a-s-quiet-0.npy", times)
    np.save(folder / "b-s-quiet-0.npy", np.full(1000, 1500))  # too fast to keep
    steady_recordings.pack(folder, folder / "packed.npz")
    found = steady_recordings.load_packed(folder / "packed.npz")
    assert list(found) == ["a-s-quiet-0"]
    assert np.abs(found["a-s-quiet-0"] / times - 1).max() < 0.003


def test_overhead_of_one_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(
        "onnxruntime", reason="ONNX Runtime is not installed: pip install 'portcall[onnxruntime]'"
    )
    overhead.main(["--processes", "2", "--pairs", "4", "--chunk", "50", "--backends", "onnxruntime"])
    table = capsys.readouterr().out
    assert "onnxruntime" in table and "in the sample us" in table
    low, high = overhead.interval([1.0, 2.0, 3.0])
    assert low < 2.0 < high and high - low == pytest.approx(2 * 4.302652729911 / 3**0.5)
