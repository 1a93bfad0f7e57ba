"""Intermediate tensors of a flatbuffer: every activation, dequantized where it is integers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from portcall.targets.agent.binding import to_runtime
from portcall.targets.agent.contract import Artifact, Shown, Trace, Workload
from portcall.targets.agent.errors import CellFailed

MADE_BY_QUANTIZER = ("_quantized", "_dequant")
"""Of the names of tensors that ai-edge-quantizer 0.10 adds between floats and integers."""


class TfliteTrace(Trace):
    """A flatbuffer in LiteRT with its own kernels: XNNPACK, the default of a deployed run, shows no tensors."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        from ai_edge_litert.schema_py_generated import TensorType

        from portcall.exporters import _floats_tflite, _tflite

        model = _tflite._read(artifact.path.read_bytes())
        body = model.subgraphs[0]
        operators = _tflite.operators(model)
        base = _base_names(model, operators)
        self._bound = {t.name: t for t in artifact.inputs}
        self._inputs = {e.name.decode(): int(e.tensorIndex) for e in model.signatureDefs[0].inputs}
        integers = {
            TensorType.INT8: (-128, 127),
            TensorType.UINT8: (0, 255),
            TensorType.INT16: (-32768, 32767),
        }
        # An input or output in another order of axes has no tensor of the same shape in the float graph.
        ends = [*model.signatureDefs[0].inputs, *model.signatureDefs[0].outputs]
        bound = {t.name: t for t in [*artifact.inputs, *artifact.outputs]}
        moved = {
            int(e.tensorIndex)
            for e in ends
            if e.name.decode() in bound and bound[e.name.decode()].permutation is not None
        }
        shown: List[Tuple[Shown, int]] = []
        for index in dict.fromkeys(
            [*map(int, body.inputs), *(int(o) for op, _ in operators for o in op.outputs)]
        ):
            if index in moved:
                continue
            tensor = body.tensors[index]
            readers = tuple(
                base.get(int(op.outputs[0]), _tflite.operator_name(model, op))
                for op, kind in operators
                if index in [int(i) for i in op.inputs] and kind not in ("QUANTIZE", "DEQUANTIZE")
            )
            name = base.get(index, tensor.name.decode())
            if tensor.type == TensorType.FLOAT32:
                made = next((k for op, k in operators if index in [int(o) for o in op.outputs]), "")
                if made != "DEQUANTIZE":
                    shown.append((Shown(name, readers=readers), index))
            elif tensor.type in integers and tensor.quantization is not None:
                scales = tensor.quantization.scale
                if scales is None or len(scales) != 1:
                    continue
                zero = int(tensor.quantization.zeroPoint[0])
                through = tuple(
                    base.get(int(op.outputs[0]), "")
                    for other, kind in operators
                    if kind == "DEQUANTIZE" and int(other.inputs[0]) == index
                    for op, _ in operators
                    if int(other.outputs[0]) in [int(i) for i in op.inputs]
                )
                one = Shown(name, float(scales[0]), zero, integers[tensor.type], (*readers, *through))
                shown.append((one, index))
        self._indices = [index for _, index in shown]
        self.tensors = tuple(one for one, _ in shown)
        try:
            self._interpreter = _floats_tflite._open(model, threads)
        except (RuntimeError, ValueError) as error:
            raise _refused(error) from error
        self.how = "LiteRT's own kernels without XNNPACK"

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        import numpy as np

        for name, index in self._inputs.items():
            bound = self._bound[name]
            self._interpreter.set_tensor(index, to_runtime(bound, arrays[bound.source]))
        try:
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise _refused(error) from error
        found = []
        for shown, index in zip(self.tensors, self._indices):
            value = np.array(self._interpreter.get_tensor(index))
            if shown.scale is not None:
                value = (value.astype(np.float64) - shown.zero_point) * shown.scale
            found.append(value.astype(np.float32))
        return found


def _refused(error: Exception) -> CellFailed:
    return CellFailed(
        f"LiteRT refuses the artifact: {(str(error).strip().splitlines() or ['?'])[0][:300]}",
        "The operator named there gets other shapes or types than in the source",
    )


def _base_names(model: Any, operators: Sequence[Tuple[Any, str]]) -> Dict[int, str]:
    """Return tensor -> the name that its tensor has in the float graph, through QUANTIZE, DEQUANTIZE."""
    tensors = model.subgraphs[0].tensors
    names: Dict[int, str] = {}
    for op, kind in operators:
        for index in map(int, op.outputs):
            names[index] = tensors[index].name.decode()
        if kind in ("QUANTIZE", "DEQUANTIZE"):
            source, result = int(op.inputs[0]), int(op.outputs[0])
            names[result] = names.get(source, tensors[source].name.decode())
    return names


@contextmanager
def trace(artifact: Artifact, workload: Workload) -> Iterator[Trace]:
    yield TfliteTrace(artifact, workload.threads)
