"""Every way for a worker to end: the caller gets the true reason, nothing is left running, the pool goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import portcall.exporters
from portcall.targets.agent.errors import (
    BadInput,
    CellFailed,
    PortcallError,
    UnavailableError,
    UnsupportedError,
)
from portcall.worker import Interrupted, WorkerPool
from tests.processes import left_running, running

FAULTS = Path(__file__).parent / "faults.py"


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of drop-in backends with ``faults.py``; workers find it, since the pool passes the search path on."""
    folder = tmp_path / "dropins"
    folder.mkdir()
    shutil.copy(FAULTS, folder)
    monkeypatch.setattr(portcall.exporters, "__path__", [*portcall.exporters.__path__, str(folder)])
    return folder


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A text that is in the command line of every worker of this test: its temporary folder."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return str(folder)


@pytest.fixture
def pool(faults: Path, mark: str) -> Iterator[WorkerPool]:
    """A pool that must still work after the test's fault, with no process or file left of it."""
    with WorkerPool(timeout_s=60) as pool:
        yield pool
        assert pool.call("portcall.exporters.faults:answer", {"value": [1, "still works"]}) == [
            1,
            "still works",
        ]
    assert left_running(mark) == {}
    assert list(Path(mark).iterdir()) == []


def call(pool: WorkerPool, fault: str, timeout_s: float | None = None, **arguments: object) -> object:
    return pool.call(f"portcall.exporters.faults:{fault}", arguments, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("segfault", "the worker was killed by SIGSEGV; its last output: about to read address 0"),
        (
            "abort",
            "the worker was killed by SIGABRT; its last output: runtime.cc:12: check failed: axis < rank",
        ),
        ("kill_self", "the worker was killed by SIGKILL (out of memory, or killed by hand)"),
        ("exit_silently", "the worker exited with status 0 and left no answer"),
        ("exit_3", "the worker exited with status 3 and left no answer; its last output: licence expired"),
        ("sys_exit_3", "SystemExit: 3"),
        ("raise_unknown", "ZeroDivisionError: the scale is 0"),
        ("raise_empty", "MemoryError: no message"),
        ("raise_odd", "OddError: odd one"),
        ("answer_an_object", "TypeError: Object of type object is not JSON serializable"),
        ("answer_a_cycle", "ValueError: Circular reference detected"),
        (
            "no_such_function",
            "AttributeError: module 'portcall.exporters.faults' has no attribute 'no_such_function'",
        ),
    ],
)
def test_reason(pool: WorkerPool, fault: str, reason: str) -> None:
    with pytest.raises(CellFailed) as caught:
        call(pool, fault)
    assert caught.value.message == reason


@pytest.mark.parametrize(
    "fault", ["hang", "hang_deaf", "hang_with_gil", "hang_with_progress", "hang_silently_closing"]
)
def test_timeout(pool: WorkerPool, fault: str) -> None:
    start = time.monotonic()
    with pytest.raises(CellFailed, match=r"^no answer within 1\.5 s: the worker was killed") as caught:
        call(pool, fault, timeout_s=1.5)
    assert time.monotonic() - start < 30
    assert "--timeout" in caught.value.fix


def test_timeout_tells_the_last_output(pool: WorkerPool) -> None:
    with pytest.raises(CellFailed, match="its last output: waiting for the licence server"):
        call(pool, "hang", timeout_s=1.5)


def test_killed_from_outside(pool: WorkerPool) -> None:
    with pytest.raises(CellFailed, match="killed by SIGTERM"):
        pool.call(
            "portcall.exporters.faults:tell_pid_and_hang",
            {},
            on_progress=lambda pid, total: os.kill(pid, signal.SIGTERM),
        )


@pytest.mark.parametrize(
    "error",
    [PortcallError, BadInput, UnsupportedError, UnavailableError, CellFailed],
    ids=lambda e: str(e.kind),
)
def test_our_own_errors_come_back_as_they_are(pool: WorkerPool, error: type[PortcallError]) -> None:
    with pytest.raises(PortcallError) as caught:
        call(pool, "raise_known", kind=error.kind)
    assert type(caught.value) is error
    assert (caught.value.message, caught.value.fix) == ("ümlaut \udcff and 中", "Do this")


def test_noise_does_not_matter(pool: WorkerPool) -> None:
    assert call(pool, "noise") == "heard"
    assert call(pool, "print_an_answer") == "true"


@pytest.mark.parametrize("fault", ["leave_child", "leave_fork"])
def test_children_of_a_worker_end_with_it(pool: WorkerPool, mark: str, fault: str) -> None:
    assert call(pool, fault, marker=f"{mark}/child") == "left"
    assert left_running(mark) == {}


