"""From a model of tiles to one that inspects frames larger than itself: overlap, normal maps by position, the threshold.

A frame's score is the maximum over all its tiles, so it is higher than one tile's even on good parts, and the threshold of a
tile would give false alarms on most frames.  So whole good frames are inspected in tiles, as they will be, and the
threshold is conformal over their scores.

>>> model = fit_tiling(ModelFile.load("crops.safetensors"), calibration=good_frames)
>>> Detector(model).inspect(frame)                     # 4096 x 3000, or any size
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import calibrate
from advrad_fast.checks import several, share
from advrad_fast.config import SPREAD_FLOOR, TilingConfig
from advrad_fast.detector import Detector
from advrad_fast.errors import CalibrationError, ConfigError, ImageError, PartNotFoundError, expected
from advrad_fast.model import ModelFile
from advrad_fast.roi import without_region
from advrad_fast.selftest_record import with_self_test
from advrad_fast.tiles import default_overlap, tile_seed

_log = logging.getLogger(__name__)

#: Seed of the fitting's noise; frames have seeds of their own, apart from an inspection's.
_SEED, _CALIBRATION = 0x711E, 200_000


def fit_tiling(
    model: ModelFile,
    *,
    calibration: Iterable[object],
    normals: Iterable[object] | None = None,
    overlap: int | None = None,
    false_alarm_rate: float | None = None,
    backend: str = "cpu",
    **options: Any,
) -> ModelFile:
    """Make a model of tiles inspect whole frames.

    Args:
        model: trained on tiles: pieces of frames at the resolution at which frames will be inspected.
        calibration: good frames that the threshold comes from; none of them trained on, nor among ``normals``.
        normals: if given, every frame shows the same thing at the same place: the mean error and its spread over these
            frames become the normal map, so that each position has its own.  At least 2, better 30, all of one size.
            None: frames of any size, all tiles held against the model's own normal map.
        overlap: see :class:`advrad_fast.config.TilingConfig`; None for an eighth of a tile's shorter side.
        false_alarm_rate: the threshold's; None for the model's.  Raised where there are too few calibration frames.
        backend, options: what inspects here (:class:`advrad_fast.Detector`).

    Returns:
        The model with ``tiling``, the calibration scores and threshold of whole frames, and nothing to certify with.

    Raises:
        CalibrationError: no calibration frame, or fewer than two normals.
        ConfigError: the model aligns the part first, or is of whole positions already.
        ImageError: a frame breaks the contract or differs in size.
        ModelFileError: the overlap does not fit the tiles.
        InferenceError, BackendUnavailableError: as for the detector.
    """
    image = model.config.image
    if image.pose is not None:
        raise ConfigError("model: expected one that does not align the part (train with align='off')")
    if model.tiling is not None and model.tiling.frame is not None:
        raise ConfigError("model: expected one whose normal map is a tile's, got one with normal maps by position")
    for name, frames in (("calibration", calibration), ("normals", normals if normals is not None else ())):
        if not several(frames):
            raise ImageError(expected(name, "an iterable of frames", type(frames)))
    target = model.false_alarm_rate if false_alarm_rate is None else share("false_alarm_rate", false_alarm_rate)
    tiling = TilingConfig(default_overlap(image.height, image.width) if overlap is None else overlap)
    tiled = dataclasses.replace(without_region(model), smoothing=(), tiling=tiling)
    if normals is not None:
        tiled = _by_position(tiled, normals, backend, options)
        tiled = with_self_test(tiled, **{key: value for key, value in options.items() if key in ("cache_dir", "threads")})
    scores = np.sort([_score(d, f, i) for d in (Detector(tiled, backend=backend, **options),) for i, f in enumerate(calibration)])
    if not len(scores):
        raise CalibrationError(expected("calibration", "at least one good frame", 0))
    rate = max(target, calibrate.attainable_rate(len(scores)))
    if rate > target:
        _log.warning("%d calibration frames hold a false-alarm rate of %.3g at best, not %.3g", len(scores), rate, target)
    threshold = calibrate.conformal_threshold(scores, rate)
    return dataclasses.replace(tiled, calibration_scores=scores, threshold=threshold, false_alarm_rate=rate)


def _score(detector: Detector, frame: object, index: int) -> float:
    result = detector.inspect(frame, maps=False, seed=tile_seed(_SEED, _CALIBRATION + index))
    if result.score is None:
        raise result.error or PartNotFoundError("no part")
    return result.score


def _by_position(model: ModelFile, normals: Iterable[object], backend: str, options: dict[str, Any]) -> ModelFile:
    """The model with the mean error over the normals as its normal map, and its spread, streamed frame by frame."""
    detector: Detector | None = None
    count = 0
    mean = squares = np.empty(0)
    for i, frame in enumerate(normals):
        if detector is None:
            blank = _blank(model, frame)
            detector = Detector(blank, backend=backend, **options)  # its map is the blended error
            mean, squares = np.zeros(blank.mu.shape), np.zeros(blank.mu.shape)
        error = detector.inspect(frame, seed=tile_seed(_SEED, i)).anomaly_map
        if error is None:
            raise ConfigError(expected("normals", "frames with a map", None))
        count += 1  # Welford's update
        delta = error - mean
        mean += delta / count
        squares += delta * (error - mean)
    if detector is None or count < 2:
        raise CalibrationError(expected("normals", "at least 2 good frames", count))
    spread = None
    if model.config.score.spread:
        deviation = np.sqrt(squares / (count - 1))
        floor = SPREAD_FLOOR * float(deviation.mean())
        tiny = float(np.finfo(np.float32).tiny)
        spread = np.maximum(np.hypot(deviation, floor), tiny).astype(np.float32)
    return dataclasses.replace(detector.model, mu=mean.astype(np.float32), spread=spread)


def _blank(model: ModelFile, frame: object) -> ModelFile:
    """The model by position, for frames of this one's size, with a normal map of zeros."""
    from advrad_fast.images import prepare_whole

    height, width = prepare_whole(frame, model.config.image).shape[:2]
    zeros: NDArray[np.float32] = np.zeros((height, width), dtype=np.float32)
    spread = np.ones_like(zeros) if model.config.score.spread else None
    tiling = TilingConfig(TilingConfig().overlap if model.tiling is None else model.tiling.overlap, (height, width))
    return dataclasses.replace(model, mu=zeros, spread=spread, tiling=tiling, self_test=None)
