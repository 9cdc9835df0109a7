"""The noise schedule and the affine maps around the network."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advrad_fast import schedule
from advrad_fast.config import PREDICTIONS, DiffusionConfig, Prediction
from advrad_fast.errors import ConfigError

DDPM = DiffusionConfig()


def test_alpha_bar_falls_strictly_in_0_1() -> None:
    bar = schedule.alpha_bar(DDPM)
    assert bar.shape == (1000,) and bar.dtype == np.float64
    assert (np.diff(bar) < 0).all() and bar[-1] > 0 and bar[0] < 1
    # The first and last values of DDPM's linear schedule.
    assert bar[0] == pytest.approx(1 - 1e-4, rel=1e-12)
    assert bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)


# Theorem 5.1 for the linear schedule: noise of standard deviation sigma on [0, 1] images is timestep t, 0-based.
@pytest.mark.parametrize(("sigma01", "timestep"), [(0.0625, 35), (0.125, 73), (0.25, 145), (0.5, 259), (1.0, 396)])
def test_timestep_for_sigma(sigma01: float, timestep: int) -> None:
    assert schedule.timestep_for_sigma(DDPM, sigma01) == timestep
    levels = schedule.sigma(DDPM)
    assert levels[timestep - 1] < 2 * sigma01 <= levels[timestep]


@given(st.floats(1e-6, 75.0))
def test_timestep_is_the_first_that_is_noisy_enough(sigma01: float) -> None:
    levels = schedule.sigma(DDPM)
    t = schedule.timestep_for_sigma(DDPM, sigma01)
    assert t >= 1 and levels[t] >= 2 * sigma01
    assert t == 1 or levels[t - 1] < 2 * sigma01


@pytest.mark.parametrize("sigma01", [0.0, -1.0, math.nan, math.inf, 1e3])
def test_unreachable_sigma(sigma01: float) -> None:
    with pytest.raises(ConfigError, match="sigma"):
        schedule.timestep_for_sigma(DDPM, sigma01)


def right_output(prediction: Prediction, x0: np.ndarray, eps: np.ndarray, bar: float, d: float) -> np.ndarray:
    """What a perfect network returns, from each parametrisation's own paper."""
    a, b = math.sqrt(bar), math.sqrt(1 - bar)
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        return a * eps - b * x0  # Salimans and Ho, appendix D
    s = b / a
    y = x0 + s * eps  # Karras et al., equation 7 and table 1
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / math.sqrt(s**2 + d**2)
    return (x0 - c_skip * y) / c_out


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(timestep=st.integers(0, 999), sigma_data=st.floats(0.05, 2.0))
def test_the_right_output_gives_the_image_back(prediction: Prediction, timestep: int, sigma_data: float) -> None:
    rng = np.random.default_rng(timestep)
    x0, eps = rng.uniform(-1, 1, 64), rng.normal(size=64)
    bar = float(schedule.alpha_bar(DDPM)[timestep])
    c = schedule.coefficients(prediction, bar, sigma_data)
    x_k = c.signal * x0 + c.noise * eps
    back = c.skip * x_k + c.out * right_output(prediction, x0, eps, bar, sigma_data)
    # Worst seen 1.1e-13 (eps near k = 999, where x_k is multiplied by 157); factor 9.
    np.testing.assert_allclose(back, x0, rtol=0, atol=1e-12)
    assert c.signal**2 + c.noise**2 == pytest.approx(1.0, abs=1e-15)


@given(timestep=st.integers(0, 999), sigma_data=st.floats(0.05, 2.0))
def test_edm_inputs_have_unit_variance(timestep: int, sigma_data: float) -> None:
    c = schedule.coefficients("edm", float(schedule.alpha_bar(DDPM)[timestep]), sigma_data)
    assert c.input_scale**2 * (c.signal**2 * sigma_data**2 + c.noise**2) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("bar", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_bad_alpha_bar(bar: float) -> None:
    with pytest.raises(ConfigError, match="alpha_bar"):
        schedule.coefficients("eps", bar, 0.5)
