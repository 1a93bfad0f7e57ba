"""Runs a function in a process of its own, so that a crash, a hang or an import conflict is one failed cell.

The worker leads its own process group, answers in a file, and dies with its parent (``targets/agent/agent_main.py``
holds the other end). The parent sleeps on the process and its progress pipe; it never polls.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import portcall.exporters
from portcall.targets.agent.errors import CellFailed, UnavailableError, error_from_kind

PACKAGE_ROOT = Path(portcall.exporters.__file__).parent.parent
AGENT_MAIN = PACKAGE_ROOT / "targets" / "agent" / "agent_main.py"

Progress = Callable[[int, int | None], None]


class Interrupted(KeyboardInterrupt):
    """Raised where a worker was ended, or not started, because the user interrupted the command."""


class WorkerDied(CellFailed):
    """A worker ended without an answer: a signal, or an exit of its own."""


_open_pools: set[WorkerPool] = set()
_opened = 0


def was_opened() -> bool:
    """Tell whether any pool was opened so far: before, there is nothing to tidy up."""
    return _opened > 0


def interrupt_all() -> bool:
    """End the workers of every open pool; tell whether there was one. Safe in a signal handler."""
    for pool in list(_open_pools):
        pool.interrupt()
    return bool(_open_pools)


class _Stop:
    """A pipe that becomes readable for every waiting thread once the run is interrupted."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        self.is_set = False

    def set(self) -> None:
        self.is_set = True
        os.write(self._write_fd, b"x")

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self._write_fd)


