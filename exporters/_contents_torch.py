"""What a torch.export program holds: the weight that each product reads, computed where it is a parametrization."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from portcall.targets.agent.contents import Contents, Weight
from portcall.targets.agent.contract import Source
from portcall.targets.agent.stored import Stored, swapped, upright, weight

WEIGHT_INPUTS: Mapping[str, Tuple[int, ...]] = {
    "conv1d": (1,), "conv2d": (1,), "conv3d": (1,), "convolution": (1,),
    "conv_transpose1d": (1,), "conv_transpose2d": (1,), "conv_transpose3d": (1,),
    "linear": (1,), "matmul": (1, 0), "mm": (1, 0), "bmm": (1, 0), "addmm": (2, 1), "embedding": (0,),
}  # fmt: skip
"""Operator of ATen, without its overload -> the arguments that may be its weight."""
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
QUANTIZING = re.compile(r"(fake_)?(de)?quantize|fused_moving_avg_obs_fake_quant")


def read(source: Source) -> Contents:
    """Return the contents of a ``.pt2`` (what a factory was exported to). Loading it runs code: in a worker only."""
    from portcall.source_torch import load_program

    program = load_program(source.path)
    reader = _Reader(program)
    weights = reader.weights()
    other, zeros = reader.others()
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    names = [_kind(n) for n in calls]
    macs = list(reader.macs.values())
    return Contents(
        format="torch",
        inputs=source.inputs,
        outputs=source.outputs,
        weights=tuple(weights),
        operators=Counter(name for name in names if name),
        quantize_nodes=sum(bool(QUANTIZING.match(name)) for name in names),
        other_parameters=other,
        other_zeros=zeros,
        macs=None if None in macs else sum(m for m in macs if m is not None),
        notes=()
        if None not in macs
        else ("no multiply-accumulates: a dimension beside the batch is dynamic",),
    )


def _kind(node: Any) -> str:
    """Return the name of an operator of ATen without namespace and overload; "" for Python's own functions."""
    found = re.match(r"\w+\.(\w+)", str(node.target))
    return found.group(1) if found is not None and hasattr(node.target, "_schema") else ""


