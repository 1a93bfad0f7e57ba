"""Measures artifacts and bare files on a target: fresh processes, interleaved rounds, memory in a pass of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.bench import memory
from portcall.bench.conditions import Conditions, condition_warnings
from portcall.bench.statistics import percentile, summarize
from portcall.core import (
    Artifact,
    BadInput,
    CellFailed,
    Outcome,
    PortcallError,
    TensorSpec,
    Workload,
    outcome_of,
)
from portcall.exporters import backend_names, get_backend
from portcall.source import fits, single_sample_shape
from portcall.targets import Driver, get_target
from portcall.targets.agent.binding import source_spec
from portcall.workspace import DataArgument, Workspace


@dataclass(slots=True)
class _Subject:
    """One artifact or bare file under measurement, and what its processes have told so far."""

    spec: str
    artifact: Artifact
    manifest: Mapping[str, Any] | None
    label: str
    inputs: Path | None = None
    error: PortcallError | None = None
    finish: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    energy: dict[str, Any] | None = None
    wall: list[np.ndarray[Any, Any]] = field(default_factory=list)
    cpu: list[np.ndarray[Any, Any]] = field(default_factory=list)
    device: list[np.ndarray[Any, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    spent_s: float = 0.0
    startup_s: float = 0.0

    @property
    def expected_sqnr_db(self) -> list[float]:
        """SQNR of each sample that the artifact carries, as the export measured it."""
        return [] if self.manifest is None else list(self.manifest["samples"]["sqnr_db"])


def run_bench(
    work: Workspace,
    specs: Sequence[str],
    target: str,
    workload: Workload,
    data: DataArgument | None = None,
    output: Path | None = None,
    find_memory_limit: bool = False,
) -> tuple[list[dict[str, Any]], PortcallError | None]:
    """Measure every spec (artifact folder or bare file); return the ``results`` of the JSON contract, and the error
    of saving them: what was measured is never lost to a full disk.

    One process each reads memory; then rounds of one process each (A B C A B C ...) are timed, so that drift hits
    all alike; last one process each reads energy, where a counter exists. output: a folder for ``bench.json`` and the
    raw samples. find_memory_limit: find the smallest limit in which it runs, too. Raises BadInput for unusable specs.
    """
    driver = get_target(target).driver(work)
    if output is not None:
        artifacts.check_output_folder(output)
        if (output / "raw").exists() and not (output / "bench.json").exists():  # it would be replaced
            raise BadInput(f"-o {output} has other content: raw", "Name a folder that is new or empty")
    subjects = [_open(path) for spec in specs for path in _artifacts_in(Path(spec))]
    for number, subject in enumerate(subjects):
        _attempt(subject, partial(_find_inputs, work, driver, subject, data, workload, number))
    for subject in subjects:
        _attempt(subject, partial(_finish, driver, subject, workload))
        _attempt(subject, partial(_measure_memory, work, driver, subject, workload))
        if find_memory_limit:
            _attempt(subject, partial(_find_memory_limit, driver, subject, workload))
    for number in range(workload.processes):
        for subject in subjects:
            _attempt(subject, partial(_measure, work, driver, subject, workload, number))
    for subject in subjects:
        _attempt(subject, partial(_measure_energy, driver, subject, workload))
    results = [_result(subject, target, workload) for subject in subjects]
    if output is not None:
        try:
            _save(output, subjects, results)
        except PortcallError as error:
            return results, error
    return results, None


def _attempt(subject: _Subject, action: Callable[[], None]) -> None:
    """Do one step for a subject that has not failed; its error ends this cell alone."""
    if subject.error is not None:
        return
    try:
        action()
    except BadInput:
        raise
    except PortcallError as error:
        subject.error = error


def _artifacts_in(path: Path) -> list[Path]:
    """Return the artifacts of a folder that ``export -o`` wrote, else *path* itself."""
    if path.is_dir() and not (path / artifacts.MANIFEST).exists():
        found = sorted(p.parent for p in path.glob(f"*/{artifacts.MANIFEST}"))
        if not found:
            raise BadInput(f"{path} holds no artifact", "Give a folder written by portcall export")
        return found
    return [path]


def _open(path: Path) -> _Subject:
    spec = str(path)
    if path.is_dir():
        manifest = artifacts.read_manifest(path)
        artifact = artifacts.from_manifest(path.resolve(), manifest)
        get_backend(artifact.backend)
        subject = _Subject(spec, artifact, manifest, f"{artifact.backend}:{artifact.precision}")
        try:
            artifacts.open_artifact(path.resolve())
        except CellFailed as error:
            subject.error = error
        return subject
    if not path.is_file():
        raise BadInput(
            f"no artifact or model file {spec!r}", "Give a folder written by portcall export, or a model file"
        )
    for name in backend_names():
        if path.suffix in get_backend(name).capabilities.suffixes:
            return _Subject(spec, Artifact(path.resolve().parent, path.name, name, "as is"), None, path.name)
    suffixes = sorted({s for name in backend_names() for s in get_backend(name).capabilities.suffixes})
    raise BadInput(
        f"no backend measures {path.name!r}", f"Give an artifact folder or a file of {', '.join(suffixes)}"
    )


def _find_inputs(
    work: Workspace,
    driver: Driver,
    subject: _Subject,
    data: DataArgument | None,
    workload: Workload,
    number: int,
) -> None:
    """Set the file of inputs: --data, else the artifact's samples, else random ones (never for integer inputs)."""
    artifact = subject.artifact
    if (
        subject.manifest is not None
        and data is None
        and subject.manifest["samples"]["n"]
        and not workload.shapes
    ):
        subject.inputs = artifact.directory / artifacts.SAMPLES
        return
    if subject.manifest is not None:
        specs = [source_spec(t) for t in artifact.inputs]
    else:
        found = driver.run(
            "describe", {"artifact": artifact.to_json()}, f"open {subject.label}", artifact.backend
        )
        specs = [TensorSpec.from_json(t) for t in found["inputs"]]
    path = work.folder / f"inputs-{number}.npz"
    job: dict[str, Any] = {
        "inputs": [t.to_json() for t in specs],
        "path": str(path),
        "data": None,
        "shapes": {},
    }
    if data is not None:
        job["data"] = {"spec": data.spec, "preprocess": data.preprocess}
    else:
        job["shapes"] = {k: list(v) for k, v in _shapes(specs, workload.shapes, subject.label).items()}
        integers = [t for t in specs if np.dtype(t.dtype).kind != "f"]
        if integers:
            raise BadInput(
                f"{subject.label} has the integer input {integers[0]}, for which random values mean nothing",
                "Give --data with real inputs",
            )
        subject.warnings.append("random inputs: real ones can be faster or slower")
    work.call("portcall.stages:write_inputs", job, f"inputs of {subject.label}")
    subject.inputs = path


