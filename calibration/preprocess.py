"""Named preprocessings: from an image file to the array that a published model was trained on.

The name is stored in the manifest, so what a name means never changes. Pillow is imported on first use.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from portcall.targets.agent.contract import TensorSpec
from portcall.targets.agent.errors import BadInput, UnavailableError


class Resize(StrEnum):
    """How an image becomes height x width."""

    SHORT_SIDE = "short-side"
    """Resize so that the short side is ``crop`` times the model's size, then cut out the centre."""
    CROP_FIRST = "crop-first"
    """Cut out the centre, leaving ``crop_padding`` pixels (at the model's size) around it, then resize."""
    STRETCH = "stretch"
    """Resize both sides to the model's size, whatever the aspect ratio."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """A preprocessing as data: geometry first, then ``(pixel / scale - mean) / std`` in float32.

    mean and std: one value, or one per RGB channel. scale is what 8-bit pixels are divided by. size: height
    and width where the model leaves them open. integer: pixels stay as they are, and suit uint8 inputs too.
    """

    name: str
    resize: Resize
    interpolation: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0
    crop: float = 1.0
    crop_padding: int = 0
    size: int = 224
    integer: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """What a model input wants of an image."""

    channels_first: bool
    channels: int
    height: int
    width: int
    dtype: np.dtype[Any]


_IMAGENET: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "scale": 255.0,
    "crop": 256 / 224,
}

PREPROCESSINGS = {
    p.name: p
    for p in (
        # torchvision, transforms/_presets.py, ImageClassification(crop_size=224, resize_size=256): the
        # transforms of most of its weights. With another size the same ratio is kept.
        Preprocessing("imagenet", Resize.SHORT_SIDE, "bilinear", **_IMAGENET),
        # The same with bicubic interpolation: timm's usual crop_pct 0.875 (timm/data/constants.py).
        Preprocessing("imagenet-bicubic", Resize.SHORT_SIDE, "bicubic", **_IMAGENET),
        # tensorflow/tpu, models/official/efficientnet: preprocessing.py (_decode_and_center_crop, bicubic)
        # and lite/efficientnet_lite_builder.py (MEAN_RGB 127, STDDEV_RGB 128). Pillow's bicubic filter
        # averages when it shrinks and rounds to 8 bits; TensorFlow's resize_bicubic does neither.
        Preprocessing("efficientnet-lite", Resize.CROP_FIRST, "bicubic", (127.0,), (128.0,), crop_padding=32),
        # Pixels in [0, 1], as of torchvision's ToTensor.
        Preprocessing("unit", Resize.STRETCH, "bilinear", scale=255.0),
        # Pixels in [-1, 1]: Keras, applications/imagenet_utils.py, preprocess_input(mode="tf") (MobileNet).
        Preprocessing("symmetric", Resize.STRETCH, "bilinear", (1.0,), scale=127.5),
        # Pixels in [0, 255], for models that scale by themselves (Keras EfficientNet, uint8 inputs).
        Preprocessing("raw", Resize.STRETCH, "bilinear", integer=True),
    )
}


def get_preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing called *name*. Raises BadInput that lists all and the nearest name."""
    if name not in PREPROCESSINGS:
        near = difflib.get_close_matches(name, PREPROCESSINGS, 1, 0.4)
        raise BadInput(
            f"no preprocessing {name!r}; there are: {', '.join(PREPROCESSINGS)}",
            f"Did you mean {near[0]!r}?"
            if near
            else "Use one of these, or give preprocessed arrays in an .npz",
        )
    return PREPROCESSINGS[name]


