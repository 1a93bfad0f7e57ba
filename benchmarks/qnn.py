"""Figures of the backend qnn: ``python -m benchmarks.qnn`` (contexts, parity) and ``--explain`` (why it differs).

The first exports EfficientNet-Lite0 and ResNet-20 in fp16, int8 and int16x8 and prints, for two HTP architectures,
seconds, bytes and whether the whole graph is inside; then how far QNN's x86 emulation is from the source model, the
same file on ONNX Runtime's CPU from the source, and the two from each other. ``--explain`` compares the emulation with
exact arithmetic: operator by operator in steps of the output's scale, and on the networks with roundings drawn at
random. ResNet-20 needs PORTCALL_CIFAR10_RESNET (see ``benchmarks/resnet.py``). Nothing here is a latency.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import portcall.api
from benchmarks.resnet import VARIABLE
from portcall.bench.report import align
from portcall.exporters import _qnn, qnn
from portcall.targets.agent.contract import Unavailable

Array = np.ndarray[Any, Any]
Runner = Callable[[dict[str, Array]], Array]

NETWORKS = {
    "EfficientNet-Lite0": ("examples.efficientnet_lite0:model", "examples.efficientnet_lite0:calibration"),
    "ResNet-20": ("benchmarks.resnet:resnet20", "benchmarks.resnet:calibration"),
}
PRECISIONS = ("fp16", "int8", "int16x8")
SHAPES = (1, 16, 32, 32)


# running a file


def emulated(model: onnx.ModelProto | Path, architecture: str = "73") -> Runner:
    """Return what runs a model in QNN's emulation of an HTP."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        session = _qnn.open_session(_saved(model, Path(folder)), options, _qnn.provider_options(architecture))
    return lambda feeds: np.asarray(session.run(None, feeds)[0])


def on_cpu(model: onnx.ModelProto | Path, integers: bool = True) -> Runner:
    """Return what runs a model on ONNX Runtime's CPU; integers: with its integer kernels, else all in float."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not integers:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = str(_saved(model, Path(folder)))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feeds: np.asarray(session.run(None, feeds)[0])


def _saved(model: onnx.ModelProto | Path, folder: Path) -> Path:
    if isinstance(model, Path):
        return model
    onnx.save(model, str(folder / "m.onnx"))
    return folder / "m.onnx"


def sqnr_db(reference: Array, found: Array) -> float:
    noise = float(((reference - found).astype(np.float64) ** 2).sum())
    return (
        float("inf")
        if noise == 0
        else 10 * float(np.log10((reference.astype(np.float64) ** 2).sum() / noise))
    )


# contexts and parity


def export_all(networks: list[str], precisions: list[str], output: Path) -> list[dict[str, Any]]:
    """Export the networks; print contexts and parity; return one record per artifact."""
    records, contexts, parities = [], [], []
    for network in networks:
        model, data = NETWORKS[network]
        cells = [f"qnn:{p}" for p in precisions]
        for result in portcall.api.export(model, cells, output / network, data=data)["results"]:
            if result["outcome"] != "artifact":
                raise SystemExit(f"{network} {result['precision']}: {result['reason']}")
            folder = Path(result["path"])
            record = {"network": network, "precision": result["precision"], "path": str(folder)}
            record["contexts"] = json.loads((folder / "contexts.json").read_text())["contexts"]
            record["parity"] = compare(folder)
            record["emulated_sqnr_db"] = result["parity"]["sqnr_db"]
            records.append(record)
            for context in record["contexts"]:
                inside = "yes" if context["whole"] else f"no: {', '.join(context['outside'])}"
                row = [network, result["precision"], f"v{context['htp_arch']}", f"{context['seconds']:.2f}"]
                contexts.append([*row, f"{context['size_bytes'] / 1e6:.2f}", inside])
            p = record["parity"]
            row = [
                network,
                result["precision"],
                str(result["parity"]["n"]),
                f"{result['parity']['sqnr_db']:.1f}",
            ]
            numbers = [p["emulated_db"], p["cpu_db"], p["between_db"]]
            parities.append(
                [*row, str(p["n"]), *(f"{v:.1f}" for v in numbers), f"{p['max_abs']:.3f} of {p['range']:.2f}"]
            )
    print(align(["network", "precision", "HTP", "build s", "MB", "whole graph inside"], contexts))
    print("\nSQNR in dB. emulated: QNN's x86 emulation of HTP v73; cpu: ONNX Runtime on the same model.onnx")
    heads = ["network", "precision", "n", "emulated", "n", "emulated", "cpu", "between", "largest difference"]
    print(align(heads, parities))
    return records


def compare(folder: Path, limit: int = 6) -> dict[str, Any]:
    """Return how far the emulation and the CPU are from the source and from each other, on the artifact's samples."""
    stored = np.load(folder / "samples.npz")
    [reference] = [k for k in stored.files if k.startswith("reference/")]
    [name] = [k for k in stored.files if not k.startswith("reference/")]
    n = min(limit, len(stored[name]))
    source = stored[reference][:n]
    path = folder / "model.onnx"
    here, there = (
        np.stack([run({name: stored[name][i]}) for i in range(n)]) for run in (on_cpu(path), emulated(path))
    )
    return {
        "n": n,
        "emulated_db": sqnr_db(source, there),
        "cpu_db": sqnr_db(source, here),
        "between_db": sqnr_db(here, there),
        "max_abs": float(np.abs(here - there).max()),
        "range": float(np.ptp(here)),
    }


