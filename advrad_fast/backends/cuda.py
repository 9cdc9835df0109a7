"""The pipeline for NVIDIA GPUs: a TensorRT engine between two Triton kernels, launched without PyTorch and Triton."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advrad_fast.backends import cache
from advrad_fast.backends import tensorrt_engine as engines
from advrad_fast.backends.base import Array, BackendStatus, Frame, FrameBackend, Scores, Votes, check_frame, milliseconds, now
from advrad_fast.backends.cuda_lane import Lane
from advrad_fast.backends.cuda_lanes import open_lanes
from advrad_fast.backends.cuda_options import kernels_folder, typed_precision
from advrad_fast.backends.cuda_session import Plan, Where
from advrad_fast.backends.cuda_votes import CudaVotes
from advrad_fast.backends.tensorrt_library import Library
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, InferenceError, KernelFileError, expected
from advrad_fast.gpu_frames import GpuFrame
from advrad_fast.graph import check_weights
from advrad_fast.images import is_prepared
from advrad_fast.kernels.manifest import FILE, read_manifest
from advrad_fast.philox import check_seed


class CudaBackend(FrameBackend):
    """One engine of batch ``config.diffusion.draws``, and the kernels around it; a lane of its own for every thread.

    Run on an H200 with PyTorch in TensorRT's place (``benchmarks/gpu.md``); never yet with TensorRT on a GPU.

    Args:
        config: the detector's settings.
        weights: float32, exactly :func:`advrad_fast.graph.expected_tensors` of ``config.unet``; kept, for engines to come.
        mu, inverse_spread: float32 (H, W), the normal map and one over its spread; copied.
        precision: the engine's: ``fp32``, ``fp16`` (``auto``), ``bf16``, ``int8`` or ``fp8``; the last two need a calibration in
            the cache (``advrad-fast compile --calibration``).
        cache_dir: where engines are kept; None for the platform's cache folder, False for nowhere.
        kernels_dir: folder of compiled kernels; None for :func:`kernels_folder`'s.
        gpu: which one.
        library: of the engine; None for the first usable one of :func:`advrad_fast.backends.tensorrt_engine.libraries`.
        graphs: whether a frame is one CUDA graph.

    Raises:
        ModelFileError: a tensor is missing, unknown, mis-shaped or not float32.
        ConfigError: an option is out of range, or the GPU lacks the precision.
        BackendUnavailableError: there is no GPU, no TensorRT or no kernels for it, too little memory, or no engine can be built.
    """

    name = "cuda"
    steps = ("device",)

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        mu: Array,
        inverse_spread: Array,
        *,
        precision: str = "auto",
        cache_dir: cache.CacheDir = None,
        kernels_dir: str | os.PathLike[str] | None = None,
        gpu: int = 0,
        library: Library | None = None,
        graphs: bool = True,
    ) -> None:
        super().__init__(config, mu, inverse_spread)
        check_weights(config.unet, weights)
        self.precision = chosen = typed_precision(precision)
        plan = Plan(config, config.diffusion.draws, 1, chosen)
        where = Where(gpu, kernels_folder(kernels_dir), cache.folder(cache_dir), library)
        self._where, self._graphs = where, graphs
        self._lanes = open_lanes(plan, where, weights, mu, inverse_spread, graphs=graphs)
        self._close = weakref.finalize(self, self._lanes.close)  # at the latest when the interpreter ends

    def _frame(self, image: NDArray[np.uint8], seed: int, maps: Array | None) -> Frame:
        start = now()
        with self._lanes.lane() as lane:
            np.copyto(lane.frame, image[0])
            lane.submit(seed, maps=maps is not None)
            return _result(lane, maps, start)

    def score_in_place(self, frame: GpuFrame, *, seed: int, want_maps: bool) -> Scores | None:
        """See :meth:`Backend.score_in_place`: no copy, but on the GPU where the frame's address is no multiple of 16."""
        seed = check_seed(seed)
        start = now()
        with ExitStack() as lent, self._lanes.lane() as lane:  # the lane is done, or given up, when the frame is let go
            pixels = lane.take(frame, lent)
            if not is_prepared(pixels.shape, self._config.image):
                return None
            maps = np.empty((1, *pixels.shape[:2]), dtype=np.float32) if want_maps else None
            lane.submit(seed, maps=want_maps, upload=False, images=lane.placed(pixels))
            found = _result(lane, maps, start)
        check_frame("frame", found, maps)
        return Scores(np.array([found.score], dtype=np.float32), maps, found.timings)

    def download(self, frame: GpuFrame) -> NDArray[np.uint8]:
        """See :meth:`Backend.download`."""
        with ExitStack() as lent, self._lanes.lane() as lane:
            return lane.download(lane.take(frame, lent))

    def votes(
        self, config: DetectorConfig, weights: Mapping[str, Array], mu: Array, inverse_spread: Array, *, sigma: float
    ) -> Votes:
        """See :meth:`Backend.votes`."""
        where = self._where
        return CudaVotes(
            config,
            weights,
            mu,
            inverse_spread,
            sigma=sigma,
            precision=self.precision,
            cache_dir=where.cache or False,
            kernels_dir=where.kernels,
            gpu=where.ordinal,
            library=where.library,
            graphs=self._graphs,
        )

    def profile(
        self, image: NDArray[np.uint8], *, seed: int = 0, want_maps: bool = False, runs: int = 100
    ) -> dict[str, NDArray[np.float64]]:
        """Where the time goes: an image's steps on the GPU, launched one by one with events between them, not as one graph.

        Args:
            image: uint8 (H, W, C) of the configured size.
            seed, want_maps: as for :meth:`score`.
            runs: how often, after one run that is thrown away.

        Returns:
            Milliseconds of ``copy_in``, ``noise``, ``network``, ``error`` and ``copy_out``: float64 (runs,) each.

        Raises:
            ImageError, ConfigError, InferenceError: as for :meth:`score`.
        """
        if isinstance(runs, bool) or not isinstance(runs, int) or not 1 <= runs <= 1_000_000:
            raise ConfigError(expected("runs", "an integer in [1, 1000000]", runs))
        self.score(np.asarray(image)[None], seed=seed, want_maps=want_maps)  # checks what it is given
        with self._lanes.lane() as lane:
            np.copyto(lane.frame, image)
            return lane.profile(check_seed(seed), maps=want_maps, runs=runs)

    def close(self) -> None:
        """Give the GPU's memory back; later frames are refused.  Closing twice is fine."""
        self._close()


