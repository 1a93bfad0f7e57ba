"""A pass for coremltools: zero padding in front of a convolution becomes the convolution's own.

torch pads alike on both sides only, so that "same" with a stride comes as two operators. Between a dequantize and
its convolution a pad keeps Core ML from computing on integers.
"""

from __future__ import annotations

from typing import Any, List, Optional

NAME = "portcall::fuse_pad"


RESCALING = "common::distributive_quantized_binary_op_scale_normalization"
"""Divides the scales around an addition by one of them: the same sums, by other scales than were trained."""


def pipeline(keep_scales: bool = False) -> Any:
    """Return coremltools' default passes with this one in front; keep_scales: without the one that changes scales."""
    from portcall.exporters._coreml_tools import coremltools

    ct = coremltools()
    _register()
    passes = ct.PassPipeline()
    passes.insert_pass(0, NAME)
    if keep_scales:
        passes.remove_passes([RESCALING])
    return passes


def _register() -> None:
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.helper import block_context_manager
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if NAME in PASS_REGISTRY:
        return

    @register_pass(namespace="portcall")
    class fuse_pad(AbstractGraphPass):  # type: ignore[misc]  # coremltools ships no types
        """The class's name is the pass's."""

        def apply(self, program: Any) -> None:
            for function in program.functions.values():
                block_context_manager(_fuse)(function)


def _fuse(block: Any) -> None:
    from coremltools.converters.mil.mil import Builder as mb

    for operation in list(block.operations):
        total = _total_padding(operation)
        if total is None:
            continue
        pad = operation.x.op
        kept = {
            k: v for k, v in operation.inputs.items() if v is not None and k not in ("x", "pad", "pad_type")
        }
        made = mb.conv(
            x=pad.x, pad_type="custom", pad=total, before_op=operation, name=operation.name, **kept
        )
        block.replace_uses_of_var_after_op(anchor_op=operation, old_var=operation.outputs[0], new_var=made)
        block.remove_ops([operation])
        if not pad.outputs[0].child_ops and pad.outputs[0] not in block.outputs:
            block.remove_ops([pad])


def _total_padding(operation: Any) -> Optional[List[int]]:
    """Return the padding of a convolution together with that in front of it; None where nothing is to be joined."""
    if operation.op_type != "conv" or operation.x.op is None or operation.x.op.op_type != "pad":
        return None
    pad = operation.x.op
    constant = 0.0 if pad.constant_val is None else float(pad.constant_val.val)
    if pad.mode.val != "constant" or constant or pad.pad.val is None:
        return None
    count = 2 * (operation.x.rank - 2)
    before = [int(p) for p in pad.pad.val]
    before = [0] * (count - len(before)) + before
    if any(before[:-count]) or min(before) < 0 or operation.pad_type.val not in ("custom", "valid"):
        return None
    own = [0] * count if operation.pad_type.val == "valid" else [int(p) for p in operation.pad.val]
    return [a + b for a, b in zip(own, before[-count:])]
