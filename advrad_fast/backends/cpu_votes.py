"""The smoothed detector on CPUs: many scores of one frame, each under lattice noise of its own.

A batch goes through noise, network and error one after the other.  On a CPU all three run on the same cores, so there is no
second unit that a second buffer could keep busy meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from advrad_fast import _native as operations
from advrad_fast import lattice, schedule
from advrad_fast.backends import cache
from advrad_fast.backends.base import Array, Precision, check_draws, check_precision, check_scores, check_threads
from advrad_fast.backends.cpu import PRECISIONS, Engine, EngineName, Request, choose, compile_network, processor
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, InferenceError, expected
from advrad_fast.graph import check_weights

_log = logging.getLogger(__name__)

#: The batches that are tried.
BATCHES = (1, 2, 4, 8, 16)


class CpuVotes:
    """Scores of the detector inside randomised smoothing (Theorem 5.1 of AdvRAD): it sees x + delta and nothing else.

    delta is lattice noise of :mod:`advrad_fast.lattice` and the diffusion noise at the same time: the network runs at the
    timestep of its sigma.  Draws go through in batches of one size, the last filled up with draws that are thrown away, so that
    a score is a function of (frame, seed, draw) alone.

    Args:
        config, weights, threads, precision, engine: as for :class:`advrad_fast.backends.cpu.CpuBackend`.
        mu, inverse_spread: float32 (H, W), of normals under this noise.
        sigma: of delta, in [0, 1] pixel units.
        cache_dir: also for the choice of the batch.
        batch: draws a call of the network; None for the fastest of :data:`BATCHES` here, measured once.

    Raises:
        ConfigError: sigma is beyond the schedule or an option out of range.
        ModelFileError, BackendUnavailableError: as for CpuBackend.
    """

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        mu: Array,
        inverse_spread: Array,
        *,
        sigma: float,
        threads: int | None = None,
        precision: Precision = "auto",
        cache_dir: cache.CacheDir = None,
        engine: EngineName = "auto",
        batch: int | None = None,
    ) -> None:
        check_weights(config.unet, weights)
        threads, precision, folder = (
            check_threads(threads),
            check_precision(precision, PRECISIONS, " for the cpu backend"),
            cache.folder(cache_dir),
        )
        timestep = schedule.timestep_for_sigma(config.diffusion, sigma)
        self._lattice = operations.Lattice(lattice.thresholds(sigma))
        self.config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, timestep=timestep))
        self.sigma = float(sigma)
        self._coefficients = schedule.coefficients(
            config.unet.prediction, float(schedule.alpha_bar(config.diffusion)[timestep]), config.unet.sigma_data
        )
        self._error_coefficients = schedule.error_coefficients(self._coefficients, smoothed=True)
        self._mu, self._inverse_spread = (np.array(array, dtype=np.float32, order="C") for array in (mu, inverse_spread))

        def build(size: int) -> Engine:
            return compile_network(
                self.config, weights, precision=precision, engine=engine, batch=size, threads=threads, folder=folder
            )

        if batch is None:
            kind = (*choose(precision, engine), threads)
            self.batch, self._engine = _fastest(build, kind, self.config, weights, folder)
        elif isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= 4096:
            raise ConfigError(expected("batch", "None or an integer in [1, 4096]", batch))
        else:
            self.batch, self._engine = batch, build(batch)
        # Requests and their input arrays, one for every thread that has been inside scores at the same time.
        self._requests: SimpleQueue[Request] = SimpleQueue()

    def scores(self, image: NDArray[np.uint8], *, seed: int, draws: int, first_draw: int = 0) -> Array:
        """See :meth:`advrad_fast.backends.base.Votes.scores`."""
        frame, seed = check_draws(self.config, image, seed, draws, first_draw)
        try:
            request = self._requests.get_nowait()
        except Empty:
            request = self._engine.request()
        scores = np.empty(-(-draws // self.batch) * self.batch, dtype=np.float32)
        for start in range(0, draws, self.batch):
            self._batch(request, frame, seed, first_draw + start, scores[start : start + self.batch])
        if np.isfinite(scores).all():  # a NaN may live on in an engine's memory: such a request is not used again
            self._requests.put(request)
        return check_scores(scores[:draws])

    def _batch(self, request: Request, frame: NDArray[np.uint8], seed: int, first_draw: int, scores: Array) -> None:
        c, config, threads = self._coefficients, self.config.score, self._engine.threads
        operations.noise(
            frame,
            self.batch,
            seed,
            c.signal,
            c.noise,
            c.input_scale,
            request.x,
            first_draw=first_draw,
            lattice=self._lattice,
            threads=threads,
        )
        outputs = request.infer()
        operations.reconstruction_error(
            None,
            request.x,
            outputs,
            1,
            *self._error_coefficients,
            config.scale_weights,
            config.filter_size,
            self._mu,
            self._inverse_spread,
            None,
            scores,
            threads=threads,
        )


def _fastest(
    build: Callable[[int], Engine],
    kind: tuple[object, ...],
    config: DetectorConfig,
    weights: Mapping[str, Array],
    folder: Path | None,
) -> tuple[int, Engine]:
    """The batch with the least time a draw, and its engine: from the cache, or measured and put there."""
    name = cache.key(
        weights, choice="votes' batch", unet=config.unet.to_json(), image=config.image.to_json(), kind=kind, cpu=processor()
    )
    kept = cache.load(folder, name)
    if kept is not None and kept.decode("ascii", "replace") in map(str, BATCHES):
        return int(kept), build(int(kept))
    best: tuple[float, int, Engine] | None = None
    for batch in BATCHES:
        engine = build(batch)
        request = engine.request()
        request.infer()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            request.infer()
            times.append((time.perf_counter() - start) / batch)
        _log.info("%s, batch %d: %.2f ms a draw", engine.name, batch, min(times) * 1e3)
        if best is None or min(times) < 0.97 * best[0]:  # a larger batch has to be worth its memory
            best = (min(times), batch, engine)
    if best is None:
        raise InferenceError("no batch was measured")
    cache.store(folder, name, str(best[1]).encode())
    return best[1], best[2]
