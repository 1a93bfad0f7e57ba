"""The user's own code, ``package.module:name``: found and imported in a worker, and blamed by name."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portcall.targets.agent.errors import BadInput


def load_callable(spec: str, does: str, takes: str = "no arguments") -> Callable[..., Any]:
    """Return the function that ``package.module:name`` names; *takes*, *does*: what it should, for the message.

    Runs the module. The current folder joins the end of the path and stays, since the user's code may import later;
    at the end, so that a folder named onnx/ there does not shadow the real one. Raises BadInput where there is none.
    """
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        value: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:  # SystemExit: a script that runs on import
        raise BadInput(
            f"cannot import {module_name!r} for {spec}: {type(e).__name__}: {e}",
            f"Run from the folder that holds it, or install it; the current folder is {here}",
        ) from e
    owner = module_name
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in dir(value) if not n.startswith("_") and callable(getattr(value, n))]
            near = difflib.get_close_matches(part, public, 1)
            raise BadInput(
                f"{owner!r} has no {part!r}; it has: {', '.join(public[:12])}",
                f"Did you mean {near[0]!r}?" if near else "Define it there, or name another",
            )
        value = getattr(value, part)
        owner = f"{owner}.{part}"
    if not callable(value):
        raise BadInput(
            f"{spec} is a {type(value).__name__}, not callable",
            f"Name a function that takes {takes} and {does}",
        )
    function: Callable[..., Any] = value
    return function