def _result(lane: Lane, maps: Array | None, start: float) -> Frame:
    """Waits for what was submitted at ``start``; its map goes to ``maps`` (1, H, W), if given."""
    lane.wait()
    score = float(lane.scores[0])
    if not np.isfinite(score):  # a NaN may live on in an engine's memory: such a lane is given up
        raise InferenceError(expected("score", "a finite number", score))
    if maps is not None:
        np.copyto(maps[0], lane.map)
    return Frame(score, {"device": milliseconds(start, now())})


def status(kernels_dir: str | os.PathLike[str] | None = None, gpu: int = 0) -> BackendStatus:
    """What :class:`CudaBackend` would run here, or all that is missing; TensorRT is not loaded where there is no driver."""
    missing, found, device = [], "", None
    if importlib.util.find_spec("pycuda") is None:
        missing.append("pycuda is not installed (pip install 'advrad-fast[cuda]')")
    if all(importlib.util.find_spec(name) is None for name in ("tensorrt", "tensorrt_rtx")):
        missing.append("neither TensorRT nor TensorRT-RTX is installed (pip install 'advrad-fast[cuda]', or tensorrt-rtx-cu13)")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        missing.append("there is no NVIDIA driver: libcuda.so.1 cannot be loaded")
    if not missing:
        try:
            device = engines.this_device(gpu)
        except BackendUnavailableError as error:
            missing.append(str(error).removeprefix("cuda: "))
        libraries = engines.libraries()
        found = next((library.detail for library in libraries if library.usable), "")
        if not found:
            missing += [library.detail for library in libraries]
    wrong = _kernels_missing(kernels_folder(kernels_dir), device)
    if wrong:
        missing.append(wrong)
    if device is None or missing:
        return BackendStatus("cuda", False, "; ".join(missing))
    return BackendStatus("cuda", True, f"{device.name} ({device.target}), {found}, fp16")


def _kernels_missing(folder: Path, device: engines.Device | None) -> str:
    """What is wrong with a folder of compiled kernels, and what to do; empty if nothing is."""
    if not (folder / FILE).exists():
        return (
            f"there are no compiled GPU kernels in {folder} (advrad-fast compile --kernels makes them, on any machine with"
            " advrad-fast[compile]; ADVRAD_KERNELS names another folder)"
        )
    try:
        targets = {int(kernel.target.removeprefix("sm_")) for kernel in read_manifest(folder).kernels}
    except KernelFileError as error:
        return f"the compiled GPU kernels are damaged ({error}): compile them again, advrad-fast compile --kernels"
    if device is not None and min(targets) > 10 * device.capability[0] + device.capability[1]:
        return f"the compiled GPU kernels in {folder} are for sm_{min(targets)} and newer, and {device.name} is {device.target}"
    return ""
