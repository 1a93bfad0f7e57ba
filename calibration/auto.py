"""``auto``: per tensor the method with the least output error, measured on calibration samples held back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portcall.calibration._auto_onnx import quantizer
from portcall.calibration.table import Choice, Section
from portcall.targets.agent.contract import Graph

if TYPE_CHECKING:
    from portcall.workspace import Workspace

CANDIDATES = ("minmax", "percentile:99.999", "percentile:99.99", "percentile:99.9", "mse", "entropy")
HELD_BACK_AT_MOST = 64
AT_MOST_S = 120.0
"""For the comparison of all candidates: no further sample is begun after that."""
FOREVER_S = 1e9


def held_every(n: int) -> int:
    """Return k: every k-th of *n* samples is kept out of the histograms, a tenth of them, but 64 at most.

    Not the last ones: data often come sorted by class. 0 (none) for a single sample.
    """
    return 0 if n < 2 else min(n, max(10, -(-n // HELD_BACK_AT_MOST)))


def with_choices(work: Workspace, graph: Graph, backend: str | None, section: Section) -> Section:
    """Return the section of an ONNX graph with a method chosen for every tensor, for either kind of ranges.

    Each tensor is quantized alone, all others in float, with the range of each candidate, and the outputs are compared
    with those of the float graph on the samples held back. A tensor leaves the method that is best for all tensors at
    once only for one that is significantly better for it. Where that method is better on the same samples than the
    choices together, it is taken for all.
    """
    job = {"graph": graph.to_json(), "tensors": list(section.histograms)}
    planned = work.call("portcall.calibration._auto_onnx:plan", job, "plan auto", backend)
    choices = {}
    try:
        for scheme, symmetric in (("asymmetric", False), ("symmetric", True)):
            watched = list(section.histograms)
            if symmetric:
                found = work.call(
                    "portcall.calibration._auto_onnx:symmetric_tensors", job, "plan auto", backend
                )
                watched = [t for t in watched if t in set(found)]
            choices[scheme] = _choose(work, graph, backend, section, planned["path"], watched, symmetric)
    finally:
        Path(planned["path"]).unlink(missing_ok=True)
    return replace(section, choices=choices)


def _choose(
    work: Workspace,
    graph: Graph,
    backend: str | None,
    section: Section,
    path: str,
    watched: Sequence[str],
    symmetric: bool,
) -> Choice:
    names = list(section.histograms)
    ranges = {m: section.ranges(m, symmetric) for m in CANDIDATES}
    quantizers = {
        t: {m: quantizer(ranges[m][t].minimum, ranges[m][t].maximum, symmetric) for m in CANDIDATES}
        for t in watched
    }
    # Every distinct quantizer of a tensor once; the first method that gives it stands for it.
    tries = {t: {q: m for m, q in reversed(quantizers[t].items())} for t in watched}
    alone = [(t, m, q) for t in watched for q, m in tries[t].items() if len(tries[t]) > 1]

    def measured(settings: list[Any], label: str, at_most: int | None = None) -> dict[str, Any]:
        job = {
            "graph": graph.to_json(),
            "path": path,
            "data": section.data.to_json(),
            "planned": list(section.planned),
            "held_every": section.held_every,
            "width": work.threads,
            "threads": 1,
            "extents": [max(-h.minimum, h.maximum) for h in section.histograms.values()],
            "settings": settings,
            "seconds": AT_MOST_S if at_most is None else FOREVER_S,
            "at_most": at_most,
        }
        found: dict[str, Any] = work.call("portcall.calibration._auto_onnx:measure", job, label, backend)
        return found

    scheme = "symmetric" if symmetric else "asymmetric"
    uniform = [[[names.index(t), quantizers[t][m]] for t in watched] for m in CANDIDATES]
    found = measured([*([[names.index(t), q]] for t, _, q in alone), *uniform], f"choose {scheme}")
    errors = np.array(found["errors"])
    together = dict(zip(CANDIDATES, errors[len(alone) :].mean(axis=1).tolist(), strict=True))
    base = min(together, key=lambda m: together[m])
    per_tensor: dict[str, dict[str, Any]] = {}
    for (tensor, method, _), error in zip(alone, errors, strict=False):
        per_tensor.setdefault(tensor, {})[method] = error
    methods = dict.fromkeys(names, base)
    for tensor, by_method in per_tensor.items():
        stands_for = tries[tensor][quantizers[tensor][base]]
        best = _significantly_best(by_method, stands_for)
        methods[tensor] = base if best == stands_for else best
    chosen = [[[names.index(t), quantizers[t][methods[t]]] for t in watched]]
    together["auto"] = float(np.mean(measured(chosen, f"check {scheme}", found["n"])["errors"]))
    if together["auto"] > together[base]:
        methods, together["auto"] = dict.fromkeys(names, base), together[base]
    sqnr_db = {m: round(-10 * math.log10(max(e, 1e-30)), 2) for m, e in together.items()}
    return Choice(methods, found["n"], sqnr_db)


def _significantly_best(errors: Mapping[str, Any], base: str) -> str:
    """Return the method of the least mean error among those better than *base* by two standard errors, else *base*.

    errors: per method float64[samples]; the difference is paired by sample. Few samples hold few of the rare large
    values that a tight range clips: taking the least error as it is chooses too tight a range.
    """
    better = {base: errors[base].mean()}
    for method, error in errors.items():
        gain = errors[base] - error
        spread = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        if gain.mean() > 2 * spread:
            better[method] = error.mean()
    return min(better, key=lambda m: better[m])


def transferred(section: Section, chosen: Section) -> Section:
    """Return *section* with the choices made on another graph of the same model.

    A tensor takes over the method of the tensor that holds the same values there: equal minimum and maximum within
    1e-4 of the range, and equally many values. One without such a twin takes the method that most tensors have.
    """
    twins = {name: _twin(section, name, chosen) for name in section.histograms}
    choices = {}
    for scheme, choice in chosen.choices.items():
        methods = list(choice.methods.values())
        usual = max(sorted(set(methods)), key=methods.count)
        found = {name: choice.methods.get(twin or "", usual) for name, twin in twins.items()}
        choices[scheme] = Choice(found, choice.n, choice.sqnr_db)
    return replace(section, choices=choices)


def _twin(section: Section, name: str, other: Section) -> str | None:
    mine = section.histograms[name]
    reach = max(mine.maximum - mine.minimum, 1e-30)
    close = [
        (abs(mine.minimum - theirs.minimum) + abs(mine.maximum - theirs.maximum), twin)
        for twin, theirs in other.histograms.items()
        if theirs.n == mine.n
    ]
    distance, twin = min(close, default=(float("inf"), None))
    return twin if distance <= 1e-4 * reach else None
