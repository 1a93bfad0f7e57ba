"""The jobs that an agent does on a device: probe, describe, verify, measure, memory.

Each takes JSON and progress(done, total), and answers with JSON; arrays go to ``.npy`` files named in the job.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from portcall.targets.agent import fingerprint, memory, settings, timing
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
from portcall.targets.agent.tools import find_tool as find_tool  # a job too
from portcall.targets.agent.tools import run_tool as run_tool
from portcall.targets.agent.tools import write_array

Progress = Callable[[int, Optional[int]], None]

REFERENCE = "reference/"
"""Begins the key of an output of the source model in an npz of samples."""

CHECK_MARGIN_DB = 3.0
CHECK_ENOUGH_DB = 60.0
"""A target whose outputs are this close to the source's is right, even if the host was closer still."""


def _backend(name: str) -> Backend:
    backend = importlib.import_module(f"portcall.exporters.{name}").BACKEND
    assert isinstance(backend, Backend)
    return backend


def probe(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Tell whether a backend can export or run here."""
    found = _backend(arguments["backend"]).probe(arguments["role"])
    if isinstance(found, Available):
        return {"available": True, "version": found.version, "reason": None, "fix": None}
    return {"available": False, "version": None, "reason": found.reason, "fix": found.fix}


def ready(artifact: Artifact, workload: Workload) -> Tuple[Backend, Artifact, Optional[Dict[str, Any]]]:
    """Return the backend, the artifact with what this device built of it, and the record of that.

    Raises UnavailableError without the runtime, UnsupportedError where it is too old for the artifact.
    """
    backend = _backend(artifact.backend)
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


def finish(arguments: Mapping[str, Any], progress: Progress) -> Optional[Dict[str, Any]]:
    """Build what ends on the device (an engine, a compiled model), unless it is cached; return its record."""
    workload = Workload.from_json(arguments["workload"])
    return ready(Artifact.from_json(arguments["artifact"]), workload)[2]


@contextlib.contextmanager
def _session(artifact: Artifact, workload: Workload) -> Iterator[Tuple[Session, Dict[str, int]]]:
    """Yield a Session and what it took: ``baseline_bytes`` after importing the runtime, ``load_ns`` without it."""
    backend, artifact, _ = ready(artifact, workload)
    costs = {"baseline_bytes": memory.current_rss_bytes()}
    start = time.perf_counter_ns()
    with backend.load(artifact, workload) as session:
        costs["load_ns"] = time.perf_counter_ns() - start
        yield session, costs


def describe(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Return the inputs and outputs of a bare file, as its runtime sees them."""
    with _session(Artifact.from_json(arguments["artifact"]), Workload()) as (session, _):
        return {
            "inputs": [t.to_json() for t in session.inputs],
            "outputs": [t.to_json() for t in session.outputs],
        }


class _Names:
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


def verify(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Run every sample through the artifact; return parity against the stored reference.

    samples: a folder of ``000000.npz`` (inputs by name, ``reference/NAME``) with ``index.json``.
    interpret: by the backend's interpreter, where its runtime is not at hand; said in the parity.
    outputs: a folder for each sample's outputs by source name (``000000.npz``), to be scored; or null.
    head: how many of the first samples the artifact carries; their SQNR is what other targets are held to.
    """
    artifact = Artifact.from_json(arguments["artifact"])
    folder = Path(arguments["samples"])
    index = json.loads((folder / "index.json").read_text())
    parity = ParityAccumulator([t.source for t in artifact.outputs])
    head: List[float] = []
    interpret = _backend(artifact.backend).interpret if arguments["interpret"] else None
    workload = Workload(threads=arguments["threads"])
    with contextlib.ExitStack() as stack:
        if interpret is None:
            session, _ = stack.enter_context(_session(artifact, workload))
        else:
            session = stack.enter_context(interpret(artifact, workload))
        names = _Names(artifact, session)
        for number in range(index["n"]):
            arrays, reference = _inputs(str(folder / f"{number:06d}.npz"))
            names.bind(session, arrays)
            session.infer()
            outputs = names.results(session)
            parity.add(reference, outputs)
            if number < arguments["head"]:
                head.append(_sqnr_db(reference, outputs))
            if arguments["outputs"] is not None:
                kept: Dict[str, Any] = dict(outputs)
                np.savez(os.path.join(arguments["outputs"], f"{number:06d}.npz"), **kept)
            progress(number + 1, index["n"])
        environment = session.environment
    return {
        "parity": {**parity.result(index["samples"]), "interpreted": arguments["interpret"]},
        "head_sqnr_db": head,
        "environment": environment,
    }


def _inputs(path: str) -> Tuple[Dict[str, np.ndarray], Dict[str, np.ndarray]]:
    """Return an npz's inputs by source name, and its reference outputs (empty where there are none)."""
    with np.load(path) as stored:
        arrays = {k: stored[k] for k in stored.files}
    reference = {k[len(REFERENCE) :]: v for k, v in arrays.items() if k.startswith(REFERENCE)}
    return {k: v for k, v in arrays.items() if not k.startswith(REFERENCE)}, reference


def _sqnr_db(reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> float:
    parity = ParityAccumulator(list(reference))
    parity.add(reference, outputs)
    return float(parity.result("one")["sqnr_db"])


def deviation(expected_db: Sequence[float], found_db: Sequence[float]) -> Optional[str]:
    """Say where outputs are further from the source's than the export measured, sample by sample; None if nowhere."""
    for number, (expected, found) in enumerate(zip(expected_db, found_db)):
        if found < min(expected - CHECK_MARGIN_DB, CHECK_ENOUGH_DB):
            return (
                f"outputs differ from the source's on sample {number}: "
                f"{found:.1f} dB where the export measured {expected:.1f} dB"
            )
    return None


def _check(names: _Names, session: Session, arguments: Mapping[str, Any], limit: Optional[int]) -> None:
    """Compare outputs with the source's on the artifact's samples. Raises VerificationFailed where they are off."""
    inputs, reference = _inputs(arguments["inputs"])
    expected = arguments["expected_sqnr_db"][:limit]
    if not reference:
        return
    found = []
    for number in range(len(expected)):
        names.bind(session, {k: v[number] for k, v in inputs.items()})
        session.infer()
        found.append(_sqnr_db({k: v[number] for k, v in reference.items()}, names.results(session)))
    problem = deviation(expected, found)
    if problem is not None:
        raise VerificationFailed(
            problem, "Compare this target's runtime version with the manifest's: it computes something else"
        )


def _batch(
    session: Session, names: _Names, inputs: Mapping[str, np.ndarray], size: int
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


def measure(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Measure one process: load, first inference, warm-up, the timed loop.

    Raw samples go to the files ``wall``, ``cpu`` and, where the device has a clock of its own, ``device``.
    "warnings": what this process found that a reader has to know.

    deadline_s: seconds from the start of this job after which the loop ends.
    """
    started, started_at = time.perf_counter_ns(), timing.now()
    artifact = Artifact.from_json(arguments["artifact"])
    workload = Workload.from_json(arguments["workload"])
    machine = fingerprint.machine()  # as it is for everybody: before this process is pinned
    before = fingerprint.state()
    applied, warnings = settings.apply(workload)
    with _session(artifact, workload) as (session, costs):
        names = _Names(artifact, session)
        inputs, _ = _inputs(arguments["inputs"])
        batch = _batch(session, names, inputs, workload.batch)
        names.bind(session, batch)
        start = time.perf_counter_ns()
        session.infer()
        first_ns = time.perf_counter_ns() - start
        outputs = session.get_outputs()
        _check(names, session, arguments, limit=1)
        names.bind(session, batch)
        deadline_s = arguments.get("deadline_s")
        deadline_ns = None if deadline_s is None else started + int(deadline_s * 1e9)
        samples, growth = timing.timed(session, workload, deadline_ns)
        repeated = timing.compare_outputs(outputs, session.get_outputs())
        environment = {**session.environment, **applied}
        spinning = settings.spinning_warning(workload, session.environment, artifact.backend)
        warnings += [w for w in (spinning, timing.outputs_warning(repeated)) if w is not None]
        device_ns = np.asarray(session.device_times_ns[-samples.wall_ns.size :], np.float64)
    np.save(arguments["wall"], samples.wall_ns)
    np.save(arguments["cpu"], samples.cpu_ns)
    np.save(arguments["device"], device_ns)
    return {
        "elapsed_s": timing.seconds_since(started),
        "started_at": started_at,
        "n": int(samples.wall_ns.size),
        "warmup": samples.warmup,
        "steady": None if samples.steady is None else samples.steady.to_json(),
        "rss_growth_bytes": growth,
        "outputs": repeated,
        "overhead": timing.overhead(),
        "warnings": warnings,
        "load_ns": costs["load_ns"],
        "first_ns": first_ns,
        "environment": {
            "machine": machine,
            "stack": {**fingerprint.stack(), **environment},
            "state": {"before": before, "after": fingerprint.state()},
        },
    }


def measure_memory(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Read memory in a process of its own: see ``memory_pass``."""
    from portcall.targets.agent import memory_pass  # it needs this module

    return memory_pass.measure(arguments, progress)


def measure_energy(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Read energy counters around inferences, in a process of its own: see ``energy_pass``."""
    from portcall.targets.agent import energy_pass

    return energy_pass.measure(arguments, progress)


def find_memory_limit(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Find the smallest memory limit in which the artifact still runs: see ``memory_limit``."""
    from portcall.targets.agent import memory_limit

    return memory_limit.find(arguments, progress)


def write_inputs(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Write what ``measure`` binds as files that another tool reads: ``input_N`` and the suffix, in "directory".

    suffix: ".npy", ".pb" (TensorProto), ".bin" (raw), or null to write none. Answers {"model": the file that is loaded
    here, which ``finish`` may have built, "inputs": [{"name", "shape", "dtype", "is_dynamic", "file"}]} in the
    runtime's order, shapes as bound.
    """
    workload = Workload.from_json(arguments["workload"])
    backend, artifact, _ = ready(Artifact.from_json(arguments["artifact"]), workload)
    inputs = []
    with backend.load(artifact, workload) as session:
        names = _Names(artifact, session)
        arrays = _batch(session, names, _inputs(arguments["inputs"])[0], workload.batch)
        bound = {t.name: to_runtime(t, arrays[t.source]) for t in names.inputs.values()}
        for number, spec in enumerate(session.inputs):
            array = bound[spec.name]
            file = None if arguments["suffix"] is None else f"input_{number}{arguments['suffix']}"
            if file is not None:
                write_array(os.path.join(arguments["directory"], file), spec.name, array)
            inputs.append(
                {
                    "name": spec.name,
                    "shape": list(array.shape),
                    "dtype": array.dtype.name,
                    "is_dynamic": any(isinstance(d, str) for d in spec.shape),
                    "file": file,
                }
            )
    return {"model": str(artifact.finished or artifact.path), "inputs": inputs}


def profile(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Profile the operators in a process of its own: see ``profiling.profile``."""
    from portcall.targets.agent import profiling

    return profiling.profile(arguments, progress)
