"""``python -m benchmarks.tflite_latency``: our int8 EfficientNet-Lite0 beside the file of TensorFlow's own converter.

The same network three times: TensorFlow's converter from Keras, with a representative dataset (random weights: int8
kernels take as long for any); portcall from the ``.keras`` of it; portcall from the published PyTorch weights.
Interleaved rounds of one fresh process each, one thread; the ratio of P50 is the median over rounds. Beside it, how
many TRANSPOSE each file has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import portcall
from portcall.bench.report import align
from portcall.core import Workload
from portcall.exporters import _tflite
from portcall.progress import Reporter

HEADER = ("file", "from", "P50 ms", "ratio", "rounds", "TRANSPOSE", "MB")

MAKE = """
import sys
import keras, numpy, tensorflow
from keras import layers

folder = sys.argv[1]
keras.utils.set_random_seed(0)
rng = numpy.random.default_rng(0)

def normalized(y, activated=True):
    y = layers.BatchNormalization(momentum=0.3)(y)
    return layers.ReLU(6.0)(y) if activated else y

def convolved(y, channels, size=1, stride=1):
    return layers.Conv2D(channels, size, strides=stride, padding="same", use_bias=False)(y)

# M. Tan, Q. V. Le, "EfficientNet" (ICML 2019), table 1, without squeeze-and-excitation, ReLU6: Lite0.
BLOCKS = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
          (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
image = keras.Input((224, 224, 3), name="inputs")
y, channels = normalized(convolved(image, 32, 3, 2)), 32
for expand, out, repeats, first_stride, size in BLOCKS:
    for number in range(repeats):
        stride = first_stride if number == 0 else 1
        z = normalized(convolved(y, channels * expand)) if expand != 1 else y
        depthwise = layers.DepthwiseConv2D(size, strides=stride, padding="same", use_bias=False)
        z = normalized(convolved(normalized(depthwise(z)), out), False)
        y = layers.Add()([y, z]) if stride == 1 and channels == out else z
        channels = out
y = layers.GlobalAveragePooling2D()(normalized(convolved(y, 1280)))
model = keras.Model(image, layers.Dense(1000, name="scores")(y))
for _ in range(6):  # batch statistics
    model(rng.standard_normal((4, 224, 224, 3)).astype("float32"), training=True)
model.save(folder + "/lite0.keras")
samples = rng.standard_normal((8, 224, 224, 3)).astype("float32")
numpy.savez(folder + "/samples.npz", inputs=samples)
one = keras.Input((224, 224, 3), batch_size=1)
converter = tensorflow.lite.TFLiteConverter.from_keras_model(keras.Model(one, model(one)))
converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]
converter.representative_dataset = lambda: ([s[None]] for s in samples)
converter.target_spec.supported_ops = [tensorflow.lite.OpsSet.TFLITE_BUILTINS_INT8]
open(folder + "/tensorflow.tflite", "wb").write(converter.convert())
"""


def main() -> None:
    """Print the table; see the top of this file."""
    parser = argparse.ArgumentParser(
        description="int8 EfficientNet-Lite0: TensorFlow's converter beside portcall"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="fresh processes per file (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="timed per process (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-tflite"), help="default: %(default)s"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    subprocess.run([sys.executable, "-c", MAKE, str(folder)], env={**os.environ, **quiet}, check=True)
    torch_data = "examples.efficientnet_lite0:calibration"
    for model, data, name in (
        (str(folder / "lite0.keras"), str(folder / "samples.npz"), "keras"),
        ("examples.efficientnet_lite0:model", torch_data, "torch"),
    ):
        answer = portcall.export(model, "tflite:int8", folder / name, data=data, reporter=Reporter(True))
        [result] = answer["results"]
        if result["path"] is None:
            sys.exit(f"error: {result['reason']}")
    files = {
        "TensorFlow's converter": folder / "tensorflow.tflite",
        "portcall from Keras": folder / "keras" / "tflite-int8" / "model.tflite",
        "portcall from PyTorch": folder / "torch" / "tflite-int8" / "model.tflite",
    }
    workload = Workload(processes=arguments.rounds, min_time_s=arguments.seconds)
    portcall.benchmark(
        list(files.values()), workload=workload, output=folder / "bench", reporter=Reporter(True)
    )
    medians = [_medians(path) for path in sorted((folder / "bench" / "raw").glob("*.npz"))]
    rows = []
    for (name, path), found in zip(files.items(), medians, strict=True):
        ratio = float(np.median(found / medians[0]))
        count = sum(kind == "TRANSPOSE" for _, kind in _tflite.operators(_tflite._read(path.read_bytes())))
        size = f"{path.stat().st_size / 1e6:.2f}"
        rows.append(
            [
                path.name,
                name,
                f"{np.median(found) / 1e6:.2f}",
                f"{ratio:.3f}",
                str(len(found)),
                str(count),
                size,
            ]
        )
    print(align(HEADER, rows))


def _medians(path: Path) -> np.ndarray[Any, Any]:
    """Return the median latency of every process in ns, in the order of the rounds."""
    with np.load(path) as stored:
        count = sum(name.startswith("wall_ns_") for name in stored.files)
        return np.array([np.median(stored[f"wall_ns_{i}"]) for i in range(count)])


if __name__ == "__main__":
    main()
