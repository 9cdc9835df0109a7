"""What a detector keeps on an NVIDIA GPU for all threads: the context, the kernels, the TensorRT engine, the normal map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import lattice, schedule
from advrad_fast.backends import tensorrt_engine as engines
from advrad_fast.backends.base import Array
from advrad_fast.backends.tensorrt_library import Library
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, InferenceError, KernelFileError
from advrad_fast.graph_precision import TypedPrecision
from advrad_fast.kernels import arguments
from advrad_fast.kernels.launcher import Gpu, Kernels, LoadedKernel, open_gpu

_ALIGNMENT = 256  # bytes: of every buffer, as TensorRT wants it


@dataclass(frozen=True)
class Plan:
    """What is computed: from one frame, ``results`` scores of ``draws`` noise draws each, in one batch.

    Attributes:
        config: with the timestep that the network runs at.
        draws, results: their product is the engine's batch.
        precision: the engine's.
        sigma: of lattice noise in place of the diffusion's, in [0, 1] pixel units.
    """

    config: DetectorConfig
    draws: int
    results: int
    precision: TypedPrecision
    sigma: float | None = None

    @property
    def batch(self) -> int:
        """Images a call of the network."""
        return self.draws * self.results

    @property
    def wide(self) -> bool:
        """Whether the filter is too large for one kernel."""
        return bool(self.config.score.filter_size > arguments.NARROW)


@dataclass(frozen=True)
class Where:
    """Where a session runs, and from what.

    Attributes:
        ordinal: which GPU.
        kernels: folder of compiled kernels.
        cache: folder of engines; None for none.
        library: of the engine; None for the first usable one.
    """

    ordinal: int
    kernels: Path
    cache: Path | None
    library: Library | None = None


class Session:
    """A plan on a GPU.  Close it after its lanes.

    Args:
        plan, where: what is computed, and where.
        weights: float32, exactly :func:`advrad_fast.graph.expected_tensors`.
        mu, inverse_spread: float32 (H, W).

    Attributes:
        gpu: the context; others than the maker's thread open it again.
        engine: TensorRT's.
        kernels: loaded, by name; ``deviation`` without maps, ``maps`` with them where there is one result.
        numbers: the arguments of each that no frame changes.
        addresses: of device memory that no frame changes, by argument.

    Raises:
        BackendUnavailableError: no GPU, no engine, or no kernels for it.
        InferenceError: out of memory, or another error of the driver.
        ConfigError, ModelFileError: as for :func:`advrad_fast.backends.tensorrt_engine.load_or_build`.
    """

    def __init__(self, plan: Plan, where: Where, weights: Mapping[str, Array], mu: Array, inverse_spread: Array) -> None:
        self.plan, self.where = plan, where
        self.engine: Any = None
        self.kernels: dict[str, LoadedKernel] = {}
        self._constants: Any = None
        self.gpu = open_gpu(where.ordinal)
        try:
            with current(self.gpu):
                self.engine = engines.load_or_build(
                    plan.config,
                    weights,
                    precision=plan.precision,
                    batches=(plan.batch,),
                    gpu_name=self.gpu.name,
                    capability=self.gpu.capability,
                    driver_version=engines.driver_version(self.gpu.driver_version),
                    folder=where.cache,
                    library=where.library,
                )
                self.numbers = _numbers(plan, pixels=4 if self.engine.input_dtype == "fp32" else 8)
                self.kernels = self._load()
                self.addresses = self._upload(mu, inverse_spread)
        except BaseException:
            self.close()
            raise

    def _load(self) -> dict[str, LoadedKernel]:
        plan, engine, channels = self.plan, self.engine, self.plan.config.image.channels
        kind = "gaussian" if plan.sigma is None else "lattice"
        again = "none" if plan.sigma is None and self.numbers["errors"]["noise_scale"] == 0.0 else kind
        try:
            folder = Kernels(self.where.kernels, self.gpu)
            found = {
                "noise": folder.load("noise", layout="nchw", dtype=engine.input_dtype, noise=kind, channels=channels),
                "errors": folder.load("errors", dtype=engine.output_dtype, noise=again, channels=channels),
                "deviation": folder.load("deviation", maps=False, wide=plan.wide),
            }
            if plan.wide:
                found["rows"] = folder.load("rows")
            if plan.results == 1:
                found["maps"] = folder.load("deviation", maps=True, wide=plan.wide)
        except KernelFileError as error:
            raise BackendUnavailableError(
                f"cuda: the compiled GPU kernels in {self.where.kernels} cannot be used: {error}; compile them again:"
                " advrad-fast compile --kernels"
            ) from error
        return found

    def _upload(self, mu: Array, inverse_spread: Array) -> dict[str, int]:
        """Everything in one allocation."""
        sigma = self.plan.sigma
        arrays: dict[str, NDArray[Any]] = {
            "mu": np.ascontiguousarray(mu, np.float32),
            "inverse_spread": np.ascontiguousarray(inverse_spread, np.float32),
            "image_ids": np.zeros(1, np.int32),
            "thresholds": np.zeros(2, np.uint64) if sigma is None else lattice.thresholds(sigma),
        }
        places, total = layout({name: array.nbytes for name, array in arrays.items()})
        self._constants = self.gpu.cuda.mem_alloc(total)
        start = int(self._constants)
        for name, array in arrays.items():
            self.gpu.cuda.memcpy_htod(start + places[name], array)
        return {name: start + place for name, place in places.items()}

    def alive(self) -> bool:
        """Whether the context still works: some errors end it, and everything in it."""
        try:
            with current(self.gpu):
                self.gpu.cuda.Context.synchronize()
        except InferenceError:
            return False
        return True

    def close(self) -> None:
        """Give everything back; what a lost context refuses to take is gone with it.  Closing twice is fine."""
        with suppress(InferenceError), current(self.gpu):
            self.engine, self.kernels = None, {}
            constants, self._constants = self._constants, None
            if constants is not None:
                constants.free()
        with suppress(self.gpu.cuda.Error):
            self.gpu.close()


@contextmanager
def current(gpu: Gpu) -> Iterator[None]:
    """The GPU's context is current on this thread meanwhile, and pycuda's errors come as InferenceError."""
    gpu.push()
    try:
        try:
            yield
        finally:
            gpu.pop()
    except gpu.cuda.Error as error:
        raise InferenceError(f"cuda: {error}") from error


def layout(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where buffers of so many bytes begin in one allocation, and its size."""
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _numbers(plan: Plan, *, pixels: int) -> dict[str, dict[str, float]]:
    """Every kernel's arguments but its pointers; seed and first_draw are 0.  ``pixels``: of an item of the noise kernel."""
    image, score, diffusion = plan.config.image, plan.config.score, plan.config.diffusion
    bar = float(schedule.alpha_bar(diffusion)[diffusion.timestep])
    c = schedule.coefficients(plan.config.unet.prediction, bar, plan.config.unet.sigma_data)
    smoothed = plan.sigma is not None
    affine = (c.signal, c.noise, c.input_scale)
    noise = arguments.noise_scales(*affine, lattice=smoothed)
    errors = arguments.error_scales(*schedule.error_coefficients(c, smoothed=smoothed), *affine, lattice=smoothed)
    stream: dict[str, float] = {"seed": 0, "first_draw": 0, "half": 1, "lattice_scale": 1.0}
    if plan.sigma is not None:
        stream |= {"half": len(lattice.thresholds(plan.sigma)) // 2, "lattice_scale": lattice.LEVELS * plan.sigma}
    size = {"results": plan.results, "height": image.height, "width": image.width}
    names = ("pixel_scale", "offset", "noise_scale", "output_scale")
    weights = {f"weight_{s}": w / (image.channels * plan.draws) for s, w in zip((1, 2, 4, 8), score.scale_weights, strict=True)}
    filtered = {**size, "filter_size": score.filter_size}
    deviation = {**filtered, "tiles": arguments.tiles(image.width, score.filter_size)}
    return {
        "noise": {
            **stream,
            **dict(zip(names[:3], noise, strict=True)),
            "draws": plan.batch,
            "frames": 1,
            "items": image.height * image.width // pixels,
        },
        "errors": {
            **stream,
            **size,
            **weights,
            **dict(zip(names, errors, strict=True)),
            "draws": plan.draws,
            "groups": plan.results,
        },
        "rows": dict(filtered),
        "deviation": deviation,
        "maps": deviation,
    }
