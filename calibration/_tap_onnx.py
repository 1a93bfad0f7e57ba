"""The ONNX tap: the graph with its watched tensors as outputs, in as many passes as the memory budget asks for.

``plan`` edits the graph (a process of its own: importing onnx costs 120 MB); ``passes`` runs it with ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from portcall.calibration.taps import Array, Pass, Runner, Tap
from portcall.targets.agent.contract import Graph


def plan(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]], budget_bytes: int, threads: int
) -> dict[str, Any]:
    """Write the graphs to run, and say how.

    shapes: of the largest sample, by input name. Watched tensors are held until a run ends, so their bytes are what
    memory depends on: as many samples run at once as fit *budget_bytes*; where one does not fit, the tensors are
    watched in groups over several passes. Returns {"passes": [{"path", "tensors"}], "width", "threads" (of one run),
    "bytes" (of one sample's tensors), "axes"}. Raises UnsupportedError for control flow.
    """
    import onnx

    from portcall.exporters import _qdq

    model = onnx.load(str(graph.path), load_external_data=False)
    _qdq.check_no_control_flow(model)
    tensors = _qdq.tapped_tensors(graph.path)
    inputs = {v.name for v in model.graph.input}
    found = _shapes(graph, [t for t in tensors if t not in inputs], shapes)
    sizes = {name: 4 * math.prod(shape) for name, shape in found.items()}
    groups = _groups(sizes, budget_bytes)
    largest = max((sum(sizes[t] for t in g) for g in groups), default=0)
    width = max(1, min(threads, budget_bytes // max(largest, 1))) if len(groups) < 2 else 1
    entries = []
    for number, group in enumerate(groups or [[]]):
        path = _write(model, graph.path, group)
        entries.append(
            {
                "shapes": {t: list(found[t]) for t in group},
                "path": str(path),
                "tensors": [t for t in tensors if t in inputs] * (number == 0) + group,
            }
        )
    return {
        "passes": entries,
        "width": width,
        "threads": max(1, threads // width),
        "bytes": sum(sizes.values()),
        "input_shapes": {name: list(shape) for name, shape in shapes.items()},
        "external": graph.path.with_name(graph.path.name + ".data").exists(),
        "axes": _qdq.weighted_inputs(graph.path),
    }


def _shapes(
    graph: Graph, tensors: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor for a sample of *shapes*: inferred, or read off a run where that loses track."""
    import onnx

    from portcall.exporters import _onnx

    model = onnx.load(str(graph.path), load_external_data=False)
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    known = {
        v.name: v for v in [*onnx.shape_inference.infer_shapes(model).graph.value_info, *model.graph.output]
    }
    found: dict[str, tuple[int, ...]] = {}
    for name in tensors:
        kind = known[name].type.tensor_type if name in known else None
        if (
            kind is not None
            and kind.HasField("shape")
            and all(d.HasField("dim_value") for d in kind.shape.dim)
        ):
            found[name] = tuple(d.dim_value for d in kind.shape.dim)
    rest = [t for t in tensors if t not in found]
    if rest:
        fresh = onnx.load(str(graph.path), load_external_data=False)
        found.update(_onnx.observed_shapes(graph.path, fresh, rest, shapes))
    return {name: found[name] for name in tensors}


def _groups(sizes: Mapping[str, int], budget_bytes: int) -> list[list[str]]:
    """Split tensors, in order, into groups within the budget (a tensor above it makes a group of its own)."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = budget_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _write(model: Any, beside: Path, tensors: Sequence[str]) -> Path:
    """Save the graph with *tensors* as additional outputs; beside the graph, where its external data is found."""
    import onnx

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    present = {v.name for v in tapped.graph.output}
    for name in tensors:
        if name not in present:
            tapped.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    key = hashlib.sha256("\0".join(tensors).encode()).hexdigest()[:16]
    path = beside.with_name(f"tap-{key}.onnx")
    part = path.with_name(f".{path.name}-{os.getpid()}")
    part.write_bytes(tapped.SerializeToString())
    part.replace(path)
    return path


def open_tap(graph: Graph, plan: Mapping[str, Any]) -> Tap:
    """Return the passes of a plan."""
    passes = [Pass(entry["tensors"], partial(_open, entry, plan)) for entry in plan["passes"]]
    return Tap(passes, plan["axes"], partial(_first_bad, graph))


def _first_bad(graph: Graph, sample: Mapping[str, Array], seen: str) -> str:
    """Run a sample once more with every float tensor as an output: not all of them are watched."""
    import onnx
    import onnxruntime as ort

    from portcall.exporters import _structure

    model = onnx.load(str(graph.path), load_external_data=False)
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in [*_structure.tensor_types(model), *model.graph.output]
    }
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    makers = {t: n for n in model.graph.node for t in n.output if kinds.get(t) in floats}
    path = _write(model, graph.path, list(makers))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    path.unlink()
    for name, array in zip(makers, session.run(list(makers), dict(sample)), strict=True):
        if not np.isfinite(array).all():
            return f"tensor {name!r}, made by {makers[name].op_type} {makers[name].name!r},"
    return f"tensor {seen!r}"


def _open(entry: Mapping[str, Any], plan: Mapping[str, Any]) -> list[Runner]:
    """Return runners that share one session: it may run several samples at once."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = plan["threads"]
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if plan["external"]:  # packed copies of the weights would nearly double the memory of a large model
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(entry["path"], options, providers=["CPUExecutionProvider"])
    types = {v.name: np.float16 if v.type == "tensor(float16)" else np.float32 for v in session.get_outputs()}

    def buffers() -> _Buffers:
        arrays = {name: np.empty(shape, types[name]) for name, shape in entry["shapes"].items()}
        return _Buffers({k: tuple(v) for k, v in plan["input_shapes"].items()}, arrays)

    return [partial(_run, session, buffers(), entry["tensors"]) for _ in range(plan["width"])]


@dataclass(slots=True)
class _Buffers:
    """Arrays that a run writes its outputs into: the same from sample to sample while the inputs' *shapes* stay."""

    shapes: dict[str, tuple[int, ...]]
    arrays: dict[str, Array]


def _run(
    session: Any, buffers: _Buffers, wanted: Sequence[str], sample: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

    # In the order of the plan: the table lists tensors as they come, and must not depend on the number of passes.
    yield from ((name, sample[name]) for name in wanted if name in sample)
    outputs = [name for name in wanted if name not in sample]
    if not outputs:
        return
    shapes = {name: array.shape for name, array in sample.items()}
    if shapes == buffers.shapes:
        try:
            _bound(session, sample, buffers.arrays)
            yield from buffers.arrays.items()
            return
        except (Fail, InvalidArgument, RuntimeException):
            pass  # an output whose shape depends on the values of this sample
    arrays = dict(zip(outputs, session.run(outputs, dict(sample)), strict=True))
    buffers.shapes, buffers.arrays = shapes, arrays
    yield from arrays.items()


def _bound(session: Any, sample: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Run with outputs written into the given arrays: a fresh allocation per run costs more than the histogram."""
    binding = session.io_binding()
    for name, array in sample.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
