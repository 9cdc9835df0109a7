"""The smoothed detector on NVIDIA GPUs: many scores of one frame, each under lattice noise of its own."""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from advrad_fast import schedule
from advrad_fast.backends import cache
from advrad_fast.backends.base import Array, check_draws, check_scores
from advrad_fast.backends.cuda_lane import Lane
from advrad_fast.backends.cuda_lanes import open_lanes
from advrad_fast.backends.cuda_options import kernels_folder, typed_precision
from advrad_fast.backends.cuda_session import Plan, Where
from advrad_fast.backends.tensorrt_library import Library
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, expected
from advrad_fast.graph import check_weights

BATCH = 32  #: draws a call of the network; which is fastest is not yet measured

_MAX_BATCH = 4096
_BUFFERS = 2


class CudaVotes:
    """Scores of the detector inside randomised smoothing (Theorem 5.1 of AdvRAD), as :class:`CpuVotes` gives them.

    Two lanes take turns: while one batch is in the network, the next one's noise is drawn.  Draws go through in batches of one
    size, the last filled up with draws that are thrown away, so that a score is a function of (frame, seed, draw) alone.  Threads
    may share one; they take turns.

    Not yet run on a real GPU.

    Args:
        config, weights, precision, cache_dir, kernels_dir, gpu, library, graphs: as for
            :class:`advrad_fast.backends.cuda.CudaBackend`.
        mu, inverse_spread: float32 (H, W), of normals under this noise.
        sigma: of the noise, in [0, 1] pixel units.
        batch: draws a call of the network; None for :data:`BATCH`.

    Attributes:
        config: with the timestep of ``sigma``.

    Raises:
        ConfigError: sigma is beyond the schedule or an option out of range.
        ModelFileError, BackendUnavailableError: as for CudaBackend.
    """

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        mu: Array,
        inverse_spread: Array,
        *,
        sigma: float,
        precision: str = "auto",
        cache_dir: cache.CacheDir = None,
        kernels_dir: str | os.PathLike[str] | None = None,
        batch: int | None = None,
        gpu: int = 0,
        library: Library | None = None,
        graphs: bool = True,
    ) -> None:
        check_weights(config.unet, weights)
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= _MAX_BATCH):
            raise ConfigError(expected("batch", f"None or an integer in [1, {_MAX_BATCH}]", batch))
        timestep = schedule.timestep_for_sigma(config.diffusion, sigma)
        self.config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, timestep=timestep))
        self.sigma, self.batch = float(sigma), BATCH if batch is None else batch
        self.precision = typed_precision(precision)
        plan = Plan(self.config, 1, self.batch, self.precision, self.sigma)
        where = Where(gpu, kernels_folder(kernels_dir), cache.folder(cache_dir), library)
        self._turn = threading.Lock()
        self._lanes = open_lanes(plan, where, weights, mu, inverse_spread, graphs=graphs, shared=_BUFFERS)
        self._close = weakref.finalize(self, self._lanes.close)

    def scores(self, image: NDArray[np.uint8], *, seed: int, draws: int, first_draw: int = 0) -> Array:
        """See :meth:`advrad_fast.backends.base.Votes.scores`."""
        frame, seed = check_draws(self.config, image, seed, draws, first_draw)
        scores = np.empty(-(-int(draws) // self.batch) * self.batch, dtype=np.float32)
        with self._turn, self._lanes.shared(_BUFFERS) as lanes:
            for lane in lanes:
                np.copyto(lane.frame, frame[0])
            self._run(lanes, seed, int(first_draw), scores)
            return check_scores(scores[: int(draws)])  # in here: lanes that gave a NaN are given up

    def _run(self, lanes: list[Lane], seed: int, first_draw: int, scores: Array) -> None:
        """Every batch, as many under way as there are lanes; the frame goes to the GPU with each lane's first."""
        under_way: deque[tuple[Lane, int]] = deque()
        starts = range(0, len(scores), self.batch)
        for number in range(len(starts) + len(lanes)):
            if under_way and number >= len(lanes):
                lane, start = under_way.popleft()
                lane.wait()
                np.copyto(scores[start : start + self.batch], lane.scores)
            if number < len(starts):
                lane = lanes[number % len(lanes)]
                lane.submit(seed, first_draw + starts[number], maps=False, upload=number < len(lanes))
                under_way.append((lane, starts[number]))

    def close(self) -> None:
        """Give the GPU's memory back; later calls are refused.  Closing twice is fine."""
        self._close()
