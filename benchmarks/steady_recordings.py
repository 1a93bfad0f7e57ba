"""Records the first seconds of real runtimes, for ``benchmarks.steady``: ``python -m benchmarks.steady_recordings``.

Convolution chains of five sizes (some 10 us to 100 ms an inference) run in ONNX Runtime, OpenVINO and LiteRT, each
series in a fresh process from its very first inference, with nothing before it but loading; half of them beside a
process that keeps one core busy. Resumable: a series that is in the folder is not recorded again. ``--pack FILE``
then writes them into one file: logarithms in steps of 1/128 (0.5 %). Those below 4 us an inference stay out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from portcall import api, artifact
from portcall.exporters import get_backend
from portcall.targets.agent.contract import Workload

PACKED = Path(__file__).parent / "steady_recordings.npz"
STEPS = 128
FASTEST_NS = 4000
BACKENDS = ("onnxruntime", "openvino", "tflite")
SIZES = {"s": (4, 8, 2), "m": (16, 24, 4), "l": (32, 48, 4), "xl": (48, 96, 6), "xxl": (96, 128, 6)}
"""Name -> channels, height and width, and number of convolutions."""

BUSY = "while True: pass"


def chain(path: Path, channels: int, size: int, depth: int) -> None:
    """Write an ONNX chain of 3x3 convolutions with ReLU: input float32[1, 3, size, size]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, before, value = [], [], 3, "x"
    for i in range(depth):
        kernel = rng.standard_normal((channels, before, 3, 3)).astype(np.float32) / (3 * before**0.5)
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
        last = i == depth - 1
        nodes.append(helper.make_node("Relu", [f"c{i}"], ["y" if last else f"r{i}"], f"relu{i}"))
        before, value = channels, f"r{i}"
    shapes = {"x": [1, 3, size, size], "y": [1, channels, size, size]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def first_seconds(folder: Path, seconds: float) -> np.ndarray[Any, Any]:
    """Return the times in ns of an artifact's inferences in this process, from the first one on."""
    opened, _ = artifact.open_artifact(folder)
    times = np.full(1_000_000, -1, np.int64)
    with get_backend(opened.backend).load(opened, Workload()) as session:
        rng = np.random.default_rng(1)
        shapes = {t.name: [d if isinstance(d, int) else 1 for d in t.shape] for t in session.inputs}
        session.set_inputs({k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()})
        count, stop = 0, perf_counter_ns() + int(seconds * 1e9)
        while count < times.size:
            start = perf_counter_ns()
            session.infer()
            end = perf_counter_ns()
            times[count] = end - start
            count += 1
            if end >= stop:
                break
    return times[:count]


def record(folder: Path, seconds: float, repeats: int) -> None:
    """Record what *folder* does not hold yet: NAME.npy, int64 ns, per backend, size, condition and repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in SIZES.items():
        if not (folder / name).is_dir():
            chain(folder / f"{name}.onnx", *numbers)
            api.export(folder / f"{name}.onnx", [f"{b}:fp32" for b in BACKENDS], folder / name)
    wanted = [
        (b, s, load, i) for i in range(repeats) for load in ("quiet", "load") for s in SIZES for b in BACKENDS
    ]
    for backend, size, load, i in wanted:
        place = folder / f"{backend}-{size}-{load}-{i}.npy"
        source = folder / size / f"{backend}-fp32"
        if place.exists() or not source.is_dir():
            continue
        busy = subprocess.Popen([sys.executable, "-c", BUSY]) if load == "load" else None
        try:
            part = place.with_suffix(".part.npy")
            command = ["--one", str(source), str(part), "--seconds", str(seconds)]
            subprocess.run([sys.executable, "-m", "benchmarks.steady_recordings", *command], check=True)
            part.replace(place)
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
        print(place.name, np.load(place).size, file=sys.stderr, flush=True)


def pack(folder: Path, target: Path) -> None:
    """Write all series of *folder* into one file."""
    series = {p.stem: np.load(p) for p in sorted(folder.glob("*.npy")) if ".part" not in p.name}
    series = {k: v for k, v in series.items() if np.median(v) > FASTEST_NS}
    coded = {k: np.round(np.log2(np.maximum(v, 1)) * STEPS).astype(np.uint16) for k, v in series.items()}
    with target.open("wb") as stream:
        np.savez_compressed(stream, **coded)


def load_packed(path: Path = PACKED) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return name -> times in ns, float64, of every packed series."""
    with np.load(path) as stored:
        return {name: 2.0 ** (stored[name] / STEPS) for name in sorted(stored.files)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="record the series missing there")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each series (default 5)")
    parser.add_argument("--repeats", type=int, default=2, help="processes per case (default 2)")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help=f"with --record: write them to FILE ({PACKED.name})"
    )
    parser.add_argument("--one", nargs=2, metavar=("ARTIFACT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        np.save(options.one[1], first_seconds(Path(options.one[0]), options.seconds))
        return
    if options.record is None:
        parser.error("give --record FOLDER")
    record(options.record, options.seconds, options.repeats)
    if options.pack is not None:
        pack(options.record, options.pack)


if __name__ == "__main__":
    main()
