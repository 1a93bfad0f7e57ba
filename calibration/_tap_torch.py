"""The torch tap: the exported program, interpreted node by node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from portcall.calibration.taps import Array, Pass, Tap
from portcall.targets.agent.contract import Graph


def open_tap(graph: Graph, threads: int) -> Tap:
    """Return the one pass over an exported program: its inputs and every floating-point tensor a node makes."""
    import torch

    from portcall.source_torch import load_program

    torch.set_num_threads(threads)
    program = load_program(graph.path)
    module: Any = program.module(check_guards=False)
    names = [node.name for node in module.graph.nodes if _is_watched(node, node.meta.get("val"))]
    makers = {n.name: str(n.target) for n in module.graph.nodes}
    one = Pass(names, lambda: [partial(_run, module, [t.name for t in graph.source.inputs])])
    return Tap([one], {}, lambda _, seen: f"tensor {seen!r}, made by {makers[seen]},")


def _is_watched(node: Any, value: Any) -> bool:
    """Tell whether *value*, of that node, is an activation: a tensor of floats that is no parameter."""
    import torch

    made = node.op in ("placeholder", "call_function")
    return made and isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.float32)


def _run(module: Any, inputs: Sequence[str], sample: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Run node by node, so that a tensor is gone once its last reader has run: what Interpreter.run does inside."""
    import torch

    interpreter = torch.fx.Interpreter(module)
    interpreter.env = {}
    # The placeholders are the flattened inputs, in the source's order.
    interpreter.args_iter = iter([torch.from_numpy(np.asarray(sample[name], order="C")) for name in inputs])
    for node in module.graph.nodes:
        with torch.no_grad():
            value = interpreter.env[node] = interpreter.run_node(node)
        if _is_watched(node, value):
            yield node.name, value.numpy()
        for dead in interpreter.user_to_last_uses.get(node, []):
            del interpreter.env[dead]