def test_children_of_a_crashed_worker_end_with_it(pool: WorkerPool, mark: str) -> None:
    with pytest.raises(CellFailed, match="SIGABRT"):
        call(pool, "leave_child_and_crash", marker=f"{mark}/child")
    assert left_running(mark) == {}


def test_what_a_worker_leaves_in_its_temporary_folder_goes_with_it(pool: WorkerPool, mark: str) -> None:
    left = Path(str(call(pool, "litter")))
    assert left.is_relative_to(mark) and not left.exists()
    assert not list(Path(mark).iterdir())


def test_the_log_of_a_failed_worker_is_kept(pool: WorkerPool, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "cell.log"
    with pytest.raises(CellFailed):
        pool.call("portcall.exporters.faults:exit_3", {}, log=log)
    assert log.read_text() == "licence expired\n"
    log.unlink()
    assert pool.call("portcall.exporters.faults:answer", {"value": 1}, log=log) == 1
    assert not log.exists()


def test_a_log_that_cannot_be_written_does_not_hide_the_reason(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CellFailed, match="exited with status 3"):
        pool.call("portcall.exporters.faults:exit_3", {}, log=tmp_path / "file" / "cell.log")


def test_an_interpreter_that_is_not_there(faults: Path, mark: str) -> None:
    with WorkerPool({"onnxruntime": "/no/such/python"}) as pool:
        with pytest.raises(
            UnavailableError, match=r"cannot start the interpreter /no/such/python: No such file"
        ) as caught:
            pool.call("portcall.exporters.faults:answer", {"value": 1}, backend="onnxruntime")
        assert "portcall.toml" in caught.value.fix
        assert pool.call("portcall.exporters.faults:answer", {"value": 1}) == 1


def test_an_interpreter_that_is_no_python(faults: Path, mark: str) -> None:
    with WorkerPool({"onnxruntime": "/bin/true"}) as pool, pytest.raises(CellFailed, match="left no answer"):
        pool.call("portcall.exporters.faults:answer", {"value": 1}, backend="onnxruntime")


def test_interrupt_ends_running_and_later_workers(faults: Path, mark: str) -> None:
    with pytest.raises(Interrupted), WorkerPool() as pool:  # leaving the pool says so once more
        reached: list[type[BaseException]] = []
        started = threading.Event()

        def work() -> None:
            try:
                pool.call(
                    "portcall.exporters.faults:tell_pid_and_hang",
                    {},
                    on_progress=lambda pid, total: started.set(),
                )
            except BaseException as error:
                reached.append(type(error))

        thread = threading.Thread(target=work)
        thread.start()
        assert started.wait(60)
        pool.interrupt()
        thread.join(60)
        assert reached == [Interrupted]
        with pytest.raises(Interrupted):
            call(pool, "answer", value=1)
    assert left_running(mark) == {}


DRIVER = """
import sys, tempfile
import portcall.exporters
from portcall.worker import WorkerPool
folder, jobs = sys.argv[1:]
portcall.exporters.__path__.append(folder)
tempfile.tempdir = jobs
with WorkerPool() as pool:
    pool.call(
        "portcall.exporters.faults:start_child_and_hang",
        {"marker": jobs + "/child"},
        on_progress=lambda done, total: print("running", flush=True),
    )
"""


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "guardian-killed"])
def test_worker_and_its_children_die_with_the_parent(faults: Path, mark: str, guarded: bool) -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(faults), mark], stdout=subprocess.PIPE, text=True
        ) as parent,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(parent.kill)
        assert parent.stdout is not None
        assert parent.stdout.readline() == "running\n"
        others = _others(mark, parent.pid)
        deadline = time.monotonic() + 30
        while (
            len(others) < 3 and time.monotonic() < deadline
        ):  # a new process has no command line for a moment
            others = _others(mark, parent.pid)
        assert len(others) == 3, "the worker, its guardian, its child"
        if not guarded:  # the guardian is the worker's child with the worker's own command line
            workers = sorted(pid for pid, line in others.items() if "agent_main.py" in line)
            os.kill(next(pid for pid in workers if _parent_of(pid) in workers), signal.SIGKILL)
    left = left_running(mark)
    if guarded:
        assert left == {}
    else:  # the kernel ends the worker; only its child is left, since nobody is there to end it
        assert not any("agent_main.py" in line for line in left.values())
        for pid in left:
            os.kill(pid, signal.SIGKILL)


def _others(mark: str, pid: int) -> dict[int, str]:
    return {other: line for other, line in running(mark).items() if other != pid}


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_runtimes_report_nothing_home(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "tmp of the runtime"
    own.mkdir()
    monkeypatch.setenv("TMPDIR", str(own))
    found = call(pool, "usage_reports")
    assert found == {"openvino": "openvino.tools.ovc.telemetry_stub", "onnxruntime": "1"}
    assert list(own.iterdir()) == []  # ONNX Runtime leaves .ses, its session id, where it reports
