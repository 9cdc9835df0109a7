"""The attack on the smoothed detector, and certificates under it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from models import certifiable, small_model
from parts import disc

from advrad_fast import Detector
from advrad_fast.certify import Certificate
from advrad_fast.errors import ConfigError
from advrad_fast.evaluation.attacks.pgd import PGD
from advrad_fast.evaluation.attacks.pipeline import generator, to_float
from advrad_fast.evaluation.attacks.smoothed import SmoothedPipeline, attack_smoothed
from advrad_fast.evaluation.attacks.square import Square, square
from advrad_fast.evaluation.certified_attack import attack_certified
from advrad_fast.evaluation.rows import Budget
from advrad_fast.reference.smoothing import draw_lattice_noise

SIGMA = 0.25
MODEL = certifiable(small_model(), SIGMA)
FRAME = disc(np.random.default_rng(3), 32)


def test_the_smoothed_score_is_the_one_that_votes() -> None:
    """With the noise of the detector's own stream; 4e-7 apart at worst over ten seeds, from the order of fp32 sums."""
    pipeline = SmoothedPipeline(MODEL, SIGMA)
    z = draw_lattice_noise(pipeline.shape, SIGMA, seed=5, draws=6, image_ids=[0])
    got = pipeline.scores(to_float(FRAME[None], pipeline.device), (z.float() / 255.0)[None, :, None])[0]
    wanted = Detector(MODEL, backend="reference").smoothed_scores(FRAME, 6, seed=5)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=5e-6)


def test_the_attackers_noise_is_on_the_lattice() -> None:
    noise = SmoothedPipeline(MODEL, SIGMA).draw([generator(1)], 4) * 255.0
    assert float((noise - noise.round()).abs().max()) < 1e-3
    assert float(noise.std()) == pytest.approx(SIGMA * 255.0, rel=0.05)


@pytest.mark.parametrize("label", [0, 1])
def test_the_attack_moves_votes_within_the_radius(label: int) -> None:
    pipeline = SmoothedPipeline(MODEL, SIGMA)
    x = to_float(FRAME[None], pipeline.device)
    noise = pipeline.draw([generator("fresh")], 100)
    clean = pipeline.scores(x, noise)[0]
    threshold = float(clean.median())
    radius = 2.0
    found = attack_smoothed(pipeline, FRAME[None], [label], radius, threshold, generators=[generator(0)], steps=15, eot=4)
    attacked = to_float(found.rounded, pipeline.device)
    assert float((attacked - x).double().norm()) <= radius * (1 + 1e-6)
    share = float((pipeline.scores(attacked, noise)[0] > threshold).double().mean())
    assert share > 0.6 if label == 0 else share < 0.4


def certificate(radius: float, threshold: float) -> Certificate:
    return Certificate("OK", radius, 1000, 0.999999, SIGMA, 0.001, threshold, "fixed")


def test_false_certificates_are_found_out_and_true_ones_hold() -> None:
    detector = Detector(MODEL, backend="reference")
    scores = detector.smoothed_scores(FRAME, 200, seed=1)
    frames, certificates = [FRAME, FRAME], [certificate(1.1, float(np.quantile(scores, 0.55))), certificate(0.5, 1e6)]
    false, true = attack_certified(detector, frames, certificates, steps=15, eot=4, votes=200)
    assert false.flipped and false.share > 0.5 and 0.0 < false.distance < 1.1
    assert not true.flipped and true.share == 0.0 and true.distance < 0.5
    (further,) = attack_certified(detector, [FRAME], certificates[:1], steps=15, eot=4, votes=20, factor=2.0)
    assert 1.1 < further.distance < 2.2 and further.radius == 1.1


def test_what_cannot_be_tried_is_left_out_or_refused() -> None:
    detector = Detector(MODEL, backend="reference")
    nothing = Certificate("ABSTAIN", 0.0, 100, 0.4, SIGMA, 0.001, 1.0, "fixed")
    assert attack_certified(detector, [FRAME, FRAME], [nothing, certificate(0.003, 1.0)]) == []
    with pytest.raises(ConfigError, match="certificates"):
        attack_certified(detector, [FRAME], [])
    with pytest.raises(ConfigError, match="factor"):
        attack_certified(detector, [FRAME], [nothing], factor=0.0)
    with pytest.raises(ConfigError, match="sigma"):
        SmoothedPipeline(MODEL, 0.5)


@pytest.mark.parametrize("name", ["linf 16/255", "l2 1"])
def test_square_needs_no_gradient_and_keeps_the_budget(name: str) -> None:
    from advrad_fast.evaluation.attacks.pipeline import ScorePipeline

    pipeline, budget = ScorePipeline(small_model()), Budget.parse(name)
    with torch.no_grad():
        found = square(pipeline, FRAME[None], [0], budget, Square(queries=40, eot=1, refresh=10), generators=[generator(2)])
    x = to_float(FRAME[None], pipeline.device)
    change = to_float(found.rounded, pipeline.device) - x
    size = change.abs().max() if budget.norm == "linf" else change.double().norm()
    assert 0.0 < float(size) <= budget.size * (1 + 1e-6)
    noise = pipeline.draw([generator("fresh")], 8)
    ones = torch.ones(1)
    assert float(pipeline.gains(found.images, ones, noise)) > float(pipeline.gains(x, ones, noise))


def test_the_squares_shrink() -> None:
    sides = [Square(queries=1000).side(q, 64, 64) for q in range(1000)]
    assert sides[0] == 57 and sides == sorted(sides, reverse=True) and 1 <= sides[-1] <= 4
    assert dataclasses.asdict(PGD())["steps"] == 100
