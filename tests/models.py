"""Small model files for the tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from advrad_fast.calibrate import conformal_threshold
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, PoseConfig, ScoreConfig, UNetConfig
from advrad_fast.graph import expected_tensors
from advrad_fast.model import ModelFile, round_to_half
from advrad_fast.smoothing import Smoothing, folded


def tiny_model(spread_map: bool = True, half: bool = False, /, **changes: Any) -> ModelFile:
    """A tiny detector with random numbers."""
    rng = np.random.default_rng(5)
    config = DetectorConfig(
        unet=UNetConfig(in_channels=1, base_channels=2, channel_mult=(1,), norm_groups=2, patch=2),
        diffusion=DiffusionConfig(timestep=40),
        score=ScoreConfig(filter_size=3, spread=spread_map),
        image=ImageConfig(height=8, width=16, channels=1, pose=PoseConfig()),
    )
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in expected_tensors(config.unet).items()}
    scores = np.sort(rng.random(30))
    fields: dict[str, Any] = {
        "config": config,
        "weights": round_to_half(weights) if half else weights,
        "mu": rng.random((8, 16), dtype=np.float32),
        "spread": rng.random((8, 16), dtype=np.float32) + np.float32(0.1) if spread_map else None,
        "calibration_scores": scores,
        "false_alarm_rate": 0.1,
        "threshold": conformal_threshold(scores, 0.1),
        "provenance": {"data": "sha256:00", "steps": 10, "rate": 0.5, "ema": True, "note": None, "licence": 'für \u2603 "x"'},
    }
    return ModelFile(**{**fields, **changes})


def smoothing(config: DetectorConfig, sigma: float = 0.25, /, **changes: Any) -> Smoothing:
    """What a model certifies with at ``sigma``: random numbers; other weights than the model's where it has no normalisation."""
    rng = np.random.default_rng(int(1000 * sigma))
    size = (config.image.height, config.image.width)
    channels = sum(folded(config.unet).values())
    affine = np.stack([rng.uniform(0.5, 1.5, channels), rng.normal(0.0, 0.1, channels)]).astype(np.float32)
    fields: dict[str, Any] = {
        "score": ScoreConfig((0.0, 0.5, 0.5, 0.0), 5, True),
        "mu": rng.random(size, dtype=np.float32) * np.float32(0.05),
        "spread": rng.random(size, dtype=np.float32) + np.float32(0.5),
        "calibration_scores": np.sort(rng.random(30)),
        "draws": 5,
        "false_alarm_rate": 0.1,
        "threshold": 0.5,
        "affine": affine if channels else None,
    }
    return Smoothing(sigma, **{**fields, **changes})


def certifiable(model: ModelFile, *sigmas: float, **changes: Any) -> ModelFile:
    """The model with a :func:`smoothing` for each sigma."""
    return dataclasses.replace(model, smoothing=tuple(smoothing(model.config, sigma, **changes) for sigma in sigmas))


def without_norm(model: ModelFile) -> ModelFile:
    """The model with a network that has no normalisation, like the fast preset's."""
    unet = dataclasses.replace(model.config.unet, norm_groups=0)
    weights = {name: model.weights[name] for name in expected_tensors(unet)}
    return dataclasses.replace(model, config=dataclasses.replace(model.config, unet=unet), weights=weights)


def assert_equal(a: ModelFile, b: ModelFile) -> None:
    assert a.config == b.config
    assert list(a.weights) == list(b.weights)
    for name in a.weights:
        np.testing.assert_array_equal(a.weights[name], b.weights[name])
    np.testing.assert_array_equal(a.mu, b.mu)
    assert (a.spread is None) == (b.spread is None)
    np.testing.assert_array_equal(a.inverse_spread, b.inverse_spread)
    np.testing.assert_array_equal(a.calibration_scores, b.calibration_scores)
    assert (a.threshold, a.false_alarm_rate, a.provenance) == (b.threshold, b.false_alarm_rate, b.provenance)
    assert a.sigmas == b.sigmas
    for i, (one, other) in enumerate(zip(a.smoothing, b.smoothing, strict=True)):
        assert one.document() == other.document()
        assert list(one.tensors(i)) == list(other.tensors(i))
        for name, array in one.tensors(i).items():
            np.testing.assert_array_equal(array, other.tensors(i)[name])
    assert a.fingerprint == b.fingerprint


def small_model(*, spread: bool = False, pose: PoseConfig | None = None, **changes: Any) -> ModelFile:
    """A detector of 32 x 32 colour images that every backend runs in a millisecond: random weights, none of them zero."""
    rng = np.random.default_rng(7)
    config = DetectorConfig(
        unet=UNetConfig(base_channels=8, channel_mult=(1, 2), norm_groups=4, patch=2, prediction="x0"),
        diffusion=DiffusionConfig(timestep=100),
        score=ScoreConfig(filter_size=3, spread=spread),
        image=ImageConfig(height=32, width=32, pose=pose),
    )
    weights = {}
    for name, shape in expected_tensors(config.unet).items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:]))  # activations stay near 1
        elif "norm" in name and name.endswith("weight"):
            values = 1.0 + 0.3 * values
        weights[name] = values.astype(np.float16).astype(np.float32)
    scores = np.linspace(1.0, 2.0, 50)
    fields: dict[str, Any] = {
        "config": config,
        "weights": weights,
        "mu": np.linspace(0.0, 0.2, 32 * 32, dtype=np.float32).reshape(32, 32),
        "spread": np.linspace(0.5, 2.0, 32 * 32, dtype=np.float32).reshape(32, 32) if spread else None,
        "calibration_scores": scores,
        "false_alarm_rate": 0.1,
        "threshold": conformal_threshold(scores, 0.1),
    }
    return ModelFile(**{**fields, **changes})
