"""Quantization-aware trained torch modules: what was converted becomes traceable, what was not is refused.

``torch.ao.quantization.quantize_fx.convert_fx`` leaves modules with packed integer weights, and
``convert_to_reference_fx`` tensors of torch's quantized types: torch.export takes neither. ``traceable`` writes such a
graph anew with floats between pairs of ``quantized_decomposed`` operators, as pt2e has them. Source: the meaning of
"converted" and "reference" in torch.ao's ``_lower_to_native_backend`` and ``nn/quantized/reference``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portcall.targets.agent.errors import BadInput, UnsupportedError

if TYPE_CHECKING:
    import torch

_FUSED_RELU = ("ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU")
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d")
_LINEAR = ("Linear", "LinearReLU")


def refuse_unconverted(module: Any, spec: str) -> None:
    """Raise BadInput for a model prepared for quantization-aware training that was not converted."""
    for name, child in module.named_modules():
        kinds = {c.__name__ for c in type(child).__mro__}
        if kinds & {"FakeQuantizeBase", "ObserverBase", "AffineQuantizedObserverBase", "FakeQuantizer"}:
            raise BadInput(
                f"{spec} still observes: {name!r} is a {type(child).__name__}, the model was not converted",
                "Return convert_pt2e(model) (torchao), or convert_fx(model.eval()) (torch.ao): their scales are final",
            )


def is_quantized(program: Any) -> bool:
    """Tell whether an exported program quantizes activations: see ``exporters._trained.is_quantized``."""
    return any("quantized_decomposed.quantize_per_tensor" in str(n.target) for n in program.graph.nodes)


def is_exported(module: Any) -> bool:
    """Tell whether *module* is the graph of an exported program: it has no train mode to leave."""
    import torch

    return isinstance(module, torch.fx.GraphModule) and any(
        isinstance(n.target, torch._ops.OpOverload) for n in module.graph.nodes
    )


def traceable(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], spec: str
) -> torch.nn.Module:
    """Return *module* for torch.export: itself, or a converted FX graph on floats with explicit pairs.

    args, kwargs: example inputs. Raises UnsupportedError, naming the layer, for quantized layers that are not known
    here and for quantized models without a graph.
    """
    import torch

    packed = [(n, m) for n, m in module.named_modules() if _is_packed(m)]
    native = isinstance(module, torch.fx.GraphModule) and any(
        n.target is torch.quantize_per_tensor for n in module.graph.nodes
    )
    if not packed and not native:
        return module
    if not isinstance(module, torch.fx.GraphModule):
        name, child = packed[0]
        raise UnsupportedError(
            f"{spec}: layer {name!r} ({type(child).__name__}) is quantized, and the model is no FX graph",
            "Quantize with torch.ao.quantization.quantize_fx or torchao's pt2e, or export it as ONNX Q/DQ",
        )
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    examples = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    return _Rewriter(module, spec).rewritten(examples)


def _is_packed(module: Any) -> bool:
    place = type(module).__module__
    return (
        place.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        and ".reference" not in place
        and not type(module).__name__.endswith("PackedParams")
    )


class _Rewriter:
    """Rewrites one converted graph; the scale of every quantized value is read off a run on the examples."""

    def __init__(self, module: torch.fx.GraphModule, spec: str) -> None:
        self._module, self._spec = module, spec

    def rewritten(self, examples: Sequence[Any]) -> torch.nn.Module:
        import torch
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers the operators

        values: dict[str, Any] = {}

        class Recorder(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                result = super().run_node(n)
                values[n.name] = result
                return result

        with torch.no_grad():
            Recorder(self._module).run(*examples)
        old = self._module.graph
        root = torch.nn.Module()
        graph = torch.fx.Graph()
        made: dict[Any, Any] = {}
        for node in old.nodes:
            new = self._copied(node, graph, root, made)
            value = values.get(node.name)
            if isinstance(value, torch.Tensor) and value.is_quantized:
                new = self._pair(node, graph, new, value)
            made[node] = new
        result = torch.fx.GraphModule(root, graph)
        result.graph.eliminate_dead_code()
        result.recompile()
        return result.eval()

    def _copied(self, node: Any, graph: Any, root: Any, made: Mapping[Any, Any]) -> Any:
        """Return the float equivalent of *node* in the new graph."""
        import torch

        if node.target is torch.quantize_per_tensor or (node.op, node.target) == (
            "call_method",
            "dequantize",
        ):
            return made[node.args[0]]
        if node.op == "call_module":
            child = self._module.get_submodule(node.target)
            name = node.target.replace(".", "_")
            if not hasattr(root, name):
                root.add_module(name, self._float_module(node.target, child))
            return graph.call_module(name, tuple(made[a] for a in node.args))
        place = str(getattr(node.target, "__module__", "")) + str(node.target)
        if "quantized" in place and node.op == "call_function":
            return self._float_function(node, graph, made)
        if node.op == "get_attr":
            name = node.target.replace(".", "_")
            value = operator.attrgetter(node.target)(self._module)
            if isinstance(value, torch.nn.Module):
                root.add_module(name, value)
            elif not hasattr(root, name):
                root.register_buffer(name, value.detach() if isinstance(value, torch.Tensor) else value)
            return graph.get_attr(name)
        return graph.node_copy(node, lambda n: made[n])

    def _pair(self, node: Any, graph: Any, new: Any, value: Any) -> Any:
        """Quantize and dequantize after a node whose value is a quantized tensor."""
        import torch

        if value.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise self._refused(node.name, f"its value is quantized {value.qscheme()}")
        integers = {torch.quint8: (0, 255, torch.uint8), torch.qint8: (-128, 127, torch.int8)}
        if value.dtype not in integers:
            raise self._refused(node.name, f"its values are {value.dtype}")
        low, high, kind = integers[value.dtype]
        ops = torch.ops.quantized_decomposed
        parameters = (value.q_scale(), value.q_zero_point(), low, high, kind)
        quantized = graph.call_function(ops.quantize_per_tensor.default, (new, *parameters))
        return graph.call_function(ops.dequantize_per_tensor.default, (quantized, *parameters))

    def _float_module(self, name: str, child: Any) -> Any:
        """Return a module on floats that reads its weight through a dequantize of the stored integers."""
        import torch

        kind, place = type(child).__name__, type(child).__module__
        if isinstance(child, torch.nn.Sequential):  # a fused convolution and Relu of a reference module
            return torch.nn.Sequential(
                *(self._float_module(f"{name}.{n}", c) for n, c in child.named_children())
            )
        if ".quantized.reference" in place and hasattr(child, "get_quantized_weight"):
            weight = child.get_quantized_weight()
            return _layer(child, weight, child.bias, kind, lambda why: self._refused(name, why))
        if not _is_packed(child):
            return child
        if ".dynamic" in place:
            raise self._refused(name, "it quantizes at run time")
        if kind in (*_CONVOLUTIONS, *_LINEAR):
            return _layer(child, child.weight(), child.bias(), kind, lambda why: self._refused(name, why))
        raise self._refused(name, f"{kind} is not known here")

    def _float_function(self, node: Any, graph: Any, made: Mapping[Any, Any]) -> Any:
        import torch

        name = str(node.target).rpartition("quantized.")[2].split(".")[0]
        functions: dict[str, tuple[Callable[..., Any], bool]] = {
            "add": (torch.add, False),
            "add_relu": (torch.add, True),
            "mul": (torch.mul, False),
            "mul_relu": (torch.mul, True),
            "cat": (torch.cat, False),
        }
        if name not in functions:
            raise self._refused(node.name, f"{node.target} is not known here")
        function, relu = functions[name]
        if name == "cat":
            tensors = [made[a] for a in node.args[0]]
            new = graph.call_function(function, (tensors, node.args[1] if len(node.args) > 1 else 0))
        else:
            operands = tuple(made.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args[:2])
            new = graph.call_function(function, operands)
        return graph.call_function(torch.relu, (new,)) if relu else new

    def _refused(self, name: str, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._spec}: the quantized layer {name!r} cannot be exported: {why}",
            "Quantize with torchao's pt2e, or export the model as ONNX with Q/DQ",
        )


def _layer(child: Any, weight: Any, bias: Any, kind: str, refused: Callable[[str], Exception]) -> Any:
    """Return a convolution or product on floats with a per-channel (or per-tensor) dequantized weight."""
    import torch

    if not weight.is_quantized or weight.dtype != torch.qint8:
        raise refused(f"its weight is {weight.dtype}, not qint8")
    integers = weight.int_repr()
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    ops = torch.ops.quantized_decomposed

    class Layer(torch.nn.Module):
        bias: Any

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("integers", integers)
            self.register_buffer("bias", None if bias is None else bias.detach().float())
            if per_channel:
                self.register_buffer("scales", weight.q_per_channel_scales().float())
                self.register_buffer("zero_points", weight.q_per_channel_zero_points().long())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if per_channel:
                axis = weight_axis
                w = ops.dequantize_per_channel(
                    self.integers, self.scales, self.zero_points, axis, -128, 127, torch.int8
                )
            else:
                w = ops.dequantize_per_tensor(self.integers, scale, zero_point, -128, 127, torch.int8)
            if kind in _LINEAR:
                result = torch.nn.functional.linear(x, w, self.bias)
            else:
                result = convolve(x, w, self.bias, child.stride, padding, child.dilation, child.groups)
            return torch.relu(result) if kind in _FUSED_RELU else result

    weight_axis = weight.q_per_channel_axis() if per_channel else 0
    scale, zero_point = (0.0, 0) if per_channel else (weight.q_scale(), weight.q_zero_point())
    convolve: Any = getattr(torch.nn.functional, f"conv{kind[-2]}d") if kind in _CONVOLUTIONS else None
    padding = getattr(child, "padding", None)
    if kind in _CONVOLUTIONS and child.padding_mode != "zeros":
        raise refused(f"padding mode {child.padding_mode}")
    Layer.__name__ = kind
    return Layer()
