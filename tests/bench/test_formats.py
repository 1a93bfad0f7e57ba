"""Each format against what its own tool writes or accepts (golden files, with their sources), and the figures in it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.api
from portcall.arguments import FORMATS as ARGUMENT_FORMATS
from portcall.bench import formats
from portcall.bench.formats import FORMATS, check_write, write_results
from portcall.bench.saved import load_results
from portcall.core import BadInput, CellFailed, UnavailableError, Workload
from tests.saved_benches import MACHINE, measured, samples, save, unavailable

Run = Any  # the fixture of conftest.py
GOLDEN = Path(__file__).parent / "golden"
HOSTILE = 'out/<script>alert("1")</script> & my "model", $\\alpha$ \u00e9\u65e5\n=cmd|x'


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    assert found["source"]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two measured cells, one of them with a hostile name, and one that could not run."""
    one, two = samples(), samples(base_ns=4_000_000, seed=1)
    hostile = measured(two, artifact=HOSTILE, precision="as is", size_bytes=3_000_000)
    return save(tmp_path / "a bench", [(measured(one), one), (unavailable(), []), (hostile, two)])


def written(folder: Path, name: str, path: Path) -> Any:
    answer = write_results(load_results(folder), name, path)
    assert answer["path"] == str(path) and answer["format"] == name
    assert not list(path.parent.glob(".part-*"))
    return json.loads(path.read_text(), parse_constant=pytest.fail) if path.is_file() else None


def check_shape(found: Any, model: Any, where: str, optional: frozenset[str] = frozenset()) -> None:
    """Check that *found* has every key of *model* with a value of its JSON type; null in either is any."""
    if found is None or model is None:
        return
    number = (int, float)
    if isinstance(model, Mapping):
        assert isinstance(found, Mapping), where
        for key in model.keys() - optional:
            assert key in found, f"{where} lacks {key!r}"
            check_shape(found[key], model[key], f"{where}.{key}", optional)
    elif isinstance(model, number) and not isinstance(model, bool):
        assert isinstance(found, number) and not isinstance(found, bool), f"{where} is {found!r}"
    else:
        assert isinstance(found, type(model)), f"{where} is {found!r}"


# ---------------------------------------------------------------------------------------------- google-benchmark


def test_google_benchmark_has_the_shape_of_its_own_output(folder: Path, tmp_path: Path) -> None:
    model = golden("google_benchmark")["output"]
    found = written(folder, "google-benchmark", tmp_path / "g.json")
    told = frozenset(
        {"host_name", "mhz_per_cpu", "cpu_scaling_enabled", "aslr_enabled"}
    )  # this machine tells none
    check_shape(found["context"], model["context"], "context", told)
    assert not found["context"].keys() & told, "what is not known is left out"
    for kind in ("iteration", "aggregate"):
        [first, *_] = [b for b in model["benchmarks"] if b["run_type"] == kind]
        entries = [b for b in found["benchmarks"] if b["run_type"] == kind and "error_occurred" not in b]
        assert entries
        for entry in entries:
            check_shape(entry, first, entry["name"])
    kinds = {b["aggregate_name"] for b in model["benchmarks"] if b["run_type"] == "aggregate"}
    assert kinds == {b["aggregate_name"] for b in found["benchmarks"] if "aggregate_name" in b} - {
        "unavailable"
    }


def test_google_benchmark_repeats_by_process(folder: Path, tmp_path: Path) -> None:
    found = written(folder, "google-benchmark", tmp_path / "g.json")["benchmarks"]
    wall = samples()
    for name, statistic in (("onnxruntime:int8", np.mean), ("onnxruntime:int8/p50", np.median)):
        runs = [b for b in found if b["name"] == name]
        assert [b["repetition_index"] for b in runs] == [0, 1, 2]
        assert {b["repetitions"] for b in runs} == {3} and {b["time_unit"] for b in runs} == {"ns"}
        values = [float(statistic(w)) for w in wall]
        assert [b["real_time"] for b in runs] == pytest.approx(values)
        assert [b["iterations"] for b in runs] == [400] * 3
        [spread] = [b for b in found if b["name"] == f"{name}_stddev"]
        assert spread["real_time"] == pytest.approx(np.std(values, ddof=1))
        [relative] = [b for b in found if b["name"] == f"{name}_cv"]
        assert relative["real_time"] == pytest.approx(np.std(values, ddof=1) / np.mean(values))
        assert relative["aggregate_unit"] == "percentage"


