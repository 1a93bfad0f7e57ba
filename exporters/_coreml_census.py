"""What arithmetic a Core ML package asks for, counted on a run of the MIL interpreter."""

from __future__ import annotations

import math
from typing import Any, List, Mapping, Sequence, Tuple

from portcall.targets.agent.contract import Artifact, Census

COMPUTE_OPS = ("conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention")
STORED = ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "dequantize")
"""What makes a weight of integers."""


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    """Count products whose operands both come out of a dequantize: the form that Core ML computes on integers."""
    import numpy as np

    from portcall.exporters import _coreml_options
    from portcall.exporters._coreml_session import feeds
    from portcall.exporters._mil import Program

    program = Program(artifact.path)
    images = _coreml_options.parse_images(str(artifact.options.get("image", "")))
    zeros = {t.source: np.zeros(shapes[t.source], t.dtype) for t in artifact.inputs}
    total = integer = quantize = 0
    floats: List[str] = []

    def watch(step: Any, inputs: Mapping[str, Any], outputs: Sequence[Any]) -> None:
        nonlocal total, integer, quantize
        quantize += step.kind in ("quantize", "dequantize")
        if step.kind not in COMPUTE_OPS:
            return
        macs = macs_of(step.kind, inputs, outputs[0])
        total += macs
        if _on_integers(step):
            integer += macs
        else:
            floats.append(step.outputs[0][0])

    program.run(feeds(artifact.inputs, [t.name for t in artifact.inputs], zeros, images), watch)
    return Census(quantize, total, integer, tuple(floats), "quantize and dequantize of the ML program")


def macs_of(kind: str, inputs: Mapping[str, Any], output: Any) -> int:
    """Return the multiply-accumulates of one operator of COMPUTE_OPS, given its arrays."""
    if kind == "conv":
        return int(output.size * math.prod(inputs["weight"].shape[1:]))
    if kind == "conv_transpose":
        return int(inputs["x"].size * math.prod(inputs["weight"].shape[1:]))
    if kind == "linear":
        return int(output.size * inputs["x"].shape[-1])
    if kind == "matmul":
        return int(output.size * inputs["x"].shape[-2 if inputs.get("transpose_x") else -1])
    if kind == "einsum":
        return int(output.size * inputs["values"][0].shape[-1])
    return int(inputs["query"].size * inputs["key"].shape[-2] + output.size * inputs["key"].shape[-2])


def _on_integers(step: Any) -> bool:
    """Tell whether both operands of a product are dequantized: activations by an operator, weights when loading."""
    if step.kind == "matmul":
        return step.made_from["x"] == "dequantize" and step.made_from["y"] in STORED
    return step.made_from.get("x") == "dequantize" and step.made_from.get("weight") in STORED
