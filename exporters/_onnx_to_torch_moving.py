"""ONNX operators that move, select or repeat elements, as torch ones: see ``_onnx_to_torch_ops``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

if TYPE_CHECKING:
    from portcall.exporters._onnx_to_torch_node import Node


def _reshape(node: Node, x: Any, shape: Any) -> Any:
    return x.reshape(node.reshaped(node.sizes(x), node.ints(shape, "shape")))


def _flatten(node: Node, x: Any) -> Any:
    sizes = node.sizes(x)
    axis = node.get("axis", 1)
    axis += len(sizes) if axis < 0 else 0
    rows = 1
    for size in sizes[:axis]:
        rows = rows * size
    return x.reshape([rows, -1])


def _squeeze(node: Node, x: Any, axes: Any = None) -> Any:
    sizes = node.sizes(x)
    along = node.axes(axes)
    dropped = [i for i, d in enumerate(sizes) if d == 1] if along is None else [a % len(sizes) for a in along]
    return x.reshape([d for axis, d in enumerate(sizes) if axis not in dropped])


def _unsqueeze(node: Node, x: Any, axes: Any = None) -> Any:
    along = node.axes(axes) or []
    rank = x.dim() + len(along)
    for axis in sorted(a % rank for a in along):
        x = x.unsqueeze(axis)
    return x


def _transpose(node: Node, x: Any) -> Any:
    return x.permute(node.get("perm", list(reversed(range(x.dim())))))


def _concat(node: Node, *values: Any) -> Any:
    import torch

    return torch.cat(values, node.get("axis", 0))


def _split(node: Node, x: Any, split: Any = None) -> Any:
    import torch

    axis = node.get("axis", 0)
    return tuple(torch.split(x, node.parts(node.sizes(x)[axis], split), axis))


def _slice(node: Node, x: Any, *values: Any) -> Any:
    import torch

    for axis, start, end, step in node.slices(node.sizes(x), *values):
        x = torch.flip(x, (axis,)) if step < 0 else x
        x = x[(slice(None),) * axis + (slice(start, end, abs(step)),)]
    return x


def _gather(node: Node, x: Any, indices: Any) -> Any:
    """Select along *axis*; known indices may be negative, and indices of a matrix's rows must not be."""
    import torch

    from portcall.exporters._onnx_to_torch_node import as_tensor, is_known

    axis = node.get("axis", 0) % x.dim()
    if is_known(indices) and indices.ndim == 0:
        return x.select(axis, indices.item())
    if axis == 0 and x.dim() == 2 and x.is_floating_point() and not is_known(indices):
        return torch.nn.functional.embedding(indices, x)
    indices = _counted_from_start(as_tensor(indices), node.sizes(x)[axis])
    if indices.dim() == 1:
        return torch.index_select(x, axis, indices)
    sizes = node.sizes(x)
    found = torch.index_select(x, axis, indices.reshape(-1))
    return found.reshape([*sizes[:axis], *node.sizes(indices), *sizes[axis + 1 :]])


def _counted_from_start(indices: Any, size: Any) -> Any:
    """Return indices with the negative ones counted from the start as well."""
    import torch

    return torch.where(indices < 0, indices + size, indices)


def _gather_elements(node: Node, x: Any, indices: Any) -> Any:
    import torch

    axis = node.get("axis", 0)
    return torch.gather(x, axis, _counted_from_start(indices, node.sizes(x)[axis]))


def _gather_nd(node: Node, x: Any, indices: Any) -> Any:
    if node.get("batch_dims", 0):
        raise node.refused(
            f"its batch_dims is {node.get('batch_dims', 0)}", "Use GatherElements, or batch_dims 0"
        )
    return x[tuple(indices.unbind(-1))]


def _scatter_nd(node: Node, x: Any, indices: Any, updates: Any) -> Any:
    import torch

    kind = node.get("reduction", "none")
    if kind not in ("none", "add"):
        raise node.refused(f"its reduction is {kind!r}", "Use reduction none or add")
    return torch.index_put(x, tuple(indices.unbind(-1)), updates, accumulate=kind == "add")


