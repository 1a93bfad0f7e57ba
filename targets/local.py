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
        """Return what *job* of the agent answers: ``NAME`` of jobs.py, or ``MODULE:NAME``.

        Raises the PortcallError of a failed cell.
        """
        function = job if ":" in job else f"jobs:{job}"
        return self._work.call(f"portcall.targets.agent.{function}", arguments, label, backend)


TARGET = Target(name="local", description="this machine", driver=LocalDriver)
