"""Is the artifact as good as its source? Scores both on the same samples, and says how sure that is.

The parent's side: it starts the scoring workers, turns paired scores into the ``eval`` object of the JSON contract, and
judges it against ``--max-drop``.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portcall.bench.paired import (
    Interval,
    exact_mcnemar,
    mean_interval,
    samples_for,
    score_interval,
    wilson_interval,
)
from portcall.bench.report import accuracy_text
from portcall.core import BadInput, Source, VerificationFailed
from portcall.workspace import Workspace

TOP1 = "top1"
POINT = 0.01


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What is measured on --eval: top-1, or ``package.module:callable``; and the largest drop that may be.

    max_drop: percentage points for top-1, units of the metric for a function; None: not judged.
    """

    metric: str | None = None
    max_drop: float | None = None

    def check(self) -> None:
        """Raise BadInput for a metric or a budget that cannot be meant."""
        if self.metric is not None and ":" not in self.metric:
            raise BadInput(
                f"--metric {self.metric!r} is no package.module:callable",
                "Leave it out for top-1, or name a function of (outputs, label) that returns a number",
            )
        if self.max_drop is not None and not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise BadInput(
                f"--max-drop {self.max_drop} is no number from 0 up",
                "Give percentage points for top-1 (0.5), or units of the metric",
            )

    def check_labels(self, samples: str, labels: bool) -> str | None:
        """Raise BadInput where nothing can be measured on such samples; return a warning where the user may expect it.

        samples: "eval", "held-out", "example" or "synthetic".
        """
        if samples in ("example", "synthetic"):
            option = "--max-drop" if self.metric is None else "--metric"
            if self.metric is not None or self.max_drop is not None:
                raise BadInput(f"{option} needs samples to measure on", "Give --eval DATA with labels")
            return None
        if labels or self.metric is not None:
            return None
        if self.max_drop is not None:
            raise BadInput(
                f"--max-drop needs labels, and the {samples} samples have none",
                "Add an array named labels to DATA, one integer per sample, or name a --metric that needs none",
            )
        if samples == "eval":
            return "--eval has no labels: parity is measured, accuracy is not; add an array named labels"
        return None


class BudgetExceeded(VerificationFailed):
    """An artifact is provably worse than its source by more than --max-drop."""

    def __init__(
        self, message: str, fix: str, evaluation: Mapping[str, Any], parity: Mapping[str, Any]
    ) -> None:
        super().__init__(message, fix)
        self.evaluation = evaluation
        self.parity = parity


