"""Torch programs and ONNX graphs as float flatbuffers, by litert-torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from portcall.targets.agent.contract import Source
from portcall.targets.agent.errors import UnsupportedError

LARGEST_BYTES = (1 << 31) - (1 << 20)
"""Of weights: a flatbuffer's offsets have 31 bits, and the graph needs some."""


def convert(source: Source, directory: Path) -> bytes:
    """Return *source* as a float flatbuffer of its example shapes; *directory* takes intermediate files.

    Raises UnsupportedError, naming the operator and the layer, where litert-torch has no lowering for it, and for
    weights that no flatbuffer can hold.
    """
    _check_size(source)
    import litert_torch

    from_onnx = source.format == "onnx" or source.quantized
    module, args, kwargs = (_onnx if from_onnx else _program)(source, directory)
    path = directory / "converted.tflite"
    try:
        litert_torch.convert(module, args, kwargs or None).export(str(path))
    except Exception as error:  # torch and litert-torch raise many kinds
        explained = _explained(source, module, args, error)
        if explained is None:
            raise
        raise explained from error
    flatbuffer = path.read_bytes()
    path.unlink()
    return flatbuffer


def _check_size(source: Source) -> None:
    """Raise UnsupportedError for more weights than a flatbuffer's 32-bit offsets reach."""
    if source.format == "onnx":
        import onnx

        tensors = onnx.load(str(source.path), load_external_data=False).graph.initializer
        size = sum(
            math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors
        )
    else:
        from portcall.source_torch import load_program

        state = load_program(source.path).state_dict.values()
        size = sum(t.numel() * t.element_size() for t in state)
    if size > LARGEST_BYTES:
        raise UnsupportedError(
            f"{source.spec} has {size / 1e9:.1f} GB of weights, a flatbuffer holds 2 GB",
            "Export it to onnxruntime, openvino or tensorrt, or split the model",
        )


def _onnx(source: Source, directory: Path) -> Tuple[Any, Tuple[Any, ...], Dict[str, Any]]:
    """Return the canonical ONNX graph as a torch module, and example inputs; the float graph of a quantized source."""
    import torch

    from portcall.exporters import _onnx, _onnx_to_torch, _trained_tflite

    folder = directory / "onnx"
    folder.mkdir()
    path = _onnx.lower(source, folder).path
    if source.quantized:
        path = _trained_tflite.write_float(path, directory)
    module = _onnx_to_torch.to_module(path).eval()
    quantizing = ("QuantizeLinear", "DequantizeLinear")
    found = [n for n, child in module.nodes.named_children() if type(child).__name__ in quantizing]
    if found:  # litert-torch has no form for scales per channel, and the ranges would be quantized twice
        raise UnsupportedError(
            f"{source.spec} is quantized already: node {module.node_names[found[0]]!r}",
            "Give the float model, which portcall quantizes, or export it with onnxruntime",
        )
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    order = {t.name: t for t in source.inputs}
    specs = [order[name] for name in module.input_names]
    args = tuple(torch.zeros(source.example_shapes[t.name], dtype=getattr(torch, t.dtype)) for t in specs)
    return module, args, {}


def _program(source: Source, directory: Path) -> Tuple[Any, Tuple[Any, ...], Dict[str, Any]]:
    """Return the exported program as a module, and its example inputs at the example shapes."""
    import torch

    from portcall.source_torch import flat_examples, load_program

    program = load_program(source.path)
    leaves = []
    for spec, example in zip(source.inputs, flat_examples(program)):
        shape = source.example_shapes[spec.name]
        same = tuple(example.shape) == shape
        leaves.append(example if same else torch.zeros(shape, dtype=example.dtype))
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    module = program.module(check_guards=False)
    _keep_reduced_axes(module)
    _cut_padding(module)
    return module, tuple(args), dict(kwargs)


def _keep_reduced_axes(module: Any) -> None:
    """Reduce with keepdim and squeeze afterwards: litert-torch's change of layout stops at what drops axes.

    ``x.mean((2, 3))`` after a convolution would put a TRANSPOSE of the whole activation before the MEAN.
    """
    import torch

    aten = torch.ops.aten
    reductions = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
    for node in list(module.graph.nodes):
        if node.target not in reductions or len(node.args) < 2 or not node.args[1]:
            continue
        if node.kwargs.get("keepdim", False) or (len(node.args) > 2 and node.args[2]):
            continue
        node.args = (*node.args[:2], True, *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "keepdim"}
        with module.graph.inserting_after(node):
            squeezed = module.graph.call_function(aten.squeeze.dims, (node, node.args[1]))
        squeezed.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.replace_all_uses_with(squeezed, lambda user, made=squeezed: user is not made)
    module.recompile()


def _cut_padding(module: Any) -> None:
    """Cut off the padding of transposed convolutions afterwards: LiteRT's operator knows none."""
    import torch

    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target not in (aten.conv_transpose2d.input, aten.conv_transpose1d.default):
            continue
        padding = [int(p) for p in node.args[4]] if len(node.args) > 4 else [0]
        if not any(padding):
            continue
        rank = 2 if node.target == aten.conv_transpose2d.input else 1
        padding = padding * rank if len(padding) == 1 else padding
        node.args = (*node.args[:4], [0] * rank, *node.args[5:])
        users, last = list(node.users), node
        for axis, size in enumerate(padding, 2):
            with module.graph.inserting_after(last):
                last = module.graph.call_function(aten.slice.Tensor, (last, axis, size, -size or 2**63 - 1))
            last.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        for user in users:
            user.replace_input_with(node, last)
    module.recompile()


def _explained(
    source: Source, module: Any, args: Tuple[Any, ...], error: Exception
) -> Optional[UnsupportedError]:
    """Return the error that names the operator and the line, or the ONNX node, that it comes from; None for others."""
    import torch

    from portcall.exporters import _unsupported
    from portcall.source_torch import load_program

    legal = re.search(r"([\w.]+\.py:\d+)?[^\n]*failed to legalize operation '([\w.]+)'", str(error))
    if legal is not None:
        where = f" ({legal.group(1)})" if legal.group(1) and source.format != "onnx" else ""
        return UnsupportedError(
            f"LiteRT has no operator for {legal.group(2)} with these types and attributes{where}",
            _unsupported.replacement_for(legal.group(2)),
        )
    if "Failed to export flatbuffer" in str(error):
        return UnsupportedError(
            f"an operator of {source.spec} has no form in LiteRT: its converter does not say which",
            "See the log of this step, or export with onnxruntime",
        )
    if source.format != "onnx":
        return _unsupported.explain(error, load_program(source.path), "TFLite")
    program = torch.export.export(module, args)
    found = _unsupported.explain(error, program, "TFLite")
    if found is None:
        return None
    operator = found.message.split("torch's ")[1].split(" ")[0]
    stem = operator.rpartition(".")[2].lstrip("_")
    for node in [*program.graph.nodes, *program.run_decompositions().graph.nodes]:
        if stem in str(node.target) and node.meta.get("nn_module_stack"):
            path = str(list(node.meta["nn_module_stack"].values())[-1][0])
            name = module.node_names.get(path.rpartition(".")[2], path)
            return UnsupportedError(
                f"TFLite has no operator for torch's {operator} (ONNX node {name!r})", found.fix
            )
    return found
