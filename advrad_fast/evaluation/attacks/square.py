"""Square Attack (Andriushchenko et al., arXiv 1912.00049) on a score: random search over square windows, without a gradient.

The search is on draws of the noise that are the same for the image as it stands and for the next proposal, and both get new ones
every ``refresh`` queries: an incumbent cannot live on a lucky draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.errors import ConfigError, expected
from advrad_fast.evaluation.attacks.pgd import choose
from advrad_fast.evaluation.attacks.pipeline import Attacked, ScorePipeline, signs_of, to_float
from advrad_fast.evaluation.attacks.projection import norms, project
from advrad_fast.evaluation.rows import Budget

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: the paper's schedule for the share p


@dataclass(frozen=True)
class Square:
    """Settings.

    Attributes:
        queries: proposals tried.
        eot: draws that a proposal is judged by.
        share: p, the share of the image that the first squares cover.
        refresh: queries after which the draws are renewed.
        checks: as :class:`advrad_fast.evaluation.attacks.pgd.PGD` has it.
    """

    queries: int = 500
    eot: int = 2
    share: float = 0.8
    refresh: int = 25
    checks: int = 8

    def __post_init__(self) -> None:
        for name in ("queries", "eot", "refresh", "checks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(expected(name, "an integer of at least 1", value))
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(expected("share", "a number in (0, 1]", self.share))

    def side(self, query: int, height: int, width: int) -> int:
        """The square's side at a query."""
        halvings = sum(query * 10_000 > limit * self.queries for limit in _HALVINGS)
        side = round(math.sqrt(self.share / 2**halvings * height * width))
        return min(max(side, 1), height - 1, width - 1)


def square(
    pipeline: ScorePipeline,
    images: NDArray[np.uint8],
    labels: Sequence[int],
    budget: Budget,
    settings: Square,
    *,
    generators: Sequence[torch.Generator],
) -> Attacked:
    """As :func:`advrad_fast.evaluation.attacks.pgd.pgd`, by queries of the score alone."""
    x = to_float(images, pipeline.device)
    signs = signs_of(labels, pipeline.device)
    start = _stripes if budget.norm == "linf" else _tiles
    delta = torch.stack([start(x[i], budget.size, g) for i, g in enumerate(generators)])
    gain = torch.full_like(signs, -math.inf, dtype=torch.float64)
    noise = pipeline.draw(generators, settings.eot)
    for query in range(settings.queries):
        if query % settings.refresh == 0:
            noise = pipeline.draw(generators, settings.eot)
            gain = pipeline.gains(project(x + delta, x, budget), signs, noise)
        side = settings.side(query, x.shape[2], x.shape[3])
        move = _move_linf if budget.norm == "linf" else _move_l2
        proposal = torch.stack([move(delta[i], budget.size, side, g) for i, g in enumerate(generators)])
        found = pipeline.gains(project(x + proposal, x, budget), signs, noise)
        better = found > gain
        delta[better], gain[better] = proposal[better], found[better]
    noise = pipeline.draw(generators, settings.checks)
    return choose(pipeline, x, signs, [x, project(x + delta, x, budget)], budget, noise, settings.queries)


def _signs(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    signs: Tensor = torch.randint(0, 2, shape, generator=g) * 2.0 - 1.0
    return signs


def _place(limit: int, g: torch.Generator) -> int:
    return int(torch.randint(0, limit + 1, (), generator=g))


def _stripes(x: Tensor, size: float, g: torch.Generator) -> Tensor:
    """Vertical stripes one pixel wide."""
    channels, height, width = x.shape
    return (size * _signs((channels, 1, width), g)).expand(channels, height, width).to(x).clone()


def _move_linf(delta: Tensor, size: float, side: int, g: torch.Generator) -> Tensor:
    """One square set to +size or -size in each channel."""
    channels, height, width = delta.shape
    top, left = _place(height - side, g), _place(width - side, g)
    moved = delta.clone()
    moved[:, top : top + side, left : left + side] = size * _signs((channels, 1, 1), g).to(delta)
    return moved


def _bump(side: int, g: torch.Generator) -> Tensor:
    """The paper's eta, norm 1: a pyramid of rectangles above its negative, or the same on its side: (side, side)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    half = max(side // 2, 1)

    def pyramid(rows: int, row: Tensor) -> Tensor:
        reach = torch.minimum(torch.minimum(row, rows - 1 - row), torch.minimum(x, side - 1 - x)).clamp_min(0)
        most = max(int(reach.max()), 0)
        weights = torch.cumsum(1.0 / (torch.arange(most + 1, 0, -1).double() ** 2), dim=0)
        return torch.take(weights, reach.clamp_max(most)).float()

    eta: Tensor = torch.where(y < half, pyramid(half, y.clamp_max(half - 1)), -pyramid(side - half, (y - half).clamp_min(0)))
    eta = eta / norms(eta[None]).to(eta)
    return eta.T.contiguous() if bool(torch.randint(0, 2, (), generator=g)) else eta


def _tiles(x: Tensor, size: float, g: torch.Generator) -> Tensor:
    """Bumps in a grid of five by five, of random sign in each channel, with the whole budget."""
    channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros(channels, height, width)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            delta[:, top : top + side, left : left + side] = _bump(side, g) * _signs((channels, 1, 1), g)
    scaled: Tensor = size * delta / delta.norm()
    return scaled.to(x)


def _move_l2(delta: Tensor, size: float, side: int, g: torch.Generator) -> Tensor:
    """What two squares hold of the budget, and what is unused of it, goes into a bump in the first; the second is emptied."""
    channels, height, width = delta.shape
    side = min(max(side, 3), height - 1, width - 1)
    (top, left), (top2, left2) = ((_place(height - side, g), _place(width - side, g)) for _ in range(2))
    first = (slice(None), slice(top, top + side), slice(left, left + side))
    second = (slice(None), slice(top2, top2 + side), slice(left2, left2 + side))
    mask = torch.zeros_like(delta, dtype=torch.bool)
    mask[first] = mask[second] = True
    unused = max(size**2 - float(norms(delta[None])[0]) ** 2, 0.0)
    held = (delta * mask).square().sum(dim=(1, 2), keepdim=True)
    kept = delta[first] / delta[first].flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    bump = kept + (_bump(side, g) * _signs((channels, 1, 1), g)).to(delta)
    bump = bump / bump.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    moved = delta.clone()
    moved[second] = 0.0
    moved[first] = bump * (held + unused / channels).sqrt()
    return moved
