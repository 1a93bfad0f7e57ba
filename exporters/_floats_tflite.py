"""The float flatbuffer as ``debug`` runs it: whole, cut at what an artifact shows, and fake-quantized.

Operators go by the name of their first output, as in ``_tflite.operator_name``.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.exporters._floats import (
    MOVING,
    Cut,
    FloatGraph,
    Layer,
    Rounding,
    eight_bits,
    groups,
    on_grid,
    source_of,
)
from portcall.targets.agent.contract import Graph, Shown

ROUNDED_CONSTANTS = (
    "ADD",
    "SUB",
    "MUL",
    "DIV",
    "CONCATENATION",
    "MAXIMUM",
    "MINIMUM",
    "PRELU",
    "SQUARED_DIFFERENCE",
)
CHANNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")


class TfliteFloatGraph(FloatGraph):
    """See ``FloatGraph``. *model*: an edited object model instead of the graph's own; names in it are unique."""

    def __init__(self, graph: Graph, threads: int, model: Any = None) -> None:
        from portcall.exporters import _tflite

        self._graph, self._threads = graph, threads
        self._model = _tflite._read(graph.path.read_bytes()) if model is None else model
        body = self._model.subgraphs[0]
        self._names = [t.name.decode() for t in body.tensors]
        floats = {i for i, t in enumerate(body.tensors) if t.type == 0}
        operators = _tflite.operators(self._model)
        self.inputs = [self._names[int(i)] for i in body.inputs]
        signature = self._model.signatureDefs[0]
        self.outputs = {m.name.decode(): self._names[int(m.tensorIndex)] for m in signature.outputs}
        self.grids: Mapping[str, Tuple[float, float, float]] = {}
        made = [(int(o), op, kind) for op, kind in operators for o in op.outputs if int(o) in floats]
        self.indices = {self._names[int(i)]: int(i) for i in body.inputs if int(i) in floats}
        self.indices.update({self._names[i]: i for i, _, _ in made})
        self.tensors = list(self.indices)
        self.layers = {
            **{name: Layer(name, (name,), "input") for name in self.inputs},
            **{self._names[i]: self._layer(op, i, kind) for i, op, kind in made},
        }
        self.made_from = {
            self._names[i]: [
                self._names[int(j)] for j in op.inputs if self._names[int(j)] in self.indices and j >= 0
            ]
            for i, op, _ in made
        }
        self.axes = {name: -1 for name in self.tensors}
        self.ties = groups(
            [
                [
                    self._names[int(j)]
                    for j in (*op.inputs, *op.outputs)
                    if j >= 0 and self._names[int(j)] in self.indices
                ]
                for op, kind in operators
                if kind in MOVING
            ]
        )
        self.constant_adders = {
            self._names[i]: 1.0
            for i, op, kind in made
            if kind in ROUNDED_CONSTANTS
            and any(_tflite.constant(self._model, int(j)) is not None for j in op.inputs)
        }
        self.interpolated = frozenset(self._names[i] for i, _, kind in made if kind == "RSQRT")
        self._whole: Optional[Tuple[Any, Dict[str, int]]] = None

    def _layer(self, op: Any, tensor: int, kind: str) -> Layer:
        names = [self._names[tensor]]
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"):
            names += [self._names[int(j)] for j in op.inputs[1:] if j >= 0]
        paths = list(dict.fromkeys(p for name in names for p in module_paths(name)))
        products = [p for name in names for p, cls in _modules(name) if _is_product(cls)]
        name = products[-1] if products else max(paths, key=lambda p: p.count("."), default="") or names[0]
        return Layer(self._node(name), tuple(map(self._node, dict.fromkeys([name, *paths, names[0]]))), kind)

    def _node(self, path: str) -> str:
        """Return the node of an ONNX source that a submodule of ``_onnx_to_torch`` stands for."""
        if self._graph.source.format != "onnx":
            return path
        if not hasattr(self, "_onnx_names"):
            self._onnx_names = _onnx_names(self._graph)
        return self._onnx_names.get(path.rpartition(".")[2], path)

    def run(self, arrays: Mapping[str, Any]) -> Dict[str, Any]:
        import numpy as np

        if self._whole is None:
            self._whole = _open(self._model, self._threads), dict(self.indices)
        interpreter, indices = self._whole
        self.feed(interpreter, arrays)
        interpreter.invoke()
        return {
            name: on_grid(np.array(interpreter.get_tensor(index), np.float32), self.grids.get(name))
            for name, index in indices.items()
        }

    def feed(self, interpreter: Any, arrays: Mapping[str, Any]) -> None:
        signature = self._model.signatureDefs[0]
        for entry in signature.inputs:
            interpreter.set_tensor(int(entry.tensorIndex), arrays[entry.name.decode()])

    def _rounded(self, model: Any, rounding: Rounding) -> None:
        from portcall.exporters import _tflite

        if rounding.is_none():
            return
        done = set()
        graph = model.subgraphs[0]
        operators = _tflite.operators(model)
        for op, kind in operators:
            weight = _tflite.weight_of(model, op, kind)
            if weight is None and kind == "TRANSPOSE_CONV":
                weight = _tflite.constant(model, int(op.inputs[1]))
            if weight is None:
                continue
            buffer = graph.tensors[op.inputs[1]].buffer
            if buffer not in done:
                done.add(buffer)
                axis = _tflite.CHANNEL_AXES.get(kind, 0)
                _tflite.set_constant(model, buffer, rounding.weight(weight, axis))
        for op, kind in operators:
            for index in map(int, op.inputs) if kind in ROUNDED_CONSTANTS else ():
                value = _tflite.constant(model, index)
                if value is not None and graph.tensors[index].buffer not in done:
                    done.add(graph.tensors[index].buffer)
                    _tflite.set_constant(model, graph.tensors[index].buffer, rounding.constant(value))

    def cut(self, shown: Sequence[Shown], rounding: Rounding, dynamic: bool) -> Cut:
        return _TfliteCut(self, shown, rounding, dynamic)

    def fake_quantized(
        self, grids: Mapping[str, Tuple[float, float, float]], rounding: Rounding
    ) -> TfliteFloatGraph:
        from ai_edge_litert.schema_py_generated import BuiltinOptions, FakeQuantOptionsT, OperatorT

        from portcall.exporters import _tflite

        model = copy.deepcopy(self._model)
        self._rounded(model, rounding)
        body = model.subgraphs[0]
        ends = {int(i) for i in body.outputs}
        replaced: Dict[int, int] = {}
        operators: List[Any] = []

        def fake(index: int) -> None:
            name = self._names[index]
            if name not in grids or index in ends or self.indices.get(name) != index:
                return
            scale, low, high = grids[name]
            tensor = copy.copy(body.tensors[index])
            tensor.name, tensor.buffer = f"portcall_{name}_fake".encode(), 0
            body.tensors.append(tensor)
            replaced[index] = len(body.tensors) - 1
            op = OperatorT()
            op.opcodeIndex = _tflite.operator_code(model, "FAKE_QUANT")
            op.inputs, op.outputs = [index], [replaced[index]]
            op.builtinOptionsType = BuiltinOptions.FakeQuantOptions
            op.builtinOptions = FakeQuantOptionsT()
            op.builtinOptions.min, op.builtinOptions.max = low, high
            op.builtinOptions.numBits = 8 if (high - low) / scale < 256 else 16
            operators.append(op)

        for index in body.inputs:
            fake(int(index))
        for op in body.operators:
            op.inputs = [replaced.get(int(i), int(i)) for i in op.inputs]
            operators.append(op)
            for index in op.outputs:
                fake(int(index))
        body.operators = operators
        made = TfliteFloatGraph(self._graph, self._threads, model)
        made.tensors, made.indices, made.grids = list(self.tensors), dict(self.indices), grids
        return made


