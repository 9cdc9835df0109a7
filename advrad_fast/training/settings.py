"""The training presets and their settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from advrad_fast.config import ScoreConfig, UNetConfig, _Config, _integer, _number
from advrad_fast.errors import ConfigError, expected

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class TrainSettings(_Config):
    """What a training run does; every field is stored in the model file.

    Attributes:
        steps: optimiser steps.
        batch_size: images a step, over all processes.
        learning_rate: AdamW's peak, after a linear warm-up over ``warmup`` steps; a cosine takes it to zero.
        weight_decay: AdamW's.
        ema: decay of the exponential moving average of the weights, which is what the model file gets.
        clip: largest norm of the gradient.
        timestep_low, timestep_high: training timesteps are drawn uniformly from [low, high]; the one-shot detector uses
            one k, so time spent far from it is wasted.
        flip_horizontal, flip_vertical: augment with mirror images; only for parts that are symmetric.
        shift: augment with shifts of up to this many pixels (edges repeated).
        precision: arithmetic of the convolutions: ``bf16`` is autocast, ``auto`` takes it where the CPU or GPU is fast at it.
        seed: of the split, the initial weights, the batches and the noise.
        checkpoint_every: steps between checkpoints.
    """

    steps: int = 5000
    batch_size: int = 8
    learning_rate: float = 1.2e-3
    weight_decay: float = 1e-3
    warmup: int = 100
    ema: float = 0.998
    clip: float = 1.0
    timestep_low: int = 20
    timestep_high: int = 260
    flip_horizontal: bool = False
    flip_vertical: bool = False
    shift: int = 0
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer("steps", self.steps, 1, 10_000_000)
        _integer("batch_size", self.batch_size, 1, 4096)
        _integer("warmup", self.warmup, 0, 1_000_000)
        _integer("checkpoint_every", self.checkpoint_every, 1, 1_000_000)
        _integer("shift", self.shift, 0, 64)
        _integer("seed", self.seed, 0, 2**63 - 1)
        _number("learning_rate", self.learning_rate, 1e-8, 1.0)
        _number("weight_decay", self.weight_decay, 0.0, 1.0)
        _number("ema", self.ema, 0.0, 0.999999)
        _number("clip", self.clip, 1e-6, 1e6)
        _integer("timestep_low", self.timestep_low, 0, 99_999)
        _integer("timestep_high", self.timestep_high, self.timestep_low, 99_999)


@dataclass(frozen=True)
class Preset:
    """A network, how to train it, and how to score with it; s, k and, with a spread, the scales' weights are chosen later."""

    unet: UNetConfig
    settings: TrainSettings
    score: ScoreConfig


#: ``fast`` is for CPUs and line rates; ``paper`` is the paper's scale and wants a GPU.
PRESETS: dict[str, Preset] = {
    "fast": Preset(
        UNetConfig(base_channels=32, channel_mult=(1, 2, 4), norm_groups=0), TrainSettings(), ScoreConfig(spread=True)
    ),
    "paper": Preset(
        UNetConfig(
            base_channels=128,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(32,),
            patch=1,
            prediction="eps",
        ),
        TrainSettings(
            steps=30_000, batch_size=2, learning_rate=1e-4, weight_decay=1e-2, ema=0.9999, timestep_low=0, timestep_high=999
        ),
        ScoreConfig(),
    ),
}


def preset(name: str) -> Preset:
    """The preset of this name, or a ConfigError with the known ones."""
    if name not in PRESETS:
        raise ConfigError(expected("preset", f"one of {sorted(PRESETS)}", name))
    return PRESETS[name]


def replace(settings: TrainSettings, **changes: object) -> TrainSettings:
    """``settings`` with the changes that are not None."""
    return dataclasses.replace(settings, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
