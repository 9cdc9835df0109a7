"""Noising and Algorithms 1 to 3 of AdvRAD (Cao, Lin, Chen, arXiv 2408.04839) in plain PyTorch.

Images are float tensors (N, C, H, W) in [-1, 1]; timesteps are 0-based.  A *model* is any callable ``(x, timesteps) -> o``
whose output is of the parametrisation named by ``config.unet.prediction``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from advrad_fast import philox, schedule
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, expected
from advrad_fast.schedule import Coefficients

Network = Callable[[Tensor, Tensor], Tensor]


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() * (2.0 / 255.0) - 1.0


def draw_noise(shape: Sequence[int], *, seed: int, draws: int, image_ids: Sequence[int]) -> Tensor:
    """The detector's noise: float32 (len(image_ids) * draws, C, H, W), image-major, from :mod:`advrad_fast.philox`."""
    count = int(np.prod(shape))
    rows = [philox.normals(count, seed=seed, draw=d, image_id=i) for i in image_ids for d in range(draws)]
    return torch.from_numpy(np.stack(rows)).reshape(-1, *shape)


def noise(images: Tensor, eps: Tensor, c: Coefficients) -> Tensor:
    """The plain form of the fused operation ``noise``: the network's inputs.

    Args:
        images: uint8 (N, H, W, C).
        eps: float32 (N * draws, C, H, W), image-major.

    Returns:
        float32 (N * draws, C, H, W): ``input_scale * (signal * x + noise * eps)``.
    """
    x = normalise(images).repeat_interleave(len(eps) // len(images), dim=0)
    return c.input_scale * (c.signal * x + c.noise * eps)


def coefficients_at(config: DetectorConfig, timestep: int | None = None) -> Coefficients:
    """The affine maps around the network at ``timestep`` (default: the configured k)."""
    t = config.diffusion.timestep if timestep is None else timestep
    bar = schedule.alpha_bar(config.diffusion)[t]
    return schedule.coefficients(config.unet.prediction, float(bar), config.unet.sigma_data)


def reconstruct(model: Network, x_k: Tensor, timestep: int, config: DetectorConfig) -> Tensor:
    """x~ from a noised image in one network call, whatever the parametrisation."""
    c = coefficients_at(config, timestep)
    t = torch.full((len(x_k),), timestep, device=x_k.device)
    return c.skip * x_k + c.out * model(c.input_scale * x_k, t)


def noised(x: Tensor, eps: Tensor, timestep: int, config: DetectorConfig) -> Tensor:
    """x_k = sqrt(alpha_bar_k) x + sqrt(1 - alpha_bar_k) eps."""
    c = coefficients_at(config, timestep)
    return c.signal * x + c.noise * eps


def one_shot(model: Network, x: Tensor, eps: Tensor, config: DetectorConfig) -> Tensor:
    """Algorithm 1: noise to the configured k, denoise in one step."""
    k = config.diffusion.timestep
    return reconstruct(model, noised(x, eps, k, config), k, config)


def full_shot(model: Network, x: Tensor, eps: Tensor, config: DetectorConfig, generator: torch.Generator | None = None) -> Tensor:
    """Algorithm 2: noise to k, then every ancestral step down to the image."""
    return arbitrary_shot(model, x, eps, config, config.diffusion.timestep + 1, generator)


def arbitrary_shot(
    model: Network,
    x: Tensor,
    eps: Tensor,
    config: DetectorConfig,
    steps: int,
    generator: torch.Generator | None = None,
    step_noise: Tensor | None = None,
) -> Tensor:
    """Algorithm 3: noise to k, then ``steps`` ancestral steps on a respaced schedule (Nichol and Dhariwal, arXiv 2102.09672).

    One step is Algorithm 1, k + 1 steps (0-based k) are Algorithm 2.  The second coefficient of the posterior mean is DDPM's
    sqrt(alpha_t), where the paper prints sqrt(alpha_bar_t).

    Args:
        step_noise: standard normal (N, steps - 1, C, H, W), one for each step but the last; None: drawn from ``generator``.

    Raises:
        ConfigError: ``steps`` is not in [1, k + 1].
    """
    k = config.diffusion.timestep
    if not 1 <= steps <= k + 1:
        raise ConfigError(expected("steps", f"an integer in [1, {k + 1}]", steps))
    # From k down, evenly; a single step is k alone.
    times = np.unique(np.round(np.linspace(0, k, steps)).astype(int))[::-1] if steps > 1 else np.array([k])
    bars = schedule.alpha_bar(config.diffusion)[times]
    x_t = noised(x, eps, k, config)
    for i, t in enumerate(times):
        x0 = reconstruct(model, x_t, int(t), config)
        if i == len(times) - 1:
            return x0
        bar, previous = float(bars[i]), float(bars[i + 1])
        alpha = bar / previous
        beta = 1.0 - alpha
        mean = (previous**0.5 * beta / (1.0 - bar)) * x0 + (alpha**0.5 * (1.0 - previous) / (1.0 - bar)) * x_t
        variance = beta * (1.0 - previous) / (1.0 - bar)
        if step_noise is None:
            z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
        else:
            z = step_noise[:, i]
        x_t = mean + variance**0.5 * z
    raise AssertionError("unreachable: times is never empty")
