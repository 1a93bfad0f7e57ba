"""What a recipe's options mean for Core ML: deployment targets, and inputs that are images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput, UnsupportedError

TARGETS: Mapping[str, int] = {"iOS15": 6, "iOS16": 7, "iOS17": 8, "iOS18": 9}
"""Minimum deployment target -> version of the specification."""
SAME: Mapping[str, str] = {
    **{f"macOS{n}": f"iOS{n + 3}" for n in (12, 13, 14, 15)},
    **{f"watchOS{n}": f"iOS{n + 7}" for n in (8, 9, 10, 11)},
    **{f"tvOS{n}": f"iOS{n}" for n in (15, 16, 17, 18)},
}
"""Other systems' versions -> the iOS with the same Core ML."""


@dataclass(frozen=True)
class Image:
    """An input that Core ML takes as an image: x = scale * pixel + bias of its channel. color: RGB, BGR or GRAY."""

    scale: float = 1.0
    bias: Tuple[float, ...] = (0.0,)
    color: str = "RGB"

    def pixels(self, array: Any) -> Any:
        """Return the source's float array [1, c, h, w] as pixels 0 to 255: uint8 of the same shape."""
        import numpy as np

        bias = np.asarray(self.bias, np.float64).reshape(-1, 1, 1)
        return np.clip(np.rint((array.astype(np.float64) - bias) / self.scale), 0, 255).astype(np.uint8)


def parse_images(text: str) -> Dict[str, Image]:
    """Read the option "image": ``NAME[:scale=S,bias=B/B/B,color=RGB|BGR|GRAY]``, several joined by ";".

    Raises BadInput for other keys or values.
    """
    images: Dict[str, Image] = {}
    for part in filter(None, text.split(";")):
        name, _, rest = part.partition(":")
        values: Dict[str, Any] = {}
        for pair in filter(None, rest.split(",")):
            key, _, value = pair.partition("=")
            try:
                if key == "scale":
                    values[key] = float(value)
                elif key == "bias":
                    values[key] = tuple(float(b) for b in value.split("/"))
                elif key == "color" and value in ("RGB", "BGR", "GRAY"):
                    values[key] = value
                else:
                    raise ValueError(pair)
            except ValueError as error:
                raise BadInput(
                    f"cannot read {pair!r} in the option image={text!r}",
                    "Write x:scale=0.0078,bias=-1/-1/-1,color=RGB (or BGR, GRAY)",
                ) from error
        image = Image(**values)
        if not image.scale or len(image.bias) not in ((1,) if image.color == "GRAY" else (1, 3)):
            raise BadInput(
                f"the option image={text!r} has scale {image.scale:g} and {len(image.bias)} values of bias",
                "Give a scale other than 0, and one bias for all channels or one for each",
            )
        images[name] = image
    return images


def target_of(given: Optional[str], needed: str, why: str) -> str:
    """Return the minimum deployment target as an iOS version: *given*, or else *needed*, the lowest that suffices.

    Raises BadInput for an unknown version, UnsupportedError where *why* (a precision) needs a newer one.
    """
    if given is None:
        return needed
    target = SAME.get(given, given)
    if target not in TARGETS:
        raise BadInput(
            f"min_runtime is {given!r}, no version of Apple's systems that is known here",
            f"It takes: {', '.join([*TARGETS, *SAME])}",
        )
    if TARGETS[target] < TARGETS[needed]:
        raise UnsupportedError(
            f"{why} needs {needed} ({_also(needed)}); min_runtime is {given}",
            f"Give min_runtime={needed} or newer, or use a precision that runs on {given}",
        )
    return target


def check_macos(needed: Optional[str], version: str) -> None:
    """Raise UnsupportedError where the macOS of *version* is older than the artifact's *needed* system."""
    first = min(
        (int(name[5:]) for name in _also(SAME.get(needed or "", needed or "")).split(", ") if name), default=0
    )
    if int(version.split(".")[0] or 0) < first:
        raise UnsupportedError(
            f"the artifact needs {needed} (macOS{first}); this is macOS {version}",
            "Update macOS, or export with an older min_runtime and a precision that it has",
        )


def _also(target: str) -> str:
    return ", ".join(name for name, ios in SAME.items() if ios == target and name.startswith("macOS"))


def check_image(spec: TensorSpec, example: Sequence[int], image: Image) -> None:
    """Raise BadInput for an input that cannot be an image."""
    channels = 1 if image.color == "GRAY" else 3
    if spec.dtype != "float32" or len(example) != 4 or tuple(example[:2]) != (1, channels):
        raise BadInput(
            f"the input {spec} at {'x'.join(map(str, example))} is no {image.color} image",
            f"An image is float32[1, {channels}, height, width]: choose another input or color, or batch 1",
        )
