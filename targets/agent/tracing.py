"""The job of ``debug`` that runs an artifact: its outputs as deployed, and every tensor that it can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

import numpy as np

from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.errors import PortcallError
from portcall.targets.agent.opening import Names, get_backend, open_session, read_inputs


def trace(arguments: Mapping[str, Any], progress: Callable[[int, Optional[int]], None]) -> Dict[str, Any]:
    """Run the first *n* samples; write ``trace-000000.npz`` (t0, t1, ...) and ``deployed-000000.npz`` (by source name).

    arguments: artifact, samples (a folder of ``000000.npz``), directory, n, threads, interpret. Returns {"tensors":
    [Shown as JSON] or None without a hook, "how", "deployed", "refused": why the artifact does not run as deployed}.
    """
    artifact = Artifact.from_json(arguments["artifact"])
    backend = get_backend(artifact.backend)
    workload = Workload(threads=arguments["threads"])
    samples, directory, n = Path(arguments["samples"]), Path(arguments["directory"]), arguments["n"]
    answer: Dict[str, Any] = {"tensors": None, "how": None, "deployed": None, "refused": None}
    if backend.trace is not None:
        with backend.trace(artifact, workload) as shown:
            answer["tensors"] = [t.to_json() for t in shown.tensors]
            answer["how"] = shown.how
            for number in range(n):
                arrays, _ = read_inputs(str(samples / f"{number:06d}.npz"))
                values = shown.run(arrays)
                np.savez(
                    str(directory / f"trace-{number:06d}.npz"), **{f"t{i}": v for i, v in enumerate(values)}
                )
                progress(number + 1, 2 * n)
    try:
        answer["deployed"] = _deployed(artifact, workload, arguments, samples, directory, n)
    except PortcallError as error:
        if backend.trace is None:
            raise
        answer["refused"] = error.message
    return answer


def _deployed(
    artifact: Artifact,
    workload: Workload,
    arguments: Mapping[str, Any],
    samples: Path,
    directory: Path,
    n: int,
) -> str:
    """Run the artifact as it is deployed, or interpreted; return what ran it."""
    interpret = get_backend(artifact.backend).interpret if arguments["interpret"] else None
    if interpret is not None:
        with interpret(artifact, workload) as session:
            _run(artifact, session, samples, directory, n)
            return f"interpreted: {session.environment.get('runtime', artifact.backend)}"
    with open_session(artifact, workload) as (session, _):
        _run(artifact, session, samples, directory, n)
        return str(session.environment.get("runtime", artifact.backend))


def _run(artifact: Artifact, session: Any, samples: Path, directory: Path, n: int) -> None:
    names = Names(artifact, session)
    for number in range(n):
        arrays, _ = read_inputs(str(samples / f"{number:06d}.npz"))
        names.bind(session, arrays)
        session.infer()
        results: Dict[str, Any] = dict(names.results(session))
        np.savez(str(directory / f"deployed-{number:06d}.npz"), **results)
