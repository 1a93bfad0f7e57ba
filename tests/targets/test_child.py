"""Children of an agent: at fixed addresses, and how they end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from portcall.targets.agent import child

ADDRESS = "import ctypes; print(ctypes.addressof(ctypes.create_string_buffer(1 << 24)))"


def test_fixed_addresses_are_the_same_in_every_process() -> None:
    command = child.at_fixed_addresses([sys.executable, "-I", "-S", "-c", ADDRESS])
    found = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(5)}
    root = str(Path(__file__).parent.parent.parent)
    flag = (
        f"import sys; sys.path[:0] = [{root!r}]\n"
        "from portcall.targets.agent import child; print(child.has_fixed_addresses())"
    )
    command = child.at_fixed_addresses([sys.executable, "-c", flag])
    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    if said == "False":
        pytest.skip("this system does not allow fixed addresses (seccomp?): run it without")
    assert len(found) == 1
    assert child.has_fixed_addresses() is False, "the parent keeps its own"


@pytest.mark.parametrize(
    ("code", "expected", "death"),
    [
        ("import sys; sys.exit(3)", 3, "the process exited with status 3"),
        ("import os; os.kill(os.getpid(), 9)", -9, "the process was killed by SIGKILL"),
    ],
)
def test_a_child_that_ends_without_an_answer(code: str, expected: int, death: str) -> None:
    ended = child.run("no:matter", {}, lambda command: [sys.executable, "-I", "-S", "-c", code])
    assert (ended.answer, ended.timed_out, ended.returncode) == (None, False, expected)
    assert ended.death == death


def test_a_child_that_hangs_is_killed() -> None:
    sleep = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    ended = child.run("no:matter", {}, lambda command: sleep, timeout_s=0.2)
    assert (ended.answer, ended.timed_out, ended.returncode) == (None, True, -9)


def test_an_error_of_the_job_is_an_answer() -> None:
    ended = child.run("portcall.targets.agent.jobs:no_such_job", {}, child.at_fixed_addresses)
    assert ended.answer is not None and "no_such_job" in ended.answer["error"]["message"]
