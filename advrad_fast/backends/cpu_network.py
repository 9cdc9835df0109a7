"""The network on CPUs: which engine runs it in which precision, compiled for a fixed batch."""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from advrad_fast import _native as operations
from advrad_fast import schedule
from advrad_fast.backends import cache
from advrad_fast.backends.base import Array, Precision
from advrad_fast.backends.native_engine import KERNELS, NativeEngine
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, expected

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


def precisions() -> tuple[Precision, ...]:
    """What this processor computes in: ``fp32``, and ``bf16`` where it would not be emulated."""
    return ("fp32", "bf16") if "amx" in KERNELS or openvino().computes_bf16() else ("fp32",)


def has_int8(config: DetectorConfig, weights: Mapping[str, Array], *, cache_dir: cache.CacheDir = None) -> bool:
    """Whether :func:`calibrate_int8` has been here."""
    found: bool = openvino().has_int8(config, weights, batch=config.diffusion.draws, folder=cache.folder(cache_dir))
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
    if openvino().computes_bf16():
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
    return openvino().OpenVinoEngine(config, weights, chosen, batch=batch, threads=threads, folder=folder)  # type: ignore[no-any-return]


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
    openvino().quantise(config, weights, inputs, batch=diffusion.draws, folder=folder)


def openvino() -> Any:
    """Loaded where it is needed: it takes longer than everything else together."""
    return importlib.import_module("advrad_fast.backends.openvino_engine")


def processor() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()  # platform.processor() runs a program
