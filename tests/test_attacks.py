"""The attacks: the differentiable score against the detector's, budgets kept exactly, and attacks that do what they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import small_model
from parts import disc

from advrad_fast import Detector
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, ImageError
from advrad_fast.evaluation.attacks.pgd import PGD, pgd
from advrad_fast.evaluation.attacks.pipeline import ScorePipeline, generator, seed_from, signs_of, to_float, to_uint8
from advrad_fast.evaluation.attacks.projection import levels, norms, project, random_start, step
from advrad_fast.evaluation.rows import Budget
from advrad_fast.model import ModelFile

LINF, L2 = Budget.parse("linf 8/255"), Budget.parse("l2 0.5")
QUICK = PGD(steps=12, eot=2, checks=4)


def with_draws(model: ModelFile, draws: int) -> ModelFile:
    config = model.config
    changed = DetectorConfig(config.unet, dataclasses.replace(config.diffusion, draws=draws), config.score, config.image)
    return dataclasses.replace(model, config=changed)


def frames(count: int, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(11)
    return np.stack([disc(rng, size) for _ in range(count)])


def generators(count: int, tag: object = 0) -> list[torch.Generator]:
    return [generator("test", tag, i) for i in range(count)]


@pytest.mark.parametrize(("spread", "draws"), [(False, 1), (True, 3)])
def test_the_differentiable_score_is_the_detectors(spread: bool, draws: int) -> None:
    """On lattice images; the worst relative difference over ten seeds was 4e-7, from the order of fp32 sums."""
    model = with_draws(small_model(spread=spread), draws)
    pipeline, detector = ScorePipeline(model), Detector(model, backend="reference")
    images = frames(4)
    images[1], images[2] = 0, 255
    noise = pipeline.detector_noise(99, 4)
    got = pipeline.scores(to_float(images, pipeline.device), noise)[:, 0]
    wanted = [detector.inspect(image, maps=False, seed=99).score for image in images]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=4e-6)


def test_the_gradient_is_that_of_the_score() -> None:
    """Along the gradient's own direction, against central differences in fp32: 1.5e-4 apart at worst over ten draws of noise."""
    pipeline = ScorePipeline(with_draws(small_model(), 2))
    x = to_float(frames(1), pipeline.device).requires_grad_(True)
    noise = pipeline.draw(generators(1), 3)

    def value(images: torch.Tensor) -> torch.Tensor:
        return pipeline.maps(images, noise).flatten(2).logsumexp(dim=2).double().sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    direction = gradient / gradient.norm()
    h = 1e-2
    numeric = (value(x.detach() + h * direction) - value(x.detach() - h * direction)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=2e-3)


budgets = st.builds(lambda norm, size: Budget.parse(f"{norm} {size:.4f}"), st.sampled_from(["linf", "l2"]), st.floats(0.004, 3.0))


@given(budget=budgets, seed=st.integers(0, 2**32), far=st.floats(0.01, 10.0), edge=st.booleans())
def test_projection(budget: Budget, seed: int, far: float, edge: bool) -> None:
    """Within both sets, and nearest: no point of both sets is nearer (the angle at a projection onto a convex set is obtuse)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, 2, 5, 5), generator=g) / 255.0
    if edge:
        x = (x > 0.5).float()
    y = x + far * torch.randn(x.shape, generator=g)
    p = project(y, x, budget)
    within(p, x, budget)
    others = project(x + budget.size * torch.randn(x.shape, generator=g), x, budget)
    assert ((y - p) * (others - p)).flatten(1).sum(dim=1).max() <= 1e-4 * (1.0 + far * far)
    torch.testing.assert_close(project(p, x, budget), p, rtol=0, atol=1e-6)


def within(p: torch.Tensor, x: torch.Tensor, budget: Budget) -> None:
    assert p.isfinite().all() and p.min() >= 0.0 and p.max() <= 1.0
    size = (p - x).abs().flatten(1).amax(dim=1) if budget.norm == "linf" else norms(p - x)
    assert float(size.max()) <= budget.size * (1 + 1e-6) + 1e-7


def test_joint_projection_reaches_further_than_clipping_after_scaling() -> None:
    """Half the values sit at the box's edge and cannot move: the other half may use the whole budget."""
    x = torch.zeros(1, 1, 1, 2)
    p = project(torch.tensor([[[[-3.0, 4.0]]]]), x, Budget.parse("l2 0.5"))
    torch.testing.assert_close(p, torch.tensor([[[[0.0, 0.5]]]]))


@given(budget=budgets, seed=st.integers(0, 2**32), small=st.booleans())
def test_levels_are_whole_and_within_the_budget(budget: Budget, seed: int, small: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (2, 3, 6, 6), generator=g) / 255.0
    y = project(x + budget.size * (0.3 if small else 1.0) * torch.randn(x.shape, generator=g), x, budget)
    change = levels(y, x, budget)
    image = x * 255.0 + change
    torch.testing.assert_close(change, change.round(), rtol=0, atol=0)
    assert image.min() >= -1e-3 and image.max() <= 255.001
    if budget.norm == "linf":
        assert float(change.abs().max()) <= budget.size * 255 + 1e-4
    else:
        squared = change.double().square().flatten(1).sum(dim=1)
        assert float(squared.max()) <= (budget.size * 255) ** 2 * (1 + 1e-6) + 1e-5


