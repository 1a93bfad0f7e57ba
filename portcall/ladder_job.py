"""The worker of ``debug``: compares a traced artifact with its float graph and its source.

The criterion is in ``ladder_statistics``. Long because stages, tensors and the first divergence are read off one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portcall.exporters._floats import FloatGraph, Layer, Rounding, segment
from portcall.ladder_kinds import describe
from portcall.ladder_source import source_tensors
from portcall.ladder_statistics import (
    INTERPOLATED,
    OTHER_WEIGHTS,
    SAME_WEIGHTS,
    Grid,
    Residual,
    Tolerance,
    expected_grid,
    recipe_grid,
)
from portcall.source import open_reference
from portcall.targets.agent.contract import Graph, Range, Shown
from portcall.targets.agent.errors import PortcallError
from portcall.targets.agent.opening import deviation
from portcall.targets.agent.parity import ParityAccumulator, decibels

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

GRAPH_DB = 60.0
"""An exported float graph whose outputs are further from the source's than this is not the source."""
SAME_TENSOR_DB = 60.0
"""A tensor of the source that is closer than this to the graph's of the same name is the same tensor."""


def compare(arguments: Mapping[str, Any], progress: Callable[[int, int | None], None]) -> dict[str, Any]:
    """Return the ladder: parity of the deployed outputs, stages, tensors and the first divergence.

    arguments: those of ``tracing.trace``, with its answer as "traced"; graph, ranges ({tensor: [min, max, symmetric]}
    or None), recipe, expected_sqnr_db (of each sample, as the export measured them).
    """
    graph = Graph.from_json(arguments["graph"])
    samples, directory, n = Path(arguments["samples"]), Path(arguments["directory"]), arguments["n"]
    ranges = {k: Range(*v) for k, v in (arguments["ranges"] or {}).items()}
    floats = open_float_graph(graph, arguments["threads"])
    reference = open_reference(graph.source)
    within = source_tensors(graph.source)
    names = [t.name for t in graph.source.outputs]
    all_shown = [Shown.from_json(t) for t in arguments["traced"]["tensors"] or []]
    numbers = [i for i, s in enumerate(all_shown) if s.name in floats.layers]
    shown = [all_shown[i] for i in numbers]
    rounding, tolerance, dynamic = how_rounded(arguments["artifact"]["backend"], arguments["recipe"])
    tap = _Tap(floats, shown, ranges, rounding, tolerance, dynamic)
    fake = tap.fake_quantized()
    stages = {
        name: ParityAccumulator(names)
        for name in ("exported graph", "fake-quantized graph", "deployed artifact")
    }
    in_source: dict[str, list[float]] = {}
    in_fake: dict[str, list[float]] = {}
    deployed_db: list[float] = []
    broken: dict[str, str] = {}
    for number in range(n):
        arrays, _ = _sample(samples, number)
        wanted = reference(arrays)
        truth = floats.run(arrays)
        _stage(
            stages,
            broken,
            "exported graph",
            wanted,
            {k: truth[floats.outputs[k]] for k in names if floats.outputs[k] in truth},
        )
        for name, array in within(arrays).items():
            if name in truth and truth[name].shape == array.shape:
                _add(in_source, name, array, truth[name])
        if fake is not None:
            rounded = fake.run(arrays)
            _stage(
                stages, broken, "fake-quantized graph", wanted, {k: rounded[floats.outputs[k]] for k in names}
            )
            for name in tap.names:
                _add(in_fake, name, truth[name], rounded[name])
        if arguments["traced"]["deployed"] is not None:
            with np.load(directory / f"deployed-{number:06d}.npz") as stored:
                outputs = {k: stored[k] for k in stored.files}
            _stage(stages, broken, "deployed artifact", wanted, outputs)
            deployed_db.append(_one_db(wanted, outputs))
        if shown:
            tap.add(arrays, _traced(directory, number, numbers), truth)
        progress(number + 1, n)
    if broken and "exported graph" in broken:
        fake = None
    rows = tap.rows()
    for row in rows:
        row["graph_sqnr_db"] = _same_tensor(in_source.get(row["tensor"]))
        row["fake_quantized_sqnr_db"] = _db(in_fake.get(row["tensor"]))
    listed = _stages(graph, arguments["traced"], stages, broken, n, fake is not None, len(rows))
    first = _exported_divergence(listed, in_source, floats) or _first(rows)
    if first is not None and first["stage"] == "deployed artifact":
        arrays, _ = _sample(samples, 0)
        first["looks_like"] = tap.look(first.pop("number"), arrays, _traced(directory, 0, numbers))
    if first is None:
        first = _outputs_divergence(arguments, listed, broken, deployed_db, bool(shown))
    notes = (
        []
        if arguments["traced"]["tensors"] is not None
        else [f"{arguments['artifact']['backend']} shows no intermediate tensors: outputs only"]
    )
    if arguments["ranges"] is None and any(s.scale is not None for s in shown):
        notes.append("the manifest holds no ranges (an older portcall): scales are taken as they are")
    for row in rows:
        del row["number"]
    return {
        "parity": next((s["parity"] for s in listed if s["name"] == "deployed artifact"), None),
        "n": n,
        "stages": listed,
        "first_divergence": first,
        "tensors": rows,
        "notes": notes,
    }


