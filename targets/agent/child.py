"""Runs a job of the agent in one more fresh process, behind another command: in a cgroup, or at fixed addresses.

The child stays in the process group of the agent and so ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional

import portcall
import portcall.exporters
from portcall.targets.agent import agent_main

_FIXED = (
    "import ctypes, os, sys\n"
    "ask = getattr(ctypes.CDLL(None), 'personality', None)\n"
    "now = ask(0xffffffff) if ask else -1\n"
    "if now >= 0: ask(now | 0x0040000)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)

_NO_RANDOMIZE = 0x0040000


@dataclass(frozen=True)
class Ended:
    """How a child ended: its answer ("value" or "error"), or None; timed_out; returncode (negative: a signal's)."""

    answer: Optional[Dict[str, Any]]
    timed_out: bool
    returncode: int

    @property
    def death(self) -> str:
        """Say how it ended, for one without an answer."""
        if self.returncode >= 0:
            return "the process exited with status %d" % self.returncode
        try:
            return "the process was killed by %s" % signal.Signals(-self.returncode).name
        except ValueError:
            return "the process was killed by signal %d" % -self.returncode


def end_like(ended: Ended) -> NoReturn:
    """End this process as its child ended, so that whoever waits for it tells the true reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    if ended.returncode < 0:
        os.kill(os.getpid(), -ended.returncode)
    os._exit(max(ended.returncode, 1))


def run(
    function: str,
    arguments: Mapping[str, Any],
    behind: Callable[[List[str]], List[str]],
    timeout_s: Optional[float] = None,
) -> Ended:
    """Run ``module:function`` on *arguments*; behind(command) is the command that starts it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {
            "call": function,
            "arguments": arguments,
            "package_root": str(Path(portcall.__file__).parent),
            "exporters_path": list(portcall.exporters.__path__),
        }
        (folder / "job.json").write_text(json.dumps(job))
        isolated = "-P" if sys.version_info >= (3, 11) else "-I"
        command = [sys.executable, isolated, agent_main.__file__]
        command += [str(folder / "job.json"), str(folder / "answer.json")]
        process = subprocess.Popen(behind(command), stdin=subprocess.DEVNULL)
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            process.kill()
            process.wait()
        try:
            answer = json.loads((folder / "answer.json").read_text())
        except FileNotFoundError:
            answer = None
        return Ended(answer, timed_out, process.returncode)


def at_fixed_addresses(command: List[str]) -> List[str]:
    """Return *command* without randomization of the address space, where the system allows that (Linux)."""
    return [sys.executable, "-I", "-S", "-c", _FIXED, *command]


def has_fixed_addresses() -> bool:
    """Tell whether this process runs without randomization of its address space."""
    if sys.platform != "linux":
        return False
    import ctypes

    ask = getattr(ctypes.CDLL(None), "personality", None)
    now = -1 if ask is None else int(ask(0xFFFFFFFF))
    return now >= 0 and bool(now & _NO_RANDOMIZE)
