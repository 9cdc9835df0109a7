"""The noise schedule: alpha_bar, sigma and timestep, and what the network's output stands for (NumPy, float64)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from advrad_fast.checks import finite
from advrad_fast.config import PREDICTIONS, DiffusionConfig, Prediction
from advrad_fast.errors import ConfigError, expected


def betas(config: DiffusionConfig) -> NDArray[np.float64]:
    """The linear schedule: float64 (T,)."""
    return np.linspace(config.beta_start, config.beta_end, config.timesteps)


def alpha_bar(config: DiffusionConfig) -> NDArray[np.float64]:
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), 0-based: float64 (T,), strictly falling in (0, 1)."""
    bar: NDArray[np.float64] = np.cumprod(1.0 - betas(config), dtype=np.float64)
    return bar


def sigma(config: DiffusionConfig) -> NDArray[np.float64]:
    """Noise-to-signal ratio sqrt((1 - alpha_bar) / alpha_bar): float64 (T,), in units of images in [-1, 1]."""
    bar = alpha_bar(config)
    return np.sqrt((1.0 - bar) / bar)


def timestep_for_sigma(config: DiffusionConfig, sigma01: float) -> int:
    """The smallest timestep t >= 1 whose noise is at least that of smoothing with ``sigma01`` (Theorem 5.1).

    Args:
        sigma01: standard deviation of the smoothing noise in [0, 1] pixel units, above 0.

    Raises:
        ConfigError: the schedule never gets that noisy, or ``sigma01`` is not above 0.
    """
    levels = sigma(config)
    if not 0.0 < finite("sigma", sigma01) <= levels[-1] / 2.0:
        raise ConfigError(expected("sigma", f"a number in (0, {levels[-1] / 2.0:.4g}] for this schedule", sigma01))
    return max(1, int(np.searchsorted(levels, 2.0 * sigma01, side="left")))


class Coefficients(NamedTuple):
    """The affine maps around the network at one timestep.

    ``x_k = signal * x + noise * eps``; the network sees ``input_scale * x_k`` and returns ``o``; the one-shot
    reconstruction is ``x~ = skip * x_k + out * o``.
    """

    signal: float
    noise: float
    input_scale: float
    skip: float
    out: float


def coefficients(prediction: Prediction, bar: float, sigma_data: float) -> Coefficients:
    """The affine maps for a parametrisation at alpha_bar = ``bar`` (the one place where they are written).

    ``edm`` is Karras et al. (arXiv 2206.00364, table 1): with y = x_k / sqrt(bar) and s^2 = (1 - bar) / bar,
    D = c_skip y + c_out F(c_in y).
    """
    if not 0.0 < bar < 1.0:
        raise ConfigError(expected("alpha_bar", "a number in (0, 1)", bar))
    a, b = math.sqrt(bar), math.sqrt(1.0 - bar)
    if prediction == "eps":
        return Coefficients(a, b, 1.0, 1.0 / a, -b / a)
    if prediction == "x0":
        return Coefficients(a, b, 1.0, 0.0, 1.0)
    if prediction == "v":
        return Coefficients(a, b, 1.0, a, -b)
    if prediction != "edm":
        raise ConfigError(expected("prediction", f"one of {list(PREDICTIONS)}", prediction))
    s, d = b / a, sigma_data
    total = s * s + d * d
    return Coefficients(a, b, 1.0 / (a * math.sqrt(total)), d * d / (total * a), s * d / math.sqrt(total))


def error_coefficients(c: Coefficients, *, smoothed: bool = False) -> tuple[float, float]:
    """(a, b) such that image minus reconstruction is ``x + a * inputs + b * outputs`` of the network.

    With ``smoothed`` the image is the noised one, x_k / signal, and x is left out.
    """
    return (((1.0 / c.signal if smoothed else 0.0) - c.skip) / c.input_scale, -c.out)
