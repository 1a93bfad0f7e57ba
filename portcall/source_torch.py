"""Torch sources: a factory, or a ``.pt2``. Everything here runs in a worker; loading either runs code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portcall.parametrizations import fold, training_parts
from portcall.source import Reference, require
from portcall.source_fx import is_exported, is_quantized, refuse_unconverted, traceable
from portcall.targets.agent.contract import Dim, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, UnsupportedError
from portcall.user_code import load_callable

if TYPE_CHECKING:
    import torch


def _load_factory(spec: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    """Call a factory: (module, examples) or (module, examples, dynamic_shapes) -> module, args, kwargs, dynamic."""
    torch = require("torch", spec, "torch")
    factory = load_callable(spec, "returns (module, example inputs[, dynamic shapes])")
    try:
        made = factory()
    except Exception as error:  # the user's code raises anything
        raise BadInput(
            f"{spec}() failed: {type(error).__name__}: {error}", "Fix that code; portcall only calls it"
        ) from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise BadInput(
            f"{spec}() returned {type(made).__name__}, not (module, example inputs[, dynamic shapes])",
            "Return e.g. (model.eval(), (torch.zeros(1, 3, 224, 224),))",
        )
    module, examples = made[0], made[1]
    refuse_unconverted(module, spec)
    if module.training and not is_exported(module):
        raise BadInput(f"{spec}() returned a model in training mode", "Return model.eval()")
    if not is_exported(module) and (training := training_parts(module)):
        shown = ", ".join(training[:5]) + (f" and {len(training) - 5} more" if len(training) > 5 else "")
        raise BadInput(
            f"{spec}() returned a model in eval mode with parts in training mode: {shown}",
            "Call model.eval() last, after every part is in place",
        )
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    dynamic = made[2] if len(made) == 3 else None
    if isinstance(examples, dict):
        return module, (), examples, dynamic
    return module, tuple(examples), {}, dynamic


def open_torch(spec: str, kind: str, directory: Path) -> Source:
    torch = require("torch", spec, "torch")
    notes: tuple[str, ...] = ()
    if kind == "torch":
        module, args, kwargs, dynamic = _load_factory(spec)
        module, notes = fold(module)  # the reference runs it as it came
        program = _export_program(spec, module, args, kwargs, dynamic)
        path = directory / "source.pt2"
        torch.export.save(program, path)
    else:
        path = Path(spec).resolve()
        program = load_program(path)
    inputs, outputs = _signature(program, spec)
    shapes = _example_shapes(program, inputs)
    quantized = is_quantized(program)
    return Source(spec, kind, path, _hash_program(program), inputs, outputs, shapes, notes, quantized)


def _export_program(spec: str, module: Any, args: Any, kwargs: Any, dynamic: Any) -> Any:
    import torch

    module = traceable(module, args, kwargs, spec)
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:  # torch.export raises many kinds for models that it cannot trace
        fix = "Make the model traceable: torch.export.export(module, args, dynamic_shapes=...) must succeed"
        if "specialized" in str(error):
            fix = "Give example inputs of size 2 or more in dynamic dimensions: torch.export takes 0 and 1 as fixed"
        raise BadInput(f"torch.export of {spec} failed: {type(error).__name__}: {error}", fix) from error


def load_program(path: Path) -> Any:
    """Return the ExportedProgram of a ``.pt2``. Raises BadInput for a file that is none."""
    import torch
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers the operators of quantized programs

    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a file that is no .pt2
        first_line = (str(error).splitlines() or [""])[0]
        raise BadInput(
            f"{str(path)!r} is not a readable .pt2: {type(error).__name__}: {first_line}",
            "Write it with torch.export.save(torch.export.export(model, args), path) of this torch version",
        ) from error


def _signature(program: Any, spec: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the user inputs and outputs of an ExportedProgram, dynamic dimensions named.

    Outputs are named by the keys of a dict or dataclass output, else "output" or "output_0", "output_1", ...
    """
    import torch

    nodes = {n.name: n for n in program.graph.nodes}
    symbols: dict[str, str] = {}

    def spec_of(name: str, shown: str) -> TensorSpec:
        value = nodes[name].meta["val"] if name in nodes else None
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(
                f"{spec}: {shown!r} is {type(value).__name__}, not a tensor",
                "Wrap the model so that it takes and returns tensors",
            )
        shape: list[Dim] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
            else:
                fallback = "batch" if axis == 0 and "batch" not in symbols.values() else f"dim_{len(symbols)}"
                shape.append(symbols.setdefault(str(size), fallback))
        return TensorSpec(shown, tuple(shape), str(value.dtype).removeprefix("torch."))

    inputs = tuple(spec_of(str(n), str(n)) for n in program.graph_signature.user_inputs)
    names = [str(n) for n in program.graph_signature.user_outputs]
    shown = _output_names(program, len(names))
    return inputs, tuple(spec_of(n, s) for n, s in zip(names, shown, strict=True))


