"""An ONNX graph without its weights: what needs the structure alone then works for models above 2 GB as well."""

from __future__ import annotations

import math
from typing import Any, List

from portcall.targets.agent.errors import UnsupportedError

SMALL = 128
"""Constants of fewer elements (at most 1 kB) stay: shapes, axes and scales decide about types and conversion."""


def tensor_types(model: Any) -> List[Any]:
    """Return the inferred ValueInfo of every tensor of *model* whose nodes are sorted."""
    import onnx

    return list(onnx.shape_inference.infer_shapes(without_weights(model)).graph.value_info)


def raise_opset(model: Any, version: int) -> None:
    """Convert *model* in place to the standard operator set *version*, if its own is lower.

    Raises UnsupportedError where onnx cannot convert one of its operators.
    """
    import onnx

    [entry] = [o for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if entry.version >= version:
        return
    light = without_weights(model)
    try:
        converted = onnx.version_converter.convert_version(light, version)
    except (onnx.version_converter.ConvertError, RuntimeError) as error:
        raise UnsupportedError(
            f"this precision needs ONNX operator set {version}, the model has {entry.version}: {error}",
            f"Export the model with operator set {version}",
        ) from error
    held = {t.name for t in light.graph.initializer}
    large = [t for t in model.graph.initializer if t.name not in held]
    del model.graph.node[:]
    model.graph.node.extend(converted.graph.node)
    del model.graph.initializer[:]
    model.graph.initializer.extend([*large, *converted.graph.initializer])
    entry.version = version


def without_weights(model: Any) -> Any:
    """Return a copy of *model* in which large initializers are inputs."""
    import onnx

    light = onnx.ModelProto()
    light.ir_version = max(model.ir_version, 4)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    present = {v.name for v in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) < SMALL:
            light.graph.initializer.append(tensor)
        elif tensor.name not in present:
            kind, dims = tensor.data_type, list(tensor.dims)
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, kind, dims))
    return light
