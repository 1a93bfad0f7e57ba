"""How far an artifact's outputs are from the source model's: sums over samples, none of which is kept.

The figures, per output and pooled over samples and elements in float64 (integers and bools as numbers):

- sqnr_db: 10 log10(sum ref^2 / sum (ref - out)^2). JSON has no infinity: it is clipped to +-300 dB.
- worst_sqnr_db, worst_sample: the same of the worst single sample, and its index. A sample whose reference is
  all zero counts as -300 dB if its output is not, and is skipped if it is.
- cosine: between reference and output; null where the output is all zero. max_abs: largest error.
- identical: every sample has the reference's dtype and bits.
- agreement, agreement_n: share of rows with the same argmax on the last axis (of equals the first), and rows;
  null unless the output has rank 2 and at least 2 classes.
- agreement_margin: the same over the rows of which the reference is sure by ``margin``; null without one.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from portcall.targets.agent.errors import BadInput, VerificationFailed

_LIMIT_DB = 300.0


class ParityAccumulator:
    """Figures of the named outputs over the samples added so far."""

    def __init__(self, output_names: Sequence[str], margin: float = 0.1) -> None:
        if not output_names or len(set(output_names)) != len(output_names):
            raise BadInput(f"parity needs distinct output names; got {list(output_names)}")
        self._outputs = [_Output(name, margin) for name in output_names]
        self._n = 0

    def add(self, reference: Mapping[str, np.ndarray], output: Mapping[str, np.ndarray]) -> None:
        """Add one sample; a batch counts as one, its rows singly for the agreement.

        Raises VerificationFailed, and adds nothing, for an output that is missing, not numeric, of another shape than
        the reference or not finite.
        """
        checked = [(o, _checked(o.name, self._n, reference, output)) for o in self._outputs]
        for accumulator, (ref, out, identical) in checked:
            accumulator.add(ref, out, identical, self._n)
        self._n += 1

    def result(self, samples: str) -> Dict[str, Any]:
        """Return the parity object: the worst output's figures (lowest SQNR), and in "outputs" each one's.

        samples: what they were ("eval", "held-out", "example" or "synthetic").
        Raises VerificationFailed without samples, or if an output's reference is all zero or too large to square.
        """
        if self._n == 0:
            raise VerificationFailed("parity: no samples were compared", "Give at least one with --eval")
        outputs = [o.figures() for o in self._outputs]
        worst = dict(min(outputs, key=lambda o: (o["sqnr_db"], o["identical"])))
        del worst["name"]
        return {"reference": "source", "samples": samples, "n": self._n, **worst, "outputs": outputs}


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) of two energies, clipped to +-300; 300 where there is no noise."""
    if not (signal >= 0 and noise >= 0 and math.isfinite(signal) and math.isfinite(noise)):
        raise ValueError(f"energies must be finite and not negative: {signal}, {noise}")
    if noise == 0:
        return _LIMIT_DB
    if signal == 0:
        return -_LIMIT_DB
    return max(-_LIMIT_DB, min(_LIMIT_DB, 10 * (math.log10(signal) - math.log10(noise))))


def softmax_margin(logits: np.ndarray) -> np.ndarray:
    """Return, per row, the difference between the two largest softmax probabilities.

    logits: [..., classes >= 2]. A row that is a distribution already (no negative value, sum within 1e-3 of
    1) is taken as it is: softmax would flatten it.
    """
    values = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    is_distribution = (values.min(axis=-1) >= 0) & (np.abs(values.sum(axis=-1) - 1) <= 1e-3)
    probabilities = np.where(is_distribution[..., None], values, probabilities)
    largest = np.partition(probabilities, -2, axis=-1)[..., -2:]
    margins: np.ndarray = largest[..., 1] - largest[..., 0]
    return margins


