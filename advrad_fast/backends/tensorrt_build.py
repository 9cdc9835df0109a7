"""The network as a TensorRT engine, with its precision in the graph; a GPU is not needed where the library can do without."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advrad_fast.backends.base import Array
from advrad_fast.backends.tensorrt_calibration import collect_ranges
from advrad_fast.backends.tensorrt_library import Library, Toolkit, check_target, choose
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, expected
from advrad_fast.graph_precision import TYPED_PRECISIONS, TypedPrecision, build_typed_graph

_MAX_BATCH, _MAX_PROFILES = 4096, 16
_FIRST_TARGET = {"bf16": 80, "fp8": 89}  # the compute capability, times 10, that has the arithmetic


def build(
    config: DetectorConfig,
    weights: Mapping[str, Array],
    *,
    target: str,
    precision: TypedPrecision,
    batches: tuple[int, ...],
    calibration: Sequence[Array] | Mapping[str, float] | None = None,
    library: Library | None = None,
) -> bytes:
    """Build an engine.

    Args:
        target: ``here`` for this machine's GPU, or one of
            :data:`advrad_fast.backends.tensorrt_library.RTX_TARGETS`, on any machine, for TensorRT-RTX.
        precision: one of :data:`advrad_fast.graph_precision.TYPED_PRECISIONS`.
        batches: images a call, ascending: one optimisation profile each, of exactly that shape.
        calibration: for int8 and fp8: network inputs of normals, float32 (n, C, H, W) each, or what
            :func:`advrad_fast.backends.tensorrt_calibration.collect_ranges` found in them.
        library: None for the first usable one that builds for the target.

    Returns:
        The engine, serialised.  It is code: load none that you did not build.

    Raises:
        BackendUnavailableError: no library can, or the builder failed; what it said is in the message.
        ConfigError: an option is out of range, int8 or fp8 without calibration, or the target lacks the precision.
        ModelFileError: the weights are not this config's.
    """
    check_target(target)
    batches = check_batches(batches)
    check_precision(precision, target)
    library = choose(target) if library is None else library
    if library.name != "tensorrt_rtx" and target != "here":
        raise ConfigError(f"target: expected 'here', which is all that {library.detail} builds for, got {target!r}")
    toolkit = Toolkit.of(library)
    ranges = None
    if precision in ("int8", "fp8"):
        if calibration is None:
            raise ConfigError(expected("calibration", f"network inputs of normals, which {precision} needs", calibration))
        ranges = calibration if isinstance(calibration, Mapping) else collect_ranges(config, weights, calibration)
    image = config.image
    size = {"height": image.height, "width": image.width, "timestep": config.diffusion.timestep}
    model = build_typed_graph(config.unet, weights, precision=precision, ranges=ranges, **size)
    shapes = [(batch, image.channels, image.height, image.width) for batch in batches]
    return toolkit.build(model.SerializeToString(), shapes, target)


def check_batches(batches: object) -> tuple[int, ...]:
    """``batches`` as ascending integers, or a ConfigError."""
    wanted = f"1 to {_MAX_PROFILES} ascending integers in [1, {_MAX_BATCH}]"
    if not isinstance(batches, tuple | list) or not 1 <= len(batches) <= _MAX_PROFILES:
        raise ConfigError(expected("batches", wanted, batches))
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or not 1 <= batch <= _MAX_BATCH:
            raise ConfigError(expected("batches", wanted, batches))
    if list(batches) != sorted(set(batches)):
        raise ConfigError(expected("batches", wanted, batches))
    return tuple(int(batch) for batch in batches)


def check_precision(precision: Any, target: str = "here") -> TypedPrecision:
    """``precision`` as one that the target computes in, or a ConfigError."""
    if precision not in TYPED_PRECISIONS:
        raise ConfigError(expected("precision", f"one of {list(TYPED_PRECISIONS)}", precision))
    first = _FIRST_TARGET.get(str(precision), 0)
    number = re.fullmatch(r"sm_(\d+)", target)
    if number and int(number[1]) < first:
        raise ConfigError(f"precision: {precision} needs a GPU of sm_{first} or newer, got {target}")
    return precision  # type: ignore[no-any-return]
