"""This machine as a target: the agent's jobs run in fresh processes here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portcall.targets import Target
from portcall.workspace import Workspace


class LocalDriver:
    """Runs the agent's jobs on this machine; paths in a job are paths here."""

    def __init__(self, work: Workspace) -> None:
        self._work = work

    def run(self, job: str, arguments: Mapping[str, Any], label: str, backend: str) -> Any:
        """Return what the job answers: a name in ``jobs.py``, or MODULE:NAME in another module of the agent.

        Raises the PortcallError of a failed cell.
        """
        module, _, name = job.rpartition(":")
        return self._work.call(f"portcall.targets.agent.{module or 'jobs'}:{name}", arguments, label, backend)


TARGET = Target(name="local", description="this machine", driver=LocalDriver)
