"""A small real classifier and its labelled data: scikit-learn's 8x8 digits.

Its convolutional features are drawn by seed and its linear readout is solved in closed form, so that it needs no
training time and is the same on every call. ``model`` is the factory, ``calibration`` and ``evaluation`` are DATA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

Sample = dict[str, Any]
BATCH = {0: torch.export.Dim.DYNAMIC}


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


def model() -> tuple[Any, ...]:
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


def calibration() -> Iterator[Sample]:
    images, _ = _digits_arrays()
    for image in images[:100]:
        yield {"image": image[None]}


def evaluation() -> Iterator[Sample]:
    """300 images that the readout was not solved on, with labels."""
    images, labels = _digits_arrays()
    for image, label in zip(images[1200:1500], labels[1200:1500], strict=True):
        yield {"image": image[None], "label": int(label)}
