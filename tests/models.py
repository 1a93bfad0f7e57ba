"""Small models and data for the tests; workers import this file as ``tests.models`` from the repository's root."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from examples.digits import calibration as digits_calibration
from examples.digits import evaluation as digits_test
from examples.digits import model as digits
from examples.efficientnet_lite0 import evaluation as efficientnet_crops

__all__ = ["digits", "digits_calibration", "digits_test"]

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


def training_mode() -> tuple[Any, ...]:
    return TinyCnn().train(), (torch.randn(2, 3, 16, 16),)


def new_weights() -> tuple[Any, ...]:
    return TinyCnn().eval(), (torch.randn(2, 3, 16, 16),)


def raises() -> tuple[Any, ...]:
    raise ValueError("the user's own mistake")


def returns_nonsense() -> int:
    return 3


class Decomposed(nn.Module):
    """Singular values: no format has them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, values, _ = torch.linalg.svd(x)
        return values  # type: ignore[no-any-return]  # torch.linalg ships no types


def decomposed() -> tuple[Any, ...]:
    return Decomposed().eval(), (torch.randn(1, 4, 4),), None


def few_crops() -> Iterator[Sample]:
    """Yield 24 of the crops that EfficientNet-Lite0's example is evaluated on."""
    return islice(efficientnet_crops(), 24)
