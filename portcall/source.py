"""Opens a model source: ``.onnx``, ``.pt2`` or ``package.module:factory``, and runs it as the reference.

``classify`` looks at the name only and is what the parent calls. Everything else runs in a worker: loading a
``.pt2`` or calling a factory runs code.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portcall.targets.agent.contract import Dim, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, PortcallError, UnavailableError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

Reference = Callable[[Mapping[str, "np.ndarray[Any, Any]"]], dict[str, "np.ndarray[Any, Any]"]]
"""Runs the source on one sample: source input name -> array, to source output name -> array."""

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
KINDS = "model.onnx, model.pt2 (torch.export) or package.module:factory"


def classify(spec: str) -> str:
    """Return "onnx", "pt2" or "torch" for a model's name. Raises BadInput where it is none or is missing."""
    if FACTORY.fullmatch(spec) and not Path(spec).exists():
        return "torch"
    path = Path(spec)
    if path.suffix not in (".onnx", ".pt2"):
        fix = f"Measure it as it is: portcall bench {spec}" if path.suffix == ".tflite" else f"Give {KINDS}"
        raise BadInput(f"cannot open {spec!r} as a model", fix)
    if not path.exists():
        raise BadInput(f"no model file {spec!r}", f"Give the path of {KINDS}")
    if not path.is_file():
        raise BadInput(f"{spec!r} is not a file", f"Give the path of {KINDS}")
    return path.suffix[1:]


def open_source(arguments: Mapping[str, Any], progress: object) -> dict[str, Any]:
    """Worker: open ``spec``, check it, and return the Source as JSON; a factory is exported into ``directory``."""
    spec = str(arguments["spec"])
    kind = classify(spec)
    shapes = {k: tuple(v) for k, v in arguments["shapes"].items()}
    source = _open_onnx(spec) if kind == "onnx" else _open_torch(spec, kind, Path(arguments["directory"]))
    return _with_shapes(source, shapes).to_json()


