"""Smoothing votes a second on the cpu backend against a loop over the plain PyTorch form, draw by draw, in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advrad_fast import lattice, schedule
from advrad_fast.backends.cpu_network import precisions
from advrad_fast.backends.cpu_votes import CpuVotes
from advrad_fast.bench.timing import alternate, row
from advrad_fast.errors import InferenceError
from advrad_fast.model import ModelFile
from advrad_fast.reference import diffusion, smoothing
from advrad_fast.reference.unet import UNet

SIGMA = 0.25
DRAWS = 64
_CHECKED = 8
#: Largest relative difference of a score, by precision.
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}


class _Loop:
    """The plain form: noise, network and error of one draw, in eager fp32."""

    def __init__(self, model: ModelFile, image: NDArray[np.uint8]) -> None:
        self.config = model.config
        self.timestep = schedule.timestep_for_sigma(model.config.diffusion, SIGMA)
        diffused = dataclasses.replace(model.config.diffusion, timestep=self.timestep)
        self.c = diffusion.coefficients_at(dataclasses.replace(model.config, diffusion=diffused))
        self.net = UNet(model.config.unet).eval().requires_grad_(False)
        self.net.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in model.weights.items()})
        self.image = torch.from_numpy(image[None])
        self.mu, self.inverse_spread = torch.from_numpy(np.array(model.mu)), torch.ones(model.mu.shape)

    def score(self, z: torch.Tensor) -> float:
        outputs = self.net(smoothing.lattice_inputs(self.image, z, self.c), torch.tensor([self.timestep]))
        scores, _ = smoothing.smoothed_error(self.image, outputs, z, self.mu, self.inverse_spread, self.config.score, self.c)
        return float(scores[0])

    def draw(self) -> float:
        """With PyTorch's own generator: quicker than ours in NumPy."""
        shape = self.image.permute(0, 3, 1, 2).shape
        return self.score((torch.randn(shape) * (lattice.LEVELS * SIGMA)).round().int())


def rows(
    name: str, model: ModelFile, *, seconds: float = 5.0, threads: int | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row a precision: :data:`DRAWS` votes on one frame at sigma :data:`SIGMA`; ``ratio_eager`` compares votes a second.

    Raises:
        InferenceError: scores differ from the plain form's by more than :data:`BOUNDS`; nothing is timed then.
    """
    size = model.config.image
    shape = (size.height, size.width, size.channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    loop = _Loop(model, image)
    z = smoothing.draw_lattice_noise((shape[2], *shape[:2]), SIGMA, seed=1, draws=_CHECKED, image_ids=[0])
    with torch.inference_mode():
        wanted = np.array([loop.score(z[i : i + 1]) for i in range(_CHECKED)])
    ones = np.ones(model.mu.shape, dtype=np.float32)
    for precision in precisions():
        votes = CpuVotes(model.config, model.weights, model.mu, ones, sigma=SIGMA, threads=threads, precision=precision)
        error = float(np.abs(votes.scores(image, seed=1, draws=_CHECKED) / wanted - 1.0).max())
        if not error <= BOUNDS[precision]:
            raise InferenceError(f"{name}, {precision}: votes' scores differ by {error:.3g}, more than {BOUNDS[precision]}")
        with torch.inference_mode():
            timings = alternate(
                {"cpu": lambda votes=votes: votes.scores(image, seed=1, draws=DRAWS), "eager": loop.draw},  # type: ignore[misc]
                seconds=seconds,
            )
        eager = dataclasses.replace(timings["eager"], p50=timings["eager"].p50 * DRAWS)
        result = row(f"votes {name}", shape, DRAWS, "cpu", precision, timings["cpu"], eager=eager)
        per_second = {"cpu": DRAWS / timings["cpu"].p50 * 1e3, "eager": 1e3 / timings["eager"].p50}
        yield result, {"votes_a_second": {k: round(v, 1) for k, v in per_second.items()}, "draws_a_call": votes.batch}
