"""The fused operations against the same work in PyTorch, and against a copy of the bytes they have to move."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advrad_fast import _native, lattice, schedule
from advrad_fast.bench.peaks import Peaks
from advrad_fast.bench.timing import alternate, row, torch_compiled
from advrad_fast.config import DiffusionConfig, ScoreConfig
from advrad_fast.errors import InferenceError
from advrad_fast.reference import diffusion, score

SIDE, CHANNELS, SIGMA = 256, 3, 0.25
BATCHES = (1, 8, 64)
_CONFIG = ScoreConfig(filter_size=15)
_C = schedule.coefficients("eps", float(schedule.alpha_bar(DiffusionConfig())[100]), 0.5)

# Worst difference allowed, relative to the largest value: fp32 rounding along two different ways.
_PARITY = 1e-4


class Work:
    """Arguments of the operations for ``images`` frames of ``draws`` draws each."""

    def __init__(self, images: int, draws: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.draws, self.threads = draws, threads
        self.images = rng.integers(0, 256, (images, SIDE, SIDE, CHANNELS), dtype=np.uint8)
        self.outputs = rng.standard_normal((images * draws, CHANNELS, SIDE, SIDE), dtype=np.float32)
        self.mu, self.inverse_spread = (rng.random((SIDE, SIDE), dtype=np.float32) + 0.5 for _ in range(2))
        self.inputs = np.empty_like(self.outputs)
        self.scores = np.empty(images * draws, dtype=np.float32)
        self.table = _native.Lattice(lattice.thresholds(SIGMA))
        self._torch = tuple(torch.from_numpy(a) for a in (self.images, self.outputs, self.mu, self.inverse_spread))

    def noise(self, table: _native.Lattice | None = None) -> NDArray[np.float32]:
        _native.noise(
            self.images, self.draws, 1, _C.signal, _C.noise, _C.input_scale, self.inputs, lattice=table, threads=self.threads
        )
        return self.inputs

    def error(self, *, skip: bool = True) -> NDArray[np.float32]:
        """One score a draw, no maps; without ``skip`` as for a network that predicts x0."""
        _native.reconstruction_error(
            self.images, self.inputs if skip else None, self.outputs, 1, *schedule.error_coefficients(_C), _CONFIG.scale_weights,
            _CONFIG.filter_size, self.mu, self.inverse_spread, None, self.scores, threads=self.threads,
        )  # fmt: skip
        return self.scores

    def both(self) -> None:
        self.noise()
        self.error()

    def torch_noise(self, eps: torch.Tensor) -> torch.Tensor:
        return diffusion.noise(self._torch[0], eps, _C)

    def torch_error(self, eps: torch.Tensor) -> torch.Tensor:
        images, outputs, mu, inverse_spread = self._torch
        images = images.repeat_interleave(self.draws, dim=0)  # one score a draw
        return score.reconstruction_error(images, outputs, eps, mu, inverse_spread, _CONFIG, _C)[0]

    def torch_both(self) -> torch.Tensor:
        eps = torch.randn(self.outputs.shape)
        self.torch_noise(eps)
        return self.torch_error(eps)

    def check(self) -> None:
        """Raises InferenceError unless both ways give the same inputs and scores."""
        shape = (CHANNELS, SIDE, SIDE)
        eps = diffusion.draw_noise(shape, seed=1, draws=self.draws, image_ids=[0]).repeat(len(self.images), 1, 1, 1)
        pairs = ((self.noise(), self.torch_noise(eps)), (self.error(), self.torch_error(eps)))
        for name, (got, wanted) in zip(("noise", "reconstruction_error"), pairs, strict=True):
            worst = float(np.abs(got - wanted.numpy()).max() / wanted.abs().max())
            if not worst <= _PARITY:
                raise InferenceError(f"{name}: differs from the reference by {worst:.3g}, more than {_PARITY}: nothing is timed")


def rows(
    peaks: Peaks, *, seconds: float = 2.0, threads: int | None = None, compile_torch: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows of the fused operations at 256 px, colour, fp32; ``threads`` defaults to the machine's.

    The best PyTorch, for noise and error together, is the faster of eager and compiled; ``compile_torch`` False leaves it out.
    """
    threads = threads or os.cpu_count() or 1
    for batch in BATCHES:
        yield from _batch_rows("", Work(batch, 1, threads), batch, peaks, seconds, compile_torch)
    yield from _batch_rows(" (votes)", Work(1, BATCHES[-1], threads), BATCHES[-1], peaks, seconds, compile_torch)


def _batch_rows(
    suffix: str, work: Work, batch: int, peaks: Peaks, seconds: float, compile_torch: bool
) -> Iterator[dict[str, Any]]:
    with torch.no_grad():  # not inference_mode, whose tensors torch.compile stumbles over
        work.check()
        eps = torch.randn(work.outputs.shape)
        contestants: dict[str, Callable[[], object]] = {
            "noise": work.noise,
            "reconstruction_error": work.error,
            "noise + reconstruction_error": work.both,
            "lattice noise": lambda: work.noise(work.table),
            "reconstruction_error, x0": lambda: work.error(skip=False),
            "eager noise": lambda: work.torch_noise(torch.randn(work.outputs.shape)),
            "eager reconstruction_error": lambda: work.torch_error(eps),
            "eager noise + reconstruction_error": work.torch_both,
        }
        compiled = torch_compiled(work.torch_both) if compile_torch else None
        if compiled is not None:
            contestants["compiled noise + reconstruction_error"] = compiled
        timings = alternate(contestants, seconds=seconds)
    size, maps = work.outputs.nbytes, work.mu.nbytes + work.inverse_spread.nbytes
    moved = {"noise": work.images.nbytes + size, "reconstruction_error": work.images.nbytes + 2 * size + maps}
    moved["lattice noise"] = moved["noise"]
    moved["reconstruction_error, x0"] = moved["reconstruction_error"] - size
    moved["noise + reconstruction_error"] = moved["noise"] + moved["reconstruction_error"]
    for name, amount in moved.items():
        floor = amount / peaks.copy * 1e3
        eager = timings.get(f"eager {name}")
        best = timings.get(f"compiled {name}")
        if best is not None and eager is not None and eager.p50 < best.p50:
            best = eager
        share = floor / timings[name].p50
        shape = (SIDE, SIDE, CHANNELS)
        yield row(name + suffix, shape, batch, "cpu", "fp32", timings[name], eager=eager, best_torch=best, peak_share=share)
