"""What calibrate, merge, ranges and --show say: to people in text, to other tools in files and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.api
from portcall.calibration.methods import METHODS, derive
from portcall.calibration.report import BLOCKS, HEIGHT, calibration_lines, histogram_plot, ranges_table
from portcall.calibration.table import CalibrationTable, Section
from portcall.exporters import _encodings
from portcall.targets.agent.errors import BadInput
from tests.exporters.graphs import conv_add_mul

Array = np.ndarray[Any, Any]
Run = Any  # the fixture of conftest.py; its type is not importable under importlib mode


@dataclass
class Made:
    """A table with choices of ``conv_add_mul`` (tensors x, x2, r, s, y) on 40 samples, and a second section.

    The second is made up: another kind of graph, with its own tensors x and only_here.
    """

    model: Path
    data: Path
    table: Path
    onnx: Section


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTCALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        model, data, table = conv_add_mul(folder / "m.onnx"), folder / "d.npz", folder / "t.pctable"
        rng = np.random.default_rng(0)
        x, x2 = rng.standard_normal((40, 3, 8, 8)), rng.standard_normal((40, 4, 8, 8))
        np.savez(data, x=x.astype(np.float32), x2=x2.astype(np.float32))
        portcall.api.calibrate(model, data, table, auto=True)
        (section,) = CalibrationTable.load(table).sections.values()
        histograms = {"x": section.histograms["x2"], "only_here": section.histograms["s"]}
        # Sections are kept by hash: this one comes first in the file.
        other = Section(
            "tflite", "0", section.source_sha256, section.data, section.planned, section.observed, histograms,
            held_every=section.held_every,
        )  # fmt: skip
        CalibrationTable({}).with_section(section).with_section(other).save(table)
        yield Made(model, data, table, section)


# ranges


@pytest.mark.parametrize("method", ["minmax", "percentile:99.9", "entropy", "mse", "auto"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_are_the_sections(made: Made, method: str, symmetric: bool) -> None:
    answer = portcall.api.ranges(made.table, method=method, symmetric=symmetric)
    wanted = made.onnx.ranges(method, symmetric)
    assert [e["tensor"] for e in answer["ranges"]] == list(wanted)
    chosen = made.onnx.chosen(symmetric) if method == "auto" else dict.fromkeys(wanted, method)
    for entry in answer["ranges"]:
        found, seen = wanted[entry["tensor"]], made.onnx.histograms[entry["tensor"]]
        assert (entry["minimum"], entry["maximum"]) == (found.minimum, found.maximum)
        assert entry["symmetric"] == symmetric and entry["method"] == chosen[entry["tensor"]]
        assert (entry["observed_minimum"], entry["observed_maximum"]) == (seen.minimum, seen.maximum)
        assert not symmetric or entry["minimum"] == -entry["maximum"]


def test_the_command_equals_the_function(portcall: Run, made: Made) -> None:
    import portcall as package

    done = portcall("ranges", made.table, "--method", "mse", "--symmetric", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == package.api.ranges(made.table, method="mse", symmetric=True)
    table = portcall("ranges", made.table, "--method", "mse", "--symmetric").stdout.splitlines()
    assert table[0].split() == [
        "tensor",
        "method",
        "minimum",
        "maximum",
        "observed",
        "minimum",
        "observed",
        "maximum",
    ]
    assert len(table) == 1 + len(made.onnx.histograms)
    for line, (name, found) in zip(table[1:], made.onnx.ranges("mse", True).items(), strict=True):
        tensor, method, low, high, *_ = line.split()
        assert (tensor, method, low, high) == (name, "mse", f"{found.minimum:.6g}", f"{found.maximum:.6g}")


def test_another_kind(made: Made) -> None:
    answer = portcall.api.ranges(made.table, kind="tflite")
    assert [e["tensor"] for e in answer["ranges"]] == ["x", "only_here"]
    assert answer["ranges"][0]["maximum"] == made.onnx.histograms["x2"].maximum


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_tensorrt_cache(portcall: Run, made: Made, tmp_path: Path, method: str) -> None:
    path = tmp_path / "calibration.cache"
    done = portcall("ranges", made.table, "--method", method, "--write", "tensorrt-cache", "-o", path)
    assert (done.returncode, done.stdout) == (0, f"wrote {path}\n"), done.stderr
    scales = _encodings.read_tensorrt_cache(path.read_text())
    ranges = made.onnx.ranges(method, symmetric=True)  # implied
    assert list(scales) == list(ranges)
    for name, found in ranges.items():
        assert scales[name] == np.float32(found.maximum / 127) or scales[name] == pytest.approx(
            found.maximum / 127, rel=1e-7
        )


@pytest.mark.parametrize("symmetric", [False, True])
def test_qnn_encodings(portcall: Run, made: Made, tmp_path: Path, symmetric: bool) -> None:
    path = tmp_path / "encodings.json"
    options = ["--symmetric"] * symmetric
    done = portcall("ranges", made.table, "--write", "qnn", *options, "-o", path)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    ranges = made.onnx.ranges("minmax", symmetric)
    assert set(written["activation_encodings"]) == set(ranges)
    for name, (entry,) in written["activation_encodings"].items():
        found = ranges[name]
        assert entry["bitwidth"] == 8 and entry["is_symmetric"] == str(symmetric)
        extent = 2 * found.maximum / 254 * 255 if symmetric else found.maximum - found.minimum
        assert entry["max"] - entry["min"] == pytest.approx(extent, rel=1e-6), name
        assert entry["scale"] == pytest.approx(extent / 255, rel=1e-6), name
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        (["--kind", "tensorrt"], "holds no section of kind 'tensorrt'; it holds: ", "--kind"),
        (["--kind", "torch"], "holds no section of kind 'torch'", "--kind"),
        (["--write", "qnn"], "--write and -o belong together", "--write qnn -o"),
        (["-o", "FILE"], "--write and -o belong together", "--write qnn -o"),
        (["--method", "mean"], "mean", "minmax"),
        (["--write", "qnn", "-o", "missing/file.json"], "cannot write missing/file.json", "another -o"),
        (["--kind", "tflite", "--method", "auto"], "no choice of methods for asymmetric", "--auto"),
    ],
)
def test_ranges_that_cannot_be_told(
    portcall: Run, made: Made, options: list[str], message: str, fix: str, tmp_path: Path
) -> None:
    done = portcall("ranges", made.table, *options, "--json", cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 2 and done.stderr == "", done.stderr
    assert message in error["message"] and fix in error["fix"] + error["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_there_is_not(portcall: Run, made: Made, tmp_path: Path) -> None:
    import portcall as package

    done = portcall("ranges", made.table, "--write", "onnx", "-o", tmp_path / "f")
    assert done.returncode == 2 and "tensorrt-cache" in done.stderr
    with pytest.raises(BadInput, match="no format 'onnx' to write"):
        package.api.ranges(made.table, write="onnx", output=tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_the_table_of_ranges_aligns() -> None:
    entry = {
        "method": "mse",
        "minimum": -1.5,
        "maximum": 2.0,
        "observed_minimum": -3.0,
        "observed_maximum": 4.25,
    }
    lines = ranges_table([{"tensor": "a", **entry}, {"tensor": "a/much/longer/name", **entry}]).splitlines()
    assert [line.split()[-4:] for line in lines[1:]] == [["-1.5", "2", "-3", "4.25"]] * 2
    assert len({line.index("mse") for line in lines[1:]}) == 1


# --show


def test_show_in_json(portcall: Run, made: Made) -> None:
    done = portcall("calibrate", made.table, "--show", "s", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    histogram = made.onnx.histograms["s"]
    assert (shown["kind"], shown["tensor"], shown["n"]) == ("onnx", "s", histogram.n)
    assert shown["counts"] == histogram.counts.tolist() and sum(shown["counts"]) == shown["n"] == 36 * 4 * 64
    assert shown["edges"] == [histogram.edges[0], histogram.edges[-1]]
    assert set(METHODS) <= set(shown["ranges"])
    for method, schemes in shown["ranges"].items():
        for scheme, symmetric in (("asymmetric", False), ("symmetric", True)):
            wanted = derive(histogram, method, symmetric)
            assert schemes[scheme] == [wanted.minimum, wanted.maximum]
    assert shown["chosen"] == {s: made.onnx.choices[s].methods["s"] for s in ("asymmetric", "symmetric")}
    # what was chosen is among what is shown, with its argument
    assert set(shown["chosen"].values()) <= set(shown["ranges"])


def test_show_prefers_the_onnx_graph(made: Made) -> None:
    """Both sections have an "x"; the one that most backends take their ranges from is shown."""
    shown = portcall.api.show(made.table, "x")
    assert shown["kind"] == "onnx" and shown["maximum"] == made.onnx.histograms["x"].maximum
    assert portcall.api.show(made.table, "only_here")["kind"] == "tflite"


def test_the_plot_of_a_table(portcall: Run, made: Made) -> None:
    done = portcall("calibrate", made.table, "--show", "s")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    histogram = made.onnx.histograms["s"]
    assert lines[0].startswith(f"s (onnx graph): {histogram.n:,} values, from {histogram.minimum:.6g} to ")
    for method in METHODS:
        for scheme in ("asym.", "symm."):
            assert sum(line.startswith(f"{method} {scheme}") for line in lines) == 1
    assert sum(line.endswith(" (auto)") for line in lines) == 2
    assert max(map(len, lines)) <= 100


def test_show_after_a_run(portcall: Run, made: Made, tmp_path: Path) -> None:
    table = tmp_path / "t.pctable"
    done = portcall("calibrate", made.model, "--data", made.data, "--show", "r", "-o", table, "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["table"] == str(table)
    assert answer["show"]["tensor"] == "r" and answer["show"]["n"] == 40 * 4 * 64
    assert answer["show"]["minimum"] == 0.0 and answer["show"]["chosen"] == {}
    text = portcall("calibrate", made.model, "--data", made.data, "--show", "r", "-o", table).stdout
    assert text.startswith(f"wrote {table}\nonnx: 5 tensors, n=40, 1 pass, ")
    assert "\n\nr (onnx graph): 10,240 values, from 0 to " in text and "minmax asym." in text


def test_an_unknown_tensor_has_near_names(portcall: Run, made: Made) -> None:
    done = portcall("calibrate", made.table, "--show", "only_hear", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 2
    assert "holds no tensor 'only_hear', among 7" in error["message"]
    assert "only_here" in error["fix"] and "portcall ranges" in error["fix"]
    with_nothing_near = portcall("calibrate", made.table, "--show", "@@@@").stderr
    assert "Near names: x, " in with_nothing_near


def test_show_needs_a_table(portcall: Run, made: Made, tmp_path: Path) -> None:
    for file, message in (
        (tmp_path / "none", "no calibration table"),
        (made.model, "is not a calibration table"),
    ):
        done = portcall("calibrate", file, "--show", "x")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    done = portcall("calibrate", made.model)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the following arguments are required: --data" in done.stderr


# the plot itself


def shown(counts: list[int], low: float, high: float, **ranges: list[float]) -> dict[str, Any]:
    return {
        "kind": "onnx",
        "tensor": "t",
        "n": sum(counts),
        "minimum": low,
        "maximum": high,
        "counts": counts,
        "edges": [low, high],
        "ranges": {name: {"asymmetric": limits} for name, limits in ranges.items()},
        "chosen": {"asymmetric": "mse"},
    }


LABEL = len("minmax asym.") + 1


def heights(plot: str, columns: int) -> list[int]:
    """Return the height of every column in eighths of a line."""
    rows = [f"{line[LABEL:]:{columns}}" for line in plot.splitlines()[1 : 1 + HEIGHT]]
    return [sum(BLOCKS.index(row[i]) for row in rows) for i in range(columns)]


def test_columns_hold_the_counts() -> None:
    # 40 columns, a bin each; heights are logarithmic, and what holds anything is seen
    counts = [0] * 40
    counts[3], counts[20], counts[39] = 1, 1000, 1_000_000
    plot = histogram_plot(shown(counts, -2.0, 2.0, minmax=[-2.0, 2.0]), 40 + LABEL)
    assert "1,001,001 values, from -2 to 2; log scale, highest column 1,000,000" in plot.splitlines()[0]
    found = heights(plot, 40)
    assert [i for i, h in enumerate(found) if h] == [3, 20, 39]
    assert found[39] == 8 * HEIGHT and found[20] == round(np.log1p(1000) / np.log1p(1e6) * 8 * HEIGHT)
    assert found[3] >= 1


@pytest.mark.parametrize("bins", [41, 80, 1000, 8192])
def test_more_bins_than_columns_are_joined_and_none_is_lost(bins: int) -> None:
    counts = np.random.default_rng(bins).integers(0, 50, bins).tolist()
    plot = histogram_plot(shown(counts, 0.0, 1.0, minmax=[0.0, 1.0]), 40 + LABEL)
    joined = [0] * 40
    for i, count in enumerate(counts):
        joined[i * 40 // bins] += count
    assert f"{sum(counts):,} values" in plot and f"highest column {max(joined):,}" in plot
    assert heights(plot, 40)[joined.index(max(joined))] == 8 * HEIGHT


def test_a_bar_lies_where_its_range_does() -> None:
    plot = histogram_plot(
        shown([1] * 40, -2.0, 2.0, minmax=[-2.0, 2.0], mse=[-1.0, 1.0], wide=[-9.0, 9.0]), 40 + LABEL
    )
    bars = {line.split()[0]: line[LABEL:] for line in plot.splitlines() if " asym." in line}
    assert bars["minmax"] == "├" + "─" * 38 + "┤"
    assert bars["mse"] == " " * 10 + "├" + "─" * 19 + "┤"
    assert bars["wide"] == "─" * 40  # goes on beyond the plot at both ends
    assert "-1 .. 1 (auto)" in plot and "-2 .. 2 (auto)" not in plot


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
@pytest.mark.parametrize("columns", [1, 20, 100, 1000])
def test_a_constant_tensor_can_be_shown(value: float, columns: int) -> None:
    limits = [min(value, 0.0), max(value, 0.0)]
    plot = histogram_plot(shown([500], value, value, minmax=limits, mse=limits), columns)
    assert "500 values" in plot and plot.count("asym.") == 2
    assert max(map(len, plot.splitlines()[1:])) <= max(columns, 20 + LABEL, 60)


# what a run says


SAID: dict[str, Any] = {
    "kind": "onnx",
    "tensors": 12,
    "n": 90,
    "complete": True,
    "passes": 1,
    "at_once": 4,
    "watched_bytes_per_sample": 12_000_000,
    "memory_budget_bytes": 256_000_000,
    "peak_rss_bytes": 180_000_000,
    "resumed_from": 0,
    "step": 1,
    "quantile_error": None,
    "choices": {},
    "seconds": 2.345,
}


def test_a_section_in_one_line() -> None:
    assert calibration_lines([SAID]) == [
        "onnx: 12 tensors, n=90, 1 pass, 4 at once, 12 MB watched per sample (budget 256 MB), peak 180 MB, 2.3 s"
    ]
    other = {**SAID, "kind": "tflite", "at_once": None, "complete": False, "passes": 3, "resumed_from": 64}
    (line,) = calibration_lines([other])
    assert (
        line
        == "tflite: 12 tensors, n=90 (a shard), 3 passes, peak 180 MB, 2.3 s, resumed after 64 runs of a sample"
    )


def test_choices_are_counted_and_their_figures_carry_n() -> None:
    choice = {
        "methods": {"minmax": 3, "mse": 9},
        "n": 10,
        "sqnr_db": {"minmax": 30.06, "mse": 31.0, "auto": 31.5},
    }
    lines = calibration_lines([{**SAID, "choices": {"symmetric": choice}}])
    assert lines[1:] == [
        "  auto, symmetric: minmax 3, mse 9",
        "    SQNR dB of all activations quantized, n=10 held back: minmax 30.1, mse 31.0, auto 31.5",
    ]


def test_subsampling_tells_its_error() -> None:
    lines = calibration_lines([{**SAID, "step": 8, "quantile_error": 0.0123}])
    assert lines[1].startswith(
        "  every 8th value counted: quantiles are off by at most 0.012 in rank at 95 %"
    )
