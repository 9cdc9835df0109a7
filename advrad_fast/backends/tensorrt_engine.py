"""TensorRT engines by way of the cache: found there, or built and put there; what is refused is built anew, and never run."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advrad_fast.backends import cache
from advrad_fast.backends.base import Array
from advrad_fast.backends.tensorrt_build import build, check_batches, check_precision
from advrad_fast.backends.tensorrt_calibration import load_ranges
from advrad_fast.backends.tensorrt_library import RTX_TARGETS, Library, check_target, choose, libraries
from advrad_fast.backends.tensorrt_runtime import Engine, EngineType, Execution
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError
from advrad_fast.graph import GRAPH_VERSION
from advrad_fast.graph_precision import TYPED_GRAPH_VERSION, TypedPrecision, ranges_digest

__all__ = [
    "RTX_TARGETS",
    "Compiled",
    "Device",
    "Engine",
    "EngineType",
    "Execution",
    "Library",
    "build",
    "check_precision",
    "check_target",
    "choose",
    "compile_engine",
    "driver_version",
    "libraries",
    "load_or_build",
    "this_device",
]

_log = logging.getLogger(__name__)
_MEMORY = 4  # engines that could not be stored, kept by this process for the next detector

_unstored: OrderedDict[str, bytes] = OrderedDict()


@dataclass(frozen=True)
class Device:
    """The GPU of this machine, as far as an engine depends on it.

    Attributes:
        name: such as ``NVIDIA L4``.
        capability: such as (8, 9).
        driver: its version; anything that changes with it.
    """

    name: str
    capability: tuple[int, int]
    driver: str

    @property
    def target(self) -> str:
        """Such as ``sm_89``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Compiled:
    """An engine as :func:`compile_engine` found or made it.

    Attributes:
        name: in the cache.
        blob: the engine.
        cached: whether it was there.
        stored: whether it is there now.
    """

    name: str
    blob: bytes
    cached: bool
    stored: bool


def this_device(ordinal: int = 0) -> Device:
    """The GPU of this machine; no context is made.

    Raises:
        BackendUnavailableError: there is no driver, no GPU or no pycuda.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise BackendUnavailableError(f"cuda: pycuda cannot be loaded: {error}") from error
    try:
        cuda.init()
        device = cuda.Device(ordinal)
        major, minor = device.compute_capability()
        return Device(str(device.name()), (int(major), int(minor)), driver_version(cuda.get_driver_version()))
    except cuda.Error as error:
        raise BackendUnavailableError(f"cuda: there is no GPU: {error}") from error


def driver_version(cuda_version: int) -> str:
    """CUDA's version of the driver, and the kernel module's own where the system tells it."""
    try:
        module = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace").partition("\n")[0]
    except OSError:
        module = ""
    return f"{cuda_version} {module}".strip()


def compile_engine(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    *,
    target: str,
    precision: TypedPrecision,
    batches: tuple[int, ...],
    ranges: Mapping[str, float] | None = None,
    folder: Path | None,
    device: Device | None = None,
    library: Library | None = None,
    fresh: bool = False,
) -> Compiled:
    """An engine from the cache, or built and put there; nothing is run.

    Args:
        target, precision, batches: as for :func:`advrad_fast.backends.tensorrt_engine.build`.
        ranges: of a calibration, for int8 and fp8.
        device: this machine's GPU; asked for where the target is ``here``, unless given.
        fresh: build it even if it is in the cache.

    Raises:
        BackendUnavailableError, ConfigError, ModelFileError: as for ``build``.
    """
    check_target(target)
    batches = check_batches(batches)
    check_precision(precision, target)
    library = choose(target) if library is None else library
    if target == "here" and device is None:
        device = this_device()
    if library.name == "tensorrt_rtx" and device is not None and device.target in RTX_TARGETS:
        target = device.target  # the same engine as one that another machine has built for it
    name = engine_name(
        config, weights, library=library, target=target, precision=precision, batches=batches, ranges=ranges, device=device
    )
    what = f"{precision} engine for {target}, batches {batches}, {library.detail}"
    stored = None if fresh else _unstored.get(name) or cache.load(folder, name)
    if stored is not None:
        _log.info("%s: from the cache", what)
        return Compiled(name, stored, True, name not in _unstored)
    _log.warning("%s: %s; building it", what, "wanted anew" if fresh else f"not in the cache {folder or '(there is none)'}")
    blob = build(config, weights, target=target, precision=precision, batches=batches, calibration=ranges, library=library)
    _unstored.pop(name, None)
    kept = cache.store(folder, name, blob)
    if not kept:
        _unstored[name] = blob
        while len(_unstored) > _MEMORY:
            _unstored.popitem(last=False)
    return Compiled(name, blob, False, kept)


def engine_name(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    *,
    library: Library,
    target: str,
    precision: str,
    batches: tuple[int, ...],
    ranges: Mapping[str, float] | None,
    device: Device | None,
) -> str:
    """An engine's name in the cache: of all that it depends on."""
    image = config.image
    facts: dict[str, Any] = {
        "engine": (library.name, library.version),
        "graph": (GRAPH_VERSION, TYPED_GRAPH_VERSION),
        "unet": config.unet.to_json(),
        "size": (image.height, image.width, config.diffusion.timestep),
        "precision": precision,
        "batches": batches,
        "ranges": ranges_digest(ranges) if precision in ("int8", "fp8") else None,
        # TensorRT measures kernels on the GPU it builds for; TensorRT-RTX builds for an architecture and compiles kernels later.
        "device": target if target != "here" or device is None else (device.name, device.capability, device.driver),
    }
    return cache.key(weights, **facts)


