"""What the jobs of all modes begin with: the artifact loaded, its inputs bound, one inference done and checked."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

import numpy as np

from portcall.targets.agent import fingerprint, settings
from portcall.targets.agent.contract import Artifact, Backend, Session, Workload
from portcall.targets.agent.errors import CellFailed
from portcall.targets.agent.opening import Names, batch_of, check_outputs, read_inputs, ready


class Loaded:
    """Sessions that are ready to infer, and what it took to get there.

    load_ns: of all sessions, without importing the runtime. first_ns: first inference of the first session.
    deadline_ns: of ``perf_counter_ns``; None for none.
    """

    def __init__(self, workload: Workload, sessions: Sequence[Session]) -> None:
        self.workload = workload
        self.sessions = sessions
        self.load_ns = self.first_ns = self.started_ns = 0
        self.deadline_ns: Optional[int] = None
        self.machine: Dict[str, Any] = {}
        self.before: Dict[str, Any] = {}
        self.applied: Dict[str, Any] = {}
        self.warnings: List[str] = []

    def answer(self) -> Dict[str, Any]:
        """Return what every mode's job answers: times, and the environment as the latency mode stores it."""
        return {
            "elapsed_s": (time.perf_counter_ns() - self.started_ns) / 1e9,
            "load_ns": self.load_ns,
            "first_ns": self.first_ns,
            "warnings": self.warnings,
            "environment": {
                "machine": self.machine,
                "stack": {**fingerprint.stack(), **self.sessions[0].environment, **self.applied},
                "state": {"before": self.before, "after": fingerprint.state()},
            },
        }


def check_clock(begin_ns: np.ndarray, end_ns: np.ndarray) -> None:
    """Raise CellFailed if the wall clock went backwards within a call or from one call to the next."""
    if (end_ns < begin_ns).any() or (begin_ns[1:] < end_ns[:-1]).any():
        raise CellFailed("the wall clock went backwards", "Check the machine's clock source")


@contextlib.contextmanager
def loaded(arguments: Mapping[str, Any], streams: int = 1) -> Iterator[Loaded]:
    """Yield the artifact in *streams* sessions, each of which has done an inference that was checked.

    arguments: artifact, workload, inputs (an npz), expected_sqnr_db, deadline_s (seconds from now after which the
    job ends, or None). Raises UnsupportedError for a batch that the file cannot take, VerificationFailed where
    outputs are not the source's.
    """
    started = time.perf_counter_ns()
    artifact = Artifact.from_json(arguments["artifact"])
    workload = Workload.from_json(arguments["workload"])
    machine = fingerprint.machine()  # as it is for everybody: before this process is pinned
    before = fingerprint.state()
    applied, warnings = settings.apply(workload)
    backend, artifact, _ = ready(artifact, workload)
    start = time.perf_counter_ns()
    with _open(backend, artifact, workload, streams) as sessions:
        found = Loaded(workload, sessions)
        found.load_ns = time.perf_counter_ns() - start
        found.started_ns, found.machine, found.before, found.applied = started, machine, before, applied
        spinning = settings.spinning_warning(workload, sessions[0].environment, artifact.backend)
        found.warnings = [*warnings, *([] if spinning is None else [spinning])]
        if arguments.get("deadline_s") is not None:
            found.deadline_ns = started + int(arguments["deadline_s"] * 1e9)
        inputs, _ = read_inputs(arguments["inputs"])
        for session in sessions:
            names = Names(artifact, session)
            batch = batch_of(session, names, inputs, workload.batch)
            names.bind(session, batch)
            start = time.perf_counter_ns()
            session.infer()
            found.first_ns = found.first_ns or time.perf_counter_ns() - start
            check_outputs(names, session, arguments, limit=1)
            names.bind(session, batch)
        yield found


@contextlib.contextmanager
def _open(
    backend: Backend, artifact: Artifact, workload: Workload, streams: int
) -> Iterator[Sequence[Session]]:
    """Yield as many sessions as there are streams: one model's own streams where the runtime has them."""
    with contextlib.ExitStack() as stack:
        if streams > 1 and backend.load_streams is not None:
            yield stack.enter_context(backend.load_streams(artifact, workload, streams))
            return
        sessions: List[Session] = []
        for _ in range(streams):
            sessions.append(stack.enter_context(backend.load(artifact, workload)))
        yield sessions
