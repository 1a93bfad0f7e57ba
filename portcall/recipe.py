"""The options of a recipe: those of every backend, and each backend's own, checked as they come in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portcall.core import BadInput, Cell
from portcall.exporters import get_backend
from portcall.targets.agent.contract import Option

BackendOptions = Mapping[str, Mapping[str, Any]]
"""Backend -> name of an option of its own -> value."""


def shared_options(
    keep_float: Sequence[str], weights: str | None, symmetric_weights: bool, bias_correction: bool
) -> dict[str, Any]:
    """Return the options that every backend has: see ``Recipe``."""
    options: dict[str, Any] = {"bias_correction": bias_correction}
    if keep_float:
        options["keep_float"] = list(keep_float)
    if weights is not None:
        options["weights"] = weights
    if not symmetric_weights:
        options["weight_symmetric"] = False
    return options


def backend_options(given: Mapping[str, Any], cells: Sequence[Cell]) -> BackendOptions:
    """Return *given* ({"BACKEND.NAME": value}) by backend, with every value checked and of its option's type.

    Raises BadInput for a backend that no cell has, an option that it does not have, or a value that does not fit: what
    there is.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        backend, dot, name = key.partition(".")
        if not dot:
            raise BadInput(f"cannot read the option {key!r}", "Write BACKEND.NAME=VALUE, e.g. tflite.io=int8")
        known = get_backend(backend).capabilities.options
        if backend not in {c.backend for c in cells}:
            raise BadInput(
                f"the option {key} is for {backend}, to which nothing is exported",
                "Leave it out, or add --to",
            )
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1, 0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise BadInput(
                f"{backend} has no option {name!r}", f"It has: {', '.join(known) or 'none of its own'}.{hint}"
            )
        option = known[name]
        wanted = [c.precision for c in cells if c.backend == backend]
        if option.precisions and not set(wanted) & set(option.precisions):
            raise BadInput(
                f"the option {key} concerns {', '.join(option.precisions)}; exported is {', '.join(wanted)}",
                "Leave it out, or add such a precision",
            )
        found.setdefault(backend, {})[name] = _value(key, option, value)
    return found


def _value(key: str, option: Option, value: Any) -> Any:
    """Return *value* (a str from the command line, or what Python gave) as the option's type."""
    if option.choices:
        if value not in option.choices:
            raise BadInput(f"{key} is {value!r}", f"It takes: {', '.join(option.choices)}")
        return value
    if option.kind == "bool":
        words = {"true": True, "false": False, True: True, False: False}
        if value not in words:
            raise BadInput(f"{key} is {value!r}", "It takes true or false")
        return words[value]
    if option.kind in ("int", "float"):
        try:
            return int(value) if option.kind == "int" else float(value)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{key} is {value!r}, no number", f"Give a number: {option.meaning}") from error
    if not isinstance(value, str | Path) or not str(value):
        raise BadInput(f"{key} is {value!r}, no text", f"Give: {option.meaning}")
    if option.kind == "path" and not Path(value).is_file():
        raise BadInput(f"{key} names no file: {value}", "Give the path of a file that is there")
    return str(Path(value).resolve()) if option.kind == "path" else str(value)


def cell_options(cell: Cell, shared: Mapping[str, Any], own: BackendOptions) -> dict[str, Any]:
    """Return the options of one cell's recipe: what every backend has, and what concerns this precision of its own."""
    known = get_backend(cell.backend).capabilities.options
    mine = own.get(cell.backend, {})
    fitting = {
        k: v for k, v in mine.items() if not known[k].precisions or cell.precision in known[k].precisions
    }
    return {**shared, **fitting}
