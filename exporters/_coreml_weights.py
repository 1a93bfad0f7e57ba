"""Core ML weights in fewer bits: which constants of a program, by which scheme, through coremltools' own encoders."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from portcall.targets.agent.errors import BadInput, UnsupportedError

if TYPE_CHECKING:
    from portcall.calibration.weights import Scheme

BITS: Mapping[str, int] = {"int8-weights": 8, "int4-weights": 4, "palette4": 4, "palette6": 6}
NEEDS: Mapping[str, str] = {
    "fp32": "iOS15",
    "fp16": "iOS15",
    "int8": "iOS17",
    "int8-weights": "iOS16",
    "int4-weights": "iOS18",
    "palette4": "iOS16",
    "palette6": "iOS16",
}
"""Precision -> the oldest system that reads it. Source: coremltools 9.0, the opsets of its constexpr operators."""
WEIGHTED = ("conv", "conv_transpose", "linear", "matmul", "gather")
PARAMETERS = ("weight", "x", "y")
PRUNED_SHARE = 0.001
"""A weight with this share of exact zeros was pruned: its table gets an entry that is 0."""
LLOYD_STEPS = 10
PREFIX = "b_onnx_weights_"
"""Begins the name of a constant that was an initializer of the ONNX graph."""


class Weight(NamedTuple):
    """A constant that weighs: its name in the program, its shape, and its operator's type and parameter."""

    name: str
    shape: Tuple[int, ...]
    kind: str
    parameter: str
    node: str = ""
    """The ONNX node that reads it."""
    zero_share: float = 0.0
    """Of its elements: those that are exactly 0."""

    @property
    def reduced_axis(self) -> int:
        """The axis that is summed over: the input channels."""
        if self.kind == "conv_transpose" or (self.kind == "matmul" and self.parameter == "y"):
            return len(self.shape) - 2 if self.kind == "matmul" else 0
        return 1 if self.kind == "conv" else len(self.shape) - 1

    @property
    def channel_axis(self) -> int:
        """The axis of the output channels (of an embedding: its rows)."""
        if self.kind == "conv_transpose":
            return 1
        return len(self.shape) - 1 if self.kind == "matmul" and self.parameter == "y" else 0


def needed(precision: str, options: Mapping[str, Any]) -> str:
    """Return the oldest system for a precision with its options: groups and palettes per channel came with iOS18."""
    grouped = str(options.get("weights", "")).startswith("group") and precision == "int8-weights"
    return "iOS18" if grouped or options.get("palette_group") else NEEDS[precision]


def weights_of(model: Any) -> List[Weight]:
    """Return the constants of *model* with at least two axes that convolutions, products and gathers read."""
    import numpy as np

    from portcall.exporters._coreml_tools import coremltools, quiet

    with quiet():
        metadata = coremltools().optimize.coreml.get_weights_metadata(model, weight_threshold=1)
    found: List[Weight] = []
    for name, entry in metadata.items():
        for child in entry.child_ops:
            parameter = next((p for p, c in child.params_name_mapping.items() if c == name), "")
            if child.op_type in WEIGHTED and parameter in PARAMETERS and entry.val.ndim > 1:
                shape = tuple(int(d) for d in entry.val.shape)
                zero_share = 1 - np.count_nonzero(entry.val) / entry.val.size
                found.append(Weight(name, shape, child.op_type, parameter, zero_share=zero_share))
                break
    return found


def compress(
    model: Any, precision: str, options: Mapping[str, Any], nodes: Mapping[str, str], kept: Sequence[str]
) -> Tuple[Any, Tuple[str, ...]]:
    """Return *model* with its weights in fewer bits, and notes on those that are stored in another way.

    int8-weights, int4-weights: linear, symmetric unless the recipe says otherwise, a scale per channel, or per block of
    32 inputs for 4 bits; a weight whose inputs are no multiple of the block takes 8 bits per channel. palette4,
    palette6: a table of 16 or 64 values by k-means, for the whole tensor or for every "palette_group" channels; 0 is
    in that of a pruned weight.
    nodes: name of a weight (see ``plain_name``) -> the ONNX node that reads it. kept: nodes that stay as they are.
    Raises UnsupportedError where there is no weight to compress.
    """
    weights = [w._replace(node=nodes.get(plain_name(w.name), plain_name(w.name))) for w in weights_of(model)]
    chosen = [w for w in weights if w.node not in kept]
    if not chosen:
        raise UnsupportedError(
            f"{precision}: this model has no convolution or product with a constant weight left to compress",
            "Use fp32 or fp16",
        )
    if precision.startswith("palette"):
        return _palettize(model, chosen, BITS[precision], int(options.get("palette_group", 0) or 0))
    from portcall.calibration.weights import scheme_of

    scheme = scheme_of(options, "channel" if precision == "int8-weights" else "group32")
    return _linear(model, chosen, BITS[precision], scheme)


