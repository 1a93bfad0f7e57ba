"""Ctrl-C and SIGTERM at any moment: exit code 130, nothing half-written, nothing lost, nothing left running."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from portcall.artifact import open_artifact
from tests.processes import left_running


class Place(NamedTuple):
    """A folder of the user's with a model, data, an earlier export in out/, and a private TMPDIR."""

    folder: Path
    before: dict[str, dict[str, object]]
    full_s: float

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"


def export_command(out: Path) -> list[str]:
    cells = "onnxruntime:fp32,int8"
    return ["export", "tiny.onnx", "--to", cells, "--data", "data.npz", "--method", "minmax", "-o", str(out)]


def start(
    place: Path, command: list[str], driver: tuple[str, ...] = ("-m", "portcall")
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *driver, *command],
        cwd=place,
        env={**os.environ, "TMPDIR": str(place / "tmp"), "PORTCALL_CACHE": str(place / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def artifacts_in(out: Path) -> dict[str, dict[str, object]]:
    """Return the manifest of every artifact in *out*; there must be nothing else, and every hash must match."""
    found = {}
    for entry in out.iterdir() if out.exists() else ():
        if entry.name != "export.json":
            found[entry.name] = open_artifact(entry)[1]
    if (out / "export.json").exists():
        json.loads((out / "export.json").read_text())
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Place:
    folder = tmp_path_factory.mktemp("place")
    (folder / "tmp").mkdir()
    shutil.copy(tiny_onnx, folder / "tiny.onnx")
    samples = np.random.default_rng(1).standard_normal((24, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "data.npz", x=samples)
    begin = time.monotonic()
    process = start(folder, export_command(folder / "out"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    place = Place(folder, artifacts_in(folder / "out"), time.monotonic() - begin)
    assert set(place.before) == {"onnxruntime-fp32", "onnxruntime-int8"}
    return place


def is_ready(process: subprocess.Popen[str]) -> bool:
    """Tell whether portcall handles signals yet; before, Python starts and ends as it does for any program."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def check(place: Place, process: subprocess.Popen[str], ready: bool, what: str) -> None:
    """Wait for *process* and check what it says, and what it left.

    ready: it handled signals already when one was sent.
    """
    out, err = process.communicate(timeout=60)
    code = process.returncode
    if ready or code in (0, 130):
        assert code in (0, 130), f"{what}: exit code {code}\n{out}\n{err}"
        assert "Traceback" not in err and "Exception ignored" not in err, f"{what}:\n{err}"
        assert (code == 130) == ("interrupted; nothing half-written" in err), f"{what}: {code}\n{err}"
    assert left_running(str(place.temporary)) == {}, what
    assert [p.name for p in place.temporary.iterdir() if "portcall" in p.name] == [], what
    assert list((place.folder / "cache").glob("graphs/.lowering-*")) == [], what
    now = artifacts_in(place.out)
    assert set(now) == set(place.before), what
    assert {n: m["identity"] for n, m in now.items()} == {
        n: m["identity"] for n, m in place.before.items()
    }, what


def test_export_at_any_time(place: Place) -> None:
    draw = random.Random(1)
    codes = []
    moments = [0.03, *(place.full_s * (i + draw.random()) / 7 for i in range(7))]
    for number, delay in enumerate(moments):
        sent = (signal.SIGINT, signal.SIGTERM)[number % 2]
        process = start(place.folder, export_command(place.out))
        time.sleep(delay)
        ready = is_ready(process)
        process.send_signal(sent)
        check(place, process, ready, f"{sent.name} after {delay:.3f} s")
        codes.append(process.returncode)
    assert codes.count(130) >= 5, codes


@pytest.mark.parametrize("later_s", [0, 0.005, 0.02, 0.05])
def test_export_while_it_starts(place: Place, later_s: float) -> None:
    """From the first moment on that it handles signals: portcall and numpy are imported then."""
    process = start(place.folder, export_command(place.out))
    while not is_ready(process):
        time.sleep(0.001)
    time.sleep(later_s)
    process.send_signal(signal.SIGINT)
    check(place, process, True, f"{later_s} s after it was ready")
    assert process.returncode == 130


IN_EXEC = """
import portcall.cli

def dispatch(given, as_json):
    exec("raise KeyboardInterrupt")

portcall.cli._dispatch = dispatch
"""


def test_exit_code_where_an_exec_is_interrupted(tmp_path: Path) -> None:
    """``python -m`` alone would end with -2: dataclasses and named tuples are made with exec."""
    (tmp_path / "interrupted_in_exec.py").write_text(
        IN_EXEC + "import sys\nsys.exit(portcall.cli.main(['doctor']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "interrupted_in_exec"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr


AT_LINE = """
import os, signal, sys

import portcall.__main__
number, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
seen = 0

def trace(frame, event, argument):
    global seen
    name = frame.f_code.co_filename
    if not ("portcall" in name or name.endswith(("shutil.py", "tempfile.py"))) or "calibration" in name:
        return None
    if event == "line":
        seen += 1
        if seen in (number, number + 7):
            os.kill(os.getpid(), signal.SIGINT if seen == number else signal.SIGTERM)
    return trace

from portcall import cli
from portcall.worker import WorkerPool
enter = WorkerPool.__enter__

def entered(self):
    sys.settrace(trace)
    sys._getframe(1).f_trace = trace
    return enter(self)

WorkerPool.__enter__ = entered
code = portcall.__main__.main()
sys.settrace(None)
with open(os.environ["SEEN"], "w") as stream:
    stream.write(str(seen))
sys.exit(code)
"""
"""Sends SIGINT to itself before the given line of portcall's, then SIGTERM 7 lines on: tidying up is hit as often
as waiting is, which takes most of the time and few of the lines."""


def test_export_at_any_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEN", str(place.folder / "seen"))

    def run(line: int) -> subprocess.Popen[str]:
        return start(place.folder, [str(line), *export_command(place.out)], ("-c", AT_LINE))

    process = run(1 << 60)
    check(place, process, True, "no signal")
    assert process.returncode == 0
    total = int((place.folder / "seen").read_text())
    draw = random.Random(2)
    codes = []
    for part in range(6):
        line = int(total * (part + draw.random()) / 6) + 1
        process = run(line)
        check(place, process, True, f"line {line} of {total}")
        codes.append(process.returncode)
    assert codes.count(130) >= 5, codes


def test_first_export_leaves_complete_artifacts_only(place: Place) -> None:
    """Without an earlier export: what is there afterwards is whole."""
    for delay in (0.7 * place.full_s, 0.9 * place.full_s):
        out = place.folder / f"new-{delay}"
        process = start(place.folder, export_command(out))
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        check(place, process, True, f"after {delay:.3f} s")
        assert set(artifacts_in(out)) <= set(place.before)


def test_bench(place: Place) -> None:
    for delay in (0.5, 2.0):
        process = start(
            place.folder, ["bench", "out", "--processes", "20", "--min-time", "1", "-o", "figures"]
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        check(place, process, True, f"after {delay} s")
        assert process.returncode == 130
        assert not (place.folder / "figures" / "bench.json").exists()


def test_json_says_it_was_interrupted(place: Place) -> None:
    process = start(place.folder, ["bench", "out", "--processes", "20", "--json"])
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["error"]["kind"] == "interrupted"
    assert err == ""
