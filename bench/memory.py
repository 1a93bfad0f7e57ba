"""The memory of a bench result: several fresh processes where one is not repeatable, and what the files hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from portcall.core import Artifact, CellFailed, PortcallError

MOST = 5
"""Processes at fixed addresses, where two disagree."""

AGREE = 0.02
"""Figures this close to each other, as a share of the larger, agree."""

FLOOR_BYTES = 1 << 20
"""Differences below this are noise of the kernel and of the loader, however small the model is."""

Read = Callable[[str, bool], Mapping[str, Any]]


def run_memory(read: Read) -> tuple[dict[str, Any], list[str]]:
    """Return the key ``memory`` and warnings. read(layout, held): the answer of one fresh process (``memory_pass``).

    Three processes: one at fixed addresses gives the figures, one that gives freed heap back after load what the model
    holds, one at random addresses tells whether the peak depends on them. Where it does, more say by how much.
    """
    fixed = [read("fixed", False)]
    held = read("fixed", True)
    other = [read("random", False)]
    if _apart([*fixed, *other]):
        fixed.append(read("fixed", False))
        other += [read("random", False) for _ in range(2)]
        while len(fixed) < MOST and _apart(fixed):
            fixed.append(read("fixed", False))
    pooled = pool(fixed if fixed[0]["layout"] == "fixed" else [*fixed, *other], held)
    peaks = [a["peak_bytes"] for a in (*fixed, *other)]
    pooled["spread"] = {"peak_bytes": [min(peaks), max(peaks)]}
    pooled["processes"] = len(peaks) + 1
    pooled["repeatable"] = not _apart([*fixed, *other])
    warnings = []
    if not pooled["repeatable"]:
        warnings.append(
            f"the peak of memory depends on the addresses that a process gets: {min(peaks) / 1e6:.1f} to "
            f"{max(peaks) / 1e6:.1f} MB over {len(peaks)} processes: plan for more than the largest"
        )
    return pooled, warnings


def pool(answers: Sequence[Mapping[str, Any]], held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the median over processes of every figure in bytes; what the model holds is that of *held*.

    Everything else (methods, the runtime's own figures) is the last process's. A figure that a process lacks is None.
    """
    pooled = dict(answers[-1])
    for key in pooled:
        values = [a[key] for a in answers if a.get(key) is not None]
        if key.endswith("_bytes") and len(values) == len(answers):
            pooled[key] = round(statistics.median(values))
    absent = {k: v for k, v in pooled["absent"].items() if k != "freed_bytes"}
    if held["freed_bytes"] is None:
        absent["freed_bytes"] = held["absent"]["freed_bytes"]
    return {
        **pooled,
        "model_bytes": held["model_bytes"],
        "freed_bytes": held["freed_bytes"],
        "limit": None,
        "absent": absent,
    }


def _apart(answers: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the peaks of processes disagree."""
    peaks = [answer["peak_bytes"] for answer in answers]
    return bool(max(peaks) - min(peaks) > max(FLOOR_BYTES, AGREE * max(peaks)))


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
