"""A backend is one file: dropped into a folder of ``portcall.exporters.__path__``, every command picks it up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.exporters

ROOT = Path(__file__).parents[2]

DRIVER = """
import sys
import portcall.exporters
portcall.exporters.__path__.append(sys.argv[1])
from portcall.cli import main
sys.exit(main(sys.argv[2:]))
"""

CONTRACT = """
import portcall.exporters

portcall.exporters.__path__.append({folder!r})

from tests.exporters.contract import BackendContract


class TestEcho(BackendContract):
    name = "echo"
    runtime = ()
    export_needs = ("onnx",)
    models = ("copy",)
    refused_models = ("onnx",)
    floors_db = {{"fp32": 300.0}}
    census_method = "nothing is computed"
    computes = False
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file: null's, under another name and suffix."""
    made = tmp_path_factory.mktemp("my backends")
    text = (Path(portcall.exporters.__path__[0]) / "null.py").read_text()
    for old, new in (
        ('name="null"', 'name="echo"'),
        ('graph="null"', 'graph="echo"'),
        ('Graph("null"', 'Graph("echo"'),
        ("model.null", "model.echo"),
        ('(".null",)', '(".echo",)'),
    ):
        assert old in text
        text = text.replace(old, new)
    (made / "echo.py").write_text(text)
    return made


@pytest.fixture
def command(folder: Path) -> Any:
    """Run a command with the folder on the path: command("doctor") -> exit code, JSON."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        line = [sys.executable, "-c", DRIVER, str(folder), *map(str, arguments), "--json"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    return run


def test_doctor_lists_it(command: Any) -> None:
    code, answer = command("doctor")
    names = [b["name"] for b in answer["backends"]]
    assert code == 0 and names == sorted([*portcall.exporters.backend_names(), "echo"])
    [echo] = [b for b in answer["backends"] if b["name"] == "echo"]
    assert echo["precisions"] == ["fp32"] and echo["export"]["available"] and echo["run"]["available"]


def test_unknown_names_are_answered_with_it(command: Any, identity_onnx: Path, tmp_path: Path) -> None:
    code, answer = command("export", identity_onnx, "--to", "ecko:fp32", "-o", tmp_path / "out")
    assert code == 2 and "echo" in answer["error"]["message"]
    assert "Did you mean 'echo'?" in answer["error"]["fix"]


def test_export_verify_and_bench_take_it(command: Any, identity_onnx: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32))
    out = tmp_path / "out"
    code, answer = command(
        "export", identity_onnx, "--to", "echo:all,null:fp32", "--data", tmp_path / "d.npz", "-o", out
    )
    assert code == 0, answer
    assert [(r["backend"], r["outcome"]) for r in answer["results"]] == [
        ("echo", "artifact"),
        ("null", "artifact"),
    ]
    assert answer["results"][0]["parity"]["identical"]
    artifact = out / "echo-fp32"
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["backend"] == "echo" and manifest["entry"] == "model.echo"

    code, answer = command("verify", artifact)
    assert code == 0 and answer["results"][0]["outcome"] == "artifact"

    quick = ("--processes", "1", "--min-time", "0.05")
    code, answer = command("bench", artifact, artifact / "model.echo", "--shape", "x=1x4", *quick)
    assert code == 0, answer
    assert [r["backend"] for r in answer["results"]] == ["echo", "echo"]
    assert all(r["outcome"] == "measurement" and r["latency"]["n"] > 0 for r in answer["results"])


def test_its_artifact_is_refused_by_name_where_the_file_is_missing(
    command: Any, identity_onnx: Path, tmp_path: Path, portcall: Any
) -> None:
    code, _ = command("export", identity_onnx, "--to", "echo:fp32", "-o", tmp_path / "out")
    assert code == 0
    done = portcall("verify", tmp_path / "out" / "echo-fp32")
    assert done.returncode == 2 and "no backend 'echo'; there are: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_contract_covers_it_with_a_few_lines(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test_echo.py").write_text(CONTRACT.format(folder=str(folder)))
    shared = ["-p", "tests.conftest", "-p", "tests.exporters.conftest"]
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        *shared,
    ]
    done = subprocess.run(
        [*line, "-q", str(tmp_path / "test_echo.py"), "--basetemp", str(tmp_path / "base")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    summary = done.stdout.strip().splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary
