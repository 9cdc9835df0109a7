"""Staying within a budget: projection onto the ball and the box [0, 1] at once, random starts, and uint8 within the budget.

Images are float tensors (N, C, H, W) in [0, 1]; budgets are in the same units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advrad_fast.evaluation.rows import Budget

_BISECTIONS = 30  # of a factor in (0, 1]: float32 has 24 bits


def norms(delta: Tensor) -> Tensor:
    """The l2 norm of each image: (N, ...) -> float64 (N,)."""
    return delta.double().flatten(1).square().sum(dim=1).sqrt()


def project(y: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """The point nearest to ``y`` (in l2) within the budget around ``x`` and in [0, 1].

    For l2 the conditions of Karush, Kuhn and Tucker give clip(x + t (y - x), 0, 1) with the largest t in [0, 1] that keeps the
    budget; the distance from x rises with t, so t is found by bisection.

    Args:
        y: (N, C, H, W), any finite values.
        x: the same shape, in [0, 1].
    """
    if budget.norm == "linf":
        return torch.minimum(torch.maximum(y, x - budget.size), x + budget.size).clamp(0.0, 1.0)
    delta = y - x
    inside = norms(y.clamp(0.0, 1.0) - x) <= budget.size
    if bool(inside.all()):
        return y.clamp(0.0, 1.0)
    low = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    high = torch.ones_like(low)
    # Without the box t would be size / |delta|; clipping only shortens, so t is at least that.
    low = torch.maximum(low, 0.999999 * budget.size / norms(delta).clamp_min(1e-30)).clamp_max(1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = norms(_along(x, delta, middle) - x) <= budget.size
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        if bool(((high - low) < 1e-7 * high).all()):
            break
    return _along(x, delta, torch.where(inside, torch.ones_like(low), low))


def _along(x: Tensor, delta: Tensor, t: Tensor) -> Tensor:
    return (x + t.to(x.dtype)[:, None, None, None] * delta).clamp(0.0, 1.0)


def step(x: Tensor, gradient: Tensor, size: Tensor | float, budget: Budget) -> Tensor:
    """x moved along the gradient: by its sign for l_inf, by its direction for l2 (an image whose gradient is 0 stays)."""
    if budget.norm == "linf":
        return x + size * gradient.sign()
    return x + size * gradient / norms(gradient).clamp_min(1e-30).to(x.dtype)[:, None, None, None]


def random_start(x: Tensor, budget: Budget, generators: Sequence[torch.Generator]) -> Tensor:
    """A random point within the budget and the box: uniform for l_inf, in a uniform direction on the sphere for l2."""
    if budget.norm == "linf":
        noise = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x)
        return project(x + budget.size * (2.0 * noise - 1.0), x, budget)
    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
    return project(step(x, noise, budget.size, budget), x, budget)


def levels(adversarial: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """The change that a camera could deliver: whole steps of 1/255, within the budget and the box.

    l_inf: each value is rounded to the nearest level and held within floor(255 size) of the original.

    l2: a change of norm 0.2 over a 256 x 256 image is a tenth of a level a pixel, which rounding would erase.  So the change is
    scaled up, to the largest factor at which its rounded form keeps the budget: large values stay, small ones vanish.  What
    is left of the budget goes, one level a value, to the values that were nearest to being rounded up.

    Args:
        adversarial, x: (N, C, H, W) in [0, 1]; x on the lattice.

    Returns:
        float32 (N, C, H, W) of whole numbers d: (255 x + d) / 255 is the image.
    """
    base = (x * 255.0).round()
    wanted = adversarial * 255.0 - base
    if budget.norm == "linf":
        most = float(int(budget.size * 255.0 + 1e-6))
        return _boxed(wanted.round().clamp(-most, most), base)
    limit = (budget.size * 255.0) ** 2 + 1e-6

    def rounded(factor: Tensor) -> Tensor:
        return _boxed((wanted * factor.to(wanted.dtype)[:, None, None, None]).round(), base)

    def fits(factor: Tensor) -> Tensor:
        return rounded(factor).double().flatten(1).square().sum(dim=1) <= limit

    low = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    # A factor at which the largest value alone breaks the budget; the box may keep it from doing so.
    high = (2.0 * budget.size * 255.0 + 2.0) / wanted.abs().flatten(1).amax(dim=1).double().clamp_min(1e-12)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        good = fits(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return _fill(rounded(low), wanted * low.to(wanted.dtype)[:, None, None, None], base, limit)


def _boxed(change: Tensor, base: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(change, -base), 255.0 - base)


def _fill(change: Tensor, wanted: Tensor, base: Tensor, limit: float) -> Tensor:
    """Spend what ``change`` leaves of the budget on the values where ``wanted`` lies furthest beyond it."""
    sign = wanted.sign()
    rest = (wanted - change) * sign  # how far each value was rounded towards 0
    room = torch.where(sign > 0, base + change < 255.0, base + change > 0.0) & (sign != 0)
    rest = torch.where(room, rest, torch.full_like(rest, -2.0)).flatten(1)
    cost = (2.0 * change.abs() + 1.0).double().flatten(1)
    left = limit - change.double().flatten(1).square().sum(dim=1)
    order = rest.argsort(dim=1, descending=True, stable=True)
    spent = cost.gather(1, order).cumsum(dim=1)
    chosen = (spent <= left[:, None]) & (rest.gather(1, order) > 0.0)
    more = torch.zeros_like(rest).scatter(1, order, chosen.to(rest.dtype))
    return change + sign * more.view_as(change)
