"""How backends probe: import the runtime, or find the modules of a heavy converter without importing them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import List, Sequence, Union

from portcall.targets.agent.contract import Available, Unavailable


def probe_modules(
    extra: str, imported: Sequence[str], found: Sequence[str] = (), distribution: str = ""
) -> Union[Available, Unavailable]:
    """Return Available with the version of the first module's distribution, or what is missing and how to get it.

    imported: modules to import for real. found: modules that need only exist (their import takes seconds).
    """
    missing: List[str] = [name for name in [*imported, *found] if importlib.util.find_spec(name) is None]
    fix = f"pip install 'portcall[{extra}]'"
    if missing:
        return Unavailable(f"not installed: {', '.join(missing)}", fix)
    try:
        for name in imported:
            importlib.import_module(name)
    except Exception as error:  # a broken install raises anything, from ImportError to its own kinds
        return Unavailable(
            f"cannot import {name}: {type(error).__name__}: {error}", f"{fix} --force-reinstall"
        )
    return Available(importlib.metadata.version(distribution or (list(imported) or list(found))[0]))
