"""The way from a camera's frame to the prepared image, as an attacker sees it: exact forwards, linear backwards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from models import small_model
from pictures import POSE, part
from PIL import Image

from advrad_fast import Detector, images
from advrad_fast.config import ImageConfig
from advrad_fast.errors import PartNotFoundError
from advrad_fast.evaluation.attacks.camera import Preparation
from advrad_fast.evaluation.attacks.pipeline import ScorePipeline, to_float

CPU = torch.device("cpu")
CONFIGS = {
    "posed": ImageConfig(32, 32, 3, pose=POSE),
    "posed, brightened": ImageConfig(32, 32, 3, pose=POSE, brightness=0.4),
    "posed, grey": ImageConfig(32, 64, 1, pose=POSE),
    "resized": ImageConfig(32, 32, 3),
}


def turned(angle: float = 30.0, size: int = 1) -> np.ndarray:
    """The part at an angle: uint8 (100 size, 120 size, 1)."""
    image = Image.fromarray(part()).rotate(angle, Image.Resampling.BICUBIC, fillcolor=200)
    return np.array(image.resize((image.width * size, image.height * size), Image.Resampling.BICUBIC))[:, :, None]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [1, 3])
def test_forwards_it_is_the_preparation(name: str, size: int) -> None:
    frame = turned(size=size)
    prepared = Preparation(frame, CONFIGS[name])(to_float(frame[None], CPU))
    wanted = images.prepare(frame, CONFIGS[name]).image
    assert np.array_equal((prepared[0] * 255.0).round().permute(1, 2, 0).numpy().astype(np.uint8), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [1, 3])
def test_backwards_it_follows_the_preparation(name: str, size: int) -> None:
    """A smooth change of the frame, of twenty levels at most, and the change d of the prepared image that comes of it: the
    gradient of d x, along the frame's change, is d d, but for rounding and Pillow's other bicubic kernel (4 % here at worst)."""
    config = CONFIGS[name]
    rng = np.random.default_rng(1)
    for angle in (0.0, 30.0, 200.0):
        frame = turned(angle, size)
        coarse = torch.from_numpy(rng.uniform(-20.0, 20.0, (1, frame.shape[2], 6, 6)))
        change = torch.nn.functional.interpolate(coarse, frame.shape[:2], mode="bicubic").round().float()
        moved = (frame + change[0].permute(1, 2, 0).numpy()).clip(0, 255).astype(np.uint8)
        actual = images.prepare(moved, config).image.astype(np.float32) - images.prepare(frame, config).image
        x = to_float(frame[None], CPU).requires_grad_(True)
        towards = (Preparation(frame, config)(x)[0] * torch.from_numpy(actual).permute(2, 0, 1)).sum()
        (gradient,) = torch.autograd.grad(towards, x)
        assert float((gradient * change).sum()) == pytest.approx(float(np.square(actual).sum()), rel=0.1)


def test_the_score_is_the_detectors() -> None:
    model = small_model(pose=POSE)
    frame = turned(70.0, 2)
    base = ScorePipeline(model)
    pipeline = base.through(Preparation(frame, model.config.image))
    got = pipeline.scores(to_float(frame[None], CPU), pipeline.detector_noise(9))[0, 0]
    assert float(got) == pytest.approx(Detector(model, backend="reference").inspect(frame, seed=9).score, rel=4e-6)
    assert base.prepared(to_float(frame[None], CPU)).shape[2:] == frame.shape[:2]  # it was not changed itself


def test_a_frame_that_loses_its_part_keeps_the_pose() -> None:
    """What the detector makes of it is not the attack's affair; a gradient there is."""
    config = CONFIGS["posed"]
    frame = turned()
    through = Preparation(frame, config)
    empty = torch.full((1, frame.shape[2], *frame.shape[:2]), 0.5, requires_grad=True)
    prepared = through(empty)
    assert torch.allclose(prepared, torch.full_like(prepared, 0.5))
    (gradient,) = torch.autograd.grad(prepared.sum(), empty)
    assert float(gradient.abs().sum()) > 0.0
    with pytest.raises(PartNotFoundError):
        Preparation(np.full_like(frame, 128), config)
    Preparation(frame, dataclasses.replace(config, pose=None))
