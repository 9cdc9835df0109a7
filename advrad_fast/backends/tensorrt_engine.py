"""The network as a TensorRT engine: built from the typed graph, kept in the cache, loaded and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from advrad_fast.backends.base import Array
from advrad_fast.backends.tensorrt_library import Library, libraries
from advrad_fast.config import DetectorConfig

__all__ = ["Device", "Engine", "EnginePrecision", "Execution", "Library", "build", "libraries", "load_or_build"]

EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
EngineType = Literal["fp32", "fp16", "bf16"]  # of the engine's input and output


@dataclass(frozen=True)
class Device:
    """What an engine that was built here depends on.

    Attributes:
        name: of the GPU, ``NVIDIA L4``.
        capability: (8, 9).
        driver: anything that changes with the driver: the version as text.
    """

    name: str
    capability: tuple[int, int]
    driver: str

    @property
    def target(self) -> str:
        """``sm_89``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def build(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    *,
    target: str,
    precision: EnginePrecision,
    batches: tuple[int, ...],
    calibration: Sequence[Array] | None = None,
    library: Library | None = None,
) -> bytes:
    """Build an engine.  int8 and fp8 need ``calibration``: network inputs of normals, float32 (n, C, H, W) each.

    Args:
        target: ``here`` for this machine's GPU, or ``sm_89`` and so on for TensorRT-RTX.
        batches: images a call: one optimisation profile each.
        library: None for the first usable one that can build for the target.

    Raises:
        BackendUnavailableError: no library can, or the builder failed; its errors are in the message.
        ConfigError: an option is out of range, or int8 or fp8 without calibration.
        ModelFileError: the weights are not this config's.
    """
    raise NotImplementedError


def load_or_build(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    *,
    device: Device,
    precision: EnginePrecision,
    batches: tuple[int, ...],
    folder: Path | None,
    library: Library | None = None,
) -> Engine:
    """For the backend: the engine for this GPU from the cache (built here, or brought by ``compile --target``), or built.

    int8 and fp8 need the ranges that ``advrad-fast compile --calibration`` put into the cache.
    The calling thread must have the device's primary context current.

    Raises:
        BackendUnavailableError, ConfigError, ModelFileError: as :func:`build`; also where int8's ranges are not in the cache.
    """
    raise NotImplementedError


class Engine:
    """A deserialised engine.  Thread-safe: each thread takes executions of its own.

    Raises:
        BackendUnavailableError: the library refuses the blob (another version, another GPU); its errors are in the message.
    """

    def __init__(self, blob: bytes, library: Library) -> None:
        self.input_dtype: EngineType
        self.output_dtype: EngineType
        self.batches: tuple[int, ...]
        raise NotImplementedError

    def execution(self, batch: int) -> Execution:
        """A context for one of :attr:`batches`, with device memory of its own, allocated now.  Not for two threads at once.

        Raises:
            ConfigError: the batch is not among :attr:`batches`.
            InferenceError: TensorRT could not make it (out of memory).
        """
        raise NotImplementedError


class Execution:
    """One batch size's way through the network.

    Attributes:
        device_memory_bytes: what TensorRT holds for its intermediate results.
    """

    device_memory_bytes: int

    def __init__(self, engine: Any, batch: int) -> None:
        raise NotImplementedError

    def set_addresses(self, input: int, output: int) -> None:
        """Device addresses, 256-byte aligned, of (batch, C, H, W) in the engine's dtypes, contiguous.  Kept until set again.

        Raises:
            InferenceError: TensorRT refuses an address.
        """
        raise NotImplementedError

    def enqueue(self, stream_handle: int) -> None:
        """Put the network on a CUDA stream; returns at once.  May be captured into a CUDA graph after one call outside capture.

        Raises:
            InferenceError: TensorRT failed, with its errors in the message.
        """
        raise NotImplementedError