def _shapes(
    specs: Sequence[TensorSpec], given: Mapping[str, tuple[int, ...]], label: str
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    known = {t.name for t in specs}
    for name in given:
        if name not in known:
            raise BadInput(
                f"--shape names no input {name!r} of {label}", f"Its inputs: {', '.join(map(str, specs))}"
            )
    for spec in specs:
        shape = given.get(spec.name) or single_sample_shape(spec)
        if shape is None:
            raise BadInput(
                f"input {spec} of {label} has dynamic dimensions", f"Give --shape {spec.name}=1x128"
            )
        if not fits(spec.shape, shape):
            raise BadInput(
                f"--shape {spec.name}={'x'.join(map(str, shape))} does not fit {spec}", "Correct it"
            )
        shapes[spec.name] = shape
    return shapes


def _job(subject: _Subject, workload: Workload) -> dict[str, Any]:
    return {
        "artifact": subject.artifact.to_json(),
        "workload": workload.to_json(),
        "inputs": str(subject.inputs),
        "expected_sqnr_db": subject.expected_sqnr_db,
    }


def _finish(driver: Driver, subject: _Subject, workload: Workload) -> None:
    """Have the device build what ends there, before anything is measured."""
    if get_backend(subject.artifact.backend).finish is not None:
        job = _job(subject, workload)
        subject.finish = driver.run("finish", job, f"finish {subject.label}", subject.artifact.backend)


def _measure_memory(work: Workspace, driver: Driver, subject: _Subject, workload: Workload) -> None:
    job, backend = _job(subject, workload), subject.artifact.backend
    figures, warnings = memory.run_memory(
        lambda layout, held: driver.run(
            "measure_memory", {**job, "layout": layout, "held": held}, f"memory {subject.label}", backend
        )
    )
    label = f"weights {subject.label}"
    figures["weights"] = memory.weights(
        lambda: work.call("portcall.bench.memory:stored_weights", job, label, backend)
    )
    subject.memory, subject.warnings = figures, [*subject.warnings, *warnings]


def _find_memory_limit(driver: Driver, subject: _Subject, workload: Workload) -> None:
    assert subject.memory is not None
    job, label = _job(subject, workload), f"memory limit {subject.label}"
    subject.memory["limit"] = memory.or_absent(
        lambda: driver.run("find_memory_limit", job, label, subject.artifact.backend)
    )


def _measure_energy(driver: Driver, subject: _Subject, workload: Workload) -> None:
    job, label = _job(subject, workload), f"energy {subject.label}"
    subject.energy = memory.or_absent(
        lambda: driver.run("measure_energy", job, label, subject.artifact.backend)
    )


def _conditions(subject: _Subject, workload: Workload) -> list[Conditions]:
    artifact = subject.artifact
    return [
        Conditions(answer["environment"], artifact.backend, artifact.precision, workload.threads)
        for answer in subject.answers
    ]


def _measure(work: Workspace, driver: Driver, subject: _Subject, workload: Workload, number: int) -> None:
    """Time one process; with a cap, it gets its share of what the processes before it left over."""
    start = time.monotonic()
    files = {k: work.folder / f"{k}-{number}.npy" for k in ("wall", "cpu", "device")}
    job = {**_job(subject, workload), **{k: str(v) for k, v in files.items()}, "deadline_s": None}
    if workload.max_time_s is not None:
        left = workload.max_time_s - subject.spent_s
        job["deadline_s"] = max(0.0, left / (workload.processes - number) - subject.startup_s)
    label = f"time {subject.label} {number + 1}/{workload.processes}"
    answer = driver.run("measure", job, label, subject.artifact.backend)
    subject.answers.append(answer)
    subject.wall.append(np.load(files["wall"]))
    subject.cpu.append(np.load(files["cpu"]))
    subject.device.append(np.load(files["device"]))
    took_s = time.monotonic() - start
    subject.spent_s += took_s
    subject.startup_s = took_s - answer["elapsed_s"]


def _result(subject: _Subject, target: str, workload: Workload) -> dict[str, Any]:
    manifest = subject.manifest
    result: dict[str, Any] = {
        "artifact": subject.spec,
        "backend": subject.artifact.backend,
        "precision": subject.artifact.precision,
        "target": target,
        "outcome": Outcome.MEASUREMENT.value,
        "error_kind": None,
        "reason": None,
        "fix": None,
        "latency": None,
        "cpu": None,
        "device": None,
        "load_ns": None,
        "first_ns": None,
        "throughput_per_s": None,
        "finish": subject.finish,
        "memory": subject.memory,
        "energy": subject.energy,
        "environment": None,
        "size_bytes": subject.artifact.path.stat().st_size
        if manifest is None
        else artifacts.model_bytes(manifest),
        "parity": None if manifest is None else manifest["parity"],
        "workload": workload.to_json(),
        "warnings": subject.warnings,
    }
    if subject.error is not None:
        result.update(
            outcome=outcome_of(subject.error).value,
            error_kind=subject.error.kind,
            reason=subject.error.message,
            fix=subject.error.fix or None,
        )
        return result
    latency, warnings = summarize(subject.wall)
    result["latency"] = latency
    result["cpu"] = {"p50_ns": percentile(np.concatenate(subject.cpu), 0.5)}
    if all(times.size for times in subject.device):  # beside the wall clock's: a GPU's own
        result["device"] = summarize(subject.device)[0]
    result["load_ns"] = float(np.median([a["load_ns"] for a in subject.answers]))
    result["first_ns"] = float(np.median([a["first_ns"] for a in subject.answers]))
    result["throughput_per_s"] = workload.batch * 1e9 / latency["mean_ns"]
    result["environment"] = subject.answers[-1]["environment"]
    result["warnings"] = [*subject.warnings, *warnings, *condition_warnings(_conditions(subject, workload))]
    return result


def _save(output: Path, subjects: Sequence[_Subject], results: Sequence[Mapping[str, Any]]) -> None:
    """Write ``bench.json`` and, per subject, the raw samples of every process in order.

    Those of an earlier bench stay until the new ones are complete.
    """
    raw, part = output / "raw", output / ".raw.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for number, subject in enumerate(subjects):
            arrays: dict[str, Any] = {f"wall_ns_{i}": a for i, a in enumerate(subject.wall)}
            arrays |= {f"cpu_ns_{i}": a for i, a in enumerate(subject.cpu)}
            arrays |= {f"device_ns_{i}": a for i, a in enumerate(subject.device) if a.size}
            np.savez_compressed(part / f"{number:03d}-{subject.label.replace(':', '-')}.npz", **arrays)
        raw.mkdir(exist_ok=True)
        for old in raw.glob("[0-9][0-9][0-9]-*.npz"):  # of an earlier bench; anything else is the user's
            old.unlink()
        for new in part.iterdir():
            new.replace(raw / new.name)
        artifacts.write_json(output / "bench.json", {"schema": 1, "results": list(results)})
    except OSError as error:
        raise CellFailed(
            f"cannot write {output}: {error.strerror}", "Free space there or choose another -o"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
