"""The JSON that scripts rely on (DESIGN.md, "Command line"), and the tables that people read instead.

Every command runs as users run it; keys, types and the consistency of the numbers are checked on what it printed.
Long because it follows DESIGN.md key by key.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CELLS = ["onnxruntime:fp32", "onnxruntime:int8", "openvino:int8"]
NUMBER = (int, float)
TEXT_OR_NULL = (str, type(None))
PERCENTILES = {"p50_ns": 0.5, "p90_ns": 0.9, "p95_ns": 0.95, "p99_ns": 0.99, "p999_ns": 0.999}

Run = Any  # the fixture of conftest.py
Keys = Mapping[str, Any]
Arguments = list[str | Path]


def one_object(text: str) -> dict[str, Any]:
    """Return the one strict JSON object that *text* is; NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict) and found["schema"] == 1
    return found


def check_keys(value: Mapping[str, Any], keys: Keys, where: str) -> None:
    """Check that *value* has every key with a value of its type; a bool is no number."""
    for key, kind in keys.items():
        assert key in value, f"{where} lacks {key!r}"
        kinds = kind if isinstance(kind, tuple) else (kind,)
        found = value[key]
        assert isinstance(found, kinds), f"{where}.{key} is {found!r}"
        assert not isinstance(found, bool) or bool in kinds, f"{where}.{key} is {found!r}"


def run(
    *arguments: str | Path, check: int | None = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "portcall", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )
    assert check is None or done.returncode == check, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The fixtures below live as long as the module; conftest's cache is set for each test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTCALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    path = folder / "data.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((24, 3, 16, 16)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def exported(tiny_onnx: Path, data: Path, folder: Path) -> dict[str, Any]:
    done = run("export", tiny_onnx, "--to", ",".join(CELLS), "--data", data, "-o", folder / "out", "--json")
    return one_object(done.stdout)


