"""certify: Clopper-Pearson, radii, certificates and the rule for a fixed number of votes."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from advrad_fast import certify, lattice
from advrad_fast.certify import Certificate, fixed_certificate
from advrad_fast.errors import ConfigError

PIXELS = 256 * 256 * 3
COUNTS = [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (57, 100), (990, 1000), (1000, 1000), (99_000, 100_000)]


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-6])
@pytest.mark.parametrize(("k", "n"), COUNTS)
def test_bounds_are_scipys(k: int, n: int, alpha: float) -> None:
    low, high = float(certify.lower_bound(k, n, alpha)), float(certify.upper_bound(k, n, alpha))
    # Worst seen 2.2e-16, one unit in the last place; other releases of SciPy may differ by more.
    assert low == pytest.approx(stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0, rel=2e-13, abs=0)
    assert high == pytest.approx(stats.beta.isf(alpha, k + 1, n - k) if k < n else 1.0, rel=2e-13, abs=0)
    assert low == pytest.approx(stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, "exact").low, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 10), (57, 100), (198, 200), (200, 200), (290, 300)])
def test_lower_bound_in_exact_fractions(k: int, n: int, alpha: float) -> None:
    """P[Binomial(n, L) >= k] passes alpha within a hundredth of what the radii allow for rounding (worst seen: 4.6e-15)."""

    def tail(p: Fraction) -> Fraction:
        return sum((comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), Fraction(0))

    bound, slack = Fraction(float(certify.lower_bound(k, n, alpha))), Fraction(certify.bounds.ROUNDING) / 100
    assert tail(bound - slack) < Fraction(alpha) < tail(bound + slack)


def test_bounds_by_hand() -> None:
    assert float(certify.lower_bound(100, 100, 0.001)) == pytest.approx(0.001**0.01, rel=1e-14)
    assert float(certify.lower_bound(1, 100, 0.001)) == pytest.approx(1 - 0.999**0.01, rel=1e-12)
    assert float(certify.lower_bound(2, 192, 1e-320)) == 0.0  # no NaN where the solver has no digits left
    np.testing.assert_array_equal(certify.lower_bound([0, 5], 5, 0.05), [0.0, certify.lower_bound(5, 5, 0.05)])


@pytest.mark.parametrize(("n", "radius"), [(100, 1.50), (1_000, 2.46), (10_000, 3.20), (100_000, 3.81)])
def test_largest_radius_when_all_agree(n: int, radius: float) -> None:
    got = float(certify.radius(certify.lower_bound(n, n, 0.001), 0.25, pixels=PIXELS))
    assert round(got / 0.25, 2) == pytest.approx(radius, abs=0.011)


def test_radius_is_cohens_less_the_lattice() -> None:
    p = np.array([0.0, 0.3, 0.5, 0.500001, 0.6, 0.9, 0.999])
    got, cohen = certify.radius(p, 0.25, pixels=PIXELS), 0.25 * stats.norm.ppf(np.maximum(p, 0.5))
    np.testing.assert_array_equal(got[:3], 0.0)
    assert (got[3:] < cohen[3:]).all()
    np.testing.assert_allclose(got, cohen, atol=1e-8)  # 1e-10 over the density at 0.999, and sigma
    d = certify.allowance(0.25, PIXELS)
    assert lattice.distance(0.25, PIXELS) < d < 2e-10
    # With noise this far from the Gaussian's, p_lower really is worth d less, and 1/2 is d more.
    assert float(certify.radius(0.9, 0.25, pixels=PIXELS)) == 0.25 * (stats.norm.ppf(0.9 - d) - stats.norm.ppf(0.5 + d))


def test_what_the_lattice_costs_grows_with_the_image() -> None:
    radii = [float(certify.radius(0.9, 0.25, pixels=pixels)) for pixels in (1, 10**6, 10**9, 2**40)]
    assert radii == sorted(radii, reverse=True) and radii[-1] < radii[0] - 1e-4


@given(r=st.floats(0.0, 1.0), sigma=st.sampled_from([0.25, 0.5, 1.0]))
def test_vote_probability_is_the_inverse_of_radius(r: float, sigma: float) -> None:
    p = certify.vote_probability(r, sigma, pixels=PIXELS)
    assert float(certify.radius(p, sigma, pixels=PIXELS)) == pytest.approx(r, abs=1e-12)
    assert p > stats.norm.cdf(r / sigma)


@given(n=st.integers(1, 3000), data=st.data(), alpha=st.floats(1e-9, 0.5))
def test_bounds_are_monotone(n: int, data: st.DataObject, alpha: float) -> None:
    k = data.draw(st.integers(0, n))
    low, high = float(certify.lower_bound(k, n, alpha)), float(certify.upper_bound(k, n, alpha))
    assert 0 <= low <= k / n <= high <= 1 and low < 1
    assert float(certify.lower_bound(k + 1, n + 1, alpha)) > low >= float(certify.lower_bound(k, n + 1, alpha))
    assert low >= float(certify.lower_bound(k, n, alpha / 2))
    assert float(certify.anytime_lower_bound(k, n, alpha)) <= low + 1e-12  # holding at any time costs something


def binomial(p: float, n: int, size: int = 20_000) -> np.ndarray:
    return np.random.default_rng(5).binomial(n, p, size)


def at_most(errors: int | np.integer[Any], alpha: float, trials: int = 20_000) -> bool:
    return errors <= trials * alpha + 4 * (trials * alpha * (1 - alpha)) ** 0.5


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("n", [50, 1000])
def test_coverage_of_clopper_pearson(p: float, n: int, alpha: float) -> None:
    k = binomial(p, n)
    assert at_most((certify.lower_bound(k, n, alpha) > p).sum(), alpha)
    assert at_most((certify.upper_bound(k, n, alpha) < p).sum(), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("p", [0.5, 0.501, 0.62, 0.95])
def test_coverage_of_fixed_certificates(p: float, alpha: float) -> None:
    """At p = 1/2 a certificate of either decision is false; elsewhere one whose radius is too large."""
    counts, times = np.unique(binomial(p, 100), return_counts=True)
    errors, worth = 0, {"DEFECT": p, "OK": 1 - p, "ABSTAIN": 1.0}
    for k, number in zip(counts.tolist(), times.tolist(), strict=True):
        made = fixed_certificate(k, 100, threshold=0.0, sigma=0.25, pixels=1, alpha=alpha)
        errors += number * (made.radius > float(certify.radius(worth[made.outcome], 0.25, pixels=1)))
    assert at_most(errors, alpha)


def test_one_side_at_the_full_alpha_would_be_wrong() -> None:
    """Choosing the side by the votes that bound it is worth twice alpha: at p = 1/2 the halved alpha is needed."""
    k = binomial(0.5, 101)
    naive = certify.lower_bound(np.maximum(k, 101 - k), 101, 0.05) > 0.5
    assert not at_most(naive.sum(), 0.05)
    sound = certify.lower_bound(np.maximum(k, 101 - k), 101, 0.025) > 0.5
    assert at_most(sound.sum(), 0.05)


def test_fixed_certificates_by_hand() -> None:
    def make(defects: int, at_radius: float | None = None) -> Certificate:
        return fixed_certificate(defects, 100, threshold=2.5, sigma=0.25, pixels=PIXELS, at_radius=at_radius)

    p = 0.0005**0.01
    assert make(100) == Certificate("DEFECT", float(certify.radius(p, 0.25, pixels=PIXELS)), 100, p, 0.25, 0.001, 2.5, "fixed")
    assert make(0).outcome == "OK" and make(0).radius == make(100).radius
    assert make(50).outcome == make(60).outcome == "ABSTAIN" and make(60).radius == 0.0
    assert make(100, 0.3).radius == 0.3 and make(100, 0.4).outcome == "ABSTAIN"
    assert make(100).about == "the prepared uint8 image"
    assert "laid level" in dataclasses.replace(make(100), aligned=True).about


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("outcome", "ERROR"),
        ("outcome", "ABSTAIN"),  # with a radius
        ("radius", -0.1),
        ("radius", 0.321),  # 0.25 Phi^-1(0.9) is 0.32039
        ("radius", float("nan")),
        ("votes", 0),
        ("votes", 1.0),
        ("p_lower", 0.5),
        ("p_lower", 1.0),
        ("sigma", 0.0),
        ("alpha", 1.0),
        ("threshold", float("inf")),
        ("method", "sound"),
        ("aligned", None),
    ],
)
def test_a_certificate_refuses(field: str, value: object) -> None:
    fields: dict[str, Any] = {
        "outcome": "OK", "radius": 0.32, "votes": 50, "p_lower": 0.9,
        "sigma": 0.25, "alpha": 0.001, "threshold": 1.0, "method": "fixed",
    }  # fmt: skip
    Certificate(**fields)
    with pytest.raises(ConfigError, match=r"expected"):
        Certificate(**{**fields, field: value})


def test_split_alpha() -> None:
    assert certify.split_alpha(0.001, 10) == 0.0001
    for claims in (0, True, 1.5):
        with pytest.raises(ConfigError, match="claims"):
            certify.split_alpha(0.001, claims)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, 0.0, 1.0, float("nan"), True, "0.1", None])
def test_refuses_alpha(alpha: Any) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        certify.lower_bound(1, 2, alpha)
    with pytest.raises(ConfigError, match="alpha"):
        certify.anytime_lower_bound(1, 2, alpha)


@pytest.mark.parametrize(("k", "n"), [(-1, 2), (3, 2), (0, 0), (1.0, 2)])
def test_refuses_counts(k: Any, n: Any) -> None:
    with pytest.raises(ConfigError, match="successes and trials"):
        certify.lower_bound(k, n, 0.1)


def test_refuses_the_rest() -> None:
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="p_lower"):
            certify.radius(p, 0.25, pixels=1)
    for r in (-0.1, float("inf"), float("nan"), True, None, 2.0):  # 2.0 is 8 sigma
        with pytest.raises(ConfigError, match="radius"):
            certify.vote_probability(r, 0.25, pixels=PIXELS)  # type: ignore[arg-type]
    for pixels in (0, 1.5, True):
        with pytest.raises(ConfigError, match="pixels"):
            certify.allowance(0.25, pixels)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sigma"):
        certify.radius(0.9, 0.0, pixels=1)
