"""Synthetic defects, made from normal images, on which a detector's settings are chosen (never on test images).

Three kinds, after CutPaste (Li et al., arXiv 2104.04015) and DRAEM (Zavrtanik et al., arXiv 2108.07610): a piece of another
normal image in the wrong place, a thin scratch, and a blotch of other brightness.  Sizes and strengths reach down to what is
hardly visible, so that settings differ in what they find.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from advrad_fast.errors import TrainingError

Image = NDArray[np.uint8]
_Float = NDArray[np.float32]
#: (image, centre (y, x), images, rng) -> what to put there, and how much of it (H, W) in [0, 1].
_Kind = Callable[[_Float, tuple[float, float], NDArray[np.uint8], np.random.Generator], tuple[_Float, _Float]]

#: A defect must change its darkest or brightest pixels by this many grey levels, or it is drawn again.
_VISIBLE = 20.0
_TRIES = 50
_LIGHT_PIXELS = 10_000


def synthetic_defects(images: NDArray[np.uint8], count: int, seed: int) -> NDArray[np.uint8]:
    """``count`` defects, the kinds in turn, each on a randomly chosen image.

    Args:
        images: uint8 (N, H, W, C), normals.

    Returns:
        uint8 (count, H, W, C).

    Raises:
        TrainingError: no visible defect could be made (all images are blank).
    """
    rng = np.random.default_rng(seed)
    kinds: tuple[_Kind, ...] = (_piece, _scratch, _blotch)
    where = _structure(images)
    return np.stack([_make(images, where, kinds[i % len(kinds)], rng) for i in range(count)])


def benign_changes(images: NDArray[np.uint8], normals: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Each image in slightly other light, still a good part: a gain and two slopes from edge to edge.

    Each is drawn from twice its standard deviations around 0, as the light varies among the normals (:func:`light`), or from
    1 % where it varies less.

    Args:
        images: uint8 (N, H, W, C).
        normals: uint8 (M, H, W, C).

    Returns:
        uint8 (N, H, W, C).
    """
    rng = np.random.default_rng(seed)
    n, h, w = images.shape[:3]
    reach = np.maximum(2.0 * light(normals).std(axis=0), 0.01)
    gain, slope_y, slope_x = rng.uniform(-1.0, 1.0, (3, n, 1, 1)) * reach[:, None, None, None]
    factor = 1.0 + gain + slope_y * np.linspace(-0.5, 0.5, h)[:, None] + slope_x * np.linspace(-0.5, 0.5, w)
    changed: NDArray[np.uint8] = np.clip(np.rint(images * factor[..., None]), 0, 255).astype(np.uint8)
    return changed


