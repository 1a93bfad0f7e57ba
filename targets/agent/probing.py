"""How backends probe: import the runtime, or find the modules of a heavy converter without importing them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from typing import List, Sequence, Union

from portcall.targets.agent.contract import Available, Unavailable


def probe_modules(
    extra: str, imported: Sequence[str], found: Sequence[str] = (), distribution: str = ""
) -> Union[Available, Unavailable]:
    """Return Available with the version of the first module's distribution, or what is missing and how to get it.

    imported: modules to import for real. found: modules that need only exist (their import takes seconds).
    """
    # Top-level names only: find_spec of a dotted one imports its parents, and raises where they are missing or broken.
    names = [name.partition(".")[0] for name in [*imported, *found]]
    missing: List[str] = [name for name in names if importlib.util.find_spec(name) is None]
    fix = f"pip install 'portcall[{extra}]'"
    if missing:
        return Unavailable(f"not installed: {', '.join(missing)}", fix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a vendor's deprecation is no broken install, not even under -W error
            for name in imported:
                importlib.import_module(name)
    except Exception as error:  # a broken install raises anything, from ImportError to its own kinds
        return Unavailable(
            f"cannot import {name}: {type(error).__name__}: {error}", f"{fix} --force-reinstall"
        )
    first = [*imported, *found][0]
    try:
        return Available(importlib.metadata.version(distribution or first))
    except importlib.metadata.PackageNotFoundError:  # another build of it: onnxruntime-gpu, conda's openvino
        return Available(str(getattr(sys.modules.get(first), "__version__", "unknown")))