# why: operator by operator


def operator(
    op: str,
    weight: tuple[int, ...] | None = None,
    inputs: int = 1,
    output: tuple[int, ...] = SHAPES,
    scales: tuple[float, float] = (0.002, 0.002),
    step: float = 0.05,
    zero: int = 128,
    **attributes: Any,
) -> onnx.ModelProto:
    """Return Q/DQ around one operator on uint8[SHAPES]; weight scales run from the first to the second of *scales*."""
    rng = np.random.default_rng(0)
    held: dict[str, Array] = {"y_s": np.float32(step), "y_z": np.uint8(zero)}  # type: ignore[dict-item]  # scalars
    nodes, names = [], []
    for number in range(inputs):
        x, scale, point = f"x{number}", 0.02 + 0.01 * number, 120 - 20 * number
        held |= {f"{x}_s": np.asarray(scale, np.float32), f"{x}_z": np.asarray(point, np.uint8)}
        nodes += [
            helper.make_node("QuantizeLinear", [x, f"{x}_s", f"{x}_z"], [f"{x}_q"]),
            helper.make_node("DequantizeLinear", [f"{x}_q", f"{x}_s", f"{x}_z"], [f"{x}_d"]),
        ]
        names.append(f"{x}_d")
    if weight:
        channels = np.geomspace(*scales, weight[0]).astype(np.float32)
        held |= {"w": rng.integers(-127, 128, weight).astype(np.int8), "w_s": channels}
        held |= {"w_z": np.zeros(weight[0], np.int8), "b_z": np.zeros(weight[0], np.int32)}
        held |= {
            "b": rng.integers(-3000, 3000, weight[0]).astype(np.int32),
            "b_s": channels * np.float32(0.02),
        }
        for name in ("w", "b"):
            parts = [name, f"{name}_s", f"{name}_z"]
            nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}_d"], axis=0))
            names.append(f"{name}_d")
    nodes += [
        helper.make_node(op, names, ["exact"], **attributes),
        helper.make_node("QuantizeLinear", ["exact", "y_s", "y_z"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "y_s", "y_z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        op,
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, SHAPES) for i in range(inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def cases() -> Iterator[tuple[str, onnx.ModelProto, float]]:
    """Yield a name, a graph of one operator, and the step of its output."""
    same, half = (1, 16, 32, 32), (1, 16, 16, 16)
    wide, pads = (0.0002, 0.002), [1] * 4
    pool: Any = {"kernel_shape": [2, 2], "strides": [2, 2]}
    out = (1, 32, 32, 32)
    yield "Conv 3x3, one scale", operator("Conv", (32, 16, 3, 3), output=out, pads=pads), 0.05
    yield "Conv 3x3, scale per channel", operator("Conv", (32, 16, 3, 3), 1, out, wide, pads=pads), 0.05
    yield "Conv 1x1, scale per channel", operator("Conv", (32, 16, 1, 1), 1, out, wide, 0.02), 0.02
    yield "depthwise Conv", operator("Conv", (16, 1, 3, 3), 1, same, wide, 0.01, pads=pads, group=16), 0.01
    yield "Add", operator("Add", inputs=2, step=0.04), 0.04
    yield "Mul", operator("Mul", inputs=2, step=0.04), 0.04
    yield "AveragePool 2x2", operator("AveragePool", output=half, step=0.02, zero=120, **pool), 0.02
    yield "GlobalAveragePool", operator("GlobalAveragePool", output=(1, 16, 1, 1), step=0.004), 0.004
    yield "MaxPool 2x2", operator("MaxPool", output=half, step=0.02, zero=120, **pool), 0.02
    yield "Sigmoid", operator("Sigmoid", step=1 / 256, zero=0), 1 / 256
    yield "Relu", operator("Relu", step=0.011, zero=0), 0.011


def explain_operators(architecture: str) -> None:
    """Print, per operator, how far the emulation and the CPU's integers are from exact arithmetic, in output steps."""
    rows = []
    rng = np.random.default_rng(2)
    for name, model, step in cases():
        feeds = {
            v.name: ((rng.integers(0, 256, SHAPES) - 120) * 0.02).astype(np.float32)
            for v in model.graph.input
        }
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        bare.graph.output[0].name = "exact"
        exact = on_cpu(bare, integers=False)(feeds).astype(np.float64) / step
        rounded = np.rint(on_cpu(model, integers=False)(feeds) / step)
        inside = np.abs(rounded - exact) < 0.51  # not where the output saturates
        found = np.rint(emulated(model, architecture)(feeds) / step)
        cpu = np.rint(on_cpu(model)(feeds) / step)
        error = (found - exact)[inside]
        rows.append(
            [
                name,
                f"{100 * (found != rounded)[inside].mean():.2f}",
                f"{100 * (cpu != rounded)[inside].mean():.2f}",
                f"{np.abs(found - rounded).max():.0f}",
                f"{error.min():+.2f} to {error.max():+.2f}",
                f"{error.mean():+.3f}",
            ]
        )
    print(
        f"\none operator on HTP v{architecture} (emulated) against exact arithmetic, in steps of its output"
    )
    print("rounding to nearest has errors from -0.50 to +0.50")
    heads = ["operator", "emulated differs %", "cpu differs %", "most", "emulated error", "mean"]
    print(align(heads, rows))


# why: on whole networks


def with_noise(path: Path, low: float, high: float, seed: int) -> onnx.ModelProto:
    """Return a Q/DQ model whose convolutions add low..high steps of their output, drawn by seed, before rounding."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    rng = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    held = {t.name: t for t in model.graph.initializer}
    made_by = {name: n.op_type for n in model.graph.node for name in n.output}
    nodes = []
    for node in model.graph.node:
        raw = node.input[0]
        if node.op_type == "QuantizeLinear" and made_by.get(raw) == "Conv":
            scale = numpy_helper.to_array(held[node.input[1]])
            noise = (rng.uniform(low, high, shapes[raw]) * scale).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(noise, f"{raw}_noise"))
            nodes.append(helper.make_node("Add", [raw, f"{raw}_noise"], [f"{raw}_noisy"]))
            node.input[0] = f"{raw}_noisy"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def explain_networks(records: list[dict[str, Any]], limit: int = 4) -> None:
    """Print how far each way of rounding is from rounding to nearest, and each from the source."""
    rows = []
    for record in records:
        if record["precision"] != "int8":
            continue
        folder = Path(record["path"])
        stored = np.load(folder / "samples.npz")
        [name] = [k for k in stored.files if not k.startswith("reference/")]
        n = min(limit, len(stored[name]))
        source = np.concatenate([stored[k][:n] for k in stored.files if k.startswith("reference/")])
        path = folder / "model.onnx"
        ways: list[tuple[str, Runner]] = [
            ("to nearest, float arithmetic", on_cpu(path, integers=False)),
            ("ONNX Runtime's integer kernels", on_cpu(path)),
            ("QNN's emulation of v73", emulated(path)),
            ("QNN's emulation of v69", emulated(path, "69")),
        ]
        for low, high in ((-0.05, 0.05), (-0.14, 0.03), (-0.01, 0.01)):
            label = f"to nearest after {low:+.2f}..{high:+.2f} of a step at random"
            ways += [
                (f"{label} ({s})", on_cpu(with_noise(path, low, high, s), integers=False)) for s in (0, 1)
            ]
        nearest: Array | None = None
        for label, run in ways:
            found = np.stack([run({name: stored[name][i]}) for i in range(n)])
            nearest = found if nearest is None else nearest
            between = sqnr_db(nearest, found)
            share = 100 * float(np.abs(nearest - found).max() / np.ptp(nearest))
            away = "-" if between == float("inf") else f"{between:.1f}"
            rows.append([record["network"], label, away, f"{share:.1f}", f"{sqnr_db(source, found):.1f}"])
    heads = ["network", "rounding", "dB from nearest", "largest, % of range", "dB from source"]
    print("\nint8 networks, every way of rounding: dB from rounding to nearest, and from the source model")
    print(align(heads, rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--explain", action="store_true", help="compare the emulation with exact arithmetic")
    parser.add_argument("-o", "--output", type=Path, help="keep the artifacts and figures.json here")
    options = parser.parse_args(arguments)
    found = qnn.probe("export")
    if isinstance(found, Unavailable):
        print(f"skipped: {found.reason}; fix: {found.fix}", file=sys.stderr)
        return 0
    networks = list(options.networks)
    if "ResNet-20" in networks and not os.environ.get(VARIABLE):
        networks.remove("ResNet-20")
        print(
            f"skipped ResNet-20: {VARIABLE} does not name its folder (see benchmarks/resnet.py)",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder)
        records = export_all(networks, options.precisions, output) if networks else []
        if options.explain:
            for architecture in ("69", "73"):
                explain_operators(architecture)
            explain_networks(records)
        if options.output:
            (output / "figures.json").write_text(json.dumps({"schema": 1, "results": records}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
