"""Thresholds from the scores of held-out normals, with a finite-sample guarantee (split conformal prediction).

The n calibration scores and a new normal's score must be exchangeable: frames from the same line, camera and light, none of
them trained on.  Then P[score > threshold] <= false-alarm rate, on average over the calibration draw, for any n and any
distribution (Vovk, Gammerman and Shafer 2005; Lei et al. 2018, arXiv 1604.04173).  For one given calibration draw,
:func:`training_conditional_bound` says how far above the target the rate can be.

``rate`` is compared as IEEE doubles are: j / (n + 1), correctly rounded, against the number given.  So 0.1 with n = 9 and 1/3
with n = 2 mean what they say, ``score > threshold`` and ``p_value <= rate`` agree exactly, and no tolerance is involved.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advrad_fast.checks import floats, integer, share
from advrad_fast.errors import CalibrationError, expected


def p_value(calibration: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """Conformal p-values: (1 + #{c >= s}) / (n + 1).

    Args:
        calibration: (n,) normal scores, sorted, rising, n >= 1, finite.
        scores: any shape, finite.

    Returns:
        float64 of the shape of ``scores``, in [1 / (n + 1), 1].

    Raises:
        CalibrationError: either is no array of finite numbers, or ``calibration`` is empty, not (n,) or not sorted.
    """
    normal = _scores(calibration)
    new = floats("scores", scores, CalibrationError)
    if not np.isfinite(new).all():
        raise CalibrationError(expected("scores", "finite values", new[~np.isfinite(new)].flat[0]))
    above = normal.size - np.searchsorted(normal, new, side="left")
    return np.asarray((1 + above) / (normal.size + 1), dtype=np.float64)


def checked_p_value(normal: NDArray[np.float64], score: float) -> float:
    """:func:`p_value` of one finite score, for a calibration that was checked before: a frame's, where microseconds count."""
    return (1 + normal.size - int(normal.searchsorted(score))) / (normal.size + 1)


def conformal_threshold(calibration: ArrayLike, false_alarm_rate: float) -> float:
    """The smallest calibration score t such that ``score > t`` flags a normal with probability <= ``false_alarm_rate``.

    It is the ceil((n + 1)(1 - rate))-th smallest.

    Args:
        calibration: (n,) normal scores, sorted, rising, finite.
        false_alarm_rate: in (0, 1).

    Raises:
        CalibrationError: n is too small for this rate; the message says how many normals it takes.
        ConfigError: ``false_alarm_rate`` is not in (0, 1).
    """
    normal = _scores(calibration)
    return float(normal[_rank(normal.size, share("false_alarm_rate", false_alarm_rate)) - 1])


def attainable_rate(n: int) -> float:
    """The smallest false-alarm rate that n normals can promise: 1 / (n + 1)."""
    return 1 / (integer("n", n, 1) + 1)


def normals_needed(false_alarm_rate: float) -> int:
    """The smallest n whose attainable rate is <= ``false_alarm_rate``, which is in (0, 1): 1 / rate - 1, rounded up."""
    rate = share("false_alarm_rate", false_alarm_rate)
    n = max(1, int(1 / Fraction(rate)) - 2)  # the exact inverse can be off by one from the rounded comparison
    while 1 / (n + 1) > rate:
        n += 1
    return n


def training_conditional_bound(n: int, false_alarm_rate: float, delta: float) -> float:
    """The false-alarm rate that the threshold drawn from n normals stays below with probability >= 1 - ``delta``.

    The rate above the k-th smallest of n is at most Beta(n + 1 - k, k) distributed, with equality for scores without ties
    (Vovk 2012, "Conditional validity of inductive conformal predictors", Prop. 2a).  Here the n scores must be independent.

    Args:
        n: normals in the calibration, >= 1.
        false_alarm_rate: the target of :func:`conformal_threshold`, in (0, 1).
        delta: in (0, 1).

    Raises:
        CalibrationError: n is too small for this rate.
        ConfigError: a number is out of range.
    """
    from scipy.special import betaincinv  # SciPy takes longer to import than the rest of this package: on use only

    n = integer("n", n, 1)
    k = _rank(n, share("false_alarm_rate", false_alarm_rate))
    return 1.0 - float(betaincinv(k, n + 1 - k, share("delta", delta)))


def _rank(n: int, rate: float) -> int:
    """k, 1-based: n + 1 - k is the largest j with j / (n + 1) <= rate."""
    j = int(Fraction(rate) * (n + 1))
    if (j + 1) / (n + 1) <= rate:  # j + 1 over n + 1 rounds to the rate given, like 3 / 10 to 0.3
        j += 1
    if j < 1:
        raise CalibrationError(
            f"calibration: a false-alarm rate of {rate:g} takes at least {normals_needed(rate)} normal scores, got {n} "
            f"(which can promise {attainable_rate(n):.3g})"
        )
    return n + 1 - j


def _scores(calibration: ArrayLike) -> NDArray[np.float64]:
    scores = floats("calibration", calibration, CalibrationError)
    if scores.ndim != 1 or scores.size == 0:
        raise CalibrationError(expected("calibration", "(n,) scores with n >= 1", scores.shape))
    if not np.isfinite(scores).all():
        raise CalibrationError(expected("calibration", "finite scores", float(scores[~np.isfinite(scores)][0])))
    if (scores[1:] < scores[:-1]).any():
        raise CalibrationError("calibration: expected sorted, rising scores")
    return scores
