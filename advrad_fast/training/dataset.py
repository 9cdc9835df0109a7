"""Good parts from a folder, as the arrays that training, selection and calibration see."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import ImageConfig, PoseConfig, UNetConfig
from advrad_fast.errors import ConfigError, DatasetError, PartNotFoundError, expected
from advrad_fast.images import load_image, prepare
from advrad_fast.pose import align as align_part
from advrad_fast.pose import fit_pose

_log = logging.getLogger(__name__)

Align = Literal["auto", "on", "off"]

#: Fewest good images a detector can be made from.
MIN_IMAGES = 10


@dataclass(frozen=True)
class Split:
    """Disjoint sets of prepared normals, uint8 (N, H, W, C) each, and where they came from.

    Attributes:
        train: the network learns from these, and the normal map is made on them.
        selection: k, s and the score are chosen on these.
        calibration: the threshold comes from these; nothing was chosen on them.
        data_hash: sha256 of all files' contents, in order.
    """

    train: NDArray[np.uint8]
    selection: NDArray[np.uint8]
    calibration: NDArray[np.uint8]
    data_hash: str


def image_config(
    samples: Sequence[NDArray[np.uint8]],
    unet: UNetConfig,
    *,
    size: int = 256,
    align: Align = "auto",
    brightness: float | None = None,
) -> ImageConfig:
    """The image settings that fit these normals.

    Args:
        samples: uint8 (H, W, C) images.
        size: the network's input has about ``size**2`` pixels, in the images' aspect ratio.
        align: whether to lay the part level first; ``auto`` does where the parts lie at different angles and can be found.
        brightness: as in :class:`ImageConfig`.

    Raises:
        ConfigError: alignment was asked for and the normals do not allow it (the message says why).
    """
    height = float(np.median([s.shape[0] for s in samples]))
    width = float(np.median([s.shape[1] for s in samples]))
    pose = None
    if align != "off":
        try:
            pose = fit_pose(samples)
            if align == "auto" and not _turned(samples, pose):
                _log.info("the parts lie at one angle: no alignment")
                pose = None
        except ConfigError as error:
            if align == "on":
                raise
            _log.info("no alignment: %s", error)
    multiple = unet.size_multiple
    if pose is not None:
        # The part's resolution stays what it was; the crop only leaves out the background.
        scale = size / math.sqrt(height * width) * min(height, width)
        height, width = pose.crop_width * scale, pose.crop_length * scale
    else:
        scale = size / math.sqrt(height * width)
        height, width = height * scale, width * scale
    return ImageConfig(
        height=max(1, round(height / multiple)) * multiple,
        width=max(1, round(width / multiple)) * multiple,
        channels=unet.in_channels,
        brightness=brightness,
        pose=pose,
    )


def _turned(samples: Sequence[NDArray[np.uint8]], pose: PoseConfig) -> bool:
    """Whether the parts lie at different angles: their circular standard deviation is over 5 degrees."""
    directions = []
    for sample in samples:
        try:
            _, affine = align_part(sample, pose, 8, 8)
        except PartNotFoundError:
            continue
        directions.append(complex(affine[0, 0], affine[1, 0]))
    unit = np.array(directions) / np.abs(directions)
    return len(unit) > 0 and abs(unit.mean()) < math.cos(math.radians(5.0))


def load_samples(paths: Sequence[Path], count: int = 60) -> list[NDArray[np.uint8]]:
    """Up to ``count`` images, evenly spread over the list: uint8 (H, W, C) each."""
    step = max(1, len(paths) // count)
    return [load_image(path) for path in paths[::step][:count]]


def load_split(paths: Sequence[Path], config: ImageConfig, seed: int) -> Split:
    """Load, prepare and split the normals: 15 % for calibration, 10 % for selection, the rest for training.

    The order that decides the split depends on the seed and the number of images alone.  Normals in which the pose rule
    finds no part are left out with a warning; more than one in ten of them is an error.

    Raises:
        DatasetError: fewer than ``MIN_IMAGES`` images, or too many without a part.
        ImageError: an image that can't be read.
    """
    check_count(paths)
    digest, prepared, lost = hashlib.sha256(), [], []
    for path in paths:
        image = load_image(path)
        digest.update(image.shape.__repr__().encode() + image.tobytes())
        try:
            prepared.append(prepare(image, config).image)
        except PartNotFoundError as error:
            lost.append(path)
            _log.warning("%s: left out: %s", path, error)
    if len(lost) > len(paths) / 10:
        raise DatasetError(
            f"no part was found in {len(lost)} of {len(paths)} good images, {lost[0]} among them; train with align='off'"
        )
    images = np.stack(prepared)
    calibration, selection, train = split_order(len(images), seed)
    return Split(images[train], images[selection], images[calibration], digest.hexdigest())


def check_count(paths: Sequence[Path]) -> None:
    """A DatasetError for fewer than ``MIN_IMAGES`` good images."""
    if len(paths) < MIN_IMAGES:
        raise DatasetError(expected("good images", f"at least {MIN_IMAGES}", len(paths)))


def split_order(count: int, seed: int) -> list[NDArray[np.int64]]:
    """Which of ``count`` normals are for calibration, for selection and for training: disjoint indices."""
    order = np.random.default_rng(seed).permutation(count)
    calibration = max(round(0.15 * count), min(20, count // 4))
    selection = max(round(0.10 * count), min(10, count // 6))
    return np.split(order, [calibration, calibration + selection])
