"""Projected gradient descent on the score, with expectation over the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.errors import ConfigError, expected
from advrad_fast.evaluation.attacks.pipeline import Attacked, ScorePipeline, signs_of, to_float, to_uint8
from advrad_fast.evaluation.attacks.projection import levels, project, random_start, step
from advrad_fast.evaluation.rows import Budget


@dataclass(frozen=True)
class PGD:
    """Settings.

    Attributes:
        steps: gradient steps.
        eot: draws of the noise that a gradient is averaged over, fresh in every step.
        restarts: random starts; the best is kept.
        first_step, last_step: step size as a share of the budget; it falls geometrically from one to the other.
        temperature: the gradient is that of a smooth maximum, T log sum exp(map / T) with T this share of the map's maximum,
            which falls to 0 (the maximum itself) at three quarters of the steps.  The plain maximum sees one pixel at a time.
        checks: draws, the same for all candidates, that the attacker chooses its best by.
    """

    steps: int = 100
    eot: int = 8
    restarts: int = 1
    first_step: float = 0.25
    last_step: float = 0.02
    temperature: float = 0.1
    checks: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "eot", "restarts", "checks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(expected(name, "an integer of at least 1", value))
        for name in ("first_step", "last_step"):
            if not 0.0 < getattr(self, name) <= 2.0:
                raise ConfigError(expected(name, "a number in (0, 2]", getattr(self, name)))
        if not 0.0 <= self.temperature <= 10.0:
            raise ConfigError(expected("temperature", "a number in [0, 10]", self.temperature))

    def step_size(self, index: int) -> float:
        """The share of the budget that step ``index`` takes."""
        share = index / max(self.steps - 1, 1)
        return float(self.first_step * (self.last_step / self.first_step) ** share)


def pgd(
    pipeline: ScorePipeline,
    images: NDArray[np.uint8],
    labels: Sequence[int],
    budget: Budget,
    settings: PGD,
    *,
    generators: Sequence[torch.Generator],
    threshold: float | None = None,
) -> Attacked:
    """Push each image's score as far as the budget allows, away from its label.

    Args:
        pipeline: of the detector, or of another model for a transferred attack.
        images: uint8 (N, H, W, C), of the pipeline's size.
        labels: N of 0 and 1.
        generators: one an image.
        threshold: the margin version: an image is done once all draws of two steps on end are on the wrong side of it.

    Returns:
        For each image the best of its starts, of the image as it is, and of their forms rounded to uint8.
    """
    x = to_float(images, pipeline.device)
    signs = signs_of(labels, pipeline.device)
    candidates = [x]
    queries = 0
    for _ in range(settings.restarts):
        found, used = _descend(pipeline, x, signs, budget, settings, generators, threshold)
        candidates += found
        queries += used
    noise = pipeline.draw(generators, settings.checks)
    return choose(pipeline, x, signs, candidates, budget, noise, queries)


def choose(
    pipeline: ScorePipeline, x: Tensor, signs: Tensor, candidates: Sequence[Tensor], budget: Budget, noise: Tensor, queries: int
) -> Attacked:
    """Of candidates (N, C, H, W) the best of each image, as floats and as uint8, all judged on the same ``noise``."""
    best, gain = _best(pipeline, candidates, signs, noise)
    # The best float image need not be the best once rounded: all are tried.
    rounded = [(x * 255.0 + levels(c, x, budget)).round() / 255.0 for c in candidates]
    best_rounded, rounded_gain = _best(pipeline, rounded, signs, noise)
    count = queries + 2 * len(candidates)
    return Attacked(best, to_uint8(best_rounded), gain.cpu().numpy(), rounded_gain.cpu().numpy(), count)


def _best(pipeline: ScorePipeline, candidates: Sequence[Tensor], signs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    gains = torch.stack([pipeline.gains(c, signs, noise) for c in candidates])
    gain, index = gains.max(dim=0)
    return torch.stack(list(candidates))[index, torch.arange(len(index), device=index.device)], gain


def _descend(
    pipeline: ScorePipeline,
    x: Tensor,
    signs: Tensor,
    budget: Budget,
    settings: PGD,
    generators: Sequence[torch.Generator],
    threshold: float | None,
) -> tuple[list[Tensor], int]:
    """One start: the last iterate and the one whose step looked best."""
    adversarial = random_start(x, budget, generators)
    best, best_gain = adversarial.clone(), torch.full_like(signs, -math.inf)
    flipped = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    active = torch.arange(len(x), device=x.device)
    queries = 0
    for index in range(settings.steps):
        chosen = adversarial[active].requires_grad_(True)
        noise = pipeline.draw([generators[i] for i in active.tolist()], settings.eot)
        maps = pipeline.maps(chosen, noise)
        heights = maps.detach().amax(dim=(2, 3))
        sign = signs[active]
        temperature = settings.temperature * max(0.0, 1.0 - index / (0.75 * settings.steps))
        value = _smooth_maximum(maps, heights, temperature) if temperature > 0.0 else maps.amax(dim=(2, 3))
        (gradient,) = torch.autograd.grad((value.mean(dim=1) * sign).sum(), chosen)
        queries += 1

        gain = (heights * sign[:, None]).mean(dim=1)
        better = gain > best_gain[active]
        best[active[better]], best_gain[active[better]] = chosen.detach()[better], gain[better]
        if threshold is not None:
            wrong = torch.where(sign[:, None] > 0, heights > threshold, heights <= threshold).all(dim=1)
            flipped[active] = torch.where(wrong, flipped[active] + 1, 0)
            keep = flipped[active] < 2
            best[active[~keep]] = chosen.detach()[~keep]
            active, chosen, gradient = active[keep], chosen[keep], gradient[keep]
            if not len(active):
                break
        moved = step(chosen.detach(), gradient, settings.step_size(index) * budget.size, budget)
        adversarial[active] = project(moved, x[active], budget)
    return [adversarial, best], queries


def _smooth_maximum(maps: Tensor, heights: Tensor, temperature: float) -> Tensor:
    """T log sum exp(map / T), T a share of each map's maximum: (N, M, H, W) -> (N, M)."""
    scale = (temperature * heights).clamp_min(1e-12)
    return scale * torch.logsumexp(maps.flatten(2) / scale[:, :, None], dim=2)
