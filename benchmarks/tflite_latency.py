"""``python -m benchmarks.tflite_latency``: our int8 EfficientNet-Lite0 beside the file of TensorFlow's own converter.

The network twice: with the padding of Keras ("same"), and with that of PyTorch, which pads both sides before a stride
and so needs a PAD in the flatbuffer. Of each, TensorFlow's converter with a representative dataset (random weights:
int8 kernels take as long for any), and portcall from the ``.keras`` of it; portcall also from the published
PyTorch weights, with their layout and channels last. Interleaved rounds of one fresh process each, one thread; the
ratio of P50, to TensorFlow's file with the same padding, is the median over rounds. Beside it, how many TRANSPOSE each
file has.
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

HEADER = ("from", "padding", "P50 ms", "ratio", "rounds", "TRANSPOSE", "MB")

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

def padded(y, size, stride, as_torch):
    # PyTorch pads both sides alike, Keras' "same" only what the stride leaves.
    if stride == 1 or not as_torch:
        return y, "same"
    return layers.ZeroPadding2D(size // 2)(y), "valid"

# M. Tan, Q. V. Le, "EfficientNet" (ICML 2019), table 1, without squeeze-and-excitation, ReLU6: Lite0.
BLOCKS = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
          (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))

def network(as_torch):
    image = keras.Input((224, 224, 3), name="inputs")
    y, padding = padded(image, 3, 2, as_torch)
    y, channels = normalized(layers.Conv2D(32, 3, strides=2, padding=padding, use_bias=False)(y)), 32
    for expand, out, repeats, first_stride, size in BLOCKS:
        for number in range(repeats):
            stride = first_stride if number == 0 else 1
            expanded = layers.Conv2D(channels * expand, 1, use_bias=False)
            z = normalized(expanded(y)) if expand != 1 else y
            z, padding = padded(z, size, stride, as_torch)
            z = layers.DepthwiseConv2D(size, strides=stride, padding=padding, use_bias=False)(z)
            z = normalized(layers.Conv2D(out, 1, use_bias=False)(normalized(z)), False)
            y = layers.Add()([y, z]) if stride == 1 and channels == out else z
            channels = out
    y = layers.GlobalAveragePooling2D()(normalized(layers.Conv2D(1280, 1, use_bias=False)(y)))
    model = keras.Model(image, layers.Dense(1000, name="scores")(y))
    for _ in range(6):  # batch statistics
        model(rng.standard_normal((4, 224, 224, 3)).astype("float32"), training=True)
    return model

samples = rng.standard_normal((8, 224, 224, 3)).astype("float32")
numpy.savez(folder + "/samples.npz", inputs=samples)
for name, as_torch in (("same", False), ("torch", True)):
    model = network(as_torch)
    model.save(folder + f"/{name}.keras")
    one = keras.Input((224, 224, 3), batch_size=1)
    converter = tensorflow.lite.TFLiteConverter.from_keras_model(keras.Model(one, model(one)))
    converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([s[None]] for s in samples)
    converter.target_spec.supported_ops = [tensorflow.lite.OpsSet.TFLITE_BUILTINS_INT8]
    open(folder + f"/{name}.tflite", "wb").write(converter.convert())
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
    for model, data, layout, name in (
        (str(folder / "same.keras"), str(folder / "samples.npz"), "source", "keras-same"),
        (str(folder / "torch.keras"), str(folder / "samples.npz"), "source", "keras-torch"),
        ("examples.efficientnet_lite0:model", torch_data, "source", "pytorch"),
        ("examples.efficientnet_lite0:model", torch_data, "channels_last", "pytorch-last"),
    ):
        options = {"tflite.layout": layout}
        answer = portcall.export(
            model, "tflite:int8", folder / name, data=data, options=options, reporter=Reporter(True)
        )
        [result] = answer["results"]
        if result["path"] is None:
            sys.exit(f"error: {result['reason']}")
    ours = "tflite-int8/model.tflite"
    files = (  # what made it, its padding, the file, the row that it is compared with
        ("TensorFlow's converter", "same", folder / "same.tflite", 0),
        ("portcall from Keras", "same", folder / "keras-same" / ours, 0),
        ("TensorFlow's converter", "PyTorch's", folder / "torch.tflite", 2),
        ("portcall from Keras", "PyTorch's", folder / "keras-torch" / ours, 2),
        ("portcall from PyTorch", "PyTorch's", folder / "pytorch" / ours, 2),
        ("portcall from PyTorch, channels last", "PyTorch's", folder / "pytorch-last" / ours, 2),
    )
    workload = Workload(processes=arguments.rounds, min_time_s=arguments.seconds)
    portcall.benchmark(
        [path for _, _, path, _ in files], workload=workload, output=folder / "bench", reporter=Reporter(True)
    )
    medians = [_medians(path) for path in sorted((folder / "bench" / "raw").glob("*.npz"))]
    rows = []
    for (name, padding, path, base), found in zip(files, medians, strict=True):
        ratio = f"{float(np.median(found / medians[base])):.3f}"
        count = sum(kind == "TRANSPOSE" for _, kind in _tflite.operators(_tflite._read(path.read_bytes())))
        size = f"{path.stat().st_size / 1e6:.2f}"
        p50 = f"{np.median(found) / 1e6:.2f}"
        rows.append([name, padding, p50, ratio, str(len(found)), str(count), size])
    print(align(HEADER, rows))


def _medians(path: Path) -> np.ndarray[Any, Any]:
    """Return the median latency of every process in ns, in the order of the rounds."""
    with np.load(path) as stored:
        count = sum(name.startswith("wall_ns_") for name in stored.files)
        return np.array([np.median(stored[f"wall_ns_{i}"]) for i in range(count)])


if __name__ == "__main__":
    main()
