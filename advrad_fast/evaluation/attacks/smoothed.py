"""An attack on the smoothed detector: move the majority vote of A(x + delta) over lattice noise delta.

The gradient is taken through a soft vote, sigmoid((A - h) / T) with T the spread of A over the draws: it follows the probability
of a vote, which is what a certificate bounds, where the mean of A would be ruled by a few large scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.errors import ConfigError, expected
from advrad_fast.evaluation.attacks.pipeline import ScorePipeline, signs_of, to_float, to_uint8
from advrad_fast.evaluation.attacks.projection import levels, project, random_start, step
from advrad_fast.evaluation.rows import Budget
from advrad_fast.model import ModelFile
from advrad_fast.smoothing import Smoothing


class SmoothedPipeline(ScorePipeline):
    """The score of x + delta that a certificate's votes are drawn from, differentiable in x.

    Args:
        model: the detector's model file.
        sigma: one of ``model.sigmas``.
        device: of PyTorch.

    Raises:
        ConfigError: the model has no such sigma.
    """

    def __init__(self, model: ModelFile, sigma: float, *, device: str = "cpu") -> None:
        if sigma not in model.sigmas:
            raise ConfigError(expected("sigma", f"one of the model's {list(model.sigmas)}", sigma))
        self.smoothing: Smoothing = model.smoothing[model.sigmas.index(sigma)]
        at_sigma = dataclasses.replace(
            model,
            config=self.smoothing.config(model.config),
            weights=self.smoothing.weights(model.config.unet, model.weights),
            mu=self.smoothing.mu,
            spread=self.smoothing.spread,
            smoothing=(),
        )
        super().__init__(at_sigma, device=device)

    def draw(self, generators: Sequence[torch.Generator], count: int) -> Tensor:
        """Rounded Gaussian noise in steps of 1/255: float32 (N, count, 1, C, H, W), in [0, 1] pixel units."""
        return (super().draw(generators, count) * (255.0 * self.smoothing.sigma)).round() / 255.0

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        """As :meth:`ScorePipeline.maps`; the detector sees x + delta and nothing else, unclipped."""
        count = noise.shape[1]
        x = self._repeated(self.prepared(images), count) + noise.flatten(0, 2)
        x = x * 2.0 - 1.0
        return self._maps(x, self.coefficients.signal * x, count)


@dataclass(frozen=True)
class SmoothedAttack:
    """What :func:`attack_smoothed` found: uint8 (N, H, W, C) within the radius, and the share of the attacker's own draws that
    vote DEFECT there, float64 (N,)."""

    rounded: NDArray[np.uint8]
    defect_share: NDArray[np.float64]


def attack_smoothed(
    pipeline: SmoothedPipeline,
    images: NDArray[np.uint8],
    labels: Sequence[int],
    radius: float,
    threshold: float,
    *,
    generators: Sequence[torch.Generator],
    steps: int = 200,
    eot: int = 8,
    checks: int = 64,
) -> SmoothedAttack:
    """Push the smoothed decision away from ``labels`` (0: it says OK, 1: DEFECT) within an l2 radius, by PGD.

    Args:
        images: uint8 (N, H, W, C), prepared.
        radius: l2 in [0, 1] units; no image that is returned lies further.
        threshold: a vote is DEFECT above it.
        generators: one an image.
        steps, eot: gradient steps, and draws a gradient is averaged over.
        checks: draws by which the attacker chooses among its iterates.
    """
    budget = Budget("l2", radius, f"l2 {radius:g}")
    x = to_float(images, pipeline.device)
    signs = signs_of(labels, pipeline.device)
    moved = random_start(x, budget, generators)
    candidates = [x]
    for index in range(steps):
        chosen = moved.requires_grad_(True)
        scores = pipeline.scores(chosen, pipeline.draw(generators, eot))
        spread = scores.detach().std(dim=1, keepdim=True).nan_to_num(0.0).clamp_min(1e-3 * abs(threshold) + 1e-12)
        # Far from the threshold a sigmoid is flat: its argument's own slope keeps the gradient alive.
        margin = (scores - threshold) / spread
        soft = torch.sigmoid(margin) + 0.01 * margin
        (gradient,) = torch.autograd.grad((soft.mean(dim=1) * signs).sum(), chosen)
        size = 0.25 * (0.02 / 0.25) ** (index / max(steps - 1, 1)) * radius
        moved = project(step(chosen.detach(), gradient, size, budget), x, budget)
        if index in (steps // 2, steps - 1):
            candidates.append(moved.clone())
    noise = pipeline.draw(generators, checks)
    rounded = [(x * 255.0 + levels(c, x, budget)).round() / 255.0 for c in candidates]
    with torch.no_grad():
        shares = torch.stack([(pipeline.scores(c, noise) > threshold).double().mean(dim=1) for c in rounded])
    best = (shares * signs.double()).argmax(dim=0)
    every = torch.arange(len(x), device=x.device)
    return SmoothedAttack(to_uint8(torch.stack(rounded)[best, every]), shares[best, every].cpu().numpy())
