"""The fused operation ``reconstruction_error`` in C++ against its plain form."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from operations import ERROR_UNIT, SHAPES, Case, coefficients, run_noise

from advrad_fast import _native, lattice, schedule
from advrad_fast.config import PREDICTIONS, Prediction, ScoreConfig
from advrad_fast.reference import smoothing
from advrad_fast.schedule import Coefficients


# PyTorch takes 10 s and more over 255 x 255 windows in the large shapes.
@pytest.mark.parametrize(
    ("shape", "filter_size"), [(shape, s) for shape in SHAPES for s in (1, 3, 15, 255) if s < 255 or shape[1] * shape[2] < 10_000]
)
def test_reconstruction_error_equals_reference(
    rng: np.random.Generator, shape: tuple[int, int, int, int, int], filter_size: int
) -> None:
    case, config = Case(rng, shape, coefficients()), ScoreConfig(filter_size=filter_size)
    expected_scores, expected_maps, tolerance = case.plain(config)
    scores, maps = case.run(config)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=tolerance)
    assert maps is not None
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    without_maps, _ = case.run(config, maps=False)
    np.testing.assert_array_equal(without_maps, scores)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timestep", [0, 145, 600])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0)])
def test_every_parametrisation_and_scale(
    rng: np.random.Generator, prediction: Prediction, timestep: int, weights: tuple[float, float, float, float]
) -> None:
    case = Case(rng, (2, 24, 40, 3, 2), coefficients(prediction, timestep))
    config = ScoreConfig(scale_weights=weights, filter_size=5)
    expected_scores, expected_maps, tolerance = case.plain(config)
    scores, maps = case.run(config)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=tolerance)


def test_a_perfect_network_has_no_error(rng: np.random.Generator) -> None:
    """The noise drawn again is the noise of the inputs: x0 prediction of the image itself, and eps prediction of the noise."""
    case = Case(rng, (2, 32, 32, 3, 1), coefficients("eps"))
    case.mu = np.zeros((32, 32), dtype=np.float32)
    case.outputs = np.stack([_native.normals(3 * 32 * 32, case.seed).reshape(3, 32, 32)] * 2)
    scores, _ = case.run(ScoreConfig())
    assert scores.max() < 1e-12  # squares of fp32 rounding


def test_small_errors_beside_large_ones(rng: np.random.Generator) -> None:
    """No running sum: a window that holds no outlier does not remember one."""
    case = Case(rng, (1, 64, 64, 1, 1), Coefficients(1.0, 0.0, 1.0, 1.0, 1.0))
    case.mu, case.inverse_spread = np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)
    case.outputs[:] = 1e-3
    config = ScoreConfig(scale_weights=(1.0, 0.0, 0.0, 0.0), filter_size=15)
    _, quiet = case.run(config)
    case.outputs[0, 0, 0, 0] = 1e9
    _, loud = case.run(config)
    assert quiet is not None and loud is not None
    assert loud[0, 0, 0] > 1e15
    np.testing.assert_array_equal(loud[0, 8:], quiet[0, 8:])
    np.testing.assert_array_equal(loud[0, :, 8:], quiet[0, :, 8:])
    np.testing.assert_allclose(quiet, 1e-6, rtol=2e-4)  # 1e-3 beside x of order 1 in fp32


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("at", [(2, 0, 0, 0), (3, 2, 31, 23), (3, 1, 17, 9)])
@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.0, 1.0)])
@pytest.mark.parametrize("filter_size", [1, 15])
def test_a_fault_never_gives_a_finite_score(
    rng: np.random.Generator,
    value: float,
    at: tuple[int, int, int, int],
    weights: tuple[float, float, float, float],
    filter_size: int,
) -> None:
    """One bad value in any draw of image 1, at any place: that image's score is bad, and its neighbours' are untouched."""
    case, config = Case(rng, (3, 32, 24, 3, 2), coefficients()), ScoreConfig(scale_weights=weights, filter_size=filter_size)
    clean, _ = case.run(config)
    case.outputs[at] = value
    for maps in (True, False):
        scores, _ = case.run(config, maps=maps)
        assert not math.isfinite(scores[1])
        if math.isnan(value):
            assert math.isnan(scores[1])
        np.testing.assert_array_equal(scores[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("name", ["mu", "inverse_spread"])
def test_nan_in_the_normal_map_is_seen(rng: np.random.Generator, name: str) -> None:
    case = Case(rng, (1, 16, 16, 1, 1), coefficients())
    array = getattr(case, name).copy()
    array[15, 15] = np.nan
    setattr(case, name, array)
    assert np.isnan(case.run(ScoreConfig())[0]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_neighbours(rng: np.random.Generator, channels: int) -> None:
    case, config = Case(rng, (5, 24, 32, channels, 2), coefficients()), ScoreConfig()
    inputs = run_noise(case.images, 2, case.seed, case.c)
    scores, maps = case.run(config)
    assert maps is not None
    images, outputs = case.images, case.outputs
    np.testing.assert_array_equal(case.inputs, inputs)
    for i in range(5):
        own = slice(2 * i, 2 * i + 2)
        case.images, case.inputs, case.outputs = images[i : i + 1], inputs[own], outputs[own]
        np.testing.assert_array_equal(run_noise(case.images, 2, case.seed, case.c), inputs[own])
        one_score, one_map = case.run(config)
        assert one_map is not None
        np.testing.assert_array_equal(one_score, scores[i : i + 1])
        np.testing.assert_array_equal(one_map, maps[i : i + 1])


def test_weights_are_used_as_given(rng: np.random.Generator) -> None:
    """The map is linear in the weights: checked apart from the reference."""
    case = Case(rng, (1, 16, 16, 1, 1), coefficients())
    case.mu, case.inverse_spread = np.zeros((16, 16), np.float32), np.ones((16, 16), np.float32)
    config = ScoreConfig(scale_weights=(0.1, 0.2, 0.3, 0.4), filter_size=3)
    _, together = case.run(config)
    parts = np.zeros((1, 16, 16))
    for i, weight in enumerate(config.scale_weights):
        _, part = case.run(replace(config, scale_weights=tuple(weight if j == i else 0.0 for j in range(4))))  # type: ignore[arg-type]
        assert part is not None
        parts += part
    np.testing.assert_allclose(together, parts, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("filter_size", [1, 7])
def test_smoothed_error_equals_reference(
    rng: np.random.Generator, shape: tuple[int, int, int, int, int], filter_size: int
) -> None:
    """With lattice noise the reconstruction is held against x + delta, which is the network's inputs, scaled."""
    n, h, w, channels, draws = shape
    case = Case(rng, shape, coefficients("x0"))
    config, sigma = ScoreConfig(filter_size=filter_size), 0.25
    case.inputs = run_noise(case.images, draws, case.seed, case.c, lattice=_native.Lattice(lattice.thresholds(sigma)))
    scores, maps = case.run(config, smoothed=True)
    z = smoothing.draw_lattice_noise((channels, h, w), sigma, seed=case.seed, draws=draws, image_ids=[0] * n)
    mu, spread = (torch.from_numpy(a.astype(np.float64)) for a in (case.mu, case.inverse_spread))
    outputs = torch.from_numpy(case.outputs).double()
    images = torch.from_numpy(case.images.copy())
    expected_scores, expected_maps = smoothing.smoothed_error(images, outputs, z, mu, spread, config, case.c, draws)
    largest = float(expected_maps.max()) / float(spread.min()) + float(mu.max())
    size = 2 + float(z.abs().max()) * 2 / 255  # of the terms in x - x~
    tolerance = ERROR_UNIT * float(spread.max()) * (size * largest**0.5 + largest)
    np.testing.assert_allclose(maps, expected_maps.numpy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, expected_scores.numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("filter_size", [1, 5, 255])
@pytest.mark.parametrize("smoothed", [False, True])
def test_threads_and_neighbours_change_nothing(rng: np.random.Generator, threads: int, filter_size: int, smoothed: bool) -> None:
    """The scores of six draws of two images, one by one and together, with any number of threads: the same bits."""
    case, config = Case(rng, (2, 72, 136, 3, 6), coefficients()), ScoreConfig(filter_size=filter_size)
    case.draws = 1
    scores, maps = case.run(config, smoothed=smoothed)
    again, same = case.run(config, smoothed=smoothed, threads=threads)
    np.testing.assert_array_equal(again, scores)
    np.testing.assert_array_equal(same, maps)
    images, inputs, outputs = case.images, case.inputs, case.outputs
    for i in range(12):
        case.images, case.inputs, case.outputs = images[i // 6 : i // 6 + 1], inputs[i : i + 1], outputs[i : i + 1]
        alone, _ = case.run(config, maps=False, smoothed=smoothed, threads=threads)
        np.testing.assert_array_equal(alone, scores[i : i + 1])


def test_inputs_are_left_out_where_their_coefficient_is_zero(rng: np.random.Generator) -> None:
    case, config = Case(rng, (1, 24, 40, 3, 2), coefficients("x0")), ScoreConfig()
    assert schedule.error_coefficients(case.c)[0] == 0.0
    expected, _ = case.run(config)
    case.inputs = None  # type: ignore[assignment]
    np.testing.assert_array_equal(case.run(config)[0], expected)
