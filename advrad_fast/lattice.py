"""Integer noise for sound certificates: a Gaussian rounded to the 1/255 lattice of uint8 pixels, exactly (NumPy, no floats).

In floating point the support of ``x + delta`` depends on ``x``, which voids a certificate (Voracek and Hein, arXiv 2207.07209).
Here x is an integer image and z = round(255 sigma g) with g standard normal is added to it in integers.  As x is an integer,
x + z = round(x + 255 sigma g): the smoothed detector is Cohen et al.'s (arXiv 1902.02918) around a detector that rounds
first, and their radius holds as it stands.

z is drawn by inversion.  T_j = round(2**60 Phi((j + 1/2) / (255 sigma))) for j in [-K, K), from exact decimal arithmetic on the
double ``sigma``; with u uniform in [0, 2**60), z = #{T_j <= u} - K.  The high 32 bits of u are the words of block 1 of the noise
stream, the low 28 the upper bits of those of block 2.  What rounding T_j costs a certificate is :func:`distance`.
"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from advrad_fast import philox
from advrad_fast.checks import integer
from advrad_fast.errors import ConfigError, expected

LEVELS = 255  #: lattice steps in a pixel's range [0, 1]
BITS = 60  #: of the uniform number
MAX_SIGMA = 2.0  #: in [0, 1] pixel units

#: Beyond this many standard deviations less than 2**-61 of a Gaussian is left, and thresholds would round to 0 and 2**60.
_REACH = Decimal("8.85")
_DIGITS = 40
_PI = Decimal("3.141592653589793238462643383279502884197169399375106")


def check_sigma(sigma: object) -> float:
    """``sigma`` as a float in (0, MAX_SIGMA], in [0, 1] pixel units, or a ConfigError."""
    if isinstance(sigma, bool) or not isinstance(sigma, int | float | np.floating) or not 1 / LEVELS <= sigma <= MAX_SIGMA:
        raise ConfigError(expected("sigma", f"a number in [1/{LEVELS}, {MAX_SIGMA:g}]", sigma))
    return float(sigma)


@lru_cache(maxsize=16)
def _thresholds(sigma: float) -> tuple[int, ...]:
    with decimal.localcontext(prec=_DIGITS, rounding=decimal.ROUND_HALF_EVEN):
        scale = LEVELS * Decimal(sigma)  # exact: a double is a rational number
        reach = math.ceil(_REACH * scale)
        upper = [int((_phi((j + Decimal("0.5")) / scale) * 2**BITS).to_integral_value()) for j in range(reach)]
    upper = [t for t in upper if t < 2**BITS]
    return (*(2**BITS - t for t in reversed(upper)), *upper)


def _phi(x: Decimal) -> Decimal:
    """The standard normal distribution function for x >= 0, to about 38 digits.

    Phi(x) = 1/2 + phi(x) (x + x^3/3 + x^5/(3 5) + ...): only positive terms, so nothing cancels (Marsaglia 2004).
    """
    term = total = x
    n = 1
    while term > total.scaleb(-_DIGITS):
        n += 2
        term *= x * x / n
        total += term
    return Decimal("0.5") + total * (-x * x / 2).exp() / (2 * _PI).sqrt()


def thresholds(sigma: float) -> NDArray[np.uint64]:
    """T_j, never falling and symmetric (T_-1-j = 2**60 - T_j): uint64 (2 K,), for ``sigma`` in [0, 1] pixel units."""
    return np.array(_thresholds(check_sigma(sigma)), dtype=np.uint64)


def integers(count: int, sigma: float, *, seed: int, draw: int = 0, image_id: int = 0) -> NDArray[np.int32]:
    """The first ``count`` values of the lattice noise of one (seed, draw, image): int32 (count,), in steps of 1/255."""
    high, low = (
        philox.integers(count, seed=seed, draw=draw, image_id=image_id, block=block).astype(np.uint64) for block in (1, 2)
    )
    table = thresholds(sigma)
    u = high << np.uint64(28) | low >> np.uint64(4)
    return (np.searchsorted(table, u, side="right") - len(table) // 2).astype(np.int32)


def distance(sigma: float, pixels: int) -> float:
    """How far the noise of ``pixels`` values is, at most, from the rounded Gaussian, in total variation.

    Each of the 2 K + 1 probabilities is off by at most 2**-60 (two thresholds, each rounded by half a unit) and what lies beyond
    the outermost thresholds adds less than that; the values are independent.  A probability estimated with this noise is off by
    no more.

    Raises:
        ConfigError: ``sigma`` is not in [1/255, 2], or ``pixels`` not an integer in [1, 2**40].
    """
    return integer("pixels", pixels, 1, 2**40) * (len(_thresholds(check_sigma(sigma))) + 3) * 2.0**-BITS / 2
