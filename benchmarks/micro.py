"""``python -m benchmarks.micro``: five small networks in TensorFlow Lite Micro, against LiteRT and the float source.

The four kinds of MLPerf Tiny - ResNet-8 on 32x32x3, DS-CNN on 49x10, MobileNetV1-0.25 at 96x96, an autoencoder of 640
inputs - trained here in a few minutes on data that is made here, and the digits CNN of ``examples/digits.py``. They
have the benchmark's shapes and not its data: the accuracies compare runtimes, they are no MLPerf results.
Long because each network brings its data and its training.

- gratings (ResNet-8, 10 classes): coloured gratings whose angle is the class's, off by N(0, 5 degrees), under noise.
- chirps (DS-CNN, 12 classes): a ridge that moves over 49 frames of 10 bands; start and slope are the class's, jittered.
- rings (MobileNet, 2 classes): concentric rings at a random place, from too faint to plain, or none, over clutter.
- spectra (autoencoder): five frames of 128 bands of a harmonic sound; an anomaly has one harmonic detuned and weaker.
- digits: the 597 images that the readout was not solved on, up to four times each under noise N(0, 0.1).

Factories (``benchmarks.micro:resnet8``) load the weights that the script trained and keeps in the folder that the
variable PORTCALL_MICRO names (build/micro unless set). Long because networks, data and comparison are one script.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import portcall
from examples import digits
from portcall.bench.report import align

Array = np.ndarray[Any, Any]
Labelled = tuple[Array, Array]
VARIABLE = "PORTCALL_MICRO"
BATCH = 64


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after))
        self.short = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(self.first(x)) + self.short(x))


def _convolution(
    before: int, after: int, kernel: Any, stride: Any, padding: Any, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


def _separable(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _convolution(before, before, 3, stride, 1, before), _convolution(before, after, 1, 1, 0)
    )


def _head(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _resnet8() -> nn.Module:
    """3x32x32 -> 10 logits; 12.5 million multiply-accumulates."""
    blocks = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
    return nn.Sequential(_convolution(3, 16, 3, 1, 1), *blocks, _head(64, 10))


def _ds_cnn() -> nn.Module:
    """1x49x10 -> 12 logits; 2.7 million multiply-accumulates."""
    return nn.Sequential(
        _convolution(1, 64, (10, 4), 2, (5, 1)), *(_separable(64, 64, 1) for _ in range(4)), _head(64, 12)
    )


def _mobilenet() -> nn.Module:
    """3x96x96 -> 2 logits, a quarter of MobileNetV1's channels; 7.5 million multiply-accumulates."""
    plan = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)]
    layers, before = [_convolution(3, 8, 3, 2, 1)], 8
    for after, stride in plan:
        layers.append(_separable(before, after, stride))
        before = after
    return nn.Sequential(*layers, _head(256, 2))


def _autoencoder() -> nn.Module:
    """640 -> 128 x4 -> 8 -> 128 x4 -> 640; 0.26 million multiply-accumulates."""
    widths = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


