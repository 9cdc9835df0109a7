"""The network in OpenVINO: fp32 on every CPU, bf16 where the processor computes in it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from advrad_fast.backends import cache
from advrad_fast.backends.base import Array
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, InferenceError
from advrad_fast.graph import GRAPH_VERSION, build_graph

_log = logging.getLogger(__name__)


class OpenVinoEngine:
    """One compiled network of a fixed batch.

    Args:
        precision: ``fp32`` or ``bf16``.
        batch: images a call.
        threads: None for OpenVINO's choice, one a physical core.
        folder: the cache of compiled networks; None for none.

    Raises:
        BackendUnavailableError: OpenVINO cannot compile the network.
    """

    name = "OpenVINO"

    def __init__(
        self,
        config: DetectorConfig,
        weights: Mapping[str, Array],
        precision: str,
        *,
        batch: int,
        threads: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.precision = precision
        self._shape = (batch, config.image.channels, config.image.height, config.image.width)
        try:
            self._compiled = _compile(config, weights, precision, batch=batch, threads=threads, folder=folder)
            self.threads = int(self._compiled.get_property("INFERENCE_NUM_THREADS"))
        except RuntimeError as error:
            raise BackendUnavailableError(f"cpu: OpenVINO cannot compile the network: {error}") from error

    def request(self) -> OpenVinoRequest:
        """Something that runs the network; not for two threads at once."""
        return OpenVinoRequest(self._compiled.create_infer_request(), self._shape)


class OpenVinoRequest:
    """Fill :attr:`x`, then :meth:`infer`.

    Attributes:
        x: float32 (batch, C, H, W), the network's input.
    """

    def __init__(self, request: Any, shape: tuple[int, ...]) -> None:
        self.x = np.zeros(shape, dtype=np.float32)
        self._request = request
        self._request.set_input_tensor(ov.Tensor(self.x, shared_memory=True))

    def infer(self) -> Array:
        """The network's output, float32 like :attr:`x`; the request's own memory, until the next call.

        Raises:
            InferenceError: OpenVINO failed.
        """
        try:
            self._request.infer()
        except RuntimeError as error:
            raise InferenceError(f"cpu: OpenVINO failed: {error}") from error
        output: Array = self._request.get_output_tensor().data
        return output


def version() -> str:
    """Of OpenVINO."""
    return str(ov.get_version()).partition("-")[0]


def computes_bf16() -> bool:
    """Whether the processor has bf16 arithmetic: elsewhere OpenVINO would emulate it."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _compile(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    precision: str,
    *,
    batch: int,
    threads: int | None = None,
    folder: Path | None = None,
) -> Any:
    """For one request at a time, from the cache or compiled and put there."""
    core = ov.Core()
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    size = {
        "height": config.image.height,
        "width": config.image.width,
        "batch": batch,
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