def _linear(model: Any, weights: Sequence[Weight], bits: int, scheme: Scheme) -> Tuple[Any, Tuple[str, ...]]:
    from portcall.exporters import _qdq
    from portcall.exporters._coreml_tools import coremltools, quiet

    cto = coremltools().optimize.coreml
    mode = "linear_symmetric" if scheme.symmetric else "linear"

    def config(weight: Weight, in_blocks: bool) -> Any:
        block = [0] * len(weight.shape)
        block[weight.channel_axis], block[weight.reduced_axis] = 1, scheme.block
        return cto.OpLinearQuantizerConfig(
            mode=mode,
            dtype="int4" if bits == 4 and (in_blocks or not scheme.block) else "int8",
            granularity="per_block" if in_blocks else "per_channel" if per_channel else "per_tensor",
            block_size=block if in_blocks else 32,
            weight_threshold=0,
        )

    per_channel = scheme.per_channel or bool(scheme.block)
    fits = {w.name: bool(scheme.block) and w.shape[w.reduced_axis] % scheme.block == 0 for w in weights}
    by_name = {w.name: config(w, fits[w.name]) for w in weights}
    with quiet():
        made = cto.linear_quantize_weights(
            model, cto.OptimizationConfig(global_config=None, op_name_configs=by_name)
        )
    others = [w.node for w in weights if scheme.block and not fits[w.name]]
    return made, _qdq.named(f"int8 weights per channel, the inputs are no multiple of {scheme.block}", others)


def _palettize(model: Any, weights: Sequence[Weight], bits: int, group: int) -> Tuple[Any, Tuple[str, ...]]:
    from portcall.exporters import _qdq
    from portcall.exporters._coreml_tools import coremltools, quiet

    if group < 0:
        raise BadInput(f"palette_group is {group}", "Give the number of channels that share a table, or 0")
    cto = coremltools().optimize.coreml
    import math

    small = [
        w for w in weights if math.prod(w.shape) <= 2 ** (bits + 1)
    ]  # its table would be as large as it is
    by_name: Dict[str, Any] = {}
    uneven: List[Weight] = []
    for weight in weights:
        if weight in small:
            continue
        grouped = bool(group) and weight.shape[weight.channel_axis] % group == 0
        if group and not grouped:
            uneven.append(weight)
        pruned = weight.zero_share >= PRUNED_SHARE
        by_name[weight.name] = cto.OpPalettizerConfig(
            mode="custom" if pruned else "kmeans",
            nbits=None if pruned else bits,
            lut_function=partial(table_with_zero, bits=bits) if pruned else None,
            granularity="per_grouped_channel" if grouped else "per_tensor",
            group_size=group or 32,
            channel_axis=weight.channel_axis if grouped else None,
            weight_threshold=0,
        )
    if not by_name:
        raise UnsupportedError(
            f"no weight of this model has more than {2 ** (bits + 1)} elements: palettes would not pay",
            "Use int8-weights or fp16",
        )
    with quiet():
        made = cto.palettize_weights(
            model, cto.OptimizationConfig(global_config=None, op_name_configs=by_name)
        )
    notes = _qdq.named(f"left in float16, too small for a table of {2**bits} values", [w.node for w in small])
    return made, notes + _qdq.named(
        f"one table for the whole tensor, its channels are no multiple of {group}",
        [w.node for w in uneven],
    )


def table_with_zero(values: Any, bits: int) -> Tuple[Any, Any]:
    """Return a table of 2**bits values by k-means, 0 among them where *values* hold exact zeros, and uint8 indices.

    coremltools' table, its entry nearest to 0 set to 0 and held there while Lloyd's iteration moves the others: the
    exact zeros of a pruned layer stay, whatever small weights shared their entry.
    """
    import numpy as np
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    from portcall.exporters._coreml_tools import quiet

    with quiet():
        table, indices = palettize_weights._get_lut_and_indices(values, "KMEANS", bits, None)
    if np.all(values != 0):
        return table, indices
    flat = values.reshape(-1).astype(np.float64)
    entries = table.reshape(-1).astype(np.float64)
    held = int(np.argmin(np.abs(entries)))
    entries[held] = 0.0
    for _ in range(LLOYD_STEPS):
        order = np.argsort(entries, kind="stable")
        borders = (entries[order][1:] + entries[order][:-1]) / 2
        nearest = order[np.searchsorted(borders, flat)]
        nearest[flat == 0] = held
        counts = np.bincount(nearest, minlength=entries.size)
        sums = np.bincount(nearest, flat, entries.size)
        entries = np.where(counts > 0, sums / np.maximum(counts, 1), entries)
        entries[held] = 0.0
    return entries.astype(values.dtype), nearest.astype(np.uint8)


def plain_name(constant: str) -> str:
    """Return the name of a constant without what the conversion put around it: see ``nodes_by_weight``."""
    name = constant[len(PREFIX) :] if constant.startswith(PREFIX) else constant
    for suffix in ("_quantized", "_palettized"):
        name = name[: -len(suffix)] if name.endswith(suffix) else name
    return name[: -len("_to_fp16")] if name.endswith("_to_fp16") else name


def nodes_by_weight(path: Path) -> Dict[str, str]:
    """Return what ``plain_name`` makes of each constant of an ONNX graph -> the first node that reads it.

    Core ML's constants have names in lower case; a MatMul's matrix is stored the other way round, as "NAME_t".
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    found: Dict[str, str] = {}
    for node in graph.node:
        for name in node.input:
            if name in constants:
                plain = re.sub(r"\W+", "_", name).strip("_").lower()
                found.setdefault(plain, node.name)
                found.setdefault(f"{plain}_t", node.name)
    return found
