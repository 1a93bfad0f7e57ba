"""How well the parity ladder names planted faults, and how often it reports one that is not there.

    python -m benchmarks.ladder --seed 4 --faults 200 --clean 50

Three networks are made here (a ResNet, a MobileNet with depthwise convolutions, a transformer block; random
weights, batch normalization fitted to the data) and exported to onnxruntime int8 and tflite int8. Each fault is
drawn by seed: network, backend, kind, layer. A fault whose effect on the layer's own output stays below the
quantization noise expected there, in every channel and at the border, is no fault: it is drawn again and counted.
Named means: the first divergence is the tensor that the faulty layer, or the operator that it is fused into, makes.
Everything runs in this process: the traces and the statistics are those of ``portcall debug``, which adds workers and
the source around them. Long because it makes three networks and plants five kinds of faults in two formats.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall.exporters import get_backend
from portcall.ladder_job import _first, _Tap, how_rounded, open_float_graph
from portcall.ladder_statistics import _by_part, border_mask
from portcall.source import open_source
from portcall.targets.agent.contract import Artifact, Graph, Range, Recipe, Source, Workload
from portcall.targets.agent.errors import PortcallError

Array = np.ndarray[Any, Any]
KINDS = ("activation scale", "weight scale", "swapped channels", "missing bias", "lost padding")
CLEAN = (
    ("onnxruntime", "int8"),
    ("tflite", "int8"),
    ("tensorrt", "int8"),
    ("onnxruntime", "fp16"),
    ("tflite", "int16x8"),
    ("onnxruntime", "int8-dynamic"),
    ("tflite", "fp16"),
    ("openvino", "int8"),
)
FACTORS = (0.5, 0.7, 1.5, 2.0, 4.0)


def network(name: str, seed: int) -> tuple[Any, tuple[int, ...]]:
    """Return a network in eval mode and the shape of one sample with its batch."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inner: int, outer: int, stride: int, depthwise: bool) -> None:
            super().__init__()
            groups = inner if depthwise else 1
            self.conv1 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
            self.bn1 = nn.BatchNorm2d(inner)
            self.conv2 = nn.Conv2d(inner, outer, 1 if depthwise else 3, 1, 0 if depthwise else 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outer)
            self.down = None
            if stride != 1 or inner != outer:
                self.down = nn.Sequential(
                    nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
                )

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
            return nn.functional.relu(y + (x if self.down is None else self.down(x)))

    class Images(nn.Module):
        def __init__(self, depthwise: bool) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 3, 1, 1, bias=False)
            self.bn = nn.BatchNorm2d(12)
            blocks = [(12, 12, 1), (12, 24, 2), (24, 24, 1), (24, 32, 2)]
            self.blocks = nn.Sequential(*(Block(*b, depthwise) for b in blocks))
            self.fc = nn.Linear(32, 10)

        def forward(self, x: Any) -> Any:
            x = self.blocks(nn.functional.relu(self.bn(self.stem(x))))
            return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attn, self.out = nn.Linear(12, 32), nn.Linear(32, 96), nn.Linear(32, 32)
            self.n1, self.n2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x: Any) -> Any:
            h = self.embed(x)
            q, k, v = self.attn(self.n1(h)).chunk(3, -1)
            h = h + self.out(torch.softmax(q @ k.transpose(-1, -2) / 5.6, -1) @ v)
            h = h + self.down(nn.functional.gelu(self.up(self.n2(h))))
            return self.head(h.mean(1))

    torch.manual_seed(seed)
    if name == "transformer":
        return Transformer().eval(), (1, 16, 12)
    net = Images(name == "mobilenet").train()
    for child in net.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, 0, 0.5)
    with torch.no_grad():
        for _ in range(10):
            net(torch.randn(16, 3, 16, 16))
    return net.eval(), (1, 3, 16, 16)


@dataclass
class Case:
    """An exported network: its artifact, the float graph it was made from, and samples by source input name."""

    name: str
    artifact: Artifact
    graph: Graph
    ranges: Mapping[str, Range]
    recipe: Recipe
    samples: list[dict[str, Array]]


