"""``python -m benchmarks.modes`` works; no time is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_it_prints_coverage_and_waits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.modes", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "drift", "--only", "arrival"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tables = done.stdout.split("\n\n")
    assert "load average" in done.stdout
    drift, arrival = (t.splitlines()[2:] for t in tables[1:3])
    assert [line.split()[0] for line in drift] == ["12"] * 4 + ["24"] * 4 + ["60"] * 4
    assert all(60 <= float(line.split()[2]) <= 100 for line in drift)
    assert [line.split()[0] for line in arrival] == ["0.3", "0.5", "0.7", "0.9"]
