"""The pipeline for CPUs: the fused operations around the network, in bf16 where the processor has it and fp32 elsewhere."""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from advrad_fast import _native as operations
from advrad_fast import schedule
from advrad_fast.backends import cache
from advrad_fast.backends.base import (
    Array,
    BackendStatus,
    Frame,
    FrameBackend,
    Precision,
    Votes,
    check_precision,
    check_threads,
    milliseconds,
    now,
)
from advrad_fast.backends.native_engine import KERNELS, NativeEngine, NativeRequest
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, InferenceError, expected
from advrad_fast.graph import check_weights

EngineName = Literal["auto", "native", "openvino"]

PRECISIONS = ("auto", "fp32", "bf16", "int8")


class Request(Protocol):
    """One run of the network at a time: fill ``x``, then ``infer``."""

    x: Array

    def infer(self) -> Array: ...


class Engine(Protocol):
    """A network of a fixed batch; :class:`NativeEngine` or OpenVINO's."""

    name: str
    precision: str
    threads: int

    def request(self) -> Request: ...


class CpuBackend(FrameBackend):
    """One network of batch ``config.diffusion.draws``, and the operations around it.

    Args:
        config: the detector's settings.
        weights: float32, exactly :func:`advrad_fast.graph.expected_tensors` of ``config.unet``.
        mu, inverse_spread: float32 (H, W), the normal map and one over its spread; copied.
        threads: of the network and the operations around it; None for one a physical core.
        precision: ``auto`` is bf16 where the processor computes in it, fp32 elsewhere; ``int8`` needs :func:`calibrate_int8`.
        cache_dir: where OpenVINO's compiled networks are kept; None for the platform's cache folder, False for nowhere.
        engine: ``native`` needs a processor with AMX, and is the choice there in bf16; ``openvino`` runs everywhere.

    Raises:
        ModelFileError: a tensor is missing, unknown, mis-shaped or not float32.
        ConfigError: an option is out of range.
        BackendUnavailableError: the processor cannot do what was asked for, or OpenVINO cannot compile the network.
    """

    name = "cpu"

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        mu: Array,
        inverse_spread: Array,
        *,
        threads: int | None = None,
        precision: Precision = "auto",
        cache_dir: cache.CacheDir = None,
        engine: EngineName = "auto",
    ) -> None:
        super().__init__(config, mu, inverse_spread)
        check_weights(config.unet, weights)
        threads, precision, folder = (
            check_threads(threads),
            check_precision(precision, PRECISIONS, " for the cpu backend"),
            cache.folder(cache_dir),
        )
        self._mu, self._inverse_spread = (np.array(array, order="C") for array in (mu, inverse_spread))
        self._coefficients = schedule.coefficients(
            config.unet.prediction,
            float(schedule.alpha_bar(config.diffusion)[config.diffusion.timestep]),
            config.unet.sigma_data,
        )
        self._error_coefficients = schedule.error_coefficients(self._coefficients)
        self._engine = compile_network(config, weights, precision=precision, engine=engine, threads=threads, folder=folder)
        self._options = {"precision": precision, "engine": engine, "threads": threads, "cache_dir": cache_dir}
        self.precision = self._engine.precision
        self._kept: tuple[int, Array | None] | None = None  # the last seed, and its noise once it came twice
        # Requests and their input arrays, one for every thread that has been inside _frame at the same time.
        self._requests: SimpleQueue[Request] = SimpleQueue()
        self._requests.put(self._engine.request())

    def votes(
        self, config: DetectorConfig, weights: Mapping[str, Array], mu: Array, inverse_spread: Array, *, sigma: float
    ) -> Votes:
        """See :meth:`advrad_fast.backends.base.Backend.votes`."""
        made: Votes = importlib.import_module("advrad_fast.backends.cpu_votes").CpuVotes(
            config, weights, mu, inverse_spread, sigma=sigma, **self._options
        )
        return made

    def _frame(self, image: NDArray[np.uint8], seed: int, maps: Array | None) -> Frame:
        config, c = self._config, self._coefficients
        draws = config.diffusion.draws
        threads = self._engine.threads
        try:
            request = self._requests.get_nowait()
        except Empty:
            request = self._engine.request()
        start = now()
        normals = self._normals(seed)
        if isinstance(request, NativeRequest) and not c.skip:  # the error needs no inputs: they are made where the network reads
            noised = now()
            outputs = request.infer_noised(image, seed, c.signal, c.noise, c.input_scale, normals)
        else:
            operations.noise(image, draws, seed, c.signal, c.noise, c.input_scale, request.x, normals=normals, threads=threads)
            noised = now()
            outputs = request.infer()  # the request's own memory: read before it goes back to the queue
        shape = (draws, config.image.channels, config.image.height, config.image.width)
        if outputs.shape != shape or outputs.dtype != np.float32:
            raise InferenceError(expected("cpu: the network's output", f"float32 {shape}", (outputs.dtype, outputs.shape)))
        inferred = now()
        scores = np.empty(1, dtype=np.float32)
        operations.reconstruction_error(
            image,
            request.x if c.skip else None,
            outputs,
            draws,
            *self._error_coefficients,
            config.score.scale_weights,
            config.score.filter_size,
            self._mu,
            self._inverse_spread,
            maps,
            scores,
            threads=threads,
        )
        end = now()
        if np.isfinite(scores[0]):  # a NaN may live on in an engine's memory: such a request is not used again
            self._requests.put(request)
        timings = {
            "noise": milliseconds(start, noised),
            "network": milliseconds(noised, inferred),
            "error": milliseconds(inferred, end),
        }
        return Frame(float(scores[0]), timings)

    def _normals(self, seed: int) -> Array | None:
        """The noise of a seed that comes again, as every frame's does by default; None for a new one.

        Kept in one assignment, so that threads may race.
        """
        kept = self._kept
        if kept is None or kept[0] != seed:
            self._kept = (seed, None)
            return None
        if kept[1] is None:
            image, draws = self._config.image, self._config.diffusion.draws
            shape = (image.channels, image.height, image.width)
            size = image.channels * image.height * image.width
            kept = (seed, np.stack([operations.normals(size, seed, draw).reshape(shape) for draw in range(draws)]))
            self._kept = kept
        return kept[1]


