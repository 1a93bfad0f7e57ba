"""An ExecuTorch program from the canonical graph, a recipe and ranges; and what a user should know about it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from portcall.targets.agent.contract import Graph, Ranges, Recipe
from portcall.targets.agent.errors import CellFailed, UnsupportedError

LEFT_OUT = "left_out.json"


class Converted(NamedTuple):
    """The bytes of a .pte file, the shapes of its outputs, and notes for the manifest."""

    program: bytes
    output_shapes: Tuple[Tuple[int, ...], ...]
    notes: Tuple[str, ...]


def convert(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Converted:
    """Return *graph* as a program of its example shapes; *directory* takes intermediate files.

    Raises UnsupportedError for control flow, for operators that ExecuTorch has
    no kernel for (with the source line or ONNX node) and for weights that XNNPACK does not compute with; CellFailed
    where *ranges* lacks a tensor.
    """
    import onnx

    from portcall.exporters import _executorch, _qdq

    model = onnx.load(str(graph.path))
    notes: Tuple[str, ...] = ()
    if recipe.precision == "fp32":
        traced = _executorch.trace(graph.path, graph)
    else:
        if recipe.precision == "int8":
            _qdq.check_no_control_flow(model)
        make = _trained if graph.source.quantized else _quantized
        traced, notes = make(graph, model, recipe, ranges, directory)
    edge, program = _executorch.lower(traced)
    outside = _executorch.outside(edge)
    _check_kernels(graph, traced, outside, program)
    notes += _outside_notes(traced, outside)
    if any(isinstance(d, str) for t in (*graph.source.inputs, *graph.source.outputs) for d in t.shape):
        notes += ("its dynamic dimensions are fixed at the example's sizes: export it again with --shape",)
    return Converted(bytes(program.buffer), traced.output_shapes, notes)


def _quantized(
    graph: Graph, model: Any, recipe: Recipe, ranges: Optional[Ranges], directory: Path
) -> Tuple[Any, Tuple[str, ...]]:
    """Return the traced graph with Q/DQ pairs, and notes: what stayed in float and why."""
    from portcall.calibration.weights import scheme_of
    from portcall.exporters import _correction, _executorch, _onnx, _qdq
    from portcall.exporters._executorch_quantize import Quantizer, encoding_of

    options, precision = recipe.options, recipe.precision
    scheme = scheme_of(options)
    if scheme.block or not scheme.symmetric or (precision == "int8-dynamic" and not scheme.per_channel):
        raise UnsupportedError(
            f"XNNPACK's {precision} kernels take no weights by {scheme}",
            'Use "weights": "channel" (the default)' + (' or "tensor"' if precision == "int8" else ""),
        )
    if precision == "int8":
        assert ranges is not None
        missing = [name for name in _qdq.tapped_tensors(graph.path) if name not in ranges]
        if missing:
            raise CellFailed(
                f"the calibration table lacks {len(missing)} tensors of this graph, first {missing[0]!r}",
                "Calibrate again with this version of portcall",
            )
    kept = _qdq.kept_in_float(model.graph, options)
    notes = _qdq.kept_notes(kept)
    path, files = graph.path, ()  # type: Path, Tuple[str, ...]
    if options.get("bias_correction"):

        def rebuild(node: Any, weight: Any) -> Optional[Any]:
            return None if node.name in kept else _qdq.rounded(node, weight, scheme)

        notes += _correction.correct(model, ranges, _qdq.weighted_inputs(graph.path), rebuild)
        path = directory / "corrected.onnx"
        files = _onnx.save(model, path)
    traced = _executorch.trace(path, graph)
    for file in files:
        (directory / file).unlink()
    inputs = [graph.names[t.name] for t in graph.source.inputs]
    quantizer = Quantizer(traced, _executorch.tensor_names(traced, inputs), kept, scheme)
    if precision == "int8":
        assert ranges is not None
        beyond = {name for name, r in ranges.items() if r.is_beyond_int8()}
        sentinels = [n.name for n in model.graph.node if beyond & {*n.input, *n.output}]
        notes += _qdq.float_notes(sentinels)
        encodings = {name: encoding_of(r) for name, r in ranges.items() if name not in beyond}
        quantizer.static(encodings, products_only=_qdq._is_transformer(model.graph))
        left = [name for name in quantizer.left if name not in sentinels]
        notes += _qdq.named("matrix products that quantize their input at run time", quantizer.at_run_time)
    else:
        quantizer.dynamic()
        left = quantizer.left
    if not quantizer.chosen:
        raise UnsupportedError(
            f"{precision}: XNNPACK computes no operator of this model on integers",
            "Use fp32, or another backend",
        )
    notes += _qdq.named("left in float32, XNNPACK has no such integer kernel for them", left)
    quantizer.insert()
    return traced, notes


def _trained(
    graph: Graph, model: Any, recipe: Recipe, ranges: Optional[Ranges], directory: Path
) -> Tuple[Any, Tuple[str, ...]]:
    """Return the traced float graph of a quantized source with pairs of its own scales, and notes.

    Leaves LEFT_OUT: the names of the trained tensors that XNNPACK computes in float, for ``_trained_check``.
    """
    import json

    from portcall.calibration.weights import scheme_of
    from portcall.exporters import _executorch, _onnx, _qdq, _trained_rewrite
    from portcall.exporters._executorch_quantize import Encoding, Quantizer

    entries = _trained_rewrite.split(model)
    files = _onnx.save(model, directory / "float.onnx")
    traced = _executorch.trace(directory / "float.onnx", graph)
    for file in files:
        (directory / file).unlink()
    encodings: Dict[str, Encoding] = {}
    weights: Dict[str, Any] = {}
    readers = {name: node.name for node in model.graph.node for name in node.input}
    for entry in entries:
        if entry.is_weight:
            weights[readers.get(entry.tensor, entry.layer)] = entry.quantization.symmetric().scales
        elif len(entry.quantization.scales) == 1:
            found = entry.quantization.as_int8()
            encodings.setdefault(entry.tensor, Encoding(found.scales[0], found.zero_points[0]))
    inputs = [graph.names[t.name] for t in graph.source.inputs]
    quantizer = Quantizer(
        traced, _executorch.tensor_names(traced, inputs), (), scheme_of({"weights": "channel"})
    )
    quantizer.static(encodings, trained=weights)
    if not quantizer.chosen:
        raise UnsupportedError(
            "XNNPACK computes no operator of this quantized model on integers", "Export it to onnxruntime"
        )
    held = {*quantizer.tensors, *(e.tensor for e in entries if e.is_weight and e.layer in quantizer.weighted)}
    left = sorted({e.tensor for e in entries} - held)
    (directory / LEFT_OUT).write_text(json.dumps(left) + "\n", encoding="utf-8")
    quantizer.insert()
    return traced, _qdq.named("left in float32, XNNPACK has no such integer kernel for them", quantizer.left)


def _check_kernels(graph: Graph, traced: Any, outside: List[Any], program: Any) -> None:
    """Raise UnsupportedError for operators outside of the delegates that the runtime has no kernel for."""
    from executorch.runtime import Runtime

    from portcall.exporters import _executorch, _unsupported

    known = Runtime.get().operator_registry.operator_names
    plan = program.executorch_program.execution_plan[0]
    wanted = [f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators]
    missing = [name for name in wanted if name not in known]
    if not missing:
        return
    kind = missing[0].partition(".")[0].replace("::", ".")
    stem = kind.rpartition(".")[2].replace("_copy", "")
    node = next((n for n in outside if stem in str(n.target)), None)
    where = "" if node is None else _executorch.onnx_name(traced, node)
    line = ""
    if graph.source.format != "onnx":
        from portcall.source_torch import load_program

        line = _unsupported._location(load_program(graph.source.path), stem)
    place = ", ".join(filter(None, (line, where and f"ONNX node {where!r}")))
    raise UnsupportedError(
        f"ExecuTorch's runtime has no kernel for torch's {kind}" + (f" ({place})" if place else ""),
        _unsupported.replacement_for(kind),
    )


def _outside_notes(traced: Any, outside: List[Any]) -> Tuple[str, ...]:
    """Return the note that names what runs outside of XNNPACK, by ExecuTorch's portable kernels."""
    from portcall.exporters import _executorch

    if not outside:
        return ()
    kinds = Counter(_executorch.operator_name(n) for n in outside)
    names = list(dict.fromkeys(filter(None, (_executorch.onnx_name(traced, n) for n in outside))))
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
    nodes = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{len(outside)} operators run outside of XNNPACK, by ExecuTorch's own kernels: {shown}"
        + (f" (ONNX nodes {nodes})" if nodes else ""),
    )
