"""The worker's entry: ``INTERPRETER -P agent_main.py JOB ANSWER [SPAWNED]`` (below Python 3.11: ``-I``).

SPAWNED: ``time.monotonic_ns()`` of the parent as it spawned this process; that clock is the system's, not a process's.

JOB is JSON: {"call": "module:function", "arguments": {...}, "package_root": dir of the portcall package,
"exporters_path": [dirs], "lifeline_fd", "progress_fd"}. ANSWER is written whole, by rename:
{"value": ...} or {"error": {"kind", "message", "fix", "traceback"}}. stdout and stderr stay free for chatty
runtimes. The worker dies with its parent: see ``_follow_parent``.
"""

from __future__ import annotations

import sys
import time

STARTED_NS = (
    time.monotonic_ns()
)  # before anything else is imported: what came before is the interpreter's start

import ctypes  # noqa: E402  # after the clock was read; so are all others
import errno  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import traceback  # noqa: E402
from typing import Any, Callable, Dict, List, Optional  # noqa: E402

SPAWNED_NS: Optional[int] = int(sys.argv[3]) if __name__ == "__main__" and len(sys.argv) > 3 else None

PR_SET_PDEATHSIG = 1


def _follow_parent(lifeline_fd: int, other_fds: List[int]) -> None:
    """Make this process and all it starts die when the parent closes the lifeline, on purpose or by dying.

    A forked guardian (forked before anything heavy is imported) blocks on the lifeline and then kills the process
    group; PR_SET_PDEATHSIG backs it up on Linux in case the guardian itself was killed.
    """
    parent = os.getppid()
    if os.fork() == 0:
        for fd in [0, 1, 2, *other_fds]:
            os.close(fd)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while os.read(lifeline_fd, 1):
            pass
        os.killpg(0, signal.SIGKILL)
    os.close(lifeline_fd)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _install_package(root: str, exporters_path: List[str]) -> None:
    """Import ``portcall`` from *root*, without making root's neighbours importable."""
    spec = importlib.util.spec_from_file_location(
        "portcall", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["portcall"] = package
    spec.loader.exec_module(package)
    exporters = importlib.import_module("portcall.exporters")
    for path in exporters_path:
        if path not in exporters.__path__:
            exporters.__path__.append(path)


def _send_nothing_home() -> None:
    """Keep runtimes from reporting usage: their threads and connections would run beside what is measured.

    ONNX Runtime reports by default from 1.29 on, model and graph names included; OpenVINO's Python package does when it
    is imported, and falls back to its own stub where ``openvino_telemetry`` is missing.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # how Python marks a module as missing


def _progress(fd: Optional[int]) -> Callable[[int, Optional[int]], None]:
    """Return progress(done, total), which writes one JSON line; never called inside a timed region."""

    def report(done: int, total: Optional[int]) -> None:
        if fd is not None:
            os.write(fd, (json.dumps([done, total]) + "\n").encode())

    return report


def _describe(error: BaseException) -> Dict[str, str]:
    text = str(error).strip().splitlines()
    known = {
        "kind": getattr(error, "kind", "failed"),
        "message": getattr(error, "message", None)
        or f"{type(error).__name__}: {text[0] if text else 'no message'}",
        "fix": getattr(error, "fix", ""),
    }
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        known["fix"] = "Free space there, or choose another place (-o, TMPDIR, PORTCALL_CACHE)"
    # Where another interpreter than portcall's own is set for a backend.
    if isinstance(error, ModuleNotFoundError) and error.name == "numpy":
        known["kind"], known["message"] = "unavailable", "the interpreter %s has no numpy" % sys.executable
        known["fix"] = "%s -m pip install numpy" % sys.executable
    if not isinstance(known["kind"], str) or not isinstance(known["message"], str):
        known = {"kind": "failed", "message": f"{type(error).__name__}: {error}", "fix": ""}
    known["traceback"] = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return known


def main(job_path: str, answer_path: str) -> int:
    with open(job_path, encoding="utf-8") as stream:
        job = json.load(stream)
    progress_fd = job.get("progress_fd")
    if job.get("lifeline_fd") is not None:
        _follow_parent(job["lifeline_fd"], [] if progress_fd is None else [progress_fd])
    _send_nothing_home()
    answer: Dict[str, Any]
    try:
        _install_package(job["package_root"], job.get("exporters_path", []))
        module, _, function = job["call"].partition(":")
        value = getattr(importlib.import_module(module), function)(job["arguments"], _progress(progress_fd))
        answer = {"value": value}
        text = json.dumps(answer)
    except BaseException as error:  # the one place where every failure becomes an answer
        answer = {"error": _describe(error)}
        traceback.print_exc()
        text = json.dumps(answer)
    with open(answer_path + ".part", "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(answer_path + ".part", answer_path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skip the runtimes' own tear-down: some crash or hang there after the work is done


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
