"""The TFLite tap: an interpreter that keeps every tensor, so that LiteRT gets our ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from portcall.calibration.taps import Array, Pass, Runner, Tap
from portcall.targets.agent.contract import Graph


def open_tap(graph: Graph, threads: int) -> Tap:
    """Return the one pass over a float flatbuffer; every activation is watched."""
    from portcall.exporters import _tflite

    tensors = _tflite.tapped_tensors(graph.path)
    one = Pass(list(tensors.values()), lambda: [_open(graph, tensors) for _ in range(threads)])
    return Tap([one], _tflite.weighted_inputs(graph.path), lambda _, seen: f"tensor {seen!r}")


def _open(graph: Graph, tensors: Mapping[int, str]) -> Runner:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(graph.path),
        num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    details = interpreter.get_signature_runner().get_input_details()
    return partial(_run, interpreter, {name: d["index"] for name, d in details.items()}, tensors)


def _run(
    interpreter: Any, inputs: Mapping[str, int], tensors: Mapping[int, str], sample: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    for name, index in inputs.items():
        interpreter.set_tensor(index, sample[name])
    interpreter.invoke()
    for index, name in tensors.items():
        yield name, interpreter.tensor(index)()  # a view; the interpreter refuses to run while one is held
