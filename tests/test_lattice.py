"""Lattice noise: exact thresholds, the C++ twin, and that it is the rounded Gaussian."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from advrad_fast import _native, lattice, philox
from advrad_fast.errors import ConfigError

SIGMAS = (1 / 255, 0.0625, 0.25, 1.0)


@pytest.mark.parametrize("sigma", [*SIGMAS, 2.0])
def test_thresholds_are_the_normal_distribution_function(sigma: float) -> None:
    table = lattice.thresholds(sigma)
    half = len(table) // 2
    at = (np.arange(-half, half) + 0.5) / (255 * sigma)
    # SciPy's are doubles: good to 2**-53 in the middle and to a relative 1e-15 in the lower tail.
    np.testing.assert_allclose(table / 2.0**60, stats.norm.cdf(at), rtol=1e-14, atol=2.0**-60)
    assert table.tolist() == [2**60 - t for t in reversed(table.tolist())]
    assert (np.diff(table.astype(np.int64)) >= 0).all() and table[0] >= 1
    assert stats.norm.sf((half + 0.5) / (255 * sigma)) < 2.0**-61


def test_thresholds_digit_by_digit() -> None:
    """Against the alternating series in exact fractions, which shares nothing with the code."""
    sigma = 0.0625
    table = lattice.thresholds(sigma)
    half = len(table) // 2
    # sqrt(2 pi) to 60 digits.
    root = Fraction("2.506628274631000502415765284811045253006986740609938316629923")
    for j in (0, 1, 7, 20, 40):
        x = (j + Fraction(1, 2)) / (255 * Fraction(sigma))
        term, total, n = x, x, 0
        while abs(term) > Fraction(1, 10**40):
            n += 1
            term *= -x * x / (2 * n)
            total += term / (2 * n + 1)
        assert int(table[half + j]) == round((Fraction(1, 2) + total / root) * 2**60)


@given(
    count=st.integers(0, 700),
    sigma=st.sampled_from(SIGMAS),
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 2**32 - 1),
    image_id=st.integers(0, 2**32 - 1),
)
def test_native_values_are_equal(count: int, sigma: float, seed: int, draw: int, image_id: int) -> None:
    expected = lattice.integers(count, sigma, seed=seed, draw=draw, image_id=image_id)
    got = _native.lattice_noise(count, _native.Lattice(lattice.thresholds(sigma)), seed, draw, image_id)
    assert got.dtype == np.int32 and got.shape == (count,)
    np.testing.assert_array_equal(got, expected)


def test_the_low_bits_decide_where_they_must() -> None:
    """A threshold inside the interval of a number's first 32 bits: the words of block 2 settle on which side it falls."""
    count = 4000
    high, low = (philox.integers(count, seed=1, block=block).astype(np.uint64) for block in (1, 2))
    u = high << np.uint64(28) | low >> np.uint64(4)
    for offset in (-1, 0, 1):
        for i in (0, 17, 3998):
            table = np.array([1, int(u[i]) + offset], dtype=np.uint64)
            got = _native.lattice_noise(count, _native.Lattice(table), 1)
            np.testing.assert_array_equal(got, np.searchsorted(table, u, side="right") - 1)
            assert got[i] == (0 if offset == 1 else 1)


@pytest.mark.parametrize("sigma", [0.0625, 0.25])
def test_it_is_the_rounded_gaussian(sigma: float) -> None:
    z = _native.lattice_noise(2_000_000, _native.Lattice(lattice.thresholds(sigma)), 11)
    edges = np.arange(-int(4 * 255 * sigma), int(4 * 255 * sigma) + 1)
    bins = np.r_[-np.inf, edges + 0.5, np.inf]
    observed, _ = np.histogram(z, bins)
    expected = np.diff(stats.norm.cdf(bins / (255 * sigma))) * len(z)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert abs(z.mean()) < 5 * z.std() / len(z) ** 0.5
    pairs = z[: len(z) // 2 * 2].reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 5 / len(pairs) ** 0.5
    normals = _native.normals(len(z), 11)
    assert abs(np.corrcoef(z, normals)[0, 1]) < 5 / len(z) ** 0.5  # another block: unrelated


def test_distance_is_small_and_counts_every_pixel() -> None:
    one, many = lattice.distance(0.25, 1), lattice.distance(0.25, 3 * 256 * 256)
    assert many == pytest.approx(3 * 256 * 256 * one) and 0 < many < 1e-9
    # By sums over all values, for one pixel; the table's probabilities are exact multiples of 2**-60.
    table = [0, *lattice.thresholds(0.25).tolist(), 2**60]
    half = len(table) // 2 - 1
    edges = np.r_[-np.inf, (np.arange(-half, half) + 0.5) / 63.75, np.inf]
    exact = np.diff(stats.norm.cdf(edges))
    assert np.abs(np.diff(np.array(table, dtype=object)).astype(float) / 2.0**60 - exact).sum() / 2 < one + 1e-13


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1 / 256, 2.1, float("nan"), True, None, "0.25"])
def test_refuses_sigma(sigma: object) -> None:
    with pytest.raises(ConfigError, match=r"^sigma: expected"):
        lattice.thresholds(sigma)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "table", [None, [1, 2], np.array([1, 2, 3], np.uint64), np.array([2, 1], np.uint64), np.array([1, 2**60], np.uint64),
              np.zeros(0, np.uint64), np.array([1, 2], np.int64), np.zeros(65536, np.uint64)]
)  # fmt: skip
def test_native_refuses_thresholds(table: object) -> None:
    with pytest.raises(ValueError, match=r"^thresholds: expected"):
        _native.Lattice(table)  # type: ignore[arg-type]
