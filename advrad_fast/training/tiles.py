"""Good frames larger than the network's input, as the tiles that it is trained on.

Frames, not tiles, are split: tiles of one frame are too alike for the threshold to be held out from its training tiles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import ImageConfig, UNetConfig
from advrad_fast.errors import ConfigError, DatasetError, expected
from advrad_fast.images import load_image, prepare_whole
from advrad_fast.model import ModelFile
from advrad_fast.tiles import cut, default_overlap
from advrad_fast.tiling import fit_tiling
from advrad_fast.training.dataset import Split, check_count, split_order

_log = logging.getLogger(__name__)

#: Tiles to train on, at most, by number and by memory; to choose settings on; to hold a tile's own scores.
TRAIN_TILES, TRAIN_BYTES = 1500, 512 << 20
SELECTION_TILES = CALIBRATION_TILES = 40
#: Of the training tiles, those that the tile's normal map is made of.
FITTED_TILES = 240


@dataclass(frozen=True)
class Tiled:
    """How to train on tiles.

    Attributes:
        side: of a tile, in pixels of the frames.
        overlap: see :class:`advrad_fast.config.TilingConfig`; None for an eighth of the side.
        fixed: every frame shows the same thing at the same place: a normal map by position.
    """

    side: int
    overlap: int | None = None
    fixed: bool = False

    def image_config(self, unet: UNetConfig, brightness: float | None) -> ImageConfig:
        """The network's input.

        Raises:
            ConfigError: the side does not fit the network, or the overlap the side.
        """
        if isinstance(self.side, bool) or not isinstance(self.side, int) or self.side < 1 or self.side % unet.size_multiple:
            raise ConfigError(expected("tile", f"a multiple of {unet.size_multiple} for this network", self.side))
        overlap = default_overlap(self.side, self.side) if self.overlap is None else self.overlap
        if isinstance(overlap, bool) or not isinstance(overlap, int) or not 1 <= overlap <= self.side // 2:
            raise ConfigError(expected("overlap", f"an integer in [1, {self.side // 2}], half a tile at most", overlap))
        return ImageConfig(height=self.side, width=self.side, channels=unet.in_channels, brightness=brightness)


@dataclass(frozen=True)
class TileSplit:
    """Tiles, and the frames that they come from.

    Attributes:
        tiles: to train, choose settings and hold a tile's scores.
        train, calibration: the frames, disjoint.
    """

    tiles: Split
    train: list[Path]
    calibration: list[Path]

    def fitted(self) -> Split:
        """The tiles with fewer to train on, enough for normal maps."""
        every = max(1, len(self.tiles.train) // FITTED_TILES)
        return dataclasses.replace(self.tiles, train=self.tiles.train[::every])


def load_tiles(paths: Sequence[Path], image: ImageConfig, seed: int, *, fixed: bool) -> TileSplit:
    """Cut tiles at random places from good frames, one frame in memory at a time.

    The frames are split as :func:`advrad_fast.training.dataset.load_split` splits images.

    Raises:
        DatasetError: too few frames; with ``fixed``, frames of several sizes, or smaller than a tile.
        ImageError: a frame that can't be read.
    """
    check_count(paths)
    size, digest = (image.height, image.width), hashlib.sha256()
    calibration, selection, train = split_order(len(paths), seed)
    limit = max(1, min(TRAIN_TILES, TRAIN_BYTES // (size[0] * size[1] * image.channels)))
    quota = {}
    for members, count in ((calibration, CALIBRATION_TILES), (selection, SELECTION_TILES), (train, limit)):
        quota.update(dict.fromkeys(members.tolist(), -(-count // len(members))))
    found: dict[int, list[NDArray[np.uint8]]] = {}
    shape: tuple[int, ...] | None = None
    for i, path in enumerate(paths):
        frame = load_image(path)
        digest.update(frame.shape.__repr__().encode() + frame.tobytes())
        if fixed:
            shape = shape or frame.shape[:2]
            if frame.shape[:2] != shape:
                raise DatasetError(expected(f"{path}: size", f"{shape}, as the frames before, for positions", frame.shape[:2]))
            if shape[0] < size[0] or shape[1] < size[1]:
                raise DatasetError(expected(f"{path}: size", f"at least a tile, {size}", shape))
        found[i] = list(cut(prepare_whole(frame, image), size, quota[i], np.random.default_rng((seed, i))))
    parts = [np.stack([tile for i in members for tile in found[i]]) for members in (train, selection, calibration)]
    split = Split(parts[0], parts[1], parts[2], digest.hexdigest())
    return TileSplit(split, [paths[i] for i in train], [paths[i] for i in calibration])


def finish(model: ModelFile, frames: TileSplit, tiled: Tiled, false_alarm_rate: float) -> ModelFile:
    """The trained model of tiles, made to inspect whole frames (:func:`advrad_fast.tiling.fit_tiling`)."""
    _log.info("inspecting %d good frames in tiles, for the threshold", len(frames.calibration))
    return fit_tiling(
        model,
        calibration=_frames(frames.calibration),
        normals=_frames(frames.train) if tiled.fixed else None,
        overlap=tiled.overlap,
        false_alarm_rate=false_alarm_rate,
        precision="fp32",  # as all calibration
    )


def _frames(paths: Sequence[Path]) -> Iterator[NDArray[np.uint8]]:
    return (load_image(path) for path in paths)
