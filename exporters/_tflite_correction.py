"""Bias correction of a float flatbuffer: see ``_correction`` for the method and its source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Ranges

if TYPE_CHECKING:
    from portcall.calibration.weights import Scheme


def correct(model: Any, ranges: Optional[Ranges], scheme: Scheme, kept: Sequence[str]) -> Tuple[str, ...]:
    """Correct the biases of CONV_2D, DEPTHWISE_CONV_2D and FULLY_CONNECTED for int8 weights, in place; return notes.

    kept: names of operators that stay in float. An operator without a bias gets one; without *ranges* nothing is done.
    """
    from portcall.calibration.weights import quantize
    from portcall.exporters import _correction, _tflite

    if ranges is None:
        return ()
    tensors = model.subgraphs[0].tensors
    corrected: List[str] = []
    skipped: List[str] = []
    for op, kind in _tflite.operators(model):
        weight, name = _tflite.weight_of(model, op, kind), _tflite.operator_name(model, op)
        if weight is None or name in kept:
            continue
        axis = _tflite.CHANNEL_AXES[kind] if scheme.per_channel else None
        error = quantize(weight, 8, True, axis).dequantize().astype("float64") - weight
        mean = _correction.channel_mean(ranges, tensors[op.inputs[0]].name.decode())
        shift = None if mean is None else _shift(error, mean, kind)
        if shift is not None and _subtract(model, op, shift):
            corrected.append(name)
        else:
            skipped.append(name)
    return _correction.notes(corrected, skipped)


def _shift(error: Any, mean: Any, kind: str) -> Optional[Any]:
    """Return the mean shift of every output channel, float64[outputs], or None where the shapes do not allow it.

    error: Q(W) - W, of the weight's shape. mean: float64[input channels].
    """
    from portcall.exporters import _correction

    if kind == "FULLY_CONNECTED":
        return error @ mean if error.shape[1] == len(mean) else None
    if kind == "DEPTHWISE_CONV_2D":  # [1, *kernel, inputs * multiplier]
        return _correction.convolution_shift(error.transpose(3, 0, 1, 2), mean, len(mean))
    groups = len(mean) // error.shape[3]
    return _correction.convolution_shift(error.transpose(0, 3, 1, 2), mean, groups)


def _subtract(model: Any, op: Any, shift: Any) -> bool:
    """Subtract *shift* from the bias of *op*; one that others use as well, or that is missing, becomes new.

    Return False where the bias is no constant.
    """
    import copy

    from portcall.exporters import _tflite

    graph = model.subgraphs[0]
    index = int(op.inputs[2]) if len(op.inputs) > 2 else -1
    old = _tflite.constant(model, index)
    if index >= 0 and old is None:
        return False
    values = -shift if old is None else old - shift
    if index >= 0:
        users = sum(list(other.inputs).count(index) for other in graph.operators)
        holders = sum(t.buffer == graph.tensors[index].buffer for g in model.subgraphs for t in g.tensors)
        if users == holders == 1:
            _tflite.set_constant(model, graph.tensors[index].buffer, values)
            return True
    tensor = copy.copy(graph.tensors[op.inputs[1] if index < 0 else index])
    tensor.name = graph.tensors[op.outputs[0]].name + b"_corrected_bias"
    tensor.shape, tensor.shapeSignature = [len(shift)], None
    tensor.buffer = _tflite.new_buffer(model)
    _tflite.set_constant(model, tensor.buffer, values)
    graph.tensors.append(tensor)
    op.inputs = [*(int(i) for i in op.inputs[:2]), len(graph.tensors) - 1]
    return True