def test_levels_spend_an_l2_budget_that_rounding_would_erase() -> None:
    x = torch.full((1, 1, 32, 32), 0.5).mul(255).round() / 255
    budget = Budget.parse("l2 0.03")  # a quarter of a level each
    g = torch.Generator().manual_seed(0)
    y = project(x + torch.rand(x.shape, generator=g) - 0.5, x, budget)
    assert not (y * 255 - x * 255).round().any()
    change = levels(y, x, budget)
    spent = float(change.square().sum())
    assert spent == int((0.03 * 255) ** 2)  # single levels: nothing is left
    agrees = (change * (y - x))[change != 0]
    assert bool((agrees > 0).all())


@pytest.mark.parametrize("budget", [LINF, L2])
@pytest.mark.parametrize("edge", [False, True])
def test_random_starts_and_steps_keep_the_budget(budget: Budget, edge: bool) -> None:
    x = torch.ones(2, 3, 8, 8) if edge else to_float(frames(2, 8), torch.device("cpu"))
    start = random_start(x, budget, generators(2))
    within(start, x, budget)
    assert (start != x).any()
    moved = step(x, start - x, budget.size, budget) - x
    size = moved.abs().amax() if budget.norm == "linf" else norms(moved).max()
    assert float(size) == pytest.approx(budget.size, rel=1e-5)
    assert (step(x, torch.zeros_like(x), 1.0, budget) == x).all()


def detector_gain(model: ModelFile, before: np.ndarray, after: np.ndarray, labels: list[int]) -> np.ndarray:
    """How far the scores moved against their labels, through the detector, mean over eight seeds that no attack has seen."""
    detector = Detector(model, backend="reference")

    def scores(images: np.ndarray) -> np.ndarray:
        found = [[detector.inspect(i, maps=False, seed=1000 + s).score for s in range(8)] for i in images]
        return np.array(found, dtype=np.float64).mean(axis=1)

    return (scores(after) - scores(before)) * (1 - 2 * np.array(labels))


@pytest.mark.parametrize("budget", [LINF, L2])
def test_pgd_moves_both_classes_within_the_budget(budget: Budget) -> None:
    model, images, labels = small_model(), frames(4), [0, 1, 0, 1]
    pipeline = ScorePipeline(model)
    found = pgd(pipeline, images, labels, budget, QUICK, generators=generators(4))
    x = to_float(images, pipeline.device)
    within(found.images, x, budget)
    within(to_float(found.rounded, pipeline.device), x, budget)
    assert (detector_gain(model, images, found.rounded, labels) > 0.02).all()
    noise = pipeline.draw(generators(4, "fresh"), 8)
    signs = signs_of(labels, pipeline.device)
    assert (pipeline.gains(found.images, signs, noise) > pipeline.gains(x, signs, noise)).all()


def test_an_image_is_attacked_alike_alone_and_in_a_batch() -> None:
    images, labels = frames(3), [0, 1, 0]
    together = pgd(ScorePipeline(small_model()), images, labels, L2, QUICK, generators=generators(3))
    alone = pgd(ScorePipeline(small_model()), images[1:2], [1], L2, QUICK, generators=generators(3)[1:2])
    np.testing.assert_allclose(alone.images[0].numpy(), together.images[1].numpy(), atol=2e-3)
    assert alone.gain[0] == pytest.approx(together.gain[1], rel=1e-2)


def test_the_margin_version_stops_once_the_decision_has_flipped() -> None:
    model, images = small_model(), frames(2)
    pipeline = ScorePipeline(model)
    scores = [Detector(model, backend="reference").inspect(i, maps=False).score for i in images]
    threshold = float(np.mean([s for s in scores if s is not None])) * 1.05
    settings = PGD(steps=60, eot=2, checks=4)
    long = pgd(pipeline, images, [0, 0], LINF, settings, generators=generators(2))
    short = pgd(pipeline, images, [0, 0], LINF, settings, generators=generators(2), threshold=threshold)
    assert short.queries < long.queries
    assert (short.gain > threshold).all()


def test_settings_are_checked() -> None:
    for changes in ({"steps": 0}, {"eot": True}, {"restarts": 1.5}, {"first_step": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            PGD(**changes)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="uint8"):
        to_float(np.zeros((1, 4, 4, 3), np.float32), torch.device("cpu"))


def test_seeds_are_functions_of_what_they_are_for() -> None:
    assert seed_from(1, "a") == seed_from(1, "a") != seed_from("1a")
    assert seed_from(1, "ab") != seed_from("1a", "b")
    images = frames(2)
    assert (to_uint8(to_float(images, torch.device("cpu"))) == images).all()
