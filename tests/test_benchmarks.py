"""``make bench-calibration`` on 4 images, with the peers that are installed here; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import calibration
from benchmarks.calibration import Prepared, Settings, plan_rows, run_rounds
from benchmarks.calibration_contenders import CONTENDERS, find
from benchmarks.calibration_report import Row, Trial, table, to_json
from benchmarks.calibration_samples import Images, Reader
from benchmarks.calibration_setup import environment, write_images
from examples.efficientnet_lite0 import calibration as example_crops
from portcall.core import UnavailableError
from tests.conftest import ROOT

LIGHT = [c.name for c in CONTENDERS if c.venv is None and not c.heavy]
ASKED = [*LIGHT, "ort-percentile-strided", "ort-entropy"]


@dataclass(frozen=True, slots=True)
class Done:
    """One run of the script: its exit status, its table, its progress, and its JSON."""

    status: int
    output: str
    progress: str
    answer: dict[str, Any]

    def row(self, name: str) -> dict[str, Any]:
        [found] = [r for r in self.answer["results"] if r["contender"] == name]
        return dict(found)


def _bench(folder: Path, cache: Path, *arguments: str) -> Done:
    result = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.calibration", "--folder", str(folder), "--json", str(result)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PORTCALL_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.is_file(), done.stderr
    return Done(done.returncode, done.stdout, done.stderr, json.loads(result.read_text()))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Done:
    cache = tmp_path_factory.getbasetemp() / "cache"
    arguments = ["--images", "4", "--rounds", "1", "--only", ",".join(ASKED)]
    return _bench(tmp_path_factory.mktemp("bench"), cache, *arguments)


@pytest.mark.slow
def test_every_contender_here_has_a_result(bench: Done) -> None:
    reasons = {r["contender"]: r["reason"] for r in bench.answer["results"]}
    assert bench.status == 0, reasons
    assert list(reasons) == [c.name for c in CONTENDERS if c.name in ASKED]
    assert not any(reasons.values()), reasons
    for name in ASKED:
        row, contender = bench.row(name), find(name)
        assert row["outcome"] == "measurement"
        assert row["n"] == len(row["trials"]) == 1
        assert set(row["versions"]) == set(contender.distributions)
        if name.startswith("limit"):
            assert row["tensors"] is None
        else:
            assert row["tensors"] >= 40, "EfficientNet-Lite0 has about 50 convolutions"


@pytest.mark.slow
def test_seconds_leave_imports_out_and_ratios_are_to_the_limit(bench: Done) -> None:
    def seconds(name: str) -> float:
        [trial] = bench.row(name)["trials"]
        return float(sum(s for part, s in trial["seconds"].items() if not part.startswith("import")))

    for name in ASKED:
        row = bench.row(name)
        assert row["seconds"] == pytest.approx(seconds(name))
        assert row["ratio"]["median"] == pytest.approx(seconds(name) / seconds("limit"))
        assert row["seconds"] < sum(row["trials"][0]["seconds"].values()) < row["trials"][0]["process_s"]


@pytest.mark.slow
def test_memory_counts_the_imports_and_every_process(bench: Done) -> None:
    for name in ASKED:
        [trial] = bench.row(name)["trials"]
        peaks = trial["peak_rss_bytes"]
        assert set(peaks) == set(trial["seconds"])
        assert bench.row(name)["peak_rss_bytes"] == max(peaks.values())
        assert all(p > 20e6 for p in peaks.values()), "an interpreter with numpy is larger"
    # What it is for: onnxruntime's entropy holds every output of every sample.
    held = 4 * 20e6
    assert bench.row("ort-entropy")["peak_rss_bytes"] > bench.row("ort-minmax")["peak_rss_bytes"] + held


@pytest.mark.slow
def test_the_table_has_one_line_per_contender(bench: Done) -> None:
    lines = [line.split()[:3] for line in bench.output.splitlines()]
    for name in ASKED:
        assert lines.count([name, "4", "1"]) == 1, bench.output
    assert "onnxruntime" in bench.output and "CPUs" in bench.output


@pytest.mark.slow
def test_who_runs_out_of_memory_is_a_row_that_says_so(tmp_path: Path) -> None:
    arguments = ["--images", "4", "--rounds", "2", "--memory-limit", "0.3", "--only", "ort-entropy"]
    done = _bench(tmp_path, Path(os.environ["PORTCALL_CACHE"]), *arguments)
    row = done.row("ort-entropy")
    assert (row["outcome"], row["reason"]) == ("failed", "out of memory at 0.3 GB")
    assert row["seconds"] is None and row["n"] == 0
    assert [t["round"] for t in done.row("limit")["trials"]] == [1, 2]
    turns = [line.split(":")[0] for line in done.progress.splitlines() if line.startswith("4 images")]
    assert turns == ["4 images, round 1, limit", "4 images, round 1, ort-entropy", "4 images, round 2, limit"]
    assert done.status == 0, "a peer's failure is a result"
    [line] = [line for line in done.output.splitlines() if line.startswith("ort-entropy")]
    assert line.endswith("out of memory at 0.3 GB")


def test_who_has_no_environment_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnavailableError) as caught:
        environment("nncf", tmp_path)
    assert "pip install nncf==" in str(caught.value) and "failed" in str(caught.value)
    assert not (tmp_path / "venv-nncf" / "installed.txt").exists(), "it would be taken for a whole one"

    rows = plan_rows([find("nncf")], 4, 2, heavy=False)
    prepared = Prepared({"onnx": UnavailableError("unused")}, {"nncf": caught.value})
    run_rounds(rows, prepared, tmp_path / "none.npz", Settings(tmp_path, 1, 10**9, 60.0))
    assert rows[0].reason == str(caught.value)
    assert table(rows).splitlines()[1].startswith("nncf ")
    assert rows[0].reason in table(rows)
    assert to_json(rows, {})["results"][0]["outcome"] == "failed"


def _trial(number: int, seconds: float) -> Trial:
    return Trial(number, {"import": 9.0, "pass": seconds, "ranges": 0.5}, 12.0, {"pass": 10**8}, 7, {})


def test_noise_that_both_share_does_not_change_the_ratio() -> None:
    limit = Row(find("limit"), 100, 3, [_trial(1, 0.5), _trial(2, 1.5), _trial(3, 3.5)])
    peer = Row(find("ort-minmax"), 100, 3, [_trial(1, 2.5), _trial(2, 5.5), _trial(3, 11.5)])
    assert peer.ratios(limit) == [3.0, 3.0, 3.0]
    cells = table([limit, peer]).splitlines()[2].split()
    assert cells[:8] == ["ort-minmax", "100", "3", "6.00", "3.00", "3.00..3.00", "0.500", "100"]


def test_a_round_that_the_limit_lacks_has_no_ratio() -> None:
    limit = Row(find("limit"), 100, 2, [_trial(2, 0.5)], "no result within 1 s")
    peer = Row(find("ort-minmax"), 100, 2, [_trial(1, 0.5), _trial(2, 1.5)])
    assert peer.ratios(limit) == [2.0]
    assert peer.ratios(None) == []
    assert "n < 2: no result within 1 s" in table([limit, peer])


def test_what_is_heavy_runs_once_and_not_on_many_images() -> None:
    both = [find("ort-minmax"), find("ort-entropy")]
    assert [(r.rounds, r.reason) for r in plan_rows(both, 100, 5, heavy=False)] == [(5, ""), (1, "")]
    light, heavy = plan_rows(both, 500, 5, heavy=False)
    assert not light.reason and "--heavy" in heavy.reason
    assert [(r.rounds, r.reason) for r in plan_rows(both, 500, 5, heavy=True)] == [(5, ""), (5, "")]


def test_an_unknown_contender_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        calibration.main(["--only", "ort-minmx"])
    assert caught.value.code == 2
    assert "Did you mean 'ort-minmax'?" in capsys.readouterr().err


def test_samples_are_the_examples_crops_and_come_again(tmp_path: Path) -> None:
    write_images(4, tmp_path / "images.npz")
    images = Images(str(tmp_path / "images.npz"))
    assert (len(images), images.name, images.shape) == (4, "inputs", (1, 3, 224, 224))
    stored = np.load(tmp_path / "images.npz")["inputs"]
    assert stored.shape == (4, 3, 224, 224)
    for _ in range(2):
        for read, row, crop in zip(images, stored, example_crops(), strict=False):
            np.testing.assert_array_equal(read["inputs"], crop["inputs"])
            np.testing.assert_array_equal(read["inputs"][0], row)


def test_the_reader_stops_where_a_stride_ends(tmp_path: Path) -> None:
    write_images(4, tmp_path / "images.npz")
    reader = Reader(Images(str(tmp_path / "images.npz")))
    stored = np.load(tmp_path / "images.npz")["inputs"]

    def rest() -> list[Any]:
        return [feed["inputs"][0] for feed in iter(reader.get_next, None)]

    np.testing.assert_array_equal(reader.get_first()["inputs"][0], stored[0])
    reader.set_range(0, 3)
    np.testing.assert_array_equal(rest(), stored[:3])
    assert reader.get_next() is None
    reader.set_range(3, 4)
    np.testing.assert_array_equal(rest(), stored[3:])
    reader.rewind()
    np.testing.assert_array_equal(rest(), stored)
