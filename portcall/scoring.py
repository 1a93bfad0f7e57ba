"""Scores stored outputs sample by sample, in a worker: top-1, or the user's own metric function.

The same code scores the source's outputs and each artifact's, so that scores are paired by sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from portcall.calibration._rows import Array, Label, class_indices, label_of
from portcall.targets.agent.errors import BadInput
from portcall.targets.agent.opening import REFERENCE
from portcall.user_code import load_callable

Outputs = dict[str, Array]
Progress = Callable[[int, int | None], None]

METRIC_FIX = (
    "It takes (outputs: dict of arrays by output name, label) and returns one finite number, higher is better"
)


def score(arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Write every sample's score to a ``.npy``, float64[n]; return what top-1 saw of the classes.

    samples: the folder of the reference job. outputs: a folder of an artifact's outputs, or null for the source's own.
    order: the outputs' names. metric: null for top-1, or ``package.module:callable``. scores: where to write.
    """
    folder = Path(arguments["samples"])
    index = json.loads((folder / "index.json").read_text())
    spec = arguments["metric"]
    function = None if spec is None else load_callable(spec, "returns one number", "outputs and a label")
    scores: list[float] = []
    classes = _Classes()
    for number in range(index["n"]):
        outputs = _outputs(folder, arguments["outputs"], number, arguments["order"])
        path = folder / f"{number:06d}.label.npy"
        label = label_of(np.load(path)) if index["labelled"] else None
        if function is not None:
            scores.append(_call(function, spec, outputs, label, number))
        else:
            assert label is not None
            predicted, wanted, count = top1(outputs, label, f"sample {number}")
            classes.add(predicted, wanted, count)
            scores.extend((predicted == wanted).astype(float))
        progress(number + 1, index["n"])
    np.save(arguments["scores"], np.asarray(scores, np.float64))
    return {"classes": None if function is not None else classes.summary()}


def _outputs(folder: Path, place: str | None, number: int, order: list[str]) -> Outputs:
    path = (folder if place is None else Path(place)) / f"{number:06d}.npz"
    with np.load(path) as stored:
        prefix = REFERENCE if place is None else ""
        return {name: stored[prefix + name] for name in order}


def top1(outputs: Mapping[str, Array], label: Label, where: str) -> tuple[Array, Array, int]:
    """Return the predicted and the wanted class of each row of one sample, int64[rows], and the number of classes.

    The class is the argmax of the first output of rank 2. Raises BadInput where there is none, or the labels do not
    fit its rows.
    """
    scores = next((a for a in outputs.values() if a.ndim == 2), None)
    if scores is None:
        raise BadInput(
            "labels were given, but no output has rank 2 (samples x classes)",
            "Leave the labels out of --eval, or name a function: --metric package.module:callable",
        )
    wanted = class_indices(label, where)
    if len(wanted) != len(scores):
        raise BadInput(
            f"{where} has {len(wanted)} labels, and its output {len(scores)} rows of classes",
            "Store one label per row, or name a function: --metric package.module:callable",
        )
    return scores.argmax(axis=1), wanted, scores.shape[1]


def _call(
    function: Callable[..., Any], spec: str, outputs: Outputs, label: Label | None, number: int
) -> float:
    """Return the user's score of one sample as a finite float. Raises BadInput naming the sample and the function."""
    try:
        value = function(outputs, label)
    except (Exception, SystemExit) as error:  # the user's code raises anything
        raise BadInput(
            f"the metric {spec} raised {type(error).__name__} at sample {number}: {error}", METRIC_FIX
        ) from error
    array = np.asarray(value) if np.isscalar(value) or isinstance(value, np.ndarray) else None
    if array is None or array.size != 1 or array.dtype.kind not in "biuf":
        found = "text" if isinstance(value, str) else f"a {type(value).__name__}"
        if array is not None and array.size != 1:
            found = f"an array of shape {list(array.shape)}"
        raise BadInput(f"the metric {spec} returned {found} at sample {number}, not a number", METRIC_FIX)
    result = float(array.item())
    if not math.isfinite(result):
        raise BadInput(f"the metric {spec} returned {result} at sample {number}", METRIC_FIX)
    return result


class _Classes:
    """Counts of (predicted, wanted) over samples."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], int] = {}
        self._count = 0

    def add(self, predicted: Array, wanted: Array, count: int) -> None:
        self._count = count
        for pair in zip(predicted.tolist(), wanted.tolist(), strict=True):
            self._pairs[pair] = self._pairs.get(pair, 0) + 1

    def summary(self) -> dict[str, Any]:
        """Return how many classes there are, the labels' range and commonest one, and two ways to relabel.

        shifted: right answers if every label were one lower, or one higher. relabelled: if each predicted class stood
        for the label that it meets most often.
        """
        labels: dict[int, int] = {}
        best: dict[int, int] = {}
        shifted = {"-1": 0, "+1": 0}
        for (predicted, wanted), n in self._pairs.items():
            labels[wanted] = labels.get(wanted, 0) + n
            best[predicted] = max(best.get(predicted, 0), n)
            for step in shifted:
                shifted[step] += n if predicted == wanted + int(step) else 0
        majority = max(labels, key=lambda k: labels[k])
        return {
            "classes": self._count,
            "lowest": min(labels),
            "highest": max(labels),
            "seen": len(labels),
            "majority": majority,
            "majority_n": labels[majority],
            "shifted": shifted,
            "relabelled": sum(best.values()),
        }