def test_google_benchmark_says_why_a_cell_is_missing(folder: Path, tmp_path: Path) -> None:
    found = written(folder, "google-benchmark", tmp_path / "g.json")["benchmarks"]
    [missing] = [b for b in found if "error_occurred" in b]
    assert missing["name"] == "tflite:int8_unavailable"
    assert "not installed" in missing["error_message"] and "pip install" in missing["error_message"]
    assert "real_time" not in missing, "0 would be read as a time"
    assert missing["run_type"] == "aggregate", "compare.py asks every iteration for its times"


def test_google_benchmark_has_one_machine(tmp_path: Path) -> None:
    wall = samples()
    other = {"machine": {**MACHINE, "cpu_model": "Another CPU"}}
    folder = save(tmp_path / "b", [(measured(wall), wall), (measured(wall, environment=other), wall)])
    with pytest.raises(BadInput, match="2 machines"):
        written(folder, "google-benchmark", tmp_path / "g.json")


def test_google_benchmark_of_one_short_process_has_no_aggregates(tmp_path: Path) -> None:
    wall = [np.array([1000, 2000, 3000])]
    folder = save(tmp_path / "b", [(measured(wall), wall)])
    found = written(folder, "google-benchmark", tmp_path / "g.json")["benchmarks"]
    [only] = found
    assert only["real_time"] == 2000.0 and "p50_ns" not in only, "3 samples support no P50"


# --------------------------------------------------------------------------------------------- optimum-benchmark


def test_optimum_benchmark_has_the_shape_and_the_figures_of_its_own_report(tmp_path: Path) -> None:
    """The golden report is its own, of the same latencies."""
    model = golden("optimum_benchmark")["output"]
    wall = [np.arange(1, 301) * 1_000_000]
    memory = {"method": "VmHWM", "peak_bytes": 64_500_000}
    cell = measured(wall, load_ns=500_000_000, first_ns=10_000_000, memory=memory)
    folder = save(tmp_path / "b", [(cell, wall)])
    written(folder, "optimum-benchmark", tmp_path / "report")
    [result] = (tmp_path / "report").iterdir()
    found = json.loads((result / "benchmark_report.json").read_text())
    assert found.keys() == model.keys()
    for target, sections in model.items():
        assert found[target].keys() == sections.keys()
        for section, values in sections.items():
            mine = found[target][section]
            assert (mine is None) == (values is None), f"{target}.{section}"
            for key, value in (values or {}).items():
                assert mine[key] == (value if isinstance(value, str | None) else pytest.approx(value)), key


def test_optimum_benchmark_warns_of_what_n_does_not_support(tmp_path: Path) -> None:
    """Its reader stops at null: the figure is there, and so is the warning."""
    wall = [np.arange(1, 101) * 1_000_000]
    written(save(tmp_path / "b", [(measured(wall), wall)]), "optimum-benchmark", tmp_path / "one")
    [folder] = (tmp_path / "one").iterdir()
    latency = json.loads((folder / "benchmark_report.json").read_text())["forward"]["latency"]
    assert latency["count"] == 100 and latency["p99"] == pytest.approx(np.percentile(latency["values"], 99))
    config = json.loads((folder / "benchmark_config.json").read_text())
    assert "n=100: no p99 (needs 299)" in config["scenario"]["warnings"]


def test_optimum_benchmark_has_a_folder_per_measured_artifact(folder: Path, tmp_path: Path) -> None:
    answer = write_results(load_results(folder), "optimum-benchmark", tmp_path / "two")
    assert [c["reason"] for c in answer["left_out"]] == ["ai-edge-litert is not installed"]
    names = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert [n[:4] for n in names] == ["000-", "002-"]
    report = tmp_path / "two" / names[0] / "benchmark_report.json"
    assert json.loads(report.read_text())["load_model"] is None, (
        "three loads, of which only the median is known"
    )
    config = json.loads(report.with_name("benchmark_config.json").read_text())
    assert config["environment"]["machine"]["cpu_model"] == "Some CPU"


def test_optimum_benchmark_lists_what_every_process_needed(tmp_path: Path) -> None:
    wall = samples()
    kept = [{"load_ns": n * 1e6, "first_ns": 2e6} for n in (1, 2, 6)]
    folder = save(tmp_path / "b", [(measured(wall, per_process=kept), wall)])
    written(folder, "optimum-benchmark", tmp_path / "o")
    [report] = (tmp_path / "o").glob("*/benchmark_report.json")
    latency = json.loads(report.read_text())["load_model"]["latency"]
    assert latency["values"] == pytest.approx([0.001, 0.002, 0.006]) and latency["mean"] == pytest.approx(
        0.003
    )


