"""The smoothed detector's scores on CPUs against the plain form, and what they may depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_backends import CONFIG, HEIGHT, INVERSE_SPREAD, MU, PRECISIONS, WEIGHTS, WIDTH, frames

from advrad_fast import schedule
from advrad_fast.backends import cpu_votes
from advrad_fast.backends.cpu_votes import CpuVotes
from advrad_fast.config import UNetConfig
from advrad_fast.errors import ConfigError, ImageError, InferenceError, ModelFileError
from advrad_fast.reference import smoothing
from advrad_fast.reference.unet import UNet

SIGMA = 0.25
IMAGE = frames()[3]


def votes(config: Any = CONFIG, **options: Any) -> CpuVotes:
    options = {"sigma": SIGMA, "threads": 2, "precision": "fp32", "cache_dir": False, "batch": 3, "weights": WEIGHTS, **options}
    return CpuVotes(config, mu=MU, inverse_spread=INVERSE_SPREAD, **options)


# Relative difference of a score, worst seen over the parametrisations: fp32 1.3e-6, times 4; bf16 1.1e-2, times 4.
BOUNDS = {"fp32": 5e-6, "bf16": 5e-2}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "edm"])
def test_scores_equal_the_plain_form(precision: Any, prediction: Any) -> None:
    unet = UNetConfig.from_json({**CONFIG.unet.to_json(), "prediction": prediction})
    config = type(CONFIG)(unet, CONFIG.diffusion, CONFIG.score, CONFIG.image)
    made = votes(config, precision=precision)
    scores = made.scores(IMAGE, seed=9, draws=7, first_draw=2)
    assert scores.dtype == np.float32 and scores.shape == (7,)
    timestep = schedule.timestep_for_sigma(config.diffusion, SIGMA)
    c = schedule.coefficients(prediction, float(schedule.alpha_bar(config.diffusion)[timestep]), unet.sigma_data)
    net = UNet(unet).eval()
    net.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in WEIGHTS.items()})
    images = torch.from_numpy(IMAGE[None])
    z = smoothing.draw_lattice_noise((3, HEIGHT, WIDTH), SIGMA, seed=9, draws=9, image_ids=[0])[2:]
    with torch.inference_mode():
        outputs = net(smoothing.lattice_inputs(images, z, c), torch.full((7,), timestep))
    mu, spread = torch.from_numpy(np.array(MU)), torch.from_numpy(np.array(INVERSE_SPREAD))
    wanted, _ = smoothing.smoothed_error(images, outputs, z, mu, spread, config.score, c)
    np.testing.assert_allclose(scores, wanted.numpy(), rtol=BOUNDS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_score_depends_on_frame_seed_and_draw_alone(precision: Any) -> None:
    made = votes(precision=precision)
    scores = made.scores(IMAGE, seed=1, draws=8)
    for first, draws in ((0, 1), (3, 5), (7, 1), (2, 4)):
        assert np.array_equal(made.scores(IMAGE, seed=1, draws=draws, first_draw=first), scores[first : first + draws])
    assert not np.array_equal(made.scores(IMAGE, seed=2, draws=8), scores)
    assert made.scores(IMAGE, seed=1, draws=0).shape == (0,)
    assert np.array_equal(made.scores(np.asfortranarray(IMAGE), seed=1, draws=8), scores)


def test_the_batch_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = votes(batch=None, cache_dir=tmp_path)
    assert first.batch in cpu_votes.BATCHES
    monkeypatch.setattr(cpu_votes.time, "perf_counter", None)  # nothing is timed again
    second = votes(batch=None, cache_dir=tmp_path)
    assert second.batch == first.batch
    assert np.array_equal(first.scores(IMAGE, seed=1, draws=3), second.scores(IMAGE, seed=1, draws=3))


@pytest.mark.parametrize("choice", [b"5", b"", b"\xff"])
def test_a_kept_choice_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: bytes) -> None:
    monkeypatch.setattr(cpu_votes.cache, "load", lambda folder, name: choice)
    assert votes(batch=None, cache_dir=False, engine="openvino").batch in cpu_votes.BATCHES


def test_refusals() -> None:
    made = votes()
    for image in (IMAGE.astype(np.float32), IMAGE[:-1], IMAGE[None], "x"):
        with pytest.raises(ImageError, match=r"image: expected uint8 \(48, 64, 3\)"):
            made.scores(image, seed=0, draws=1)  # type: ignore[arg-type]
    for options in ({"seed": -1}, {"draws": -1}, {"draws": 1.5}, {"draws": True}, {"first_draw": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            made.scores(IMAGE, **{"seed": 0, "draws": 1, **options})  # type: ignore[arg-type]
    for options in ({"sigma": 0.0}, {"sigma": 1e3}, {"batch": 0}, {"batch": 1.0}, {"threads": 0}, {"precision": "fp8"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            votes(**options)
    with pytest.raises(ModelFileError, match="tensor"):
        votes(weights={})
    broken = np.array(WEIGHTS["head.bias"])
    broken[0] = np.nan
    with pytest.raises(InferenceError, match="scores: expected finite numbers"):
        votes(weights={**WEIGHTS, "head.bias": broken}).scores(IMAGE, seed=0, draws=4)
