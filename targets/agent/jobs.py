"""The jobs that an agent does on a device: probe, describe, verify, measure, memory.

Each takes JSON and progress(done, total), and answers with JSON; arrays go to ``.npy`` files named in the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

import numpy as np

from portcall.targets.agent import fingerprint, settings, timing
from portcall.targets.agent.binding import to_runtime
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Workload,
)
from portcall.targets.agent.opening import (
    Names,
    batch_of,
    check_outputs,
    get_backend,
    open_session,
    read_inputs,
    ready,
    sample_sqnr_db,
)
from portcall.targets.agent.parity import ParityAccumulator
from portcall.targets.agent.tools import find_tool as find_tool  # a job too
from portcall.targets.agent.tools import run_tool as run_tool
from portcall.targets.agent.tools import write_array

Progress = Callable[[int, Optional[int]], None]


def probe(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Tell whether a backend can export or run here."""
    found = get_backend(arguments["backend"]).probe(arguments["role"])
    if isinstance(found, Available):
        return {"available": True, "version": found.version, "reason": None, "fix": None}
    return {"available": False, "version": None, "reason": found.reason, "fix": found.fix}


def finish(arguments: Mapping[str, Any], progress: Progress) -> Optional[Dict[str, Any]]:
    """Build what ends on the device (an engine, a compiled model), unless it is cached; return its record."""
    workload = Workload.from_json(arguments["workload"])
    return ready(Artifact.from_json(arguments["artifact"]), workload)[2]


def describe(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Return the inputs and outputs of a bare file, as its runtime sees them."""
    with open_session(Artifact.from_json(arguments["artifact"]), Workload()) as (session, _):
        return {
            "inputs": [t.to_json() for t in session.inputs],
            "outputs": [t.to_json() for t in session.outputs],
        }


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
    interpret = get_backend(artifact.backend).interpret if arguments["interpret"] else None
    workload = Workload(threads=arguments["threads"])
    with contextlib.ExitStack() as stack:
        if interpret is None:
            session, _ = stack.enter_context(open_session(artifact, workload))
        else:
            session = stack.enter_context(interpret(artifact, workload))
        names = Names(artifact, session)
        for number in range(index["n"]):
            arrays, reference = read_inputs(str(folder / f"{number:06d}.npz"))
            names.bind(session, arrays)
            session.infer()
            outputs = names.results(session)
            parity.add(reference, outputs)
            if number < arguments["head"]:
                head.append(sample_sqnr_db(reference, outputs))
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
    with open_session(artifact, workload) as (session, costs):
        names = Names(artifact, session)
        inputs, _ = read_inputs(arguments["inputs"])
        batch = batch_of(session, names, inputs, workload.batch)
        names.bind(session, batch)
        start = time.perf_counter_ns()
        session.infer()
        first_ns = time.perf_counter_ns() - start
        outputs = session.get_outputs()
        check_outputs(names, session, arguments, limit=1)
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
        names = Names(artifact, session)
        arrays = batch_of(session, names, read_inputs(arguments["inputs"])[0], workload.batch)
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
