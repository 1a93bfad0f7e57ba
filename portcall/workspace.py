"""The steps that several commands share: open the model, read DATA, lower to a graph, tap it. The parent's side."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import portcall
import portcall.exporters
from portcall.calibration.table import DataRecord
from portcall.core import (
    Backend,
    BadInput,
    CellFailed,
    Graph,
    Settings,
    Source,
    UnavailableError,
    UnsupportedError,
)
from portcall.progress import Reporter
from portcall.source import classify
from portcall.worker import WorkerPool

CACHE_LIMIT_BYTES = 10 << 30


@dataclass(frozen=True, slots=True)
class DataArgument:
    """DATA as the user named it, with the preprocessing for images."""

    spec: str
    preprocess: str | None = None


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(slots=True)
class Workspace:
    """What the steps of one command share: the workers, a temporary folder, and how progress is shown."""

    pool: WorkerPool
    folder: Path
    reporter: Reporter
    settings: Settings
    logs: Path | None = None
    threads: int = field(default_factory=usable_cpus)
    probed: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @property
    def exporters_path(self) -> list[str]:
        return list(portcall.exporters.__path__)

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        label: str,
        backend: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        log = None if self.logs is None else self.logs / f"{label.replace(' ', '-').replace(':', '-')}.log"
        with self.reporter.stage(label) as progress:
            return self.pool.call(
                function, arguments, backend=backend, log=log, on_progress=progress, timeout_s=timeout_s
            )

    def probe(self, backend: str, role: str) -> dict[str, Any]:
        """Return whether *backend* can do *role* ("export" or "run") here: "available", "version", "reason", "fix"."""
        key = (backend, role)
        if key not in self.probed:
            job = {"backend": backend, "role": role}
            try:
                self.probed[key] = self.call(
                    "portcall.targets.agent.jobs:probe", job, f"probe {backend}", backend
                )
            except CellFailed as error:  # a runtime that crashes when it is imported
                fix = error.fix or f"pip install --force-reinstall 'portcall[{backend}]'"
                reason = f"probing it failed: {error.message}"
                self.probed[key] = {"available": False, "version": None, "reason": reason, "fix": fix}
            except UnavailableError as error:  # its interpreter
                entry = {"available": False, "version": None, "reason": error.message, "fix": error.fix}
                self.probed[key] = entry
        return self.probed[key]

    def need(self, backend: str, role: str) -> None:
        """Raise UnavailableError where *backend* cannot do *role* ("export" or "run") here."""
        found = self.probe(backend, role)
        if not found["available"]:
            raise UnavailableError(found["reason"], found["fix"])

    def must_interpret(self, backend: Backend) -> bool:
        """Tell whether artifacts of *backend* are verified by its interpreter, since its runtime is not at hand.

        Raises UnavailableError where it has none either.
        """
        try:
            self.need(backend.name, "run")
        except UnavailableError:
            if backend.interpret is None:
                raise
            return True
        return False


@contextlib.contextmanager
def open_workspace(reporter: Reporter, timeout_s: float, logs: Path | None = None) -> Iterator[Workspace]:
    """Yield a Workspace whose folder and workers are gone afterwards, however the command ends."""
    settings = Settings.load()
    with WorkerPool(settings.pythons, timeout_s) as pool:
        folder = Path(tempfile.mkdtemp(prefix="portcall-"))
        try:
            yield Workspace(pool, folder, reporter, settings, logs)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def open_source(work: Workspace, model: str, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """Return the model opened and checked. Raises BadInput where it is none."""
    classify(model)
    directory = work.folder / "source"
    directory.mkdir(exist_ok=True)
    job = {"spec": model, "directory": str(directory), "shapes": {k: list(v) for k, v in shapes.items()}}
    return Source.from_json(work.call("portcall.source:open_source", job, "open model"))


def read_data(
    work: Workspace,
    source: Source,
    data: DataArgument,
    what: str,
    start: int = 0,
    stop: int | None = None,
    classes: bool = False,
) -> tuple[DataRecord, dict[str, Any]]:
    """Read DATA once against the inputs of *source*; return its record and what was found.

    classes: its labels, if any, must be class indices.
    """
    spec = str(Path(data.spec).resolve()) if Path(data.spec).exists() else data.spec
    job = {
        "spec": spec,
        "preprocess": data.preprocess,
        "inputs": [t.to_json() for t in source.inputs],
        "start": start,
        "stop": stop,
        "classes": classes,
    }
    found = work.call("portcall.stages:check_data", job, f"read {what}")
    return DataRecord(
        spec, data.preprocess, start, stop, found["sha256"], found["n"], found["largest"]
    ), found


def with_data_shapes(
    source: Source, found: Mapping[str, Any], given: Mapping[str, tuple[int, ...]]
) -> Source:
    """Return *source* with the shapes of the first sample of DATA, where the user gave none."""
    shapes = {k: tuple(v) for k, v in found["shapes"].items()}
    return replace(source, example_shapes={**source.example_shapes, **shapes, **given})


def lower(work: Workspace, source: Source, backend: Backend, equalize: bool = False) -> Graph:
    """Return the graph of *source* for *backend*'s kind, from the cache where an earlier command left it.

    equalize: after cross-layer equalization.
    """
    if source.format not in backend.capabilities.source_formats:
        formats = ", ".join(backend.capabilities.source_formats)
        raise UnsupportedError(
            f"{backend.name} cannot take {source.format} models ({source.spec}); it takes: {formats}",
            "Export it with tflite, or give the model as ONNX"
            if source.format in ("keras", "savedmodel")
            else "Give the torch model: package.module:factory, or a .pt2 of it",
        )
    unknown = [t.name for t in source.inputs if t.name not in source.example_shapes]
    if unknown:
        raise BadInput(
            f"the shape of input {unknown[0]!r} is dynamic", f"Give --data, or --shape {unknown[0]}=1x128"
        )
    key_parts = {
        "source": source.sha256,
        "names": [t.name for t in (*source.inputs, *source.outputs)],
        "kind": backend.graph,
        "shapes": {k: list(v) for k, v in source.example_shapes.items()},
        "equalize": equalize,
        "code": code_sha256(portcall.exporters),
        "versions": {**work.probed[(backend.name, "export")], "portcall": portcall.__version__},
    }
    key = hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()
    place = work.settings.cache / "graphs" / key
    if not (place / "graph.json").is_file():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".lowering-", dir=place.parent))
        except OSError as error:
            raise CellFailed(
                f"cannot write the cache {work.settings.cache}: {error.strerror}",
                "Free space there, or set PORTCALL_CACHE to a folder that can be written",
            ) from error
        try:
            job = {
                "backend": backend.name,
                "source": source.to_json(),
                "equalize": equalize,
                "directory": str(staging),
            }
            work.call("portcall.stages:lower", job, f"lower to {backend.graph}", backend.name)
            with contextlib.suppress(OSError):  # another command was first: its result is as good
                staging.replace(place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _prune(place.parent, keep=place)
    with contextlib.suppress(OSError):  # a cache that cannot be written serves for reading
        os.utime(place)
    graph = Graph.from_json(json.loads((place / "graph.json").read_text()))
    return replace(graph, path=place / graph.path.name, source=source)


def code_sha256(package: ModuleType) -> str:
    """Return a hash of a package's modules, so that changed code does not meet what older code left in the cache."""
    files = sorted(Path(str(package.__file__)).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _prune(folder: Path, keep: Path) -> None:
    """Delete the least recently used cache entries beyond 10 GiB."""
    entries = sorted(
        (p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True
    )
    total = 0
    for entry in entries:
        total += sum(f.stat().st_size for f in entry.iterdir())
        if total > CACHE_LIMIT_BYTES and entry != keep:
            shutil.rmtree(entry, ignore_errors=True)


def run_reference(work: Workspace, source: Source, kind: str, n: int, record: DataRecord | None) -> Path:
    """Run the source model on the evaluation samples; return the folder that the verify job reads."""
    folder = work.folder / "samples"
    folder.mkdir()
    job = {
        "source": source.to_json(),
        "directory": str(folder),
        "samples": kind,
        "n": n,
        "data": None if record is None else record.to_json(),
    }
    work.call("portcall.stages:reference", job, "run the source")
    return folder