def test_optimum_benchmark_splits_energy_as_it_does(tmp_path: Path) -> None:
    """Its class Energy has cpu, ram, gpu and total; Efficiency is volume / total (release 0.6.0)."""
    wall = samples()
    energy = {
        "available": True,
        "joules_per_inference": 0.36,
        "counters": {"intel-rapl:0 package-0": 0.2, "intel-rapl:0:1 dram": 0.06, "gpu0": 0.1},
    }
    folder = save(tmp_path / "b", [(measured(wall, energy=energy, workload={"batch": 2}), wall)])
    written(folder, "optimum-benchmark", tmp_path / "o")
    [report] = (tmp_path / "o").glob("*/benchmark_report.json")
    found = json.loads(report.read_text())["forward"]
    wanted = {"cpu": 0.2 / 3.6e6, "ram": 0.06 / 3.6e6, "gpu": 0.1 / 3.6e6, "total": 1e-7}
    assert found["energy"].pop("unit") == "kWh" and found["energy"] == pytest.approx(wanted)
    assert found["efficiency"] == {"unit": "samples/kWh", "value": pytest.approx(2e7)}


# -------------------------------------------------------------------------------------------- Bencher and GitHub


def test_bencher_metrics(folder: Path, tmp_path: Path) -> None:
    model = golden("bencher")
    found = written(folder, "bencher", tmp_path / "b.json")
    assert list(found) == ["onnxruntime:int8", HOSTILE.partition("/")[2].rpartition("/")[2]]
    allowed = {*model["required"], *model["optional"]}
    for measures in found.values():
        assert measures.keys() >= model["built_in"].keys()
        for metric in measures.values():
            assert set(model["required"]) <= metric.keys() <= allowed
            assert all(isinstance(v, int | float) for v in metric.values())
    latency = load_results(folder)[0].latency
    low, high = latency["ci"]["p50_ns"]
    mine = found["onnxruntime:int8"]["latency"]
    assert mine == {"value": latency["p50_ns"], "lower_value": low, "upper_value": high}
    assert found["onnxruntime:int8"]["file-size"] == {"value": 1_500_000}