class _Output:
    """The sums of one output."""

    def __init__(self, name: str, margin: float) -> None:
        self.name = name
        self._margin = margin
        self._signal = self._noise = self._output = self._product = self._max_abs = 0.0
        self._identical = True
        self._worst: Optional[Tuple[float, int]] = None
        self._ranked = True
        self._rows = self._agreed = self._sure_rows = self._sure_agreed = 0

    def add(self, reference: np.ndarray, output: np.ndarray, identical: bool, sample: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported by figures()
            ref, out = reference.ravel(), output.ravel()
            error = ref - out
            signal, noise = float(ref @ ref), float(error @ error)
            self._output += float(out @ out)
            self._product += float(ref @ out)
        self._signal += signal
        self._noise += noise
        self._identical = self._identical and identical
        if ref.size:
            self._max_abs = max(self._max_abs, float(np.abs(error).max()))
        if math.isfinite(signal) and math.isfinite(noise) and (signal > 0 or noise > 0):
            candidate = (decibels(signal, noise), sample)
            self._worst = candidate if self._worst is None else min(self._worst, candidate)
        if reference.ndim == 2 and reference.shape[1] >= 2:
            self._compare_rows(reference, output)
        else:
            self._ranked = False

    def _compare_rows(self, reference: np.ndarray, output: np.ndarray) -> None:
        same = reference.argmax(axis=-1) == output.argmax(axis=-1)
        sure = softmax_margin(reference) >= self._margin
        self._rows += same.size
        self._agreed += int(same.sum())
        self._sure_rows += int(sure.sum())
        self._sure_agreed += int((same & sure).sum())

    def figures(self) -> Dict[str, Any]:
        if not all(math.isfinite(v) for v in (self._signal, self._noise, self._output, self._product)):
            raise VerificationFailed(
                f"parity: the values of output {self.name!r} are too large to square in float64",
                "Scale the output, or leave it out of the model",
            )
        if self._signal == 0 or self._worst is None:
            raise VerificationFailed(
                f"parity: the source model's output {self.name!r} is zero on all samples: nothing is proved",
                "Give real samples with --eval or --data",
            )
        cosine = None
        if self._output > 0:
            cosine = self._product / (math.sqrt(self._signal) * math.sqrt(self._output))
            cosine = max(-1.0, min(1.0, cosine))
        agreement = self._agreed / self._rows if self._ranked and self._rows else None
        sure = None
        if agreement is not None and self._sure_rows:
            sure = {
                "margin": self._margin,
                "n": self._sure_rows,
                "agreement": self._sure_agreed / self._sure_rows,
            }
        return {
            "name": self.name,
            "sqnr_db": decibels(self._signal, self._noise),
            "worst_sqnr_db": self._worst[0],
            "worst_sample": self._worst[1],
            "cosine": cosine,
            "max_abs": self._max_abs,
            "identical": self._identical,
            "agreement": agreement,
            "agreement_n": None if agreement is None else self._rows,
            "agreement_margin": sure,
        }


def _checked(
    name: str, sample: int, reference: Mapping[str, np.ndarray], output: Mapping[str, np.ndarray]
) -> Tuple[np.ndarray, np.ndarray, bool]:
    """Return reference and output as finite float64 of one shape, and whether they were the same bits."""
    ref = _numbers(f"the source model's output {name!r}", name, reference)
    out = _numbers(f"output {name!r}", name, output)
    if ref.shape != out.shape:
        raise VerificationFailed(
            f"output {name!r} has shape {list(out.shape)}, "
            f"the source model's {list(ref.shape)} (sample {sample})",
            "The export changed the shape: give a model with fixed shapes, or other samples",
        )
    identical = ref.dtype == out.dtype and ref.tobytes() == out.tobytes()
    pair: List[np.ndarray] = []
    for what, array in ((f"the source model's output {name!r}", ref), (f"output {name!r}", out)):
        values = array.astype(np.float64)
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            raise VerificationFailed(
                f"{what} has {bad} of {values.size} values that are not finite (sample {sample})",
                "Look at that sample first; if only the export overflows, use a wider precision",
            )
        pair.append(values)
    return pair[0], pair[1], identical


def _numbers(what: str, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if name not in arrays:
        raise VerificationFailed(
            f"{what} is missing; there are: {', '.join(sorted(arrays)) or 'none'}", "Export again"
        )
    array = np.asarray(arrays[name])
    # "V": NumPy's kind for bfloat16 and other types of ml_dtypes, which convert to float64.
    if array.dtype.kind not in "biufV" or array.dtype.names is not None:
        raise VerificationFailed(
            f"{what} has dtype {array.dtype}: parity compares real numbers only", "Return real numbers"
        )
    return array
