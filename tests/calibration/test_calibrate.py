"""portcall calibrate, merge and export from a table, from end to end: what they write, say, refuse and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter
from onnx import helper, numpy_helper

import portcall.api
from portcall import artifact as artifacts
from portcall.calibration.table import CalibrationTable, Section
from portcall.targets.agent.errors import BadInput
from tests.exporters.graphs import write_onnx

Array = np.ndarray[Any, Any]
Run = Any  # the fixture of conftest.py; its type is not importable under importlib mode
MODEL = "tests.models:tiny_cnn"


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def save(path: Path, values: Array) -> Path:
    np.savez(path, x=values)
    return path


def only(table: Path) -> Section:
    (section,) = CalibrationTable.load(table).sections.values()
    return section


def refused(done: subprocess.CompletedProcess[str], *texts: str) -> str:
    """Check that a command ended as bad input does, and says *texts*; return what it said."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder for what fixtures of this module make, with the cache that tests have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTCALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield tmp_path_factory.mktemp("calibrate")


# what a run says and writes


SECTION_KEYS = {
    "kind", "tensors", "n", "complete", "passes", "at_once", "watched_bytes_per_sample", "memory_budget_bytes",
    "peak_rss_bytes", "resumed_from", "step", "quantile_error", "choices", "seconds",
}  # fmt: skip