def open_float_graph(graph: Graph, threads: int) -> FloatGraph:
    if graph.kind == "tflite":
        from portcall.exporters._floats_tflite import TfliteFloatGraph

        return TfliteFloatGraph(graph, threads)
    from portcall.exporters._floats_onnx import OnnxFloatGraph

    return OnnxFloatGraph(graph, threads)


def how_rounded(backend: str, recipe: Mapping[str, Any]) -> tuple[Rounding, Tolerance, bool]:
    """Return how a recipe rounds constants, what is allowed, and whether activations are rounded at run time."""
    precision, options = recipe["precision"], recipe["options"]
    same = OTHER_WEIGHTS if options.get("bias_correction") else SAME_WEIGHTS
    per_channel = options.get("weights", "channel") != "tensor"
    symmetric = options.get("weight_symmetric", True)
    computes_half = backend in ("tensorrt", "tensorrt_rtx", "coreml")
    if precision in ("int8", "int16x8"):
        half = 2.0**-9 if options.get("float") == "fp16" or backend == "coreml" else 0.0
        rounding = Rounding(8, "", per_channel, symmetric, constants=True)
        return rounding, Tolerance(same, half), backend == "tflite" and precision == "int8"
    if precision == "fp16":
        return Rounding(half="fp16"), Tolerance(OTHER_WEIGHTS, 2.0**-9 if computes_half else 0.0), False
    if precision == "bf16":
        return Rounding(half="bf16"), Tolerance(OTHER_WEIGHTS, 2.0**-6), False
    if precision == "int8-dynamic":
        return Rounding(8, per_channel=False), Tolerance(OTHER_WEIGHTS), True
    if precision == "int4-weights":
        return Rounding(4, block=32), Tolerance(OTHER_WEIGHTS), False
    if precision == "int8-weights":
        return Rounding(8, "", per_channel, symmetric), Tolerance(OTHER_WEIGHTS), False
    return Rounding(), Tolerance(SAME_WEIGHTS), False


