"""The canonical ONNX graph as an ExecuTorch program: ONNX to torch, torch.export, and the XNNPACK partitioner."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Graph, Source
from portcall.targets.agent.errors import CellFailed, UnsupportedError

LARGEST_FLOAT = 3.4028234663852886e38


class Traced(NamedTuple):
    """The ONNX graph as a torch.fx graph whose constants are attributes.

    graph: a ``torch.fx.GraphModule``; inputs and outputs are the source's, in order. onnx: the module that it was
    traced from. examples: inputs of the example shapes. output_shapes: at these.
    """

    graph: Any
    onnx: Any
    examples: Tuple[Any, ...]
    output_shapes: Tuple[Tuple[int, ...], ...]


def trace(path: Any, graph: Graph) -> Traced:
    """Return the ONNX file at *path*, which has the tensors of *graph*, traced at the example shapes and simplified.

    Simplified is what XNNPACK would not take: see ``_simplify``. Raises UnsupportedError (name, type) for an ONNX node
    without an equivalent in torch.
    """
    import torch

    from portcall.exporters._onnx_to_torch import to_module

    source = graph.source
    module = to_module(path).eval()
    examples = tuple(
        torch.zeros(source.example_shapes[t.name], dtype=getattr(torch, t.dtype)) for t in source.inputs
    )
    with torch.no_grad(), quiet():
        try:
            program = torch.export.export(_ordered(torch, module, source, graph.names), examples)
        except UnsupportedError:
            raise
        except Exception as error:  # torch raises many kinds
            raise CellFailed(
                f"torch.export of the graph failed: {first_line(error)}", "See the log of this step"
            ) from error
        traced = program.module(check_guards=False)
        _simplify(torch, traced)
    [output] = [node for node in traced.graph.nodes if node.op == "output"]
    shapes = tuple(tuple(int(d) for d in value.meta["val"].shape) for value in output.args[0])
    return Traced(traced, module, examples, shapes)


def _ordered(torch: Any, module: Any, source: Source, names: Mapping[str, str]) -> Any:
    """Return *module* with the source's inputs and outputs in the source's order."""

    class Ordered(torch.nn.Module):  # type: ignore[misc]  # torch is Any here
        def __init__(self) -> None:
            super().__init__()
            self.onnx = module

        def forward(self, *arrays: Any) -> Any:
            given = {names[t.name]: a for t, a in zip(source.inputs, arrays)}
            made = module(*(given[name] for name in module.input_names))
            found = dict(zip(module.output_names, made))
            return tuple(found[names[t.name]] for t in source.outputs)

    return Ordered().eval()


def lower(traced: Traced) -> Tuple[Any, Any]:
    """Return the edge program, its delegated parts as ``executorch_call_delegate``, and the ExecuTorch program.

    Raises UnsupportedError for an operator that ExecuTorch has no kernel for.
    """
    import torch

    _drop_unread(traced.graph)
    with torch.no_grad(), quiet():
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        program = torch.export.export(traced.graph, traced.examples)
        try:
            # Operators outside of ATen's core set have portable kernels as well, or are named below.
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[_partitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            return edge, edge.to_executorch()
        except Exception as error:  # ExecuTorch raises ExportError, RuntimeError, AssertionError, ...
            if "quantized_decomposed" in str(error):
                raise UnsupportedError(
                    f"XNNPACK left a quantized operator of this graph aside: {first_line(error)}",
                    "Leave it in float with --keep-float NAME, or use fp32",
                ) from error
            raise CellFailed(
                f"ExecuTorch cannot lower this graph: {first_line(error)}", "See the log of this step"
            ) from error


def _partitioner() -> Any:
    """Return XNNPACK's partitioner, which pads integers as well.

    Source: executorch 1.5.1 ``ConstantPadConfig`` lists float32 alone although its own ``InsertPadQDQPass`` makes
    integer paddings; convolutions of "same" padding at a stride would leave the integers for them.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import ConstantPadConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class IntegerPadConfig(ConstantPadConfig):  # type: ignore[misc]  # executorch is Any here
        def supported_precision_types(self) -> List[Any]:
            return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    others = [config for config in ALL_PARTITIONER_CONFIGS if config is not ConstantPadConfig]
    return XnnpackPartitioner(configs=[*others, IntegerPadConfig])


def outside(edge: Any) -> List[Any]:
    """Return the nodes of an edge program that run outside of its delegates."""
    found = []
    for node in edge.exported_program().graph.nodes:
        name = operator_name(node)
        if node.op == "call_function" and name not in (
            "executorch_call_delegate",
            "getitem",
            "alloc",
            "view_copy",
        ):
            found.append(node)
    return found


