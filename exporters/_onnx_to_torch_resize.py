"""ONNX's Resize and Upsample as torch's interpolate: see ``_onnx_to_torch_ops``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

if TYPE_CHECKING:
    from portcall.exporters._onnx_to_torch_node import Node


def _resize(node: Node, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    """Resize and Upsample as torch's interpolate; the nearest element also by selecting along each axis."""
    import torch

    given = _new_sizes(node, x, roi, scales, sizes)
    old, mode = node.sizes(x), node.get("mode", "nearest")
    if all(new == size for new, size, _ in given):
        return x
    if mode == "nearest":
        return _nearest(node, x, given)
    where = "asymmetric" if node.opset < 11 else node.get("coordinate_transformation_mode", "half_pixel")
    spatial, rank = given[2:], x.dim() - 2
    names = {
        ("linear", 1): "linear",
        ("linear", 2): "bilinear",
        ("linear", 3): "trilinear",
        ("cubic", 2): "bicubic",
    }
    cubic = mode == "cubic" and (node.get("cubic_coeff_a", -0.75) != -0.75 or node.get("exclude_outside", 0))
    if cubic or node.get("antialias", 0):
        raise node.refused(
            "torch has no such interpolation", "Use cubic_coeff_a -0.75, no exclude_outside, no antialias"
        )
    whole = all(abs(size * scale - new) < 1e-4 for new, size, scale in spatial)
    if mode == "linear" and (
        where not in ("half_pixel", "align_corners") or not (whole or where == "align_corners")
    ):
        return _linear_by_products(node, x, given)
    if where not in ("half_pixel", "align_corners"):
        raise node.refused(f"mode {mode} at coordinates {where}", "Use half_pixel or align_corners")
    if (mode, rank) not in names or any(new != size for new, size, _ in given[:2]):
        raise node.refused(
            f"mode {mode} from {old} to {[n for n, _, _ in given]}", "Resize spatial axes only"
        )
    settings: Dict[str, Any] = {"mode": names[(mode, rank)], "align_corners": where == "align_corners"}
    if whole or where == "align_corners":
        return torch.nn.functional.interpolate(x, [new for new, _, _ in spatial], **settings)
    return torch.nn.functional.interpolate(
        x, scale_factor=[s for _, _, s in spatial], recompute_scale_factor=False, **settings
    )


def _new_sizes(node: Node, x: Any, roi: Any, scales: Any, sizes: Any) -> List[Tuple[int, int, float]]:
    """Return per axis its new size, its old size, and the scale."""
    if node.opset < 11:
        scales = roi if node.opset >= 9 else None
    old = node.sizes(x)
    axes = node.get("axes", None)
    axes = list(range(len(old))) if axes is None else [a % len(old) for a in axes]
    found = [(size, size, 1.0) for size in old]
    if sizes is not None:
        if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise node.refused("it keeps the aspect ratio", "Give the sizes themselves")
        for axis, new in zip(axes, node.ints(sizes, "sizes")):
            found[axis] = (new, old[axis], new / old[axis])
        return found
    factors = node.get("scales", ()) if scales is None else node.known(scales, "scales").reshape(-1).tolist()
    for axis, factor in zip(axes, factors):
        if factor != 1:  # a dynamic size stays what it is
            found[axis] = (int(old[axis] * factor), old[axis], factor)
    return found


def _nearest(node: Node, x: Any, given: Sequence[Tuple[int, int, float]]) -> Any:
    import numpy as np
    import torch

    changed = {
        axis: _nearest_indices(node, new, size, scale)
        for axis, (new, size, scale) in enumerate(given)
        if new != size or scale != 1
    }
    spatial = given[2:]
    for mode, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
        as_torch = {
            axis: np.minimum(
                np.floor((np.arange(given[axis][0]) + shift) * (given[axis][1] / given[axis][0])),
                given[axis][1] - 1,
            )
            for axis in changed
        }
        same = all(np.array_equal(changed[axis], as_torch[axis]) for axis in changed)
        if same and len(spatial) in (1, 2, 3) and min(changed, default=2) >= 2:
            return torch.nn.functional.interpolate(x, [new for new, _, _ in spatial], mode=mode)
    for axis, indices in changed.items():
        x = torch.index_select(x, axis, torch.from_numpy(indices))
    return x


def _linear_by_products(node: Node, x: Any, given: Sequence[Tuple[int, int, float]]) -> Any:
    """Interpolate along each axis by a product with a constant matrix: for coordinates that are not torch's own.

    LiteRT's operator takes sizes, and makes scales of them that are not those of a Resize by 0.6.
    """
    import numpy as np
    import torch

    for axis, (new, size, scale) in enumerate(given):
        if new == size and scale == 1.0:
            continue
        at = np.clip(_coordinates(node, new, size, scale).astype(np.float64), 0, size - 1)
        low = np.floor(at).astype(np.int64)
        matrix = np.zeros((new, size))
        matrix[np.arange(new), low] += 1 - (at - low)
        matrix[np.arange(new), np.minimum(low + 1, size - 1)] += at - low
        moved = torch.nn.functional.linear(x.transpose(axis, -1), torch.from_numpy(matrix).to(x.dtype))
        x = moved.transpose(axis, -1)
    return x


def _coordinates(node: Node, new: int, size: int, scale: float) -> Any:
    """Return where each new element lies among the old ones. Source: Resize in ONNX's Operators.md, in float32."""
    import numpy as np

    where = "asymmetric" if node.opset < 11 else node.get("coordinate_transformation_mode", "half_pixel")
    at = np.arange(new, dtype=np.float32)
    one = np.float32(scale)
    if where in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
        at = (at + np.float32(0.5)) / one - np.float32(0.5)
        if where == "pytorch_half_pixel" and new == 1:
            at = np.zeros(1, np.float32)
        if where == "half_pixel_symmetric":
            at += np.float32(size / 2 * (1 - new / (scale * size)))
    elif where == "asymmetric":
        at = at / one
    elif where == "tf_half_pixel_for_nn":
        at = (at + np.float32(0.5)) / one
    elif where == "align_corners":
        at = at * np.float32(size - 1) / np.float32(max(new - 1, 1))
    else:
        raise node.refused(f"coordinates {where}", "Use half_pixel or asymmetric")
    return at


def _nearest_indices(node: Node, new: int, size: int, scale: float) -> Any:
    """Return which element each new one is."""
    import numpy as np

    at = _coordinates(node, new, size, scale)
    rounded = {
        "round_prefer_floor": np.ceil(at - np.float32(0.5)),
        "round_prefer_ceil": np.floor(at + np.float32(0.5)),
        "floor": np.floor(at),
        "ceil": np.ceil(at),
    }["floor" if node.opset < 11 else node.get("nearest_mode", "round_prefer_floor")]
    return np.clip(rounded, 0, size - 1).astype(np.int64)


OPERATORS: Dict[str, Any] = {"Resize": (_resize, (1, 2, 3)), "Upsample": (_resize, (1, 2, 3))}
