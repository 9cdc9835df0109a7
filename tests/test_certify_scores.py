"""certify.scores: order statistics that certify every threshold at once, and certified AUROC."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from advrad_fast import certify
from advrad_fast.calibrate import conformal_threshold
from advrad_fast.errors import ConfigError, InferenceError
from advrad_fast.evaluation.metrics import auroc

SIMULATIONS = 20_000


@given(n=st.integers(1, 3000), ratio=st.floats(0.0, 4.0), alpha=st.floats(1e-6, 0.5))
def test_the_rank_is_the_least_that_clopper_and_pearson_pass(n: int, ratio: float, alpha: float) -> None:
    rank = certify.certified_rank(n, ratio * 0.25, 0.25, alpha, pixels=1)
    p = certify.vote_probability(ratio * 0.25, 0.25, pixels=1)
    if rank is None:
        assert stats.binom.sf(n - 1, n, p) > alpha and certify.lower_bound(n, n, alpha) < p
    else:
        assert stats.binom.sf(rank - 1, n, p) <= alpha * (1 + 1e-9) and certify.lower_bound(rank, n, alpha) >= p - 1e-12
        assert stats.binom.sf(rank - 2, n, p) > alpha * (1 - 1e-9)
        assert rank > n * p - 1 or alpha > 0.4


def test_ranks_by_hand() -> None:
    """At radius 0 and alpha 0.05: 5 of 5 heads have 1/32, 4 of 5 have 6/32; 9 of 10 have 11/1024, 8 of 10 56/1024."""
    ranks = [certify.certified_rank(n, 0.0, 0.25, 0.05, pixels=1) for n in (4, 5, 8, 10)]
    assert ranks == [None, 5, 7, 9]
    lower, upper = certify.certified_scores([[3, 1, 2, 5, 4], [7, 7, 7, 9, 7]], 0.0, sigma=0.25, pixels=1, alpha=0.05)
    assert lower.tolist() == [1, 7] and upper.tolist() == [5, 9]
    lower, upper = certify.certified_scores(np.arange(10.0), 0.0, sigma=0.25, pixels=1, alpha=0.05)
    assert (lower, upper) == (1.0, 8.0)  # the 9th largest and the 9th smallest
    lower, upper = certify.certified_scores(np.zeros((3, 4)), 0.0, sigma=0.25, pixels=1, alpha=0.05)
    assert lower.tolist() == [-np.inf] * 3 and upper.tolist() == [np.inf] * 3


@given(seed=st.integers(0, 2**32), draws=st.integers(1, 90), ratio=st.sampled_from([0.4, 0.8, 1.2]), ties=st.booleans())
def test_the_least_threshold_is_where_the_anytime_test_begins_to_say_ok(seed: int, draws: int, ratio: float, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, draws).astype(np.float64) if ties else rng.standard_normal(draws)

    def outcome(threshold: float) -> str | None:
        return certify.DecisionTest(ratio * 0.25, 0.25, 0.01, pixels=3).update(scores > threshold)

    least = certify.least_ok_threshold(scores, ratio * 0.25, sigma=0.25, pixels=3, alpha=0.01)
    if least is None:
        assert outcome(np.inf) != "OK"
    else:
        assert least in scores and all(outcome(t) == "OK" for t in (least, *scores[scores > least], np.inf))
        assert outcome(np.nextafter(least, -np.inf)) != "OK"


def test_new_normals_are_certified_at_the_conformal_threshold() -> None:
    """500 lines: 19 normals and a new one each, of levels and draws of their own; at most 10 in 100 are not certified OK."""
    rng, missed = np.random.default_rng(5), 0
    for _ in range(500):
        scores = rng.standard_normal((20, 40)) + rng.standard_exponential((20, 1))
        found = [certify.least_ok_threshold(row, 0.1, sigma=0.25, pixels=3) for row in scores]
        threshold = conformal_threshold(np.sort(np.array(found[1:], dtype=np.float64)), 0.1)
        test = certify.DecisionTest(0.1, 0.25, pixels=3)
        missed += test.update(scores[0] > threshold) != "OK"
        assert (found[0] > threshold) == (test.outcome != "OK")  # type: ignore[operator]
    assert 0.05 < missed / 500 < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 500)


def test_least_thresholds_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="scores"):
        certify.least_ok_threshold(np.zeros((2, 3)), 0.1, sigma=0.25, pixels=3)
    with pytest.raises(ConfigError, match="radius"):
        certify.least_ok_threshold(np.zeros(3), -0.1, sigma=0.25, pixels=3)
    with pytest.raises(InferenceError, match="finite"):
        certify.least_ok_threshold([0.0, np.nan], 0.1, sigma=0.25, pixels=3)


def draws_of(kind: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(size)
    if kind == "discrete":
        return rng.integers(0, 10, size).astype(np.float64)
    return np.where(rng.random(size) < 0.3, 0.5, rng.random(size))  # an atom amid a continuous score


def quantiles(kind: str, p: float) -> tuple[float, float]:
    """sup{h: P[A > h] >= p} and inf{h: P[A <= h] >= p}."""
    if kind == "normal":
        return stats.norm.isf(p), stats.norm.ppf(p)
    if kind == "discrete":
        # Below the integer j, P[A > h] is (10 - j) / 10; from j on P[A <= h] is (j + 1) / 10.
        return max(j for j in range(10) if (10 - j) / 10 >= p), min(j for j in range(10) if (j + 1) / 10 >= p)
    # P[A <= h] is 0.7 h below the atom and 0.3 + 0.7 h from it on.

    def inverse(q: float) -> float:
        return q / 0.7 if q < 0.35 else 0.5 if q <= 0.65 else (q - 0.3) / 0.7

    return inverse(1 - p), inverse(p)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("kind", ["normal", "discrete", "atom"])
@pytest.mark.parametrize("p", [0.55, 0.65, 0.7, 0.8])  # 0.7 and 0.8 are steps of the discrete, 0.65 is the atom's edge
def test_coverage_of_scores(kind: str, p: float, alpha: float) -> None:
    """An image's statement is false at some threshold exactly where its lower score is above the quantile."""
    radius, n = float(certify.radius(p, 0.25, pixels=1)), 120
    scores = draws_of(kind, (SIMULATIONS, n), np.random.default_rng(11))
    lower, upper = certify.certified_scores(scores, radius, sigma=0.25, pixels=1, alpha=alpha)
    below, above = quantiles(kind, p)
    most = SIMULATIONS * alpha + 4 * (SIMULATIONS * alpha * (1 - alpha)) ** 0.5
    assert (lower > below + 1e-9).sum() <= most and (upper < above - 1e-9).sum() <= most
    if kind == "normal" and alpha == 0.05:
        assert (lower > below).sum() > SIMULATIONS * alpha / 3  # and not by being useless


