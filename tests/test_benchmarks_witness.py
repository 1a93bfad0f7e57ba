"""``make bench-witness`` on the smallest network: it runs, resumes, and judges what it should; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.witness import is_off
from tests.conftest import ROOT


def test_it_prints_a_line_per_file_and_keeps_the_artifacts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.witness", "--models", "digits", "--backends", "openvino"]
    command += [
        "--precisions",
        "fp32",
        "--pairs",
        "2",
        "--seconds",
        "0.02",
        "--folder",
        str(tmp_path / "out"),
    ]
    command += ["--json", str(tmp_path / "result.json")]
    environment = {**os.environ, "PORTCALL_CACHE": str(tmp_path / "cache")}
    made = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        [manifest] = (tmp_path / "out").rglob("manifest.json")
        made.append(manifest.stat().st_mtime_ns)
        [line] = [x for x in done.stdout.splitlines() if x.startswith("digits")]
        assert "benchmark_app" in line and line.endswith("not judged")
        assert "machine: " in done.stdout
    assert made[0] == made[1], "the artifact was exported again"
    [row] = json.loads((tmp_path / "result.json").read_text())["results"]
    assert row["model"] == "digits" and row["witness"]["pairs"] == 2


@pytest.mark.parametrize(
    ("witness", "expected"),
    [
        ({"p50_ratio": 1.04, "verdict": "undecided"}, True),
        ({"p50_ratio": 0.96, "verdict": "differs"}, True),
        ({"p50_ratio": 1.02, "verdict": "agrees"}, False),
        ({"p50_ratio": 1.50, "verdict": "not judged"}, False),
        ({"p50_ratio": None, "verdict": None}, False),
        (None, False),
    ],
)
def test_only_what_is_judged_can_be_off(witness: dict[str, Any] | None, expected: bool) -> None:
    assert is_off({"witness": witness}) is expected