def test_json(portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = portcall("calibrate", tiny_onnx, "--data", tiny_data, "-o", tmp_path / "t.pctable", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert set(answer) == {"schema", "table", "sections", "warnings"}
    assert answer["table"] == str(tmp_path / "t.pctable") and answer["warnings"] == []
    (said,) = answer["sections"]
    section = only(tmp_path / "t.pctable")
    assert set(said) == SECTION_KEYS
    assert (said["kind"], said["n"], said["tensors"]) == ("onnx", 24, len(section.histograms))
    assert (said["complete"], said["passes"], said["step"], said["resumed_from"]) == (True, 1, 1, 0)
    assert said["quantile_error"] is None and said["choices"] == {}
    assert said["memory_budget_bytes"] == 256 << 20
    # r1 16x8x8, c2 16x8x8, p 16, f 16, y 10, float32; x is the caller's
    assert said["watched_bytes_per_sample"] == 4 * (2 * 16 * 64 + 16 + 16 + 10)
    assert said["at_once"] >= 1 and said["peak_rss_bytes"] > 1 << 20 and said["seconds"] > 0
    assert [p.name for p in tmp_path.iterdir() if p.name != "data.npz"] == ["t.pctable"]


def test_text(portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = portcall("calibrate", tiny_onnx, "--data", tiny_data, "-o", tmp_path / "t.pctable")
    first, second = done.stdout.splitlines()
    assert first == f"wrote {tmp_path / 't.pctable'}" and done.stderr == ""
    assert second.startswith("onnx: 6 tensors, n=24, 1 pass, ")
    assert " at once, " in second and "MB watched per sample (budget 268 MB)" in second


def test_histograms_hold_the_data(portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    assert portcall("calibrate", tiny_onnx, "--data", tiny_data, cwd=tmp_path).returncode == 0
    histogram = only(tmp_path / "table.pctable").histograms["x"]  # the default name
    values = np.load(tiny_data)["x"]
    assert (histogram.n, histogram.minimum, histogram.maximum) == (values.size, values.min(), values.max())


def test_one_sample_works_and_warns(portcall: Run, tiny_onnx: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "d.npz", images(1))
    done = portcall("calibrate", tiny_onnx, "--data", data, "-o", tmp_path / "t", "--json")
    assert done.returncode == 0
    assert "warning: DATA has one sample: " in done.stderr
    assert json.loads(done.stdout)["warnings"][0].startswith("DATA has one sample")
    assert only(tmp_path / "t").n == 1
    answer = portcall_export(tiny_onnx, ["onnxruntime:int8"], tmp_path / "out", table=tmp_path / "t")
    assert answer["onnxruntime"]["outcome"] == "artifact"


def portcall_export(model: str | Path, cells: list[str], output: Path, **options: Any) -> dict[str, Any]:
    """Return the results of an export by backend."""
    results = portcall.api.export(model, cells, output, **options)["results"]
    return {r["backend"]: r for r in results}


# what is refused


@pytest.mark.parametrize("what", ["nothing", "nan", "infinity"])
def test_data_that_cannot_calibrate(portcall: Run, tiny_onnx: Path, tmp_path: Path, what: str) -> None:
    values = images(0 if what == "nothing" else 8)
    if what != "nothing":
        values[5, 1, 2, 3] = np.nan if what == "nan" else np.inf
    table = tmp_path / "t"
    said = refused(portcall("calibrate", tiny_onnx, "--data", save(tmp_path / "d.npz", values), "-o", table))
    if what == "nothing":
        assert "no samples" in said or "0 samples" in said, said
    else:
        assert "5" in said and "'x'" in said and ("NaN" in said or "infin" in said), said
    assert [p.name for p in tmp_path.iterdir()] == ["d.npz"]


def test_an_output_that_cannot_be_written(
    portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path
) -> None:
    command = ["calibrate", tiny_onnx, "--data", tiny_data, "-o"]
    refused(portcall(*command, tmp_path), f"-o {tmp_path} is a folder", "table.pctable")
    refused(portcall(*command, tmp_path / "no" / "t"), "no folder", "Create it, or name another -o")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3", "1 / 2", ""])
def test_shards_that_are_none(
    portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path, text: str
) -> None:
    table = tmp_path / "t"
    done = portcall("calibrate", tiny_onnx, "--data", tiny_data, f"--shard={text}", "-o", table)
    refused(done, f"{text!r} is not I/N with I from 1 to N")
    assert not table.exists()


@pytest.mark.parametrize("option", ["--memory", "--subsample"])
@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_counts_that_are_none(portcall: Run, tiny_onnx: Path, option: str, text: str) -> None:
    done = portcall("calibrate", tiny_onnx, "--data", "d.npz", f"{option}={text}")
    refused(done, f"{text!r} is not a positive whole number")


def test_more_shards_than_samples(tiny_onnx: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "d.npz", images(2))
    with pytest.raises(BadInput, match="2 samples cannot be cut into 5 shards"):
        portcall.api.calibrate(tiny_onnx, data, tmp_path / "t", shard=(1, 5))


def test_auto_of_a_part_is_refused(portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = portcall(
        "calibrate", tiny_onnx, "--data", tiny_data, "--auto", "--shard", "1/2", "-o", tmp_path / "t"
    )
    refused(done, "--auto needs the whole table", "portcall merge")


def test_a_backend_that_there_is_not(portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = portcall("calibrate", tiny_onnx, "--data", tiny_data, "--for", "tflit", "-o", tmp_path / "t")
    refused(done, "no backend 'tflit'", "Did you mean 'tflite'?")


# data of nothing


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_inputs_go_through_to_int8(tiny_onnx: Path, tmp_path: Path, value: float) -> None:
    data = save(tmp_path / "d.npz", np.full((4, 3, 16, 16), value, np.float32))
    portcall.api.calibrate(tiny_onnx, data, tmp_path / "t")
    histogram = only(tmp_path / "t").histograms["x"]
    assert (histogram.minimum, histogram.maximum) == (value, value)
    cells = ["onnxruntime:int8", "openvino:int8", "tensorrt:int8"]
    # parity on the very samples: anything else lies outside of what was seen
    found = portcall_export(
        tiny_onnx, cells, tmp_path / "out", table=tmp_path / "t", method="mse", evaluation=data
    )
    assert {r["outcome"] for r in found.values()} == {"artifact"}, found
    assert all(r["parity"]["sqnr_db"] > 20 for r in found.values()), found


# memory


@pytest.fixture(scope="module")
def wide_onnx(shared: Path) -> Path:
    """Products and sums of 1.28 MB each; the output is in the middle of the list of tensors."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["a"], "square"),
        helper.make_node("Mul", ["a", "x"], ["y"], "cube"),
        helper.make_node("Add", ["y", "a"], ["c"], "sum"),
        helper.make_node("Mul", ["c", "x"], ["z"], "last"),
    ]
    shape: Any = [1, 8, 200, 200]
    return write_onnx(shared / "wide.onnx", nodes, {"x": shape}, {"y": shape, "z": shape}, {})


def test_little_memory_takes_several_passes_and_gives_the_same_bytes(
    portcall: Run, wide_onnx: Path, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).standard_normal((4, 8, 200, 200)).astype(np.float32)
    data = save(tmp_path / "d.npz", values)
    told = {}
    for memory in ("1", "3", "256"):
        done = portcall(
            "calibrate", wide_onnx, "--data", data, "--memory", memory, "-o", tmp_path / memory, "--json"
        )
        assert done.returncode == 0, done.stderr
        (told[memory],) = json.loads(done.stdout)["sections"]
    assert [told[m]["passes"] for m in told] == [4, 2, 1]
    assert [told[m]["memory_budget_bytes"] for m in told] == [1 << 20, 3 << 20, 256 << 20]
    assert {t["watched_bytes_per_sample"] for t in told.values()} == {4 * 4 * 8 * 200 * 200}
    assert (told["1"]["at_once"], told["3"]["at_once"]) == (1, 1)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes() == (tmp_path / "256").read_bytes()


# counting some of the values


def test_subsampling_prints_its_error(
    portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t"
    done = portcall("calibrate", tiny_onnx, "--data", tiny_data, "--subsample", "8", "-o", table)
    assert done.returncode == 0, done.stderr
    section = only(table)
    fewest = min(h.n for h in section.histograms.values())
    bound = np.sqrt(np.log(2 / 0.05) / (2 * fewest))
    assert f"every 8th value counted: quantiles are off by at most {bound:.2g} in rank at 95 %" in done.stdout
    assert "extremes are exact" in done.stdout
    values = np.load(tiny_data)["x"]
    found = section.histograms["x"]
    assert (section.step, found.minimum, found.maximum) == (8, values.min(), values.max())
    assert values.size / 12 <= found.n <= values.size / 8
    # what it promises holds: the distribution of what was counted is near that of all
    counted = np.cumsum(found.counts) / found.n
    exact = np.searchsorted(np.sort(values.reshape(-1)), found.edges[1:]) / values.size
    assert np.abs(counted - exact).max() <= np.sqrt(np.log(2 / 0.05) / (2 * found.n))


# shards


@dataclass
class Tables:
    """tiny_cnn on 24 samples, sections onnx and tflite: the whole table and its two halves; what calibrate said."""

    data: Path
    whole: Path
    parts: list[Path]
    answer: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def tables(shared: Path) -> Tables:
    data = save(shared / "d.npz", images(24))
    made = Tables(data, shared / "whole", [shared / "part1", shared / "part2"])
    made.answer = portcall.api.calibrate(MODEL, data, made.whole, kinds=["tflite"])
    for number, part in enumerate(made.parts, 1):
        portcall.api.calibrate(MODEL, data, part, kinds=["tflite"], shard=(number, 2))
    return made


def test_merged_shards_are_the_bytes_of_one_run(portcall: Run, tables: Tables, tmp_path: Path) -> None:
    for order in (tables.parts, tables.parts[::-1]):
        done = portcall("merge", *order, "-o", tmp_path / "t")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == f"wrote {tmp_path / 't'}"
        assert {line.partition(":")[0] for line in lines[1:]} == {"onnx", "tflite"}
        assert all(line.endswith("n=24") for line in lines[1:])
        assert (tmp_path / "t").read_bytes() == tables.whole.read_bytes()
    assert {s["kind"]: s["n"] for s in tables.answer["sections"]} == {"onnx": 24, "tflite": 24}


def test_merge_in_json(portcall: Run, tables: Tables, tmp_path: Path) -> None:
    answer = json.loads(portcall("merge", *tables.parts, "-o", tmp_path / "t", "--json").stdout)
    assert set(answer) == {"schema", "table", "sections"} and answer["table"] == str(tmp_path / "t")
    for section in CalibrationTable.load(tables.whole).sections.values():
        assert {"kind": section.kind, "tensors": len(section.histograms), "n": 24} in answer["sections"]


@pytest.fixture(scope="module")
def small(shared: Path, tiny_onnx: Path) -> dict[str, Path]:
    """Tables of tiny_onnx: parts 1/3, 2/3 of some data, part 3/3 of other data, and 3/3 with another step."""
    one, other = save(shared / "one.npz", images(9)), save(shared / "other.npz", images(9, seed=1))
    made = {}
    for name, data, number, step in (
        ("first", one, 1, 1),
        ("second", one, 2, 1),
        ("foreign", other, 3, 1),
        ("coarse", one, 3, 2),
    ):
        made[name] = shared / name
        portcall.api.calibrate(tiny_onnx, data, made[name], shard=(number, 3), subsample=step)
    return made


@pytest.mark.parametrize(
    ("parts", "texts"),
    [
        (["first"], ["hold samples [0, 3) of [0, 9)", "Give all shards"]),
        (["second", "first"], ["hold samples [0, 6) of [0, 9)", "Give all shards"]),
        (["first", "second", "second"], ["overlap: both hold sample 3", "Merge each shard once"]),
        (["first", "second", "foreign"], ["differ in data", "one DATA"]),
        (["first", "second", "coarse"], ["differ in step: 1 and 2", "the same options"]),
    ],
)
def test_shards_that_do_not_add_up(
    portcall: Run, small: dict[str, Path], tmp_path: Path, parts: list[str], texts: list[str]
) -> None:
    refused(portcall("merge", *(small[p] for p in parts), "-o", tmp_path / "t"), *texts)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_model(
    portcall: Run, small: dict[str, Path], tables: Tables, tmp_path: Path
) -> None:
    done = portcall("merge", small["first"], tables.parts[1], "-o", tmp_path / "t")
    refused(done, "were made from other graphs", "one model")
    refused(
        portcall("merge", small["first"], tmp_path / "none", "-o", tmp_path / "t"), "no calibration table"
    )


def test_a_shard_is_no_table_to_export_from(
    portcall: Run, small: dict[str, Path], tiny_onnx: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = portcall(
        "export", tiny_onnx, "--to", "onnxruntime:fp32,int8", "--table", small["first"], "-o", out
    )
    refused(done, f"{small['first']} holds 3 of 9 samples: it is a shard", "portcall merge PART... -o TABLE")
    assert not out.exists() or not list(out.glob("onnx*"))


def test_a_shard_says_that_it_is_one(portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = portcall("calibrate", tiny_onnx, "--data", tiny_data, "--shard", "2/3", "-o", tmp_path / "t")
    assert "onnx: 6 tensors, n=8 (a shard), " in done.stdout


# what export makes of a table


def onnx_scales(path: Path) -> dict[str, float]:
    """Return the scale that each activation of a Q/DQ file is quantized with."""
    graph = onnx.load(str(path)).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {
        n.input[0]: float(constants[n.input[1]].reshape(-1)[0])
        for n in graph.node
        if n.op_type == "QuantizeLinear" and constants[n.input[1]].size == 1
    }


def tflite_input_scales(path: Path) -> list[float]:
    """Return the scales of the int8 tensors that have an input's shape."""
    interpreter = Interpreter(str(path))
    (given,) = interpreter.get_input_details()
    return [
        float(d["quantization_parameters"]["scales"][0])
        for d in interpreter.get_tensor_details()
        if d["dtype"] == np.int8 and sorted(d["shape"]) == sorted(given["shape"])
    ]


@pytest.fixture(scope="module")
def exported(tables: Tables, shared: Path) -> tuple[Path, dict[str, Any]]:
    """Return tiny_cnn in int8 on all backends from one table, and what export said."""
    cells = [f"{b}:int8" for b in ("onnxruntime", "openvino", "tflite", "tensorrt")]
    out = shared / "plain"
    return out, portcall_export(MODEL, cells, out, table=tables.whole, evaluation=tables.data)


def test_all_artifacts_have_the_scale_of_the_table(
    exported: tuple[Path, dict[str, Any]], tables: Tables
) -> None:
    out, results = exported
    assert {r["outcome"] for r in results.values()} == {"artifact"}, results
    values = np.load(tables.data)["x"]
    low, high = float(values.min()), float(values.max())
    in_onnx = onnx_scales(out / "onnxruntime-int8" / "model.onnx")["x"]
    (file,) = (out / "tflite-int8").glob("*.tflite")
    in_tflite = tflite_input_scales(file)
    assert in_onnx == np.float32((high - low) / 255)
    assert in_tflite and in_tflite == pytest.approx([in_onnx] * len(in_tflite), rel=1e-6)
    in_tensorrt = onnx_scales(out / "tensorrt-int8" / "model.onnx")["x"]
    assert in_tensorrt == np.float32(max(-low, high) / 127)


def test_convolutions_kept_in_float(
    exported: tuple[Path, dict[str, Any]], tables: Tables, tmp_path: Path
) -> None:
    cells = ["onnxruntime:int8", "openvino:int8", "tflite:int8"]
    found = portcall_export(
        MODEL, cells, tmp_path / "out", table=tables.whole, evaluation=tables.data, keep_float=["type:Conv"]
    )
    for backend, result in found.items():
        plain = exported[1][backend]
        assert result["outcome"] == "artifact", result
        assert any("left in float32 as asked (keep_float)" in n for n in result["notes"]), result["notes"]
        assert 0 < result["arithmetic"]["integer_macs_share"] < 0.5, result["arithmetic"]
        assert plain["arithmetic"]["integer_macs_share"] == 1.0
        assert not any("keep_float" in n for n in plain["notes"])
        # three of four layers are exact now
        assert result["parity"]["sqnr_db"] > plain["parity"]["sqnr_db"], backend


@pytest.mark.parametrize("pattern", ["type:Softmax", "no/such/*", "secnd"])
def test_a_pattern_without_a_match(
    portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path, pattern: str
) -> None:
    done = portcall(
        "export", tiny_onnx, "--to", "onnxruntime:int8", "--data", tiny_data,
        "--keep-float", pattern, "-o", tmp_path / "out",
    )  # fmt: skip
    said = refused(done, f"keep_float {pattern!r} matches no operator of this graph")
    assert (
        "Conv, Flatten, Gemm" if pattern.startswith("type:") else "'second'" if pattern == "secnd" else ""
    ) in said
    assert not list((tmp_path / "out").glob("onnx*"))


def test_options_of_weights_change_the_artifact(
    portcall: Run, tiny_onnx: Path, tiny_data: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t"
    portcall_ok(portcall("calibrate", tiny_onnx, "--data", tiny_data, "-o", table))
    models, notes = [], []
    for number, options in enumerate(([], ["--weights", "tensor"], ["--bias-correction"])):
        out = tmp_path / str(number)
        portcall_ok(
            portcall("export", tiny_onnx, "--to", "onnxruntime:int8", "--table", table, *options, "-o", out)
        )
        models.append(onnx.load(str(out / "onnxruntime-int8" / "model.onnx")))
        notes.append(artifacts.read_manifest(out / "onnxruntime-int8")["notes"])
    constants = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in models]
    assert [c["w1_scale"].size for c in constants] == [16, 1, 16]
    assert [any("bias corrected" in n for n in found) for found in notes] == [False, False, True]
    # the weights are the same with and without correction, the biases are not
    assert np.array_equal(constants[0]["w1_quantized"], constants[2]["w1_quantized"])
    assert not np.array_equal(constants[0]["b1_quantized"], constants[2]["b1_quantized"])


def portcall_ok(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# equalization: another graph, with a section of its own


def test_equalization_and_the_table(portcall: Run, tiny_onnx: Path, tmp_path: Path) -> None:
    """A table of the other graph is still one of this model: its recorded DATA is run again, or it is refused."""
    data = save(tmp_path / "d.npz", images(12))
    made = {}
    for name, options in (("plain", []), ("equalized", ["--equalize"])):
        portcall_ok(portcall("calibrate", tiny_onnx, "--data", data, *options, "-o", tmp_path / name))
        made[name] = only(tmp_path / name)
    assert made["plain"].graph_sha256 != made["equalized"].graph_sha256
    assert made["plain"].histograms["r1"] != made["equalized"].histograms["r1"]
    assert made["plain"].histograms["x"] == made["equalized"].histograms["x"]

    def export(table: str, *options: str) -> Path:
        out = tmp_path / f"{table}{len(list(tmp_path.iterdir()))}"
        command = ["export", tiny_onnx, "--to", "onnxruntime:int8", "--table", tmp_path / table, *options]
        portcall_ok(portcall(*command, "--eval", data, "-o", out))
        return out / "onnxruntime-int8"

    for options in ([], ["--equalize"]):
        files = {(export(table, *options) / "model.onnx").read_bytes() for table in made}
        assert len(files) == 1, options
    assert any(
        "equalized 1 pair" in n for n in artifacts.read_manifest(export("plain", "--equalize"))["notes"]
    )
    data.unlink()
    export_again = ["export", tiny_onnx, "--to", "onnxruntime:int8", "--table", tmp_path / "plain"]
    done = portcall(*export_again, "--equalize", "-o", tmp_path / "refused")
    refused(done, "its DATA cannot be read", "Run: portcall calibrate")
    portcall_ok(portcall(*export_again, "-o", tmp_path / "still"))  # its own graph needs no DATA


# interrupted


SLOW = """
import pathlib, time
import numpy as np

def samples():
    folder = pathlib.Path(__file__).parent
    slow = (folder / "slow").exists() and (folder / "read").exists()
    rng = np.random.default_rng(5)
    for number in range(100):
        if slow:
            time.sleep(0.17)
        yield {"x": rng.standard_normal((3, 16, 16)).astype(np.float32)}
    (folder / "read").touch()
"""
"""100 samples, slow while a file "slow" is there, but for the first time through: that is the check of DATA.

The state is saved once 64 samples are through and 10 s have passed.
"""


def command_in(folder: Path) -> list[str]:
    options = ["--data", "slow:samples", "-o", "t.pctable", "--json"]
    return [sys.executable, "-m", "portcall", "calibrate", str(folder / "tiny.onnx"), *options]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PORTCALL_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command_in(folder),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def stopped(shared: Path, tiny_onnx: Path) -> dict[signal.Signals, tuple[Path, int, str, str]]:
    """Stop two runs, at the same time to save time, once each has saved its state: (folder, exit code, out, err)."""
    running: dict[signal.Signals, tuple[Path, subprocess.Popen[str]]] = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        folder = shared / number.name
        (folder / "tmp").mkdir(parents=True)
        shutil.copy(tiny_onnx, folder / "tiny.onnx")
        (folder / "slow.py").write_text(SLOW)
        (folder / "slow").touch()
        running[number] = folder, start(folder)
    ended = {}
    try:
        for number, (folder, process) in running.items():
            deadline = time.monotonic() + 120
            while not list((folder / "cache" / "calibration").glob("[!.]*.pctable")):
                assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            ended[number] = folder, process.returncode, out, err
    finally:
        for _, process in running.values():
            process.kill()
            process.communicate(timeout=60)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stopped_run_goes_on(
    stopped: dict[signal.Signals, tuple[Path, int, str, str]], number: signal.Signals, tmp_path: Path
) -> None:
    folder, code, out, err = stopped[number]
    assert "Traceback" not in err
    if number is signal.SIGINT:
        assert code == 130 and json.loads(out)["error"]["kind"] == "interrupted"
        assert list((folder / "tmp").iterdir()) == []
    else:
        assert code == -signal.SIGKILL
    assert not list(folder.glob("*.pctable")) and not list(folder.glob(".*"))
    (folder / "slow").unlink()
    process = start(folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    (said,) = json.loads(out)["sections"]
    assert said["resumed_from"] == 64 and said["n"] == 100 and said["complete"]
    resumed = (folder / "t.pctable").read_bytes()
    assert list((folder / "cache" / "calibration").iterdir()) == []  # nothing is left of what was saved
    process = start(folder)  # from the beginning this time
    out, err = process.communicate(timeout=120)
    (said,) = json.loads(out)["sections"]
    assert said["resumed_from"] == 0
    assert (folder / "t.pctable").read_bytes() == resumed