def test_one_rank_more_would_be_wrong() -> None:
    rank = certify.certified_rank(120, float(certify.radius(0.7, 0.25, pixels=1)), 0.25, 0.05, pixels=1)
    assert rank is not None
    scores = np.sort(np.random.default_rng(11).standard_normal((SIMULATIONS, 120)), axis=1)
    most = SIMULATIONS * 0.05 + 4 * (SIMULATIONS * 0.05 * 0.95) ** 0.5
    assert (scores[:, 120 - rank] > stats.norm.isf(0.7)).sum() <= most
    assert (scores[:, 120 - rank + 1] > stats.norm.isf(0.7)).sum() > most


@given(st.integers(0, 2**32 - 1), st.integers(10, 200), st.booleans())
def test_scores_are_monotone_and_certify_what_the_votes_certify(seed: int, n: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (5, n)) * 1.0 if ties else rng.standard_normal((5, n))
    kept = scores.copy()
    last: tuple[Any, Any] | None = None
    for radius in (0.0, 0.05, 0.1, 0.2, 0.4):
        lower, upper = certify.certified_scores(scores, radius, sigma=0.25, pixels=3, alpha=0.05)
        assert (lower <= upper).all()
        assert last is None or ((lower <= last[0]).all() and (upper >= last[1]).all())
        last = lower, upper
        p = certify.vote_probability(radius, 0.25, pixels=3)
        for threshold in np.unique(scores)[:: max(1, n // 3)]:
            above = (scores > threshold).sum(axis=1)
            np.testing.assert_array_equal(lower > threshold, certify.lower_bound(above, n, 0.05) >= p)
            np.testing.assert_array_equal(upper <= threshold, certify.lower_bound(n - above, n, 0.05) >= p)
    np.testing.assert_array_equal(scores, kept)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_certified_auroc_is_the_auroc_of_the_scores(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, 10)]
    scores = rng.standard_normal((12, 100)) * 0.3 + rng.random((12, 1)) * 2 + labels[:, None]
    scores = scores.round(1) if ties else scores
    radii = [0.0, 0.05, 0.1, 0.2, 0.3, 0.6]
    curve = certify.certified_auroc(labels, scores, radii, sigma=0.25, pixels=3, alpha=0.01)
    assert curve.shape == (6,) and (np.diff(curve) <= 0).all()
    for got, radius in zip(curve, radii, strict=True):
        lower, upper = certify.certified_scores(scores, radius, sigma=0.25, pixels=3, alpha=0.01)
        if np.isfinite(lower).all():
            assert got == auroc(labels, np.where(labels == 1, lower, upper))
    assert curve[-1] == 0.0  # 100 draws can't certify 2.4 sigma


def test_no_attack_gets_below_the_certified_auroc() -> None:
    """Scores that are linear in one pixel, where the worst perturbation is known: it shifts every draw by the radius."""
    rng, sigma, radius = np.random.default_rng(3), 0.25, 0.1
    labels, clean = np.repeat([0, 1], 30), np.r_[rng.normal(0, 0.3, 30), rng.normal(0.6, 0.3, 30)]
    worst = auroc(labels, np.where(labels == 1, clean - radius, clean + radius))
    broken = 0
    for _ in range(200):
        scores = clean[:, None] + sigma * rng.standard_normal((60, 400))
        (got,) = certify.certified_auroc(labels, scores, [radius], sigma=sigma, pixels=1, alpha=certify.split_alpha(0.05, 60))
        broken += got > worst
        assert 0 < got < auroc(labels, clean)
    assert broken <= 200 * 0.05 + 4 * (200 * 0.05 * 0.95) ** 0.5


def test_refuses() -> None:
    settings: Any = {"sigma": 0.25, "pixels": 1}
    for scores in (np.zeros(0), np.zeros((3, 0)), 1.0):
        with pytest.raises(ConfigError, match="scores"):
            certify.certified_scores(scores, 0.1, **settings)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(InferenceError, match="scores: expected finite"):
            certify.certified_scores([0.0, bad], 0.1, **settings)
    for labels, shape in itertools.product(([0, 0], [1, 1], [0, 2], [0, 1, 1], [[0, 1]]), ((2, 5), (2,))):
        with pytest.raises(ConfigError, match="labels"):
            certify.certified_auroc(labels, np.zeros(shape), [0.1], **settings)
    for draws in (0, 1.5, True):
        with pytest.raises(ConfigError, match="draws"):
            certify.certified_rank(draws, 0.1, 0.25, pixels=1)  # type: ignore[arg-type]