def light(normals: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How each image's light differs from the mean image's: gain, slope along y and along x, float64 (M, 3).

    The least-squares fit of ``image = mean * (1 + gain + slope_y y + slope_x x)`` with y and x from -1/2 to 1/2.
    """
    h, w = normals.shape[1:3]
    step = max(1, math.isqrt(h * w // _LIGHT_PIXELS))  # it is smooth: some of the pixels are enough
    grey = normals[:, ::step, ::step].mean(axis=3, dtype=np.float64)
    mean = grey.mean(axis=0)
    y, x = np.linspace(-0.5, 0.5, h)[::step, None], np.linspace(-0.5, 0.5, w)[::step]
    basis = np.stack([mean, mean * y, mean * x])
    fitted: NDArray[np.float64] = np.linalg.lstsq(basis.reshape(3, -1).T, (grey - mean).reshape(len(grey), -1).T, rcond=None)[0].T
    return fitted


def _structure(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Where the images have something to see: probabilities (H * W,), so that defects fall on the part, not beside it."""
    from scipy.ndimage import gaussian_filter

    grey = images.mean(axis=3, dtype=np.float32)
    slope = np.abs(np.diff(grey, axis=1, append=grey[:, -1:])) + np.abs(np.diff(grey, axis=2, append=grey[:, :, -1:]))
    weight = gaussian_filter(slope.mean(axis=0), max(grey.shape[1:]) / 32).astype(np.float64) + 1e-6
    weight = np.minimum(weight, np.quantile(weight, 0.7)) + 0.05 * weight.mean()
    flat: NDArray[np.float64] = (weight / weight.sum()).ravel()
    return flat


def _make(images: NDArray[np.uint8], where: NDArray[np.float64], kind: _Kind, rng: np.random.Generator) -> Image:
    for _ in range(_TRIES):
        image = images[rng.integers(len(images))].astype(np.float32)
        y, x = np.unravel_index(rng.choice(len(where), p=where), image.shape[:2])
        content, alpha = kind(image, (float(y), float(x)), images, rng)
        result = np.clip(np.rint(image + alpha[..., None] * (content - image)), 0, 255)
        if np.quantile(np.abs(result - image).max(axis=2)[alpha > 0.5], 0.75, method="higher") >= _VISIBLE:
            defect: Image = result.astype(np.uint8)
            return defect
    raise TrainingError(f"no synthetic defect could be made in {_TRIES} tries: the normal images look blank")


def _blob(shape: tuple[int, ...], centre: tuple[float, float], rng: np.random.Generator, low: float, high: float) -> _Float:
    """A wobbly ellipse with half-axes of low to high times the shorter side, its edge softened by a pixel: (H, W) in [0, 1]."""
    h, w = shape[:2]
    side = min(h, w)
    a, b = np.exp(rng.uniform(np.log(low), np.log(high), 2)) * side
    (cy, cx), angle = centre, rng.uniform(0, np.pi)
    y, x = np.mgrid[:h, :w].astype(np.float32)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    phi = np.arctan2(v / b, u / a)
    wobble = 1 + sum(rng.normal(0, 0.25 / n) * np.cos(n * phi + rng.uniform(0, 2 * np.pi)) for n in range(2, 6))
    distance = (wobble - np.hypot(u / a, v / b)) * min(a, b)
    alpha: _Float = np.clip(distance + 0.5, 0, 1).astype(np.float32)
    if not (alpha > 0.5).any():
        alpha[int(cy), int(cx)] = 1.0
    return alpha


def _piece(
    image: _Float, centre: tuple[float, float], images: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[_Float, _Float]:
    """A piece of a normal image, turned and moved."""
    other = images[rng.integers(len(images))].astype(np.float32)
    h, w = image.shape[:2]
    other = np.roll(other, (int(rng.integers(h)), int(rng.integers(w))), axis=(0, 1))
    if rng.random() < 0.5:
        other = other[::-1]
    if rng.random() < 0.5:
        other = other[:, ::-1]
    return other, _blob(image.shape, centre, rng, 0.03, 0.15)


def _scratch(
    image: _Float, centre: tuple[float, float], images: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[_Float, _Float]:
    """A bent line, 1 to 5 pixels wide, darker or brighter."""
    del images
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w].astype(np.float32)
    points = np.empty((int(rng.integers(12, 60)), 2))
    points[0] = centre
    angle, step = rng.uniform(0, 2 * np.pi), 2.0
    for i in range(1, len(points)):
        angle += rng.normal(0, 0.15)
        points[i] = points[i - 1] + step * np.array([np.sin(angle), np.cos(angle)])
    width = rng.uniform(0.7, 2.5)
    distance = np.full((h, w), np.inf, dtype=np.float32)
    for py, px in points:
        distance = np.minimum(distance, (y - py) ** 2 + (x - px) ** 2)
    alpha = np.clip(width + 0.5 - np.sqrt(distance), 0, 1).astype(np.float32)
    return image + _shift(rng), alpha


def _blotch(
    image: _Float, centre: tuple[float, float], images: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[_Float, _Float]:
    """A region darker or brighter, its texture kept."""
    del images
    return image + _shift(rng), _blob(image.shape, centre, rng, 0.025, 0.12)


def _shift(rng: np.random.Generator) -> float:
    """A brightness change of 20 to 110 grey levels, small ones more often."""
    return float(np.exp(rng.uniform(np.log(20), np.log(110))) * rng.choice([-1, 1]))