def image_layout(spec: TensorSpec, recipe: Preprocessing) -> ImageLayout:
    """Return what the model input wants of an image. The channel axis is the one of size 3, else of size 1.

    Raises BadInput if the input takes no images, or not what *recipe* yields.
    """
    shape = spec.shape
    axes = [a for a in (1, 3) if len(shape) == 4 and shape[a] == 3]
    axes = axes or [a for a in (1, 3) if len(shape) == 4 and shape[a] == 1]
    if len(axes) != 1:
        found = "more than one" if axes else "none"
        raise BadInput(
            f"input {spec} does not take images: of axes 1 and 3 one must have size 3 or 1, and {found} has",
            "Give arrays in an .npz keyed by input name",
        )
    height, width = shape[2:4] if axes == [1] else shape[1:3]
    channels = 3 if shape[axes[0]] == 3 else 1
    if channels == 1 and len(recipe.mean) == 3:
        raise BadInput(
            f"preprocessing {recipe.name!r} is for 3 channels, and input {spec} has 1",
            "Use unit, symmetric or raw",
        )
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as e:
        raise BadInput(f"input {spec} has a dtype that NumPy does not know", "Use float32") from e
    if dtype.kind != "f" and not (recipe.integer and dtype == np.uint8):
        raise BadInput(
            f"preprocessing {recipe.name!r} yields {'uint8 or ' if recipe.integer else ''}floats, "
            f"which input {spec} does not take",
            "Use raw" if dtype == np.uint8 else "Give arrays in an .npz keyed by input name",
        )
    return ImageLayout(
        channels_first=axes == [1],
        channels=channels,
        height=height if isinstance(height, int) else recipe.size,
        width=width if isinstance(width, int) else recipe.size,
        dtype=dtype,
    )


def require_pillow() -> None:
    """Raise UnavailableError if Pillow is not installed."""
    if importlib.util.find_spec("PIL") is None:
        raise UnavailableError("images need Pillow, which is not installed", "pip install 'portcall[images]'")


def load_image(path: Path, recipe: Preprocessing, layout: ImageLayout) -> npt.NDArray[Any]:
    """Return one image file as an array without a batch axis. Raises BadInput if it is no 8-bit image.

    Orientation tags are not applied: the published evaluations do not apply them either.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise BadInput(f"{path} has {opened.mode} pixels, not 8-bit ones", "Convert it to 8 bits")
            image = _resized(_to_mode(opened, layout.channels), recipe, layout.height, layout.width)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise BadInput(f"{path} cannot be read as an image: {e}", "Replace the file or leave it out") from e
    pixels = np.asarray(image, dtype=np.uint8).reshape(layout.height, layout.width, layout.channels)
    if layout.channels_first:
        pixels = pixels.transpose(2, 0, 1)
    if layout.dtype == np.uint8:
        return pixels
    per_channel = (-1, 1, 1) if layout.channels_first else (1, 1, -1)
    mean = np.array(recipe.mean, np.float32).reshape(per_channel)
    std = np.array(recipe.std, np.float32).reshape(per_channel)
    array = (pixels.astype(np.float32) / np.float32(recipe.scale) - mean) / std
    return array.astype(layout.dtype, copy=False)


def _to_mode(image: Any, channels: int) -> Any:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it goes to RGB directly
    return image.convert("RGB" if channels == 3 else "L")


def _resized(image: Any, recipe: Preprocessing, height: int, width: int) -> Any:
    """Return the Pillow image at height x width."""
    from PIL import Image

    method = Image.Resampling[recipe.interpolation.upper()]
    full_width, full_height = image.size
    if recipe.resize is Resize.SHORT_SIDE:
        short = max(round(max(height, width) * recipe.crop), 1)
        # Rounded as in torchvision (transforms/functional.py, _compute_resized_output_size and center_crop).
        if full_width <= full_height:
            size = short, int(short * full_height / full_width)
        else:
            size = int(short * full_width / full_height), short
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return image.resize(size, method).crop((left, top, left + width, top + height))
    if recipe.resize is Resize.CROP_FIRST:
        fraction = max(height, width) / (max(height, width) + recipe.crop_padding)
        cut_height = max(int(fraction * min(full_height, full_width * height / width)), 1)
        cut_width = max(int(fraction * min(full_width, full_height * width / height)), 1)
        left, top = (full_width - cut_width + 1) // 2, (full_height - cut_height + 1) // 2
        image = image.crop((left, top, left + cut_width, top + cut_height))
    return image.resize((width, height), method)
