"""calibrate.py: the threshold and the p-value agree exactly, and the promises hold in simulation."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advrad_fast.calibrate import (
    attainable_rate,
    checked_p_value,
    conformal_threshold,
    normals_needed,
    p_value,
    training_conditional_bound,
)
from advrad_fast.errors import CalibrationError, ConfigError

rates = st.one_of(
    st.floats(1e-4, 1.0, exclude_max=True),
    st.builds(lambda a, b: min(a, b) / (max(a, b) + 1), st.integers(1, 60), st.integers(1, 60)),  # rates on the steps
)
score_lists = st.lists(st.one_of(st.integers(0, 8), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=60)  # with ties


def test_p_value_by_hand() -> None:
    calibration = np.array([1.0, 2.0, 2.0, 3.0])
    got = p_value(calibration, [[0.0, 1.0, 2.0], [2.5, 3.0, 3.5]])
    np.testing.assert_array_equal(got, np.array([[5, 5, 4], [2, 2, 1]]) / 5)
    assert got.dtype == np.float64
    assert p_value(calibration, 2.0).shape == ()


@pytest.mark.parametrize(
    ("n", "rate", "k"),
    [
        (9, 0.1, 9),
        (9, 0.2, 8),
        (9, 0.3, 7),
        (19, 0.05, 19),
        (99, 0.01, 99),
        (99, 0.07, 93),
        (2, 1 / 3, 2),
        (48, 1 / 49, 48),
        (100, 0.05, 96),
    ],
)
def test_threshold_rank_has_no_rounding_errors(n: int, rate: float, k: int) -> None:
    """0.3 * 10, 0.07 * 100 and 49 * (1 / 49) are not 3, 7 and 1 in floating point."""
    assert conformal_threshold(np.arange(1.0, n + 1.0), rate) == k


@given(score_lists, score_lists, rates)
def test_decision_and_p_value_agree(calibration: list[float], scores: list[float], rate: float) -> None:
    normal = np.sort(np.array(calibration, dtype=np.float64))
    new = np.array(scores + calibration, dtype=np.float64)
    new = np.concatenate([new, np.nextafter(new, np.inf), np.nextafter(new, -np.inf)])
    try:
        threshold = conformal_threshold(normal, rate)
    except CalibrationError:
        assert 1 / (normal.size + 1) > rate
        assert (p_value(normal, new) > rate).all()
    else:
        np.testing.assert_array_equal(new > threshold, p_value(normal, new) <= rate)
        assert threshold in normal


@given(st.integers(1, 200), rates)
def test_rank_is_the_textbook_one(n: int, rate: float) -> None:
    """ceil((n + 1)(1 - rate)) over the rationals, unless the rate is the rounded form of a step."""
    step = round(rate * (n + 1))
    exact = Fraction(step, n + 1) if step / (n + 1) == rate else Fraction(rate)
    rank = -int(-(n + 1) * (1 - exact) // 1)
    if rank > n:
        with pytest.raises(CalibrationError):
            conformal_threshold(np.arange(1.0, n + 1.0), rate)
    else:
        assert conformal_threshold(np.arange(1.0, n + 1.0), rate) == rank


@given(rates)
def test_normals_needed_is_the_least(rate: float) -> None:
    n = normals_needed(rate)
    conformal_threshold(np.zeros(n), rate)
    if n > 1:
        with pytest.raises(CalibrationError, match=f"at least {n} normal scores, got {n - 1}"):
            conformal_threshold(np.zeros(n - 1), rate)


@pytest.mark.parametrize(("rate", "n"), [(0.5, 1), (0.9, 1), (1 / 3, 2), (0.1, 9), (0.05, 19), (0.01, 99), (0.001, 999)])
def test_normals_needed_by_hand(rate: float, n: int) -> None:
    assert normals_needed(rate) == n
    assert attainable_rate(n) <= rate


def _realised(rng: np.random.Generator, trials: int, n: int, rate: float) -> np.ndarray:
    """The false-alarm rate of each of many thresholds; uniform scores, so it is 1 - threshold."""
    return np.array([1.0 - conformal_threshold(np.sort(rng.random(n)), rate) for _ in range(trials)])


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (30, 0.1), (200, 0.05)])
def test_coverage(n: int, rate: float) -> None:
    """The mean rate is floor((n + 1) rate) / (n + 1); within 5 standard errors over 4000 calibrations."""
    realised = _realised(np.random.default_rng(1), 4000, n, rate)
    error = 5 * realised.std() / np.sqrt(realised.size)
    assert abs(realised.mean() - int((n + 1) * rate + 1e-9) / (n + 1)) < error
    assert realised.mean() <= rate + error


@pytest.mark.parametrize(("n", "rate", "delta"), [(19, 0.05, 0.1), (50, 0.1, 0.05), (200, 0.05, 0.2)])
def test_training_conditional_bound(n: int, rate: float, delta: float) -> None:
    """Broken by a share delta of the calibrations, within 5 standard errors; scores without ties attain it."""
    bound = training_conditional_bound(n, rate, delta)
    assert rate < bound < 1.0
    broken = (_realised(np.random.default_rng(2), 4000, n, rate) > bound).mean()
    assert abs(broken - delta) < 5 * np.sqrt(delta * (1 - delta) / 4000)


def test_training_conditional_bound_with_ties() -> None:
    """Ties only lower the rate: scores 0 to 4, of which P[score > t] is (4 - t) / 5."""
    rng, bound = np.random.default_rng(3), training_conditional_bound(50, 0.25, 0.1)
    thresholds = np.array([conformal_threshold(np.sort(rng.integers(0, 5, 50)), 0.25) for _ in range(2000)])
    assert ((4 - thresholds) / 5 > bound).mean() <= 0.1


def test_training_conditional_bound_in_closed_form() -> None:
    """k = n: the rate above the maximum is Beta(1, n), with quantile 1 - delta^(1 / n)."""
    assert training_conditional_bound(19, 0.05, 0.1) == pytest.approx(1 - 0.1 ** (1 / 19), rel=1e-12)


@pytest.mark.parametrize("calibration", [[], [[1.0]], [np.nan], [0.0, np.inf], [2.0, 1.0]])
def test_bad_calibration(calibration: list[float]) -> None:
    with pytest.raises(CalibrationError, match="calibration"):
        conformal_threshold(np.array(calibration), 0.5)
    with pytest.raises(CalibrationError, match="calibration"):
        p_value(np.array(calibration), 0.5)


@pytest.mark.parametrize("score", [np.nan, np.inf, [0.0, -np.inf]])
def test_bad_scores(score: float) -> None:
    with pytest.raises(CalibrationError, match="scores"):
        p_value(np.array([1.0]), score)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, np.nan, True, "0.1", None])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ConfigError, match="false_alarm_rate"):
        conformal_threshold(np.arange(100.0), rate)
    with pytest.raises(ConfigError, match="delta"):
        training_conditional_bound(100, 0.1, rate)


@pytest.mark.parametrize("n", [0, -1, 1.0, True])
def test_bad_count(n: int) -> None:
    with pytest.raises(ConfigError, match="n: expected an integer"):
        attainable_rate(n)
    with pytest.raises(ConfigError, match="n: expected an integer"):
        training_conditional_bound(n, 0.1, 0.1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(-1e6, 1e6), st.booleans())
def test_the_quick_p_value_is_the_p_value(calibration: list[float], score: float, tied: bool) -> None:
    normal = np.sort(np.array(calibration))
    score = float(normal[0]) if tied else score
    assert checked_p_value(normal, score) == float(p_value(normal, score))
