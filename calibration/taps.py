"""Taps: run a graph sample by sample and observe its tensors, in constant memory.

Editing an ONNX graph and running it happen in two processes: importing onnx costs 120 MB. All functions here
are called in workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from portcall.calibration.data import open_data
from portcall.targets.agent.contract import Graph
from portcall.targets.agent.errors import BadInput, CellFailed

Observed = Iterator[tuple[str, "np.ndarray[Any, Any]"]]
Tap = Callable[[dict[str, "np.ndarray[Any, Any]"]], Observed]


def plan_onnx(arguments: Mapping[str, Any], progress: object) -> dict[str, Any]:
    """Write the graph with every tapped tensor as an output; return their names."""
    import onnx

    from portcall.exporters import _qdq

    graph = Graph.from_json(arguments["graph"])
    model = onnx.load(str(graph.path), load_external_data=False)
    tensors = _qdq.tapped_tensors(graph.path)
    present = {v.name for v in [*model.graph.output, *model.graph.input]}
    for name in tensors:
        if name not in present:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    path = graph.path.with_name("tap.onnx")  # beside the graph: external data is found by relative path
    part = path.with_name(f".tap-{os.getpid()}.onnx")
    part.write_bytes(model.SerializeToString())
    part.replace(path)
    return {"path": str(path), "tensors": tensors}


def observe(arguments: Mapping[str, Any], progress: Callable[[int, int | None], None]) -> dict[str, Any]:
    """Run the calibration samples through a graph; return minimum and maximum of every tapped tensor.

    Raises BadInput without samples, CellFailed where the network itself makes NaN or infinity (names the tensor).
    """
    graph = Graph.from_json(arguments["graph"])
    record = arguments["data"]
    data = open_data(record["spec"], graph.source.inputs, preprocess=record["preprocess"])
    view = data.with_slice(record["start"], record["stop"])
    tap = _onnx_tap(arguments["plan"]) if graph.kind == "onnx" else _tflite_tap(graph)
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    count = 0
    for sample in view:
        for name, array in tap(sample.inputs):
            least, most = float(array.min()), float(array.max())
            if not (np.isfinite(least) and np.isfinite(most)):
                raise CellFailed(
                    f"tensor {name!r} holds NaN or infinity for calibration sample {sample.index}",
                    "The float model itself overflows there: check that sample and the layer",
                )
            low[name] = min(low.get(name, least), least)
            high[name] = max(high.get(name, most), most)
        count += 1
        progress(count, record["n"])
    if not count:
        raise BadInput(f"no calibration samples in {record['spec']!r}", "Give at least one sample")
    return {"tensors": list(low), "minimum": list(low.values()), "maximum": list(high.values()), "n": count}


def _onnx_tap(plan: Mapping[str, Any]) -> Tap:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(plan["path"], options, providers=["CPUExecutionProvider"])
    inputs = {v.name for v in session.get_inputs()}
    wanted = set(plan["tensors"])
    outputs = [v.name for v in session.get_outputs() if v.name in wanted]

    def run(sample: dict[str, np.ndarray[Any, Any]]) -> Observed:
        yield from ((name, array) for name, array in sample.items() if name in wanted & inputs)
        if outputs:  # an empty list would mean all outputs
            yield from zip(outputs, session.run(outputs, sample), strict=True)

    return run


def _tflite_tap(graph: Graph) -> Tap:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from portcall.exporters import _tflite

    interpreter = Interpreter(
        str(graph.path),
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner()
    inputs = {name: detail["index"] for name, detail in runner.get_input_details().items()}
    tensors = _tflite.tapped_tensors(graph.path)

    def run(sample: dict[str, np.ndarray[Any, Any]]) -> Observed:
        for name, index in inputs.items():
            interpreter.set_tensor(index, sample[name])
        interpreter.invoke()
        for index, name in tensors.items():
            yield name, interpreter.get_tensor(index)

    return run
