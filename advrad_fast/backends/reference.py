"""The plain PyTorch pipeline in fp32: slow, everywhere, and the truth that the other backends are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast import lattice, schedule
from advrad_fast.backends.base import (
    Array,
    Frame,
    FrameBackend,
    Votes,
    check_draws,
    check_scores,
    check_threads,
    milliseconds,
    now,
)
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import InferenceError
from advrad_fast.graph import check_weights
from advrad_fast.reference import diffusion, score, smoothing
from advrad_fast.reference.unet import UNet


@contextmanager
def _typed_errors() -> Iterator[None]:
    """PyTorch says everything with RuntimeError, memory that ran out too."""
    try:
        yield
    except InferenceError:
        raise
    except RuntimeError as error:
        raise InferenceError("PyTorch failed: " + str(error).partition("\n")[0]) from error


class ReferenceBackend(FrameBackend):
    """PyTorch fp32 on the CPU.

    Args:
        config: the detector's settings.
        weights: float32, exactly :func:`advrad_fast.graph.expected_tensors` of ``config.unet``; copied.
        mu, inverse_spread: float32 (H, W), the normal map and one over its spread; copied.
        threads: PyTorch's thread count, which is the whole process's; None leaves it as it is.

    Raises:
        ModelFileError: a tensor is missing, unknown, mis-shaped or not float32.
        ConfigError: ``threads`` is out of range.
    """

    name = "reference"
    precision = "fp32"

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        mu: Array,
        inverse_spread: Array,
        *,
        threads: int | None = None,
    ) -> None:
        super().__init__(config, mu, inverse_spread)
        check_weights(config.unet, weights)
        threads = check_threads(threads)
        if threads is not None:
            torch.set_num_threads(threads)
        self._network = _network(config, weights)
        self._mu, self._inverse_spread = _tensor(mu), _tensor(inverse_spread)
        self._coefficients = diffusion.coefficients_at(config)
        self._eps: tuple[int, Tensor] | None = None

    def votes(
        self, config: DetectorConfig, weights: Mapping[str, Array], mu: Array, inverse_spread: Array, *, sigma: float
    ) -> Votes:
        """See :meth:`advrad_fast.backends.base.Backend.votes`."""
        return ReferenceVotes(config, weights, mu, inverse_spread, sigma=sigma)

    @_typed_errors()
    @torch.inference_mode()
    def _frame(self, image: NDArray[np.uint8], seed: int, maps: NDArray[np.float32] | None) -> Frame:
        config, c = self._config, self._coefficients
        start = now()
        images = torch.from_numpy(np.array(image))
        eps = self._noise(seed)
        x = diffusion.noise(images, eps, c)
        noised = now()
        timesteps = torch.full((len(x),), config.diffusion.timestep)
        outputs = self._network(x, timesteps)
        inferred = now()
        scores, errors = score.reconstruction_error(images, outputs, eps, self._mu, self._inverse_spread, config.score, c)
        if maps is not None:
            maps[:] = errors.numpy()
        timings = {
            "noise": milliseconds(start, noised),
            "network": milliseconds(noised, inferred),
            "error": milliseconds(inferred, now()),
        }
        return Frame(float(scores[0]), timings)

    def _noise(self, seed: int) -> Tensor:
        """A seed's noise is the same for every frame: the last seed's is kept, in one assignment, so that threads may race."""
        kept = self._eps
        if kept is None or kept[0] != seed:
            image = self._config.image
            shape = (image.channels, image.height, image.width)
            kept = (seed, diffusion.draw_noise(shape, seed=seed, draws=self._config.diffusion.draws, image_ids=[0]))
            self._eps = kept
        return kept[1]


class ReferenceVotes:
    """The plain form of the smoothed detector: draw by draw, in fp32.

    Args:
        config, weights, mu, inverse_spread, sigma: as for :meth:`advrad_fast.backends.base.Backend.votes`.
    """

    batch = 1

    def __init__(
        self, config: DetectorConfig, weights: Mapping[str, Array], mu: Array, inverse_spread: Array, *, sigma: float
    ) -> None:
        check_weights(config.unet, weights)
        timestep = schedule.timestep_for_sigma(config.diffusion, sigma)
        self.config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, timestep=timestep))
        self.sigma = float(sigma)
        self._network = _network(config, weights)
        self._mu, self._inverse_spread = _tensor(mu), _tensor(inverse_spread)
        self._coefficients = diffusion.coefficients_at(self.config)

    @_typed_errors()
    @torch.inference_mode()
    def scores(self, image: NDArray[np.uint8], *, seed: int, draws: int, first_draw: int = 0) -> Array:
        """See :meth:`advrad_fast.backends.base.Votes.scores`."""
        frame, seed = check_draws(self.config, image, seed, draws, first_draw)
        images, c = torch.from_numpy(np.array(frame)), self._coefficients
        _, height, width, channels = frame.shape
        timestep = torch.tensor([self.config.diffusion.timestep])
        scores = np.empty(draws, dtype=np.float32)
        for i in range(draws):
            integers = lattice.integers(frame.size, self.sigma, seed=seed, draw=first_draw + i)
            z = torch.from_numpy(integers).reshape(1, channels, height, width)
            outputs = self._network(smoothing.lattice_inputs(images, z, c), timestep)
            score, _ = smoothing.smoothed_error(images, outputs, z, self._mu, self._inverse_spread, self.config.score, c)
            scores[i] = float(score[0])
        return check_scores(scores)


def _network(config: DetectorConfig, weights: Mapping[str, Array]) -> UNet:
    with torch.device("meta"):  # no initialisation: the caller's random state stays as it is
        network = UNet(config.unet)
    network.load_state_dict({name: _tensor(array) for name, array in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _tensor(array: NDArray[np.float32]) -> Tensor:
    """A copy: PyTorch has no read-only tensors, and warns about read-only arrays."""
    return torch.from_numpy(np.array(array))
