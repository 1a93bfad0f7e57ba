"""The cold-start mode on a device: from the start of a process to its first result.

Nothing heavy is imported at the top, not even numpy: what the runtime imports has to be its own first import.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import monotonic_ns
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

from portcall.targets.agent import pagecache, settings
from portcall.targets.agent.contract import Artifact, Available, Workload
from portcall.targets.agent.errors import CellFailed, UnavailableError

Progress = Callable[[int, Optional[int]], None]


def measure(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Do what a fresh process does up to its first result; return the ns of each part.

    arguments: artifact, workload, inputs, expected_sqnr_db, as in the latency mode; cache, as for ``drop``.
    Parts: interpreter_ns (from the parent's spawn to the first line of the agent), import_ns (the runtime's modules
    and libraries), load_ns (the model), bind_ns (the inputs), first_ns (the first inference).
    total_ns is their sum. harness_ns: what portcall did in between (its own modules, reading inputs) and a program of
    your own would not; wall_ns: all of it.
    "files": {"artifact": [...], "runtime": [...]}, those that were read, for ``drop``.
    """
    spawned, started = _process_start()
    artifact = Artifact.from_json(arguments["artifact"])
    workload = Workload.from_json(arguments["workload"])
    applied, warnings = settings.apply(workload)
    import importlib

    backend = importlib.import_module(f"portcall.exporters.{artifact.backend}").BACKEND
    before = mapped_files()
    marks = [monotonic_ns()]
    found = backend.probe("run")
    marks.append(monotonic_ns())
    if not isinstance(found, Available):
        raise UnavailableError(found.reason, found.fix)

    from portcall.targets.agent import fingerprint
    from portcall.targets.agent.opening import Names, batch_of, check_outputs, read_inputs, ready

    _, artifact, _ = ready(artifact, workload)
    if artifact.finished is not None and arguments.get("cache", "warm") != "warm":
        pagecache.drop(_files(artifact.finished))  # its hash was just checked: it is in the page cache again
    inputs, _ = read_inputs(arguments["inputs"])
    marks.append(monotonic_ns())
    with backend.load(artifact, workload) as session:
        marks.append(monotonic_ns())
        names = Names(artifact, session)
        batch = batch_of(session, names, inputs, workload.batch)
        marks.append(monotonic_ns())
        names.bind(session, batch)
        marks.append(monotonic_ns())
        session.infer()
        marks.append(monotonic_ns())
        check_outputs(names, session, arguments, limit=1)
        environment = session.environment
        runtime = sorted(mapped_files() - before)
    parts = {
        "interpreter_ns": started - spawned,
        "import_ns": marks[1] - marks[0],
        "load_ns": marks[3] - marks[2],
        "bind_ns": marks[5] - marks[4],
        "first_ns": marks[6] - marks[5],
    }
    total, wall = sum(parts.values()), marks[6] - spawned
    own = set(artifact_files(artifact))
    return {
        **parts,
        "total_ns": total,
        "harness_ns": wall - total,
        "wall_ns": wall,
        "elapsed_s": (monotonic_ns() - started) / 1e9,
        "warnings": warnings,
        "files": {"artifact": sorted(own), "runtime": [f for f in runtime if f not in own]},
        "environment": {
            "machine": fingerprint.machine(),
            "stack": {**fingerprint.stack(), **environment, **applied},
            "state": {"after": fingerprint.state()},
        },
    }


def drop(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Drop files from the page cache, in a process that maps none of them.

    arguments: cache ("artifact", "runtime": both, or "system": everything), files (as ``measure`` answers). Returns
    {"method", "reason", "files", "bytes", "resident_before_bytes", "resident_after_bytes"}: method is None, with the
    reason, where nothing could be dropped; resident bytes are those of the files that the system tells of.
    """
    files = list(arguments["files"]["artifact"])
    if arguments["cache"] != "artifact":
        files += arguments["files"]["runtime"]
    before = pagecache.resident_bytes(files)
    method, reason = pagecache.drop_all() if arguments["cache"] == "system" else pagecache.drop(files)
    after = pagecache.resident_bytes(files)
    return {
        "method": method,
        "reason": reason,
        "files": len(files),
        "bytes": sum(os.path.getsize(f) for f in files if os.path.isfile(f)),
        "resident_before_bytes": before,
        "resident_after_bytes": after,
    }


def _process_start() -> Tuple[int, int]:
    """Return when the parent spawned this process and when its first line ran, in ns of ``monotonic_ns``."""
    main = sys.modules["__main__"]
    spawned, started = getattr(main, "SPAWNED_NS", None), getattr(main, "STARTED_NS", None)
    if spawned is None or started is None:
        raise CellFailed("this process was not started by a worker pool: its start is unknown", "")
    return int(spawned), int(started)


def artifact_files(artifact: Artifact) -> List[str]:
    """Return the files that loading reads: all of an artifact's folder, or a bare file and those of its stem.

    A bare file's weights may lie beside it (model.xml and model.bin, model.onnx and model.onnx.data).
    """
    if artifact.identity:
        found = _files(artifact.directory)
    elif artifact.path.is_dir():
        found = _files(artifact.path)
    else:
        stem = artifact.path.stem
        found = [str(p) for p in artifact.directory.glob("*") if p.is_file() and p.name.startswith(stem)]
    return sorted(found + (_files(artifact.finished) if artifact.finished is not None else []))


def _files(path: Path) -> List[str]:
    return [str(p) for p in path.rglob("*") if p.is_file()] if path.is_dir() else [str(path)]


def mapped_files() -> Set[str]:
    """Return the files that this process has mapped (Linux), and those of its Python modules."""
    found = set()
    for module in list(sys.modules.values()):
        for name in ("__file__", "__cached__"):
            path = getattr(module, name, None)
            if isinstance(path, str):
                found.add(path)
    try:
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            fields = line.split(None, 5)
            if len(fields) == 6 and fields[5].startswith("/"):
                found.add(fields[5])
    except OSError:
        pass  # no /proc: the modules' files alone
    return {path for path in found if os.path.isfile(path)}
