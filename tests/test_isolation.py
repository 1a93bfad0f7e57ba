"""One faulty cell is one failed result with its true reason; the cells beside it do not notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portcall.artifact import identity, open_artifact
from tests.processes import left_running

FAULTS = {
    "crashes_at_export": """
def export(graph, recipe, ranges, directory):
    (directory / "half.bin").write_bytes(bytes(1000))
    print("converting layer 7", flush=True)
    ctypes.string_at(0)
""",
    "hangs_at_export": """
def export(graph, recipe, ranges, directory):
    print("waiting for a lock", flush=True)
    time.sleep(600)
""",
    "exits_at_export": """
def export(graph, recipe, ranges, directory):
    os._exit(0)
""",
    "exports_nothing": """
def export(graph, recipe, ranges, directory):
    return Exported("model.null", ("model.null",), (), (), {})
""",
    "crashes_at_load": """
def load(artifact, workload):
    print("loading the plugin", flush=True)
    os.abort()
""",
    "hangs_at_inference": """
class Hanging(NullSession):
    def infer(self):
        time.sleep(600)

@contextmanager
def load(artifact, workload):
    yield Hanging(artifact.path)
""",
    "computes_something_else": """
class Wrong(NullSession):
    def get_outputs(self):
        return {name: array * 1.5 for name, array in super().get_outputs().items()}

@contextmanager
def load(artifact, workload):
    yield Wrong(artifact.path)
""",
}
TOP = """
import ctypes, dataclasses, os, time
from contextlib import contextmanager
from portcall.exporters import null
from portcall.exporters.null import NullSession, export, load
from portcall.targets.agent.contract import Exported
"""
END = "\nBACKEND = dataclasses.replace(null.BACKEND, name={name!r}, export=export, load=load)\n"

DRIVER = """
import sys
import portcall.exporters
portcall.exporters.__path__.append(sys.argv.pop(1))
from portcall.cli import main
sys.exit(main())
"""


@pytest.fixture
def dropins(tmp_path: Path) -> Path:
    folder = tmp_path / "dropins"
    folder.mkdir()
    for name, body in FAULTS.items():
        (folder / f"{name}.py").write_text(TOP + body + END.format(name=name))
    return folder


def run(dropins: Path, *arguments: str | Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the command line with the drop-in backends; return its exit code and the results by backend."""
    temporary = dropins.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(dropins), *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert left_running(str(temporary)) == {}
    assert list(temporary.glob("*portcall*")) == []  # a runtime leaves its own files there
    return done.returncode, {r["backend"]: r for r in json.loads(done.stdout)["results"]}


def test_export(dropins: Path, identity_onnx: Path, tmp_path: Path) -> None:
    names = ["crashes_at_export", "hangs_at_export", "exits_at_export", "exports_nothing"]
    names += ["crashes_at_load", "computes_something_else", "null"]
    cells = ",".join(f"{name}:fp32" for name in names)
    code, results = run(
        dropins, "export", identity_onnx, "--to", cells, "--timeout", "10", "-o", tmp_path / "out"
    )
    assert code == 4
    assert list(results) == names
    assert {n: r["outcome"] for n, r in results.items()} == {
        **dict.fromkeys(names[:4], "failed"),
        "crashes_at_load": "failed",
        "computes_something_else": "artifact",  # export measures parity, the user judges it
        "null": "artifact",
    }
    reasons = {n: r["reason"] for n, r in results.items()}
    assert (
        reasons["crashes_at_export"]
        == "the worker was killed by SIGSEGV; its last output: converting layer 7"
    )
    assert reasons["hangs_at_export"].startswith("no answer within 10 s")
    assert reasons["exits_at_export"] == "the worker exited with status 0 and left no answer"
    assert reasons["exports_nothing"] == "the exporter left no model.null"
    assert (
        reasons["crashes_at_load"] == "the worker was killed by SIGABRT; its last output: loading the plugin"
    )
    assert results["computes_something_else"]["parity"]["sqnr_db"] < 10
    out = tmp_path / "out"
    kept = {"null-fp32", "computes_something_else-fp32", "logs", "export.json"}
    assert {p.name for p in out.iterdir()} == kept
    open_artifact(out / "null-fp32")
    log = next((out / "logs").glob("*crashes_at_export*"))
    assert "converting layer 7" in log.read_text()


def test_bench(dropins: Path, identity_onnx: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    code, _ = run(dropins, "export", identity_onnx, "--to", "null:fp32", "-o", good)
    assert code == 0
    names = ["crashes_at_load", "hangs_at_inference", "computes_something_else", "null"]
    artifacts = [tmp_path / name for name in names]
    for name, artifact in zip(
        names, artifacts, strict=True
    ):  # as if another device ran it: only the runtime differs
        shutil.copytree(good / "null-fp32", artifact)
        manifest = json.loads((artifact / "manifest.json").read_text())
        manifest["backend"] = name
        manifest["identity"] = identity(manifest)
        (artifact / "manifest.json").write_text(json.dumps(manifest))
    options = ("--processes", "2", "--min-time", "0.05", "--timeout", "10")
    code, results = run(dropins, "bench", *artifacts, *options)
    assert code == 1  # wrong outputs weigh more than crashes
    assert {n: r["outcome"] for n, r in results.items()} == {
        **dict.fromkeys(names[:3], "failed"),
        "null": "measurement",
    }
    reasons = {n: r["reason"] for n, r in results.items()}
    assert (
        reasons["crashes_at_load"] == "the worker was killed by SIGABRT; its last output: loading the plugin"
    )
    assert reasons["hangs_at_inference"].startswith("no answer within 10 s")
    assert reasons["computes_something_else"].startswith("outputs differ from the source's on sample 0: ")
    assert results["null"]["latency"]["processes"] == 2
    assert all(results[n]["latency"] is None for n in names[:3])


SHADOWS = ("onnx", "numpy", "onnxruntime", "targets", "exporters")


@pytest.fixture
def trapped(tmp_path: Path, tiny_onnx: Path) -> Path:
    """A working folder with a model, and with folders and files named like what portcall imports."""
    folder = tmp_path / "user's folder"
    folder.mkdir()
    shutil.copy(tiny_onnx, folder / "tiny.onnx")
    for name in SHADOWS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the folder of the user')")
    for name in ("json", "argparse", "ctypes", "tqdm"):
        (folder / f"{name}.py").write_text("raise RuntimeError('the file of the user')")
    return folder


@pytest.mark.parametrize("path", [None, "", ".", ":", "WORKING FOLDER"])
@pytest.mark.parametrize("way", ["console script", "python -m"])
def test_working_folder_shadows_nothing(trapped: Path, way: str, path: str | None) -> None:
    script = Path(sys.executable).parent / "portcall"
    if way == "console script" and not script.exists():
        pytest.skip(f"no console script at {script}; run: pip install -e .")
    command = [str(script)] if way == "console script" else [sys.executable, "-m", "portcall"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path.replace("WORKING FOLDER", str(trapped))
    done = subprocess.run(
        [*command, "export", "tiny.onnx", "--to", "onnxruntime:fp32", "-o", "out", "--json"],
        cwd=trapped,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["results"][0]["outcome"] == "artifact"


def test_working_folder_reached_through_a_link(trapped: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(trapped)
    done = subprocess.run(
        [sys.executable, "-m", "portcall", "export", "tiny.onnx", "--to", "onnxruntime:fp32", "-o", "out"],
        cwd=link,
        env={**os.environ, "PYTHONPATH": str(link), "PWD": str(link)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
