"""One statement an image for every threshold: certified scores from order statistics, and certified AUROC.

A(x + delta) is the score of a noised image and p* the probability from which on a radius r is certified.  DEFECT is certified at
every threshold h with P[A > h] >= p*, that is below a quantile of A, and OK at every h with P[A <= h] >= p*, from another one on.
A quantile is bounded by an order statistic.  With k the least count of n draws that makes
P[Binomial(n, p*) >= k] <= alpha (equally: the least whose Clopper-Pearson bound is >= p*):

- lower score: the k-th largest of the draws.  With confidence 1 - alpha the smoothed detector says DEFECT at *every* threshold
  below it, for every image closer than r.
- upper score: the k-th smallest.  With confidence 1 - alpha it says OK at every threshold from it on, for every such image.

*Proof of the first.*  Let Q be the supremum of {h: P[A > h] >= p*}.  For h < Q the statement is true.  It is false only if the
k-th largest draw is above Q, that is if k draws are; but P[A > Q] <= p* as P[A > h] is continuous from the right.  So that has
probability at most P[Binomial(n, p*) >= k] <= alpha.  No continuity of A is needed, ties included.  The second is its mirror.

One statement covers all thresholds, so none is paid for looking at many, nor for choosing one after seeing the scores.  A
lower and an upper score of the same image are two statements, and so are two radii or two images: :func:`split_alpha` makes
them hold jointly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advrad_fast.certify.betting import DecisionTest
from advrad_fast.certify.bounds import vote_probability
from advrad_fast.checks import array, floats, integer, share
from advrad_fast.errors import ConfigError, InferenceError, expected


def certified_rank(draws: int, radius: float, sigma: float, alpha: float = 0.001, *, pixels: int) -> int | None:
    """k: the lower score is the k-th largest of the draws, the upper score the k-th smallest; None where no draw will do.

    0-based among ``draws`` sorted, rising scores that is ``draws - k`` and ``k - 1``.

    Args:
        draws: >= 1, fixed beforehand.
        radius: l2 in [0, 1] pixel units, >= 0.
        sigma: in [0, 1] pixel units.
        pixels: noised values an image.

    Raises:
        ConfigError: a number is out of range, or the radius beyond what any number of draws certifies.
    """
    from scipy.special import betainc

    n, p, alpha = integer("draws", draws, 1), vote_probability(radius, sigma, pixels=pixels), share("alpha", alpha)
    low, high = 0, n + 1  # P[Binomial >= k] falls as k rises
    while high - low > 1:
        k = (low + high) // 2
        if betainc(k, n - k + 1, p) <= alpha:
            high = k
        else:
            low = k
    return high if high <= n else None


def certified_scores(
    scores: ArrayLike, radius: float, *, sigma: float, pixels: int, alpha: float = 0.001
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper scores; the module says what holds of them.

    DEFECT is certified where ``lower > threshold``, OK where ``upper <= threshold``: the rule that the score itself follows.

    Args:
        scores: (..., draws) of A(x + delta), finite, independent draws of each image.
        radius, sigma, pixels, alpha: as for :func:`certified_rank`.

    Returns:
        float64 (...) each; -inf and inf where there are too few draws to certify anything.

    Raises:
        ConfigError: a number is out of range or there is no draw.
        InferenceError: a score is not finite: a fault is no vote.
    """
    ordered = _sorted(scores)
    return _scores(ordered, certified_rank(ordered.shape[-1], radius, sigma, alpha, pixels=pixels))


def least_ok_threshold(scores: ArrayLike, radius: float, *, sigma: float, pixels: int, alpha: float = 0.001) -> float | None:
    """The least threshold from which on :class:`DecisionTest` certifies OK with these draws, in this order.

    As votes are taken to the one that settles it, what later draws may be decides nothing: at that threshold and every one
    above it, OK stands for any larger number of votes.

    Args:
        scores: (draws,) of A(x + delta) of one image, finite.
        radius, sigma, pixels, alpha: as for :class:`DecisionTest`.

    Returns:
        one of the scores, or None where so few draws certify nothing even if all of them agree.

    Raises:
        ConfigError: a number is out of range, or ``scores`` are not (draws,).
        InferenceError: a score is not finite.
    """
    ordered = _sorted(scores)
    if ordered.ndim != 1:
        raise ConfigError(expected("scores", "(draws,)", ordered.shape))
    values, least = np.asarray(scores, dtype=np.float64), None
    for threshold in np.unique(ordered)[::-1].tolist():
        test = DecisionTest(radius, sigma, alpha, pixels=pixels)
        if test.update(values > threshold) != "OK":
            break
        least = threshold
    return least


def certified_auroc(
    labels: ArrayLike,
    scores: ArrayLike,
    radii: Sequence[float] | NDArray[np.floating],
    *,
    sigma: float,
    pixels: int,
    alpha: float = 0.001,
) -> NDArray[np.float64]:
    """The certified AUROC at each radius, from one set of draws: of the lower scores of bad and the upper of good images.

    At any one radius: if all images' statements hold, no perturbation of norm below the radius, one for each image, brings
    the AUROC of the smoothed detector (score: the median of A(x + delta), the thresholds at which it says DEFECT end there)
    below this value.  Each statement fails with probability at most ``alpha``, all m together hold with confidence 1 - m
    ``alpha``: for a joint claim give ``split_alpha(alpha, m)``, or ``split_alpha(alpha, m * len(radii))`` for the whole
    curve.

    Args:
        labels: (images,) of 0 (good) and 1 (bad).
        scores: (images, draws), finite.
        radii: (r,), l2 in [0, 1] pixel units, >= 0.

    Returns:
        float64 (r,), in [0, 1]; ties count half.  It never rises with the radius.

    Raises:
        ConfigError: labels or scores have other shapes, a class is missing, or a number is out of range.
        InferenceError: a score is not finite.
    """
    marks, values, each = array("labels", labels), _sorted(scores), floats("radii", radii)
    if each.ndim != 1:
        raise ConfigError(expected("radii", "(r,)", each.shape))
    if values.ndim != 2 or marks.shape != values.shape[:1]:
        raise ConfigError(expected("labels and scores", "(images,) and (images, draws)", (marks.shape, values.shape)))
    if not np.isin(marks, (0, 1)).all() or (marks == 1).all() or not (marks == 1).any():
        raise ConfigError(expected("labels", "0 (good) and 1 (bad), and images of both", np.unique(marks)[:8].tolist()))
    curve = []
    for r in each.tolist():
        lower, upper = _scores(values, certified_rank(values.shape[-1], r, sigma, alpha, pixels=pixels))
        bad, good = lower[marks == 1], np.sort(upper[marks == 0])
        twice = int(np.searchsorted(good, bad, side="left").sum()) + int(np.searchsorted(good, bad, side="right").sum())
        curve.append(twice / (2 * good.size * bad.size))
    return np.array(curve, dtype=np.float64)


def _scores(values: NDArray[np.float64], rank: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if rank is None:
        return np.full(values.shape[:-1], -np.inf), np.full(values.shape[:-1], np.inf)
    return values[..., values.shape[-1] - rank], values[..., rank - 1]


def _sorted(scores: ArrayLike) -> NDArray[np.float64]:
    values = floats("scores", scores)
    if values.ndim < 1 or values.shape[-1] < 1:
        raise ConfigError(expected("scores", "(..., draws) with at least one draw", values.shape))
    if not np.isfinite(values).all():
        raise InferenceError(expected("scores", "finite numbers", float(values[~np.isfinite(values)].flat[0])))
    return np.sort(values, axis=-1)
