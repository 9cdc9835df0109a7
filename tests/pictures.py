"""Pictures for the image tests: noise, a smooth scene, a part that lies askew."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import PoseConfig

_rng = np.random.default_rng(7)
GREY = _rng.integers(0, 256, (12, 20), dtype=np.uint8)
RGB = _rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGBA = np.dstack([RGB, np.full((12, 20), 255, np.uint8)])


def scene(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A smooth colour image, which JPEG and resizing change little."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    image: NDArray[np.uint8] = np.rint(255 * np.stack([x, y, (x + y) / 2], axis=2)).astype(np.uint8)
    return image


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def part() -> NDArray[np.uint8]:
    """A dark bar with a thick head, on the right, on light ground: uint8 (100, 120)."""
    frame = np.full((100, 120), 200, np.uint8)
    frame[45:55, 20:100] = 50
    frame[35:65, 88:100] = 50
    return frame


POSE = PoseConfig(min_contrast=0.3, length=0.8, min_length=0.5, crop_length=1.0, crop_width=0.5)
