"""``portcall bench --mode``: options that belong together, JSON, tables, and an interrupt in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Portcall
from tests.processes import left_running, running

NULL = {"inputs": [{"name": "x", "shape": [1, 4], "dtype": "float32"}], "copies": {"y": "x"}}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A bare file of the null backend."""
    path = tmp_path / "with space" / "model.null"
    path.parent.mkdir()
    path.write_text(json.dumps(NULL))
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mode", "arrival"], "needs --rate"),
        (["--rate", "10"], "--rate belongs to --mode arrival"),
        (["--mode", "cold", "--batches", "1,2"], "--batches belongs to --mode throughput"),
        (["--mode", "throughput", "--duration", "3"], "--duration belongs to --mode sustained and arrival"),
        (["--mode", "throughput", "--streams", "0"], "not a positive whole number"),
        (["--mode", "cold", "--page-cache", "warm,tepid"], "knows no 'tepid'"),
        (["--mode", "sustained", "--duration", "1"], "fewer than 4 windows"),
        (["--mode", "arrival", "--rate", "fast"], "not a positive number of requests"),
        (["--mode", "arrival", "--rate", "9", "--seed", "-1"], "not a whole number from 0 up"),
        (["--mode", "lukewarm"], "invalid choice"),
        (["--mode", "throughput", "--batch", "2"], "sweeps several"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    portcall: Portcall, artifact: Path, options: list[str], said: str
) -> None:
    done = portcall("bench", artifact, *options)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


CASES: dict[str, tuple[list[str], str]] = {
    "throughput": (["--batches", "1,2", "--streams", "1,2", "--min-time", "0.02"], "samples/s"),
    "cold": (["--page-cache", "warm"], "interpreter"),
    "sustained": (["--duration", "0.4", "--window", "0.05"], "drift %/min"),
    "arrival": (["--rate", "100", "--duration", "0.2", "--seed", "5"], "requests/s"),
}


@pytest.mark.parametrize("mode", CASES)
def test_json_and_table(portcall: Portcall, artifact: Path, mode: str) -> None:
    options, column = CASES[mode]
    command = ["bench", artifact, "--mode", mode, "--processes", "1", *options]
    done = portcall(*command, "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    [result] = answer["results"]
    assert (answer["schema"], result["outcome"], result["mode"]["name"]) == (1, "measurement", mode)
    assert result[mode]
    assert result["environment"]["machine"] and result["environment"]["stack"]["runtime"] == "null 1"
    table = portcall(*command)
    assert table.returncode == 0, table.stderr
    assert column in table.stdout.splitlines()[0]
    assert "null" in table.stdout.splitlines()[1]


def test_a_failed_cell_is_a_line_and_exit_code_4(portcall: Portcall, artifact: Path) -> None:
    artifact.write_text("{}")
    done = portcall("bench", artifact, "--mode", "cold", "--processes", "1")
    assert done.returncode == 4
    assert "failed: " in done.stdout


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds workers through /proc: run this on Linux")
def test_an_interrupt_in_the_middle_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "portcall", "bench", str(artifact), "--mode", "sustained", "--duration", "300",
            "-o", str(tmp_path / "results"),
        ],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not running(str(temporary)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "nothing half-written" in err
    assert not left_running(str(temporary))
    assert not list(temporary.iterdir())
    assert not (tmp_path / "results").exists()
