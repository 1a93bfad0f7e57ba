"""The canonical ONNX graph that all ONNX-based backends share, and how ONNX files are saved and counted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from portcall.targets.agent.contract import BoundTensor, Census, Dim, Graph, Source
from portcall.targets.agent.errors import UnsupportedError

EXTERNAL_ABOVE_BYTES = 200 << 20
"""Weights go to a file of their own above this size: ONNX Runtime then peaks at a third of the memory."""

COMPUTE_OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
INTEGER_OPS = (
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
)


def lower(source: Source, directory: Path) -> Graph:
    """Write the canonical graph of *source* into *directory*: constants folded, batch normalization folded,
    stale value_info dropped, the source's input and output names.
    """
    import onnx

    raw = directory / "raw.onnx"
    if source.format == "onnx":
        raw = source.path
    else:
        _export_torch(source, raw)
    path = directory / "graph.onnx"
    _optimize(raw, path)
    model = onnx.load(str(path), load_external_data=False)
    names = {v.name for v in model.graph.input} | {v.name for v in model.graph.output}
    missing = [t.name for t in source.inputs + source.outputs if t.name not in names]
    if missing:
        raise UnsupportedError(f"the ONNX graph lost the inputs or outputs {missing}", "Remove unused inputs")
    if raw != source.path:
        for file in (raw, raw.with_name(raw.name + ".data")):
            if file.exists():
                file.unlink()
    return Graph("onnx", path, graph_sha256(path), source, {n: n for n in names})


def _export_torch(source: Source, path: Path) -> None:
    import torch

    program = torch.export.load(source.path)
    args, kwargs = program.example_inputs
    exported = torch.onnx.export(
        program,
        args,
        kwargs=kwargs,
        dynamo=True,
        input_names=[t.name for t in source.inputs],
        output_names=[t.name for t in source.outputs],
        verbose=False,
    )
    assert exported is not None
    exported.save(str(path), external_data=True)


def _optimize(raw: Path, path: Path) -> None:
    """Fold constants and batch normalization with ONNX Runtime's basic level, which keeps to standard operators."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", path.name + ".data"
    )
    ort.InferenceSession(str(raw), options, providers=["CPUExecutionProvider"])
    before = onnx.load(str(raw), load_external_data=False)
    model = onnx.load(str(path))
    known = {o.domain for o in before.opset_import} | {""}
    if any(n.domain not in known and n.domain != "ai.onnx" for n in model.graph.node):
        model = onnx.load(str(raw))
    del model.graph.value_info[:]
    used = {n.domain for n in model.graph.node} | {f.domain for f in model.functions} | {""}
    opsets = [o for o in model.opset_import if o.domain in used or (o.domain == "ai.onnx" and "" in used)]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        del node.metadata_props[:]
    del model.metadata_props[:]
    data = path.with_name(path.name + ".data")
    if data.exists():
        data.unlink()
    save(model, path)


def save(model: Any, path: Path) -> Tuple[str, ...]:
    """Save sorted (the quantizers append), checked, and with the lowest IR version that the operator sets allow.

    Return the names of the files written.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    ONNXModel(model).topological_sort()
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    files: Tuple[str, ...] = (path.name,)
    if model.ByteSize() <= EXTERNAL_ABOVE_BYTES:
        onnx.save_model(model, str(path))
    else:
        files = (path.name, path.name + ".data")
        onnx.save_model(model, str(path), save_as_external_data=True, location=files[1], size_threshold=1024)
    onnx.checker.check_model(str(path))
    return files


def graph_sha256(path: Path) -> str:
    """Return the hash of a saved graph and its external data."""
    digest = hashlib.sha256()
    for file in (path, path.with_name(path.name + ".data")):
        if file.exists():
            with file.open("rb") as stream:
                for chunk in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(chunk)
    return digest.hexdigest()


def bound_tensors(graph: Graph) -> Tuple[Tuple[BoundTensor, ...], Tuple[BoundTensor, ...]]:
    """Return inputs and outputs of an artifact that keeps the source's names, shapes and dtypes."""
    source = graph.source
    return (
        tuple(BoundTensor(t.name, graph.names[t.name], t.shape, t.dtype) for t in source.inputs),
        tuple(BoundTensor(t.name, graph.names[t.name], t.shape, t.dtype) for t in source.outputs),
    )


def census(path: Path, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    """Count integer arithmetic in an ONNX file: a product is on integers if both operands were dequantized,
    or if the operator itself takes integers. Shapes come from ONNX shape inference at *shapes*.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in model.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, shapes[value.name]):
                dim.dim_value = size
    del model.graph.value_info[:]
    sizes = _shapes(onnx.shape_inference.infer_shapes(model, data_prop=True))
    made_by = {name: node for node in model.graph.node for name in node.output}
    quantize = sum(
        n.op_type in ("QuantizeLinear", "DequantizeLinear", *INTEGER_OPS) for n in model.graph.node
    )
    total: Optional[int] = 0
    integer: Optional[int] = 0
    floats: List[str] = []
    for node in model.graph.node:
        if node.op_type not in COMPUTE_OPS + INTEGER_OPS:
            continue
        on_integers = node.op_type in INTEGER_OPS or all(
            name in made_by and made_by[name].op_type == "DequantizeLinear" for name in node.input[:2]
        )
        macs = _macs(node, sizes)
        total = None if macs is None or total is None else total + macs
        integer = None if macs is None or integer is None else integer + (macs if on_integers else 0)
        if not on_integers:
            floats.append(node.name)
    return Census(quantize, total, integer, tuple(floats), "Q/DQ and integer operators of the ONNX graph")


def _shapes(model: Any) -> Dict[str, Tuple[Dim, ...]]:
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    shapes: Dict[str, Tuple[Dim, ...]] = {
        v.name: tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param for d in v.type.tensor_type.shape.dim
        )
        for v in values
    }
    shapes.update({t.name: tuple(t.dims) for t in model.graph.initializer})
    return shapes


def _macs(node: Any, shapes: Mapping[str, Tuple[Dim, ...]]) -> Optional[int]:
    """Multiply-accumulates of one node, or None where a shape is unknown."""
    weight = shapes.get(node.input[3 if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm") else 1])
    first, output = shapes.get(node.input[0]), shapes.get(node.output[0])
    if weight is None or first is None or output is None:
        return None
    if "Conv" in node.op_type:  # weights [out, in / groups, *kernel]; transposed: [in, out / groups, *kernel]
        per_element, elements = weight[1:], first if node.op_type == "ConvTranspose" else output
    elif node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        per_element, elements = first[:1], output
    else:
        per_element, elements = first[-1:], output
    result = 1
    for dim in (*elements, *per_element):
        if not isinstance(dim, int):
            return None
        result *= dim
    return result
