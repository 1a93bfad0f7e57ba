"""An ONNX graph as a torch module, for the converters that take no ONNX (LiteRT's, Core ML's).

Every ONNX node becomes a submodule that is named after it, so that a converter's scopes lead back to the ONNX file.
Shapes are Python integers while torch traces: what computes them (Shape, Gather, Concat...) leaves no operator behind.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Set

from portcall.targets.agent.errors import BadInput

OPSETS = range(7, 25)
"""Operator sets whose operators are known here; the tests go from 11 to 22."""


class Step(NamedTuple):
    """One node: its submodule, the values that it takes and gives ("" for none), and those nobody needs after it."""

    module: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    last_used: Sequence[str]


def to_module(path: Path) -> Any:
    """Return a ``torch.nn.Module`` that computes the ONNX graph at *path*; dtypes and layouts are those of ONNX.

    forward takes the graph's inputs in order and returns a tuple of its outputs in order. Weights are buffers. It works
    under torch.export (non-strict, dynamic dimensions included) and torch.jit.trace. ``node_names`` maps the name of
    a submodule to that of its ONNX node. A product with a constant matrix is a ``linear``.
    Raises BadInput for an operator set that is not known here, UnsupportedError (name, type, domain) for a node that
    has no equivalent in torch.
    """
    import onnx
    import torch

    from portcall.exporters._onnx_to_torch_node import Node, as_array

    model = onnx.load(str(path))
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset not in OPSETS:
        raise BadInput(
            f"{path.name} has the ONNX operator set {opset or 'none'}",
            f"Convert it to one from {OPSETS[0]} to {OPSETS[-1]}: onnx.version_converter.convert_version",
        )
    graph = model.graph
    arrays = {tensor.name: as_array(tensor, path.parent) for tensor in graph.initializer}
    nodes = [Node.of(node, opset, number) for number, node in enumerate(graph.node)]
    _products_to_linear(nodes, arrays)
    inputs = [value.name for value in graph.input if value.name not in arrays]
    return _module_class(torch)(nodes, arrays, inputs, [value.name for value in graph.output])


def _products_to_linear(nodes: Sequence[Any], arrays: Dict[str, Any]) -> None:
    """Turn every MatMul by a constant matrix into "Linear", whose weight is [outputs, inputs] as torch's.

    Converters know that for a fully connected layer, whose weight has a scale per output.
    """
    import numpy as np

    for node in nodes:
        if node.op_type != "MatMul" or node.domain or node.inputs[1] not in arrays:
            continue
        weight = arrays[node.inputs[1]]
        if getattr(weight, "ndim", 0) == 2:
            transposed = f"{node.inputs[1]}.T"
            arrays.setdefault(transposed, np.ascontiguousarray(weight.T))
            node.op_type, node.inputs = "Linear", [node.inputs[0], transposed]


def _module_class(torch: Any) -> Any:
    """Return the module's class: it is made here because torch is not imported at the top of this file."""
    from portcall.exporters import _onnx_to_torch_node, _onnx_to_torch_ops

    class OnnxNode(torch.nn.Module):  # type: ignore[misc]  # torch is Any here
        """One ONNX node; forward takes tensors, arrays that are known while tracing, and None."""

        def __init__(self, node: Any, operator: Any) -> None:
            super().__init__()
            self.node, self.operator = node, operator

        def forward(self, *values: Any) -> Any:
            return self.operator.function(self.node, *values)

    class OnnxModule(torch.nn.Module):  # type: ignore[misc]  # torch is Any here
        """The whole graph."""

        def __init__(
            self,
            nodes: Sequence[Any],
            arrays: Mapping[str, Any],
            inputs: Sequence[str],
            outputs: Sequence[str],
        ) -> None:
            super().__init__()
            operators = _onnx_to_torch_ops.operators()
            self.input_names, self.output_names = tuple(inputs), tuple(outputs)
            self.node_names: Dict[str, str] = {}
            self._arrays, self._static = dict(arrays), _onnx_to_torch_node.static_operators()
            self.nodes, self.weights = torch.nn.Module(), torch.nn.Module()
            self._weight_names: Dict[str, str] = {}
            last: Dict[str, int] = {name: i for i, node in enumerate(nodes) for name in node.inputs}
            self._steps: List[Step] = []
            for number, node in enumerate(nodes):
                operator = None if node.domain else operators.get(node.op_type)
                if operator is None:
                    raise node.refused()
                name = _unused(node.name or node.op_type, self.node_names)
                self.node_names[name] = node.name
                kind = type(node.op_type, (OnnxNode,), {"__module__": "onnx", "__qualname__": node.op_type})
                self.nodes.add_module(name, kind(node, operator))
                done = {i for i in node.inputs if last[i] == number and i not in self.output_names}
                self._steps.append(Step(name, tuple(node.inputs), tuple(node.outputs), sorted(done)))
                for position, value in enumerate(node.inputs):
                    if value in arrays and not operator.is_static(position):
                        self._register(value)
            for value in outputs:
                if value in arrays:
                    self._register(value)
            taken = {name for step in self._steps for name in step.inputs}
            for unused in set(arrays) - taken - set(outputs):
                del self._arrays[unused]

        def _register(self, name: str) -> None:
            if name not in self._weight_names:
                self._weight_names[name] = _unused(name, set(self._weight_names.values()))
                tensor = _onnx_to_torch_node.as_tensor(self._arrays[name])
                self.weights.register_buffer(self._weight_names[name], tensor)

        def _tensor(self, name: str, value: Any) -> Any:
            """Return a value as a tensor; a constant of the graph is a buffer."""
            if value is None or isinstance(value, torch.Tensor):
                return value
            if name in self._weight_names:
                return getattr(self.weights, self._weight_names[name])
            return _onnx_to_torch_node.as_tensor(value)

        def forward(self, *inputs: Any) -> Any:
            # torch.jit.trace warns that sizes are taken as they are: they are meant so.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                return self._run(inputs)

        def _run(self, inputs: Sequence[Any]) -> Any:
            values: Dict[str, Any] = {**self._arrays, **dict(zip(self.input_names, inputs)), "": None}
            for step in self._steps:
                module = getattr(self.nodes, step.module)
                given = [values[name] for name in step.inputs]
                known = self._static.get(module.node.op_type)
                made = known(module.node, *given) if known is not None else None
                if made is None:
                    static = module.operator.is_static
                    pairs = enumerate(zip(step.inputs, given))
                    made = module(*(v if static(i) else self._tensor(name, v) for i, (name, v) in pairs))
                made = made if isinstance(made, tuple) else (made,)
                values.update((name, value) for name, value in zip(step.outputs, made) if name)
                for name in step.last_used:
                    values.pop(name, None)
                values[""] = None
            return tuple(self._tensor(name, values[name]) for name in self.output_names)

    OnnxModule.__module__, OnnxModule.__qualname__ = "onnx", "Graph"  # what converters name tensors after
    return OnnxModule


def _unused(name: str, taken: Any) -> str:
    """Return *name* as an identifier that is not in *taken*."""
    used: Set[str] = set(taken)
    plain = re.sub(r"\W+", "_", name).strip("_") or "node"
    plain = plain if plain[0].isalpha() else f"n_{plain}"
    number, candidate = 1, plain
    while candidate in used or hasattr(_empty(), candidate):
        number, candidate = number + 1, f"{plain}_{number + 1}"
    return candidate


def _empty() -> Any:
    """Return a module without anything, whose attributes cannot name a submodule."""
    import torch

    return torch.nn.Module()
