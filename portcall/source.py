"""Opens a model source (``.onnx``, ``.pt2``, ``.keras``, a SavedModel, a factory), and runs it as the reference.

``classify`` looks at the name only and is what the parent calls. Everything else runs in a worker: loading a
``.pt2`` or calling a factory runs code.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portcall.targets.agent.contract import Dim, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, UnavailableError

if TYPE_CHECKING:
    import numpy as np

Reference = Callable[[Mapping[str, "np.ndarray[Any, Any]"]], dict[str, "np.ndarray[Any, Any]"]]
"""Runs the source on one sample: source input name -> array, to source output name -> array."""

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
KINDS = "model.onnx, model.pt2 (torch.export), model.keras, a SavedModel folder or package.module:factory"


def classify(spec: str) -> str:
    """Return "onnx", "pt2", "keras", "savedmodel" or "torch" (a factory) for a model's name.

    Raises BadInput where it is none or is missing.
    """
    if FACTORY.fullmatch(spec) and not Path(spec).exists():
        return "torch"
    path = Path(spec)
    if path.is_dir() and (path / "saved_model.pb").is_file():
        return "savedmodel"
    if path.suffix not in (".onnx", ".pt2", ".keras"):
        fix = f"Give {KINDS}"
        if path.suffix == ".tflite":
            fix = f"Measure it as it is: portcall bench {spec}"
        elif path.suffix in (".h5", ".hdf5"):
            fix = "Save it as Keras 3 does: model.save('model.keras')"
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
    if kind == "onnx":
        from portcall.source_onnx import open_onnx

        source = open_onnx(spec)
    elif kind in ("keras", "savedmodel"):
        from portcall.source_keras import open_keras

        source = open_keras(spec, kind)
    else:
        from portcall.source_torch import open_torch

        source = open_torch(spec, kind, Path(arguments["directory"]))
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
    return replace(source, example_shapes={**source.example_shapes, **shapes})


def fits(spec: tuple[Dim, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether a concrete *shape* fits a *spec* in which a str is any size."""
    return len(spec) == len(shape) and all(
        isinstance(s, str) or s == d for s, d in zip(spec, shape, strict=True)
    )


def single_sample_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return the shape of one sample where only the first axis is dynamic (it becomes 1), else None."""
    shape = tuple(1 if i == 0 and isinstance(d, str) else d for i, d in enumerate(spec.shape))
    return None if any(isinstance(d, str) for d in shape) else tuple(int(d) for d in shape)


def require(module: str, what: str, extra: str) -> Any:
    """Return an imported module that opening or running a source needs. Raises UnavailableError without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"{what} needs {module}: {error}", f"pip install 'portcall[{extra}]'"
        ) from error


def open_reference(source: Source) -> Reference:
    """Return a function that runs *source* by its own framework in float32."""
    if source.format == "onnx":
        from portcall.source_onnx import onnx_reference

        return onnx_reference(source)
    if source.format in ("keras", "savedmodel"):
        from portcall.source_keras import keras_reference

        return keras_reference(source)
    from portcall.source_torch import torch_reference

    return torch_reference(source)
