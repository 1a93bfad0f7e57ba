"""What DATA looks like to the model, input by input, and whether two DATA look alike.

Calibration data that was prepared differently from evaluation data (another range, layout or channel order) gives an
accuracy that says nothing. Every figure is taken per sample and summed up by quantiles over samples, so that a warning
rests on how samples vary among themselves: two parts of one data set do not differ as grossly as this asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

KEPT = 512
"""Samples whose figures are kept; beyond, every second one is dropped, again and again."""

MAX_CHANNELS = 4
"""Channel order is looked at up to so many channels: RGB, BGR, RGBA."""

ENOUGH = 8
"""Samples on each side below which nothing is said about means, and about ranges only where they are worlds apart."""

OUTSIDE = 0.25
"""How far beyond all values of the other side, in spans of it, most samples must reach."""

OUTSIDE_FEW = 200.0
"""The same with few samples: 0..255 against 0..1 it is 254."""

OUTSIDE_INTEGERS = 15.0
"""The same for integers (token ids, positions), whose range depends on the sample's length and vocabulary."""

SHIFT = 0.8
"""Difference of the means, in standard deviations of the values, beyond which they are of another kind."""

CONTRAST = 3.0
"""Ratio of the standard deviations within a sample beyond which they are of another kind."""

CONTRAST_LEAST = 0.1
"""Least difference between first and last channel, in standard deviations, that tells their order."""

INTERLEAVED = 0.2
"""Logarithm of the step to the next value against that to the next but as many as there are channels, beyond which the
channels lie side by side: about -0.5 in photographs stored channel by channel, 2 stored pixel by pixel."""

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


class InputStatistics:
    """Figures of one input over samples; ``add`` takes arrays with their batch axis."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._stride = 1
        self._n = 0
        self._low, self._high = np.inf, -np.inf
        self._whole = True
        self._dtype = ""

    def add(self, array: Array) -> None:
        self._dtype = str(array.dtype)
        if array.size == 0 or array.dtype.kind not in "biuf":
            return
        if self._n % self._stride == 0:
            row = _figures(array)
            self._low, self._high = min(self._low, row["low"]), max(self._high, row["high"])
            self._whole = self._whole and row.pop("whole")
            self._rows.append(row)
        if len(self._rows) > KEPT:
            self._rows, self._stride = self._rows[::2], 2 * self._stride
        self._n += 1

    def summary(self) -> dict[str, Any] | None:
        """Return the figures as JSON, or None where nothing was added: see ``compare``."""
        if not self._rows:
            return None
        found: dict[str, Any] = {
            "n": self._n,
            "dtype": self._dtype,
            "low": float(self._low),
            "high": float(self._high),
            "whole": bool(self._whole),
            "shape": self._rows[0]["shape"],
        }
        for key in ("low", "high", "mean", "std"):
            found[f"{key}s"] = _quantiles([r[key] for r in self._rows])
        for key in ("steps", "contrast"):
            values = [r[key] for r in self._rows if key in r]
            found[key] = _quantiles(values) if values else None
        return found


def _quantiles(values: Sequence[float]) -> list[float]:
    return [float(q) for q in np.quantile(np.asarray(values, np.float64), QUANTILES)]


def _all_whole(values: Array) -> bool:
    return bool(np.all(values == np.rint(values)))


def _figures(array: Array) -> dict[str, Any]:
    values = np.asarray(array, dtype=np.float64)
    flat = values.ravel()
    low, high, mean = float(array.min()), float(array.max()), float(flat.mean())
    std = (
        0.0
        if low == high
        else math.sqrt(max(0.0, float(np.einsum("i,i->", flat, flat)) / flat.size - mean * mean))
    )
    row: dict[str, Any] = {
        "low": low,
        "high": high,
        "mean": mean,
        "std": std,
        "whole": array.dtype.kind != "f" or (_all_whole(flat[:256]) and _all_whole(flat)),
        "shape": list(array.shape[1:]),
    }
    if values.ndim == 4:
        last = values.shape[-1] <= MAX_CHANNELS < values.shape[1]
        channel = 3 if last else 1
        many = values.shape[channel]
        if 2 <= many <= MAX_CHANNELS and values[0].size >= 256:
            steps = [float(np.abs(flat[lag:] - flat[:-lag]).mean()) for lag in (1, many)]
            if min(steps) > 0:
                row["steps"] = math.log(steps[0] / steps[1])
        if 3 <= values.shape[channel] <= MAX_CHANNELS:
            row["contrast"] = float((values.take(0, axis=channel) - values.take(2, axis=channel)).mean())
    return row


def compare(
    data: Mapping[str, Mapping[str, Any] | None],
    evaluation: Mapping[str, Mapping[str, Any] | None],
    names: tuple[str, str] = ("--data", "--eval"),
) -> list[str]:
    """Return a sentence for each gross difference between two DATA: which input, what differs, what to check.

    data, evaluation: ``InputStatistics.summary`` by input. names: what the two are called.
    """
    sentences = []
    for name, first in data.items():
        second = evaluation.get(name)
        if first is None or second is None or _is_mask(first, second):
            continue
        for check in (_layout, _constant, _range, _whole, _distribution, _neighbours, _channel_order):
            found = check(first, second, names)
            if found is not None:
                sentences.append(f"input {name!r}: {found}")
                break
    return sentences


def _is_mask(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Tell whether both hold 0 and 1 alone: a mask, of which a part may be constant."""
    return all(s["whole"] and s["low"] >= 0 and s["high"] <= 1 for s in (first, second)) and (
        first["dtype"] != "float32" or first["low"] == first["high"] or second["low"] == second["high"]
    )


