"""The TFLite tap: the float flatbuffer with every activation as an output, so that LiteRT gets our ranges."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from portcall.calibration.taps import Array, Pass, Runner, Tap
from portcall.targets.agent.contract import Graph


def open_tap(graph: Graph, threads: int) -> Tap:
    """Return the one pass over a float flatbuffer; every activation is watched."""
    from portcall.exporters import _tflite

    tensors = _tflite.tapped_tensors(graph.path)
    one = Pass(list(tensors.values()), partial(_open, graph, tensors, threads))
    return Tap([one], _tflite.weighted_inputs(graph.path), lambda _, seen: f"tensor {seen!r}")


def _open(graph: Graph, tensors: Mapping[int, str], count: int) -> list[Runner]:
    """Return runners with an interpreter each.

    Outputs are kept by XNNPACK too. (``experimental_preserve_all_tensors`` needs the built-in kernels, which are
    several times slower.)
    """
    from ai_edge_litert.interpreter import Interpreter

    from portcall.exporters import _tflite

    path = graph.path.with_name(f"tap-{os.getpid()}.tflite")
    path.write_bytes(_tflite.with_outputs(graph.path.read_bytes(), list(tensors)))
    runners: list[Runner] = []
    for _ in range(count):
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
        details = interpreter.get_signature_runner().get_input_details()
        runners.append(partial(_run, interpreter, {name: d["index"] for name, d in details.items()}, tensors))
    path.unlink()  # mapped
    return runners


def _run(
    interpreter: Any, inputs: Mapping[str, int], tensors: Mapping[int, str], sample: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    for name, index in inputs.items():
        interpreter.set_tensor(index, sample[name])
    interpreter.invoke()
    for index, name in tensors.items():
        yield name, interpreter.tensor(index)()  # a view; the interpreter refuses to run while one is held