def lowered(name: str, seed: int, folder: Path) -> Source:
    import torch

    net, shape = network(name, seed)
    path = folder / f"{name}-{seed}.pt2"
    torch.export.save(torch.export.export(net, (torch.zeros(shape),)), path)
    job = {"spec": str(path), "directory": str(folder), "shapes": {}}
    return Source.from_json(open_source(job, None))


def exported(
    source: Source,
    name: str,
    seed: int,
    backend_name: str,
    precision: str,
    folder: Path,
    cache: dict[Any, Any],
) -> Case:
    """Return a case; graphs and ranges are made once per network and kind of graph."""
    backend = get_backend(backend_name)
    key = (name, seed, backend.graph)
    rng = np.random.default_rng(seed)
    [spec] = source.inputs
    data = [
        {spec.name: rng.standard_normal(source.example_shapes[spec.name]).astype(np.float32)}
        for _ in range(32)
    ]
    if key not in cache:
        place = folder / "-".join(map(str, key))
        place.mkdir()
        graph = backend.lower(source, place)
        floats = open_float_graph(graph, 1)
        low: dict[str, float] = {}
        high: dict[str, float] = {}
        for arrays in data:
            for tensor, value in floats.run(arrays).items():
                low[tensor] = min(low.get(tensor, 0.0), float(value.min()))
                high[tensor] = max(high.get(tensor, 0.0), float(value.max()))
        cache[key] = graph, low, high
    graph, low, high = cache[key]
    wanted = backend.capabilities.precisions[precision]
    ranges = {}
    for tensor in low:
        top = max(-low[tensor], high[tensor])
        ends = (-top, top) if wanted.symmetric else (low[tensor], high[tensor])
        ranges[tensor] = Range(*ends, wanted.symmetric)
    place = Path(tempfile.mkdtemp(prefix=f"{backend_name}-{precision}-", dir=folder))
    recipe = Recipe(precision)
    made = backend.export(graph, recipe, ranges if wanted.calibrated else None, place)
    artifact = Artifact(place, made.entry, backend_name, precision, made.inputs, made.outputs)
    return Case(name, artifact, graph, ranges if wanted.calibrated else {}, recipe, data[:4])


def climb(case: Case, artifact: Artifact) -> tuple[list[dict[str, Any]], list[list[Array]], _Tap, list[Any]]:
    """Return the rows of a trace of *artifact*, its values per sample, the residuals and what is shown."""
    backend = get_backend(artifact.backend)
    assert backend.trace is not None
    floats = open_float_graph(case.graph, 1)
    with backend.trace(artifact, Workload()) as trace:
        numbers = [i for i, s in enumerate(trace.tensors) if s.name in floats.layers]
        shown = [trace.tensors[i] for i in numbers]
        tap = _Tap(floats, shown, case.ranges, *how_rounded(artifact.backend, case.recipe.to_json()))
        values = []
        for arrays in case.samples:
            found = trace.run(arrays)
            values.append([np.asarray(found[i]) for i in numbers])
            tap.add(arrays, values[-1], floats.run(arrays))
    return tap.rows(), values, tap, shown


@dataclass(frozen=True)
class Fault:
    """kind, the tensor of the artifact's file at fault, and the tensor of the float graph where it shows first."""

    kind: str
    what: str
    tensor: str


