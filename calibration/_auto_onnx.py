"""Measures, on the ONNX graph, what quantizing one tensor with one range costs at the outputs.

``plan`` puts a fake quantizer behind every tensor (a process of its own, as in ``_tap_onnx``): Mul, Round, Clip, Mul
with parameters that are an input of the graph, so that one session tries every setting. ``measure`` runs them.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from portcall.calibration.data import open_data
from portcall.calibration.table import DataRecord, is_held
from portcall.targets.agent.contract import Graph

Array = np.ndarray[Any, Any]
PARAMETERS = "portcall_quantizers"
OFF_BITS = 22
"""A quantizer that is off has steps of 2**-22 of its tensor's extent: what float32 cannot tell from the value."""


def plan(arguments: Mapping[str, Any], progress: object) -> dict[str, Any]:
    """Write the graph with a fake quantizer behind each of *tensors*; return its path.

    The input PARAMETERS is float32[4 * len(tensors)]: 1 / scale, scale, lowest and highest integer of each.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = Graph.from_json(arguments["graph"])
    tensors = list(arguments["tensors"])
    model = onnx.load(str(graph.path), load_external_data=False)
    inputs = {v.name for v in model.graph.input}
    pieces = [
        f"portcall_{i}_{part}" for i in range(len(tensors)) for part in ("inverse", "scale", "low", "high")
    ]
    raw = {name: f"{name}/portcall_raw" for name in tensors}
    for node in model.graph.node:
        # A tensor keeps its name behind the quantizer, so that its readers and the graph's outputs stay; that of an
        # input of the graph cannot change, so that its readers do.
        node.output[:] = [raw[n] if n in raw and n not in inputs else n for n in node.output]
        node.input[:] = [raw[n] if n in raw and n in inputs else n for n in node.input]
    for i, name in enumerate(tensors):
        before, after = (name, raw[name]) if name in inputs else (raw[name], name)
        inverse, scale, low, high = pieces[4 * i : 4 * i + 4]
        steps = [f"portcall_{i}_{step}" for step in ("scaled", "rounded", "clipped")]
        model.graph.node.extend(
            [
                helper.make_node("Mul", [before, inverse], steps[:1]),
                helper.make_node("Round", steps[:1], steps[1:2]),
                helper.make_node("Clip", [steps[1], low, high], steps[2:]),
                helper.make_node("Mul", [steps[2], scale], [after]),
            ]
        )
    model.graph.input.append(helper.make_tensor_value_info(PARAMETERS, TensorProto.FLOAT, [len(pieces)]))
    sizes = helper.make_tensor("portcall_sizes", TensorProto.INT64, [len(pieces)], [1] * len(pieces))
    model.graph.initializer.append(sizes)
    model.graph.node.append(helper.make_node("Split", [PARAMETERS, "portcall_sizes"], pieces, axis=0))
    from portcall.exporters import _onnx

    _onnx.sort(model.graph)
    path = graph.path.with_name(f"auto-{os.getpid()}.onnx")
    path.write_bytes(model.SerializeToString())
    return {"path": str(path)}


def symmetric_tensors(arguments: Mapping[str, Any], progress: object) -> list[str]:
    """Return the tensors that a consumer of symmetric ranges quantizes."""
    from portcall.exporters import _qdq_symmetric

    return list(_qdq_symmetric.quantized_tensors(Graph.from_json(arguments["graph"]).path))


def quantizer(low: float, high: float, symmetric: bool) -> tuple[float, float, float, float]:
    """Return the four parameters of an 8-bit quantizer of [low, high]: those that an export would write."""
    low, high = float(np.float32(low)), float(np.float32(high))
    scale = high / 127 if symmetric else (high - low) / 255
    if scale < np.finfo(np.float32).tiny:  # nothing but zeros, for an export: 1 / scale must stay finite
        return 1.0, 1.0, 0.0, 0.0
    if symmetric:
        return 1 / scale, scale, -127.0, 127.0
    zero_point = round(-low / scale)
    return 1 / scale, scale, -float(zero_point), 255.0 - zero_point


def off(extent: float) -> tuple[float, float, float, float]:
    """Return the parameters of a quantizer that changes nothing."""
    scale = 2.0 ** (np.ceil(np.log2(max(extent, 1e-30))) - OFF_BITS)
    return 1 / scale, scale, -(2.0 ** (OFF_BITS + 1)), 2.0 ** (OFF_BITS + 1)


def measure(arguments: Mapping[str, Any], progress: Callable[[int, int | None], None]) -> dict[str, Any]:
    """Run every setting on held-back samples; return the output error of each relative to the energy of the output.

    arguments: graph; path (of ``plan``); data; planned [start, stop); held_every; width and threads (samples at once,
    threads of each); extents: the largest magnitude of each tensor; settings: lists of [tensor number, four
    parameters], all other tensors off; seconds: after that no further sample is begun; at_most: so many samples, the
    first ones (None: all). Returns {"n", "errors":
    [per setting][per sample]}: summed over the floating-point outputs, (off - on)^2 relative to the mean energy of off
    over the samples.
    """
    import onnxruntime as ort

    graph, record = Graph.from_json(arguments["graph"]), DataRecord(**arguments["data"])
    first, last = arguments["planned"]
    every = arguments["held_every"]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = arguments["threads"]
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(arguments["path"], options, providers=["CPUExecutionProvider"])
    outputs = [v.name for v in session.get_outputs() if v.type in ("tensor(float)", "tensor(float16)")]
    base = np.array([off(extent) for extent in arguments["extents"]], np.float32)
    settings = [base.reshape(-1)]
    for setting in arguments["settings"]:
        changed = base.copy()
        for number, parameters in setting:
            changed[number] = parameters
        settings.append(changed.reshape(-1))
    data = open_data(record.spec, graph.source.inputs, preprocess=record.preprocess)
    view = enumerate(data.with_slice(record.start + first, record.start + last), first)
    kept_out = ((number, sample) for number, sample in view if is_held(number, every))
    samples = itertools.islice(kept_out, arguments["at_most"])
    total = sum(is_held(i, every) for i in range(first, last)) * len(settings)
    deadline = time.monotonic() + arguments["seconds"]
    lock, done = threading.Lock(), itertools.count(1)
    found: dict[int, tuple[Array, Array]] = {}

    def work() -> None:
        while True:
            with lock:
                number, sample = (
                    (None, None) if found and time.monotonic() > deadline else next(samples, (None, None))
                )
            if number is None or sample is None:
                return
            errors = np.zeros((len(settings), len(outputs)))
            energy = np.zeros(len(outputs))
            reference: Sequence[Array] = []
            for which, parameters in enumerate(settings):
                results = session.run(outputs, {**sample.inputs, PARAMETERS: parameters})
                if which == 0:
                    reference = [np.asarray(r, np.float64) for r in results]
                    energy[:] = [np.square(r).sum() for r in reference]
                else:
                    errors[which] = [np.square(a - b).sum() for a, b in zip(results, reference, strict=True)]
                with lock:
                    progress(next(done), total)
            found[number] = errors, energy

    with ThreadPoolExecutor(arguments["width"]) as pool:
        for future in [pool.submit(work) for _ in range(arguments["width"])]:
            future.result()
    energy = np.mean([found[k][1] for k in sorted(found)], axis=0)
    relative = [(found[k][0][1:] / np.where(energy > 0, energy, np.inf)).sum(axis=1) for k in sorted(found)]
    return {"n": len(found), "errors": np.transpose(relative).tolist()}
