"""How the constant weight of an ONNX Conv, ConvTranspose, Gemm or MatMul lies: its channels and what is summed over."""

from __future__ import annotations

from typing import Any, Dict, Iterator, Tuple

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def attribute(node: Any, name: str, default: Any) -> Any:
    """Return an attribute of an ONNX node, or *default*."""
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def weighted_nodes(graph: Any) -> Iterator[Tuple[Any, Any]]:
    """Yield each product whose second operand is a constant float32, with that initializer, in the graph's order."""
    import onnx

    weights: Dict[str, Any] = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type in WEIGHTED and node.input[1] in weights:
            yield node, weights[node.input[1]]


def channel_axis(node: Any) -> int:
    """Return the axis of a node's weight that output channels run along (Conv: [out, in / groups, *kernel])."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if node.op_type == "ConvTranspose" else -1


def reduction_axis(node: Any) -> int:
    """Return the axis of a Gemm's or MatMul's weight that is summed over."""
    return (
        1
        if node.op_type == "Gemm" and attribute(node, "transB", 0)
        else -2
        if node.op_type == "MatMul"
        else 0
    )