def status() -> BackendStatus:
    """What :class:`CpuBackend` would run here."""
    kind, precision = choose("auto")
    engine = "native engine (AMX)" if kind == "native" else f"OpenVINO {_openvino().version()}"
    return BackendStatus("cpu", True, f"{processor()}, {engine}, {precision}")


def precisions() -> tuple[Precision, ...]:
    """What this processor computes in: ``fp32``, and ``bf16`` where it would not be emulated."""
    return ("fp32", "bf16") if "amx" in KERNELS or _openvino().computes_bf16() else ("fp32",)


def has_int8(config: DetectorConfig, weights: Mapping[str, Array], *, cache_dir: cache.CacheDir = None) -> bool:
    """Whether :func:`calibrate_int8` has been here."""
    found: bool = _openvino().has_int8(config, weights, batch=config.diffusion.draws, folder=cache.folder(cache_dir))
    return found


def choose(precision: Precision, engine: EngineName = "auto") -> tuple[str, str]:
    """The engine, ``native`` or ``openvino``, and the precision, ``fp32``, ``bf16`` or ``int8``.

    bf16 only where the processor computes in it: in the native engine where there are AMX tiles, else in OpenVINO.

    Raises:
        BackendUnavailableError: the processor cannot do what was asked for.
    """
    if engine == "native" and (precision in ("fp32", "int8") or "amx" not in KERNELS):
        raise BackendUnavailableError("cpu: the native engine computes in bf16 and needs a processor with AMX")
    if precision in ("fp32", "int8"):
        return "openvino", precision
    if engine != "openvino" and "amx" in KERNELS:
        return "native", "bf16"
    if _openvino().computes_bf16():
        return "openvino", "bf16"
    if precision == "bf16":
        raise BackendUnavailableError(f"cpu: {processor()} has no bf16 arithmetic; use precision='fp32'")
    return "openvino", "fp32"


def compile_network(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    *,
    precision: Precision = "auto",
    engine: EngineName = "auto",
    batch: int | None = None,
    threads: int | None = None,
    folder: Path | None = None,
) -> Engine:
    """The network in the engine that :func:`choose` names.

    Args:
        batch: images a call; None for ``config.diffusion.draws``.
        threads: None for one a physical core.
        folder: the cache of OpenVINO's compiled networks; None for none.  The native engine needs none.

    Raises:
        BackendUnavailableError: the processor cannot do what was asked for, or OpenVINO cannot compile the network.
    """
    kind, chosen = choose(precision, engine)
    batch = config.diffusion.draws if batch is None else batch
    if kind == "native":
        return NativeEngine(config, weights, batch=batch, threads=threads)
    return _openvino().OpenVinoEngine(config, weights, chosen, batch=batch, threads=threads, folder=folder)  # type: ignore[no-any-return]


def calibrate_int8(
    config: DetectorConfig, weights: Mapping[str, Array], images: NDArray[np.uint8], *, cache_dir: cache.CacheDir = None
) -> None:
    """Calibrate a network for ``precision="int8"`` and put it into the cache, for every detector of these weights.

    Args:
        images: uint8 (N, H, W, C), prepared normals; a few dozen do.

    Raises:
        ConfigError: there is no cache folder, or there are no images.
        BackendUnavailableError: nncf is not installed, or the cache cannot be written.
    """
    folder = cache.folder(cache_dir)
    if folder is None:
        raise ConfigError(expected("cache_dir", "a folder to keep the int8 network in", cache_dir))
    if len(images) == 0:
        raise ConfigError(expected("images", "at least one image", 0))
    diffusion = config.diffusion
    bar = float(schedule.alpha_bar(diffusion)[diffusion.timestep])
    c = schedule.coefficients(config.unet.prediction, bar, config.unet.sigma_data)
    inputs = []
    for i, image in enumerate(images):
        x = np.empty((diffusion.draws, config.image.channels, config.image.height, config.image.width), dtype=np.float32)
        operations.noise(np.ascontiguousarray(image[None]), len(x), i, c.signal, c.noise, c.input_scale, x)
        inputs.append(x)
    _openvino().quantise(config, weights, inputs, batch=diffusion.draws, folder=folder)


def _openvino() -> Any:
    """Loaded where it is needed: it takes longer than everything else together."""
    return importlib.import_module("advrad_fast.backends.openvino_engine")


def processor() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()  # platform.processor() runs a program
