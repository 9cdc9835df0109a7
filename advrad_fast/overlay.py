"""Heat maps for people: one fixed colour scale for all images, so that a good part never looks red."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from advrad_fast.checks import integer
from advrad_fast.config import MAX_SIDE
from advrad_fast.detector import Inspection
from advrad_fast.errors import ImageError, expected
from advrad_fast.images import check_frame

# Anchors of the scale: (share of full scale, red, green, blue).  The threshold stands at one half: below it the map is
# transparent to blue, above it yellow to red, so the decision can be read off the colours.
_ANCHORS = np.array(
    [
        (0.00, 13, 8, 135),
        (0.25, 45, 80, 200),
        (0.49, 90, 190, 200),
        (0.51, 250, 220, 60),
        (0.75, 245, 130, 30),
        (1.00, 200, 10, 20),
    ]
)

#: Colours reach their end at this multiple of the threshold.
FULL_SCALE = 2.0


def colours(levels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colours of levels in units of the full scale, clipped to [0, 1]: (...,) -> uint8 (..., 3)."""
    clipped = np.clip(levels, 0.0, 1.0)
    channels = [np.interp(clipped, _ANCHORS[:, 0], _ANCHORS[:, i]) for i in (1, 2, 3)]
    scale: NDArray[np.uint8] = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return scale


def overlay(frame: object, inspection: Inspection) -> Image.Image:
    """The frame in grey under its heat map, the mask outlined in white: an RGB picture of the frame's size.

    The scale runs from 0 to ``FULL_SCALE`` times the threshold whatever the image.  An inspection without a map gives the
    plain frame.

    Raises:
        ImageError: the frame breaks the input contract, or is not the one that was inspected.
    """
    pixels = check_frame(frame)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    if inspection.anomaly_map is None or inspection.mask is None:
        return picture
    if inspection.anomaly_map.shape != pixels.shape[:2]:
        raise ImageError(expected("frame", f"the inspected frame, of size {inspection.anomaly_map.shape}", pixels.shape[:2]))
    scale = FULL_SCALE * inspection.threshold
    if scale > 1e-30:  # below that, as for a negative one, there is no scale in float32: all or nothing
        level = inspection.anomaly_map / np.float32(scale)
    else:
        level = (inspection.anomaly_map > inspection.threshold).astype(np.float32)
    # The opacity grows with the level: quiet parts of the map leave the frame visible.
    alpha = (0.15 + 0.6 * np.clip(2.0 * level, 0.0, 1.0))[..., None]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    blended = (1.0 - alpha) * grey + alpha * colours(level)
    blended[_outline(inspection.mask)] = 255.0
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's pixels that have a neighbour outside it."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner


def legend(width: int = 260, height: int = 14) -> Image.Image:
    """The colour scale from 0 to ``FULL_SCALE`` times the threshold.

    Args:
        width, height: pixels, in [1, 4096].

    Raises:
        ConfigError: they are not.
    """
    width, height = integer("width", width, 1, MAX_SIDE), integer("height", height, 1, MAX_SIDE)
    ramp = np.broadcast_to(np.linspace(0.0, 1.0, width, dtype=np.float32), (height, width))
    return Image.fromarray(colours(ramp))
