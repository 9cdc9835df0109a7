"""The fused operations of :mod:`advrad_fast._native` in NumPy: the same arguments, and the same results up to rounding."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from advrad_fast import philox
from advrad_fast.config import SCALES

Array = NDArray[np.float32]


@lru_cache(maxsize=1)  # a seed's noise is the same for every frame
def _normals(count: int, draws: int, seed: int) -> Array:
    """Read-only float32 (draws, count)."""
    eps = np.stack([philox.normals(count, seed=seed, draw=draw) for draw in range(draws)])
    eps.flags.writeable = False
    return eps


def _normalised(images: NDArray[np.uint8]) -> Array:
    """uint8 (N, H, W, C) -> float32 (N, 1, C, H, W) in [-1, 1]."""
    return images.transpose(0, 3, 1, 2)[:, None].astype(np.float32) * np.float32(2.0 / 255.0) - np.float32(1.0)


def _noised(x: Array, draws: int, seed: int, signal: float, noise: float) -> Array:
    """x_k: float32 (N, draws, C, H, W)."""
    eps = _normals(x[0].size, draws, seed).reshape(1, draws, *x.shape[2:])
    return np.float32(signal) * x + np.float32(noise) * eps


def noise(images: NDArray[np.uint8], draws: int, seed: int, signal: float, noise: float, input_scale: float, out: Array) -> None:
    """The network's inputs: see :func:`advrad_fast._native.noise`."""
    x_k = _noised(_normalised(images), draws, seed, signal, noise)
    np.multiply(np.float32(input_scale), x_k, out=out.reshape(x_k.shape))


def reconstruction_error(
    images: NDArray[np.uint8],
    outputs: Array,
    draws: int,
    seed: int,
    signal: float,
    noise: float,
    skip: float,
    out_coeff: float,
    scale_weights: tuple[float, float, float, float],
    filter_size: int,
    mu: Array,
    inverse_spread: Array,
    maps: Array | None,
    scores: Array,
) -> None:
    """Algorithm 4: see :func:`advrad_fast._native.reconstruction_error`."""
    x = _normalised(images)
    n, height, width = len(images), *images.shape[1:3]
    with np.errstate(over="ignore", invalid="ignore"):  # a fault shows in the score
        x_k = _noised(x, draws, seed, signal, noise)
        difference = x - (np.float32(skip) * x_k + np.float32(out_coeff) * outputs.reshape(x_k.shape))
        combined = np.zeros((n, height, width), dtype=np.float32)
        for scale, weight in zip(SCALES, scale_weights, strict=True):
            pooled = difference.reshape(*difference.shape[:3], height // scale, scale, width // scale, scale).mean(axis=(4, 6))
            error = np.square(pooled).mean(axis=(1, 2)) * np.float32(weight)
            combined += error.repeat(scale, axis=1).repeat(scale, axis=2)
        error_map = _mean_filter(combined, filter_size)
        anomaly = np.abs(error_map - mu) * inverse_spread
    scores[:] = anomaly.max(axis=(1, 2))
    if maps is not None:
        maps[:] = anomaly


def _mean_filter(maps: Array, size: int) -> Array:
    """The mean over the part of a size x size window inside the image: (N, H, W) -> the same, summed in float64."""
    total = maps.astype(np.float64)
    for axis in (1, 2):
        side = total.shape[axis]
        running = np.cumsum(total, axis=axis)
        running = np.concatenate([np.zeros_like(running.take([0], axis=axis)), running], axis=axis)
        low = np.maximum(np.arange(side) - size // 2, 0)
        high = np.minimum(np.arange(side) + size // 2 + 1, side)
        column = [1, 1, 1]
        column[axis] = side
        total = (running.take(high, axis=axis) - running.take(low, axis=axis)) / (high - low).reshape(column)
    return total.astype(np.float32)
