"""Every command and every line of Python that the README shows is run here, in its order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()

ELSEWHERE = {
    "make demo": "test_demo.py",
    "make test": ".ci/run, which runs this very suite by it",
}
"""Commands that another place runs, and which."""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in _blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module", autouse=True)
def _fresh_tour() -> None:
    shutil.rmtree(ROOT / "build" / "tour", ignore_errors=True)


def test_the_readme_shows_the_two_commands() -> None:
    assert [c for c in _commands() if c.startswith("make")] == list(ELSEWHERE)
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in ci
    assert "SECONDS_PER_CELL" in (ROOT / "tests" / "test_demo.py").read_text()


@pytest.mark.parametrize("command", [c for c in _commands() if c not in ELSEWHERE])
def test_command(command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    verdicts = (1, 3) if command.startswith("portcall compare") else ()  # a verdict, whichever it is
    assert done.returncode in (0, *verdicts), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "failed" not in done.stdout


def test_python() -> None:
    (block,) = _blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sqnr, shape = done.stdout.splitlines()
    assert float(sqnr) > 100
    assert shape == "(1, 10)"


def test_links_resolve() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