def _output_names(program: Any, count: int) -> list[str]:
    import torch.utils._pytree as pytree

    spec = program.call_spec.out_spec
    if spec is not None:
        tree = pytree.tree_unflatten(list(range(count)), spec)
        items = tree.items() if hasattr(tree, "items") else ()
        names = {index: str(key) for key, index in items if isinstance(index, int)}
        if len(names) == count:
            return [names[i] for i in range(count)]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _example_shapes(program: Any, inputs: tuple[TensorSpec, ...]) -> dict[str, tuple[int, ...]]:
    """Return the concrete shapes of the example inputs, with a dynamic batch set to 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec, tensor in zip(inputs, flat_examples(program), strict=True):
        shapes[spec.name] = tuple(
            1 if axis == 0 and isinstance(dim, str) else int(size)
            for axis, (dim, size) in enumerate(zip(spec.shape, tensor.shape, strict=True))
        )
    return shapes


def flat_examples(program: Any) -> list[Any]:
    """Return the tensors of an ExportedProgram's example inputs in the order of its user inputs."""
    import torch.utils._pytree as pytree

    args, kwargs = program.example_inputs
    return list(pytree.tree_leaves((args, kwargs)))


def _hash_program(program: Any) -> str:
    """Return a sha256 over the traced code and every weight, equal for equal networks whatever file holds them."""
    digest = hashlib.sha256(str(program.graph_module.code).encode())
    tensors = {**program.state_dict, **program.constants}
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {getattr(tensor, 'dtype', '')} {list(getattr(tensor, 'shape', []))}".encode())
        if hasattr(tensor, "detach"):
            import torch

            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def torch_reference(source: Source) -> Reference:
    import torch

    torch.set_grad_enabled(False)
    if source.format == "torch":
        module, _, _, _ = _load_factory(source.spec)
        flatten = torch.utils._pytree.tree_leaves
        program = load_program(source.path)
        _check_same_weights(source.spec, module, program)
    else:
        program = load_program(source.path)
        module, flatten = program.module(), torch.utils._pytree.tree_leaves
    in_spec = program.call_spec.in_spec

    def run(sample: Mapping[str, Any]) -> dict[str, Any]:
        flat = [torch.from_numpy(sample[t.name]) for t in source.inputs]
        args, kwargs = torch.utils._pytree.tree_unflatten(flat, in_spec)
        results = flatten(module(*args, **kwargs))
        return {t.name: r.numpy() for t, r in zip(source.outputs, results, strict=True)}

    return run


def _check_same_weights(spec: str, module: torch.nn.Module, program: Any) -> None:
    """Raise BadInput for a factory whose weights differ from those that were exported, from another call of it.

    Folded parametrizations have other names in the program; what they share (biases, other layers) is compared.
    """
    import torch

    stored = program.state_dict
    for name, tensor in module.state_dict().items():
        other = stored.get(name)
        if not isinstance(tensor, torch.Tensor) or other is None or other.shape != tensor.shape:
            continue
        if tensor.is_floating_point():  # a NaN equals no other
            tensor, other = tensor.nan_to_num(), other.nan_to_num()
        if not torch.equal(tensor, other):
            raise BadInput(
                f"{spec}() returns other weights each time it is called; the first that differ: {name}",
                "Load saved weights in it, or call torch.manual_seed first",
            )