def plant_onnx(path: Path, kind: str, rng: np.random.Generator) -> Fault | None:
    """Plant a fault into a Q/DQ file in place; None where the drawn layer cannot have it."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    held = {t.name: t for t in model.graph.initializer}
    made = {n: node for node in model.graph.node for n in node.output}

    def value(name: str) -> Array:
        return np.array(numpy_helper.to_array(held[name]))

    def store(name: str, new: Array, old: Array) -> None:
        held[name].CopyFrom(numpy_helper.from_array(np.asarray(new, old.dtype).reshape(old.shape), name))

    if kind == "activation scale":
        pairs = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
        node = pairs[rng.integers(len(pairs))]
        old = value(node.input[1])
        store(node.input[1], old * FACTORS[rng.integers(len(FACTORS))], old)
        tensor = node.input[0].removesuffix("_QuantizeLinear_Input")
    else:
        nodes = [
            n
            for n in model.graph.node
            if n.op_type in ("Conv", "Gemm", "MatMul")
            and n.input[1] in made
            and made[n.input[1]].op_type == "DequantizeLinear"
            and made[n.input[1]].input[0] in held
        ]
        node = nodes[rng.integers(len(nodes))]
        weight = made[node.input[1]]
        tensor = node.output[0].removesuffix("_QuantizeLinear_Input")
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else 1
        old = value(weight.input[0])
        if kind == "weight scale":
            scale = value(weight.input[1])
            factor = FACTORS[rng.integers(len(FACTORS))]
            one = rng.integers(2) and scale.size > 1
            new = scale.copy().reshape(-1)
            new[rng.integers(scale.size) if one else slice(None)] *= factor
            store(weight.input[1], new, scale)
        elif kind == "swapped channels":
            a, b = rng.choice(old.shape[axis], 2, replace=False)
            order = np.arange(old.shape[axis])
            order[[a, b]] = b, a
            store(weight.input[0], np.take(old, order, axis), old)
            scale = value(weight.input[1])
            if scale.size > 1:
                store(weight.input[1], scale.reshape(-1)[order], scale)
        elif kind == "missing bias":
            if len(node.input) < 3 or made[node.input[2]].input[0] not in held:
                return None
            name = made[node.input[2]].input[0]
            bias = value(name)
            new = bias.copy()
            new[rng.integers(bias.size) if rng.integers(2) else slice(None)] = 0
            store(name, new, bias)
        else:
            pads = next((a for a in node.attribute if a.name == "pads"), None)
            if node.op_type != "Conv" or pads is None or not any(pads.ints):
                return None
            top = list(pads.ints)
            pads.ints[:] = [
                0,
                0,
                top[0] + top[2],
                top[1] + top[3],
            ]  # all of it on one side, as "same" may put it
        tensor = str(tensor)
    onnx.save(model, str(path))
    return Fault(kind, node.name, tensor)


def plant_tflite(path: Path, kind: str, rng: np.random.Generator) -> Fault | None:
    """Plant a fault into a quantized flatbuffer in place; None where the drawn layer cannot have it."""
    from portcall.exporters import _tflite

    model = _tflite._read(path.read_bytes())
    body = model.subgraphs[0]
    operators = _tflite.operators(model)

    def integers(index: int) -> Array:
        tensor = body.tensors[index]
        dtype = {9: np.int8, 2: np.int32, 4: np.int64, 0: np.float32}[tensor.type]
        return np.frombuffer(bytes(model.buffers[tensor.buffer].data), dtype).reshape(tensor.shape).copy()

    def store(index: int, new: Array) -> None:
        data = np.ascontiguousarray(new).tobytes()
        model.buffers[body.tensors[index].buffer].data = np.frombuffer(data, np.uint8)

    products = [
        op
        for op, k in operators
        if k in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED") and _constant(model, op)
    ]
    if kind == "activation scale":
        made = [
            op
            for op, k in operators
            if k in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "QUANTIZE")
        ]
        op = made[rng.integers(len(made))]
        tensor = body.tensors[op.outputs[0]]
        if tensor.type != 9:
            return None
        tensor.quantization.scale = (
            np.asarray(tensor.quantization.scale) * FACTORS[rng.integers(len(FACTORS))]
        )
        name = tensor.name.decode()
        name = name.removesuffix("_quantized")
    elif kind == "lost padding":
        pads = [op for op, k in operators if k == "PAD"]
        same = [
            (op, k)
            for op, k in operators
            if k in ("CONV_2D", "DEPTHWISE_CONV_2D")
            and op.builtinOptions.padding == 0
            and max(body.tensors[op.inputs[1]].shape[1:3]) > 1
        ]
        pick = int(rng.integers(len(pads) + len(same))) if pads or same else -1
        if pick < 0 or pick >= len(pads):
            return _pad_one_side(path, model, same[pick - len(pads)][0]) if pick >= 0 else None
        op = pads[pick]
        old = integers(int(op.inputs[1]))
        own = copy.copy(body.tensors[op.inputs[1]])  # other operators may share the constant
        own.name, own.buffer = b"planted_paddings", _tflite.new_buffer(model)
        body.tensors.append(own)
        op.inputs = [int(op.inputs[0]), len(body.tensors) - 1]
        store(len(body.tensors) - 1, np.stack([0 * old[:, 0], old.sum(1)], 1).astype(old.dtype))
        name = body.tensors[op.outputs[0]].name.decode()
    else:
        op = products[rng.integers(len(products))]
        name = body.tensors[op.outputs[0]].name.decode()
        depthwise = next(k for o, k in operators if o is op) == "DEPTHWISE_CONV_2D"
        weight = integers(int(op.inputs[1]))
        axis = 3 if depthwise else 0
        quantization = body.tensors[op.inputs[1]].quantization
        if kind == "weight scale":
            scale = np.array(quantization.scale)
            one = rng.integers(2) and scale.size > 1
            scale[rng.integers(scale.size) if one else slice(None)] *= FACTORS[rng.integers(len(FACTORS))]
            quantization.scale = scale
        elif kind == "swapped channels":
            a, b = rng.choice(weight.shape[axis], 2, replace=False)
            order = np.arange(weight.shape[axis])
            order[[a, b]] = b, a
            store(int(op.inputs[1]), np.take(weight, order, axis))
        else:
            if len(op.inputs) < 3 or int(op.inputs[2]) < 0:
                return None
            bias = integers(int(op.inputs[2]))
            bias[rng.integers(bias.size) if rng.integers(2) else slice(None)] = 0
            store(int(op.inputs[2]), bias)
    path.write_bytes(_tflite._write(model))
    return Fault(kind, name, name)


def _constant(model: Any, op: Any) -> bool:
    data = model.buffers[model.subgraphs[0].tensors[op.inputs[1]].buffer].data
    return data is not None and len(data) > 0


def _pad_one_side(path: Path, model: Any, op: Any) -> Fault:
    """Let a PAD on the bottom and right, and no padding of its own, come before a convolution with "same" padding."""
    from ai_edge_litert.schema_py_generated import OperatorT

    from portcall.exporters import _tflite

    body = model.subgraphs[0]
    source, weight = body.tensors[op.inputs[0]], body.tensors[op.inputs[1]]
    height, width = (int(d) - 1 for d in weight.shape[1:3])
    paddings, padded = copy.copy(source), copy.copy(source)
    paddings.name, paddings.type, paddings.shape, paddings.quantization = b"planted_paddings", 2, [4, 2], None
    paddings.buffer = _tflite.new_buffer(model)
    values = np.asarray([[0, 0], [0, height], [0, width], [0, 0]], np.int32)
    model.buffers[paddings.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    padded.name, padded.buffer = b"planted_padded", 0
    padded.shape = [source.shape[0], source.shape[1] + height, source.shape[2] + width, source.shape[3]]
    body.tensors += [paddings, padded]
    pad = OperatorT()
    pad.opcodeIndex = _tflite.operator_code(model, "PAD")
    pad.inputs, pad.outputs = [int(op.inputs[0]), len(body.tensors) - 2], [len(body.tensors) - 1]
    body.operators.insert(next(i for i, o in enumerate(body.operators) if o is op), pad)
    op.inputs = [len(body.tensors) - 1, *map(int, op.inputs[1:])]
    op.builtinOptions.padding = 1  # VALID
    path.write_bytes(_tflite._write(model))
    name = body.tensors[op.outputs[0]].name.decode()
    return Fault("lost padding", name, name)


def target_of(tap: _Tap, tensor: str) -> str | None:
    """Return the shown tensor that *tensor* is fused into: itself, or the first after it."""
    from portcall.exporters._floats import segment

    known = set(tap.names)
    if tensor in known:
        return tensor
    return next((n for n in tap.names if tensor in segment(tap._floats, n, known)), None)


def effect(
    tap: _Tap, shown: list[Any], target: str, clean: list[list[Array]], faulty: list[list[Array]]
) -> float:
    """Return the largest change of the target, of any channel or its border, in units of the noise expected there."""
    numbers = [i for i, s in enumerate(shown) if s.name == target]
    number = numbers[-1]
    residual = tap._residuals[number]
    change: Array = np.zeros(1)
    for before, after in zip(clean, faulty, strict=True):
        a, b = before[number], after[number]
        if a.shape != b.shape:
            return float("inf")
        square = (a.astype(np.float64) - b) ** 2
        axis = tap._floats.axes.get(target)
        change = change + _by_part(square, border_mask(a.shape, axis), axis)
    allowed = residual._allowed()
    parts = np.stack([change[0] + change[1], change[1]]), np.stack([allowed[0] + allowed[1], allowed[1]])
    return float(np.sqrt((parts[0] / np.maximum(parts[1], 1e-30)).max()))


def run_faults(cases: list[Case], count: int, seed: int, show: Callable[[str], None]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    cleans = [climb(case, case.artifact) for case in cases]
    by_kind: dict[str, Counter[str]] = {k: Counter() for k in KINDS}
    missed: list[dict[str, Any]] = []
    done = 0
    while done < count:
        number = int(rng.integers(len(cases)))
        kind = KINDS[rng.integers(len(KINDS))]
        case, (_, values, tap, shown) = cases[number], cleans[number]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / case.artifact.entry
            path.write_bytes(case.artifact.path.read_bytes())
            plant = plant_onnx if case.artifact.backend == "onnxruntime" else plant_tflite
            fault = plant(path, kind, rng)
            target = target_of(tap, fault.tensor) if fault is not None else None
            if fault is None or target is None:
                continue  # this layer has no bias or no padding
            try:
                rows, faulty, _, _ = climb(case, replace(case.artifact, directory=Path(folder)))
            except PortcallError:
                by_kind[kind]["refused by the runtime, drawn again"] += 1
                continue
        size = effect(tap, shown, target, values, faulty)
        if size < 1:
            by_kind[kind]["below the noise, drawn again"] += 1
            continue
        done += 1
        first = _first(rows)
        named = first is not None and first["tensor"] == target
        by_kind[kind]["planted"] += 1
        by_kind[kind]["named"] += named
        if not named:
            entry: dict[str, Any] = {
                "network": case.name,
                "backend": case.artifact.backend,
                "kind": kind,
                "at": target,
            }
            entry |= {"effect": round(size, 2), "reported": None if first is None else first["tensor"]}
            missed.append(entry)
            show(f"missed: {entry}")
        if done % 50 == 0:
            show(f"{done} faults")
    total = sum(c["named"] for c in by_kind.values())
    return {
        "planted": done,
        "named": total,
        "by_kind": {k: dict(c) for k, c in by_kind.items()},
        "missed": missed,
    }


def run_clean(count: int, start: int, folder: Path, show: Callable[[str], None]) -> dict[str, Any]:
    """Export networks of other seeds without a fault; return what was reported all the same."""
    cache: dict[Any, Any] = {}
    reports: list[str] = []
    cells: Counter[str] = Counter()
    for done, (seed, name, backend, precision) in enumerate(_clean_cells(start), 1):
        if done > count:
            break
        if (name, seed) not in cache:
            cache[(name, seed)] = lowered(name, seed, folder)
        case = exported(cache[(name, seed)], name, seed, backend, precision, folder, cache)
        first = _first(climb(case, case.artifact)[0])
        cells[f"{backend}:{precision}"] += 1
        if first is not None:
            reports.append(
                f"{name} seed {seed} {backend}:{precision}: {first['tensor']} ratio {first['ratio']}"
            )
            show(f"false report: {reports[-1]}")
    return {"exports": sum(cells.values()), "cells": dict(cells), "false_reports": reports}


def _clean_cells(start: int) -> Iterator[tuple[int, str, str, str]]:
    for seed in range(start, start + 100):
        for name in ("resnet", "mobilenet", "transformer"):
            for backend, precision in CLEAN:
                yield seed, name, backend, precision


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--clean", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    answer: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory(prefix="ladder-") as name, contextlib.ExitStack():
        folder = Path(name)
        cache: dict[Any, Any] = {}
        if options.faults:
            cases = []
            for net in ("resnet", "mobilenet", "transformer"):
                source = lowered(net, options.seed, folder)
                for backend in ("onnxruntime", "tflite"):
                    cases.append(exported(source, net, options.seed, backend, "int8", folder, cache))
            answer["faults"] = run_faults(
                cases, options.faults, options.seed, lambda text: print(text, flush=True)
            )
        if options.clean:
            answer["clean"] = run_clean(
                options.clean, 1000 * options.seed + 100, folder, lambda text: print(text, flush=True)
            )
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2) + "\n")
    print(json.dumps({k: v for k, v in answer.items()}, indent=2))


if __name__ == "__main__":
    main()
