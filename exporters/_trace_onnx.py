"""Intermediate tensors of an ONNX artifact: every float tensor, and every activation behind its Q/DQ pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Set, Tuple

from portcall.targets.agent.binding import to_runtime
from portcall.targets.agent.contract import Artifact, Shown, Trace
from portcall.targets.agent.errors import CellFailed

RENAMED = "_QuantizeLinear_Input"
"""What ONNX Runtime's quantizer appends to an output of the graph, whose name the pair's end then takes."""


def plan(model: Any) -> List[Tuple[Shown, str]]:
    """Return what the ONNX *model* can show, in its order, each with the name of the tensor to ask for.

    A float tensor goes by its own name. The output of a DequantizeLinear that reads a QuantizeLinear goes by the name
    of what was quantized; its readers are the operators that read it, or through a further pair.
    """
    import numpy as np
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    readers: Dict[str, List[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    pairs = {node.name for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"} - {
        v.name for v in graph.input
    }
    found: List[Tuple[Shown, str]] = []

    def through_pair(node: Any) -> Any:
        quantize = made_by.get(node.input[0])
        return quantize if quantize is not None and quantize.op_type == "QuantizeLinear" else None

    def add_pairs(name: str) -> None:
        for quantize in (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name):
            for node in graph.node:
                if node.op_type != "DequantizeLinear" or through_pair(node) is not quantize:
                    continue
                scale = numpy_helper.to_array(constants[node.input[1]]).reshape(-1)
                if scale.size != 1:
                    continue
                zero = constants.get(node.input[2]) if len(node.input) > 2 else None
                dtype = numpy_helper.to_array(zero).dtype if zero is not None else np.dtype(np.uint8)
                if dtype.kind not in "iu":
                    continue
                limits = np.iinfo(dtype)
                shown = Shown(
                    base_name(quantize),
                    float(scale[0]),
                    int(numpy_helper.to_array(zero).reshape(-1)[0]) if zero is not None else 0,
                    (int(limits.min), int(limits.max)),
                    tuple(r for r in readers.get(node.output[0], []) if r not in pairs),
                )
                found.append((shown, node.output[0]))

    def base_name(quantize: Any) -> str:
        """Return the float tensor behind a chain of pairs."""
        name = quantize.input[0]
        maker = made_by.get(name)
        while maker is not None and maker.op_type == "DequantizeLinear" and through_pair(maker) is not None:
            name = through_pair(maker).input[0]
            maker = made_by.get(name)
        return str(name)[: -len(RENAMED)] if name.endswith(RENAMED) else str(name)

    types = _float_tensors(model, TensorProto)
    own: Set[str] = {v.name for v in graph.input if v.name not in constants}
    for name in [v.name for v in graph.input if v.name not in constants] + [
        name for node in graph.node if node.op_type not in ("QuantizeLinear",) for name in node.output
    ]:
        maker = made_by.get(name)
        if not name or (name not in types and name not in own):
            continue
        if maker is not None and maker.op_type == "DequantizeLinear":
            if through_pair(maker) is None:
                continue  # a weight or a bias
        else:
            base = name[: -len(RENAMED)] if name.endswith(RENAMED) else name
            read = tuple(r for r in readers.get(name, []) if r not in pairs)
            # What is quantized at once may be what a Relu was absorbed into: it is seen behind its pair.
            if read or name not in quantized:
                found.append((Shown(base, readers=read), name))
        add_pairs(name)
    return found


def _float_tensors(model: Any, kinds: Any) -> Set[str]:
    """Return the names of the float tensors that operators make."""
    from portcall.exporters import _structure

    floats = (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16)
    inferred = [*_structure.tensor_types(model), *model.graph.input, *model.graph.output]
    return {v.name for v in inferred if v.type.tensor_type.elem_type in floats}


def _in_float32(model: Any, name: str) -> str:
    """Return a float32 version of a tensor, added where it is bfloat16, which NumPy does not know."""
    from onnx import TensorProto, helper

    casted = f"portcall_float32_{name}"
    if any(v.name == name for v in [*model.graph.input, *model.graph.output]):
        return name
    if not any(t.data_type == TensorProto.BFLOAT16 for t in model.graph.initializer):
        return name
    model.graph.node.append(helper.make_node("Cast", [name], [casted], casted, to=TensorProto.FLOAT))
    return casted


class OnnxTrace(Trace):
    """An ONNX file in ONNX Runtime with its graph optimizations off, so that no Q/DQ pair is fused away.

    names: of the artifact's inputs beside the source's. Each Q/DQ operator then runs as it stands, around products in
    float32: the arithmetic of the file, not that of the integer kernels of a deployed session.
    """

    def __init__(self, artifact: Artifact, path: Path, threads: int, what: str) -> None:
        import onnx
        import onnxruntime as ort

        model = onnx.load(str(path), load_external_data=False)
        planned = plan(model)
        planned = [(shown, _in_float32(model, name)) for shown, name in planned]
        known = {v.name for v in [*model.graph.output, *model.graph.input]}
        for name in dict.fromkeys(name for _, name in planned):
            if name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        self._given = {v.name for v in model.graph.input}
        self._bound = artifact.inputs
        self._names = [name for _, name in planned]
        self.tensors = tuple(shown for shown, _ in planned)
        self._session = open_session(ort, model, path, threads)
        self.how = f"{what}, onnxruntime {ort.__version__} without graph optimizations"

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        import numpy as np

        feeds = {t.name: to_runtime(t, arrays[t.source]) for t in self._bound}
        asked = [n for n in dict.fromkeys(self._names) if n not in self._given]
        try:
            found = dict(zip(asked, self._session.run(asked, feeds)))
        except Exception as error:  # onnxruntime has kinds of its own
            raise CellFailed(
                f"the artifact does not run: {str(error).strip().splitlines()[0][:300]}",
                "The operator named there gets other shapes or types than in the source",
            ) from error
        found.update(feeds)
        return [np.asarray(found[name], np.float32) for name in self._names]


def open_session(ort: Any, model: Any, path: Path, threads: int) -> Any:
    """Return a session of an edited *model* that was loaded from *path*, without graph optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
