"""Cold starts: the figure begins at the parent's spawn, and files really leave the page cache."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

import portcall.api
from portcall.bench.modes import Cold
from portcall.core import Workload
from portcall.targets.agent import pagecache
from portcall.targets.agent.cold import artifact_files, mapped_files
from portcall.targets.agent.contract import Artifact

SLEEP_S = 0.4


def _slow_interpreter(folder: Path, seconds: float) -> Path:
    """Return a program that sleeps and then becomes this interpreter: a slow interpreter start."""
    path = folder / "slow python"
    path.write_text(
        f'#!/bin/sh\ncase "$1" in -c) ;; *) sleep {seconds} ;; esac\nexec "{sys.executable}" "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_start_of_the_interpreter_counts(
    identity_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "out")
    monkeypatch.setenv("PORTCALL_PYTHON_NULL", str(_slow_interpreter(tmp_path, SLEEP_S)))
    [result] = portcall.api.benchmark(
        tmp_path / "out", mode=Cold(caches=("warm",)), workload=Workload(processes=2)
    )["results"]
    assert result["outcome"] == "measurement", result["reason"]
    [entry] = result["cold"]["caches"]
    parts = entry["parts"]
    assert parts["interpreter_ns"]["min_ns"] > SLEEP_S * 1e9, "it began when the parent spawned"
    assert parts["import_ns"]["max_ns"] < parts["interpreter_ns"]["min_ns"]
    names = ("interpreter_ns", "import_ns", "load_ns", "bind_ns", "first_ns")
    geomeans = [parts[n]["geomean_ns"] for n in names]
    assert parts["total_ns"]["max_ns"] <= sum(parts[n]["max_ns"] for n in names)
    assert parts["total_ns"]["geomean_ns"] >= max(geomeans)
    assert parts["wall_ns"]["min_ns"] >= parts["total_ns"]["min_ns"]
    assert parts["total_ns"]["p50_ns"] is None, "2 processes support no P50"
    assert entry["n"] == 2 and len(parts["total_ns"]["ci"]) == 2


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(4 << 20))
    path.read_bytes()
    if pagecache.resident_bytes([str(path)]) is None:
        pytest.skip("mincore does not tell here what is in the page cache: run this on Linux")
    return path


def test_a_dropped_file_is_not_resident(stored: Path) -> None:
    assert pagecache.resident_bytes([str(stored)]) == 4 << 20
    assert pagecache.drop([str(stored)]) == ("posix_fadvise", None)
    left = pagecache.resident_bytes([str(stored)])
    if left == 4 << 20:
        pytest.skip("the temporary folder lies in memory (tmpfs): set TMPDIR to a folder on a disk")
    assert left == 0
    stored.read_bytes()
    assert pagecache.resident_bytes([str(stored)]) == 4 << 20


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    method, reason = pagecache.drop([str(tmp_path / "gone")])
    assert method is None
    assert reason is not None and "gone" in reason and "No such file" in reason


def test_without_the_call_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    method, reason = pagecache.drop([])
    assert method is None and reason is not None and "posix_fadvise" in reason


def test_a_forbidden_drop_caches_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "_DROP_CACHES", str(tmp_path / "proc" / "drop_caches"))
    method, reason = pagecache.drop_all()
    assert method is None and reason is not None and "drop_caches" in reason


def test_files_of_a_bare_model_and_of_an_artifact(tmp_path: Path) -> None:
    for name in ("model.xml", "model.bin", "other.bin"):
        (tmp_path / name).write_text("x")
    bare = Artifact(tmp_path, "model.xml", "openvino", "as is")
    assert [Path(f).name for f in artifact_files(bare)] == ["model.bin", "model.xml"]
    whole = Artifact(tmp_path, "model.xml", "openvino", "fp32", identity="abc")
    assert [Path(f).name for f in artifact_files(whole)] == ["model.bin", "model.xml", "other.bin"]


def test_modules_and_libraries_of_this_process_are_found() -> None:
    found = mapped_files()
    assert str(Path(pagecache.__file__)) in found
    if Path("/proc/self/maps").exists():
        assert any(".so" in Path(f).name for f in found)
