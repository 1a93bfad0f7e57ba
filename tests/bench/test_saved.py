"""Reading saved benches: what ``bench -o`` wrote comes back, what was spoilt is refused with a fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.api
from portcall.bench.saved import load_all, load_results, names
from portcall.core import BadInput, Workload
from tests.saved_benches import measured, samples, save, unavailable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    wall = samples()
    return save(tmp_path / "a bench", [(measured(wall), wall), (unavailable(), [])])


def test_what_bench_wrote_comes_back(identity_onnx: Path, tmp_path: Path) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "a")
    workload = Workload(processes=3, min_time_s=0.01, warmup_s=0.0)
    answer = portcall.api.benchmark(tmp_path / "a", workload=workload, output=tmp_path / "bench")
    [found] = load_results(tmp_path / "bench")
    assert found.measured
    assert found.result == json.loads(json.dumps(answer["results"][0]))
    assert found.result["raw"] == "raw/000-null-fp32.npz"
    assert [p.number for p in found.processes] == [0, 1, 2]
    assert sum(p.wall_ns.size for p in found.processes) == found.latency["n"]
    pooled = np.concatenate([p.wall_ns for p in found.processes])
    assert float(np.median(pooled)) == found.latency["p50_ns"]
    assert all(p.cpu_ns is not None and p.cpu_ns.size == p.wall_ns.size for p in found.processes)
    assert all(p.device_ns is None for p in found.processes)


def test_samples_are_as_they_were_measured(folder: Path) -> None:
    good, absent = load_results(folder)
    for process, wall in zip(good.processes, samples(), strict=True):
        np.testing.assert_array_equal(process.wall_ns, wall)
    assert not absent.measured and absent.processes == []


def test_an_older_bench_finds_its_samples_by_number(folder: Path) -> None:
    answer = json.loads((folder / "bench.json").read_text())
    for entry in answer["results"]:
        del entry["raw"]
    (folder / "bench.json").write_text(json.dumps(answer))
    assert len(load_results(folder)[0].processes) == 3


def test_a_discarded_process_leaves_a_gap(folder: Path) -> None:
    wall = samples()
    arrays: dict[str, Any] = {"wall_ns_0": wall[0], "wall_ns_2": wall[2], "started_at_0": np.zeros(1)}
    np.savez(folder / "raw" / "000-onnxruntime-int8.npz", **arrays)
    edit(folder, lambda r: r["latency"].update(n=800))
    found = load_results(folder)[0].processes
    assert [(p.number, p.cpu_ns) for p in found] == [(0, None), (2, None)]


def test_printed_json_has_figures_and_no_samples(folder: Path) -> None:
    answer = json.loads((folder / "bench.json").read_text())
    for entry in answer["results"]:
        del entry["raw"]
    (folder / "printed.json").write_text(json.dumps(answer))
    found = load_results(folder / "printed.json")[0]
    assert found.latency["n"] == 1200
    with pytest.raises(BadInput, match="no raw samples") as caught:
        _ = found.processes
    assert "-o" in caught.value.fix


def test_unknown_keys_are_kept(folder: Path) -> None:
    edit(folder, lambda r: r.update(witness={"tool": "benchmark_app"}))
    assert load_results(folder)[0].get("witness", "tool") == "benchmark_app"
    assert load_results(folder)[0].get("witness", "none", "of these") is None


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    answer = json.loads((folder / "bench.json").read_text())
    change(answer["results"][0])
    (folder / "bench.json").write_text(json.dumps(answer))


def _text(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "bench.json").write_text(text)


def _entry(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, lambda r: r.update(changes))


def _npz(**arrays: Any) -> Callable[[Path], Any]:
    return lambda folder: np.savez(folder / "raw" / "000-onnxruntime-int8.npz", **arrays)


def _link(folder: Path) -> None:
    file = folder / "raw" / "000-onnxruntime-int8.npz"
    shutil.copy(file, folder.parent / "elsewhere.npz")
    file.unlink()
    file.symlink_to(folder.parent / "elsewhere.npz")


SPOILT = [
    pytest.param(lambda f: shutil.rmtree(f), "no file or folder", id="nothing there"),
    pytest.param(lambda f: (f / "bench.json").unlink(), "holds no bench.json", id="no bench.json"),
    pytest.param(_text('{"schema": 1, "results": [nope'), "not valid JSON", id="cut JSON"),
    pytest.param(_text("[" * 100_000), "not valid JSON", id="deep JSON"),
    pytest.param(_text('{"schema": 1, "results": [NaN]}'), "NaN is not JSON", id="NaN"),
    pytest.param(_text("[1]"), "no result of portcall bench", id="a list"),
    pytest.param(_text('{"schema": 2, "results": []}'), "schema 2", id="of a later portcall"),
    pytest.param(_text('{"schema": 1, "results": []}'), "no results", id="empty"),
    pytest.param(_text('{"schema": 1, "results": [3]}'), "result 0: it is no object", id="no object"),
    pytest.param(_entry(backend=3), "'backend' is missing or no text", id="backend"),
    pytest.param(_entry(memory=[1]), "'memory' is no object", id="memory"),
    pytest.param(_entry(warnings="many"), "'warnings' is no list", id="warnings"),
    pytest.param(_entry(environment={"machine": "fast"}), "'machine' of its environment", id="machine"),
    pytest.param(_entry(latency={"processes": 1}), "no whole number 'n'", id="no n"),
    pytest.param(_entry(outcome="great"), "unknown outcome 'great'", id="outcome"),
    pytest.param(_entry(raw="raw/../../secret.npz"), "outside its folder", id="path upwards"),
    pytest.param(_entry(raw="/etc/passwd"), "outside its folder", id="absolute path"),
    pytest.param(_entry(raw=7), "outside its folder", id="a number as path"),
    pytest.param(_entry(raw="raw/gone.npz"), "gone.npz, which is missing", id="missing samples"),
    pytest.param(_link, "leads outside", id="a link"),
    pytest.param(
        lambda f: (f / "raw" / "000-onnxruntime-int8.npz").write_bytes(b"PK" * 40), "is damaged", id="no npz"
    ),
    pytest.param(_npz(wall_ns_0=np.array([1.5])), "wall_ns_0 is float64", id="floats"),
    pytest.param(_npz(wall_ns_0=np.array([{}], dtype=object)), "is damaged", id="a pickle"),
    pytest.param(_npz(wall_ns_0=np.arange(5), cpu_ns_0=np.arange(4)), "process 0 has arrays", id="lengths"),
    pytest.param(_npz(wall_ns_0=np.arange(5)), "of two runs", id="samples of another run"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_what_is_spoilt_is_refused(folder: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(folder)
    with pytest.raises(BadInput) as caught:
        for result in load_all([folder]):
            _ = result.processes
    assert message in caught.value.message
    assert caught.value.fix


def test_names_tell_results_apart(tmp_path: Path) -> None:
    wall = samples(1)
    cells: list[dict[str, Any]] = [
        {},
        {"precision": "fp32", "workload": {"batch": 8, "threads": 4}},
        {"precision": "fp16", "target": "pi5"},
        {"precision": "as is", "artifact": "models/my model.onnx"},
        {"artifact": "other/onnxruntime-int8"},
        {"artifact": "other/onnxruntime-int8"},
    ]
    folder = save(tmp_path / "b", [(measured(wall, **c), wall) for c in cells])
    assert names(load_results(folder)) == [
        "out/onnxruntime-int8 onnxruntime:int8",
        "onnxruntime:fp32/batch:8/threads:4",
        "onnxruntime:fp16@pi5",
        "my model.onnx",
        "other/onnxruntime-int8 onnxruntime:int8",
        "other/onnxruntime-int8 onnxruntime:int8 #2",
    ]


def test_names_tell_benches_of_the_same_artifact_apart(tmp_path: Path) -> None:
    wall = samples(1)
    folders = [save(tmp_path / day, [(measured(wall), wall)]) for day in ("monday", "tuesday")]
    assert names(load_all(folders)) == [f"{folder} onnxruntime:int8" for folder in folders]
