"""Randomised smoothing (Theorem 5.1 of AdvRAD, after Cohen et al., arXiv 1902.02918) in plain PyTorch.

The detector inside sees x + delta and nothing else: delta, lattice noise of :mod:`advrad_fast.lattice`, is the diffusion noise at
the same time, and the reconstruction is held against x + delta.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from advrad_fast import lattice
from advrad_fast.config import ScoreConfig
from advrad_fast.reference import score
from advrad_fast.schedule import Coefficients


def draw_lattice_noise(shape: Sequence[int], sigma: float, *, seed: int, draws: int, image_ids: Sequence[int]) -> Tensor:
    """int32 (len(image_ids) * draws, C, H, W), image-major, in steps of 1/255; ``sigma`` in [0, 1] pixel units."""
    count = int(np.prod(shape))
    rows = [lattice.integers(count, sigma, seed=seed, draw=d, image_id=i) for i in image_ids for d in range(draws)]
    return torch.from_numpy(np.stack(rows)).reshape(-1, *shape)


def smoothed(images: Tensor, z: Tensor) -> Tensor:
    """x + delta: the noise is added in integers, before any scaling, and nothing is clipped.

    Args:
        images: uint8 (N, H, W, C).
        z: int32 (N * draws, C, H, W), image-major.

    Returns:
        float32 (N * draws, C, H, W), where [-1, 1] is the range of a pixel.
    """
    x = images.permute(0, 3, 1, 2).int().repeat_interleave(len(z) // len(images), dim=0)
    return (x + z).float() * (2.0 / 255.0) - 1.0


def lattice_inputs(images: Tensor, z: Tensor, c: Coefficients) -> Tensor:
    """The plain form of ``noise`` with lattice noise: float32 (N * draws, C, H, W)."""
    return c.input_scale * (c.signal * smoothed(images, z))


def smoothed_error(
    images: Tensor,
    outputs: Tensor,
    z: Tensor,
    mu: Tensor,
    inverse_spread: Tensor,
    config: ScoreConfig,
    c: Coefficients,
    draws: int = 1,
) -> tuple[Tensor, Tensor]:
    """The plain form of ``reconstruction_error`` with lattice noise.

    Args:
        outputs, z: as in :func:`lattice_inputs`.
        draws: how many neighbouring draws share one score.

    Returns:
        scores (len(z) / draws,) and anomaly maps (len(z) / draws, H, W).
    """
    x = smoothed(images, z)
    return score.from_outputs(x, c.signal * x, outputs, draws, mu, inverse_spread, config, c)


def votes(scores: Tensor, thresholds: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form of the fused operation ``votes``.

    Args:
        scores: float32 (N, draws).
        thresholds: float32 (T,).
        ranks: int64 (R,), 0-based: 0 is the smallest score.

    Returns:
        counts int64 (N, T), how many scores are above each threshold, and order statistics float32 (N, R).  A NaN among an
        image's scores makes its counts -1 and its order statistics NaN: a fault is no vote.
    """
    counts = (scores[:, :, None] > thresholds).sum(dim=1)
    statistics = scores.sort(dim=1).values[:, ranks]
    fault = scores.isnan().any(dim=1)
    counts[fault], statistics[fault] = -1, torch.nan
    return counts, statistics
