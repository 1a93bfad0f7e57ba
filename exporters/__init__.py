"""One file per backend, each ending in ``BACKEND = Backend(...)``; files whose name starts with _ are shared parts."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import List

from portcall.targets.agent.contract import Backend
from portcall.targets.agent.errors import BadInput


def backend_names() -> List[str]:
    """Return the names of all backends, found by a scan of this package's ``__path__``."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get_backend(name: str) -> Backend:
    """Return the backend called *name*. Raises BadInput that lists what there is and the nearest name."""
    names = backend_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.4)
        raise BadInput(
            f"no backend {name!r}; there are: {', '.join(names)}",
            f"Did you mean {near[0]!r}?" if near else "portcall doctor shows what works here",
        )
    backend = importlib.import_module(f"{__name__}.{name}").BACKEND
    assert isinstance(backend, Backend) and backend.name == name, (
        f"{name}.BACKEND must be a Backend of that name"
    )
    return backend