class _Reader:
    """Finds the constant weight of each product. macs: of each by its node's name, for a batch of one."""

    def __init__(self, program: Any) -> None:
        self._program = program
        signature = program.graph_signature
        self._targets: Dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._used: Set[str] = set()
        self._values: Dict[str, Any] = {}
        self.macs: Dict[str, Optional[int]] = {}

    def weights(self) -> List[Weight]:
        found: List[Weight] = []
        for node in self._program.graph.nodes:
            if node.op != "call_function":
                continue
            kind = _kind(node)
            if kind in WEIGHT_INPUTS and kind != "embedding":
                self.macs[node.name] = None
            if kind in RECURRENT:
                found += self._recurrent(node, kind)
                continue
            for index in WEIGHT_INPUTS.get(kind, ()):
                made = self._described(node, kind, index) if len(node.args) > index else None
                if made is not None:
                    found.append(made)
                    break
            else:
                if kind in ("matmul", "mm", "bmm", "addmm"):
                    self.macs[node.name] = _product_macs(node, 1 if kind == "addmm" else 0)
        return found

    def _described(self, node: Any, kind: str, index: int) -> Optional[Weight]:
        value = self._value(node.args[index])
        if value is None or value.dim() < 2:
            return None
        held = self._held(node.args[index])
        stored = Stored(
            held[0] if held else node.args[index].name,
            tuple(value.shape),
            str(value.dtype)[len("torch.") :],
            value.element_size() * 8,
            value.numpy()
            if value.dtype.is_floating_point and value.element_size() > 2
            else value.float().numpy(),
        )
        name, rank = _layer(node, held), value.dim()
        if kind == "embedding":
            return weight(name, kind, stored, stored.values, (0, 1))
        macs = self.macs[node.name] = _weighted_macs(node, kind, tuple(value.shape))
        if kind.startswith("conv"):
            turned = kind.startswith("conv_transpose") or (kind == "convolution" and bool(node.args[6]))
            # Both conv and conv_transpose take groups as argument 6, behind bias, stride, padding and one more.
            place = 8 if kind == "convolution" else 6
            groups = int(node.args[place]) if len(node.args) > place else int(node.kwargs.get("groups", 1))
            if turned:
                return weight(name, kind, stored, swapped(stored.values, groups), (1, 0), groups, macs)
            return weight(name, kind, stored, stored.values, (0, 1), groups, macs)
        left = index == (1 if kind == "addmm" else 0)
        inputs_last = kind == "linear" or left
        axes = (rank - 2, rank - 1) if inputs_last else (rank - 1, rank - 2)
        return weight(name, kind, stored, upright(stored.values, inputs_last), axes, 1, macs)

    def _recurrent(self, node: Any, kind: str) -> List[Weight]:
        """Return the matrices of an LSTM, GRU or RNN; its multiply-accumulates are not counted."""
        found = []
        self.macs[node.name] = None
        for argument in (a for group in node.args if isinstance(group, (list, tuple)) for a in group):
            value = self._value(argument) if hasattr(argument, "name") else None
            if value is not None and value.dim() == 2:
                held = self._held(argument)
                target = held[0] if held else argument.name
                stored = Stored(target, tuple(value.shape), "float32", 32, value.float().numpy())
                found.append(weight(target, kind, stored, stored.values, (0, 1)))
        return found

    def _held(self, node: Any) -> List[str]:
        """Return the parameters that a constant node is made of; the largest first."""
        if not hasattr(node, "all_input_nodes"):
            return []
        if node.op == "placeholder":
            return [self._targets[node.name]] if node.name in self._targets else []
        found = [name for inner in node.all_input_nodes for name in self._held(inner)]
        return sorted(dict.fromkeys(found), key=lambda name: -self._tensor(name).numel())

    def _tensor(self, name: str) -> Any:
        state = self._program.state_dict
        return state[name] if name in state else self._program.constants[name]

    def _value(self, node: Any) -> Any:
        """Return the tensor of a parameter, or what operators make of parameters alone; None for anything else."""
        import torch

        if not hasattr(node, "op"):
            return None
        if node.name not in self._values:
            self._values[node.name] = None
            if node.op == "placeholder" and node.name in self._targets:
                name = self._targets[node.name]
                self._used.add(name)
                self._values[node.name] = self._tensor(name).detach()
            elif node.op == "call_function" and node.all_input_nodes:
                inner = {n: self._value(n) for n in node.all_input_nodes}
                if all(v is not None for v in inner.values()):
                    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: inner[n])
                    with torch.no_grad():
                        self._values[node.name] = node.target(*args, **kwargs)
        return self._values[node.name]

    def others(self) -> Tuple[int, int]:
        """Return the elements of the parameters and float buffers beside the weights, and their zeros."""
        count = zeros = 0
        for name in dict.fromkeys(self._targets.values()):
            tensor = self._tensor(name)
            if name not in self._used and tensor.dim() and tensor.dtype.is_floating_point:
                count += int(tensor.numel())
                zeros += int(tensor.numel() - tensor.count_nonzero())
        return count, zeros


def _layer(node: Any, held: List[str]) -> str:
    """Return the module that a product belongs to: by its parameter's name, else by what torch.export noted."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = re.sub(
        r"\[(\w+)\]", r".\1", re.sub(r"^L\['self'\]\.?", "", path).replace("['", "[").replace("']", "]")
    )
    if held and held[0].endswith(".weight"):
        return held[0][: -len(".weight")]
    return path or (held[0] if held else str(node.name))


def _dims(node: Any) -> Optional[List[int]]:
    """Return the shape of a node's output for a batch of one, or None where another dimension is dynamic."""
    value = node.meta.get("val")
    if value is None or not hasattr(value, "shape"):
        return None
    dims: List[int] = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            dims.append(size)
        elif axis == 0:
            dims.append(1)
        else:
            return None
    return dims


def _weighted_macs(node: Any, kind: str, shape: Tuple[int, ...]) -> Optional[int]:
    """Return the multiply-accumulates of a product with a constant weight of *shape*."""
    if kind.startswith("conv"):
        transposed = kind.startswith("conv_transpose") or (kind == "convolution" and bool(node.args[6]))
        dims = _dims(node.args[0] if transposed else node)
        # Every place of the output (transposed: of the input) meets all of the weight.
        return None if dims is None else math.prod(dims[:1] + dims[2:]) * math.prod(shape)
    dims = _dims(node)
    if dims is None:
        return None
    if kind == "linear":
        return math.prod(dims) * shape[-1]
    return _product_macs(node, 1 if kind == "addmm" else 0)


def _product_macs(node: Any, left: int) -> Optional[int]:
    dims, first = _dims(node), _dims(node.args[left])
    return None if dims is None or not first else math.prod(dims) * first[-1]
