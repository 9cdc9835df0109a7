"""Drawn parts for the tests: a disc with a ring and a hole, lit and placed a little differently each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def disc(rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """A good part: uint8 (size, size, 3)."""
    y, x = np.mgrid[:size, :size] + rng.normal(0, 0.4, (2, 1, 1))
    r = np.hypot(y - size / 2, x - size / 2) / size
    grey = np.full((size, size), 210.0)
    grey[r < 0.42] = 90
    grey[(r > 0.27) & (r < 0.32)] = 160
    grey[r < 0.12] = 30
    grey = grey * rng.normal(1.0, 0.02) + rng.normal(0, 3, (size, size))
    colour = np.stack([grey, 0.95 * grey, 0.9 * grey], axis=2)
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8)


def scratched(rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """The same with a bright bar across it."""
    image = disc(rng, size)
    top = int(rng.integers(size // 4, size // 2))
    image[top : top + size // 8, size // 4 : 3 * size // 4] = 250
    return image


def dataset(root: Path, *, train: int = 40, good: int = 6, bad: int = 6, size: int = 64) -> Path:
    """A dataset in MVTec AD layout, with masks."""
    rng = np.random.default_rng(0)
    for folder, count, make in (("train/good", train, disc), ("test/good", good, disc), ("test/scratch", bad, scratched)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(make(rng, size)).save(root / folder / f"{i:03d}.png")
    (root / "ground_truth/scratch").mkdir(parents=True)
    for i in range(bad):
        image = np.asarray(Image.open(root / f"test/scratch/{i:03d}.png"))
        mask = (image.min(axis=2) == 250).astype(np.uint8) * 255
        Image.fromarray(mask).save(root / f"ground_truth/scratch/{i:03d}_mask.png")
    return root
