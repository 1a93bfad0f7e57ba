"""Quantization of a float flatbuffer by ai-edge-quantizer, with our ranges instead of its moving averages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from portcall.targets.agent.contract import Ranges
from portcall.targets.agent.errors import CellFailed, UnsupportedError

if TYPE_CHECKING:
    from portcall.calibration.weights import Scheme

STATIC: Mapping[str, int] = {"int8": 8, "int16x8": 16}
"""Precisions with calibrated activations -> their bits."""
PRODUCTS = (
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "TRANSPOSE_CONV",
    "FULLY_CONNECTED",
    "BATCH_MATMUL",
    "EMBEDDING_LOOKUP",
)
"""What is quantized to int8 in a transformer."""


def quantize(
    path: Path,
    precision: str,
    ranges: Optional[Ranges],
    options: Optional[Mapping[str, Any]] = None,
    hybrid: bool = True,
    trained: Optional[Mapping[str, Any]] = None,
) -> Tuple[bytes, Tuple[str, ...]]:
    """Return the float flatbuffer at *path* quantized, and notes; float inputs and outputs stay float.

    Static precisions take *ranges* as they are (int16x8: as symmetric as its kernels); others use them for bias
    correction alone. options: "weights" ("channel" or "tensor"), "bias_correction", "keep_float": see ``Recipe``.
    trained: of a quantized source (``_trained_tflite.load``): its scales, and *ranges* for what has none.
    hybrid: int8 may hold operators that quantize their activations at run time (TFLite-Micro has none).
    Raises CellFailed where *ranges* lacks a tensor, UnsupportedError for weights that LiteRT has no kernel for.
    """
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    from portcall.calibration.weights import scheme_of
    from portcall.exporters import _qdq, _selection, _tflite, _tflite_correction, _trained_tflite

    options = options or {}
    scheme = scheme_of(options)
    if trained is not None:
        ranges = _trained_tflite.ranges(trained, ranges)
    flatbuffer = path.read_bytes()
    model = _tflite._read(flatbuffer)
    operators = [(_tflite.operator_name(model, op), kind) for op, kind in _tflite.operators(model)]
    if precision != "fp16":
        _check_weights(precision, scheme, operators)
    kept = _selection.select(operators, options.get("keep_float", ()))
    notes = _qdq.kept_notes(kept)
    if precision in STATIC:
        assert ranges is not None
        beyond = _beyond_int8(model, ranges)
        notes += _qdq.float_notes(beyond)
        kept = [*kept, *beyond]
    dynamic: List[str] = []
    if precision == "int8":
        floats, dynamic = _transformer_plan(model, kept)
        kept = [*kept, *floats] if hybrid else [*kept, *floats, *dynamic]
        notes += _qdq.named(
            f"products with a sum in float after them {'quantize at run time' if hybrid else 'stay in float'}",
            dynamic,
        )
    if options.get("bias_correction") and precision != "fp16":
        notes += _tflite_correction.correct(model, ranges, scheme, kept)
        flatbuffer = _tflite._write(model)
    if precision == "int8-weights":
        _check_any_weight(model, kept)
    if precision == "fp16":
        _round_weights(model, kept)
        flatbuffer = _tflite._write(model)
    work = quantizer.Quantizer(bytearray(flatbuffer))
    _add_recipe(work, precision, scheme)
    everything = qtyping.TFLOperationName.ALL_SUPPORTED
    for op, kind in _tflite.operators(model):
        name = _tflite.operator_name(model, op)
        names = [model.subgraphs[0].tensors[i].name.decode() for i in op.outputs]
        scope = "".join(
            f"{output};" for output in names
        )  # how the quantizer writes the outputs of an operator
        scope = f"^{re.escape(scope)}$"
        if name in kept:
            work.update_quantization_recipe(scope, everything, algorithm_key=AlgorithmName.NO_QUANTIZE)
        elif name in dynamic:
            work.add_dynamic_config(scope, qtyping.TFLOperationName[kind], 8, _granularity(scheme))
    calibration = _weight_ranges(model, precision, scheme, ranges)
    if precision in STATIC:
        assert ranges is not None
        calibration.update(_activation_ranges(model, _tflite.tapped_tensors(path), ranges))
    if trained is not None:
        assert ranges is not None
        calibration.update(_trained_tflite.statistics(model, trained, ranges))
    result = work.quantize(calibration or None, enable_progress_bar=False, enable_progress_report=False)
    quantized = _tflite._read(bytes(result.quantized_model))
    _restore_signature(quantized, model)
    return _tflite._write(quantized), notes


def _restore_signature(quantized: Any, model: Any) -> None:
    """Let the signature name the inputs and outputs of the graph again.

    Where operators read an output as well, ai-edge-quantizer 0.10 dequantizes it for the graph's outputs and leaves the
    signature at the integers.
    """
    graph, before = quantized.subgraphs[0], model.subgraphs[0]
    now, then = quantized.signatureDefs[0], model.signatureDefs[0]
    for new, old, ends, were in (
        (now.inputs, then.inputs, graph.inputs, before.inputs),
        (now.outputs, then.outputs, graph.outputs, before.outputs),
    ):
        place = {int(index): position for position, index in enumerate(were)}
        index_of = {entry.name: int(ends[place[int(entry.tensorIndex)]]) for entry in old}
        for entry in new:
            entry.tensorIndex = index_of[entry.name]


def _check_weights(precision: str, scheme: Scheme, operators: Sequence[Tuple[str, str]]) -> None:
    """Raise UnsupportedError for weights that LiteRT's kernels do not take."""
    depthwise = [name for name, kind in operators if kind == "DEPTHWISE_CONV_2D"]
    if scheme.block:
        raise UnsupportedError(
            f"LiteRT has no kernel for {precision} with weights in groups of {scheme.block}",
            'Use "weights": "channel"; onnxruntime has groups in int8-weights and int4-weights',
        )
    if not scheme.symmetric:
        raise UnsupportedError(
            "LiteRT's kernels take symmetric weights only", 'Leave out "weight_symmetric": false'
        )
    if precision == "int8-dynamic" and not scheme.per_channel and depthwise:
        # LiteRT 2.3 runs such a file, but reads scales past the one there is: 1 dB instead of 43 dB.
        raise UnsupportedError(
            f"LiteRT's dynamic depthwise kernel needs a scale per channel: {len(depthwise)} operators, "
            f"first {depthwise[0]!r}",
            'Use "weights": "channel"',
        )


