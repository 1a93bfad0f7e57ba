"""Where artifacts run: one file per target, each ending in ``TARGET = Target(...)``; ``agent/`` travels to devices."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from portcall.targets.agent.errors import BadInput

if TYPE_CHECKING:
    from portcall.workspace import Workspace


class Driver(Protocol):
    """Talks to one device."""

    def run(self, job: str, arguments: Mapping[str, Any], label: str, backend: str) -> Any:
        """Do one job of the agent there (NAME in ``jobs.py``, or MODULE:NAME) and return its answer."""


@dataclass(frozen=True)  # this file travels with agent/: Python 3.8 knows no slots
class Target:
    """A device, described; *driver* makes what talks to it."""

    name: str
    description: str
    driver: Callable[[Workspace], Driver]


def target_names() -> list[str]:
    return sorted(
        m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and not m.name.startswith("_")
    )


def get_target(name: str) -> Target:
    """Return the target called *name*. Raises BadInput that lists what there is and the nearest name."""
    names = target_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.4)
        raise BadInput(
            f"no target {name!r}; there are: {', '.join(names)}", f"Did you mean {near[0]!r}?" if near else ""
        )
    target = importlib.import_module(f"{__name__}.{name}").TARGET
    assert isinstance(target, Target) and target.name == name
    return target
