"""Frames, arguments and bounds for the tests of the fused operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advrad_fast import _native, schedule
from advrad_fast.config import DiffusionConfig, Prediction, ScoreConfig
from advrad_fast.reference import diffusion, score
from advrad_fast.schedule import Coefficients

BAR = schedule.alpha_bar(DiffusionConfig())

# The worst seen over all cases below, and the factor on it.
NOISE_ABS = 4 * 4.8e-7  # inputs of the network, standard deviation about 1
ERROR_UNIT = 4 * 1.0e-7  # maps and scores, in the units of Case.plain

# N, H, W, C, draws
SHAPES = [
    (1, 8, 8, 1, 1),
    (1, 8, 264, 3, 2),
    (3, 264, 8, 1, 3),
    (2, 16, 24, 3, 1),
    (5, 40, 32, 3, 2),
    (7, 24, 56, 1, 1),
    (1, 72, 136, 3, 3),
    (1, 264, 264, 3, 1),
    (2, 256, 256, 3, 1),
]


def filled(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.full(shape, np.nan, dtype=np.float32)


def frames(rng: np.random.Generator, n: int, h: int, w: int, c: int) -> NDArray[np.uint8]:
    """Noise frames, after a black, a white and a smooth one where there is room."""
    images = rng.integers(0, 256, (n, h, w, c), dtype=np.uint8)
    if n > 2:
        images[0], images[1] = 0, 255
        images[2] = (np.arange(w) * 255 // w).astype(np.uint8)[None, :, None]
    return images


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def coefficients(prediction: Prediction = "edm", timestep: int = 100) -> Coefficients:
    return schedule.coefficients(prediction, float(BAR[timestep]), 0.5)


def run_noise(images: NDArray[np.uint8], draws: int, seed: int, c: Coefficients, **options: Any) -> NDArray[np.float32]:
    n, h, w, channels = images.shape
    out = filled((n * draws, channels, h, w))
    _native.noise(images, draws, seed, c.signal, c.noise, c.input_scale, out, **options)
    return out


class Case:
    """The arguments of one call of reconstruction_error."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int, int, int], c: Coefficients, seed: int = 7) -> None:
        n, h, w, channels, self.draws = shape
        self.seed, self.c = seed, c
        self.images = frozen(frames(rng, n, h, w, channels))
        self.inputs = run_noise(self.images, self.draws, seed, c)
        self.outputs = rng.normal(size=(n * self.draws, channels, h, w)).astype(np.float32)
        self.mu = frozen(rng.uniform(0, 1, (h, w)).astype(np.float32))
        self.inverse_spread = frozen(rng.uniform(0.5, 2, (h, w)).astype(np.float32))

    def run(
        self, config: ScoreConfig, *, maps: bool = True, smoothed: bool = False, **options: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        _, _, h, w = self.outputs.shape
        results = len(self.outputs) // self.draws
        scores, out = filled((results,)), filled((results, h, w)) if maps else None
        _native.reconstruction_error(
            None if smoothed else self.images, self.inputs, self.outputs, self.draws,
            *schedule.error_coefficients(self.c, smoothed=smoothed), config.scale_weights, config.filter_size, self.mu,
            self.inverse_spread, out, scores, **options,
        )  # fmt: skip
        return scores, out

    def plain(self, config: ScoreConfig) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Scores and maps of the reference in float64, and what the native ones may differ by.

        The difference d of image and reconstruction carries the fp32 rounding of its terms, whose size is m; its square then
        has an absolute error of that times sqrt(E), plus its own rounding in E, plus that of E - mu.
        """
        n, h, w, channels = self.images.shape
        eps = diffusion.draw_noise((channels, h, w), seed=self.seed, draws=self.draws, image_ids=[0] * n).double()
        images = torch.from_numpy(self.images.copy())
        mu, spread = (torch.from_numpy(a.astype(np.float64)) for a in (self.mu, self.inverse_spread))
        outputs = torch.from_numpy(self.outputs).double()
        scores, maps = score.reconstruction_error(images, outputs, eps, mu, spread, config, self.c)
        errors, _ = score.reconstruction_error(images, outputs, eps, 0 * mu, 0 * spread + 1, config, self.c)
        largest = float(errors.max())
        m = 1 + abs(self.c.skip) * (self.c.signal + self.c.noise) + abs(self.c.out)
        tolerance = ERROR_UNIT * float(spread.max()) * (m * largest**0.5 + largest + float(mu.max()))
        return scores.numpy(), maps.numpy(), tolerance
