"""The OpenVINO pipeline for CPUs: bf16 where the processor has it, fp32 elsewhere."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import openvino as ov
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
    check_precision,
    check_threads,
    milliseconds,
    now,
)
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, InferenceError
from advrad_fast.graph import GRAPH_VERSION, build_graph, check_weights

_log = logging.getLogger(__name__)


class CpuBackend(FrameBackend):
    """OpenVINO on the CPU, one compiled network of batch ``config.diffusion.draws``.

    Args:
        config: the detector's settings.
        weights: float32, exactly :func:`advrad_fast.graph.expected_tensors` of ``config.unet``.
        mu, inverse_spread: float32 (H, W), the normal map and one over its spread; copied.
        threads: of the network and the operations around it; None for OpenVINO's choice, one a physical core.
        precision: ``auto`` is bf16 where the processor computes in it, fp32 elsewhere.
        cache_dir: where compiled networks are kept; None for the platform's cache folder, False for nowhere.

    Raises:
        ModelFileError: a tensor is missing, unknown, mis-shaped or not float32.
        ConfigError: an option is out of range.
        BackendUnavailableError: the processor has no bf16 and it was asked for, or OpenVINO cannot compile the network.
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
    ) -> None:
        super().__init__(config, mu, inverse_spread)
        check_weights(config.unet, weights)
        threads, precision, folder = check_threads(threads), check_precision(precision), cache.folder(cache_dir)
        self._mu, self._inverse_spread = (np.array(array, order="C") for array in (mu, inverse_spread))
        self._coefficients = schedule.coefficients(
            config.unet.prediction,
            float(schedule.alpha_bar(config.diffusion)[config.diffusion.timestep]),
            config.unet.sigma_data,
        )
        self._error_coefficients = schedule.error_coefficients(self._coefficients)
        try:
            core = ov.Core()
            self.precision = _choose(core, precision)
            self._compiled = compile_network(config, weights, self.precision, threads=threads, folder=folder, core=core)
            self._threads = int(self._compiled.get_property("INFERENCE_NUM_THREADS"))
        except RuntimeError as error:
            raise BackendUnavailableError(f"cpu: OpenVINO cannot compile the network: {error}") from error
        self._kept: tuple[int, Array | None] | None = None  # the last seed, and its noise once it came twice
        # Requests and their input arrays, one for every thread that has been inside _frame at the same time.
        self._requests: SimpleQueue[tuple[Any, Array]] = SimpleQueue()
        self._requests.put(self._request())

    def _request(self) -> tuple[Any, Array]:
        image = self._config.image
        x = np.zeros((self._config.diffusion.draws, image.channels, image.height, image.width), dtype=np.float32)
        request = self._compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(x, shared_memory=True))
        return request, x

    def _frame(self, image: NDArray[np.uint8], seed: int, want_map: bool) -> Frame:
        config, c = self._config, self._coefficients
        draws = config.diffusion.draws
        try:
            request, x = self._requests.get_nowait()
        except Empty:
            request, x = self._request()
        try:
            start = now()
            normals = self._normals(seed)
            operations.noise(image, draws, seed, c.signal, c.noise, c.input_scale, x, normals=normals, threads=self._threads)
            noised = now()
            request.infer()
            outputs = request.get_output_tensor().data  # the request's own memory: read before it goes back to the queue
            inferred = now()
            scores = np.empty(1, dtype=np.float32)
            maps = np.empty((1, *image.shape[1:3]), dtype=np.float32) if want_map else None
            operations.reconstruction_error(
                image,
                x if c.skip else None,
                outputs,
                draws,
                *self._error_coefficients,
                config.score.scale_weights,
                config.score.filter_size,
                self._mu,
                self._inverse_spread,
                maps,
                scores,
                threads=self._threads,
            )
        except RuntimeError as error:
            raise InferenceError(f"cpu: OpenVINO failed: {error}") from error
        finally:
            self._requests.put((request, x))
        return Frame(
            score=float(scores[0]),
            map=None if maps is None else maps[0],
            noise=milliseconds(start, noised),
            network=milliseconds(noised, inferred),
            error=milliseconds(inferred, now()),
        )

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
    core = ov.Core()
    device = core.get_property("CPU", "FULL_DEVICE_NAME")
    return BackendStatus("cpu", True, f"{device}, OpenVINO {_version()}, {_choose(core, 'auto')}")


def _version() -> str:
    return str(ov.get_version()).partition("-")[0]


def _choose(core: Any, precision: Precision) -> str:
    """``fp32`` or ``bf16``; bf16 only where the processor computes in it, as elsewhere it would be emulated."""
    native = _has_bf16(core)
    if precision == "bf16" and not native:
        raise BackendUnavailableError(
            f"cpu: {core.get_property('CPU', 'FULL_DEVICE_NAME')} has no bf16 arithmetic; use precision='fp32'"
        )
    return "bf16" if native and precision != "fp32" else "fp32"


def _has_bf16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def precisions() -> tuple[str, ...]:
    """What this processor computes in: ``fp32``, and ``bf16`` where it would not be emulated."""
    return ("fp32", "bf16") if _has_bf16(ov.Core()) else ("fp32",)


def compile_network(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    precision: str,
    *,
    batch: int | None = None,
    threads: int | None = None,
    folder: Path | None = None,
    core: Any = None,
) -> Any:
    """The network as an OpenVINO ``CompiledModel`` for one request at a time, from the cache or compiled and put there.

    Args:
        precision: ``fp32`` or ``bf16``.
        batch: images a call; None for ``config.diffusion.draws``.
        threads: None for OpenVINO's choice, one a physical core.
        folder: the cache; None for none.
        core: an ``openvino.Core`` to use.

    Raises:
        RuntimeError: OpenVINO cannot compile it.
    """
    core = core or ov.Core()
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    size = {
        "height": config.image.height,
        "width": config.image.width,
        "batch": config.diffusion.draws if batch is None else batch,
        "timestep": config.diffusion.timestep,
    }
    if folder is None:
        return core.compile_model(_read(core, config, weights, size), "CPU", options)
    name = cache.key(
        weights,
        graph=GRAPH_VERSION,
        unet=config.unet.to_json(),
        size=size,
        options=sorted(options.items()),
        openvino=str(ov.get_version()),
        device=(platform.machine(), core.get_property("CPU", "FULL_DEVICE_NAME")),
        capabilities=sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
    )
    blob = cache.load(folder, name)
    if blob is not None:
        try:
            return core.import_model(BytesIO(blob), "CPU", options)
        except RuntimeError as error:
            _log.warning("OpenVINO refuses the compiled network %s in %s; compiling again: %s", name, folder, error)
    compiled = core.compile_model(_read(core, config, weights, size), "CPU", options)
    exported = compiled.export_model()
    cache.store(folder, name, exported.getvalue() if isinstance(exported, BytesIO) else bytes(exported))
    return compiled


def _read(core: Any, config: DetectorConfig, weights: Mapping[str, Array], size: Mapping[str, int]) -> Any:
    return core.read_model(build_graph(config.unet, weights, **size).SerializeToString())
