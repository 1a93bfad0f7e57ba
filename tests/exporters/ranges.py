"""Exact ranges and channel means of small graphs, for the tests of the exporters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from portcall.exporters import _qdq, _tflite
from portcall.targets.agent.contract import Range
from tests.exporters.graphs import Array

Samples = Sequence[Mapping[str, Array]]


def run_onnx(path: Path, samples: Samples, outputs: Sequence[str] | None = None) -> list[list[Array]]:
    """Return the outputs of an ONNX file, or any of its tensors, for every sample."""
    model = onnx.load(str(path))
    present = {v.name for v in model.graph.output}
    for name in outputs or ():
        if name not in present:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [session.run(outputs, dict(sample)) for sample in samples]


def onnx_ranges(path: Path, samples: Samples) -> dict[str, Range]:
    """Return the ranges of exactly the tapped tensors of an ONNX graph."""
    names = _qdq.tapped_tensors(path)
    graph = onnx.load(str(path), load_external_data=False).graph
    made = [n for n in names if n not in {v.name for v in graph.input}]
    seen: dict[str, list[Array]] = {n: [s[n] for s in samples] for n in names if n not in made}
    if made:
        runs = run_onnx(path, samples, made)
        seen.update({n: [run[i] for run in runs] for i, n in enumerate(made)})
    return {n: _range(seen[n], _qdq.weighted_inputs(path).get(n)) for n in names}


def tflite_ranges(path: Path, samples: Samples) -> dict[str, Range]:
    """Return the ranges of exactly the tapped tensors of a float flatbuffer."""
    interpreter = Interpreter(
        str(path),
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    inputs = {n: d["index"] for n, d in interpreter.get_signature_runner().get_input_details().items()}
    tapped = _tflite.tapped_tensors(path)
    seen: dict[str, list[Array]] = {name: [] for name in tapped.values()}
    for sample in samples:
        for name, index in inputs.items():
            interpreter.set_tensor(index, sample[name])
        interpreter.invoke()
        for index, name in tapped.items():
            seen[name].append(interpreter.get_tensor(index))
    axes = _tflite.weighted_inputs(path)
    return {name: _range(arrays, axes.get(name)) for name, arrays in seen.items()}


def _range(arrays: Sequence[Array], axis: int | None) -> Range:
    low, high = min(0.0, *(float(a.min()) for a in arrays)), max(0.0, *(float(a.max()) for a in arrays))
    if axis is None:
        return Range(low, high)
    means = [np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]).mean(0, np.float64) for a in arrays]
    return Range(low, high, channel_mean=tuple(np.mean(means, 0).tolist()))


def sqnr_db(wanted: Any, found: Any) -> float:
    """Return the signal to quantization noise ratio in dB."""
    wanted, found = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
    return float(10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()))