def _with_shapes(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """Return *source* with the shapes that the user gave (--shape), checked against its inputs."""
    specs = {t.name: t for t in source.inputs}
    for name, shape in shapes.items():
        if name not in specs:
            raise BadInput(
                f"--shape names no input {name!r}", f"The inputs are: {', '.join(map(str, source.inputs))}"
            )
        if not fits(specs[name].shape, shape):
            raise BadInput(
                f"--shape {name}={'x'.join(map(str, shape))} does not fit", f"The input is {specs[name]}"
            )
    return Source(
        source.spec,
        source.format,
        source.path,
        source.sha256,
        source.inputs,
        source.outputs,
        {**source.example_shapes, **shapes},
    )


def fits(spec: tuple[Dim, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether a concrete *shape* fits a *spec* in which a str is any size."""
    return len(spec) == len(shape) and all(
        isinstance(s, str) or s == d for s, d in zip(spec, shape, strict=True)
    )


def single_sample_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return the shape of one sample where only the first axis is dynamic (it becomes 1), else None."""
    shape = tuple(1 if i == 0 and isinstance(d, str) else d for i, d in enumerate(spec.shape))
    return None if any(isinstance(d, str) for d in shape) else tuple(int(d) for d in shape)


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Let the user's code import from the current folder (last, so that nothing is shadowed) and blame it by name."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    except PortcallError:
        raise
    except Exception as error:
        raise BadInput(
            f"{what} failed: {type(error).__name__}: {error}", "Fix that code; portcall only calls it"
        ) from error
    finally:
        if added:
            sys.path.remove(here)


def load_callable(spec: str) -> Callable[..., Any]:
    """Return the callable that ``package.module:name`` names. Raises BadInput where there is none."""
    module_name, _, name = spec.partition(":")
    with user_code(f"importing {module_name!r}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                raise BadInput(
                    f"no module {error.name!r} for {spec!r}",
                    "Install it, or run portcall where it can be imported",
                ) from error
            raise
        found = getattr(module, name, None)
    if not callable(found):
        raise BadInput(f"{module_name!r} has no callable {name!r}", f"Define {name}() there")
    result: Callable[..., Any] = found
    return result


# ---------------------------------------------------------------------------------------------------- torch


def _import_torch(spec: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(
            f"{spec} needs torch, which is not installed", "pip install 'portcall[torch]'"
        ) from error
    return torch


def _load_factory(spec: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    """Call a factory: (module, examples) or (module, examples, dynamic_shapes) -> module, args, kwargs, dynamic."""
    torch = _import_torch(spec)
    factory = load_callable(spec)
    with user_code(f"{spec}()"):
        made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise BadInput(
            f"{spec}() returned {type(made).__name__}, not (module, example inputs[, dynamic shapes])",
            "Return e.g. (model.eval(), (torch.zeros(1, 3, 224, 224),))",
        )
    module, examples = made[0], made[1]
    if module.training:
        raise BadInput(f"{spec}() returned a model in training mode", "Return model.eval()")
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    dynamic = made[2] if len(made) == 3 else None
    if isinstance(examples, dict):
        return module, (), examples, dynamic
    return module, tuple(examples), {}, dynamic


def _open_torch(spec: str, kind: str, directory: Path) -> Source:
    torch = _import_torch(spec)
    if kind == "torch":
        module, args, kwargs, dynamic = _load_factory(spec)
        program = _export_program(spec, module, args, kwargs, dynamic)
        path = directory / "source.pt2"
        torch.export.save(program, path)
    else:
        path = Path(spec).resolve()
        program = _load_program(path)
    inputs, outputs = _signature(program, spec)
    shapes = _example_shapes(program, inputs)
    return Source(spec, kind, path, _hash_program(program), inputs, outputs, shapes)


def _export_program(spec: str, module: Any, args: Any, kwargs: Any, dynamic: Any) -> Any:
    import torch

    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:  # torch.export raises many kinds for models that it cannot trace
        fix = "Make the model traceable: torch.export.export(module, args, dynamic_shapes=...) must succeed"
        if "specialized" in str(error):
            fix = "Give example inputs of size 2 or more in dynamic dimensions: torch.export takes 0 and 1 as fixed"
        raise BadInput(f"torch.export of {spec} failed: {type(error).__name__}: {error}", fix) from error


def _load_program(path: Path) -> Any:
    import torch

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


def _torch_reference(source: Source) -> Reference:
    import torch

    torch.set_grad_enabled(False)
    if source.format == "torch":
        module, _, _, _ = _load_factory(source.spec)
        flatten = torch.utils._pytree.tree_leaves
        program = _load_program(source.path)
    else:
        program = _load_program(source.path)
        module, flatten = program.module(), torch.utils._pytree.tree_leaves
    in_spec = program.call_spec.in_spec

    def run(sample: Mapping[str, Any]) -> dict[str, Any]:
        flat = [torch.from_numpy(sample[t.name]) for t in source.inputs]
        args, kwargs = torch.utils._pytree.tree_unflatten(flat, in_spec)
        results = flatten(module(*args, **kwargs))
        return {t.name: r.numpy() for t, r in zip(source.outputs, results, strict=True)}

    return run


# ----------------------------------------------------------------------------------------------------- onnx


def _open_onnx(spec: str) -> Source:
    try:
        import onnx
    except ImportError as error:
        raise UnavailableError(
            f"{spec} needs onnx, which is not installed", "pip install 'portcall[onnxruntime]'"
        ) from error
    path = Path(spec).resolve()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        raise BadInput(
            f"{spec!r} is not an ONNX model: {type(error).__name__}", "Export it again, or check the file"
        ) from error
    if not model.graph.node and not model.graph.output:
        raise BadInput(
            f"{spec!r} is not an ONNX model: it holds no graph", "Export it again, or check the file"
        )
    external = check_external_data(model, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise BadInput(
            f"{spec!r} is not valid ONNX: {str(error).strip().splitlines()[0]}", "Export it again"
        ) from error
    initializers = {t.name for t in model.graph.initializer}
    inputs = tuple(_onnx_tensor(v, spec) for v in model.graph.input if v.name not in initializers)
    outputs = tuple(_onnx_tensor(v, spec) for v in model.graph.output)
    shapes = {t.name: s for t in inputs if (s := single_sample_shape(t)) is not None}
    return Source(spec, "onnx", path, _hash_files([path, *external]), inputs, outputs, shapes)


def _onnx_tensor(value: Any, spec: str) -> TensorSpec:
    import onnx

    if not value.type.HasField("tensor_type"):
        raise UnsupportedError(
            f"{spec}: {value.name!r} is not a tensor (sequence, map or optional)", "Use tensors"
        )
    tensor = value.type.tensor_type
    if tensor.elem_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        raise UnsupportedError(f"{spec}: {value.name!r} holds strings or has no type", "Use numeric tensors")
    shape: list[Dim] = []
    for axis, dim in enumerate(tensor.shape.dim):
        fixed = dim.HasField("dim_value") and dim.dim_value > 0
        shape.append(int(dim.dim_value) if fixed else dim.dim_param or f"dim_{axis}")
    return TensorSpec(value.name, tuple(shape), str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


def check_external_data(model: Any, path: Path) -> list[Path]:
    """Return the external-data files of an ONNX model, in order of first use.

    Raises BadInput for a file that is missing, too short, or outside the model's folder.
    """
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    files: dict[Path, None] = {}
    for tensor in _get_all_tensors(model):
        if not uses_external_data(tensor):
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        file = path.parent / location
        if (
            not location
            or Path(location).is_absolute()
            or not file.resolve().is_relative_to(path.parent.resolve())
        ):
            raise BadInput(
                f"{path.name}: the weights of {tensor.name!r} point outside the model's folder ({location!r})",
                "Save the model again with its data file beside it",
            )
        if not file.is_file():
            raise BadInput(
                f"{path.name}: its external data file {location!r} is missing",
                f"Put {location} beside {path.name}",
            )
        needed = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if file.stat().st_size < needed:
            raise BadInput(
                f"{path.name}: {location!r} has {file.stat().st_size} bytes, {tensor.name!r} needs {needed}",
                "Copy the data file again: it was cut short",
            )
        files[file] = None
    return list(files)


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _onnx_reference(source: Source) -> Reference:
    """Run an ONNX source in ONNX Runtime with every graph optimization off: its arithmetic as it was written."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnavailableError(
            f"the reference of {source.spec} needs onnxruntime", "pip install 'portcall[onnxruntime]'"
        ) from error
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])
    names = [t.name for t in source.outputs]
    return lambda sample: dict(zip(names, session.run(names, dict(sample)), strict=True))


def open_reference(source: Source) -> Reference:
    """Return a function that runs *source* by its own framework in float32."""
    return _onnx_reference(source) if source.format == "onnx" else _torch_reference(source)
