"""Regions of interest: which pixels of a frame are looked at.

A region is a mask of one of two things.  On the *frame*: the camera's view, whatever lies in it; for cameras that see the
conveyor, a clamp or a clock.  On the *part*: the aligned part, as the network sees it; the region moves and turns with the part.

A pixel of the network's image counts where any pixel of the region falls into it.  The anomaly map pools errors over the score's
filter and the network's sight, so what lies just outside can still raise the map just inside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import ConfigError, ImageError, PartNotFoundError, expected
from advrad_fast.image_paths import StrPath
from advrad_fast.images import Prepared, load_image, mask_to_frame
from advrad_fast.model import ModelFile

On = Literal["frame", "part"]
Mask = NDArray[np.bool_]

_log = logging.getLogger(__name__)

CALIBRATED_UNDER = "recalibrated_roi"  #: of a model's provenance: the digest of the region that its threshold is of, or None


@dataclass(frozen=True, eq=False)
class Roi:
    """A region of interest.

    Attributes:
        mask: bool (H, W), True where a pixel is looked at; a read-only copy.  Of the frame's size, or, on the part, of the
            network's input.
        on: ``frame`` or ``part``.

    Raises:
        ConfigError: the mask is no bool array (H, W), or it is empty.
    """

    mask: Mask
    on: On = "frame"

    def __post_init__(self) -> None:
        mask = self.mask
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
            got = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask)
            raise ConfigError(expected("roi", "a bool array (H, W)", got))
        if not mask.any():
            raise ConfigError("roi: expected at least one pixel to look at, got an empty mask")
        if not isinstance(self.on, str) or self.on not in get_args(On):
            raise ConfigError(expected("roi: on", f"one of {list(get_args(On))}", self.on))
        copy = mask.copy()
        copy.flags.writeable = False
        object.__setattr__(self, "mask", copy)

    @classmethod
    def load(cls, path: StrPath, on: On = "frame") -> Roi:
        """The region in an image file: where it is white, or nearer to white than to black.

        Raises:
            ImageError: the file can't be read.
            ConfigError: nothing in it is white.
        """
        return cls(load_image(path).mean(axis=2) >= 127.5, on)

    @property
    def digest(self) -> str:
        """Tells regions apart: SHA-256 of where it is, its size and its mask."""
        return hashlib.sha256(f"{self.on} {self.mask.shape}".encode() + np.packbits(self.mask).tobytes()).hexdigest()

    def check_frame(self, shape: tuple[int, ...]) -> None:
        """An ImageError unless a region on the frame has the size (H, W) of this one."""
        if self.on == "frame" and self.mask.shape != tuple(shape):
            raise ImageError(expected("frame", f"one of the region's size, {self.mask.shape}", shape))

    def on_image(self, prepared: Prepared) -> Mask:
        """Which pixels of the network's image count: bool (h, w), at least one.

        Raises:
            ImageError: the frame is not of the region's size.
            PartNotFoundError: the aligned part lies outside the region.
        """
        size = (prepared.image.shape[0], prepared.image.shape[1])
        if self.on == "part":
            return self.mask
        self.check_frame(prepared.frame_shape)
        if prepared.affine is None:
            return _reduced(self, size)
        # Both ways: every pixel's middle in the frame, and every pixel of the region in the image.
        rows, columns = np.indices(size).reshape(2, -1)
        x, y = prepared.affine[:, :2] @ np.stack([columns, rows]) + prepared.affine[:, 2:]
        near, at = _nearest(x, y, self.mask.shape)
        counted = np.zeros(size, dtype=np.bool_)
        counted.ravel()[near] = self.mask[at]
        rows, columns = np.nonzero(self.mask)
        x, y = np.linalg.solve(prepared.affine[:, :2], np.stack([columns, rows]) - prepared.affine[:, 2:])
        counted[_nearest(x, y, size)[1]] = True
        if not counted.any():
            raise PartNotFoundError("roi: the part lies outside the region of interest")
        return counted

    def on_frame(self, prepared: Prepared) -> Mask:
        """The region in the frame's coordinates: bool (H, W)."""
        return self.mask if self.on == "frame" else mask_to_frame(self.mask, prepared)


def fitting(value: object, model: ModelFile) -> Roi | None:
    """A region that fits a model; a bool array is one on the frame, None everywhere.

    Raises:
        ConfigError: it is no region, or does not fit.
    """
    if value is None:
        return None
    roi = value if isinstance(value, Roi) else Roi(value)  # type: ignore[arg-type]
    image, tiling = model.config.image, model.tiling
    if roi.on == "part":
        if image.pose is None:
            raise ConfigError("roi: expected one on the frame, as this model does not align the part")
        if roi.mask.shape != (image.height, image.width):
            raise ConfigError(expected("roi", f"the aligned part's size, {(image.height, image.width)}", roi.mask.shape))
    elif tiling is not None and tiling.frame not in (None, roi.mask.shape):
        raise ConfigError(expected("roi", f"the size of the model's frames, {tiling.frame}", roi.mask.shape))
    return roi


def warn_of_another(roi: Roi | None, model: ModelFile) -> None:
    """Log a warning where a model was recalibrated under another region: its false-alarm rate is that one's."""
    calibrated = model.provenance.get(CALIBRATED_UNDER)
    if calibrated is not None and (roi is None or calibrated != roi.digest):
        _log.warning(
            "the threshold is of a region of interest that this detector does not have: its false-alarm rate does not hold"
        )


def without_region(model: ModelFile) -> ModelFile:
    """The model before it is calibrated anew: under no region."""
    provenance = {key: value for key, value in model.provenance.items() if key != CALIBRATED_UNDER}
    return dataclasses.replace(model, provenance=provenance)


def _nearest(x: NDArray[np.float64], y: NDArray[np.float64], size: tuple[int, ...]) -> tuple[Mask, tuple[NDArray[np.int64], ...]]:
    """Which of the points lie in an array of this size, and of those the indices."""
    i, j = np.rint(y).astype(np.int64), np.rint(x).astype(np.int64)
    inside = (i >= 0) & (i < size[0]) & (j >= 0) & (j < size[1])
    return inside, (i[inside], j[inside])


@lru_cache(maxsize=8)  # the same for every frame
def _reduced(roi: Roi, size: tuple[int, int]) -> Mask:
    """Where any pixel of the mask falls: bool (H, W) -> ``size``; in a frame smaller than that, where a pixel reaches."""
    mask = roi.mask
    for axis, length in enumerate(size):
        begins = np.arange(length) * mask.shape[axis] // length
        mask = np.logical_or.reduceat(mask, begins, axis=axis)
    mask.flags.writeable = False
    return mask
