"""Exact binomial bounds, and radii from them.

What the lattice costs.  The votes are drawn with noise Q, from a table of 60-bit thresholds; Cohen's theorem is about the
rounded Gaussian G.  Both are added to x in integers, so they are at most d = :func:`advrad_fast.lattice.distance` apart in total
variation whatever x and the detector are, and no event's probability differs by more.  It is paid twice:

1. at x, where the votes were drawn: P_G >= P_Q - d, so the theorem gets ``p_lower - d``;
2. at the perturbed x', where a deployed detector draws from Q as well: its majority is the certified one if P_G there is above
   1/2 + d.

So the radius is sigma (Phi^-1(p_lower - d) - Phi^-1(1/2 + d)), and the decision holds under G and under Q.  d is 1e-10 for a
256 x 256 RGB image at sigma 0.25, and takes 1e-9 off the radius at p_lower 0.99.  What is left is that the words of
the Philox stream are taken for independent uniform bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advrad_fast import lattice
from advrad_fast.checks import MAX_COUNT, array, finite, floats, integer, share
from advrad_fast.errors import ConfigError, expected

#: Added to d, for the last digits of SciPy's quantiles: far above the worst error seen in tests/test_certify_bounds.py.
ROUNDING = 1e-12

MAX_CLAIMS = 2**53  #: that :func:`split_alpha` divides among


def lower_bound(successes: ArrayLike, trials: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """Clopper and Pearson's one-sided lower bound L: P[p < L] <= ``alpha`` for any p (1934; exact, so conservative).

    The number of trials must be fixed beforehand: looking at the votes and stopping early voids it.  For that there is
    :func:`advrad_fast.certify.anytime_lower_bound`.

    Args:
        successes, trials: integers, 0 <= successes <= trials, trials >= 1; they broadcast.
        alpha: in (0, 1).

    Returns:
        float64 of the broadcast shape, in [0, 1): the ``alpha`` quantile of Beta(successes, trials - successes + 1).

    Raises:
        ConfigError: a number is out of range.
    """
    from scipy.special import betaincinv  # on use only: SciPy takes longer to import than the rest of this package

    k, n = check_counts(successes, trials)
    # The quantile of a subnormal alpha may come out as NaN; 0 is a bound as well.
    found = np.nan_to_num(betaincinv(np.maximum(k, 1), n - np.maximum(k, 1) + 1, share("alpha", alpha)), nan=0.0)
    return np.asarray(np.where(k > 0, found, 0.0))


def upper_bound(successes: ArrayLike, trials: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """The mirror of :func:`lower_bound`: P[p > U] <= ``alpha``."""
    k, n = check_counts(successes, trials)
    return np.asarray(1.0 - lower_bound(n - k, n, alpha))


def allowance(sigma: float, pixels: int) -> float:
    """d of this module: how far the drawn noise is from the rounded Gaussian, rounding errors included.

    Args:
        sigma: in [0, 1] pixel units.
        pixels: noised values an image, height * width * channels.
    """
    return lattice.distance(sigma, pixels) + ROUNDING


def radius(p_lower: ArrayLike, sigma: float, *, pixels: int) -> NDArray[np.float64]:
    """The certified radius, l2 in [0, 1] pixel units, where a vote has at least probability ``p_lower``.

    It is sigma Phi^-1(p_lower) less the cost of the lattice, and 0 where nothing is certified (``p_lower`` <= 1/2).  Every
    perturbation of a smaller norm leaves the decision as it is.

    Args:
        p_lower: in [0, 1], any shape.
        sigma: in [0, 1] pixel units.
        pixels: as for :func:`allowance`.

    Raises:
        ConfigError: a number is out of range.
    """
    from scipy.special import ndtri

    p = floats("p_lower", p_lower)
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise ConfigError(expected("p_lower", "probabilities", p[~((p >= 0.0) & (p <= 1.0))].flat[0]))
    d, sigma = allowance(sigma, pixels), lattice.check_sigma(sigma)
    return np.asarray(np.maximum(sigma * (ndtri(np.maximum(p - d, 0.5)) - ndtri(0.5 + d)), 0.0))


def vote_probability(radius: float, sigma: float, *, pixels: int) -> float:
    """The probability of a vote from which on ``radius`` is certified: the inverse of :func:`radius`, Phi(radius / sigma) and d.

    Raises:
        ConfigError: ``radius`` is negative, or so large that not even certain votes would certify it (about 6.3 sigma).
    """
    from scipy.special import ndtr, ndtri

    radius = check_radius(radius)
    d, sigma = allowance(sigma, pixels), lattice.check_sigma(sigma)
    p = float(ndtr(radius / sigma + ndtri(0.5 + d))) + d
    if p >= 1.0 - d:
        raise ConfigError(expected("radius", f"at most {float(ndtri(1.0 - 3 * d)) * sigma:.3g} at sigma {sigma:g}", radius))
    return p


def split_alpha(alpha: float, claims: int) -> float:
    """The level of each of ``claims`` claims that are to hold together but for a probability ``alpha`` (Bonferroni).

    It needs no independence: the claims may share draws, seeds or images.

    Args:
        alpha: in (0, 1).
        claims: in [1, MAX_CLAIMS].

    Raises:
        ConfigError: a number is out of range.
    """
    return share("alpha", alpha) / integer("claims", claims, 1, MAX_CLAIMS)


def check_radius(radius: object) -> float:
    """``radius`` as a finite float >= 0, or a ConfigError."""
    checked = finite("radius", radius)
    if checked < 0.0:
        raise ConfigError(expected("radius", "a finite number >= 0", radius))
    return checked


def check_counts(successes: ArrayLike, trials: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both as int64 of one shape, 0 <= successes <= trials, 1 <= trials <= 2**53, or a ConfigError."""
    try:
        k, n = np.broadcast_arrays(array("successes", successes), array("trials", trials))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"successes and trials: expected shapes that broadcast: {error}") from error
    if not (np.issubdtype(k.dtype, np.integer) and np.issubdtype(n.dtype, np.integer)):
        raise ConfigError(expected("successes and trials", "integers", f"{k.dtype} and {n.dtype}"))
    bad = (k < 0) | (k > n) | (n < 1) | (n > MAX_COUNT)
    if bad.any():
        wanted = f"0 <= successes <= trials, trials in [1, {MAX_COUNT}]"
        raise ConfigError(expected("successes and trials", wanted, (int(k[bad][0]), int(n[bad][0]))))
    return k.astype(np.int64), n.astype(np.int64)