def operator_name(node: Any) -> str:
    """Return the name of a node's operator without namespace and overload: slice_copy."""
    target = node.target
    schema = getattr(target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema is not None else getattr(target, "__name__", str(target))
    return str(name).partition(".")[0]


def onnx_name(traced: Traced, node: Any) -> str:
    """Return the name of the ONNX node that a torch.fx node comes from, "" for none."""
    here = module_of(node)
    return str(traced.onnx.node_names.get(here) or here)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let nothing be warned or logged below an error."""
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(was)


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(".")


def module_of(node: Any) -> str:
    """Return the name of the submodule (an ONNX node's) that a torch.fx node comes from, "" for none."""
    for path in reversed([str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]):
        if ".nodes." in path:
            return path.rpartition(".nodes.")[2]
    return ""


def tensor_names(traced: Traced, inputs: Sequence[str]) -> Dict[Any, str]:
    """Return the ONNX name of every torch.fx node that is an ONNX tensor; *inputs* are the names of the graph's inputs.

    An ONNX node may become several: only the one that others read is a tensor of the ONNX graph, and what has the same
    values before it was reshaped.
    """
    import torch

    reshaping = (torch.ops.aten.squeeze.dims, torch.ops.aten.reshape.default)
    found: Dict[Any, str] = {}
    placeholders = [n for n in traced.graph.graph.nodes if n.op == "placeholder"]
    found.update(zip(placeholders, inputs))
    for node in reversed(traced.graph.graph.nodes):
        here = module_of(node)
        if node.op != "call_function" or not here:
            continue
        made = getattr(traced.onnx.nodes, here).node.outputs
        users = list(node.users)
        if len([name for name in made if name]) == 1 and any(module_of(user) != here for user in users):
            found[node] = made[0]
        elif len(users) == 1 and users[0].target in reshaping and users[0] in found:
            found[node] = found[users[0]]
    return found


# Forms that XNNPACK's partitioner knows


def _simplify(torch: Any, traced: Any) -> None:
    """Give the graph the forms that XNNPACK's partitioner knows, without a change of what it computes."""
    from portcall.exporters._tflite_torch import _keep_reduced_axes

    _fold_constants(torch, traced)
    _keep_reduced_axes(traced)
    _clamps(torch, traced)
    _crops(torch, traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def constant(traced: Any, value: Any) -> Optional[Any]:
    """Return the tensor that a torch.fx node stands for, None where it is computed."""
    if getattr(value, "op", None) != "get_attr":
        return None
    found = traced
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found


def add_constant(traced: Any, name: str, tensor: Any) -> Any:
    """Register *tensor* as a buffer and return a torch.fx node that reads it, at the current insertion point."""
    number, free = 0, name
    while hasattr(traced, free):
        number += 1
        free = f"{name}_{number}"
    traced.register_buffer(free, tensor)
    made = traced.graph.get_attr(free)
    made.meta["val"] = tensor
    return made


def _fold_constants(torch: Any, traced: Any) -> None:
    """Compute now what depends on constants alone, a transposed or reshaped weight: a product's has to be constant."""
    for node in list(traced.graph.nodes):
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs:
            continue
        values: Dict[Any, Any] = {i: constant(traced, i) for i in inputs}
        if any(value is None for value in values.values()):
            continue
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n, known=values: known[n])
        result = node.target(*arguments[0], **arguments[1])
        if not isinstance(result, torch.Tensor) or result.numel() > max(v.numel() for v in values.values()):
            continue
        with traced.graph.inserting_before(node):
            folded = add_constant(traced, f"folded_{node.name}", result.detach().clone().contiguous())
        node.replace_all_uses_with(folded)
        traced.graph.erase_node(node)


def _drop_unread(traced: Any) -> None:
    """Remove the constants that nothing reads any more (weights that became integers): they would be stored too."""
    read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in (*traced.named_buffers(), *traced.named_parameters())]
    for name in set(names) - read:
        path, _, last = name.rpartition(".")
        delattr(traced.get_submodule(path), last)


def _clamps(torch: Any, traced: Any) -> None:
    """Write clamp with constant bounds as relu or hardtanh: those are fused with the operator before them."""
    aten = torch.ops.aten
    for node in traced.graph.nodes:
        if node.target == aten.relu6.default:
            node.target, node.args, node.kwargs = aten.hardtanh.default, (node.args[0], 0.0, 6.0), {}
        if node.target != aten.clamp.default:
            continue
        low, high = [*node.args[1:], None, None][:2]
        if any(not isinstance(bound, (int, float, type(None))) for bound in (low, high)):
            continue
        if low == 0 and high is None:
            node.target, node.args = aten.relu.default, (node.args[0],)
        elif node.meta["val"].dtype == torch.float32:
            low = -LARGEST_FLOAT if low is None else float(low)
            high = LARGEST_FLOAT if high is None else float(high)
            node.target, node.args = aten.hardtanh.default, (node.args[0], low, high)
        node.kwargs = {}


def _crops(torch: Any, traced: Any) -> None:
    """Write the crop after a transposed convolution (``_onnx_to_torch_nn._conv_transpose``) as its padding."""
    aten = torch.ops.aten
    for node in list(traced.graph.nodes):
        if node.target not in (aten.conv_transpose2d.input, aten.conv_transpose1d.default):
            continue
        chain: List[Any] = [node]
        sizes = list(node.meta["val"].shape)
        crop = [(0, 0)] * len(sizes)
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            if user.target != aten.slice.Tensor or (len(user.args) > 4 and user.args[4] != 1):
                break
            axis, start, end = [*user.args[1:4], 0, None, None][:3]
            size = sizes[axis]
            start, end, _ = slice(start, end).indices(size)
            crop[axis] = (crop[axis][0] + start, crop[axis][1] + size - end)
            sizes[axis] = end - start
            chain.append(user)
        if len(chain) == 1 or any(before != after for before, after in crop) or any(map(any, crop[:2])):
            continue
        rank = len(sizes) - 2
        args = [*node.args, *[None, [1] * rank, [0] * rank, [0] * rank, 1, [1] * rank][len(node.args) - 2 :]]
        args[4] = [before for before, _ in crop[2:]]
        node.args = tuple(args)
        node.meta["val"] = chain[-1].meta["val"]
        chain[-1].replace_all_uses_with(node)
        for slice_node in reversed(chain[1:]):
            traced.graph.erase_node(slice_node)
