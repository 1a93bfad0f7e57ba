"""Which operators stay in floating point: patterns of a recipe's ``keep_float`` against the nodes of a graph."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Dict, Iterable, List, Mapping, Sequence, Set, Tuple

from portcall.targets.agent.errors import BadInput

TFLITE_TYPES: Mapping[str, Sequence[str]] = {
    "conv": ("conv_2d", "depthwise_conv_2d", "conv_3d"),
    "convtranspose": ("transpose_conv",),
    "gemm": ("fully_connected",),
    "matmul": ("fully_connected", "batch_matmul"),
    "sigmoid": ("logistic",),
    "averagepool": ("average_pool_2d",),
    "maxpool": ("max_pool_2d",),
    "globalaveragepool": ("mean",),
    "reducemean": ("mean",),
    "reducesum": ("sum",),
    "concat": ("concatenation",),
    "clip": ("relu6",),
    "hardswish": ("hard_swish",),
    "leakyrelu": ("leaky_relu",),
    "resize": ("resize_bilinear", "resize_nearest_neighbor"),
}
"""ONNX operator type -> TFLite's, both in lower case, where they differ by more than case."""


def select(nodes: Sequence[Tuple[str, str]], patterns: Iterable[str]) -> List[str]:
    """Return the names of the nodes that any pattern matches, in the order of the graph.

    nodes: (name, operator type). A pattern is ``type:Softmax`` (an operator type of ONNX or of TFLite, in any case), a
    node's name, or a shell pattern over names (``*/attention/*``; ``[`` is literal in a pattern that is a name). Raises
    BadInput for a pattern that matches nothing: it names what comes near.
    """
    chosen: Set[str] = set()
    for pattern in patterns:
        found = _matches(nodes, pattern)
        if not found:
            raise BadInput(f"keep_float {pattern!r} matches no operator of this graph", _fix(nodes, pattern))
        chosen.update(found)
    return list(dict.fromkeys(name for name, _ in nodes if name in chosen))


def _matches(nodes: Sequence[Tuple[str, str]], pattern: str) -> List[str]:
    if pattern.startswith("type:"):
        wanted = pattern[len("type:") :]
        return [name for name, kind in nodes if _same_type(wanted, kind)]
    exact = [name for name, _ in nodes if name == pattern]
    return exact or [name for name, _ in nodes if fnmatch.fnmatchcase(name, pattern)]


def _same_type(wanted: str, kind: str) -> bool:
    a, b = wanted.lower(), kind.lower()
    return a == b or b in TFLITE_TYPES.get(a, ()) or a in TFLITE_TYPES.get(b, ())


def _fix(nodes: Sequence[Tuple[str, str]], pattern: str) -> str:
    if pattern.startswith("type:"):
        kinds = sorted({kind for _, kind in nodes})
        return f"This graph has the types: {', '.join(kinds)}"
    names = list(dict.fromkeys(name for name, _ in nodes))
    lower: Dict[str, str] = {name.lower(): name for name in names}
    bare = pattern.lower().strip("*")
    near = [lower[name] for name in difflib.get_close_matches(bare, list(lower), 3, 0.5)]
    near += [name for name in names if bare and bare in name.lower() and name not in near][: 3 - len(near)]
    if near:
        return f"Did you mean {' or '.join(repr(name) for name in near)}?"
    shown = ", ".join(names[:5])
    return f"Names of operators begin with: {shown}; or give type:NAME"
