"""Algorithm 4 of AdvRAD: the multiscale reconstruction error, the anomaly map and the score, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advrad_fast.config import SCALES, ScoreConfig
from advrad_fast.reference.diffusion import normalise
from advrad_fast.schedule import Coefficients


def scale_errors(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Err_l at full size, one channel a scale.

    Args:
        x, reconstruction: (N, C, H, W); H and W multiples of 8.

    Returns:
        (N, 4, H, W): mean over channels of (down_l(x) - down_l(x~))^2, area-averaged down, repeated up (nearest).
    """
    difference = x - reconstruction  # pooling is linear: down(x) - down(x~) = down(x - x~)
    levels = []
    for scale in SCALES:
        error = F.avg_pool2d(difference, scale).square().mean(dim=1, keepdim=True)
        levels.append(error.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3))
    return torch.cat(levels, dim=1)


def mean_filter(maps: Tensor, size: int) -> Tensor:
    """The mean over the part of a size x size window that lies inside the image: (N, C, H, W) -> the same."""
    # Rows, then columns: the window inside the image is a rectangle, so the mean of means is the mean.
    rows = F.avg_pool2d(maps, (size, 1), stride=1, padding=(size // 2, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, size), stride=1, padding=(0, size // 2), count_include_pad=False)


def error_map(errors: Tensor, config: ScoreConfig) -> Tensor:
    """E = mean_filter(sum_l w_l Err_l): (N, 4, H, W) from :func:`scale_errors` -> (N, H, W)."""
    weights = torch.tensor(config.scale_weights, dtype=errors.dtype, device=errors.device)
    combined = (errors * weights[None, :, None, None]).sum(dim=1, keepdim=True)
    return mean_filter(combined, config.filter_size)[:, 0]


def anomaly_map(error: Tensor, mu: Tensor, inverse_spread: Tensor) -> Tensor:
    """|E - mu| / spread: (N, H, W), and (H, W) for the normal maps."""
    return (error - mu).abs() * inverse_spread


def reconstruction_error(
    images: Tensor,
    outputs: Tensor,
    eps: Tensor,
    mu: Tensor,
    inverse_spread: Tensor,
    config: ScoreConfig,
    c: Coefficients,
) -> tuple[Tensor, Tensor]:
    """The plain form of the fused operation ``reconstruction_error``.

    Args:
        images: uint8 (N, H, W, C).
        outputs: float32 (N * draws, C, H, W), the network's raw outputs, image-major.
        eps: float32 (N * draws, C, H, W), the noise of the network's inputs.
        mu, inverse_spread: float32 (H, W), the normal map and one over its spread (ones where unused).

    Returns:
        scores (N,) and anomaly maps (N, H, W); the error is averaged over an image's draws before the filter.
    """
    draws = len(outputs) // len(images)
    x = normalise(images).repeat_interleave(draws, dim=0)
    return from_outputs(x, c.signal * x + c.noise * eps, outputs, draws, mu, inverse_spread, config, c)


def from_outputs(
    x: Tensor,
    x_k: Tensor,
    outputs: Tensor,
    draws: int,
    mu: Tensor,
    inverse_spread: Tensor,
    config: ScoreConfig,
    c: Coefficients,
) -> tuple[Tensor, Tensor]:
    """Algorithm 4 from images x, their noised forms x_k and the network's outputs, (N * draws, C, H, W) each."""
    errors = scale_errors(x, c.skip * x_k + c.out * outputs)
    errors = errors.reshape(-1, draws, *errors.shape[1:]).mean(dim=1)
    maps = anomaly_map(error_map(errors, config), mu, inverse_spread)
    return maps.amax(dim=(1, 2)), maps