class _Tap:
    """The residuals of everything that is shown."""

    def __init__(
        self,
        floats: FloatGraph,
        shown: Sequence[Shown],
        ranges: Mapping[str, Range],
        rounding: Rounding,
        tolerance: Tolerance,
        dynamic: bool,
    ) -> None:
        self._floats, self._shown, self._ranges, self._rounding = floats, shown, ranges, rounding
        self.names = list(dict.fromkeys(s.name for s in shown))
        self._residuals = []
        for one in shown:
            loose = one.name in floats.constant_adders
            half = max(tolerance.half, INTERPOLATED if one.name in floats.interpolated else 0.0)
            chosen = Tolerance(OTHER_WEIGHTS if loose else tolerance.weights, half)
            grid = expected_grid(one, ranges, floats.ties)
            self._residuals.append(Residual(one, grid, floats.axes.get(one.name), chosen))
        self._cuts = []
        if shown:
            self._cuts = [floats.cut(shown, Rounding(), False), floats.cut(shown, rounding, False)]
            self._cuts += [floats.cut(shown, rounding, True)] if dynamic else []

    def fake_quantized(self) -> FloatGraph | None:
        """Return the graph with the recipe's grids, or None where nothing is rounded."""
        grids = {}
        for one in self._shown:
            grid = Grid.of(one)
            if grid is not None and one.name in self._ranges:
                grid = recipe_grid(self._ranges[one.name], one)
            if grid is not None:
                grids[one.name] = (grid.step, grid.low, grid.high)
        if not grids and self._rounding.is_none():
            return None
        return self._floats.fake_quantized(grids, self._rounding)

    def _recomputed(self, arrays: Arrays, values: Sequence[Array]) -> list[list[Array]]:
        return [cut.run(arrays, values) for cut in self._cuts]

    def add(self, arrays: Arrays, values: Sequence[Array], truth: Mapping[str, Array]) -> None:
        fitting = [
            v if v.shape == truth[s.name].shape else truth[s.name]
            for s, v in zip(self._shown, values, strict=True)
        ]
        found = self._recomputed(arrays, fitting)
        for i, residual in enumerate(self._residuals):
            coarse = found[2][i] if len(found) > 2 else None
            residual.add(values[i], found[0][i], found[1][i], coarse, truth.get(self._shown[i].name))

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        known = set(self.names)
        order = {name: i for i, name in enumerate(self._floats.tensors)}
        for number, (one, residual) in enumerate(zip(self._shown, self._residuals, strict=True)):
            layer = self._layer(one.name, known)
            rows.append(
                {
                    "number": number,
                    "layer": layer.name,
                    "group": list(layer.group),
                    "operator": layer.operator,
                    "tensor": one.name,
                    "scale": one.scale,
                    "recipe_scale": None if residual.grid is None else residual.grid.step,
                    **residual.judge(),
                }
            )
        return sorted(rows, key=lambda r: (order.get(r["tensor"], len(order)), r["scale"] is not None))

    def _layer(self, tensor: str, known: set[str]) -> Layer:
        """Return the layer of a tensor: the product that is fused into what makes it, else its own operator."""
        layers = [
            self._floats.layers[t] for t in segment(self._floats, tensor, known) if t in self._floats.layers
        ]
        products = [x for x in layers if x.operator in PRODUCTS]
        chosen = products[0] if products else layers[0]
        group = dict.fromkeys(g for x in [chosen, *layers] for g in x.group)
        return Layer(chosen.name, tuple(group), chosen.operator)

    def look(self, number: int, arrays: Arrays, values: Sequence[Array]) -> str:
        """Return what the deviation of a shown tensor looks like, on one sample."""
        truth = self._floats.run(arrays)
        fitting = [
            v if v.shape == truth[s.name].shape else truth[s.name]
            for s, v in zip(self._shown, values, strict=True)
        ]
        found = self._recomputed(arrays, fitting)[1][number]
        one, residual = self._shown[number], self._residuals[number]
        if residual.grid is not None:
            found = np.clip(found, residual.grid.low, residual.grid.high)
        figures = residual.judge()
        axis = self._floats.axes.get(one.name)
        return describe(
            values[number],
            found,
            axis,
            figures["channels"],
            Grid.of(one),
            residual.grid,
            str(figures["where"]),
        )


PRODUCTS = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul"),
    *("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"),
)


def _traced(directory: Path, number: int, chosen: Sequence[int]) -> list[Array]:
    with np.load(directory / f"trace-{number:06d}.npz") as stored:
        return [stored[f"t{i}"] for i in chosen]


def _sample(folder: Path, number: int) -> tuple[Arrays, Arrays]:
    with np.load(folder / f"{number:06d}.npz") as stored:
        arrays = {k: stored[k] for k in stored.files}
    inputs = {k: v for k, v in arrays.items() if not k.startswith("reference/")}
    return inputs, {k: v for k, v in arrays.items() if k not in inputs}


def _stage(
    stages: Mapping[str, ParityAccumulator],
    broken: dict[str, str],
    name: str,
    wanted: Arrays,
    outputs: Arrays,
) -> None:
    try:
        stages[name].add(wanted, outputs)
    except PortcallError as error:
        broken.setdefault(name, error.message)


def _add(sums: dict[str, list[float]], name: str, wanted: Array, found: Array) -> None:
    one = sums.setdefault(name, [0.0, 0.0])
    w, f = wanted.astype(np.float64), found.astype(np.float64)
    one[0] += float((w**2).sum())
    one[1] += float(((w - f) ** 2).sum())


def _db(sums: Sequence[float] | None) -> float | None:
    if sums is None or sums[0] == 0 or not np.isfinite(sums).all():
        return None
    return decibels(sums[0], sums[1])