def test_github_action(folder: Path, tmp_path: Path) -> None:
    model = golden("github_action")
    found = written(folder, "github-action-benchmark", tmp_path / "b.json")
    for entry in found:
        assert set(model["required"]) <= entry.keys() <= {*model["required"], *model["optional"]}
        for key, value in model["output"][0].items():
            assert isinstance(
                entry.get(key, value), type(value) if isinstance(value, str) else (int, float)
            ), key
    p50 = next(e for e in found if e["name"] == "onnxruntime:int8 P50")
    assert p50["unit"] == "ns" and "n=1200, 3 processes" in p50["extra"] and "95 % CI" in p50["range"]
    assert [e["value"] for e in found if e["name"].endswith("peak memory")] == [60e6, 60e6]


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if not f.complete])
def test_a_format_without_a_place_for_failures_refuses_nothing_but_failures(
    name: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "b", [(unavailable(), [])])
    with pytest.raises(BadInput, match="nothing was measured"):
        write_results(load_results(folder), name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- raw samples


def test_csv_has_a_row_per_inference(folder: Path, tmp_path: Path) -> None:
    written_to = tmp_path / "s.csv"
    write_results(load_results(folder), "csv", written_to)
    with written_to.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 1200 + 1 + 1200
    first = ["artifact", "backend", "precision", "target", "process", "index", "wall_ns", "cpu_ns"]
    assert list(rows[0])[:8] == first
    mine = [int(r["wall_ns"]) for r in rows if r["artifact"] == HOSTILE and r["process"] == "1"]
    assert mine == samples(base_ns=4_000_000, seed=1)[1].tolist()
    [missing] = [r for r in rows if r["outcome"] == "unavailable"]
    assert missing["reason"] == "ai-edge-litert is not installed" and missing["wall_ns"] == ""
    assert rows[0]["device_ns"] == "" and rows[399]["index"] == "399" and rows[400]["index"] == "0"


def test_parquet_has_the_same_rows(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pyarrow is not installed: pip install 'portcall[parquet]'"
    )
    write_results(load_results(folder), "parquet", tmp_path / "s.parquet")
    write_results(load_results(folder), "csv", tmp_path / "s.csv")
    table = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    with (tmp_path / "s.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in table]
    assert as_text == rows
    assert {type(row["wall_ns"]) for row in table} == {int, type(None)}


# ------------------------------------------------------------------------------------------------ all of them


def test_the_command_line_knows_every_format() -> None:
    assert tuple(FORMATS) == ARGUMENT_FORMATS


def test_json_of_two_benches_is_one_that_can_be_read(folder: Path, tmp_path: Path) -> None:
    portcall.api.report([folder, folder], tmp_path / "both.json", to="json")
    assert [r.result["artifact"] for r in load_results(tmp_path / "both.json")] == [
        r.result["artifact"] for r in [*load_results(folder), *load_results(folder)]
    ]


REFUSED = [
    pytest.param("htlm", "r.html", "no format 'htlm'", "Did you mean 'html'?", id="misspelt"),
    pytest.param("plot-ecdf", "p.pdf", "writes no .pdf", ".svg, .png", id="kind of picture"),
    pytest.param("csv", "there", "is a folder", "Name a file", id="folder for a file"),
    pytest.param("optimum-benchmark", "there", "writes a folder", "new or empty", id="used folder"),
    pytest.param("json", "there/file/x.json", "no writable folder", "another place", id="below a file"),
]


@pytest.mark.parametrize(("name", "path", "message", "fix"), REFUSED)
def test_what_cannot_be_written_is_refused_first(
    tmp_path: Path, name: str, path: str, message: str, fix: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(BadInput) as caught:
        portcall.api.benchmark("no-such-artifact", write=[(name, tmp_path / path)])
    assert message in caught.value.message and fix in caught.value.fix


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.needs])
def test_a_missing_package_is_named_with_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = FORMATS[name].needs
    assert needs is not None
    monkeypatch.setitem(sys.modules, needs[0], None)  # as if it were not installed
    with pytest.raises(UnavailableError) as caught:
        check_write(name, tmp_path / "x.svg")
    assert needs[0] in caught.value.message and f"portcall[{needs[1]}]" in caught.value.fix


def test_a_write_that_fails_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.csv").write_text("of before")
    results = load_results(folder)

    def full(_: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "csv", formats.Format("", full))
    with pytest.raises(CellFailed, match="No space left"):
        write_results(results, "csv", tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == "of before"
    assert not list(tmp_path.glob(".part-*"))


def test_bench_writes_formats_without_a_folder_of_its_own(identity_onnx: Path, tmp_path: Path) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "a")
    workload = Workload(processes=2, min_time_s=0.01, warmup_s=0.0)
    write = [("csv", tmp_path / "new folder" / "s.csv"), ("bencher", tmp_path / "b.json")]
    answer = portcall.api.benchmark(tmp_path / "a", workload=workload, write=write)
    assert [(w["format"], w["results"], w["left_out"]) for w in answer["written"]] == [
        ("csv", 1, []),
        ("bencher", 1, []),
    ]
    assert answer["results"][0]["raw"] is None, "no folder of samples is left"
    n = answer["results"][0]["latency"]["n"]
    assert len((tmp_path / "new folder" / "s.csv").read_text().splitlines()) == n + 1
    assert json.loads((tmp_path / "b.json").read_text())["null:fp32"]["latency"]["value"] > 0


def test_the_command(portcall: Run, folder: Path, tmp_path: Path) -> None:
    done = portcall("report", folder, "--to", "bencher", "-o", tmp_path / "b.json", "--json")
    assert done.returncode == 0, done.stderr
    [file] = json.loads(done.stdout)["written"]
    assert (file["format"], file["results"], len(file["left_out"])) == ("bencher", 2, 1)
    done = portcall("report", folder, "--to", "bencher", "-o", tmp_path / "b.json")
    assert "not in it: out/tflite-int8, unavailable: ai-edge-litert is not installed" in done.stdout
    done = portcall("report", tmp_path, "-o", tmp_path / "r.html")
    assert (done.returncode, done.stdout) == (2, "") and "holds no bench.json" in done.stderr
    done = portcall("bench", folder, "--write", "html")
    assert done.returncode == 2 and "FORMAT=FILE" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    wall = [np.arange(1, 2_000_001)]
    folder = save(tmp_path / "b", [(measured(wall), wall)])
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "portcall", "report", str(folder), "--to", "csv", "--json", "-o"]
    with subprocess.Popen(
        [*command, str(tmp_path / "out" / "s.csv")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while (
            not list((tmp_path / "out").iterdir()) and time.monotonic() < deadline and process.poll() is None
        ):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["kind"] == "interrupted" and "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())


def test_a_write_that_fails_loses_no_measurement(identity_onnx: Path, tmp_path: Path) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "a")
    (tmp_path / "r").mkdir()
    workload = Workload(processes=1, min_time_s=0.01, warmup_s=0.0)
    write = [
        ("optimum-benchmark", tmp_path / "r"),
        ("optimum-benchmark", tmp_path / "r"),
    ]  # the second finds it used
    answer = portcall.api.benchmark(tmp_path / "a", workload=workload, write=write)
    assert answer["results"][0]["outcome"] == "measurement" and len(answer["written"]) == 1
    assert "new or empty" in answer["error"]["fix"]
