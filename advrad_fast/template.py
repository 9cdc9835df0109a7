"""Finding a part by its outline where its silhouette is not to be trusted: in shadow, among or touched by other things.

The outline is two half-widths along the part's axis, measured on normals (``PoseConfig.profile``).  A pose is worth the mean of
the contrast, clipped to [0, 1], inside the outline minus that in a ring around it.  That is one correlation for every angle,
so all poses are tried at low resolution by FFT, and the best are refined.  Contrast is taken against the local
background: a morphological closing wider than the part (a black top-hat; Soille, Morphological Image Analysis, 2003, 4.5), by
ratio, so that a shadow that covers more than the part's width changes nothing.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import PoseConfig

BINS = 24  #: half-widths on either side of the axis
_SAMPLES = 40  # points along the outline's length
_GAP, _RING = 0.015, 0.05  # the ring around the outline, from and to, as shares of the length
_COARSE_SIDE = 48  # pixels of the shorter side at which all poses are tried
_ANGLES = 72
_REFINED = 4  # poses that are refined
_APART = 0.25  # poses closer than this share of the length are the same, unless they point elsewhere

_Float = NDArray[np.float64]


class Pose(NamedTuple):
    """Where the outline lies: its centre in pixels, its axis' angle in radians from thick to thin end, and what that is worth."""

    x: float
    y: float
    angle: float
    worth: float


def measure_profile(along: _Float, across: _Float, length: float) -> _Float:
    """The half-widths of one silhouette: (2, BINS), first at positive ``across``, in the units given.

    Args:
        along, across: (n,) the silhouette's points from the middle of the part, along its axis and across.
        length: of the part.
    """
    bins = np.clip(((along / length + 0.5) * BINS).astype(int), 0, BINS - 1)
    widths = np.zeros((2, BINS))
    for side, values in enumerate((across, -across)):
        np.maximum.at(widths[side], bins, values + 0.5)
    return np.maximum(widths, 0.0)


def local_contrast(grey: NDArray[np.float32], rule: PoseConfig) -> NDArray[np.float32]:
    """How far every pixel lies from its own background, in units of the rule's contrast, clipped to [0, 1]: float32 (h, w).

    Args:
        grey: float32 (h, w), 0 to 255.
    """
    from scipy import ndimage

    side = min(grey.shape)
    width = max(3, 1 + math.ceil(side * max(a + b for a, b in zip(*_halves(rule), strict=True))))
    if rule.dark_part:
        background = ndimage.grey_closing(grey, (width, width), mode="nearest")
        # As if every place were lit like the brightest.
        contrast = float(np.quantile(background, 0.9)) * (1.0 - grey / np.maximum(background, 1.0))
    else:
        contrast = grey - ndimage.grey_opening(grey, (width, width), mode="nearest")
    clipped: NDArray[np.float32] = np.clip(contrast / (255.0 * rule.min_contrast), 0.0, 1.0).astype(np.float32)
    return clipped


def worth(contrast: NDArray[np.float32], rule: PoseConfig, x: float, y: float, angle: float) -> float:
    """What one pose is worth, in [-1, 1]: 1 where the outline is filled and its surroundings are empty."""
    return float(_worth(contrast, _points(rule, min(contrast.shape)), np.array([[x, y, angle]]))[0])