class WorkerPool:
    """The settings that all workers of one command share, and the switch that ends them all."""

    def __init__(self, pythons: Mapping[str, str] | None = None, timeout_s: float = 1800.0) -> None:
        self.pythons = dict(pythons or {})
        self.timeout_s = timeout_s
        self._stop = _Stop()

    def __enter__(self) -> WorkerPool:
        global _opened
        _open_pools.add(self)
        _opened += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _open_pools.discard(self)
        self._stop.close()
        if self._stop.is_set and kind is None:
            raise Interrupted

    def interrupt(self) -> None:
        """End every running worker; their callers get Interrupted."""
        self._stop.set()

    def python_of(self, backend: str) -> str:
        """Return the interpreter that runs *backend*'s jobs."""
        return self.pythons.get(backend, sys.executable)

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        *,
        backend: str | None = None,
        timeout_s: float | None = None,
        log: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Any:
        """Return what ``module:function`` answers to *arguments* (JSON in, JSON out) in a fresh process.

        backend: whose interpreter to use (``portcall.toml``). log: where the worker's output is kept if it fails.
        Raises the PortcallError that the worker raised, or CellFailed with the true reason of its death.
        """
        if self._stop.is_set:
            raise Interrupted
        python = self.python_of(backend or "")
        with tempfile.TemporaryDirectory(prefix="portcall-job-") as name:
            folder = Path(name)
            job = {
                "call": function,
                "arguments": arguments,
                "package_root": str(PACKAGE_ROOT),
                "exporters_path": list(portcall.exporters.__path__),
            }
            output = folder / "output.log"
            try:
                status = self._run(python, job, folder, output, timeout_s or self.timeout_s, on_progress)
                answer = _read_answer(folder / "answer.json")
                if answer is None:
                    full = shutil.disk_usage(folder).free < 1 << 16
                    fix = f"{folder.parent} is full: free space there, or set TMPDIR" if full else ""
                    raise WorkerDied(f"{_death(status)}{_last_line(output)}", fix)
                if "error" in answer:
                    error = answer["error"]
                    raise error_from_kind(error["kind"], error["message"], error["fix"])
                return answer["value"]
            except CellFailed:
                if log is not None and output.exists():
                    # The disk may be why it failed: that reason must get through.
                    with contextlib.suppress(OSError):
                        log.parent.mkdir(parents=True, exist_ok=True)
                        log.write_bytes(_tail(output, 1 << 20))
                raise

    def _run(
        self,
        python: str,
        job: dict[str, Any],
        folder: Path,
        output: Path,
        timeout_s: float,
        on_progress: Progress | None,
    ) -> int:
        lifeline_read, lifeline_write = os.pipe()
        progress_read, progress_write = os.pipe()
        process: subprocess.Popen[bytes] | None = None
        try:
            job = {**job, "lifeline_fd": lifeline_read, "progress_fd": progress_write}
            (folder / "job.json").write_text(json.dumps(job))
            with output.open("wb") as stream:
                environment = _environment(folder)
                try:
                    command = [*interpreter_command(python), str(AGENT_MAIN)]
                    command += [str(folder / "job.json"), str(folder / "answer.json")]
                    process = subprocess.Popen(
                        [*command, str(time.monotonic_ns())],
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=(lifeline_read, progress_write),
                        env=environment,
                    )
                except OSError as error:
                    raise UnavailableError(
                        f"cannot start the interpreter {python}: {error.strerror}",
                        "Set the right path in portcall.toml ([backends.NAME] python) or PORTCALL_PYTHON_NAME",
                    ) from error
            os.close(lifeline_read)
            os.close(progress_write)
            lifeline_read = progress_write = -1
            self._wait(process, progress_read, output, timeout_s, on_progress)
        finally:
            for fd in (lifeline_read, progress_write, lifeline_write, progress_read):
                if fd >= 0:
                    os.close(fd)
            if process is not None:
                # Before it is reaped: until then no other group can have its number.
                _kill_group(process)
        return process.returncode

    def _wait(
        self,
        process: subprocess.Popen[bytes],
        progress_fd: int,
        output: Path,
        timeout_s: float,
        on_progress: Progress | None,
    ) -> None:
        """Sleep until the worker has ended. Raises CellFailed at the timeout, Interrupted at an interrupt."""
        deadline = time.monotonic() + timeout_s
        pending = b""
        with selectors.DefaultSelector() as selector, _ExitEvent(process) as exited:
            selector.register(progress_fd, selectors.EVENT_READ)
            selector.register(self._stop.read_fd, selectors.EVENT_READ)
            selector.register(exited, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                if self._stop.read_fd in ready:
                    raise Interrupted
                # However much progress it reports:
                if exited.fileno() not in ready and time.monotonic() >= deadline:
                    raise CellFailed(
                        f"no answer within {timeout_s:g} s: the worker was killed{_last_line(output)}",
                        "Allow more time with --timeout",
                    )
                if progress_fd in ready:
                    chunk = os.read(progress_fd, 65536)
                    if not chunk:
                        selector.unregister(progress_fd)
                    pending += chunk
                    *lines, pending = pending.split(b"\n")
                    if lines and on_progress is not None:
                        on_progress(*json.loads(lines[-1]))
                if exited.fileno() in ready:
                    return


class _ExitEvent:
    """Readable once *process* has ended: a pidfd, or elsewhere a pipe fed by a thread that blocks on the process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if sys.platform == "linux":
            self._fd = os.pidfd_open(process.pid)
        else:
            self._fd, write_fd = os.pipe()

            def feed() -> None:
                process.wait()
                os.close(write_fd)

            threading.Thread(target=feed, daemon=True).start()

    def fileno(self) -> int:
        return self._fd

    def __enter__(self) -> _ExitEvent:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def interpreter_command(python: str) -> list[str]:
    """Return the interpreter with the flag that keeps the user's folder off sys.path.

    -P needs Python 3.11; -I does the same (and more) below.
    """
    if python == sys.executable:
        return [python, "-P"]
    probe = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [python, "-P" if probe.stdout.strip() == "True" else "-I"]


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment without entries of PYTHONPATH that mean the current folder, with its temporary files
    in *folder*: converters leave some behind (coremltools a package per conversion), which go with the worker's.
    """
    environment = {**os.environ, "TMPDIR": str(folder)}
    here = os.path.realpath("")
    entries = environment.get("PYTHONPATH", "").split(os.pathsep)
    path = [p for p in entries if p and os.path.realpath(p) != here]
    environment.pop("PYTHONPATH", None)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(path)
    return environment


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker's process group: the worker if it still runs, and whatever it left behind."""
    # Nobody may be left (macOS says EPERM for a group of zombies).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_answer(path: Path) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return answer


def _death(status: int) -> str:
    if status >= 0:
        return f"the worker exited with status {status} and left no answer"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
    return f"the worker was killed by {name}{hint}"


def _tail(path: Path, size: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - size))
        return stream.read()


def _last_line(output: Path) -> str:
    lines = _tail(output, 4096).decode(errors="replace").strip().splitlines() if output.exists() else []
    return f"; its last output: {lines[-1].strip()[:200]}" if lines else ""
