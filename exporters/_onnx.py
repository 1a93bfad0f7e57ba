"""The canonical ONNX graph that all ONNX-based backends share, and how ONNX files are saved and counted."""

from __future__ import annotations

import hashlib
import heapq
import math
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Set, Tuple

from portcall.targets.agent.contract import BoundTensor, Census, Graph, Source
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

    from portcall.exporters import _float32, _floats_onnx

    raw = directory / "raw.onnx"
    if source.format == "onnx":
        raw = source.path
    else:
        _export_torch(source, raw)
        _floats_onnx.write_layers(raw, directory)
    raw = _float32.converted(raw, directory / "raw.onnx")
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

    from portcall.exporters import _unsupported
    from portcall.source_torch import load_program

    program = load_program(source.path)
    args, kwargs = program.example_inputs
    try:
        exported = torch.onnx.export(
            program,
            args,
            kwargs=kwargs,
            dynamo=True,
            input_names=[t.name for t in source.inputs],
            output_names=[t.name for t in source.outputs],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        explained = _unsupported.explain(error, program, "ONNX")
        if explained is None:
            raise
        raise explained from error
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
    # It would quantize float weights and biases of a quantized model on its own account.
    invented = ["WeightBiasQuantization"]
    ort.InferenceSession(str(raw), options, providers=["CPUExecutionProvider"], disabled_optimizers=invented)
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
    names: Set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in names:
            node.name = f"{node.name or node.op_type}_{number}"
        names.add(node.name)
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

    sort(model.graph)
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    files: Tuple[str, ...] = (path.name,)
    if not is_large(model):
        onnx.save_model(model, str(path))
    else:
        files = (path.name, path.name + ".data")
        onnx.save_model(model, str(path), save_as_external_data=True, location=files[1], size_threshold=1024)
    onnx.checker.check_model(str(path))
    return files


def sort(graph: Any) -> None:
    """Order the nodes so that each follows what it reads, what its branches and loop bodies capture included."""
    nodes = list(graph.node)
    made_by = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    waits_for = [{made_by[name] for name in _reads(node) if name in made_by} for node in nodes]  # by number
    readers: List[List[int]] = [[] for _ in nodes]
    for number, sources in enumerate(waits_for):
        for source in sources:
            readers[source].append(number)
    ready = [number for number, sources in enumerate(waits_for) if not sources]
    ordered: List[Any] = []
    while ready:
        # The first of those that could come next: a sorted graph stays as it is.
        number = heapq.heappop(ready)
        ordered.append(nodes[number])
        for reader in readers[number]:
            waits_for[reader].discard(number)
            if not waits_for[reader]:
                heapq.heappush(ready, reader)
    assert len(ordered) == len(nodes), "the graph has a cycle"
    del graph.node[:]
    graph.node.extend(ordered)


def _reads(node: Any) -> Set[str]:
    bodies = [body for attribute in node.attribute for body in [attribute.g, *attribute.graphs]]
    return set(node.input).union(*(_reads(inner) for body in bodies for inner in body.node))


def is_large(model: Any) -> bool:
    """Tell whether the weights go to a file of their own. (A message above 2 GB cannot tell its own size.)"""
    return (
        sum(len(t.raw_data) or 8 * math.prod(t.dims) for t in model.graph.initializer) > EXTERNAL_ABOVE_BYTES
    )


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
    or if the operator itself takes integers. Tensor shapes are read off a run at *shapes* (by input name).
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    made_by = {name: node for node in model.graph.node for name in node.output}
    quantize = sum(
        n.op_type in ("QuantizeLinear", "DequantizeLinear", *INTEGER_OPS) for n in model.graph.node
    )
    compute = [n for n in model.graph.node if n.op_type in COMPUTE_OPS + INTEGER_OPS]
    constants = {t.name: tuple(t.dims) for t in model.graph.initializer}
    names = {name for n in compute for name in [*n.input, *n.output] if name} - set(constants)
    sizes = {**constants, **observed_shapes(path, model, names, shapes)}
    total = integer = 0
    floats: List[str] = []
    for node in compute:
        on_integers = node.op_type in INTEGER_OPS or all(
            name in made_by and made_by[name].op_type == "DequantizeLinear" for name in node.input[:2]
        )
        macs = _macs(node, sizes)
        total += macs
        integer += macs if on_integers else 0
        if not on_integers:
            floats.append(node.name)
    return Census(quantize, total, integer, tuple(floats), "Q/DQ and integer operators of the ONNX graph")


def observed_shapes(
    path: Path, model: Any, names: Iterable[str], shapes: Mapping[str, Tuple[int, ...]]
) -> Dict[str, Tuple[int, ...]]:
    """Run *model*, which was loaded from *path* and is changed, once on zeros; return the shapes of tensors *names*.

    shapes: of the inputs. Shape inference loses track in transformers; a Shape node on every tensor costs nothing and
    is exact.
    """
    import numpy as np
    import onnx
    import onnxruntime as ort

    probes = {f"portcall_shape_{i}": name for i, name in enumerate(sorted(names))}
    for probe, name in probes.items():
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [probe]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(probe, onnx.TensorProto.INT64, [None]))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = {
        v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input
    }
    feeds = {v.name: np.zeros(shapes[v.name], kinds[v.name]) for v in session.get_inputs()}
    found = session.run(list(probes), feeds)
    return {name: tuple(int(d) for d in shape) for name, shape in zip(probes.values(), found)}


def _macs(node: Any, shapes: Mapping[str, Tuple[int, ...]]) -> int:
    """Multiply-accumulates of one node at the given tensor shapes."""
    weight = shapes[node.input[3 if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm") else 1]]
    first, output = shapes[node.input[0]], shapes[node.output[0]]
    if "Conv" in node.op_type:  # weights [out, in / groups, *kernel]; transposed: [in, out / groups, *kernel]
        per_element, elements = weight[1:], first if node.op_type == "ConvTranspose" else output
    elif node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        per_element, elements = first[:1], output
    else:
        per_element, elements = first[-1:], output
    result = 1
    for dim in (*elements, *per_element):
        result *= dim
    return result
