"""Where an int8 program quantizes: Q/DQ pairs with our ranges, in the patterns that XNNPACK runs on integers.

The partitioner takes ``dq -> operator -> [relu or hardtanh] -> q`` as one integer operator. The pairs are placed here
and not by torchao's XNNPACKQuantizer, which annotates a graph for observers and has no place for ranges that are known
already. First all is decided (``static``, ``dynamic``), then ``insert`` changes the graph. Long because one class
holds the decisions, which depend on each other.
"""

from __future__ import annotations

import operator
from typing import (
    TYPE_CHECKING,
    Any,
    Collection,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from portcall.targets.agent.contract import Range

if TYPE_CHECKING:
    from portcall.calibration.weights import Scheme
    from portcall.exporters._executorch import Traced

LEAST, MOST = -128, 127
LARGEST_RATIO = 256.0
"""XNNPACK refuses a requantization by this factor or more: input scale x weight scale / output scale."""


class Encoding(NamedTuple):
    """Of an int8 tensor: x = scale * (integer - zero_point)."""

    scale: float
    zero_point: int


class Operators(NamedTuple):
    """torch's operators by what is done with them. moving: the result has its input's scale and zero point."""

    convolutions: Tuple[Any, ...]
    transposed: Tuple[Any, ...]
    linear: Any
    activations: Tuple[Any, ...]
    additions: Tuple[Any, ...]
    product: Any
    concatenation: Any
    mean: Any
    pads: Tuple[Any, ...]
    moving: Tuple[Any, ...]


def operators() -> Operators:
    import torch

    aten = torch.ops.aten
    activations = (aten.relu.default, aten.hardtanh.default)
    pads = (aten.constant_pad_nd.default, aten.pad.default)
    return Operators(
        convolutions=(aten.conv1d.default, aten.conv2d.default),
        transposed=(aten.conv_transpose2d.input,),
        linear=aten.linear.default,
        activations=activations,
        additions=(aten.add.Tensor, aten.sub.Tensor),
        product=aten.mul.Tensor,
        concatenation=aten.cat.default,
        mean=aten.mean.dim,
        pads=pads,
        moving=(
            *activations,
            *pads,
            aten.flatten.using_ints,
            aten.max_pool2d.default,
            aten.permute.default,
            aten.reshape.default,
            aten.slice.Tensor,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
            aten.view.default,
        ),
    )


def encoding_of(found: Range) -> Encoding:
    """Return the int8 encoding of a range: asymmetric, 255 steps, zero exact."""
    from portcall.exporters import _encodings

    scale, zero_point = _encodings.asymmetric_scale(found)
    return Encoding(scale, zero_point + LEAST)


class Quantizer:
    """Decides which operators of a traced graph compute on integers, and inserts the Q/DQ pairs.

    names: torch.fx node -> name of its ONNX tensor. kept: names of ONNX nodes that stay in float.
    left: ONNX names of convolutions and products with weights that stayed in float although nobody asked for it.
    at_run_time: ONNX names of those whose input is quantized at run time.
    """

    def __init__(
        self, traced: Traced, names: Mapping[Any, str], kept: Collection[str], scheme: Scheme
    ) -> None:
        self._traced, self._names, self._kept, self._scheme = traced, names, set(kept), scheme
        self._graph, self._ops = traced.graph.graph, operators()
        self._encodings: Dict[Any, Encoding] = {}
        self._stored: Dict[Any, Encoding] = {}
        """What is computed on integers -> how it is stored."""
        self._reads: Dict[Any, Sequence[Any]] = {}
        """An operator on integers -> the tensors that it reads as integers."""
        self._joins: Dict[Any, Encoding] = {}
        self._weights: Dict[Any, Any] = {}
        self._dynamic: List[Any] = []
        self._trained: Mapping[str, Any] = {}
        self.left: List[str] = []
        self.at_run_time: List[str] = []

    # decisions

    def static(
        self,
        encodings: Mapping[str, Encoding],
        products_only: bool = False,
        trained: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """Choose every operator whose inputs and output have an encoding and that XNNPACK computes on integers.

        encodings: by the name of the ONNX tensor. trained: name of an ONNX node -> scales of its weight, one or one per
        output channel; of others the scale is max|w| / 127. products_only: convolutions by ranges, and matrix products
        at run time: XNNPACK has none with a float output.
        """
        ops, self._trained = self._ops, trained or {}
        self._encodings = {
            node: encodings[name]
            for node, name in self._names.items()
            if name in encodings and _is_float32(node)
        }
        for node in self._graph.nodes:
            if node.op != "call_function" or self._is_kept(node):
                continue
            if node.target in (*ops.convolutions, *ops.transposed, ops.linear):
                if products_only and node.target == ops.linear:
                    self._at_run_time(node)
                elif not self._weighted(node):
                    self._leave(node)
            elif node.target in ops.moving:
                self._move(node)
            elif products_only:
                continue
            elif node.target == ops.concatenation:
                self._join(node)
            elif node.target in (*ops.additions, ops.product):
                self._pair(node)
            elif node.target == ops.mean:
                self._mean(node)

    def dynamic(self) -> None:
        """Choose every product with constant weights whose input XNNPACK quantizes at run time, row by row."""
        products = (*self._ops.convolutions, *self._ops.transposed, self._ops.linear)
        for node in self._graph.nodes:
            if node.target in products and not self._is_kept(node):
                self._at_run_time(node)

    def _weighted(self, node: Any) -> bool:
        end = self._fused(node)
        read, made = self._encoding(node.args[0]), self._encodings.get(end)
        if read is None or made is None or not self._has_kernel(node):
            return False
        weight = self._quantized(node)
        if read.scale * float(weight.scale.max()) >= LARGEST_RATIO * made.scale:
            return False
        self._weights[node] = weight
        self._choose(node, [node.args[0]], end, made)
        return True

    def _at_run_time(self, node: Any) -> None:
        if not self._has_kernel(node, dynamic=True):
            self._leave(node)
            return
        self._weights[node] = self._quantized(node)
        self._dynamic.append(node)
        self.at_run_time.append(self._onnx_name(node))

    def _pair(self, node: Any) -> None:
        """A sum, difference or product of two activations."""
        sources, end = list(node.args[:2]), self._fused(node)
        found, made = [self._encoding(s) for s in sources], self._encodings.get(end)
        if made is None or None in found or node.kwargs.get("alpha", 1) != 1:
            return
        scales = [e.scale for e in found if e is not None]
        if node.target == self._ops.product:
            fits = 2.0**-16 <= scales[0] * scales[1] / made.scale < 2.0**8
        else:
            fits = all(2.0**-10 <= scale / made.scale < 2.0**8 for scale in scales)
        if fits:
            self._choose(node, sources, end, made)

    def _join(self, node: Any) -> None:
        """A concatenation: XNNPACK takes parts that have the result's encoding."""
        sources, made = list(node.args[0]), self._encodings.get(node)
        if made is not None and all(self._encoding(s) is not None for s in sources):
            self._joins[node] = made
            self._choose(node, sources, node, made)

    def _mean(self, node: Any) -> None:
        """An average over both spatial axes; others have no integer form."""
        source, axes = node.args[0], node.args[1] if len(node.args) > 1 else None
        read, made = self._encoding(source), self._encodings.get(node)
        if read is None or made is None or not axes or source.meta["val"].dim() != 4:
            return
        if sorted(a % 4 for a in axes) == [2, 3] and 2.0**-8 <= read.scale / made.scale < 2.0**8:
            self._choose(node, [source], node, made)

    def _move(self, node: Any) -> None:
        """What comes as integers goes on as integers, with the same encoding; a padding may be the first to read it."""
        source = node.args[0]
        read = self._encoding(source) if node.target in self._ops.pads else self._stored.get(source)
        if read is None or node in self._stored or not _is_float32(node):
            return
        rest = node.args[1:]
        if node.target in self._ops.pads:
            zeros = rest[1:] in ((), ("constant",), (0,), (0.0,), ("constant", 0), ("constant", 0.0))
            if not zeros or min(rest[0]) < 0:
                return
        self._choose(node, [source], node, read)

    def _choose(self, node: Any, sources: Sequence[Any], end: Any, made: Encoding) -> None:
        self._reads[node] = sources
        self._stored[end] = made

    def _encoding(self, node: Any) -> Optional[Encoding]:
        """Return how an operator on integers reads *node*; None where its range is unknown, or it is no activation."""
        if not hasattr(node, "op"):
            return None
        return self._stored.get(node) or self._encodings.get(node)

    def _fused(self, node: Any) -> Any:
        """Return the activation that XNNPACK fuses with *node*, else *node*."""
        users = list(node.users)
        if len(users) == 1 and users[0].target in self._ops.activations and not self._is_kept(users[0]):
            return users[0]
        return node

    def _has_kernel(self, node: Any, dynamic: bool = False) -> bool:
        """Tell whether XNNPACK computes a convolution or product of this form on integers."""
        from portcall.exporters._executorch import constant

        weight, bias = (constant(self._traced.graph, a) for a in [*node.args[1:3], None][:2])
        if weight is None or not _is_float32(node.args[1]) or not _is_float32(node.args[0]):
            return False
        if bias is None and len(node.args) > 2 and node.args[2] is not None:
            return False
        per_channel = self._scheme.per_channel
        if node.target == self._ops.linear:
            return per_channel or not dynamic
        groups = int(node.args[6]) if len(node.args) > 6 else int(node.kwargs.get("groups", 1))
        if node.target in self._ops.transposed:
            return not dynamic and (groups == 1 or not per_channel)
        # XNNPACK takes a convolution of one input channel for a depthwise one.
        return not dynamic or (weight.dim() == 4 and groups == 1 and weight.shape[1] > 1 and per_channel)

    def _quantized(self, node: Any) -> Any:
        """Return the int8 weight; a transposed convolution's output channels lie on axis 1."""
        from portcall.calibration import weights
        from portcall.exporters._executorch import constant

        tensor = constant(self._traced.graph, node.args[1])
        assert tensor is not None, "_has_kernel looked at it"
        axis = (1 if node.target in self._ops.transposed else 0) if self._scheme.per_channel else None
        values = tensor.detach().numpy()
        scale = self._trained.get(self._onnx_name(node))
        return weights.quantize(values, axis=axis) if scale is None else weights.on_grid(values, scale, axis)

    def _onnx_name(self, node: Any) -> str:
        from portcall.exporters._executorch import onnx_name

        return onnx_name(self._traced, node) or str(node.name)

    def _is_kept(self, node: Any) -> bool:
        return self._onnx_name(node) in self._kept

    def _leave(self, node: Any) -> None:
        if self._onnx_name(node) not in self.left:
            self.left.append(self._onnx_name(node))

    @property
    def chosen(self) -> bool:
        """Whether anything computes on integers."""
        return bool(self._weights or self._reads)

    @property
    def tensors(self) -> Set[str]:
        """The names of the ONNX tensors that are stored or read as integers."""
        nodes = {*self._stored, *(source for sources in self._reads.values() for source in sources)}
        return {self._names[node] for node in nodes if node in self._names}

    @property
    def weighted(self) -> Set[str]:
        """The names of the ONNX nodes whose weights are integers."""
        return {self._onnx_name(node) for node in self._weights}

    # changes

    def insert(self) -> None:
        """Insert what was decided. Every reader has a dequantize of its own: the partitioner wants it so."""
        readers: Dict[Any, Set[Any]] = {}
        for node, sources in self._reads.items():
            for source in sources:
                readers.setdefault(source, set()).add(node)
        for source in [n for n in self._graph.nodes if n in readers or n in self._stored]:
            users = [u for u in source.users if source in self._stored or u in readers[source]]
            encoding = self._encoding(source)
            assert encoding is not None
            with self._graph.inserting_after(_last_input(source)):
                integers = self._quantize(source, source, encoding)
            for user in users:
                self._dequantize(user, source, integers, encoding)
        for node, made in self._joins.items():
            for back in list(node.args[0]):
                if Encoding(*back.args[1:3]) != made:
                    with self._graph.inserting_before(node):
                        integers = self._quantize(node, back, made)
                    self._dequantize(node, back, integers, made)
        for node, weight in self._weights.items():
            self._replace_weight(node, weight)
        parameters: Dict[Any, Tuple[Any, Any]] = {}
        for node in self._dynamic:
            self._quantize_at_run_time(node, parameters)
        self._graph.eliminate_dead_code()
        self._traced.graph.recompile()

    def _quantize(self, like: Any, source: Any, encoding: Encoding) -> Any:
        import torch

        target = _decomposed().quantize_per_tensor.default
        return self._call(like, target, source, *encoding, LEAST, MOST, torch.int8)

    def _dequantize(self, user: Any, source: Any, integers: Any, encoding: Encoding) -> None:
        import torch

        target = _decomposed().dequantize_per_tensor.default
        with self._graph.inserting_before(user):
            back = self._call(user, target, integers, *encoding, LEAST, MOST, torch.int8)
        user.replace_input_with(source, back)

    def _replace_weight(self, node: Any, weight: Any) -> None:
        """Let *node* read integers behind a dequantize instead of its float weight."""
        import torch

        from portcall.exporters._executorch import add_constant

        ops, traced, stem = _decomposed(), self._traced.graph, f"int8_{node.name}"
        with self._graph.inserting_before(node):
            integers = add_constant(traced, f"{stem}_weight", torch.from_numpy(weight.integers.copy()))
            if weight.axis is None:
                parameters: Tuple[Any, ...] = (float(weight.scale), 0)
                target = ops.dequantize_per_tensor.default
            else:
                scale = add_constant(traced, f"{stem}_scale", torch.from_numpy(weight.scale.copy()))
                zeros = torch.zeros(weight.scale.shape, dtype=torch.int64)
                parameters = (scale, add_constant(traced, f"{stem}_zero_point", zeros), weight.axis)
                target = ops.dequantize_per_channel.default
            least = min(-127, int(weight.integers.min(initial=0)))
            back = self._call(node, target, integers, *parameters, least, MOST, torch.int8)
        node.args = (node.args[0], back, *node.args[2:])

    def _quantize_at_run_time(self, node: Any, parameters: Dict[Any, Tuple[Any, Any]]) -> None:
        """Quantize the input of *node* by what it is; parameters: of the tensors that were treated already."""
        import torch

        ops, source = _decomposed(), node.args[0]
        with self._graph.inserting_before(node):
            if source not in parameters:
                pair = self._call(node, ops.choose_qparams.tensor, source, LEAST, MOST, 2.0**-23, torch.int8)
                scale, zero = (self._call(node, operator.getitem, pair, i) for i in (0, 1))
                parameters[source] = (scale, zero)
            rest = (*parameters[source], LEAST, MOST, torch.int8)
            integers = self._call(node, ops.quantize_per_tensor.tensor, source, *rest)
            back = self._call(node, ops.dequantize_per_tensor.tensor, integers, *rest)
        node.replace_input_with(source, back)

    def _call(self, like: Any, target: Any, *args: Any) -> Any:
        """Add a node that belongs to the submodule of *like*."""
        made = self._graph.call_function(target, args)
        made.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
        return made


def _decomposed() -> Any:
    """Return torch's namespace of quantize and dequantize; importing that module fills it."""
    import torch
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers the operators

    return torch.ops.quantized_decomposed


def _is_float32(node: Any) -> bool:
    value = getattr(node, "meta", {}).get("val")
    return str(getattr(value, "dtype", "")) == "torch.float32"


def _last_input(node: Any) -> Any:
    """Return the node to insert after: all inputs of a graph come first."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node
