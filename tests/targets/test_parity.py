from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from portcall.targets.agent.errors import BadInput, CellFailed
from portcall.targets.agent.parity import ParityAccumulator, decibels, softmax_margin


def compare(*pairs: tuple[Any, Any], margin: float = 0.1) -> dict[str, Any]:
    accumulator = ParityAccumulator(["y"], margin)
    for reference, output in pairs:
        accumulator.add({"y": np.asarray(reference)}, {"y": np.asarray(output)})
    result = accumulator.result("eval")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


def test_figures_pool_samples_and_elements() -> None:
    rng = np.random.default_rng(7)
    pairs = [
        (r, r + rng.normal(0, 0.01 * (i + 1), r.shape)) for i, r in enumerate(rng.normal(size=(5, 2, 3, 4)))
    ]
    result = compare(*pairs)
    ref = np.concatenate([r.ravel() for r, _ in pairs])
    out = np.concatenate([o.ravel() for _, o in pairs])
    assert result["sqnr_db"] == pytest.approx(10 * math.log10((ref**2).sum() / ((ref - out) ** 2).sum()))
    singles = [10 * math.log10((r**2).sum() / ((r - o) ** 2).sum()) for r, o in pairs]
    assert result["worst_sqnr_db"] == pytest.approx(min(singles))
    assert result["worst_sample"] == int(np.argmin(singles))
    assert result["cosine"] == pytest.approx(ref @ out / np.linalg.norm(ref) / np.linalg.norm(out))
    assert result["max_abs"] == pytest.approx(np.abs(ref - out).max())
    assert (result["reference"], result["samples"], result["n"]) == ("source", "eval", 5)
    assert result["identical"] is False
    assert result["agreement"] is None
    assert result["agreement_margin"] is None


def test_identical_outputs_are_capped_and_say_so() -> None:
    result = compare(([1.0, 2.0], [1.0, 2.0]))
    assert (result["sqnr_db"], result["worst_sqnr_db"], result["identical"]) == (300.0, 300.0, True)
    assert (result["cosine"], result["max_abs"]) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize(
    ("reference", "output"),
    [
        (np.array([1.0, 0.0]), np.array([1.0, -0.0])),
        (np.array([1, 2], np.int32), np.array([1, 2], np.int64)),
    ],
)
def test_equal_values_of_other_bits_are_not_identical(reference: np.ndarray, output: np.ndarray) -> None:
    result = compare((reference, output))
    assert (result["sqnr_db"], result["identical"]) == (300.0, False)


def test_one_differing_sample_ends_identical() -> None:
    result = compare(([1.0], [1.0]), ([1.0], [1.5]), ([1.0], [1.0]))
    assert result["identical"] is False
    assert result["worst_sample"] == 1


def test_integers_and_bools_are_compared_as_numbers() -> None:
    result = compare((np.array([250, 3], np.uint8), np.array([3, 250], np.uint8)))
    assert result["max_abs"] == 247.0
    assert compare((np.array([True, False]), np.array([True, True])))["max_abs"] == 1.0


def test_agreement_counts_rows() -> None:
    reference = np.array([[0.0, 5.0], [5.0, 0.0], [0.0, 5.0], [0.0, 0.01]])
    output = np.array([[0.0, 4.0], [0.0, 5.0], [0.0, 6.0], [0.02, 0.0]])
    for pairs in ([(reference, output)], list(zip(reference[:, None], output[:, None], strict=True))):
        result = compare(*pairs)
        assert (result["agreement"], result["agreement_n"]) == (0.5, 4)
        assert result["agreement_margin"] == {"margin": 0.1, "n": 3, "agreement": pytest.approx(2 / 3)}


def test_agreement_margin_without_a_sure_row_is_null() -> None:
    result = compare(([[0.0, 0.01]], [[0.01, 0.0]]))
    assert (result["agreement"], result["agreement_margin"]) == (0.0, None)
    assert compare(([[0.0, 0.01]], [[0.01, 0.0]]), margin=0.0)["agreement_margin"]["n"] == 1


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 2, 3), ()])
def test_agreement_needs_rank_2_and_2_classes(shape: tuple[int, ...]) -> None:
    result = compare((np.ones(shape), np.full(shape, 1.5)))
    assert (result["agreement"], result["agreement_n"], result["agreement_margin"]) == (None, None, None)


