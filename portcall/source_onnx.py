"""ONNX sources: opened, checked with their external data, and run without optimizations. Runs in a worker."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from portcall.source import Reference, require, single_sample_shape
from portcall.targets.agent.contract import Dim, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, UnsupportedError


def open_onnx(spec: str) -> Source:
    onnx = require("onnx", spec, "onnxruntime")
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
    quantized = any(n.op_type == "QuantizeLinear" for n in model.graph.node)
    return Source(
        spec, "onnx", path, _hash_files([path, *external]), inputs, outputs, shapes, quantized=quantized
    )


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


def onnx_reference(source: Source) -> Reference:
    """Run an ONNX source in ONNX Runtime with every graph optimization off: its arithmetic as it was written."""
    ort = require("onnxruntime", f"the reference of {source.spec}", "onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])
    names = [t.name for t in source.outputs]
    return lambda sample: dict(zip(names, session.run(names, dict(sample)), strict=True))