def _open(model: Any, threads: int) -> Any:
    """Return an interpreter that keeps every tensor. XNNPACK is left out: it shows none of its own."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from portcall.exporters import _tflite

    interpreter = Interpreter(
        model_content=_tflite._write(model),
        num_threads=threads,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    return interpreter


def module_paths(name: str) -> List[str]:
    """Return the paths of the torch modules that a tensor's name of litert-torch holds, in its order.

    "pkg.Net/torch.nn.modules.container.Sequential_layer1/pkg.Block_0;;pkg.Net;3" -> ["layer1.0"]: each part is the
    class and, after its first underscore, the attribute; the network itself has none. Source: litert-torch 0.10.
    """
    return [path for path, _ in _modules(name)]


def _modules(name: str) -> List[Tuple[str, str]]:
    """Return the (path, class of the last part) of each module named."""
    found = []
    for text in name.split(";"):
        parts = [p for p in text.split("/") if p]
        if len(parts) < 2 or "." not in parts[0]:
            continue
        pairs = [part.rpartition(".")[2].partition("_") for part in parts[1:]]
        names = [attribute for _, _, attribute in pairs if attribute]
        if names:
            found.append((".".join(names), pairs[-1][0]))
    return found


def _is_product(cls: str) -> bool:
    return re.search("Conv|Linear|Embedding|Attention", cls) is not None


def _onnx_names(graph: Graph) -> Dict[str, str]:
    """Return the submodule of ``_onnx_to_torch`` -> the node of the ONNX source."""
    import tempfile
    from pathlib import Path

    from portcall.exporters import _onnx, _onnx_to_torch

    with tempfile.TemporaryDirectory(prefix="portcall-names-") as folder:
        lowered = _onnx.lower(graph.source, Path(folder))
        return dict(_onnx_to_torch.to_module(lowered.path).node_names)


class _TfliteCut(Cut):
    def __init__(
        self, graph: TfliteFloatGraph, shown: Sequence[Shown], rounding: Rounding, dynamic: bool
    ) -> None:
        from portcall.exporters import _tflite

        self._float, self._shown = graph, shown
        model = copy.deepcopy(graph._model)
        graph._rounded(model, rounding)
        body = model.subgraphs[0]
        by_name: Dict[str, List[int]] = {}
        for number, one in enumerate(shown):
            by_name.setdefault(one.name, []).append(number)
        given: Dict[Tuple[int, bool], int] = {}
        integers = {one.name for one in shown if one.scale is not None}
        for op, kind in _tflite.operators(model):
            inputs = [int(i) for i in op.inputs]
            weighted = _tflite.weight_of(model, op, kind) is not None
            for position, index in enumerate(inputs):
                name = graph._names[index] if index >= 0 else ""
                if graph.indices.get(name) != index:
                    continue
                found = source_of(name, _tflite.operator_name(model, op), shown, by_name)
                if found is None:
                    continue
                number = found
                coarse = (
                    dynamic
                    and weighted
                    and position == 0
                    and _tflite.operator_name(model, op) not in integers
                )
                if (number, coarse) not in given:
                    tensor = copy.copy(body.tensors[index])
                    tensor.name, tensor.buffer = f"portcall_given_{number}_{coarse}".encode(), 0
                    body.tensors.append(tensor)
                    given[(number, coarse)] = len(body.tensors) - 1
                inputs[position] = given[(number, coarse)]
            op.inputs = inputs
        body.inputs = [*map(int, body.inputs), *given.values()]
        self._given = given
        self._interpreter = _open(model, graph._threads)

    def run(self, arrays: Mapping[str, Any], values: Sequence[Any]) -> List[Any]:
        import numpy as np

        self._float.feed(self._interpreter, arrays)
        for (number, coarse), index in self._given.items():
            value = eight_bits(values[number]) if coarse else values[number]
            self._interpreter.set_tensor(index, np.asarray(value, np.float32))
        self._interpreter.invoke()
        return [
            np.array(self._interpreter.get_tensor(self._float.indices[s.name]), np.float32)
            for s in self._shown
        ]
