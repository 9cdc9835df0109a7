"""From trained weights to a detector: choose k, s and the score on held-out normals, compute the normal maps, calibrate.

Choices are made on *selection* normals against synthetic defects made from them; thresholds come from *calibration* normals
that nothing was chosen on, so that the conformal bound of :mod:`advrad_fast.calibrate` holds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.config import SPREAD_FLOOR, DetectorConfig, ScoreConfig
from advrad_fast.evaluation.metrics import auroc, auroc_interval
from advrad_fast.reference import diffusion, score
from advrad_fast.reference.unet import UNet
from advrad_fast.training.batchnorm import fold
from advrad_fast.training.synthetic import benign_changes, synthetic_defects

_log = logging.getLogger(__name__)

Weights = tuple[float, float, float, float]

#: What is tried.
TIMESTEPS = (50, 75, 100, 150)
FILTER_SIZES = (7, 11, 15, 21, 31)
DEFECTS_A_NORMAL = 4
ONE_SIGMA = 0.6827  # two-sided coverage of one standard error
FITTED = 60  # training normals that a trial's maps are made of
FOLDED = 48  # training normals whose batch statistics are folded into the network

#: The noise of fitting: an image id for every image, away from inspection's id 0.
FIT_SEED = 0x5EED


class NormalMaps(NamedTuple):
    """Per-pixel statistics of the error over normals: float32 (H, W); ``spread`` is ones where the score does not use it."""

    mu: Tensor
    spread: Tensor


def network_at(net: UNet, images: NDArray[np.uint8], config: DetectorConfig) -> UNet:
    """The network of a detector at the configured k, from the trained one and normals (N, H, W, C)."""
    return fold(net, *folding_batch(images, config))


def folding_batch(images: NDArray[np.uint8], config: DetectorConfig) -> tuple[Tensor, Tensor]:
    """Noised normals at the configured k, as the network sees them, for its batch statistics, and their timesteps."""
    images = images[:: max(1, len(images) // FOLDED)][:FOLDED]
    x = torch.from_numpy(images)
    shape = (x.shape[3], x.shape[1], x.shape[2])
    eps = torch.cat([diffusion.draw_noise(shape, seed=FIT_SEED, draws=1, image_ids=[300_000 + i]) for i in range(len(x))])
    return diffusion.noise(x, eps, diffusion.coefficients_at(config)), torch.full((len(x),), config.diffusion.timestep)


@torch.inference_mode()
def scale_errors(net: UNet, images: NDArray[np.uint8], config: DetectorConfig, *, first_id: int, seed: int = FIT_SEED) -> Tensor:
    """Err_l of every image at the configured k, averaged over the configured draws: float32 (N, 4, H, W).

    ``first_id`` numbers the images, so that each has noise of its own.
    """
    c = diffusion.coefficients_at(config)
    draws, k = config.diffusion.draws, config.diffusion.timestep
    device = next(net.parameters()).device
    rows = []
    for i in range(len(images)):
        image = torch.from_numpy(images[i : i + 1])
        shape = (image.shape[3], image.shape[1], image.shape[2])
        eps = diffusion.draw_noise(shape, seed=seed, draws=draws, image_ids=[first_id + i])
        x_in = diffusion.noise(image, eps, c).to(device)
        outputs = net(x_in, torch.full((draws,), k, device=device)).cpu()
        x = diffusion.normalise(image)
        x_tilde = c.skip * (c.signal * x + c.noise * eps) + c.out * outputs
        rows.append(score.scale_errors(x.expand_as(x_tilde), x_tilde).mean(dim=0))
    return torch.stack(rows)


def filtered(errors: Tensor, size: int) -> Tensor:
    """The mean filter on every scale: (N, 4, H, W) -> the same.  It is linear, so scales can be weighted afterwards."""
    return torch.cat([score.mean_filter(e, size) for e in torch.split(errors, 8)])


def error_maps(smooth: Tensor, weights: Weights) -> Tensor:
    """E from :func:`filtered` errors: (N, 4, H, W) -> (N, H, W)."""
    return torch.einsum("nlhw,l->nhw", smooth, torch.tensor(weights))


def equal_weights(smooth: Tensor) -> Weights:
    """Weights, of sum 1, under which every scale varies equally over normals: (N, 4, H, W) from :func:`filtered`.

    The errors at the fine scales are several times larger: with equal weights they alone would decide.
    """
    spread = smooth.std(dim=0).mean(dim=(1, 2)).double().clamp_min(1e-12)
    w1, w2, w4, w8 = (1.0 / spread / (1.0 / spread).sum()).tolist()
    return (w1, w2, w4, w8)


def normal_maps(maps: Tensor, config: ScoreConfig) -> NormalMaps:
    """mu, and the spread where the score uses it, from the normals' :func:`error_maps`.

    The spread is the per-pixel standard deviation with a floor in quadrature, half its mean over the image, so that
    a pixel where a few normals happen to agree does not dominate.
    """
    mu = maps.mean(dim=0)
    if not config.spread or len(maps) < 2:
        return NormalMaps(mu, torch.ones_like(mu))
    spread = maps.std(dim=0)
    return NormalMaps(mu, (spread.square() + (SPREAD_FLOOR * spread.mean()).square()).sqrt())


def scores(maps: Tensor, normal: NormalMaps) -> NDArray[np.float64]:
    """The scores of images from their :func:`error_maps`: float64 (N,)."""
    values: NDArray[np.float64] = score.anomaly_map(maps, normal.mu, 1.0 / normal.spread).amax(dim=(1, 2)).double().numpy()
    return values


class Trial(NamedTuple):
    """One setting, how it separated normals from synthetic defects, and one standard error below that."""

    timestep: int
    score: ScoreConfig
    auroc: float
    low: float


def select(
    network: Callable[[DetectorConfig], UNet],
    train: NDArray[np.uint8],
    selection: NDArray[np.uint8],
    config: DetectorConfig,
    *,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
) -> tuple[DetectorConfig, list[Trial]]:
    """Choose k and the filter by the AUROC of selection normals against synthetic defects made from them.

    The normals count twice, as they are and in slightly other light (:func:`benign_changes`), so that a setting which takes a
    lamp's ageing for a defect loses.  Of the trials within one standard error of the best, the one with the most noise (the
    largest k) is taken, as noise is what drowns an adversarial perturbation, and of these the one with the largest filter,
    which averages most of it out.

    A score that uses the spread weighs the scales by :func:`equal_weights`; one that does not keeps the weights of ``config``.

    Args:
        network: gives the network to use at a configuration's k.

    Returns:
        the configuration with the choice in it, and every trial, the chosen one first, then by AUROC.
    """
    normals = np.concatenate([selection, benign_changes(selection, train, seed)])
    defects = synthetic_defects(selection, DEFECTS_A_NORMAL * len(selection), seed)
    count = len(normals)
    labels = np.r_[np.zeros(count, dtype=int), np.ones(len(defects), dtype=int)]
    train = train[:: max(1, len(train) // FITTED)]  # enough for trial maps; the final ones use all
    trials = []
    for k in timesteps:
        at_k = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, timestep=k))
        net = network(at_k)
        normal = scale_errors(net, train, at_k, first_id=1)
        test = scale_errors(net, np.concatenate([normals, defects]), at_k, first_id=100_000)
        for size in FILTER_SIZES:
            smooth = filtered(normal, size)
            weights = equal_weights(smooth) if config.score.spread else config.score.scale_weights
            candidate = ScoreConfig(weights, size, config.score.spread)
            maps = normal_maps(error_maps(smooth, weights), candidate)
            values = scores(error_maps(filtered(test, size), weights), maps)
            low, _ = auroc_interval(labels, values, level=ONE_SIGMA)
            trials.append(Trial(k, candidate, auroc(labels, values), low))
        best = max(trials, key=lambda t: t.auroc)
        _log.info("k=%d tried; best so far: k=%d, s=%d, AUROC %.4f", k, best.timestep, best.score.filter_size, best.auroc)
    trials.sort(key=lambda t: -t.auroc)
    chosen = max((t for t in trials if t.auroc >= trials[0].low), key=lambda t: (t.timestep, t.score.filter_size))
    trials.remove(chosen)
    trials.insert(0, chosen)
    diffusion_config = dataclasses.replace(config.diffusion, timestep=chosen.timestep)
    return dataclasses.replace(config, diffusion=diffusion_config, score=chosen.score), trials