def _check_any_weight(model: Any, kept: Sequence[str]) -> None:
    """Raise UnsupportedError where no weight becomes int8: nothing else would tell that from a float file."""
    from portcall.exporters import _tflite

    named = {
        _tflite.operator_name(model, op): _tflite.weight_of(model, op, k)
        for op, k in _tflite.operators(model)
    }
    if all(weight is None or name in kept for name, weight in named.items()):
        raise UnsupportedError(
            "int8-weights: this model has no convolution or product with a constant weight left to quantize",
            "Use fp32 or fp16",
        )


def _round_weights(model: Any, kept: Sequence[str]) -> None:
    """Round the weights of products to float16 so that the sums of their channels stay: see ``_half_weights``."""
    import numpy as np

    from portcall.exporters import _half_weights, _tflite

    done = set()
    for op, kind in _tflite.operators(model):
        weight = _tflite.weight_of(model, op, kind)
        if weight is None or _tflite.operator_name(model, op) in kept:
            continue
        buffer = model.subgraphs[0].tensors[op.inputs[1]].buffer
        if buffer not in done and np.abs(weight).max(initial=0) < _half_weights.LARGEST:
            _tflite.set_constant(
                model, buffer, _half_weights.rounded(weight, "fp16", _tflite.CHANNEL_AXES[kind])
            )
            done.add(buffer)


def _add_recipe(work: Any, precision: str, scheme: Scheme) -> None:
    """Tell the quantizer what to do with all operators."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    names, granularity = qtyping.TFLOperationName, _granularity(scheme)
    if precision == "fp16":
        weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=weights,
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        )
        work.update_quantization_recipe(".*", names.ALL_SUPPORTED, config, AlgorithmName.FLOAT_CASTING)
    elif precision == "int8-dynamic":
        work.add_dynamic_config(".*", names.ALL_SUPPORTED, 8, granularity)
    elif precision in STATIC:
        work.add_static_config(".*", names.ALL_SUPPORTED, STATIC[precision], 8, granularity)
        for end in (names.INPUT, names.OUTPUT):
            work.update_quantization_recipe(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
    else:
        work.add_weight_only_config(".*", names.ALL_SUPPORTED, 8, granularity)


def _granularity(scheme: Scheme) -> Any:
    from ai_edge_quantizer import qtyping

    sizes = qtyping.QuantGranularity
    return sizes.CHANNELWISE if scheme.per_channel else sizes.TENSORWISE


def _activation_ranges(model: Any, tapped: Mapping[int, str], ranges: Ranges) -> Dict[str, Any]:
    """Return the quantizer's statistics of the activations: float64, so that a scale is rounded once."""
    import numpy as np

    found = {}
    for index, name in tapped.items():
        if name not in ranges:
            raise CellFailed(f"the calibration table lacks tensor {name!r}", "Calibrate again: --for tflite")
        shape = (1,) * len(model.subgraphs[0].tensors[index].shape)
        low, high = np.float32(ranges[name].minimum), np.float32(ranges[name].maximum)
        found[name] = {"min": np.full(shape, low, np.float64), "max": np.full(shape, high, np.float64)}
    return found


