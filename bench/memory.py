"""The memory of a bench result: several fresh processes where one is not repeatable, and what the files hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from portcall.core import Artifact, CellFailed, PortcallError

FEWEST, MOST = 2, 5
"""Fresh processes: the second tells whether the first can be repeated."""

AGREE = 0.02
"""Figures this close to each other, as a share of the larger, are repeatable."""

FLOOR_BYTES = 1 << 20
"""Differences below this are noise of the kernel and of the loader, however small the model is."""

JUDGED = ("model_bytes", "peak_bytes")


def run_memory(read: Callable[[int], Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the key ``memory`` and warnings. read(i): the answer of the i-th fresh process.

    Two processes; where they disagree, up to five.
    """
    answers = [read(number) for number in range(FEWEST)]
    while len(answers) < MOST and _apart(answers):
        answers.append(read(len(answers)))
    pooled = pool(answers)
    warnings = []
    for key in _apart(answers):
        low, high = pooled["spread"][key]
        warnings.append(
            f"memory varies between fresh processes: {key} {low / 1e6:.1f} to {high / 1e6:.1f} MB over "
            f"{len(answers)}: read the spread, not the median alone"
        )
    return pooled, warnings


def pool(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median over processes of every figure in bytes, with "processes", "spread" and "repeatable".

    Everything else (methods, the runtime's own figures) is the last process's. A figure that a process lacks is None.
    """
    pooled = dict(answers[-1])
    spread = {}
    for key in pooled:
        values = [a[key] for a in answers if a.get(key) is not None]
        if not key.endswith("_bytes") or len(values) < len(answers):
            continue
        pooled[key] = round(statistics.median(values))
        spread[key] = [min(values), max(values)]
    return {
        **pooled,
        "limit": None,
        "processes": len(answers),
        "spread": spread,
        "repeatable": not _apart(answers),
    }


def _apart(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the judged figures of which the closest two thirds do not agree: one stray process does not count."""
    found = []
    for key in JUDGED:
        values = sorted(answer[key] for answer in answers)
        kept = -(-2 * len(values) // 3)
        widths = [values[i + kept - 1] - values[i] for i in range(len(values) - kept + 1)]
        if min(widths) > max(FLOOR_BYTES, AGREE * values[-1]):
            found.append(key)
    return found


def stored_weights(arguments: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Return how many bytes the layers' weights take as the files store them; a worker's job.

    A runtime may hold them otherwise: packed, or widened to float32. other_elements: biases, norms and tables, whose
    width the reader does not tell.
    """
    from portcall.exporters import get_backend

    artifact = Artifact.from_json(arguments["artifact"])
    read = get_backend(artifact.backend).contents
    if read is None:
        raise CellFailed(f"the files of backend {artifact.backend} cannot be read")
    found = read(artifact, {})
    distinct = {w.tensor: w for w in found.weights}.values()
    return {
        "bytes": sum(-(-w.elements * w.bits // 8) for w in distinct),
        "elements": found.elements,
        "other_elements": found.other_parameters,
        "method": "layers' weights as the files store them",
        "reason": None,
    }


def weights(read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what ``stored_weights`` tells, or None with the reason: it never fails a measurement."""
    try:
        return {**read(), "fix": None}
    except PortcallError as error:
        absent = {"bytes": None, "elements": None, "other_elements": None, "method": None}
        return {**absent, "reason": error.message, "fix": error.fix or None}


def or_absent(read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the answer of an extra pass, or {"available": False, "reason", "fix"}: it never fails a measurement."""
    try:
        return dict(read())
    except PortcallError as error:
        return {"available": False, "reason": error.message, "fix": error.fix or None}
