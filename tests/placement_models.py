"""A network with an operator that no fast unit takes; workers import this file as ``tests.placement_models``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

SHAPE = (1, 3, 48, 48)


class Cumulative(nn.Module):
    """Convolutions around a cumulative sum: XNNPACK has none, ONNX Runtime none on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU())
        self.after = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(48, 4, 1)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        hidden = self.before(picture)
        hidden = torch.cumsum(hidden, dim=3) / SHAPE[3]
        return self.head(self.after(hidden))  # type: ignore[no-any-return]  # nn.Module returns Any


def cumulative() -> tuple[Any, ...]:
    torch.manual_seed(0)
    return Cumulative().eval(), (torch.randn(SHAPE),), None


def cumulative_data() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(5)
    for _ in range(6):
        yield {"picture": rng.standard_normal(SHAPE).astype(np.float32)}
