"""The canonical ONNX graph as ``debug`` runs it: whole, cut at what an artifact shows, and fake-quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

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

LAYERS = "layers.json"
"""Beside a graph that came from torch: tensor -> paths of the modules that it comes from."""
GIVEN = "portcall_given_"


def write_layers(raw: Path, directory: Path) -> None:
    """Keep which module each tensor of a torch export comes from; lowering drops it from the nodes.

    Source: ``pkg.torch.onnx.name_scopes`` of torch 2.13: ['', 'layer1', 'layer1.0', 'relu_1'], the operator last.
    """
    import ast

    import onnx

    found: Dict[str, str] = {}
    for node in onnx.load(str(raw), load_external_data=False).graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
        if not scopes:
            continue
        path = str((["", *ast.literal_eval(scopes)])[-2])
        found.update({name: path for name in node.output})
    (directory / LAYERS).write_text(json.dumps(found), encoding="utf-8")


class OnnxFloatGraph(FloatGraph):
    """See ``FloatGraph``. *overrides*: an edited model instead of the graph's own."""

    def __init__(self, graph: Graph, threads: int, model: Any = None) -> None:
        import onnx

        from portcall.exporters._trace_onnx import _float_tensors

        self._graph, self._threads = graph, threads
        self._model = onnx.load(str(graph.path)) if model is None else model
        body = self._model.graph
        self._constants = {t.name: t for t in body.initializer}
        floats = _float_tensors(self._model, onnx.TensorProto)
        self.inputs = [v.name for v in body.input if v.name not in self._constants]
        self.outputs = {t.name: graph.names[t.name] for t in graph.source.outputs}
        self.grids: Mapping[str, Tuple[float, float, float]] = {}
        made = [(name, node) for node in body.node for name in node.output if name in floats]
        self.tensors = [n for n in self.inputs if n in floats] + [name for name, _ in made]
        paths = _read_layers(graph)
        self.layers = {
            **{name: Layer(name, (name,), "input") for name in self.inputs},
            **{name: self._layer(node, name, paths) for name, node in made},
        }
        self.made_from = {
            name: [i for i in node.input if i in floats or i in self.inputs] for name, node in made
        }
        self.ties = groups(
            [
                [n for n in (*node.input, *node.output) if n in floats and n not in self._constants]
                for node in body.node
                if node.op_type in MOVING
            ]
        )
        self.axes = self._channel_axes(made)
        self.constant_adders = {
            name: 1.0
            for name, node in made
            if node.op_type in ROUNDED_CONSTANTS
            and any(i in self._constants and _size(self._constants[i]) > 1 for i in node.input)
        }
        self._whole: Any = None

    def _layer(self, node: Any, tensor: str, paths: Mapping[str, str]) -> Layer:
        """Return a tensor's layer: the module that its weights belong to, else where the exporter met the operator."""
        if self._graph.source.format == "onnx":
            return Layer(node.name, (node.name,), node.op_type)
        owners = [
            name.rpartition(".")[0]
            for name in node.input
            if name in self._constants and name.rpartition(".")[2] in ("weight", "bias", "weight_bias")
        ]
        module = next((o for o in owners if o), "")
        for suffix in (".weight",):
            module = module[: -len(suffix)] if module.endswith(suffix) else module
        path = paths.get(tensor, paths.get(tensor.split("/")[0], ""))
        name = module or path or tensor
        return Layer(name, tuple(dict.fromkeys(p for p in (name, path, tensor) if p)), node.op_type)

    def _channel_axes(self, made: Sequence[Tuple[str, Any]]) -> Dict[str, Optional[int]]:
        """Return axis 1 for what convolutions make and passes on, else the last axis."""
        axes: Dict[str, Optional[int]] = {}
        for name, node in made:
            axis: Optional[int] = -1
            if node.op_type in ("Conv", "ConvTranspose") or "Pool" in node.op_type:
                axis = 1
            elif node.op_type in ("Transpose", "Reshape", "Flatten", "MatMul", "Gemm", "Concat", "Split"):
                axis = -1
            else:
                axis = next((axes[i] for i in node.input if i in axes), -1)
            axes[name] = axis
        return axes

    def run(self, arrays: Mapping[str, Any]) -> Dict[str, Any]:
        import numpy as np

        if self._whole is None:
            self._whole = self._session(self._with_outputs(self._copy(self._model), self.tensors))
        names = [n for n in self.tensors if n not in self.inputs]
        found = dict(zip(names, self._whole.run(names, self._feeds(arrays))))
        return {
            **{k: on_grid(np.asarray(v, np.float32), self.grids.get(k)) for k, v in found.items()},
            **{n: np.asarray(v, np.float32) for n, v in self._feeds(arrays).items() if n in self.tensors},
        }

    def _feeds(self, arrays: Mapping[str, Any]) -> Dict[str, Any]:
        return {self._graph.names[name]: array for name, array in arrays.items()}

    def _session(self, model: Any) -> Any:
        import onnxruntime as ort

        from portcall.exporters._trace_onnx import open_session

        return open_session(ort, model, self._graph.path, self._threads)

    @staticmethod
    def _copy(model: Any) -> Any:
        copied = type(model)()
        copied.CopyFrom(model)
        return copied

    def _with_outputs(self, model: Any, names: Sequence[str]) -> Any:
        import onnx

        known = {v.name for v in [*model.graph.output, *model.graph.input]}
        model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
        return model

    def _rounded(self, model: Any, rounding: Rounding) -> None:
        """Round the constants of *model* in place."""
        import numpy as np
        from onnx import TensorProto, numpy_helper

        from portcall.exporters import _operands

        if rounding.is_none():
            return
        held = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        done: Set[str] = set()
        for node, weight in list(_operands.weighted_nodes(model.graph)):
            if weight.name in done:
                continue
            done.add(weight.name)
            values = numpy_helper.to_array(weight)
            sums = None if "Conv" in node.op_type else _operands.reduction_axis(node)
            new = rounding.weight(values, _operands.channel_axis(node), sums)
            weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new, np.float32), weight.name))
        for node in model.graph.node:
            for name in node.input if node.op_type in ROUNDED_CONSTANTS else ():
                if name in held and name not in done:
                    done.add(name)
                    new = rounding.constant(numpy_helper.to_array(held[name]))
                    held[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new, np.float32), name))

    def cut(self, shown: Sequence[Shown], rounding: Rounding, dynamic: bool) -> Cut:
        return _OnnxCut(self, shown, rounding, dynamic)

    def fake_quantized(
        self, grids: Mapping[str, Tuple[float, float, float]], rounding: Rounding
    ) -> OnnxFloatGraph:
        import numpy as np
        import onnx
        from onnx import helper, numpy_helper

        model = self._copy(self._model)
        self._rounded(model, rounding)
        nodes: List[Any] = []
        ends = {v.name for v in model.graph.output}

        def pair(name: str) -> List[Any]:
            scale, low, high = grids[name]
            base = f"portcall_{name}"
            values = {"scale": scale, "low": low, "high": high}
            for key, value in values.items():
                tensor = numpy_helper.from_array(np.asarray(value, np.float32), f"{base}_{key}")
                model.graph.initializer.append(tensor)
            return [
                helper.make_node("Min", [f"{base}_top", f"{base}_high"], [f"{base}_clipped"], f"{base}_min"),
                helper.make_node(
                    "Div", [f"{base}_clipped", f"{base}_scale"], [f"{base}_steps"], f"{base}_div"
                ),
                helper.make_node("Round", [f"{base}_steps"], [f"{base}_levels"], f"{base}_round"),
                helper.make_node("Mul", [f"{base}_levels", f"{base}_scale"], [f"{base}_fake"], f"{base}_mul"),
            ]

        fake = {n for n in grids if n in self.tensors and n not in ends}

        def after(name: str) -> List[Any]:
            base = f"portcall_{name}"
            clip = helper.make_node("Max", [name, f"{base}_low"], [f"{base}_top"], f"{base}_max")
            return [clip, *pair(name)]

        for name in self.inputs:
            nodes += after(name) if name in fake else []
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name in fake:
                    node.input[index] = f"portcall_{name}_fake"
            nodes.append(node)
            for name in node.output:
                nodes += after(name) if name in fake else []
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        made = OnnxFloatGraph(
            self._graph, self._threads, onnx.ModelProto.FromString(model.SerializeToString())
        )
        made.tensors, made.grids = list(self.tensors), grids
        return made