def _same_tensor(sums: Sequence[float] | None) -> float | None:
    """Return the SQNR of the graph's tensor to the source's of the same name; None where it is not the same tensor."""
    found = _db(sums)
    return found if found is not None and found >= SAME_TENSOR_DB else None


def _one_db(wanted: Arrays, outputs: Arrays) -> float:
    one = ParityAccumulator(list(wanted))
    try:
        one.add(wanted, outputs)
        return float(one.result("one")["sqnr_db"])
    except PortcallError:
        return -300.0


def _stages(
    graph: Graph,
    traced: Mapping[str, Any],
    stages: Mapping[str, ParityAccumulator],
    broken: Mapping[str, str],
    n: int,
    fake: bool,
    tensors: int,
) -> list[dict[str, Any]]:
    """Return the stages in order, each with its outputs' parity against the source, or why there is none."""
    hows = {
        "exported graph": f"the float {graph.kind} graph",
        "fake-quantized graph": "that graph with weights and activations rounded by the recipe"
        if fake
        else None,
        "deployed artifact": traced["deployed"],
    }
    listed: list[dict[str, Any]] = [
        {
            "name": "source",
            "how": f"{graph.source.format} by its own framework, float32",
            "parity": None,
            "reason": None,
        }
    ]
    for name, accumulator in stages.items():
        reason = broken.get(name)
        parity = None
        if hows[name] is None:
            reason = traced["refused"] if name == "deployed artifact" else "nothing is rounded"
        elif reason is None:
            try:
                parity = accumulator.result("artifact")
            except PortcallError as error:
                reason = error.message
        listed.append({"name": name, "how": hows[name], "parity": parity, "reason": reason})
    listed[-1]["traced"] = traced["how"]
    listed[-1]["tensors"] = tensors
    return listed


def _exported_divergence(
    stages: Sequence[Mapping[str, Any]], in_source: Mapping[str, Sequence[float]], floats: FloatGraph
) -> dict[str, Any] | None:
    """Return the divergence of the float graph from the source, at the first tensor that both know by one name."""
    stage = next(s for s in stages if s["name"] == "exported graph")
    if stage["parity"] is not None and stage["parity"]["sqnr_db"] >= GRAPH_DB:
        return None
    for name in floats.tensors:
        found = _db(in_source.get(name))
        if found is not None and found < SAME_TENSOR_DB:
            layer = floats.layers[name]
            return _divergence("exported graph", layer.name, list(layer.group), name, found, "everywhere")
    db = None if stage["parity"] is None else stage["parity"]["sqnr_db"]
    output = next(iter(floats.outputs.values()))
    layer = floats.layers.get(output, Layer(output, (output,), ""))
    return _divergence(
        "exported graph", layer.name, list(layer.group), output, db, stage["reason"] or "everywhere"
    )


def _divergence(
    stage: str, layer: str, group: list[str], tensor: str, db: float | None, where: str
) -> dict[str, Any]:
    return {
        "stage": stage,
        "layer": layer,
        "group": group,
        "tensor": tensor,
        "sqnr_db": db,
        "local_sqnr_db": None,
        "expected_sqnr_db": None,
        "where": where,
        "looks_like": None,
    }


def _first(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    for row in rows:
        if row["verdict"] == "diverges":
            keys = (
                "layer",
                "group",
                "tensor",
                "sqnr_db",
                "local_sqnr_db",
                "expected_sqnr_db",
                "ratio",
                "where",
                "number",
            )
            return {"stage": "deployed artifact", **{k: row[k] for k in keys}, "looks_like": None}
    return None


def _outputs_divergence(
    arguments: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    broken: Mapping[str, str],
    found_db: Sequence[float],
    traced: bool,
) -> dict[str, Any] | None:
    """Return the divergence of the outputs alone: they are not what the export measured, and no tensor says why."""
    problem = broken.get("deployed artifact") or deviation(arguments["expected_sqnr_db"], found_db)
    if problem is None and arguments["traced"]["refused"] is not None and not traced:
        problem = arguments["traced"]["refused"]
    if problem is None:
        return None
    parity = stages[-1]["parity"]
    output = arguments["artifact"]["outputs"][0]["source"]
    db = None if parity is None else parity["sqnr_db"]
    made = _divergence("deployed artifact", output, [output], output, db, problem)
    made["looks_like"] = (
        "every tensor that is shown agrees: the runtime computes something else" if traced else None
    )
    return made
