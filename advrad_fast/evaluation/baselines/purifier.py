"""Purification before detection: the image is noised to step t, denoised, and what comes out is shown to a detector.

This is DiffPure (Nie et al., arXiv 2205.07460) with an anomaly detector in the classifier's place.  The diffusion model has seen
normals only, so with the perturbation it also washes away the defect: the AdvRAD paper's argument for making the diffusion model
the detector itself.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, expected
from advrad_fast.evaluation.baselines.base import Baseline
from advrad_fast.model import ModelFile
from advrad_fast.reference import diffusion
from advrad_fast.reference.unet import UNet


class Purifier(Baseline):
    """Partial diffusion before ``detector``.

    The purified image is not clipped to [0, 1]: clipping would hide the gradient where the image is saturated.

    Args:
        network: the diffusion model.
        config: its configuration; ``diffusion.timestep`` and ``draws`` are not looked at.
        detector: a deterministic baseline.
        timestep: t, 0-based, the strength.
        steps: denoising steps, 1 to t + 1.  Gradients go through all of them.

    Raises:
        ConfigError: ``timestep`` or ``steps`` is out of range, or the detector is not deterministic.
    """

    def __init__(self, network: UNet, config: DetectorConfig, detector: Baseline, *, timestep: int, steps: int = 4) -> None:
        if detector.noise_shape != (0,):
            raise ConfigError(expected("detector", "a deterministic one", detector.name))
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= timestep + 1:
            raise ConfigError(expected("steps", f"an integer in [1, {timestep + 1}]", steps))
        self._config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, timestep=timestep, draws=1))
        self._network = network.eval().requires_grad_(False)
        self.detector, self.timestep, self.steps = detector, timestep, steps
        self.name = f"purifier t={timestep} m={steps} + {detector.name}"
        image = config.image
        self.noise_shape = (steps, image.channels, image.height, image.width)

    @classmethod
    def from_model(cls, model: ModelFile, detector: Baseline, *, timestep: int, steps: int = 4) -> Purifier:
        """With a trained detector's network.

        Raises:
            ConfigError: as above; or the network has no normalisation, so that it was made for one timestep, and another is asked
                for (train with ``norm_groups``).
        """
        k = model.config.diffusion.timestep
        if model.config.unet.norm_groups == 0 and (timestep, steps) != (k, 1):
            raise ConfigError(
                expected("model", "a network with norm_groups, to denoise at several timesteps", f"one without, made for k={k}")
            )
        with torch.device("meta"):
            network = UNet(model.config.unet)
        network.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in model.weights.items()}, assign=True)
        return cls(network, model.config, detector, timestep=timestep, steps=steps)

    def to(self, device: str | torch.device) -> Self:
        """See :meth:`Baseline.to`; the detector goes along."""
        self._network.to(device)
        self.detector.to(device)
        return super().to(device)

    def fit(self, images: NDArray[np.uint8]) -> None:
        """Fit the detector, on the images as they are."""
        self.detector.fit(images)

    def purify(self, images: Tensor, noise: Tensor) -> Tensor:
        """Float (N, C, H, W) in [0, 1] and noise (N, steps, C, H, W) -> (N, C, H, W), near [0, 1]."""
        x = diffusion.arbitrary_shot(
            self._network, 2.0 * images - 1.0, noise[:, 0], self._config, self.steps, step_noise=noise[:, 1:]
        )
        return (x + 1.0) / 2.0

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        draws = noise.shape[1]
        purified = self.purify(images.repeat_interleave(draws, dim=0), noise.flatten(0, 1))
        nothing = torch.empty((len(purified), 1, 0), device=self.device)
        found = self.detector.maps(purified, nothing)
        return found.reshape(-1, draws, *found.shape[2:])
