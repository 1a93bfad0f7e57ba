"""An artifact opened on a device: the backend ready, the session loaded, inputs bound by the source's names, outputs
checked."""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from dataclasses import replace
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import numpy as np

from portcall.targets.agent import memory
from portcall.targets.agent.binding import to_runtime, to_source
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    BoundTensor,
    Session,
    TensorSpec,
    Workload,
)
from portcall.targets.agent.errors import (
    CellFailed,
    UnavailableError,
    UnsupportedError,
    VerificationFailed,
)
from portcall.targets.agent.finishing import finished
from portcall.targets.agent.parity import ParityAccumulator

REFERENCE = "reference/"
"""Begins the key of an output of the source model in an npz of samples."""

CHECK_MARGIN_DB = 3.0
CHECK_ENOUGH_DB = 60.0
"""A target whose outputs are this close to the source's is right, even if the host was closer still."""


def get_backend(name: str) -> Backend:
    backend = importlib.import_module(f"portcall.exporters.{name}").BACKEND
    assert isinstance(backend, Backend)
    return backend


def ready(artifact: Artifact, workload: Workload) -> Tuple[Backend, Artifact, Optional[Dict[str, Any]]]:
    """Return the backend, the artifact with what this device built of it, and the record of that.

    Raises UnavailableError without the runtime, UnsupportedError where it is too old for the artifact.
    """
    backend = get_backend(artifact.backend)
    found = backend.probe("run")
    if not isinstance(found, Available):
        raise UnavailableError(found.reason, found.fix)
    if artifact.min_runtime is not None and is_older(found.version, artifact.min_runtime):
        raise UnsupportedError(
            f"this artifact needs {artifact.backend} {artifact.min_runtime} or newer, here is {found.version}",
            f"Update the runtime, or export with --option {artifact.backend}.min_runtime={found.version}",
        )
    path, record = finished(backend, artifact, workload, found.version)
    return backend, replace(artifact, finished=path), record


def is_older(version: str, minimum: str) -> bool:
    """Tell whether *version* comes before *minimum*; False where one of them is no dotted number (iOS17)."""
    numbers = [re.match(r"\d+(\.\d+)*", text) for text in (version, minimum)]
    if numbers[0] is None or numbers[1] is None:
        return False
    have, need = ([int(part) for part in found.group().split(".")] for found in numbers if found)
    length = max(len(have), len(need))
    return have + [0] * (length - len(have)) < need + [0] * (length - len(need))


@contextlib.contextmanager
def open_session(artifact: Artifact, workload: Workload) -> Iterator[Tuple[Session, Dict[str, int]]]:
    """Yield a Session and what it took: ``baseline_bytes`` after importing the runtime, ``load_ns`` without it."""
    backend, artifact, _ = ready(artifact, workload)
    costs = {"baseline_bytes": memory.current_rss_bytes()}
    start = time.perf_counter_ns()
    with backend.load(artifact, workload) as session:
        costs["load_ns"] = time.perf_counter_ns() - start
        yield session, costs


class Names:
    """The source's tensors to the runtime's and back; the identity for a bare file."""

    def __init__(self, artifact: Artifact, session: Session) -> None:
        self.inputs = {t.source: t for t in artifact.inputs or map(_bare, session.inputs)}
        self.outputs = {t.name: t for t in artifact.outputs or map(_bare, session.outputs)}
        missing = sorted({t.name for t in self.inputs.values()} - {t.name for t in session.inputs})
        if missing:
            raise CellFailed(
                f"the loaded file has no input {missing[0]!r}: the manifest does not belong to it",
                "Export it again",
            )

    def bind(self, session: Session, arrays: Mapping[str, np.ndarray]) -> None:
        session.set_inputs({t.name: to_runtime(t, arrays[t.source]) for t in self.inputs.values()})

    def results(self, session: Session) -> Dict[str, np.ndarray]:
        found = [(self.outputs.get(name), array) for name, array in session.get_outputs().items()]
        return {tensor.source: to_source(tensor, array) for tensor, array in found if tensor is not None}


def _bare(spec: TensorSpec) -> BoundTensor:
    return BoundTensor(spec.name, spec.name, spec.shape, spec.dtype)


def read_inputs(path: str) -> Tuple[Dict[str, np.ndarray], Dict[str, np.ndarray]]:
    """Return an npz's inputs by source name, and its reference outputs (empty where there are none)."""
    with np.load(path) as stored:
        arrays = {k: stored[k] for k in stored.files}
    reference = {k[len(REFERENCE) :]: v for k, v in arrays.items() if k.startswith(REFERENCE)}
    return {k: v for k, v in arrays.items() if not k.startswith(REFERENCE)}, reference


def batch_of(
    session: Session, names: Names, inputs: Mapping[str, np.ndarray], size: int
) -> Dict[str, np.ndarray]:
    """Return the first sample, or *size* samples joined along the first axis (repeated where there are fewer)."""
    if size == 1:
        return {k: v[0] for k, v in inputs.items()}
    bound = {t.name for t in names.inputs.values()}
    fixed = [t for t in session.inputs if t.name in bound and not isinstance(t.shape[0], str)]
    if fixed:
        raise UnsupportedError(
            "batch %d: input %s has a fixed first dimension" % (size, fixed[0]), "Use --batch 1"
        )
    return {k: np.concatenate([v[i % len(v)] for i in range(size)]) for k, v in inputs.items()}


def check_outputs(names: Names, session: Session, arguments: Mapping[str, Any], limit: Optional[int]) -> None:
    """Compare outputs with the source's on the artifact's samples. Raises VerificationFailed where they are off."""
    inputs, reference = read_inputs(arguments["inputs"])
    expected = arguments["expected_sqnr_db"][:limit]
    if not reference:
        return
    found = []
    for number in range(len(expected)):
        names.bind(session, {k: v[number] for k, v in inputs.items()})
        session.infer()
        found.append(sample_sqnr_db({k: v[number] for k, v in reference.items()}, names.results(session)))
    problem = deviation(expected, found)
    if problem is not None:
        raise VerificationFailed(
            problem, "Compare this target's runtime version with the manifest's: it computes something else"
        )


def deviation(expected_db: Sequence[float], found_db: Sequence[float]) -> Optional[str]:
    """Say where outputs are further from the source's than the export measured, sample by sample; None if nowhere."""
    for number, (expected, found) in enumerate(zip(expected_db, found_db)):
        if found < min(expected - CHECK_MARGIN_DB, CHECK_ENOUGH_DB):
            return (
                f"outputs differ from the source's on sample {number}: "
                f"{found:.1f} dB where the export measured {expected:.1f} dB"
            )
    return None


def sample_sqnr_db(reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> float:
    parity = ParityAccumulator(list(reference))
    parity.add(reference, outputs)
    return float(parity.result("one")["sqnr_db"])
