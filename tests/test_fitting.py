"""Choosing the settings and the normal maps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from parts import disc

from advrad_fast import calibrate
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, ScoreConfig, UNetConfig
from advrad_fast.reference import score
from advrad_fast.reference.unet import UNet
from advrad_fast.training import fitting
from advrad_fast.training.dataset import Split
from advrad_fast.training.pipeline import fit

UNET = UNetConfig(base_channels=8, channel_mult=(1, 2), norm_groups=4, prediction="x0")
CONFIG = DetectorConfig(UNET, DiffusionConfig(timestep=50), ScoreConfig(), ImageConfig(32, 32))
SPREAD = dataclasses.replace(CONFIG, score=ScoreConfig(spread=True))


def normals(count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    return np.stack([disc(rng, 32) for _ in range(count)])


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET).eval()  # its head is zero: it reconstructs grey, and errors are the image itself


def test_filter_and_weights_commute() -> None:
    """Weighting the filtered scales is the paper's order, filtering the weighted sum."""
    errors = torch.rand((3, 4, 32, 24))
    config = ScoreConfig((0.1, 0.2, 0.3, 0.4), 7)
    got = fitting.error_maps(fitting.filtered(errors, 7), config.scale_weights)
    torch.testing.assert_close(got, score.error_map(errors, config))


def test_normal_maps_by_hand() -> None:
    maps = torch.tensor([[[1.0, 4.0]], [[3.0, 4.0]]])
    plain = fitting.normal_maps(maps, ScoreConfig())
    assert plain.mu.tolist() == [[2.0, 4.0]]
    assert plain.spread.tolist() == [[1.0, 1.0]]
    spread = fitting.normal_maps(maps, ScoreConfig(spread=True)).spread
    floor = fitting.SPREAD_FLOOR * 2**0.5 / 2  # the standard deviations are sqrt(2) and 0
    assert spread[0].tolist() == pytest.approx([(2 + floor**2) ** 0.5, floor])


def test_errors_depend_on_the_image_and_its_id_alone() -> None:
    images = normals(4)
    together = fitting.scale_errors(network(), images, CONFIG, first_id=5)
    alone = fitting.scale_errors(network(), images[2:3], CONFIG, first_id=7)
    assert torch.equal(together[2:3], alone)


def test_selection_takes_the_most_noise_within_a_standard_error_of_the_best() -> None:
    config, trials = fitting.select(lambda config: network(), normals(12), normals(10), SPREAD, timesteps=[50, 100])
    assert len(trials) == 2 * len(fitting.FILTER_SIZES)
    best = max(trials, key=lambda t: t.auroc)
    within = [t for t in trials if t.auroc >= best.low]
    assert trials[0].timestep == max(t.timestep for t in within)
    assert trials[0].score.filter_size == max(t.score.filter_size for t in within if t.timestep == trials[0].timestep)
    assert (config.diffusion.timestep, config.score) == (trials[0].timestep, trials[0].score)
    assert best.auroc > 0.6  # the network reconstructs nothing: errors are the images themselves


def test_a_score_without_a_spread_keeps_its_weights() -> None:
    config, trials = fitting.select(lambda config: network(), normals(12), normals(10), CONFIG, timesteps=[50])
    assert {t.score.scale_weights for t in trials} == {CONFIG.score.scale_weights} and not config.score.spread


def test_a_score_with_a_spread_weighs_the_scales_equally() -> None:
    config, trials = fitting.select(lambda config: network(), normals(12), normals(10), SPREAD, timesteps=[50])
    assert config.score.spread and all(t.score.spread for t in trials)
    errors = fitting.scale_errors(network(), normals(12), config, first_id=1)
    smooth = fitting.filtered(errors, config.score.filter_size)
    varies = smooth.std(dim=0).mean(dim=(1, 2)) * torch.tensor(config.score.scale_weights)
    torch.testing.assert_close(varies, varies.mean().expand(4))
    assert sum(config.score.scale_weights) == pytest.approx(1.0)


def test_scales_without_variation_are_weighted_finitely() -> None:
    weights = fitting.equal_weights(torch.ones((3, 4, 8, 8)))
    assert weights == pytest.approx((0.25,) * 4)


def test_threshold_holds_its_rate() -> None:
    """With 19 calibration normals, 5 % is attainable and 1 % is raised to it."""
    weights = network().state_dict()
    split = Split(normals(12), normals(10), normals(19), "hash")
    common = {"half": True, "seed": 0, "timesteps": [50], "provenance": {}}
    plain = fit(weights, split, CONFIG, false_alarm_rate=0.05, chosen=lambda c: c, **common)  # type: ignore[arg-type]
    assert plain.false_alarm_rate == 0.05
    assert plain.threshold == plain.calibration_scores[-1]
    strict = fit(weights, split, CONFIG, false_alarm_rate=0.01, chosen=lambda c: c, **common)  # type: ignore[arg-type]
    assert strict.false_alarm_rate == calibrate.attainable_rate(19) == 0.05
    loose = fit(weights, split, CONFIG, false_alarm_rate=0.5, chosen=lambda c: c, **common)  # type: ignore[arg-type]
    assert (loose.calibration_scores > loose.threshold).mean() <= 0.5


def test_half_precision_weights_are_what_was_calibrated() -> None:
    weights = {name: w + 0.123456 for name, w in network().state_dict().items()}
    split = Split(normals(4), normals(4), normals(4), "hash")
    model = fit(
        weights, split, CONFIG, false_alarm_rate=0.3, half=True, seed=0, timesteps=[50], provenance={}, chosen=dataclasses.replace
    )
    for name, array in model.weights.items():
        assert np.array_equal(array, weights[name].half().float().numpy()), name
