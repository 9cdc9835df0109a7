"""Frames larger than the model: where the tiles lie, what each counts, and the noise that each gets.

Tiles lie evenly, from edge to edge, each over its neighbour by at least the overlap.  A tile's weight rises over the overlap as
a raised cosine from its edge, where the network sees least around a pixel, and the weights of all tiles sum to one at every
pixel: so the blended map has no step where a tile ends, as it would have if each tile gave its inner part, because
two tiles have noise of their own.  The weights are a product of one along y and one along x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from advrad_fast import philox

#: Block of the noise stream's counter from which a tile's seed comes; 0 to 2 are the noise's own.
_SEEDS = 3

#: (tile uint8 (h, w, C), its index) -> its map, float32 (h, w).
Run = Callable[[NDArray[np.uint8], int], NDArray[np.float32]]


def default_overlap(height: int, width: int) -> int:
    """An eighth of a tile's shorter side."""
    return max(1, min(height, width) // 8)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of ``length`` pixels begin: as few as there can be, evenly spread, the first and last at the edges.

    Args:
        length: at least ``tile``.
        overlap: in [1, tile / 2].
    """
    count = 1 + math.ceil((length - tile) / (tile - overlap))
    return [0] if count == 1 else [round(i * (length - tile) / (count - 1)) for i in range(count)]


def weights(length: int, tile: int, overlap: int) -> list[NDArray[np.float32]]:
    """What each of the tiles at :func:`starts` counts along one axis: float32 (tile,) each, their sum one at every pixel."""
    begins = starts(length, tile, overlap)
    ramp = np.ones(tile)
    ramp[:overlap] = np.sin(0.5 * np.pi * (np.arange(overlap) + 0.5) / overlap) ** 2
    total, raw = np.zeros(length), []
    for i, begin in enumerate(begins):
        own = np.ones(tile)
        if i > 0:
            own *= ramp
        if i < len(begins) - 1:
            own *= ramp[::-1]
        total[begin : begin + tile] += own
        raw.append(own)
    return [(own / total[begin : begin + tile]).astype(np.float32) for begin, own in zip(begins, raw, strict=True)]


def blend(
    frame: NDArray[np.uint8], size: tuple[int, int], overlap: int, run: Run, wanted: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """The map of a frame, blended from its tiles' maps; at any time one tile and one map of the frame are in memory.

    A frame smaller than a tile is mirrored at its edges up to a tile's size, and its map cut back.

    Args:
        frame: uint8 (H, W, C).
        size: (h, w) of a tile.
        overlap: at least so many pixels of neighbouring tiles lie over one another.
        run: called for the tiles row by row, with indices that count from 0.
        wanted: bool (H, W): tiles without a pixel of it are left out, and the map is right only there.

    Returns:
        float32 (H, W).
    """
    height, width = frame.shape[:2]
    missing = (max(0, size[0] - height), max(0, size[1] - width))
    if any(missing):
        frame = np.pad(frame, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    blended = np.zeros(frame.shape[:2], dtype=np.float32)
    rows, columns = (
        list(zip(starts(n, t, overlap), weights(n, t, overlap), strict=True)) for n, t in zip(frame.shape[:2], size, strict=True)
    )
    index = 0
    for top, down in rows:
        for left, across in columns:
            at = np.s_[top : top + size[0], left : left + size[1]]
            if wanted is None or wanted[at].any():
                blended[at] += run(np.ascontiguousarray(frame[at]), index) * down[:, None] * across
            index += 1
    return blended[:height, :width]


def cut(frame: NDArray[np.uint8], size: tuple[int, int], count: int, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """``count`` tiles of a frame, uint8 (h, w, C) each, at random places; a smaller frame is mirrored as in :func:`blend`."""
    missing = (max(0, size[0] - frame.shape[0]), max(0, size[1] - frame.shape[1]))
    if any(missing):
        frame = np.pad(frame, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    for _ in range(count):
        top, left = (int(rng.integers(n - t + 1)) for n, t in zip(frame.shape[:2], size, strict=True))
        yield frame[top : top + size[0], left : left + size[1]].copy()


def tile_seed(seed: int, index: int) -> int:
    """The seed of one tile's noise, in [0, 2**64): a function of (seed, index), and for no two tiles the same noise."""
    low, high = philox.integers(2, seed=seed, image_id=index, block=_SEEDS).tolist()
    return int(low | high << 32)