@pytest.fixture(scope="module")
def measured(exported: dict[str, Any], folder: Path) -> dict[str, Any]:
    options = ["--processes", "3", "--min-time", "0.2", "-o", str(folder / "bench")]
    return one_object(run("bench", folder / "out", *options, "--json").stdout)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with numpy and no runtime."""
    place = tmp_path_factory.mktemp("bare")
    venv.create(place, with_pip=False)
    site = next(place.glob("lib/python*/site-packages"))
    for path in Path(np.__file__).parent.parent.glob("numpy*"):
        (site / path.name).symlink_to(path)
    return str(place / "bin" / "python")


# ------------------------------------------------------------------------------------------------------ doctor


def test_doctor(portcall: Run) -> None:
    done = portcall("doctor", "--json")
    assert done.returncode == 0
    answer = one_object(done.stdout)
    names = [b["name"] for b in answer["backends"]]
    assert names == sorted(set(names)) and {"null", "onnxruntime", "openvino", "tflite"} <= set(names)
    for backend in answer["backends"]:
        check_keys(backend, {"name": str, "precisions": list, "export": dict, "run": dict}, "backend")
        assert backend["precisions"] and all(isinstance(p, str) for p in backend["precisions"])
        for role in ("export", "run"):
            check_keys(
                backend[role],
                {"available": bool, "reason": TEXT_OR_NULL, "fix": TEXT_OR_NULL},
                backend["name"],
            )
            assert (backend[role]["reason"] is None) == backend[role]["available"]
        assert backend["state"] in ("run", "interpreted", "blind", "no")
        assert set(backend["meanings"]) == set(backend["precisions"])
    assert [t["name"] for t in answer["targets"]] == ["local"]


def test_doctor_without_a_runtime_says_reason_and_fix(bare_python: str) -> None:
    done = run("doctor", "--json", PORTCALL_PYTHON_OPENVINO=bare_python)
    found = {b["name"]: b for b in one_object(done.stdout)["backends"]}
    for role in ("export", "run"):
        assert not found["openvino"][role]["available"]
        assert "openvino" in found["openvino"][role]["reason"]
        assert "pip install 'portcall[openvino]'" in found["openvino"][role]["fix"]
    assert found["onnxruntime"]["run"]["available"]


# --------------------------------------------------------------------------------------------------- calibrate


def test_calibrate(tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    answer = one_object(run("calibrate", tiny_onnx, "--data", data, "-o", tmp_path / "t", "--json").stdout)
    assert answer["table"] == str(tmp_path / "t") and (tmp_path / "t").is_file()
    [section] = answer["sections"]
    check_keys(section, {"kind": str, "tensors": int, "n": int}, "section")
    assert (section["kind"], section["n"]) == ("onnx", 24)
    assert section["tensors"] >= 6


def test_an_export_from_a_table_equals_one_from_its_data(
    tiny_onnx: Path, data: Path, exported: dict[str, Any], tmp_path: Path
) -> None:
    """The table holds what 22 samples showed: --data keeps the last 2 of 24 out of calibration."""
    part = tmp_path / "first22.npz"
    with np.load(data) as whole:
        np.savez(part, x=whole["x"][:22])
        np.savez(tmp_path / "last2.npz", x=whole["x"][22:])
    run("calibrate", tiny_onnx, "--data", part, "-o", tmp_path / "t")
    options: Arguments = [
        "--table",
        tmp_path / "t",
        "--eval",
        tmp_path / "last2.npz",
        "-o",
        tmp_path / "out",
        "--json",
    ]
    [result] = one_object(run("export", tiny_onnx, "--to", "onnxruntime:int8", *options).stdout)["results"]
    assert result["parity"]["sqnr_db"] == exported["results"][1]["parity"]["sqnr_db"]
    assert result["parity"]["samples"] == "eval"


# ------------------------------------------------------------------------------------------- export and verify

RESULT = {
    "backend": str,
    "precision": str,
    "outcome": str,
    "reason": TEXT_OR_NULL,
    "fix": TEXT_OR_NULL,
    "path": TEXT_OR_NULL,
    "size_bytes": (int, type(None)),
    "seconds": NUMBER,
    "parity": (dict, type(None)),
    "eval": (dict, type(None)),
}
FIGURES = {
    "sqnr_db": NUMBER,
    "worst_sqnr_db": NUMBER,
    "cosine": NUMBER,
    "max_abs": NUMBER,
    "agreement": (int, float, type(None)),
}
PARITY = {"reference": str, "samples": str, "n": int, **FIGURES, "outputs": list}


EVAL = {
    "metric": str,
    "n": int,
    "reference": NUMBER,
    "value": NUMBER,
    "difference": NUMBER,
    "ci95": (list, type(None)),
    "method": str,
    "p_value": (int, float, type(None)),
    "discordant": list,
    "smallest_drop": (int, float, type(None)),
    "max_drop": (int, float, type(None)),
    "verdict": TEXT_OR_NULL,
    "warnings": list,
}


def _check_artifact(result: Mapping[str, Any]) -> None:
    check_keys(result, RESULT, "result")
    assert (result["outcome"], result["reason"], result["fix"]) == ("artifact", None, None)
    artifact = Path(result["path"])
    manifest = json.loads((artifact / "manifest.json").read_text())
    on_disk = sum(
        (artifact / name).stat().st_size
        for name in manifest["files"]
        if name not in ("samples.npz", "example.py")
    )
    assert result["size_bytes"] == on_disk > 0
    assert result["seconds"] > 0
    parity = result["parity"]
    check_keys(parity, PARITY, "parity")
    assert parity["reference"] == "source"
    assert parity["samples"] in ("eval", "held-out", "example", "synthetic")
    assert parity["worst_sqnr_db"] <= parity["sqnr_db"]
    assert 0.9 < parity["cosine"] <= 1 and parity["max_abs"] >= 0 and 0 <= parity["agreement"] <= 1
    assert [o["name"] for o in parity["outputs"]] == ["y"]
    for output in parity["outputs"]:
        check_keys(output, {"name": str, **FIGURES}, "output")
    worst = min(parity["outputs"], key=lambda o: o["sqnr_db"])
    assert {k: parity[k] for k in FIGURES} == {k: worst[k] for k in FIGURES}


def test_export(exported: dict[str, Any], folder: Path) -> None:
    assert [f"{r['backend']}:{r['precision']}" for r in exported["results"]] == CELLS
    for result in exported["results"]:
        _check_artifact(result)
        assert (result["parity"]["samples"], result["parity"]["n"]) == ("held-out", 2)
        assert result["eval"] is None
        assert result["parity"]["sqnr_db"] > (100 if result["precision"] == "fp32" else 20)
    assert json.loads((folder / "out" / "export.json").read_text()) == exported


def test_export_with_labels_measures_accuracy(tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    with np.load(data) as whole:
        np.savez(tmp_path / "eval.npz", x=whole["x"], labels=np.arange(24) % 10)
    options: Arguments = [
        "--to",
        "onnxruntime:fp32",
        "--eval",
        tmp_path / "eval.npz",
        "-o",
        tmp_path / "o",
        "--json",
    ]
    answer = one_object(run("export", tiny_onnx, *options).stdout)
    [result] = answer["results"]
    check_keys(result["eval"], EVAL, "eval")
    assert result["eval"]["warnings"] == [
        w.split(": ", 1)[1] for w in answer["warnings"] if "n=24" in w and "point" in w
    ]
    assert result["eval"]["ci95"][0] <= result["eval"]["difference"] == 0 <= result["eval"]["ci95"][1]
    assert result["eval"]["n"] == 24 == result["parity"]["n"]
    assert result["eval"]["reference"] == result["eval"]["value"]
    assert 0 <= result["eval"]["value"] <= 1


def test_export_without_data_says_synthetic(tiny_onnx: Path, tmp_path: Path) -> None:
    done = run("export", tiny_onnx, "--to", "onnxruntime:fp32", "-o", tmp_path / "o", "--json")
    answer = one_object(done.stdout)
    assert answer["results"][0]["parity"]["samples"] == "synthetic"
    assert "synthetic" in answer["warnings"][0] and "--eval" in answer["warnings"][0]
    assert "warning: " in done.stderr


def test_verify(exported: dict[str, Any]) -> None:
    for result in exported["results"]:
        answer = one_object(run("verify", result["path"], "--json").stdout)
        [again] = answer["results"]
        _check_artifact(again)
        assert again["parity"]["sqnr_db"] == pytest.approx(result["parity"]["sqnr_db"], abs=0.01)


def test_verify_with_eval_runs_the_source(exported: dict[str, Any], data: Path) -> None:
    path = exported["results"][1]["path"]
    [result] = one_object(run("verify", path, "--eval", data, "--json").stdout)["results"]
    _check_artifact(result)
    assert (result["parity"]["samples"], result["parity"]["n"]) == ("eval", 24)


# ------------------------------------------------------------------------------------------------------- bench

MEASURED = {
    "artifact": str,
    "backend": str,
    "precision": str,
    "target": str,
    "outcome": str,
    "reason": TEXT_OR_NULL,
    "fix": TEXT_OR_NULL,
    "latency": dict,
    "cpu": dict,
    "load_ns": NUMBER,
    "first_ns": NUMBER,
    "throughput_per_s": NUMBER,
    "memory": dict,
    "environment": dict,
    "warnings": list,
    "steady": dict,
    "overhead": dict,
    "deterministic": bool,
    "rss_growth_bytes": (int, type(None)),
    "died": int,
    "per_process": list,
}


def _raw(folder: Path, number: int) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """Return the wall and CPU samples of every process of subject *number*, as -o saved them."""
    [path] = folder.glob(f"raw/{number:03d}-*.npz")
    with np.load(path) as stored:
        count = len(stored.files) // 2
        return (
            [stored[f"wall_ns_{i}"] for i in range(count)],
            [stored[f"cpu_ns_{i}"] for i in range(count)],
        )


def test_bench_keys(measured: dict[str, Any], folder: Path) -> None:
    assert [f"{r['backend']}:{r['precision']}" for r in measured["results"]] == CELLS
    for result in measured["results"]:
        check_keys(result, MEASURED, "result")
        assert (result["outcome"], result["reason"], result["fix"]) == ("measurement", None, None)
        assert result["target"] == "local" and Path(result["artifact"]).is_dir()
        check_keys(result["latency"], {"n": int, "processes": int, "min_ns": int}, "latency")
        check_keys(result["latency"], {"mean_ns": NUMBER, "ci": dict}, "latency")
        check_keys(result["cpu"], {"p50_ns": NUMBER}, "cpu")
        sizes = {"method": str, "baseline_bytes": int, "model_bytes": int, "peak_bytes": int}
        check_keys(result["memory"], sizes, "memory")
        assert result["environment"]["machine"] and result["environment"]["stack"]
        check_keys(result["overhead"], {"wall_ns": NUMBER, "cpu_ns": NUMBER, "loop_ns": NUMBER}, "overhead")
        check_keys(result["steady"], {"reached": bool, "processes": int, "warmup_ns": NUMBER}, "steady")
        check_keys(result["latency"], {"trimmed_mean_ns": NUMBER, "trim": NUMBER}, "latency")
        assert len(result["per_process"]) == result["latency"]["processes"]
        figures = {"n": int, "p50_ns": NUMBER, "cpu_p50_ns": NUMBER, "load_ns": NUMBER, "first_ns": NUMBER}
        for process in result["per_process"]:
            check_keys(process, {**figures, "started_at": str, "warmup": int, "steady": dict}, "process")
        assert all(isinstance(w, str) for w in result["warnings"])
    assert json.loads((folder / "bench" / "bench.json").read_text()) == measured


def test_bench_numbers_are_consistent(measured: dict[str, Any]) -> None:
    for result in measured["results"]:
        latency, memory = result["latency"], result["memory"]
        figures = [latency[k] for k in ("min_ns", *PERCENTILES) if latency[k] is not None]
        assert figures == sorted(figures) and figures[0] > 0
        for key, (low, high) in latency["ci"].items():
            assert 0 < low <= high
            assert low < 1.5 * latency[key] and high > latency[key] / 1.5, "far from what it belongs to"
        assert result["throughput_per_s"] == pytest.approx(1e9 / latency["mean_ns"])
        assert result["load_ns"] > latency["p50_ns"], "loading takes longer than one inference"
        assert result["first_ns"] > latency["min_ns"]
        assert memory["peak_bytes"] >= memory["baseline_bytes"] + 0.9 * memory["model_bytes"]
        assert 5e6 < memory["baseline_bytes"] < memory["peak_bytes"] < 2e9
        assert memory["model_bytes"] < 1e8


def test_bench_can_be_recomputed_from_its_raw_samples(measured: dict[str, Any], folder: Path) -> None:
    for number, result in enumerate(measured["results"]):
        latency = result["latency"]
        wall, cpu = _raw(folder / "bench", number)
        assert len(wall) == len(cpu) == latency["processes"] == 3
        pooled = np.concatenate(wall)
        assert pooled.size == latency["n"] and np.concatenate(cpu).size == latency["n"]
        assert pooled.dtype == np.int64
        assert latency["min_ns"] == pooled.min()
        assert latency["mean_ns"] == pytest.approx(pooled.mean())
        for key, q in PERCENTILES.items():
            if latency[key] is not None:
                assert latency[key] == pytest.approx(np.quantile(pooled, q))
        assert result["cpu"]["p50_ns"] == pytest.approx(np.median(np.concatenate(cpu)))


def test_bench_again_into_the_same_folder_replaces_its_own_files_alone(
    tiny_onnx: Path, data: Path, tmp_path: Path
) -> None:
    export: Arguments = ["export", tiny_onnx, "--to", "onnxruntime:fp32,int8", "--data", data, "-o", tmp_path]
    bench: Arguments = ["bench", tmp_path, "--processes", "1", "--min-time", "0.01", "-o", tmp_path]
    run(*export)
    run(*bench)
    (tmp_path / "raw" / "notes.txt").write_text("mine")
    run(*export[:3], "onnxruntime:fp32", *export[4:])
    run("bench", tmp_path / "onnxruntime-fp32", *bench[2:])
    assert sorted(p.name for p in (tmp_path / "raw").iterdir()) == ["000-onnxruntime-fp32.npz", "notes.txt"]
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 1


def test_a_percentile_that_n_cannot_support_is_null(exported: dict[str, Any], tmp_path: Path) -> None:
    """With next to no time a process gives 5 samples at least, 10 in all: P50, and nothing above it."""
    path = exported["results"][0]["path"]
    options: Arguments = ["--processes", "2", "--min-time", "0.000001", "-o", tmp_path / "b", "--json"]
    [result] = one_object(run("bench", path, *options).stdout)["results"]
    latency = result["latency"]
    n = latency["n"]
    assert 5 <= n < 29
    assert latency["p50_ns"] > 0
    for key in ("p90_ns", "p95_ns", "p99_ns"):
        assert latency[key] is None and key not in latency["ci"]
        assert any(w.startswith(f"n={n}: no {key[:-3]}") for w in result["warnings"])


def test_a_time_cap_holds(exported: dict[str, Any]) -> None:
    path = exported["results"][0]["path"]
    options = ["--processes", "2", "--min-time", "60", "--max-time", "2", "--json"]
    [result] = one_object(run("bench", path, *options).stdout)["results"]
    latency = result["latency"]
    assert latency["processes"] == 2
    assert latency["n"] * latency["mean_ns"] < 2.5e9
    assert result["workload"]["max_time_s"] == 2


def test_bench_of_a_bare_file_has_no_parity(tiny_onnx: Path) -> None:
    [result] = one_object(run("bench", tiny_onnx, "--processes", "1", "--min-time", "0.02", "--json").stdout)[
        "results"
    ]
    assert (result["backend"], result["parity"]) == ("onnxruntime", None)
    assert any("random inputs" in w for w in result["warnings"])


# ------------------------------------------------------------------------- cells that could not run, exit codes


def _columns(text: str) -> list[list[str]]:
    """Return the cells of a table, in text up to the first empty line, after checking that its columns align.

    Between one header and the next there are two places that are blank in every line.
    """
    lines = text.split("\n\n")[0].splitlines()
    headers = [m.span() for m in re.finditer(r"\S+(?: \S+)*", lines[0])]
    starts = [0]
    for (_, end), (start, _) in itertools.pairwise(headers):
        gaps = [c + 2 for c in range(end, start - 1) if not any(line[c : c + 2].strip() for line in lines)]
        assert gaps, f"the columns left and right of {lines[0][end:start]!r} at {end} run together:\n{text}"
        starts.append(gaps[-1])
    return [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]


def _table(text: str) -> list[dict[str, str]]:
    rows = _columns(text)
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def test_doctor_table_aligns(portcall: Run) -> None:
    parts = portcall("doctor", "--options").stdout.split("\n\n")
    matrix, rows, options = _table(parts[0]), _table(parts[2]), _table(parts[3])
    assert {row["precision"]: row["onnxruntime"] for row in matrix}["int16x8"] == "-"
    assert {row["precision"]: row["onnxruntime"] for row in matrix}["int8"] == "run"
    assert {row["option"] for row in options} >= {"onnxruntime.opset", "onnxruntime.min_runtime"}
    assert all(row["values"] and row["meaning"] for row in options)
    assert {(r["backend"], r["role"]) for r in rows} >= {("onnxruntime", "run"), ("tflite", "export")}
    assert all(r["available"].split(" (")[0] in ("yes", "no") for r in rows)


def test_verify_table_aligns_and_shows_n(exported: dict[str, Any]) -> None:
    [row] = _table(run("verify", exported["results"][2]["path"]).stdout)
    assert (row["backend"], row["precision"], row["outcome"], row["n"]) == (
        "openvino",
        "int8",
        "artifact",
        "2",
    )
    assert float(row["SQNR dB"]) == pytest.approx(exported["results"][2]["parity"]["sqnr_db"], abs=0.06)


def test_a_cell_that_cannot_be_exported_is_in_the_table(
    tiny_onnx: Path, data: Path, tmp_path: Path, bare_python: str
) -> None:
    arguments: Arguments = [
        "export", tiny_onnx, "--to", "openvino:int8,onnxruntime:int8", "--data", data, "-o", tmp_path / "o",
    ]  # fmt: skip
    done = run(*arguments, check=4, PORTCALL_PYTHON_OPENVINO=bare_python)
    first, second = _table(done.stdout)
    assert (first["backend"], first["outcome"], first["SQNR dB"], first["n"]) == (
        "openvino",
        "unavailable",
        "-",
        "-",
    )
    assert "openvino" in first["note"] and "fix: pip install 'portcall[openvino]'" in first["note"]
    assert (second["backend"], second["outcome"]) == ("onnxruntime", "artifact")

    done = run(*arguments, "--allow-unavailable", "--json", check=0, PORTCALL_PYTHON_OPENVINO=bare_python)
    [result, other] = one_object(done.stdout)["results"]
    check_keys(result, RESULT, "result")
    assert (result["outcome"], result["path"], result["parity"]) == ("unavailable", None, None)
    assert result["reason"] and result["fix"] and result["size_bytes"] is None
    assert other["outcome"] == "artifact"


@pytest.mark.parametrize("missing", ["runtime", "interpreter"])
def test_an_artifact_that_cannot_be_measured_is_in_the_table(
    exported: dict[str, Any], bare_python: str, missing: str
) -> None:
    python = {"PORTCALL_PYTHON_OPENVINO": bare_python if missing == "runtime" else "/no/such/python"}
    paths = [exported["results"][i]["path"] for i in (2, 0)]
    arguments = ["bench", *paths, "--processes", "2", "--min-time", "0.05"]
    done = run(*arguments, check=4, **python)
    first, second = _table(done.stdout)
    assert (first["backend"], first["outcome"], first["P50 ms"], first["n"]) == (
        "openvino",
        "unavailable",
        "-",
        "-",
    )
    assert "; fix: " in first["note"]
    assert (second["backend"], second["outcome"]) == ("onnxruntime", "measurement")
    assert float(second["P50 ms"]) > 0 and re.fullmatch(r"\d+/2p", second["n"])
    assert re.fullmatch(r"[\d.]+-[\d.]+", second["P50 95 % CI ms"])

    done = run(*arguments, "--allow-unavailable", "--json", check=0, **python)
    result = one_object(done.stdout)["results"][0]
    assert result["outcome"] == "unavailable" and result["reason"] and result["fix"]
    for key in ("latency", "cpu", "load_ns", "first_ns", "throughput_per_s", "memory", "environment"):
        assert result[key] is None, f"{key} must be null where nothing was measured"


def test_unavailable_is_not_a_failed_verification(exported: dict[str, Any], bare_python: str) -> None:
    path = exported["results"][2]["path"]
    for python in (bare_python, "/no/such/python"):
        done = run("verify", path, "--json", check=4, PORTCALL_PYTHON_OPENVINO=python)
        [result] = one_object(done.stdout)["results"]
        assert result["outcome"] == "unavailable" and result["reason"] and result["fix"]


def test_allow_unavailable_forgives_nothing_else(tiny_onnx: Path, tmp_path: Path) -> None:
    arguments: Arguments = ["export", tiny_onnx, "--to", "null:fp32", "-o", tmp_path / "o", "--json"]
    [result] = one_object(run(*arguments, "--allow-unavailable", check=4).stdout)["results"]
    assert result["outcome"] == "unsupported" and "computes" in result["reason"] and result["fix"]