def _layout(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    a, b = first["shape"], second["shape"]
    rolled = len(a) == 3 and a != b and (a == [b[2], b[0], b[1]] or b == [a[2], a[0], a[1]])
    if rolled and min(a[0], a[2]) <= MAX_CHANNELS:
        return f"{names[0]} has samples of shape {a} and {names[1]} of {b}: check the layout (NCHW or NHWC)"
    return None


def _constant(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    for one, other, label in ((first, second, names[0]), (second, first, names[1])):
        values = one["n"] * max(1, int(np.prod(one["shape"])))
        # Integers may well be constant (segment ids); few values may be equal by chance.
        if _is_float(one) and one["low"] == one["high"] and other["low"] < other["high"] and values >= 16:
            return f"all values of {label} are {one['low']:.4g}: check how it is read"
        if _is_float(one) and one["stds"][3] == 0 < other["stds"][1] and min(one["n"], other["n"]) >= ENOUGH:
            return f"each sample of {label} is constant: check how it is read"
    return None


def _range(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    """Most samples of one side reach far beyond all that the other side holds."""
    for one, other in ((first, second), (second, first)):
        span = one["high"] - one["low"]
        factor = OUTSIDE
        if not _is_float(one) and one["dtype"] not in ("uint8", "int8"):
            span, factor = max(span, 1.0), OUTSIDE_INTEGERS
        if min(one["n"], other["n"]) < ENOUGH:
            factor = OUTSIDE_FEW if min(one["n"], other["n"]) * _size(one) >= 16 else math.inf
        # That half of the samples exceed all of n others is no chance for n >= 20; for fewer, nine of ten must.
        high, low = (2, 2) if min(one["n"], other["n"]) >= 20 else (1, 3)
        beyond = factor * span
        reaches = other["highs"][high] > one["high"] + beyond or other["lows"][low] < one["low"] - beyond
        if span > 0 and reaches:
            ratio = (second["high"] - second["low"]) / max(first["high"] - first["low"], 1e-30)
            return (
                f"{names[0]} lies in {_span(first)} and {names[1]} in {_span(second)} (spans 1 : {ratio:.3g}): "
                "check scaling and normalization (0..255 or 0..1, mean and standard deviation)"
            )
    return None


def _whole(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    if not _is_float(first) or first["whole"] == second["whole"]:
        return None
    whole, other, label = (first, second, names[0]) if first["whole"] else (second, first, names[1])
    # A data set may hold single samples of whole numbers; hundreds of values that are, all of them, are no chance.
    if whole["n"] * _size(whole) < 256 or whole["high"] == whole["low"] or other["n"] < ENOUGH:
        return None
    return f"{label} holds whole numbers only, unlike {names[0] if label == names[1] else names[1]}: was it rounded?"


def _distribution(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    """Means or standard deviations of samples that do not overlap, and lie far apart."""
    if min(first["n"], second["n"]) < ENOUGH or not _is_float(first):
        return None
    unit = max(first["stds"][2], second["stds"][2])
    apart = abs(first["means"][2] - second["means"][2])
    noise = max(s["means"][3] - s["means"][1] for s in (first, second))
    if (
        _disjoint(first["means"], second["means"])
        and apart > SHIFT * unit
        and apart > noise
        and _size(first) > 1
    ):
        return (
            f"its mean is {first['means'][2]:.3g} in {names[0]} and {second['means'][2]:.3g} in {names[1]} "
            f"(standard deviation {unit:.3g}): check normalization, inversion and what the samples show"
        )
    low, high = sorted((first["stds"][2], second["stds"][2]))
    if _disjoint(first["stds"], second["stds"]) and high > CONTRAST * low and _size(first) >= 16:
        return (
            f"its standard deviation within a sample is {first['stds'][2]:.3g} in {names[0]} and "
            f"{second['stds'][2]:.3g} in {names[1]}: check normalization"
        )
    return None


def _neighbours(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    """Images whose values were reshaped, not transposed: colours of one pixel lie side by side, or no longer do."""
    a, b = first["steps"], second["steps"]
    if min(first["n"], second["n"]) < ENOUGH or not a or not b:
        return None
    low, high = sorted((a[2], b[2]))
    if low < 0 < INTERLEAVED < high and high - low > 4 * max(_noise(a, first["n"]), _noise(b, second["n"])):
        label, other = names if a[2] > b[2] else names[::-1]
        return (
            f"channels alternate from value to value in {label}, and not in {other}: "
            "check the layout (NCHW or NHWC: transpose, do not reshape)"
        )
    return None


def _noise(quantiles: Sequence[float], n: int) -> float:
    """Return the standard error of a median of n samples: 1.25 sigma / sqrt(n), and q90 - q10 is 2.56 sigma."""
    return 1.25 * (quantiles[3] - quantiles[1]) / 2.56 / math.sqrt(n)


def _channel_order(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> str | None:
    """First minus last of three channels has opposite signs and a like size, in both beyond what chance does."""
    if min(first["n"], second["n"]) < ENOUGH or not first["contrast"] or not second["contrast"]:
        return None
    a, b = first["contrast"], second["contrast"]
    noise = max(_noise(a, first["n"]), _noise(b, second["n"]))
    size = min(abs(a[2]), abs(b[2]))
    unit = max(first["stds"][2], second["stds"][2])
    if a[2] * b[2] < 0 and size > max(4 * noise, CONTRAST_LEAST * unit) and abs(a[2] + b[2]) < 1.25 * size:
        return (
            f"its first channel is {a[2]:+.3g} against its last in {names[0]} and {b[2]:+.3g} in {names[1]}: "
            "check the channel order (RGB or BGR)"
        )
    return None


def _disjoint(a: Sequence[float], b: Sequence[float]) -> bool:
    """Tell whether nine of ten of one lie beyond nine of ten of the other."""
    return a[3] < b[1] or b[3] < a[1]


def _size(summary: Mapping[str, Any]) -> int:
    return max(1, int(np.prod(summary["shape"])))


def _is_float(summary: Mapping[str, Any]) -> bool:
    return "float" in summary["dtype"]


def _span(summary: Mapping[str, Any]) -> str:
    return f"[{summary['low']:.4g}, {summary['high']:.4g}]"
