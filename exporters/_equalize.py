"""Cross-layer equalization: channels move weight range from one convolution to the next; the float function stays.

Between two convolutions with nothing or a Relu in between, channel i of the first can be divided by s_i > 0 and that
of the second multiplied by it. s_i = sqrt(r1_i / r2_i), with r the largest magnitude of the channel's weights, makes
both equally large. Repeated over chains until nothing moves any more.
Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.1. A
ReLU6 is not invariant to scale: the paper replaces it by a Relu, which changes the function; here it is left alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from portcall.targets.agent.contract import Graph
from portcall.targets.agent.errors import UnsupportedError

SWEEPS = 50
SETTLED = 1e-3
"""Equalization ends when no factor of a sweep differs from 1 by more."""


class Layer:
    """A convolution at work. weight: float64[outputs, inputs / groups, *kernel]; bias: float64[outputs] or None."""

    def __init__(self, weight: Any, bias: Any, groups: int) -> None:
        self.weight = weight.astype("float64")
        self.bias = None if bias is None else bias.astype("float64")
        self.groups = groups

    def output_ranges(self) -> Any:
        """Return the largest magnitude of the weights that make each output channel."""
        return abs(self.weight.reshape(len(self.weight), -1)).max(axis=1)

    def input_ranges(self) -> Any:
        """Return the largest magnitude of the weights that read each input channel."""
        return abs(self._by_group()).max(axis=(1, 3)).reshape(-1)

    def scale_outputs(self, factors: Any) -> None:
        self.weight *= factors.reshape(-1, *[1] * (self.weight.ndim - 1))
        if self.bias is not None:
            self.bias *= factors

    def scale_inputs(self, factors: Any) -> None:
        scaled = self._by_group() * factors.reshape(self.groups, 1, -1, 1)
        self.weight = scaled.reshape(self.weight.shape)

    def _by_group(self) -> Any:
        outputs, inputs = self.weight.shape[:2]
        return self.weight.reshape(self.groups, outputs // self.groups, inputs, -1)


def equalize(graph: Graph, directory: Path) -> Graph:
    """Write an equalized copy of *graph* into *directory*; return it with its own hash.

    Only exact pairs are touched (``notes`` counts them); a graph without any is copied as it is. Raises
    UnsupportedError for a kind of graph that is neither "onnx" nor "tflite".
    """
    if graph.kind == "onnx":
        return _equalize_onnx(graph, directory / "graph.onnx")
    if graph.kind == "tflite":
        return _equalize_tflite(graph, directory / "graph.tflite")
    raise UnsupportedError(
        f"no equalization of {graph.kind} graphs",
        "Leave it out, or export to an ONNX-based backend or tflite",
    )


def notes(graph: Graph) -> Tuple[str, ...]:
    """Return what to tell about the equalization of *graph*; the equalized copy gives the same answer."""
    if graph.kind == "onnx":
        import onnx

        pairs, clipped = _onnx_pairs(onnx.load(str(graph.path), load_external_data=False).graph)
    else:
        from portcall.exporters import _tflite

        pairs, clipped = _tflite_pairs(_tflite._read(graph.path.read_bytes()))
    done = f"equalized {len(pairs)} pairs of convolutions"
    if not clipped:
        return (done,)
    return (done, f"{clipped} pairs with a ReLU6 or another Clip in between cannot be equalized exactly")


def balance(pairs: Sequence[Tuple[Layer, Layer]]) -> None:
    """Equalize pairs of convolutions in place; a layer may be in several."""
    import numpy as np

    for _ in range(SWEEPS):
        moved = 0.0
        for first, second in pairs:
            made, read = first.output_ranges(), second.input_ranges()
            alive = (made > 0) & (read > 0)  # a dead channel stays as it is
            factors = np.sqrt(np.where(alive, made, 1.0) / np.where(alive, read, 1.0))
            first.scale_outputs(1 / factors)
            second.scale_inputs(factors)
            moved = max(moved, float(abs(factors - 1).max()))
        if moved < SETTLED:
            return


def _equalize_onnx(graph: Graph, path: Path) -> Graph:
    import numpy as np
    import onnx
    from onnx import numpy_helper

    from portcall.exporters import _onnx
    from portcall.exporters._operands import attribute

    model = onnx.load(str(graph.path))
    tensors = {t.name: t for t in model.graph.initializer}
    layers: Dict[str, Tuple[Any, Layer]] = {}

    def layer(node: Any) -> Layer:
        if node.output[0] not in layers:
            weight, *bias = (numpy_helper.to_array(tensors[name]) for name in node.input[1:] if name)
            made = Layer(weight, bias[0] if bias else None, attribute(node, "group", 1))
            layers[node.output[0]] = node, made
        return layers[node.output[0]][1]

    pairs, _ = _onnx_pairs(model.graph)
    balance([(layer(first), layer(second)) for first, second in pairs])
    for node, made in layers.values():
        for name, values in zip(node.input[1:], (made.weight, made.bias)):
            if values is not None:
                tensors[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    _onnx.save(model, path)
    return replace(graph, path=path, sha256=_onnx.graph_sha256(path))


def _onnx_pairs(graph: Any) -> Tuple[List[Tuple[Any, Any]], int]:
    """Return the pairs of Conv nodes that can be equalized exactly, and the number of those that a Clip prevents.

    All constants of both are read by them alone; so is each tensor in between, which is no output of the graph either.
    """
    import onnx

    constants = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    outputs = {v.name for v in graph.output}
    readers: Dict[str, List[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def owned(node: Any) -> bool:
        held = [name for name in node.input[1:] if name]
        return node.op_type == "Conv" and all(n in constants and len(readers[n]) == 1 for n in held)

    def next_of(node: Any) -> List[Any]:
        """Return the one node that reads the output of *node*, as a list, or none where others see it as well."""
        found = [] if node.output[0] in outputs else readers.get(node.output[0], [])
        return found if len(found) == 1 else []

    pairs: List[Tuple[Any, Any]] = []
    clipped = 0
    for first in (n for n in graph.node if owned(n)):
        for between in next_of(first):
            activation = between.op_type in ("Relu", "Clip")
            for second in next_of(between) if activation else [between]:
                if owned(second) and between.op_type == "Clip":
                    clipped += 1
                elif owned(second):
                    pairs.append((first, second))
    return pairs, clipped


def _equalize_tflite(graph: Graph, path: Path) -> Graph:
    from portcall.exporters import _tflite

    model = _tflite._read(graph.path.read_bytes())
    kinds = {id(op): kind for op, kind in _tflite.operators(model)}
    layers: Dict[int, Tuple[Any, Layer]] = {}

    def layer(op: Any) -> Layer:
        if id(op) not in layers:
            weight = _tflite.constant(model, int(op.inputs[1]))
            assert weight is not None
            depthwise = kinds[id(op)] == "DEPTHWISE_CONV_2D"
            inputs = int(model.subgraphs[0].tensors[op.inputs[0]].shape[-1])
            groups = inputs if depthwise else inputs // weight.shape[3]
            weight = weight.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
            layers[id(op)] = op, Layer(weight, _tflite.constant(model, _bias_index(op)), groups)
        return layers[id(op)][1]

    pairs, _ = _tflite_pairs(model)
    balance([(layer(first), layer(second)) for first, second in pairs])
    for op, made in layers.values():
        depthwise = kinds[id(op)] == "DEPTHWISE_CONV_2D"
        weight = made.weight.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
        tensors = model.subgraphs[0].tensors
        _tflite.set_constant(model, tensors[op.inputs[1]].buffer, weight)
        if made.bias is not None:
            _tflite.set_constant(model, tensors[_bias_index(op)].buffer, made.bias)
    path.write_bytes(_tflite._write(model))
    return replace(graph, path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _bias_index(op: Any) -> int:
    return int(op.inputs[2]) if len(op.inputs) > 2 else -1


def _tflite_pairs(model: Any) -> Tuple[List[Tuple[Any, Any]], int]:
    """Like ``_onnx_pairs``, for CONV_2D and DEPTHWISE_CONV_2D with their fused activations."""
    from ai_edge_litert.schema_py_generated import ActivationFunctionType

    from portcall.exporters import _tflite

    graph = model.subgraphs[0]
    exact = (ActivationFunctionType.NONE, ActivationFunctionType.RELU)
    buffers = [t.buffer for g in model.subgraphs for t in g.tensors]
    reads = [int(i) for op in graph.operators for i in op.inputs]
    outputs = {int(i) for i in graph.outputs}

    def owned(op: Any, kind: str) -> bool:
        if kind not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            return False
        held = [int(i) for i in op.inputs[1:] if i >= 0]
        alone = all(reads.count(i) == buffers.count(graph.tensors[i].buffer) == 1 for i in held)
        return alone and all(_tflite.constant(model, i) is not None for i in held)

    first_of = {int(op.outputs[0]): op for op, kind in _tflite.operators(model) if owned(op, kind)}
    pairs: List[Tuple[Any, Any]] = []
    clipped = 0
    for op, kind in _tflite.operators(model):
        source = int(op.inputs[0]) if len(op.inputs) else -1
        if source not in first_of or not owned(op, kind) or reads.count(source) != 1 or source in outputs:
            continue
        if first_of[source].builtinOptions.fusedActivationFunction in exact:
            pairs.append((first_of[source], op))
        else:
            clipped += 1
    return pairs, clipped
