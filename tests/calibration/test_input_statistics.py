"""Statistics of DATA: what is planted is told, and honest parts of one data set are alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from portcall.calibration.input_statistics import KEPT, InputStatistics, compare

Array = npt.NDArray[Any]
IMAGENET = (
    np.array([0.485, 0.456, 0.406], np.float32)[:, None, None],
    np.array([0.229, 0.224, 0.225], np.float32)[:, None, None],
)


def summary(samples: Array) -> dict[str, dict[str, Any] | None]:
    statistics = InputStatistics()
    for sample in samples:
        statistics.add(sample[None])
    found: dict[str, dict[str, Any] | None] = json.loads(json.dumps({"x": statistics.summary()}))
    return found


def differences(first: Array, second: Array) -> list[str]:
    return compare(summary(first), summary(second))


@pytest.fixture(scope="module")
def digits() -> Array:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="pip install scikit-learn: it brings the digits"
    )
    images = np.asarray(datasets.load_digits().images, np.float32) / 16
    return images[np.random.default_rng(0).permutation(len(images)), None]


@pytest.fixture(scope="module")
def photographs() -> list[Array]:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="pip install scikit-learn: it brings the photographs"
    )
    pytest.importorskip("PIL", reason="pip install pillow: the photographs are JPEG files")
    return [np.asarray(i, np.float32) / 255 for i in datasets.load_sample_images().images]


def crops(photographs: list[Array], n: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(n):
        photograph = photographs[index % len(photographs)]
        y, x = (int(rng.integers(0, d - 48)) for d in photograph.shape[:2])
        made.append(photograph[y : y + 48, x : x + 48].transpose(2, 0, 1))
    return np.stack(made)


@pytest.mark.parametrize(("few", "many"), [(1, 50), (4, 4), (10, 30), (100, 100)])
def test_parts_of_one_data_set_are_alike(
    digits: Array, photographs: list[Array], few: int, many: int
) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(digits))
        first, second = digits[order[:few]], digits[order[few : few + many]]
        assert differences(first, second) == differences(second, first) == []
        cropped = crops(photographs, few + many, seed)
        assert differences(cropped[:few], cropped[few:]) == []
        whole = (255 * cropped).astype(np.uint8)
        assert differences(whole[:few], whole[few:]) == []
        features = np.exp(rng.standard_normal((few + many, 7)).astype(np.float32)) * np.arange(
            1, 8, dtype="f4"
        )
        assert differences(features[:few], features[few:]) == []


def test_token_ids_masks_and_positions_are_alike() -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 30522, (40, length)) for length in (8, 64)]
    masks = [(rng.random((40, 16)) < 0.9).astype(np.int64), np.ones((40, 128), np.int64)]
    positions = [np.tile(np.arange(length), (40, 1)) for length in (16, 128)]
    zeros = [np.zeros((40, 16), np.int64), np.zeros((40, 9), np.int64)]
    for first, second in (ids, masks, positions, zeros, [zeros[0], masks[0]]):
        assert differences(first, second) == differences(second, first) == []


PLANTED: dict[str, tuple[Callable[[Array], Array], str]] = {
    "scaled by 255": (lambda x: x * 255, "scaling"),
    "scaled by 1/255": (lambda x: x / 255, "scaling"),
    "-1 to 1": (lambda x: 2 * x - 1, "normalization"),
    "mean left out": (lambda x: x - x.mean(), "normalization"),
    "inverted": (lambda x: 1 - x, "inversion"),
    "all zero": (lambda x: 0 * x, "all values of --eval are 0"),
    "one number each": (lambda x: 0 * x + x.mean(axis=(1, 2, 3), keepdims=True), "constant"),
    "rounded": (np.rint, "whole numbers"),
    "raw pixels": (lambda x: np.rint(x * 16), "scaling"),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("n", [20, 300])
def test_a_planted_difference_is_told_from_both_sides(digits: Array, kind: str, n: int) -> None:
    change, word = PLANTED[kind]
    first, second = digits[:n], np.asarray(change(digits[n : 2 * n]), np.float32)
    [sentence] = differences(first, second)
    assert "input 'x'" in sentence and word in sentence
    [sentence] = differences(second, first)
    assert word.replace("--eval", "--data") in sentence


@pytest.mark.parametrize("n", [1, 3])
def test_a_few_samples_tell_0_to_255_from_0_to_1(digits: Array, n: int) -> None:
    for seed in range(5):
        first, second = (
            digits[seed * 2 * n : (seed * 2 + 1) * n],
            digits[(seed * 2 + 1) * n : (seed + 1) * 2 * n],
        )
        assert "scaling" in differences(first, 255 * second)[0]


def test_layout_and_channel_order_of_photographs(photographs: list[Array]) -> None:
    first, second = crops(photographs, 100, 1), crops(photographs, 100, 2)
    assert "layout" in differences(first, second.transpose(0, 2, 3, 1))[0]
    reshaped = np.ascontiguousarray(second.transpose(0, 2, 3, 1)).reshape(second.shape)
    assert "transpose, do not reshape" in differences(first, reshaped)[0]
    warm = np.array([1, 0.8, 0.6], np.float32)[:, None, None]
    assert differences(warm * first, warm * second) == []
    assert "channel order" in differences(warm * first, (warm * second)[:, ::-1])[0]
    last = (warm * first).transpose(0, 2, 3, 1), (warm * second).transpose(0, 2, 3, 1)
    assert "channel order" in differences(last[0], last[1][..., ::-1])[0]
    mean, std = IMAGENET
    assert "normalization" in differences(first, (second - mean) / std)[0]


def test_swapped_inputs_of_a_language_model() -> None:
    ids, mask = np.random.default_rng(0).integers(0, 30522, (40, 16)), np.ones((40, 16), np.int64)
    assert differences(ids, mask) and differences(mask, ids)
    assert differences(ids, 100 * ids)


def test_memory_is_bounded_and_the_last_samples_count() -> None:
    statistics = InputStatistics()
    for value in range(3 * KEPT):
        statistics.add(np.full((1, 2), value, np.float32))
    found = statistics.summary()
    assert found is not None and found["n"] == 3 * KEPT and found["high"] > 2.9 * KEPT
    assert len(statistics._rows) <= KEPT
    assert InputStatistics().summary() is None


def test_what_cannot_be_compared_is_left_out() -> None:
    floats = summary(np.ones((3, 4), np.float32))
    assert compare(floats, {}) == compare({}, floats) == compare({"x": None}, floats) == []
