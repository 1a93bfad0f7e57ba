"""What a device builds of an artifact: once, under a lock, with a hash of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import portcall.api
from portcall import artifact as artifacts
from portcall.exporters import get_backend
from portcall.targets.agent import finishing
from portcall.targets.agent.contract import Artifact, Backend, Workload
from portcall.targets.agent.errors import CellFailed, UnsupportedError
from portcall.targets.agent.opening import ready
from tests.conftest import ROOT

ARTIFACT = Artifact(Path("/nowhere"), "model.onnx", "null", "fp32", identity="0123456789abcdef0")


def build(artifact: Artifact, workload: Workload, directory: Path) -> str:
    """A slow build that leaves a trace of every call."""
    with Path(os.environ["BUILDS"]).open("a") as stream:
        stream.write("x")
    time.sleep(0.2)
    (directory / "model.engine").write_bytes(b"engine for batch %d" % workload.batch)
    return "model.engine"


def build_folder(artifact: Artifact, workload: Workload, directory: Path) -> str:
    (directory / "model.compiled" / "inner").mkdir(parents=True)
    (directory / "model.compiled" / "inner" / "weights").write_bytes(bytes(1000))
    return "model.compiled"


def break_down(artifact: Artifact, workload: Workload, directory: Path) -> str:
    (directory / "half").write_bytes(b"half")
    raise CellFailed("no engine", "")


def backend(finish: object) -> Backend:
    return replace(get_backend("null"), finish=finish)  # type: ignore[arg-type]  # as the contract has it


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PORTCALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    return tmp_path / "cache" / "finished"


def builds() -> int:
    return len(Path(os.environ["BUILDS"]).read_text())


def test_builds_once_per_options_and_runtime() -> None:
    one = backend(build)
    path, record = finishing.finished(one, ARTIFACT, Workload(), "10.3")
    assert path is not None and record is not None
    assert path.read_bytes() == b"engine for batch 1"
    assert record["bytes"] == 18 and record["seconds"] >= 0.2 and record["cached"] is False
    again, cached = finishing.finished(one, ARTIFACT, Workload(threads=4, min_time_s=9), "10.3")
    assert again == path and cached == {**record, "cached": True} and builds() == 1
    other, _ = finishing.finished(one, ARTIFACT, Workload(batch=2), "10.3")
    assert other is not None and other.read_bytes() == b"engine for batch 2"
    newer, _ = finishing.finished(one, ARTIFACT, Workload(), "10.4")
    assert newer not in (path, other) and builds() == 3


def test_a_changed_file_is_built_again() -> None:
    one = backend(build)
    path, record = finishing.finished(one, ARTIFACT, Workload(), "1")
    assert path is not None and record is not None
    path.write_bytes(b"tampered with")
    again, second = finishing.finished(one, ARTIFACT, Workload(), "1")
    assert again == path and path.read_bytes() == b"engine for batch 1" and builds() == 2
    assert second is not None and second["sha256"] == record["sha256"]


def test_a_folder_counts_whole() -> None:
    path, record = finishing.finished(backend(build_folder), ARTIFACT, Workload(), "1")
    assert path is not None and path.is_dir() and record is not None and record["bytes"] == 1000
    _, cached = finishing.finished(backend(build_folder), ARTIFACT, Workload(), "1")
    assert cached is not None and cached["cached"] is True
    (path / "inner" / "more").write_bytes(b"1")
    _, rebuilt = finishing.finished(backend(build_folder), ARTIFACT, Workload(), "1")
    assert rebuilt is not None and rebuilt["cached"] is False and not (path / "inner" / "more").exists()


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    with pytest.raises(CellFailed, match="no engine"):
        finishing.finished(backend(break_down), ARTIFACT, Workload(), "1")
    assert [p.name for p in cache.rglob("*") if p.is_file()] == [".lock"]


def test_two_processes_build_it_once() -> None:
    code = """
from portcall.targets.agent import finishing
from portcall.targets.agent.contract import Workload
from tests.targets.test_finishing import ARTIFACT, backend, build
print(finishing.finished(backend(build), ARTIFACT, Workload(), "1")[0])
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert len({process.communicate()[0] for process in running}) == 1
    assert [process.returncode for process in running] == [0, 0, 0] and builds() == 1


def test_bare_files_and_backends_without_it() -> None:
    assert finishing.finished(backend(None), ARTIFACT, Workload(), "1") == (None, None)
    assert finishing.finished(backend(build), replace(ARTIFACT, identity=""), Workload(), "1") == (None, None)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORTCALL_CACHE", str(tmp_path / "file"))
    with pytest.raises(CellFailed, match="cannot write the cache"):
        finishing.finished(backend(build), ARTIFACT, Workload(), "1")


def test_a_runtime_that_is_too_old(tmp_path: Path) -> None:
    [result] = portcall.api.export("tests.models:tiny_cnn", "onnxruntime:fp32", tmp_path / "out")["results"]
    opened, manifest = artifacts.open_artifact(Path(result["path"]))
    assert opened.min_runtime == manifest["min_runtime"] == "1.2"
    with pytest.raises(UnsupportedError, match=r"needs onnxruntime 99\.1 or newer, here is 1\.\d+\.\d+"):
        ready(replace(opened, min_runtime="99.1"), Workload())
