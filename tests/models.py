"""Small models and data for the tests; workers import this file as ``tests.models`` from the repository's root.

``digits`` is a real classifier of scikit-learn's digits: convolutional features drawn by seed, and a linear readout
solved in closed form, so that it needs no training time and is the same on every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

Sample = dict[str, Any]
BATCH = {0: torch.export.Dim.DYNAMIC}


class TinyCnn(nn.Module):
    """conv-BN-ReLU, depthwise conv-BN-ReLU6, residual add, global pool, linear: what an int8 CNN is made of."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.pointwise(self.depthwise(x))
        return self.head(torch.flatten(self.pool(x), 1))  # type: ignore[no-any-return]  # nn.Module returns Any


def _settled(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Return *module* in eval mode after some train-mode forwards, so that its batch statistics are not trivial."""
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(torch.randn(16, *shape[1:]))
    return module.eval()


def tiny_cnn() -> tuple[Any, ...]:
    torch.manual_seed(0)
    shape = (2, 3, 16, 16)
    return _settled(TinyCnn(), shape), (torch.randn(shape),), (BATCH,)


def tiny_cnn_data() -> Iterator[Sample]:
    rng = np.random.default_rng(3)
    for _ in range(24):
        yield {"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)}


class TwoInputs(nn.Module):
    """Token ids (int64, dynamic batch and sequence) and a float vector; two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(20, 5)

    def forward(self, token_ids: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.mix(self.embedding(token_ids)))
        pooled = torch.cat([hidden.mean(1), features], dim=1)
        return {"scores": self.head(pooled), "hidden": hidden}


def two_inputs() -> tuple[Any, ...]:
    torch.manual_seed(0)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    examples = {"token_ids": torch.randint(0, 50, (2, 7)), "features": torch.randn(2, 4)}
    return TwoInputs().eval(), examples, {"token_ids": {0: batch, 1: sequence}, "features": {0: batch}}


def two_inputs_data() -> Iterator[Sample]:
    rng = np.random.default_rng(4)
    for _ in range(12):
        yield {
            "token_ids": rng.integers(0, 50, (1, 7)),
            "features": rng.standard_normal((1, 4)).astype(np.float32),
        }


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()
        )
        self.readout = nn.Linear(64 * 16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.flatten(self.features(image), 1))  # type: ignore[no-any-return]


def _digits_arrays() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], data.target[order]


def digits() -> tuple[Any, ...]:
    torch.manual_seed(0)
    network = Digits().eval()
    images, labels = _digits_arrays()
    with torch.no_grad():
        features = torch.flatten(network.features(torch.from_numpy(images[:1200])), 1).double()
        features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
        wanted = torch.nn.functional.one_hot(torch.from_numpy(labels[:1200]), 10).double() * 2 - 1
        gram = features.T @ features + 0.1 * torch.eye(features.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, features.T @ wanted)
        network.readout.weight.copy_(solution[:-1].T.float())
        network.readout.bias.copy_(solution[-1].float())
    return network, (torch.from_numpy(images[:2]),), (BATCH,)


def digits_calibration() -> Iterator[Sample]:
    images, _ = _digits_arrays()
    for image in images[:100]:
        yield {"image": image[None]}


def digits_test() -> Iterator[Sample]:
    """300 images that the readout was not solved on, with labels."""
    images, labels = _digits_arrays()
    for image, label in zip(images[1200:1500], labels[1200:1500], strict=True):
        yield {"image": image[None], "label": int(label)}


def training_mode() -> tuple[Any, ...]:
    return TinyCnn().train(), (torch.randn(2, 3, 16, 16),)


def raises() -> tuple[Any, ...]:
    raise ValueError("the user's own mistake")


def returns_nonsense() -> int:
    return 3
