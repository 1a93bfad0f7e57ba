"""What is measured: an artifact or a bare file, its inputs, and what its processes have told so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.bench.statistics import percentile
from portcall.core import Artifact, BadInput, CellFailed, PortcallError, TensorSpec, Workload
from portcall.exporters import backend_names, get_backend
from portcall.source import fits, single_sample_shape
from portcall.targets import Driver
from portcall.targets.agent.binding import source_spec
from portcall.workspace import DataArgument, Workspace


@dataclass(slots=True)
class Subject:
    """One artifact or bare file under measurement, and what its processes have told so far.

    number: its place among all subjects. environment: "@NAME" where an environment of portcall.toml runs it. wall, cpu,
    device: samples in ns, one array per process that answered, as in answers. deaths: why each other process ended
    without an answer. extra: further keys of its result, set by a pass. spent_s and typical_s: what all its timed
    processes took, start-up included, and what one takes; startup_s: of that, outside the measuring job.
    """

    number: int
    spec: str
    artifact: Artifact
    manifest: Mapping[str, Any] | None
    label: str
    environment: str | None = None
    inputs: Path | None = None
    error: PortcallError | None = None
    finish: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    wall: list[np.ndarray[Any, Any]] = field(default_factory=list)
    cpu: list[np.ndarray[Any, Any]] = field(default_factory=list)
    device: list[np.ndarray[Any, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    spent_s: float = 0.0
    typical_s: float = 0.0
    startup_s: float = 0.0

    @property
    def interpreter(self) -> str:
        """Whose interpreter runs its jobs: its environment's, else its backend's."""
        return self.environment or self.artifact.backend

    @property
    def expected_sqnr_db(self) -> list[float]:
        """SQNR of each sample that the artifact carries, as the export measured it."""
        return [] if self.manifest is None else list(self.manifest["samples"]["sqnr_db"])

    def fresh(self, artifact: Artifact, inputs: Path) -> Subject:
        """Return another subject that was not measured yet: *artifact* with *inputs*, else like this one."""
        return Subject(
            self.number, self.spec, artifact, self.manifest, self.label, self.environment, inputs=inputs
        )

    def medians_ns(self) -> list[float]:
        """Return the P50 of each process that gave samples."""
        return [percentile(samples, 0.5) for samples in self.wall if samples.size]

    def job(self, workload: Workload) -> dict[str, Any]:
        """Return the arguments that every job on this subject takes."""
        return {
            "artifact": self.artifact.to_json(),
            "workload": workload.to_json(),
            "inputs": str(self.inputs),
            "expected_sqnr_db": self.expected_sqnr_db,
        }


def open_subjects(specs: Sequence[str]) -> list[Subject]:
    """Return one subject per artifact or bare file; a folder of ``export -o`` holds several. Raises BadInput."""
    paths = [path for spec in specs for path in _artifacts_in(Path(spec))]
    return [open_subject(number, path) for number, path in enumerate(paths)]


def _artifacts_in(path: Path) -> list[Path]:
    """Return the artifacts of a folder that ``export -o`` wrote, else *path* itself."""
    if path.is_dir() and not (path / artifacts.MANIFEST).exists():
        found = sorted(p.parent for p in path.glob(f"*/{artifacts.MANIFEST}"))
        if not found:
            raise BadInput(f"{path} holds no artifact", "Give a folder written by portcall export")
        return found
    return [path]


def open_subject(number: int, path: Path) -> Subject:
    """Return the artifact or bare file at *path*; a damaged artifact has its error set. Raises BadInput for neither."""
    spec = str(path)
    if path.is_dir():
        manifest = artifacts.read_manifest(path)
        artifact = artifacts.from_manifest(path.resolve(), manifest)
        get_backend(artifact.backend)
        subject = Subject(number, spec, artifact, manifest, f"{artifact.backend}:{artifact.precision}")
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
            bare = Artifact(path.resolve().parent, path.name, name, "as is")
            return Subject(number, spec, bare, None, path.name)
    suffixes = sorted({s for name in backend_names() for s in get_backend(name).capabilities.suffixes})
    raise BadInput(
        f"no backend measures {path.name!r}", f"Give an artifact folder or a file of {', '.join(suffixes)}"
    )


def find_inputs(
    work: Workspace, driver: Driver, subject: Subject, data: DataArgument | None, workload: Workload
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
            "describe", {"artifact": artifact.to_json()}, f"open {subject.label}", subject.interpreter
        )
        specs = [TensorSpec.from_json(t) for t in found["inputs"]]
    path = work.folder / f"inputs-{subject.number}.npz"
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