def _scatter_elements(node: Node, x: Any, indices: Any, updates: Any) -> Any:
    import torch

    axis, kind = node.get("axis", 0), node.get("reduction", "none")
    indices = _counted_from_start(indices, node.sizes(x)[axis])
    if kind == "none":
        return torch.scatter(x, axis, indices, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return torch.scatter_reduce(x, axis, indices, updates, names[kind])


def _expand(node: Node, x: Any, shape: Any) -> Any:
    """Broadcast both ways: a 1 in *shape* keeps the dimension."""
    wanted, sizes = node.ints(shape, "shape"), node.sizes(x)
    rank = max(len(wanted), len(sizes))
    wanted = [1] * (rank - len(wanted)) + wanted
    sizes = [1] * (rank - len(sizes)) + sizes
    from portcall.exporters._onnx_to_torch_node import is_symbol

    return x.expand([s if not is_symbol(w) and w == 1 else w for w, s in zip(wanted, sizes)])


def _tile(node: Node, x: Any, repeats: Any) -> Any:
    return x.repeat(node.ints(repeats, "repeats"))


def _pad(node: Node, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    """Pad; other modes than constant select elements along each axis, unless torch pads the last two axes itself."""
    import numpy as np
    import torch

    flat = node.get("pads", None) if node.opset < 11 else node.ints(pads, "pads")
    fill = node.get("value", 0.0) if node.opset < 11 else 0.0
    if value is not None:
        fill = node.known(value, "value").reshape(()).item()
    rank, count = x.dim(), len(flat) // 2
    along = list(range(rank))[:count] if axes is None else [a % rank for a in node.ints(axes, "axes")]
    pairs: List[Tuple[int, int]] = [(0, 0)] * rank
    for i, axis in enumerate(along):
        pairs[axis] = (flat[i], flat[count + i])
    mode = node.get("mode", "constant")
    if mode == "constant":
        return torch.nn.functional.pad(x, [p for pair in reversed(pairs) for p in pair], value=fill)
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in names:
        raise node.refused(f"its mode is {mode!r}", "Use constant, reflect, edge or wrap")
    if rank == 4 and mode != "wrap" and not any(map(any, pairs[:2])) and min(map(min, pairs)) >= 0:
        return torch.nn.functional.pad(x, [*pairs[3], *pairs[2]], mode=names[mode])
    for axis, pair in enumerate(pairs):
        if any(pair):
            order = np.arange(node.sizes(x)[axis])[max(0, -pair[0]) : node.sizes(x)[axis] + min(0, pair[1])]
            before_after = (max(0, pair[0]), max(0, pair[1]))
            x = torch.index_select(x, axis, torch.from_numpy(np.pad(order, before_after, mode=mode)))
    return x


def _depth_to_space(node: Node, x: Any) -> Any:
    import torch

    block = node.get("blocksize", 1)
    if node.get("mode", "DCR") == "CRD":
        return torch.nn.functional.pixel_shuffle(x, block)
    n, c, h, w = node.sizes(x)
    inner = c // (block * block)
    x = x.reshape([n, block * block, inner, h, w]).transpose(1, 2).reshape([n, c, h, w])
    return torch.nn.functional.pixel_shuffle(x, block)


def _space_to_depth(node: Node, x: Any) -> Any:
    import torch

    block = node.get("blocksize", 1)
    n, c, h, w = node.sizes(x)
    x = torch.nn.functional.pixel_unshuffle(x, block)
    sizes = [n, c, block * block, h // block, w // block]
    return x.reshape(sizes).transpose(1, 2).reshape([n, c * block * block, h // block, w // block])


def _filled(node: Node, shape: Any) -> Any:
    """ConstantOfShape with an open dimension; known shapes are made while tracing."""
    import torch

    from portcall.exporters._onnx_to_torch_node import as_array
    from portcall.exporters._onnx_to_torch_ops import torch_type

    value = node.get("value", None)
    number = 0.0 if value is None else as_array(value, Path()).item()
    dtype = torch.float32 if value is None else torch_type(node, value.data_type)
    return torch.full(node.ints(shape, "shape"), number, dtype=dtype)


def _range(node: Node, *limits: Any) -> Any:
    import torch

    return torch.arange(*(node.ints(value, "limits")[0] for value in limits))


def _triangle(node: Node, x: Any, k: Any = None) -> Any:
    import torch

    [diagonal] = [0] if k is None else node.ints(k, "k")
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)


def _one_hot(node: Node, indices: Any, depth: Any, values: Any) -> Any:
    import torch

    [count] = node.ints(depth, "depth")
    axis = node.get("axis", -1)
    axis = axis % (indices.dim() + 1)
    sizes = [1] * (indices.dim() + 1)
    sizes[axis] = count
    numbers = torch.arange(count, dtype=torch.int64).reshape(sizes)
    chosen = _counted_from_start(indices.to(torch.int64), count).unsqueeze(axis) == numbers
    return torch.where(chosen, values[1], values[0])


def _dropout(node: Node, x: Any, *_: Any) -> Any:
    import torch

    return (x, torch.ones_like(x, dtype=torch.bool)) if node.uses(1) else x


def _constant(node: Node) -> Any:
    from portcall.exporters._onnx_to_torch_node import as_tensor

    return as_tensor(node.constant())


def _shape(node: Node, x: Any) -> Any:
    raise AssertionError("shapes are known while tracing")


OPERATORS: Dict[str, Any] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": (_filled, (0,)),
    "DepthToSpace": _depth_to_space,
    "Dropout": (_dropout, (1, 2)),
    "Expand": (_expand, (1,)),
    "Flatten": _flatten,
    "Gather": (_gather, (1,)),
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": (_one_hot, (1,)),
    "Pad": (_pad, (1, 2, 3)),
    "Range": (_range, (0, 1, 2)),
    "Reshape": (_reshape, (1,)),
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _shape,
    "Slice": (_slice, (1, 2, 3, 4)),
    "SpaceToDepth": _space_to_depth,
    "Split": (_split, (1,)),
    "Squeeze": (_squeeze, (1,)),
    "Tile": (_tile, (1,)),
    "Transpose": _transpose,
    "Trilu": (_triangle, (1,)),
    "Unsqueeze": (_unsqueeze, (1,)),
}