def search(contrast: NDArray[np.float32], rule: PoseConfig) -> list[Pose]:
    """The best poses, each elsewhere or otherwise turned than those before it, the best first."""
    side = min(contrast.shape)
    step = max(1, side // _COARSE_SIDE)
    h, w = (n // step for n in contrast.shape)
    coarse = contrast[: h * step, : w * step].reshape(h, step, w, step).mean(axis=(1, 3))
    found = _coarse(coarse, _points(rule, side / step))
    points = _points(rule, side)
    half = 0.5 * (step - 1)  # from the coarse pixels' centres to the fine ones'
    poses = [_refine(contrast, points, x * step + half, y * step + half, angle, float(step)) for x, y, angle in found]
    return sorted(poses, key=lambda pose: -pose.worth)


def same(a: Pose, b: Pose, length: float) -> bool:
    """Whether two poses are one part's: near one another, and pointing the same way within 30 degrees."""
    turned = abs((a.angle - b.angle + math.pi) % (2 * math.pi) - math.pi)
    return math.hypot(a.x - b.x, a.y - b.y) < _APART * length and turned < math.radians(30)


def outside(rule: PoseConfig, shape: tuple[int, ...], pose: Pose) -> float:
    """The share of the outline's inside that lies beyond the edges of a frame (h, w)."""
    x, y = _turn(_points(rule, min(shape[:2])).inside, pose.angle) + np.array([[pose.x], [pose.y]])
    inside = (x >= -0.5) & (x < shape[1] - 0.5) & (y >= -0.5) & (y < shape[0] - 0.5)
    return 1.0 - float(inside.mean())


class _Points(NamedTuple):
    """(2, n) points along and across the axis, in pixels: inside the outline, and in the ring around it."""

    inside: _Float
    ring: _Float
    length: float


def _halves(rule: PoseConfig) -> _Float:
    return np.array(rule.profile).reshape(2, BINS)


@functools.lru_cache(maxsize=8)  # the same for every frame of one size
def _points(rule: PoseConfig, side: float) -> _Points:
    from scipy import ndimage

    step, halves = rule.length / _SAMPLES, _halves(rule)
    margin = math.ceil(_RING * _SAMPLES) + 1
    across = math.ceil(halves.max() / step) + margin
    u = (np.arange(_SAMPLES + 2 * margin) - (_SAMPLES - 1) / 2 - margin) * step
    v = np.arange(-across, across + 1) * step
    centres = ((np.arange(BINS) + 0.5) / BINS - 0.5) * rule.length
    up, down = (np.interp(u, centres, half) for half in halves)
    grid = (np.abs(u) <= rule.length / 2)[:, None] & (v <= up[:, None]) & (v >= -down[:, None])
    distance = ndimage.distance_transform_edt(~grid) / _SAMPLES  # in lengths
    ring = (distance > _GAP) & (distance <= _RING)
    uu, vv = np.meshgrid(u, v, indexing="ij")
    inside, around = (np.stack([uu[m], vv[m]]) * side for m in (grid, ring))
    return _Points(inside, around, rule.length * side)


def _coarse(contrast: NDArray[np.float32], points: _Points) -> list[tuple[float, float, float]]:
    """(x, y, angle) of the best poses at low resolution."""
    from scipy import fft

    h, w = contrast.shape
    reach = math.ceil(np.hypot(*np.concatenate([points.inside, points.ring], axis=1)).max()) + 1
    shape = tuple(fft.next_fast_len(n + 2 * reach, real=True) for n in (h, w))
    image = fft.rfft2(contrast, shape)
    maps = np.empty((_ANGLES, h, w), dtype=np.float32)
    for i in range(_ANGLES):
        kernel = np.zeros(shape, dtype=np.float32)
        for part, sign in ((points.inside, 1.0), (points.ring, -1.0)):
            x, y = np.rint(_turn(part, 2 * math.pi * i / _ANGLES)).astype(int)
            np.add.at(kernel, (y, x), sign / part.shape[1])  # negative indices wrap, as the transform does
        maps[i] = fft.irfft2(image * np.conj(fft.rfft2(kernel)), shape)[:h, :w]
    found: list[tuple[float, float, float]] = []
    best, which = maps.max(axis=0), maps.argmax(axis=0)
    y, x = np.mgrid[:h, :w]
    for _ in range(_REFINED // 2):
        row, column = np.unravel_index(int(best.argmax()), best.shape)
        i = int(which[row, column])
        found.append((float(column), float(row), 2 * math.pi * i / _ANGLES))
        found.append((float(column), float(row), 2 * math.pi * i / _ANGLES + math.pi))  # the other way round
        best[np.hypot(x - column, y - row) < _APART * points.length] = -np.inf
    return found


def _refine(contrast: NDArray[np.float32], points: _Points, x: float, y: float, angle: float, reach: float) -> Pose:
    """Uphill from a pose: a step along the axis, across it or a turn at a time, in steps that shrink from ``reach`` pixels."""
    pose, size = np.array([x, y, angle]), reach
    value = _worth(contrast, points, pose[None])[0]
    while size > 0.2:
        c, s = math.cos(pose[2]), math.sin(pose[2])
        moves = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 2.0 / points.length]]) * size
        tried = pose + np.concatenate([moves, -moves])
        values = _worth(contrast, points, tried)
        best = int(values.argmax())
        if values[best] > value + 1e-6:
            value, pose = values[best], tried[best]
        else:
            size /= 2.0
    return Pose(float(pose[0]), float(pose[1]), float(pose[2]), float(value))


def _worth(contrast: NDArray[np.float32], points: _Points, poses: _Float) -> _Float:
    """What poses (n, 3) of x, y, angle are worth: (n,).  Outside the frame there is no contrast."""
    from scipy import ndimage

    both = np.concatenate([points.inside, points.ring], axis=1)
    at = np.stack([_turn(both, float(angle)) + np.array([[x], [y]]) for x, y, angle in poses], axis=1)  # (2, n, points)
    values = ndimage.map_coordinates(contrast, at[::-1], order=1, mode="constant", output=np.float64)
    inside = points.inside.shape[1]
    result: _Float = values[:, :inside].mean(axis=1) - values[:, inside:].mean(axis=1)
    return result


def _turn(points: _Float, angle: float) -> _Float:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]]) @ points
