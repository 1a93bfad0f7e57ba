"""What a device builds of an artifact (an engine, a compiled model): cached, locked, under a hash of its own.

``CACHE/finished/<artifact>/<options>/<device and runtime>/`` holds what ``Backend.finish`` wrote and ``finish.json``.
It never lands in the artifact.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

from portcall.targets.agent import fingerprint
from portcall.targets.agent.contract import Artifact, Backend, Workload
from portcall.targets.agent.errors import CellFailed

RECORD = "finish.json"


def cache_folder() -> Path:
    """Return PORTCALL_CACHE, else the user's cache folder for portcall."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "portcall")
    return Path(os.environ.get("PORTCALL_CACHE") or default)


def finished(
    backend: Backend, artifact: Artifact, workload: Workload, version: str
) -> Tuple[Optional[Path], Optional[Dict[str, Any]]]:
    """Return the file that *backend* makes of *artifact* here, and its record; from the cache if it is there.

    version: of the runtime. The record: {"seconds", "bytes", "sha256", "file", "cached"}. (None, None) for a backend
    that ends nothing on the device, and for a bare file. Raises CellFailed where the cache cannot be written.
    """
    if backend.finish is None or not artifact.identity:
        return None, None
    folder = (
        cache_folder() / "finished" / artifact.identity[:16] / _options_key(workload) / _device_key(version)
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            record = _read(folder)
            if record is None:
                record = _build(backend, artifact, workload, folder)
            return folder / record["file"], record
    except OSError as error:
        raise CellFailed(
            "cannot write the cache %s: %s" % (folder, error.strerror),
            "Free space there, or set PORTCALL_CACHE to a folder that can be written",
        ) from error


def _options_key(workload: Workload) -> str:
    shapes = {name: list(shape) for name, shape in sorted(workload.shapes.items())}
    return _key({"batch": workload.batch, "shapes": shapes})


def _device_key(version: str) -> str:
    machine = fingerprint.machine()
    parts = {name: machine[name] for name in ("architecture", "board", "cpu_model", "gpus")}
    return _key({**parts, "gpu_driver": fingerprint.stack()["gpu_driver"], "runtime": version})


def _key(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on *folder*: two processes that want the same engine build it once."""
    import fcntl

    with open(folder / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # let go when the file is closed, or its process dies
        yield


def _read(folder: Path) -> Optional[Dict[str, Any]]:
    """Return the record of a finished build whose file still has its hash, else None."""
    try:
        record: Dict[str, Any] = json.loads((folder / RECORD).read_text())
        intact = tree_sha256(folder / record["file"]) == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**record, "cached": True} if intact else None


def _build(backend: Backend, artifact: Artifact, workload: Workload, folder: Path) -> Dict[str, Any]:
    assert backend.finish is not None
    staging = Path(tempfile.mkdtemp(prefix=".finishing-", dir=str(folder)))
    try:
        start = time.perf_counter()
        name = backend.finish(artifact, workload, staging)
        seconds = time.perf_counter() - start
        made = staging / name
        record = {
            "seconds": round(seconds, 3),
            "bytes": sum(f.stat().st_size for f in _files(made)),
            "sha256": tree_sha256(made),
            "file": name,
            "cached": False,
        }
        for old in (folder / RECORD, folder / name):
            if old.is_dir():
                shutil.rmtree(str(old))
            elif old.exists():
                old.unlink()
        os.replace(str(made), str(folder / name))
        part = folder / (RECORD + ".part")
        part.write_text(json.dumps(record))
        os.replace(str(part), str(folder / RECORD))
        return record
    finally:
        shutil.rmtree(str(staging), ignore_errors=True)


def _files(path: Path) -> Tuple[Path, ...]:
    return tuple(sorted(f for f in path.rglob("*") if f.is_file())) if path.is_dir() else (path,)


def tree_sha256(path: Path) -> str:
    """Return the hash of a file, or of the names and content of a folder's files."""
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()
