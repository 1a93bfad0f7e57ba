"""Bias correction: quantized weights shift the mean of every output channel; the bias takes that back.

bias -= sum over inputs and kernel of (Q(W) - W) * E[x], with E[x] as measured per channel by calibration.
Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2.
Padding is taken for ordinary values: at the border of an image the shift is smaller than what is subtracted.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from portcall.targets.agent.contract import Ranges

Rebuild = Callable[[Any, Any], Optional[Any]]
"""(node, its float weight) -> the weight that its integers stand for, or None where it stays in float."""


def correct(
    model: Any, ranges: Optional[Ranges], axes: Mapping[str, int], rebuild: Rebuild
) -> Tuple[str, ...]:
    """Correct the biases of Conv, Gemm and MatMul with constant weights in an ONNX *model*, in place; return notes.

    axes: tensor -> the axis that its channel means run along (``_qdq.weighted_inputs``). A Conv or Gemm without a bias
    gets one; a MatMul is corrected in the Add of a constant that follows it. What cannot be is named in a note. Without
    *ranges* (a precision that is not calibrated) nothing is done.
    """
    from onnx import numpy_helper

    from portcall.exporters._operands import weighted_nodes

    if ranges is None:
        return ()
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    readers: Dict[str, List[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {v.name for v in graph.output}
    corrected: List[str] = []
    skipped: List[str] = []
    for node, initializer in weighted_nodes(graph):
        weight = numpy_helper.to_array(initializer)
        quantized = None if node.op_type == "ConvTranspose" else rebuild(node, weight)
        if quantized is None:
            continue
        mean = channel_mean(ranges, node.input[0])
        wanted = 1 if node.op_type == "Conv" else -1
        shift = None
        if mean is not None and axes.get(node.input[0]) == wanted:
            shift = _shift(node, quantized.astype("float64") - weight, mean)
        place = None if shift is None else _bias_place(node, weights, readers, outputs)
        if shift is None or place is None:
            skipped.append(node.name)
            continue
        _subtract(graph, weights, readers, node, place, shift)
        corrected.append(node.name)
    return notes(corrected, skipped)


def notes(corrected: List[str], skipped: List[str]) -> Tuple[str, ...]:
    """Return what to tell about a correction: how many layers, and which were left alone."""
    found = (f"bias corrected in {len(corrected)} layers",)
    if not skipped:
        return found
    shown = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
    return (*found, f"bias not corrected, no channel means or no constant bias there: {shown}")


def channel_mean(ranges: Ranges, name: str) -> Optional[Any]:
    """Return E[x] per channel of tensor *name*, float64[channels], or None where it was not measured."""
    import numpy as np

    found = ranges.get(name)
    if found is None or found.channel_mean is None:
        return None
    return np.asarray(found.channel_mean, np.float64)


def _shift(node: Any, error: Any, mean: Any) -> Optional[Any]:
    """Return the mean shift of every output channel, float64[outputs], or None where the shapes do not allow it.

    error: Q(W) - W, of the weight's shape. mean: float64[input channels].
    """
    from portcall.exporters._operands import attribute

    if node.op_type == "Conv":
        return convolution_shift(error, mean, attribute(node, "group", 1))
    if error.ndim != 2 or attribute(node, "transA", 0):
        return None
    if attribute(node, "transB", 0):
        error = error.T
    if len(mean) != len(error):
        return None
    return attribute(node, "alpha", 1.0) * (mean @ error)


def convolution_shift(error: Any, mean: Any, groups: int) -> Optional[Any]:
    """Return the mean shift of a convolution, float64[outputs]; error: [outputs, inputs / groups, *kernel]."""
    outputs, per_group = error.shape[:2]
    if len(mean) != per_group * groups:
        return None
    summed = error.reshape(groups, outputs // groups, per_group, -1).sum(axis=3)
    return (summed @ mean.reshape(groups, per_group, 1)).reshape(outputs)


def _bias_place(
    node: Any, weights: Mapping[str, Any], readers: Mapping[str, List[Any]], outputs: Any
) -> Optional[Tuple[Any, int]]:
    """Return the node and the input that hold the bias, or None where no constant can."""
    from portcall.exporters._operands import attribute

    if node.op_type != "MatMul":
        constant = len(node.input) < 3 or not node.input[2] or node.input[2] in weights
        return (node, 2) if constant and attribute(node, "beta", 1.0) else None
    following = readers.get(node.output[0], [])
    if len(following) != 1 or following[0].op_type != "Add" or node.output[0] in outputs:
        return None
    add = following[0]
    side = 1 if add.input[0] == node.output[0] else 0
    added = weights.get(add.input[side])
    return None if added is None or any(d != 1 for d in added.dims[:-1]) else (add, side)


def _subtract(
    graph: Any,
    weights: Dict[str, Any],
    readers: Mapping[str, List[Any]],
    node: Any,
    place: Tuple[Any, int],
    shift: Any,
) -> None:
    """Subtract *shift* from the bias at *place*; a bias that others read as well, or that is missing, becomes new."""
    import numpy as np
    from onnx import numpy_helper

    from portcall.exporters._operands import attribute

    holder, side = place
    name = holder.input[side] if side < len(holder.input) else ""
    old = np.zeros(shift.shape, np.float32) if not name else numpy_helper.to_array(weights[name])
    beta = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    values = (old - shift / beta).astype(old.dtype)
    if name and len(readers[name]) == 1:
        weights[name].CopyFrom(numpy_helper.from_array(values, name))
        return
    new = f"{node.output[0]}_corrected_bias"
    added = graph.initializer.add()
    added.CopyFrom(numpy_helper.from_array(values, new))
    weights[new] = added
    while len(holder.input) <= side:
        holder.input.append("")
    holder.input[side] = new