def test_agreement_is_null_if_any_sample_has_another_rank() -> None:
    assert compare(([[1.0, 2.0]], [[1.0, 2.0]]), ([1.0, 2.0], [1.0, 2.0]))["agreement"] is None


def test_of_several_outputs_the_worst_is_on_top() -> None:
    accumulator = ParityAccumulator(["good", "bad"])
    reference = {"good": np.ones(3), "bad": np.ones((1, 3))}
    accumulator.add(reference, {"good": np.ones(3), "bad": np.full((1, 3), 1.1), "more": np.ones(1)})
    result = accumulator.result("held-out")
    assert result["sqnr_db"] == pytest.approx(20.0)
    assert [o["name"] for o in result["outputs"]] == ["good", "bad"]
    assert result["outputs"][0]["sqnr_db"] == 300.0
    assert result["agreement"] == result["outputs"][1]["agreement"] == 1.0
    assert "name" not in result


def test_a_zero_reference_in_one_sample() -> None:
    good = (np.ones(2), np.array([1.0, 1.1]))
    skipped = compare((np.zeros(2), np.zeros(2)), good)
    assert skipped["worst_sample"] == 1
    assert skipped["n"] == 2
    counted = compare(good, (np.zeros(2), np.array([0.0, 0.1])))
    assert (counted["worst_sqnr_db"], counted["worst_sample"]) == (-300.0, 1)


def test_an_all_zero_output_has_no_cosine() -> None:
    result = compare(([1.0, 2.0], [0.0, 0.0]))
    assert (result["cosine"], result["sqnr_db"]) == (None, pytest.approx(0.0))


def test_failures_are_named() -> None:
    with pytest.raises(CellFailed, match="no samples"):
        ParityAccumulator(["y"]).result("eval")
    with pytest.raises(CellFailed, match="'y' is zero on all samples"):
        compare((np.zeros(3), np.ones(3)))
    with pytest.raises(CellFailed, match="'y' is zero on all samples"):
        compare((np.zeros((0, 3)), np.zeros((0, 3))))
    with pytest.raises(
        CellFailed, match=r"output 'y' has shape \[1, 3\], the source model's \[3\] \(sample 0\)"
    ):
        compare((np.ones(3), np.ones((1, 3))))
    with pytest.raises(CellFailed, match=r"^output 'y' has 2 of 3 values that are not finite \(sample 1\)"):
        compare((np.ones(3), np.ones(3)), (np.ones(3), np.array([np.nan, np.inf, 1.0])))
    with pytest.raises(CellFailed, match="source model's output 'y' has 1 of 1 values"):
        compare(([-np.inf], [1.0]))
    with pytest.raises(CellFailed, match="output 'y' is missing; there are: z"):
        ParityAccumulator(["y"]).add({"y": np.ones(1)}, {"z": np.ones(1)})
    with pytest.raises(CellFailed, match="output 'y' has dtype <U1"):
        compare((["a"], ["b"]))
    with pytest.raises(CellFailed, match="too large to square"):
        compare(([1e200], [1.0]))
    with pytest.raises(BadInput, match="distinct output names"):
        ParityAccumulator(["y", "y"])


def test_a_refused_sample_adds_nothing() -> None:
    accumulator = ParityAccumulator(["a", "b"])
    ones = {"a": np.ones(2), "b": np.ones(2)}
    accumulator.add(ones, ones)
    with pytest.raises(CellFailed):
        accumulator.add(ones, {"a": np.zeros(2), "b": np.array([1.0, np.nan])})
    result = accumulator.result("eval")
    assert (result["n"], result["identical"]) == (1, True)


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
    assert decibels(1.0, 0.0) == decibels(0.0, 0.0) == 300.0
    assert decibels(0.0, 1.0) == -300.0
    assert decibels(1e300, 1e-300) == 300.0
    for signal, noise in ((-1.0, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="finite and not negative"):
            decibels(signal, noise)


def test_softmax_margin_of_logits_and_of_probabilities() -> None:
    rows = np.array([[0.0, math.log(3.0), -1000.0], [0.7, 0.2, 0.1], [1000.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
    margins = softmax_margin(rows)
    assert margins == pytest.approx([0.5, 0.5, 1.0, 0.0])
