"""The whole score of a deployed detector, differentiable: what an attacker who knows the model computes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ImageError, InferenceError, expected
from advrad_fast.model import ModelFile
from advrad_fast.reference import diffusion, score
from advrad_fast.reference.device import torch_device
from advrad_fast.reference.unet import UNet
from advrad_fast.schedule import Coefficients


@dataclass(frozen=True)
class Attacked:
    """What an attack on N images returns, the attacker's best.

    Attributes:
        images: float32 (N, C, H, W) in [0, 1], within the budget.
        rounded: uint8 (N, H, W, C), within the budget: what a camera could deliver.
        gain, rounded_gain: float64 (N,), the mean of y A over draws that the attacker chose by: optimistic, as a choice is.
        queries: forward passes an image, draws not counted.
    """

    images: Tensor
    rounded: NDArray[np.uint8]
    gain: NDArray[np.float64]
    rounded_gain: NDArray[np.float64]
    queries: int


class ScorePipeline:
    """Algorithms 1 and 4 on float images, as the detector computes them: settings, normal maps, draws and all.

    Args:
        model: the detector's model file.
        device: of PyTorch.
        autocast: run the network in bfloat16.  The gradient is rougher; the score is checked in float32 all the same.
        threads: PyTorch's, of the whole process; None leaves them as they are.  The last bits of a sum depend on them.
    """

    def __init__(self, model: ModelFile, *, device: str = "cpu", autocast: bool = False, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        config = model.config
        self.device = torch_device(device)
        self.autocast = autocast
        with torch.device("meta"):
            network = UNet(config.unet)
        network.load_state_dict({name: _tensor(array) for name, array in model.weights.items()}, assign=True)
        # Channels last: an eighth less time for a gradient on CPUs, and GPUs prefer it as well.
        self.network = network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config: DetectorConfig = config
        self.mu = _tensor(model.mu).to(self.device)
        self.inverse_spread = _tensor(model.inverse_spread).to(self.device)
        self.coefficients: Coefficients = diffusion.coefficients_at(config)
        self.timestep = config.diffusion.timestep
        self.draws = config.diffusion.draws
        self.shape = (config.image.channels, config.image.height, config.image.width)
        self._preparation: Callable[[Tensor], Tensor] | None = None

    def through(self, preparation: Callable[[Tensor], Tensor]) -> Self:
        """The same pipeline for what ``preparation`` makes into the images that the noise is added to, such as camera frames."""
        made = copy.copy(self)
        made._preparation = preparation
        return made

    def prepared(self, images: Tensor) -> Tensor:
        """The images that the noise is added to, from those that are attacked: the same, but for :meth:`through`."""
        return images if self._preparation is None else self._preparation(images)

    def draw(self, generators: Sequence[torch.Generator], count: int) -> Tensor:
        """The attacker's own noise: float32 (N, count, draws, C, H, W), for each image from its own generator."""
        shape = (count, self.draws, *self.shape)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

    def detector_noise(self, seed: int, count: int = 1) -> Tensor:
        """The noise that a detector draws with ``seed``, for ``count`` images: (count, 1, draws, C, H, W)."""
        eps = diffusion.draw_noise(self.shape, seed=seed, draws=self.draws, image_ids=[0])
        return eps[None, None].expand(count, -1, -1, -1, -1, -1).to(self.device)

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        """Anomaly maps.

        Args:
            images: float (N, C, H, W) in [0, 1].
            noise: (N, M, draws, C, H, W).

        Returns:
            (N, M, H, W), differentiable in ``images``.
        """
        count = noise.shape[1]
        x = self._repeated(self.prepared(images) * 2.0 - 1.0, count * self.draws)
        x_k = self.coefficients.signal * x + self.coefficients.noise * noise.flatten(0, 2)
        return self._maps(x, x_k, count)

    def _repeated(self, x: Tensor, times: int) -> Tensor:
        return x.repeat_interleave(times, dim=0)

    def _maps(self, x: Tensor, x_k: Tensor, count: int) -> Tensor:
        c = self.coefficients
        timesteps = torch.full((len(x),), self.timestep, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            outputs = self.network(c.input_scale * x_k, timesteps)
        maps: Tensor = score.from_outputs(
            x, x_k, outputs.float(), self.draws, self.mu, self.inverse_spread, self.config.score, c
        )[1]
        return maps.reshape(-1, count, *maps.shape[1:])

    def scores(self, images: Tensor, noise: Tensor) -> Tensor:
        """The score for each set of draws: (N, M)."""
        return self.maps(images, noise).amax(dim=(2, 3))

    @torch.no_grad()
    def gains(self, images: Tensor, signs: Tensor, noise: Tensor) -> Tensor:
        """The mean of y A over the draws, in float32 whatever ``autocast`` says: float64 (N,)."""
        kept, self.autocast = self.autocast, False
        try:
            values = (self.scores(images, noise).double() * signs[:, None].double()).mean(dim=1)
        finally:
            self.autocast = kept
        if not bool(values.isfinite().all()):
            raise InferenceError(expected("score under attack", "a finite number", float(values[~values.isfinite()][0])))
        return values


def signs_of(labels: Sequence[int], device: torch.device) -> Tensor:
    """+1 for label 0, whose score the attacker raises, -1 for label 1: float32 (N,)."""
    return torch.tensor([1.0 - 2.0 * label for label in labels], device=device)


def to_float(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1].

    Raises:
        ImageError: another dtype or number of dimensions.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ImageError(expected("images", "uint8 (N, H, W, C)", f"{images.dtype} {images.shape}"))
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 255.0


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """float (N, C, H, W) on the lattice -> uint8 (N, H, W, C)."""
    array: NDArray[np.uint8] = (images * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def generator(*parts: object) -> torch.Generator:
    """A generator that is a function of what it is for (seed, image, budget, ...): never of order or batch."""
    return torch.Generator().manual_seed(seed_from(*parts) >> 1)


def seed_from(*parts: object) -> int:
    """64 bits of SHA-256 over the parts' text."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _tensor(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(array))
