"""What can go wrong in a worker, one function each: called as ``portcall.exporters.faults:NAME`` (a drop-in file)."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from portcall.targets.agent.errors import error_from_kind

Arguments = Mapping[str, Any]
Progress = Callable[[int, int | None], None]

FOREVER_S = 600


def answer(arguments: Arguments, progress: Progress) -> Any:
    return arguments["value"]


def litter(arguments: Arguments, progress: Progress) -> str:
    """Leave a temporary folder behind, as converters do."""
    return tempfile.mkdtemp(suffix=".mlpackage")


def segfault(arguments: Arguments, progress: Progress) -> None:
    print("about to read address 0", flush=True)
    ctypes.string_at(0)


def abort(arguments: Arguments, progress: Progress) -> None:
    os.write(2, b"runtime.cc:12: check failed: axis < rank\n")
    os.abort()


def hang(arguments: Arguments, progress: Progress) -> None:
    print("waiting for the licence server", flush=True)
    time.sleep(FOREVER_S)


def hang_deaf(arguments: Arguments, progress: Progress) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(FOREVER_S)


def hang_with_gil(arguments: Arguments, progress: Progress) -> None:
    ctypes.PyDLL(None).sleep(FOREVER_S)


def hang_with_progress(arguments: Arguments, progress: Progress) -> None:
    number = 0
    while True:
        number += 1
        progress(number, None)


def hang_silently_closing(arguments: Arguments, progress: Progress) -> None:
    """Close every file descriptor, the progress pipe too, and hang."""
    os.closerange(0, 1024)
    time.sleep(FOREVER_S)


def kill_self(arguments: Arguments, progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell_pid_and_hang(arguments: Arguments, progress: Progress) -> None:
    progress(os.getpid(), None)
    time.sleep(FOREVER_S)


def noise(arguments: Arguments, progress: Progress) -> str:
    line = b"\x1b[31mloading \xff\xfe" + b"x" * 1000 + b"\n"
    for number in range(10_000):
        os.write(1 + number % 2, line)
    return "heard"


def print_an_answer(arguments: Arguments, progress: Progress) -> str:
    print('{"value": "forged"}', flush=True)
    return "true"


def exit_silently(arguments: Arguments, progress: Progress) -> None:
    os._exit(0)


def exit_3(arguments: Arguments, progress: Progress) -> None:
    print("licence expired", flush=True)
    os._exit(3)


def sys_exit_3(arguments: Arguments, progress: Progress) -> None:
    sys.exit(3)


class OddError(Exception):
    """Looks like one of ours, with fields of other types."""

    kind = 7
    message = ("not", "a", "text")
    fix = None


def raise_unknown(arguments: Arguments, progress: Progress) -> None:
    raise ZeroDivisionError("the scale is 0\nand a second line")


def raise_empty(arguments: Arguments, progress: Progress) -> None:
    raise MemoryError


def raise_odd(arguments: Arguments, progress: Progress) -> None:
    raise OddError("odd one")


def raise_known(arguments: Arguments, progress: Progress) -> None:
    raise error_from_kind(arguments["kind"], "ümlaut \udcff and 中", "Do this")


def answer_an_object(arguments: Arguments, progress: Progress) -> object:
    return {"tensor": object()}


def answer_a_cycle(arguments: Arguments, progress: Progress) -> object:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def _start_child(marker: str) -> None:
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER_S})", marker])


def leave_child(arguments: Arguments, progress: Progress) -> str:
    _start_child(arguments["marker"])
    return "left"


def leave_child_and_crash(arguments: Arguments, progress: Progress) -> None:
    _start_child(arguments["marker"])
    os.abort()


def leave_fork(arguments: Arguments, progress: Progress) -> str:
    """Leave a forked child that holds all of the worker's file descriptors."""
    if os.fork() == 0:
        time.sleep(FOREVER_S)
    return "left"


def start_child_and_hang(arguments: Arguments, progress: Progress) -> None:
    _start_child(arguments["marker"])
    progress(1, 1)
    time.sleep(FOREVER_S)


def usage_reports(arguments: Arguments, progress: Progress) -> dict[str, str]:
    """No fault of ours: tell what the runtimes that report usage would report with."""
    import onnxruntime
    import openvino.tools.ovc

    assert onnxruntime.__version__
    return {
        "openvino": type(openvino.tools.ovc.telemetry).__module__,
        "onnxruntime": os.environ.get("ORT_DISABLE_TELEMETRY", ""),
    }