ROUNDED_CONSTANTS = ("Add", "Sub", "Mul", "Div", "Concat", "Max", "Min", "PRelu", "Where", "Pow", "Gather")


def _size(tensor: Any) -> int:
    result = 1
    for dim in tensor.dims:
        result *= int(dim)
    return result


def _read_layers(graph: Graph) -> Mapping[str, str]:
    path = graph.path.parent / LAYERS
    if not path.is_file():
        return {}
    found: Dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


class _OnnxCut(Cut):
    def __init__(
        self, graph: OnnxFloatGraph, shown: Sequence[Shown], rounding: Rounding, dynamic: bool
    ) -> None:
        import onnx

        from portcall.exporters import _operands

        self._float, self._shown = graph, shown
        model = graph._copy(graph._model)
        graph._rounded(model, rounding)
        by_name: Dict[str, List[int]] = {}
        for number, one in enumerate(shown):
            by_name.setdefault(one.name, []).append(number)
        products = {node.name for node, _ in _operands.weighted_nodes(model.graph)}
        used: Dict[str, Tuple[int, bool]] = {}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                found = source_of(name, node.name, shown, by_name)
                if found is None or name in graph._constants:
                    continue
                number = found
                coarse = dynamic and index == 0 and node.name in products and shown[number].scale is None
                given = f"{GIVEN}{number}{'_coarse' if coarse else ''}"
                used[given] = (number, coarse)
                node.input[index] = given
        del model.graph.output[:]
        self._names = [n for n in dict.fromkeys(s.name for s in shown) if n not in graph.inputs]
        model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in self._names)
        model.graph.input.extend(
            onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in used
        )
        self._used = used
        self._plain = [
            v.name for v in model.graph.input if v.name not in used and v.name not in graph._constants
        ]
        self._session = graph._session(model)

    def run(self, arrays: Mapping[str, Any], values: Sequence[Any]) -> List[Any]:
        import numpy as np

        feeds = self._float._feeds(arrays)
        given = {
            name: eight_bits(values[number]) if coarse else values[number]
            for name, (number, coarse) in self._used.items()
        }
        found = dict(
            zip(self._names, self._session.run(self._names, {**{n: feeds[n] for n in self._plain}, **given}))
        )
        found.update({n: v for n, v in feeds.items() if n in self._float.inputs})
        return [np.asarray(found[s.name], np.float32) for s in self._shown]
