"""A disk that is full or read-only: a clear reason, nothing half-written, and what was there stays whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portcall.artifact import open_artifact
from tests.conftest import Portcall

KIB = 1024


def _mount(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command here; install util-linux")
    mounted = _mount(folder, "-o", "size=200k")
    if mounted.returncode:
        pytest.skip(
            f"cannot mount a tmpfs: {mounted.stderr.strip()}; run the tests as root with CAP_SYS_ADMIN"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave_free(disk: Path, free_bytes: int) -> None:
    """Fill *disk* but for *free_bytes*."""
    (disk / "filler").unlink(missing_ok=True)
    state = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(state.f_bavail * state.f_frsize - free_bytes))


def set_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the one result that a failed command printed with --json."""
    assert done.returncode == 4, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (only,) = json.loads(done.stdout)["results"]
    assert only["outcome"] == "failed"
    assert only["fix"]
    found: dict[str, Any] = only
    return found


def error(done: subprocess.CompletedProcess[str], codes: tuple[int, ...] = (2, 4)) -> str:
    """Return the message of a command that ended in an error with --json."""
    assert done.returncode in codes, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)["error"]
    assert told["fix"]
    return str(told["message"])


@pytest.mark.parametrize("free_kib", [0, 4, 8, 12])
def test_full(portcall: Portcall, tiny_onnx: Path, small_disk: Path, free_kib: int) -> None:
    """Full before, while and after the model is written; an artifact of this model takes about 20 KiB."""
    out = small_disk / "out"
    first = portcall("export", tiny_onnx, "--to", "onnxruntime:fp32", "-o", out)
    assert first.returncode == 0, first.stderr
    before = {p.name for p in out.iterdir()}
    report = (out / "export.json").read_text()
    leave_free(small_disk, free_kib * KIB)
    done = portcall("export", tiny_onnx, "--to", "onnxruntime:fp16", "-o", out, "--json")
    assert "No space left on device" in result(done)["reason"]
    assert {p.name for p in out.iterdir()} - {"logs"} == before
    open_artifact(out / "onnxruntime-fp32")
    assert (out / "export.json").read_text() in (report, json.dumps(json.loads(done.stdout), indent=2) + "\n")
    (small_disk / "filler").unlink()
    again = portcall("export", tiny_onnx, "--to", "onnxruntime:fp16", "-o", out)
    assert again.returncode == 0, again.stderr
    open_artifact(out / "onnxruntime-fp16")


def test_full_while_an_artifact_is_replaced(portcall: Portcall, tiny_onnx: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    command = ("export", tiny_onnx, "--to", "onnxruntime:fp32", "-o", out, "--json")
    assert portcall(*command).returncode == 0
    identity = open_artifact(out / "onnxruntime-fp32")[1]["identity"]
    leave_free(small_disk, 8 * KIB)
    assert "No space left on device" in result(portcall(*command))["reason"]
    assert open_artifact(out / "onnxruntime-fp32")[1]["identity"] == identity


def test_read_only(portcall: Portcall, tiny_onnx: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    command = ("export", tiny_onnx, "--to", "onnxruntime:fp32", "--json", "-o")
    assert portcall(*command, out).returncode == 0
    set_read_only(small_disk)
    for place in (out, small_disk / "new" / "folder"):
        done = portcall(*command, place)
        text = error(done)
        assert "no writable folder" in text
        assert str(place.parent) in text
    open_artifact(out / "onnxruntime-fp32")
    done = portcall(
        "bench", out, "--processes", "1", "--min-time", "0.05", "-o", small_disk / "figures", "--json"
    )
    assert "no writable folder" in error(done)
    verified = portcall("verify", out / "onnxruntime-fp32")
    assert verified.returncode == 0, verified.stderr


def test_read_only_in_the_middle(tiny_onnx: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    cells = "onnxruntime:fp32,fp16,int8-dynamic,openvino:fp32,fp16"
    command = [
        sys.executable,
        "-m",
        "portcall",
        "export",
        str(tiny_onnx),
        "--to",
        cells,
        "-o",
        str(out),
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (out / "onnxruntime-fp32").exists() and process.poll() is None:
            time.sleep(0.01)
        for _ in range(1000):  # refused while a file is being written
            if (
                subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True).returncode
                == 0
            ):
                break
            time.sleep(0.01)
        stdout, stderr = process.communicate(timeout=300)
    assert "Traceback" not in stderr, stderr
    results = json.loads(stdout)["results"]
    assert process.returncode == 4, results
    assert results[0]["outcome"] == "artifact"
    for cell in results:
        if cell["outcome"] == "artifact":
            open_artifact(Path(cell["path"]))
        elif cell["outcome"] == "failed":
            assert cell["reason"] and cell["fix"], cell
    assert "Read-only file system" in results[-1]["reason"] or results[-1]["outcome"] == "unavailable"


def test_cache_read_only(
    portcall: Portcall, tiny_onnx: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in a read-only cache is used; what is not cannot be made."""
    monkeypatch.setenv("PORTCALL_CACHE", str(small_disk))
    command = ("export", tiny_onnx, "--to", "onnxruntime:fp32", "--json", "-o")
    assert portcall(*command, tmp_path / "first").returncode == 0
    set_read_only(small_disk)
    done = portcall(*command, tmp_path / "second")
    assert done.returncode == 0, done.stdout + done.stderr
    done = portcall(*command, tmp_path / "third", "--shape", "x=2x3x16x16")
    assert f"cannot write the cache {small_disk}: Read-only file system" in result(done)["reason"]


@pytest.mark.parametrize("free_kib", [0, 4])
def test_cache_full(
    portcall: Portcall,
    tiny_onnx: Path,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_kib: int,
) -> None:
    monkeypatch.setenv("PORTCALL_CACHE", str(small_disk))
    leave_free(small_disk, free_kib * KIB)
    command = ("export", tiny_onnx, "--to", "onnxruntime:fp32", "--json", "-o", tmp_path / "out")
    assert "No space left on device" in result(portcall(*command))["reason"]
    (small_disk / "filler").unlink()
    assert portcall(*command).returncode == 0
    assert list((small_disk / "graphs").glob(".*")) == []


def test_cache_is_a_file(
    portcall: Portcall, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("PORTCALL_CACHE", str(tmp_path / "cache"))
    done = portcall("export", tiny_onnx, "--to", "onnxruntime:fp32", "--json", "-o", tmp_path / "out")
    assert "cannot write the cache" in result(done)["reason"]
    assert "PORTCALL_CACHE" in result(done)["fix"]


def test_temporary_folder_full(
    portcall: Portcall, tiny_onnx: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(small_disk / "tmp"))
    command = ("export", tiny_onnx, "--to", "onnxruntime:fp32", "--json", "-o")
    for free_kib in (0, 4, 12, 24):
        leave_free(small_disk, free_kib * KIB)
        out = tmp_path / f"out-{free_kib}"
        done = portcall(*command, out)
        if free_kib == 0 and done.returncode == 0:
            continue  # Python found that it cannot write there, and took another folder
        told = json.loads(done.stdout)
        text, fix = (told["error"]["message"], told["error"]["fix"]) if "error" in told else _reason(done)
        assert "No space left on device" in text or "left no answer" in text, text
        assert "TMPDIR" in fix
        assert list((small_disk / "tmp").glob("*portcall*")) == []
        assert not (out / "onnxruntime-fp32").exists()


def _reason(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    found = result(done)
    return found["reason"], found["fix"]
