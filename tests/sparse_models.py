"""Pruned and parametrized networks for the tests; workers import this file as ``tests.sparse_models``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.models import BATCH, TinyCnn, _settled, tiny_cnn_data

Sample = dict[str, Any]


class Layouts(nn.Module):
    """Every kind of convolution and a linear layer, each weight of its own shape, 40 % zero."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(16, 5, 2, 2) if transposed else nn.Conv2d(16, 5, 2)
        self.head = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(torch.relu(self.depthwise(torch.relu(self.grouped(torch.relu(self.plain(x)))))))
        return self.head(y.permute(0, 2, 3, 1))  # type: ignore[no-any-return]  # nn.Module returns Any


def layouts() -> tuple[Any, ...]:
    return _layouts(True)


def layouts_without_transposed() -> tuple[Any, ...]:
    return _layouts(False)


def _layouts(transposed: bool) -> tuple[Any, ...]:
    torch.manual_seed(1)
    module = Layouts(transposed).eval()
    with torch.no_grad():
        for part in module.children():
            weight = part.weight
            assert isinstance(weight, torch.Tensor)
            weight *= torch.rand_like(weight) > 0.4
    return module, (torch.randn(1, 4, 6, 6),)


def _layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _tiny() -> nn.Module:
    torch.manual_seed(0)
    return _settled(TinyCnn(), (2, 3, 16, 16))


def pruned() -> tuple[Any, ...]:
    """TinyCnn with half of each layer's weights masked by torch.nn.utils.prune, the masks still on."""
    module = _tiny()
    for part in _layers(module):
        prune.l1_unstructured(part, "weight", 0.5)  # type: ignore[no-untyped-call]  # torch types it not
    return module.eval(), (torch.randn(2, 3, 16, 16),), (BATCH,)


def two_of_four() -> tuple[Any, ...]:
    """TinyCnn whose pointwise and linear layers keep the two largest of each 4 inputs; no masks."""
    module = _tiny()
    assert isinstance(module, TinyCnn)
    with torch.no_grad():
        for part in (module.pointwise[0], module.head):
            weight = part.weight
            assert isinstance(weight, torch.Tensor)
            groups = weight.reshape(weight.shape[0], -1, 4)
            groups.scatter_(2, groups.abs().argsort(2)[:, :, :2], 0)
    return module, (torch.randn(2, 3, 16, 16),), (BATCH,)


def normed() -> tuple[Any, ...]:
    """TinyCnn with the parametrization weight_norm in one layer and the older hook in another."""
    module = _tiny()
    assert isinstance(module, TinyCnn)
    parametrizations.weight_norm(module.stem[0])
    with torch.no_grad():
        torch.nn.utils.weight_norm(module.head)
    return module.eval(), (torch.randn(2, 3, 16, 16),), (BATCH,)


def partly_training() -> tuple[Any, ...]:
    """TinyCnn in eval mode with one batch normalization in training mode."""
    module = _tiny()
    assert isinstance(module, TinyCnn)
    module.stem[1].train()
    return module, (torch.randn(2, 3, 16, 16),), (BATCH,)


def few() -> Iterator[Sample]:
    """Six samples: enough to calibrate what nobody judges by its accuracy."""
    return itertools.islice(tiny_cnn_data(), 6)


def zeros_of(module: nn.Module) -> dict[str, int]:
    """Return how many weights of each layer are exactly zero."""
    named = {n: m for n, m in module.named_modules() if m in _layers(module)}
    return {n: int(np.count_nonzero(_numpy(m.weight) == 0)) for n, m in named.items()}


def _numpy(tensor: Any) -> np.ndarray[Any, Any]:
    return np.asarray(tensor.detach().numpy())
