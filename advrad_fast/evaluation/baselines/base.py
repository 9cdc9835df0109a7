"""What a baseline offers to those who train it, score with it and attack it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.errors import ImageError, InferenceError, TrainingError, expected
from advrad_fast.reference.device import torch_device


class Baseline(ABC):
    """A detector whose anomaly map is differentiable in the image.

    Images are float tensors (N, C, H, W) in [0, 1], or uint8 arrays (N, H, W, C) from :func:`advrad_fast.images.prepare`.
    All randomness comes in as ``noise``, so that an attack can take the expectation over it.

    Attributes:
        name: as it stands in tables.
        noise_shape: of one draw of noise for one image; (0,) for a deterministic detector.
        device: where it runs.
    """

    name: str
    noise_shape: tuple[int, ...] = (0,)
    device: torch.device = torch.device("cpu")

    def to(self, device: str | torch.device) -> Self:
        """Run on another device from here on; returns itself."""
        self.device = torch_device(device)
        return self

    @abstractmethod
    def fit(self, images: NDArray[np.uint8]) -> None:
        """Learn from normals, uint8 (N, H, W, C)."""

    @abstractmethod
    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        """Anomaly maps.

        Args:
            images: float (N, C, H, W) in [0, 1].
            noise: standard normal (N, M, *noise_shape).

        Returns:
            (N, M, H, W), differentiable in ``images``; (N, M, 1, 1) from a detector that has a score but no map.
        """

    def draw(self, generators: Sequence[torch.Generator], count: int) -> Tensor:
        """Noise: float32 (N, count, *noise_shape), for each image from its own generator; one draw where there is no noise."""
        shape = (1 if self.noise_shape == (0,) else count, *self.noise_shape)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def scores(self, images: Tensor, noise: Tensor) -> Tensor:
        """The maximum of each map: (N, M)."""
        return self.maps(images, noise).amax(dim=(2, 3))

    def score(self, images: Tensor, seed: int = 0) -> Tensor:
        """The score of each image, (N,), with noise that is a function of ``seed`` alone; differentiable."""
        generators = [torch.Generator().manual_seed(seed) for _ in range(len(images))]
        return self.scores(images, self.draw(generators, 1))[:, 0]

    @torch.no_grad()
    def gains(self, images: Tensor, signs: Tensor, noise: Tensor) -> Tensor:
        """The attacker's gain, the mean of sign times score over the draws: float64 (N,).

        Raises:
            InferenceError: a score is not finite.
        """
        values = (self.scores(images, noise).double() * signs[:, None].double()).mean(dim=1)
        if not bool(values.isfinite().all()):
            raise InferenceError(expected(f"{self.name}: score", "a finite number", float(values[~values.isfinite()][0])))
        return values

    @torch.no_grad()
    def score_images(self, images: NDArray[np.uint8], seed: int = 0) -> NDArray[np.float64]:
        """The scores of uint8 (N, H, W, C), one image at a time: float64 (N,)."""
        x = as_tensor(images)
        return np.array([float(self.score(x[i : i + 1].to(self.device), seed)[0]) for i in range(len(x))])


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1].

    Raises:
        ImageError: another dtype or number of dimensions, or no image.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise ImageError(expected("images", "uint8 (N, H, W, C), N of at least 1", f"{images.dtype} {images.shape}"))
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255.0


@contextmanager
def optional() -> Iterator[None]:
    """Around imports that the extra ``baselines`` brings.

    Raises:
        TrainingError: one is not installed; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise TrainingError(f"{name} is not installed; needed here: pip install 'advrad-fast[baselines]'") from error
