"""Why the noise is drawn in integers: the counterexample of Voracek and Hein (arXiv 2207.07209), rebuilt.

A float near zero is very fine, but the sum of x = 64/255 and a normal near -x is only as fine as those two: a multiple of
2**-25.  From 63/255, whose last bit is a finer one, none of those multiples is reached.  So the low bits of x + delta tell which
of two images it came from, and a classifier that reads them is constant under noise around one image and nearly always the
opposite around its neighbour.  Its votes agree, a large radius is "certified", and that is false: Cohen's theorem is about a
Gaussian, and this noise isn't the same Gaussian around both images.  That x is quantised does not help; the noise must be.

Integers plus integer noise have no such bits: around both images the noise is the same distribution, shifted, on one lattice,
and what a classifier sees is a function of an integer.  For that the theorem holds up to the table's rounding, for every
classifier: the last test compares with the most powerful one there is.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from advrad_fast import _native, certify, lattice

SIGMA, PIXELS, DRAWS = 0.25, 32, 1000
HERE, THERE = 64, 63  #: grey levels of two images; every one of the 32 pixels differs by one level
DISTANCE = PIXELS**0.5 / 255


def ordinary(level: int) -> np.ndarray:
    """x + sigma * normals in float32, as most implementations do it: (DRAWS, PIXELS)."""
    x = np.full(PIXELS, level, dtype=np.uint8).astype(np.float32) / np.float32(255)
    return x + np.float32(SIGMA) * np.random.default_rng(level).standard_normal((DRAWS, PIXELS), dtype=np.float32)


def integers(level: int) -> np.ndarray:
    table = _native.Lattice(lattice.thresholds(SIGMA))
    z = np.stack([_native.lattice_noise(PIXELS, table, level, draw) for draw in range(DRAWS)])
    return (level + z).astype(np.float32) / np.float32(255)


def low_bits(v: np.ndarray) -> np.ndarray:
    """DEFECT where a pixel in (-1/4, 0) is no multiple of 2**-25: bool (DRAWS,)."""
    looked_at = (v > -0.25) & (v < 0)
    return (looked_at & (v * 2.0**25 % 1 != 0)).any(axis=1)


def certificate(votes: np.ndarray) -> certify.Certificate:
    return certify.fixed_certificate(int(votes.sum()), votes.size, threshold=0.0, sigma=SIGMA, pixels=PIXELS)


def test_the_ordinary_sampler_is_fooled() -> None:
    here, there = low_bits(ordinary(HERE)), low_bits(ordinary(THERE))
    false = certificate(here)
    assert false.outcome == "OK" and false.radius > 0.5 > 20 * DISTANCE
    assert there.mean() > 0.95  # a 20th of the radius away nearly every vote is the opposite
    assert certificate(there).outcome == "DEFECT"


def test_ours_is_not() -> None:
    here, there = low_bits(integers(HERE)), low_bits(integers(THERE))
    assert certificate(here).outcome == certificate(there).outcome == "DEFECT"
    # And from one image to its neighbour votes move by what a Gaussian's may, but for 4 standard errors.
    bound = stats.norm.cdf(stats.norm.ppf(here.mean()) - DISTANCE / SIGMA)
    assert there.mean() > bound - 4 * (2 * 0.25 / DRAWS) ** 0.5


@pytest.mark.parametrize("levels", [1, 5, 30, 100])
@pytest.mark.parametrize("sigma", [1 / 255, 0.0625, 0.25])
def test_no_classifier_of_the_lattice_can_break_the_theorem(sigma: float, levels: int) -> None:
    """One pixel, all probabilities exact: classifiers by likelihood ratio (Neyman and Pearson) lose the most from x to x'."""
    table = [0, *lattice.thresholds(sigma).tolist(), 2**60]
    q = np.diff(np.array(table, dtype=object)).astype(np.float64) / 2.0**60
    here, there = np.pad(q, (0, levels)), np.pad(q, (levels, 0))
    order = np.argsort(np.where(here > 0, there / np.where(here > 0, here, 1.0), np.inf), kind="stable")
    p, p_there = (np.minimum(np.cumsum(a[order]), 1.0) for a in (here, there))
    d = certify.allowance(sigma, 1)
    least = stats.norm.cdf(stats.norm.ppf(np.clip(p - d, 0, 1)) - levels / 255 / sigma) - d
    assert (p_there >= least).all()
    radii = certify.radius(p, sigma, pixels=1)
    assert (p_there[radii > levels / 255] > 0.5).all()
    if sigma == 0.25:  # the bound is nearly attained, so that it is the theorem that is tested, and not its slack
        assert (p_there - least).min() < 1e-3 and (p_there - least)[np.searchsorted(p, 0.9)] < 0.01