def _weight_ranges(model: Any, precision: str, scheme: Scheme, ranges: Optional[Ranges]) -> Dict[str, Any]:
    """Return statistics of the weights for which the quantizer's own scale, max|w| / 127, goes wrong.

    Of all-zero channels it makes 1e-9 / 127, and then cuts their bias off at 2**31 steps (of int64 as well); here their
    scale is 1. The same happens to channels that are nearly zero: as in ONNX Runtime their scale grows until the bias
    fits int32.
    """
    import numpy as np

    from portcall.exporters import _tflite

    tensors = model.subgraphs[0].tensors
    found: Dict[str, Any] = {}
    for op, kind in _tflite.operators(model):
        weight = _tflite.weight_of(model, op, kind)
        if weight is None:
            continue
        axis = _tflite.CHANNEL_AXES[kind]
        others = tuple(a for a in range(weight.ndim) if a != axis) if scheme.per_channel else None
        largest = np.abs(weight).max(others, keepdims=True)
        wanted = np.where(largest == 0, np.float32(127), largest)
        bias = _tflite.constant(model, int(op.inputs[2])) if len(op.inputs) > 2 else None
        given = ranges.get(tensors[op.inputs[0]].name.decode()) if ranges is not None else None
        if precision in STATIC and bias is not None and given is not None:
            low, high = min(given.minimum, 0.0), max(given.maximum, 0.0)
            input_scale = (high - low) / 255 if precision == "int8" else max(-low, high) / 32767
            least = 2 * 127 * np.abs(bias) / (max(input_scale, 1e-9) * 2**31)
            shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
            wanted = np.maximum(wanted, least.reshape(shape) if scheme.per_channel else least.max())
        if (wanted != largest).any():
            wanted = wanted.astype(np.float32)
            found[tensors[op.inputs[1]].name.decode()] = {"min": -wanted, "max": wanted}
    return found


def _transformer_plan(model: Any, kept: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return the operators of a transformer to leave in float, and those to quantize at run time; else two empty lists.

    In float: all but products, and what moves elements from one product to the next. At run time: embedding tables, and
    products with constant weights whose output only operators in float read. Why: see ``_qdq.quantized_ops``; what is
    summed up in float has a few channels that are a hundred times as large as the others, and a product that feeds such
    a sum has them in its output (MiniLM: 0.4 dB with everything quantized, 6 dB with all products, 17 dB so).
    """
    from portcall.exporters import _tflite
    from portcall.exporters._tflite_transpose import MOVING

    operators = _tflite.operators(model)
    if not _is_transformer(operators):
        return [], []
    outputs = {int(i) for i in model.subgraphs[0].outputs}
    makers = {int(op.outputs[0]): (op, kind) for op, kind in operators}
    readers: Dict[int, List[Tuple[Any, str]]] = {}
    for op, kind in operators:
        for index in {int(i) for i in op.inputs}:
            readers.setdefault(index, []).append((op, kind))

    def comes_from_product(op: Any) -> bool:
        maker, kind = makers.get(int(op.inputs[0]), (None, ""))
        return kind in PRODUCTS or (kind in MOVING and comes_from_product(maker))

    def goes_to_products(op: Any) -> bool:
        result = int(op.outputs[0])
        return result not in outputs and all(
            kind in PRODUCTS or (kind in MOVING and goes_to_products(reader))
            for reader, kind in readers.get(result, [])
        )

    floats = [
        _tflite.operator_name(model, op)
        for op, kind in operators
        if kind not in PRODUCTS and not (kind in MOVING and comes_from_product(op) and goes_to_products(op))
    ]
    left = {*floats, *kept}
    dynamic = [
        _tflite.operator_name(model, op)
        for op, kind in operators
        if kind == "EMBEDDING_LOOKUP" or _tflite.weight_of(model, op, kind) is not None
        if all(
            _tflite.operator_name(model, reader) in left for reader, _ in readers.get(int(op.outputs[0]), [])
        )
    ]
    return floats, [name for name in dynamic if name not in left]


def _is_transformer(operators: Sequence[Tuple[Any, str]]) -> bool:
    """Tell whether a product computes on what was normalized over activations; an embedding of length 1 is the end."""
    normalized: Set[int] = set()
    for op, kind in operators:  # each follows what it reads
        if kind == "RSQRT" or normalized.intersection(map(int, op.inputs)):
            if kind in PRODUCTS:
                return True
            normalized.update(map(int, op.outputs))
    return False


def _beyond_int8(model: Any, ranges: Ranges) -> List[str]:
    """Return the names of the operators to leave in float because of their values."""
    from portcall.exporters import _tflite

    tensors = model.subgraphs[0].tensors
    beyond = {name for name, r in ranges.items() if r.is_beyond_int8()}
    return [
        _tflite.operator_name(model, op)
        for op, _ in _tflite.operators(model)
        if beyond.intersection(tensors[i].name.decode() for i in (*op.inputs, *op.outputs) if i >= 0)
    ]