def gratings(n: int, seed: int) -> Labelled:
    """Return float32[n, 3, 32, 32] and the classes 0 to 9."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n)
    angle = np.deg2rad(labels * 18 + rng.normal(0, 5, n))[:, None, None]
    y, x = np.mgrid[:32, :32]
    frequency = rng.uniform(0.5, 0.9, (n, 1, 1))
    wave = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi, (n, 1, 1)))
    colours = rng.uniform(0.2, 1.0, (n, 3, 1, 1))
    return (wave[:, None] * colours + rng.normal(0, 1.0, (n, 3, 32, 32))).astype(np.float32), labels


def chirps(n: int, seed: int) -> Labelled:
    """Return float32[n, 1, 49, 10] and the classes 0 to 11: four starts by three slopes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, n)
    start = (labels % 4 * 2.2 + 1.2 + rng.normal(0, 0.45, n))[:, None, None]
    slope = ((labels // 4 - 1) * 0.06 + rng.normal(0, 0.012, n))[:, None, None]
    frame, band = np.mgrid[:49, :10]
    ridge = np.exp(-((band - start - slope * (frame - 24)) ** 2) / 0.8)
    return (2 * ridge[:, None] + rng.normal(0, 0.8, (n, 1, 49, 10))).astype(np.float32), labels


def rings(n: int, seed: int) -> Labelled:
    """Return float32[n, 3, 96, 96] and the classes: 1 with a ring, 0 without."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    y, x = np.mgrid[:96, :96].astype(np.float32)
    images = np.float32(0.4) * rng.standard_normal((n, 3, 96, 96), np.float32)
    for image, label in zip(images, labels, strict=True):
        centre_y, centre_x, angle, phase = rng.uniform((24, 24, 0, 0), (72, 72, 6.28, 6.28))
        radius = np.hypot(y - centre_y, x - centre_x)
        ring = np.sin(0.8 * radius + phase) * np.exp(-((radius / 20) ** 2)) * rng.uniform(0.1, 1.5)
        clutter = np.sin(rng.uniform(0.05, 0.3) * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        image += (label * ring + 0.5 * clutter) * rng.uniform(0.5, 1, (3, 1, 1))
    return images, labels


def spectra(n: int, seed: int) -> Labelled:
    """Return float32[n, 640] of five frames and 0 for normal sounds, 1 for anomalies (half of them)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    harmonic = np.arange(1, 7)
    place = rng.uniform(15, 20, (n, 1)) * harmonic
    level = rng.uniform(0.7, 1.3, (n, 1)) / np.sqrt(harmonic) * np.ones((n, 1))
    which = rng.integers(1, 6, n)
    place[np.arange(n), which] += labels * rng.uniform(2.0, 8.0, n)
    level[np.arange(n), which] *= 1 - 0.3 * labels
    band = np.arange(128)
    frame = (np.exp(-((band - place[..., None]) ** 2) / 6) * level[..., None]).sum(1)
    return (np.tile(frame, (1, 5)) + rng.normal(0, 0.1, (n, 640))).astype(np.float32), labels


def normal_spectra(n: int, seed: int) -> Labelled:
    """Return normal sounds only, as an autoencoder learns."""
    images, labels = spectra(3 * n, seed)
    return images[labels == 0][:n], labels[labels == 0][:n]


def noisy_digits(n: int, seed: int) -> Labelled:
    """Return digits that the readout was not solved on, up to four times each under noise drawn by seed."""
    images, labels = digits._digits_arrays()
    rng = np.random.default_rng(seed)
    images, labels = np.tile(images[1200:], (4, 1, 1, 1)), np.tile(labels[1200:], 4)
    noise = np.float32(0.1) * rng.standard_normal(images.shape, np.float32)
    return (images + noise)[:n], labels[:n]


@dataclass(frozen=True)
class Network:
    """A network and its data. train: samples to learn from; epochs: passes over them; 0: it needs no training."""

    name: str
    factory: str
    input: str
    build: Callable[[], nn.Module]
    data: Callable[[int, int], Labelled]
    test: Callable[[int, int], Labelled]
    train: int
    epochs: int
    reconstructs: bool = False


NETWORKS = (
    Network("resnet8", "benchmarks.micro:resnet8", "input", _resnet8, gratings, gratings, 4000, 6),
    Network("ds_cnn", "benchmarks.micro:ds_cnn", "input", _ds_cnn, chirps, chirps, 4000, 5),
    Network("mobilenet", "benchmarks.micro:mobilenet", "input", _mobilenet, rings, rings, 3000, 6),
    Network(
        "autoencoder",
        "benchmarks.micro:autoencoder",
        "input",
        _autoencoder,
        normal_spectra,
        spectra,
        12000,
        25,
        reconstructs=True,
    ),
    Network(
        "digits",
        "examples.digits:model",
        "image",
        lambda: digits.model()[0],
        noisy_digits,
        noisy_digits,
        0,
        0,
    ),
)


def _trained(name: str) -> tuple[Any, ...]:
    """Return the module with its stored weights, an example input, and its dynamic batch."""
    [network] = [n for n in NETWORKS if n.name == name]
    module = network.build()
    module.load_state_dict(torch.load(_weights(network), weights_only=True))
    return module.eval(), (torch.from_numpy(network.test(2, 1)[0]),), ({0: torch.export.Dim.DYNAMIC},)


resnet8 = partial(_trained, "resnet8")
ds_cnn = partial(_trained, "ds_cnn")
mobilenet = partial(_trained, "mobilenet")
autoencoder = partial(_trained, "autoencoder")


def _weights(network: Network) -> Path:
    return Path(os.environ.get(VARIABLE, "build/micro")) / f"{network.name}.pt"


def train(network: Network) -> None:
    """Train once, by Adam with a cosine schedule, and store the weights; nothing is done where they are there."""
    path = _weights(network)
    if path.is_file() or not network.epochs:
        return
    torch.manual_seed(0)
    module = network.build().train()
    images, labels = network.data(network.train, 100)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    steps = network.epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(network.epochs):
        total = 0.0
        for batch in torch.randperm(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
            found = module(x[batch])
            loss = (
                functional.mse_loss(found, x[batch])
                if network.reconstructs
                else functional.cross_entropy(found, y[batch])
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        _progress(f"{network.name}: epoch {epoch + 1} of {network.epochs}, loss {total * BATCH / len(x):.4f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), path)


def compare(network: Network, n: int, folder: Path, precision: str = "int8") -> dict[str, Any]:
    """Export *network* to tflite_micro, run *n* test samples everywhere, and return the row of the table.

    accuracy: fraction right (autoencoder: area under the ROC curve of the reconstruction error), by runtime. identical:
    fraction of samples whose whole output equals TFLM's bit for bit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calibration = folder / f"{network.name}.npz"
    learned: dict[str, Any] = {network.input: network.data(200, 200)[0]}
    np.savez(calibration, **learned)
    shutil.rmtree(folder / network.name, ignore_errors=True)  # of weights that were trained before
    answer = portcall.export(
        network.factory, [f"tflite_micro:{precision}"], folder / network.name, data=calibration
    )
    [result] = answer["results"]
    if result["path"] is None:
        return {"network": network.name, "reason": result["reason"]}
    artifact = Path(result["path"])
    memory = json.loads((artifact / "memory.json").read_text())
    images, labels = network.test(n, 300)
    outputs: dict[str, Array] = {}
    for name, run in (("float", _source(network)), *_runtimes(artifact / "model.tflite")):
        start = time.perf_counter()
        outputs[name] = np.concatenate([run(images[i : i + 1]) for i in range(len(images))])
        _progress(f"{network.name}: {name} took {time.perf_counter() - start:.0f} s")
    score = {name: _score(network, images, labels, found) for name, found in outputs.items()}
    micro = outputs["tflm"]
    same = {k: float((v == micro).all(1).mean()) for k, v in outputs.items() if k not in ("float", "tflm")}
    return {
        "network": network.name,
        "n": len(images),
        "arena_bytes": memory["arena"]["bytes"],
        "arena_reported_bytes": memory["arena"]["reported_bytes"],
        "flash_bytes": memory["flash"]["model_bytes"],
        "metric": "AUC" if network.reconstructs else "top-1",
        "accuracy": score,
        "identical": same,
    }


def _score(network: Network, images: Array, labels: Array, outputs: Array) -> float:
    if not network.reconstructs:
        return float((outputs.argmax(1) == labels).mean())
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, ((outputs - images) ** 2).mean(1)))


Run = Callable[[Array], Array]


def _source(network: Network) -> Run:
    module = digits.model()[0] if not network.epochs else _trained(network.name)[0]

    def run(x: Array) -> Array:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(x)).numpy())

    return run


def _runtimes(model: Path) -> Iterator[tuple[str, Run]]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType
    from tflite_micro.python.tflite_micro import runtime

    for name, kind in (
        ("litert_reference", OpResolverType.BUILTIN_REF),
        ("litert_xnnpack", OpResolverType.AUTO),
    ):
        interpreter = Interpreter(str(model), experimental_op_resolver_type=kind)
        interpreter.allocate_tensors()
        first, last = (
            interpreter.get_input_details()[0]["index"],
            interpreter.get_output_details()[0]["index"],
        )

        def litert(x: Array, interpreter: Any = interpreter, first: int = first, last: int = last) -> Array:
            interpreter.set_tensor(first, x)
            interpreter.invoke()
            return np.asarray(interpreter.get_tensor(last))

        yield name, litert
    micro = runtime.Interpreter.from_file(str(model), arena_size=8 << 20)

    def tflm(x: Array) -> Array:
        micro.set_input(x, 0)
        micro.invoke()
        return np.array(micro.get_output(0))

    yield "tflm", tflm


HEADER: tuple[str, ...] = (
    *("network", "arena B", "reported B", "flash B", "metric", "float", "LiteRT ref", "XNNPACK", "TFLM"),
    *("TFLM - ref, points", "same as ref %", "same as XNNPACK %", "n"),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "reason" in row:
            lines.append((row["network"], row["reason"], *[""] * (len(HEADER) - 2)))
            continue
        score = row["accuracy"]
        difference = 100 * (score["tflm"] - score["litert_reference"])
        shown = [f"{100 * score[k]:.2f}" for k in ("float", "litert_reference", "litert_xnnpack", "tflm")]
        same = [f"{100 * row['identical'][k]:.1f}" for k in ("litert_reference", "litert_xnnpack")]
        sizes = [str(row[k]) for k in ("arena_bytes", "arena_reported_bytes", "flash_bytes")]
        lines.append(
            (row["network"], *sizes, row["metric"], *shown, f"{difference:+.2f}", *same, str(row["n"]))
        )
    return align(HEADER, lines, left=1)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    names = [n.name for n in NETWORKS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--precision", choices=("int8", "int16x8", "fp32"), default="int8")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args(arguments)
    rows = []
    for network in NETWORKS:
        if network.name in options.networks:
            train(network)
            rows.append(compare(network, options.samples, _weights(network).parent, options.precision))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all("reason" not in row for row in rows) else 4


if __name__ == "__main__":
    sys.exit(main())
