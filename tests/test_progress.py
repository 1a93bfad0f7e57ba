"""Progress bars: on a terminal, with the time left, and nowhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

BAR = """
from portcall.progress import Reporter
reporter = Reporter(True)
with reporter.stage("calibrate onnx") as progress:
    progress(1, 2)
reporter.warn("one sample")
"""


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    subprocess.run([sys.executable, "-c", BAR], stdout=subprocess.PIPE, stderr=theirs, check=True)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert "calibrate onnx" in shown
    assert " 50% " in shown
    assert "warning: one sample" in shown


def test_a_pipe_gets_warnings_alone() -> None:
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "warning: one sample\n"
