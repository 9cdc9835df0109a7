"""What int8 and fp8 need to know of a network: how large its activations become on normals."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast.backends import cache
from advrad_fast.backends.base import Array
from advrad_fast.backends.telemetry import no_telemetry
from advrad_fast.config import DetectorConfig
from advrad_fast.errors import ConfigError, expected
from advrad_fast.graph import GRAPH_VERSION
from advrad_fast.graph_precision import TYPED_GRAPH_VERSION, build_typed_graph, quantised_tensors

_log = logging.getLogger(__name__)


def network_inputs(config: DetectorConfig, images: NDArray[np.uint8]) -> list[Array]:
    """Prepared normals as the network sees them: noised, image i under seed i.

    Args:
        images: uint8 (N, H, W, C).

    Returns:
        N arrays, float32 (draws, C, H, W).
    """
    from advrad_fast import _native as operations
    from advrad_fast import schedule

    image, diffusion = config.image, config.diffusion
    bar = float(schedule.alpha_bar(diffusion)[diffusion.timestep])
    c = schedule.coefficients(config.unet.prediction, bar, config.unet.sigma_data)
    inputs = []
    for i, frame in enumerate(images):
        x = np.empty((diffusion.draws, image.channels, image.height, image.width), dtype=np.float32)
        operations.noise(np.ascontiguousarray(frame[None]), len(x), i, c.signal, c.noise, c.input_scale, x)
        inputs.append(x)
    return inputs


def collect_ranges(config: DetectorConfig, weights: Mapping[str, Array], inputs: Sequence[Array]) -> dict[str, float]:
    """The largest magnitude of every activation that int8 and fp8 quantise, in fp32 over all the inputs.

    The network runs in OpenVINO, which is installed wherever this package is.

    Args:
        inputs: float32 (n, C, H, W) each, n at least 1; a few dozen images do.

    Raises:
        ConfigError: there are no inputs, one has another shape or type, or a value is not finite.
        ModelFileError: the weights are not this config's.
    """
    import onnx

    with no_telemetry():
        import openvino as ov

    image = config.image
    shape = (image.channels, image.height, image.width)
    if len(inputs) == 0:
        raise ConfigError(expected("calibration", "at least one network input", 0))
    for i, x in enumerate(inputs):
        if x.dtype != np.float32 or x.ndim != 4 or x.shape[1:] != shape or len(x) == 0 or not np.isfinite(x).all():
            wanted = f"finite float32 (n, {', '.join(map(str, shape))})"
            raise ConfigError(f"calibration[{i}]: expected {wanted}, got {x.dtype} {x.shape}")
    size: dict[str, Any] = {"height": image.height, "width": image.width, "timestep": config.diffusion.timestep}
    model = build_typed_graph(config.unet, weights, precision="fp32", **size)
    names = quantised_tensors(config.unet, weights, **size)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(ov.Core().read_model(model.SerializeToString()), "CPU", options)
    request = compiled.create_infer_request()
    ranges = dict.fromkeys(names, 0.0)
    for batch in inputs:
        for x in batch:  # one at a time: all activations of a batch would be many
            request.infer({"x": x[None]})
            for name in names:
                ranges[name] = float(np.maximum(ranges[name], np.abs(request.get_tensor(name).data).max()))  # NaN stays
    for name, largest in ranges.items():
        if not math.isfinite(largest):
            raise ConfigError(expected(f"calibration: activation {name}", "a finite number", largest))
    return {name: largest or 1.0 for name, largest in ranges.items()}  # what is always 0 has no range: any will do


def store_ranges(folder: Path | None, config: DetectorConfig, weights: Mapping[str, Array], ranges: Mapping[str, float]) -> bool:
    """Keep a calibration in the cache, for every engine of these weights; whether that could be done."""
    return cache.store(folder, _name(config, weights), json.dumps(dict(ranges)).encode())


def load_ranges(folder: Path | None, config: DetectorConfig, weights: Mapping[str, Array]) -> dict[str, float] | None:
    """A calibration from the cache, or None: there is none, or what is there is not one (logged as a warning)."""
    blob = cache.load(folder, _name(config, weights))
    if blob is None:
        return None
    try:
        ranges = json.loads(blob)
    except (ValueError, RecursionError):
        ranges = None
    if not isinstance(ranges, dict) or not all(type(v) is float and 0.0 < v < math.inf for v in ranges.values()):
        _log.warning("the calibration in %s is not one; calibrate again", folder)
        return None
    return ranges


def _name(config: DetectorConfig, weights: Mapping[str, Array]) -> str:
    image = config.image
    size = (image.height, image.width, config.diffusion.timestep)
    graph = (GRAPH_VERSION, TYPED_GRAPH_VERSION)
    return cache.key(weights, graph=graph, unet=config.unet.to_json(), size=size, calibrated="tensorrt")