class Scored:
    """Evaluation samples on which the source was scored: each artifact is compared with it by ``evaluate``."""

    def __init__(self, work: Workspace, source: Source, accuracy: Accuracy, folder: Path) -> None:
        """Score the source, unless there are neither labels nor a metric. Raises BadInput where that cannot be done."""
        self._work, self._accuracy, self._folder = work, accuracy, folder
        self._order = [t.name for t in source.outputs]
        index = json.loads((folder / "index.json").read_text())
        self.measured = index["labelled"] or accuracy.metric is not None
        self._reference: np.ndarray | None = None
        self.warnings: list[str] = []
        if self.measured:
            self._reference, classes = self._score(None)
            if classes is not None:
                self.warnings = baseline_warnings(self._reference, classes)

    def place(self) -> str | None:
        """Return a new folder for an artifact's outputs, or None where nothing is scored."""
        if not self.measured:
            return None
        place = self._folder.parent / "outputs"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return str(place)

    def evaluate(self, place: str | None) -> dict[str, Any] | None:
        """Return the ``eval`` object for the outputs that an artifact left in *place*, which is removed."""
        if place is None or self._reference is None:
            return None
        try:
            values, _ = self._score(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return compare(self._reference, values, self._accuracy)

    def _score(self, place: str | None) -> tuple[np.ndarray, dict[str, Any] | None]:
        path = self._folder / "scores.npy"
        job = {
            "samples": str(self._folder),
            "outputs": place,
            "order": self._order,
            "metric": self._accuracy.metric,
            "scores": str(path),
        }
        found = self._work.call("portcall.scoring:score", job, "score")
        return np.load(path), found["classes"]


def compare(reference: np.ndarray, value: np.ndarray, accuracy: Accuracy) -> dict[str, Any]:
    """Return the ``eval`` object: both means, their paired difference with its 95 % interval, and the verdict.

    reference, value: float64[n >= 1], scores of source and artifact on the same samples. "difference" and "ci95" are in
    units of the metric (fractions for top-1); "smallest_drop" and "max_drop" in points for top-1.
    """
    n = reference.size
    unit = POINT if accuracy.metric is None else 1.0
    differences = value - reference
    worse, better = int((differences < 0).sum()), int((differences > 0).sum())
    binary = bool(np.isin(reference, (0, 1)).all() and np.isin(value, (0, 1)).all())
    interval: Interval | None
    if binary:
        interval = score_interval(worse, better, n)
    else:
        spread = float(max(reference.max(), value.max()) - min(reference.min(), value.min()))
        interval = mean_interval(differences, spread)
    budget = None if accuracy.max_drop is None else accuracy.max_drop * unit

    def interval_at(size: int) -> Interval:
        """Return what the interval would be with *size* samples of the same kind."""
        if binary:
            return score_interval(round(worse * size / n), round(better * size / n), size)
        assert interval is not None
        middle, half = sum(interval) / 2, (interval[1] - interval[0]) / 2 * math.sqrt(n / size)
        return middle - half, middle + half

    return {
        "metric": accuracy.metric or TOP1,
        "n": n,
        "reference": float(reference.mean()),
        "value": float(value.mean()),
        "difference": float(differences.mean()),
        "ci95": None if interval is None else list(interval),
        "method": "mcnemar" if binary else "paired t",
        "p_value": exact_mcnemar(worse, better) if binary else None,
        "discordant": [worse, better],
        "smallest_drop": None if interval is None else (interval[1] - interval[0]) / 2 / unit,
        "max_drop": accuracy.max_drop,
        "verdict": None if budget is None else judge(interval, budget),
        "warnings": _size_warnings(n, interval, interval_at, budget, accuracy),
    }


def judge(interval: Sequence[float] | None, budget: float) -> str:
    """Return "within", "exceeded" or "inconclusive": where the interval of value - reference lies against -budget."""
    if interval is None:
        return "inconclusive"
    if interval[1] < -budget:
        return "exceeded"
    return "within" if interval[0] >= -budget else "inconclusive"


def _size_warnings(
    n: int,
    interval: Interval | None,
    interval_at: Callable[[int], Interval],
    budget: float | None,
    accuracy: Accuracy,
) -> list[str]:
    """Say where n is too small to judge the budget, or to tell a drop of one point from none."""
    if interval is None:
        return [f"n={n}: no interval; give more samples"]
    if budget is not None and judge(interval, budget) == "inconclusive":
        more = samples_for(n, interval_at, lambda i: judge(i, budget) != "inconclusive")
        how = "the drop is too near it" if more is None else f"about {more} samples would do"
        limit = f"{accuracy.max_drop:g} {'points' if accuracy.metric is None else 'units'}"
        return [f"n={n} cannot tell whether the drop exceeds {limit}: {how}"]
    half = (interval[1] - interval[0]) / 2
    if budget is None and accuracy.metric is None and half > POINT:
        more = samples_for(n, interval_at, lambda i: i[1] - i[0] <= 2 * POINT)
        return [
            f"n={n} is too small to tell a one-point drop (interval +-{100 * half:.1f} points): "
            f"about {more} samples would do"
        ]
    return []


def check_budget(found: Mapping[str, Any] | None, parity: Mapping[str, Any]) -> None:
    """Raise BudgetExceeded where the interval lies wholly beyond --max-drop."""
    if found is None or found["verdict"] != "exceeded":
        return
    raise BudgetExceeded(
        f"the drop exceeds --max-drop {found['max_drop']:g}: {accuracy_text(found)}, n={found['n']}",
        "Keep the worst layers in float (--keep-float), use another --method or precision, or raise --max-drop",
        found,
        parity,
    )


ENOUGH = 10
"""Samples below which nothing is said about the source's own accuracy."""

ENOUGH_FOR_SHARES = 30
"""Samples below which the commonest label's share is not compared with it."""

BASELINE_CAUSES = (
    "check preprocessing, the order of labels and of channels, and that --eval belongs to this model"
)


def baseline_warnings(correct: np.ndarray, classes: Mapping[str, Any]) -> list[str]:
    """Return warnings where the source's own top-1 says that --eval does not fit it.

    correct: 0 or 1 per sample. classes: see ``scoring``. The source is near chance where Wilson's 95 % interval of its
    accuracy reaches 1/classes, or what always answering the commonest label would score.
    """
    n, right = correct.size, int(correct.sum())
    share = f"the source itself scores {right / n:.1%} on --eval (n={n})"
    if classes["lowest"] < 0 or classes["highest"] >= classes["classes"]:
        return [
            f"labels run from {classes['lowest']} to {classes['highest']}, and the output has {classes['classes']} "
            f"classes (0 to {classes['classes'] - 1}): {share}; do labels count from 1?"
        ]
    constant = classes["majority_n"] / n
    # Of few samples one class is the commonest by chance; with one class alone always answering it is right.
    usable = n >= ENOUGH_FOR_SHARES and classes["seen"] > 1
    chance = max(1 / classes["classes"], constant if usable else 0)
    if n < ENOUGH or wilson_interval(right, n)[0] > chance:
        return []
    for step, count in classes["shifted"].items():
        if count > right and wilson_interval(count, n)[0] > max(0.5, right / n):
            return [f"{share}, but {count / n:.1%} if every label were {step}: labels are off by one"]
    relabelled = classes["relabelled"] / n
    if n >= 10 * classes["seen"] and relabelled > 0.6 and relabelled > constant + 0.2:
        return [f"{share}, but {relabelled:.1%} with classes in another order: check the order of labels"]
    guess = f"1 of {classes['classes']} classes by chance is {1 / classes['classes']:.1%}"
    if usable:
        guess += f", always answering {classes['majority']} {constant:.1%}"
    return [f"{share}, near chance ({guess}): {BASELINE_CAUSES}"]
