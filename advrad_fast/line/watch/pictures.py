"""A result's frame and heat map as JPEG files of a size for a screen."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from advrad_fast.errors import AdvRADError
from advrad_fast.images import check_frame
from advrad_fast.line.results import StreamInspection
from advrad_fast.overlay import overlay

_log = logging.getLogger(__name__)

SIDE = 1024  #: pixels: a picture's longer side at most
QUALITY = 80  #: of JPEG


@dataclass(frozen=True)
class Pictures:
    """JPEG files.

    Attributes:
        frame: as the camera saw it.
        map: the frame in grey under its heat map; None for a result without a map.
    """

    frame: bytes = field(repr=False)
    map: bytes | None = field(repr=False)


def pictures(result: StreamInspection, *, side: int = SIDE) -> Pictures | None:
    """Pictures of a result; None where it has no frame, or one that cannot be drawn.

    A large frame is made smaller by an integer: the mean of its pixels, the maximum of the map, so that no hot spot is lost.
    """
    if result.frame is None:
        return None
    try:
        pixels = check_frame(result.frame)
    except AdvRADError as error:  # the same that made the result an ERROR
        _log.debug("%s: no picture of result %d: %s", result.source, result.sequence, error)
        return None
    inspection = result.inspection
    step = math.ceil(max(pixels.shape[:2]) / side)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).reduce(step)
    if inspection.anomaly_map is None or inspection.mask is None:
        return Pictures(_jpeg(image), None)
    rows, columns = (np.arange(0, length, step) for length in pixels.shape[:2])
    smaller = replace(
        inspection,
        anomaly_map=np.maximum.reduceat(np.maximum.reduceat(inspection.anomaly_map, rows, axis=0), columns, axis=1),
        mask=np.logical_or.reduceat(np.logical_or.reduceat(inspection.mask, rows, axis=0), columns, axis=1),
    )
    return Pictures(_jpeg(image), _jpeg(overlay(np.asarray(image), smaller)))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
