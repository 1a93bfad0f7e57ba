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
    whole = all(abs(size * scale - new) < 1e-4 for new, size, scale in spatial)
    one = any(new == 1 for new, _, _ in spatial)
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners") or (
        one and where != "half_pixel" and any(new == 1 != size for new, size, _ in spatial)
    ):
        raise node.refused(f"mode {mode} at coordinates {where}", "Use half_pixel or align_corners")
    if (mode, rank) not in names or any(new != size for new, size, _ in given[:2]):
        raise node.refused(
            f"mode {mode} from {old} to {[n for n, _, _ in given]}", "Resize spatial axes only"
        )
    cubic = mode == "cubic" and (node.get("cubic_coeff_a", -0.75) != -0.75 or node.get("exclude_outside", 0))
    if cubic or node.get("antialias", 0):
        raise node.refused(
            "torch has no such interpolation", "Use cubic_coeff_a -0.75, no exclude_outside, no antialias"
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
        found[axis] = (int(old[axis] * factor), old[axis], factor)
    return found


def _nearest(node: Node, x: Any, given: Sequence[Tuple[int, int, float]]) -> Any:
    import numpy as np
    import torch

    chosen = [_nearest_indices(node, new, size, scale) for new, size, scale in given]
    spatial = given[2:]
    for mode, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
        as_torch = [
            np.minimum(np.floor((np.arange(new) + shift) * (size / new)), size - 1) for new, size, _ in given
        ]
        same = all(np.array_equal(a, b) for a, b in zip(chosen, as_torch))
        if same and len(spatial) in (1, 2, 3) and all(new == size for new, size, _ in given[:2]):
            return torch.nn.functional.interpolate(x, [new for new, _, _ in spatial], mode=mode)
    for axis, (indices, (new, size, _)) in enumerate(zip(chosen, given)):
        if new != size or not np.array_equal(indices, np.arange(size)):
            x = torch.index_select(x, axis, torch.from_numpy(indices))
    return x


def _nearest_indices(node: Node, new: int, size: int, scale: float) -> Any:
    """Return which element each new one is. Source: Resize in ONNX's Operators.md, float32 as ONNX Runtime."""
    import numpy as np

    old_set = node.opset < 11
    where = "asymmetric" if old_set else node.get("coordinate_transformation_mode", "half_pixel")
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
        raise node.refused(f"mode nearest at coordinates {where}", "Use half_pixel or asymmetric")
    rounded = {
        "round_prefer_floor": np.ceil(at - np.float32(0.5)),
        "round_prefer_ceil": np.floor(at + np.float32(0.5)),
        "floor": np.floor(at),
        "ceil": np.ceil(at),
    }["floor" if old_set else node.get("nearest_mode", "round_prefer_floor")]
    return np.clip(rounded, 0, size - 1).astype(np.int64)


OPERATORS: Dict[str, Any] = {"Resize": (_resize, (1, 2, 3)), "Upsample": (_resize, (1, 2, 3))}
