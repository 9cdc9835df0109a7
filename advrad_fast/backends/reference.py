"""The plain PyTorch pipeline in fp32: slow, everywhere, and the truth that the other backends are held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.backends.base import Array, Frame, FrameBackend, check_threads, milliseconds, now
from advrad_fast.config import DetectorConfig
from advrad_fast.graph import check_weights
from advrad_fast.reference import diffusion, score
from advrad_fast.reference.unet import UNet


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
        with torch.device("meta"):  # no initialisation: the caller's random state stays as it is
            network = UNet(config.unet)
        network.load_state_dict({name: _tensor(array) for name, array in weights.items()}, assign=True)
        self._network = network.eval().requires_grad_(False)
        self._mu, self._inverse_spread = _tensor(mu), _tensor(inverse_spread)
        self._coefficients = diffusion.coefficients_at(config)
        self._eps: tuple[int, Tensor] | None = None

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


def _tensor(array: NDArray[np.float32]) -> Tensor:
    """A copy: PyTorch has no read-only tensors, and warns about read-only arrays."""
    return torch.from_numpy(np.array(array))