def load_or_build(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    *,
    precision: TypedPrecision,
    batches: tuple[int, ...],
    gpu_name: str,
    capability: tuple[int, int],
    driver_version: str | int,
    folder: Path | None,
    library: Library | None = None,
) -> Engine:
    """The engine for the GPU whose context is current: from the cache (built here, or brought by ``compile --target``) or built.

    An engine that the library refuses is built anew, with a line in the log.

    Args:
        precision: int8 and fp8 need the calibration that ``advrad-fast compile --calibration`` has put into the cache.
        batches: images a call, ascending.
        gpu_name, capability, driver_version: of the GPU.
        folder: the cache; None for none.
        library: None for the first usable one.

    Raises:
        BackendUnavailableError: no library is usable, the builder failed, or there is no calibration in the cache.
        ConfigError, ModelFileError: as for :func:`advrad_fast.backends.tensorrt_engine.build`.
    """
    device = Device(gpu_name, capability, str(driver_version))
    check_precision(precision, device.target)
    ranges = None
    if precision in ("int8", "fp8"):
        ranges = load_ranges(folder, config, weights)
        if ranges is None:
            raise BackendUnavailableError(
                f"cuda: there is no calibration of this model in {folder or 'the cache (there is none)'}; make one: advrad-fast"
                f" compile MODEL --target here --precision {precision} --calibration GOOD_FRAMES"
            )
    found = [library] if library is not None else [each for each in libraries() if each.usable]
    if not found:
        raise BackendUnavailableError("cuda: " + "; ".join(each.detail for each in libraries()))
    options: dict[str, Any] = {"precision": precision, "batches": check_batches(batches), "ranges": ranges, "device": device}
    reasons = []
    for each in found:
        if each.name == "tensorrt_rtx" and device.target not in RTX_TARGETS:
            reasons.append(f"{each.detail} does not build for {device.target}")
            continue
        try:
            return _load(config, weights, each, folder, options)
        except BackendUnavailableError as error:
            reasons.append(str(error))
            _log.warning("%s", error)
    raise BackendUnavailableError("cuda: no engine: " + "; ".join(reasons))


def _load(
    config: DetectorConfig, weights: Mapping[str, Array], library: Library, folder: Path | None, options: dict[str, Any]
) -> Engine:
    def made(fresh: bool) -> Compiled:
        return compile_engine(config, weights, target="here", folder=folder, library=library, fresh=fresh, **options)

    def loaded(compiled: Compiled) -> Engine:
        kernels = cache.key({}, engine=compiled.name, device=repr(options["device"]), what="compiled kernels")
        return Engine(
            compiled.blob, library, kernels=cache.load(folder, kernels), keep=lambda blob: cache.store(folder, kernels, blob)
        )

    compiled = made(False)
    try:
        return loaded(compiled)
    except BackendUnavailableError as error:
        if not compiled.cached:
            raise
        _log.warning("the engine %s in %s is refused; building it again: %s", compiled.name, folder, error)
    return loaded(made(True))
