"""A model's calibration from new normals, without retraining and without PyTorch: for a line that has changed.

>>> model = recalibrate(ModelFile.load("part.safetensors"), good_frames)
>>> model.save("part-2.safetensors")

The weights stay.  New are the calibration scores and with them the threshold; the same for every sigma that the model can certify
at; and, where asked for, the normal map.  Under a region of interest the threshold is that region's: good parts score less there
than anywhere in the frame, and a lower threshold finds more at the same false-alarm rate.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import backends, calibrate, checks, images
from advrad_fast.certify import least_ok_threshold
from advrad_fast.config import SPREAD_FLOOR
from advrad_fast.detector import Detector
from advrad_fast.errors import (
    AdvRADError,
    CalibrationError,
    ConfigError,
    DatasetError,
    InferenceError,
    PartNotFoundError,
    expected,
)
from advrad_fast.model import ModelFile, Scalar
from advrad_fast.roi import CALIBRATED_UNDER, Roi, fitting, without_region
from advrad_fast.selftest_record import with_self_test
from advrad_fast.smoothing import Smoothing

_log = logging.getLogger(__name__)

MAP_FRAMES = 10  #: fewest frames that a normal map is made of
MOST_LOST = 0.1  #: share of the frames in which no part may be found

Progress = Callable[[int, int], None]


def frames_needed(false_alarm_rate: float, *, mu: bool = False) -> int:
    """Fewest frames for a false-alarm rate in (0, 1); with ``mu`` as many again, and at least ``MAP_FRAMES``, go into the map.

    Raises:
        ConfigError: the rate is out of range.
    """
    needed = calibrate.normals_needed(false_alarm_rate)
    return needed + max(needed, MAP_FRAMES) if checks.truth("mu", mu) else needed


def recalibrate(
    model: ModelFile,
    frames: Sequence[object],
    *,
    false_alarm_rate: float | None = None,
    mu: bool = False,
    seed: int | None = 0,
    roi: Roi | NDArray[np.bool_] | None = None,
    backend: str = "auto",
    on_frame: Progress | None = None,
    **options: Any,
) -> ModelFile:
    """The model with calibration scores and thresholds of new normals.

    The frames must be good parts that nothing was trained or chosen on, exchangeable with those to come
    (:mod:`advrad_fast.calibrate`).  With ``mu``, half of them, drawn by lot, make the normal map (and the spread, where the score
    has one) and the other half the scores: frames that the map was made of would score too low.  The maps of the sigmas stay as
    they are; their thresholds are made anew and hold.

    Args:
        frames: each as for ``Detector.inspect``.  They are taken one by one, so a sequence may load them as it is indexed.
        false_alarm_rate: target of the thresholds, in (0, 1); None for the model's.
        mu: also make the normal map.
        seed: of an inspection's noise, the one that the line's detector has: under the same noise calibration and line are
            exchangeable.  None for a detector that has None: noise of its own for every frame.
        roi: the line's detector's region of interest, as for ``Detector``: the scores are of its inside.  It is not kept, but its
            digest is, in the provenance; a detector with another one, or none, logs a warning.  The thresholds at the sigmas
            are of whole frames all the same, as certificates are.
        backend, options: what scores the frames, as for ``Detector``: best what runs on the line.
        on_frame: called after every frame with how many are done, and of how many.

    Raises:
        CalibrationError: too few frames; the message says how many it takes.
        ConfigError: an argument is out of range, the region does not fit the model, or ``mu`` is asked for a model that inspects
            tiles.
        DatasetError: the pose rule finds no part, or none in the region, in more than a tenth of the frames.
        ImageError: a frame breaks the input contract, or is not of the region's size.
        InferenceError, BackendUnavailableError: as for ``Detector``, whose self-test has to be passed.
    """
    if not isinstance(model, ModelFile):
        raise ConfigError(expected("model", "a ModelFile", type(model)))
    if not checks.several(frames) or not isinstance(frames, Sequence | np.ndarray):
        raise ConfigError(expected("frames", "a sequence of frames", type(frames)))
    rate = model.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
    needed = frames_needed(rate, mu=mu)  # refuses both
    if mu and model.tiling is not None:
        raise ConfigError("mu: expected False, as the model inspects tiles; `train --tile` and fit_tiling make their normal maps")
    count = len(frames)
    _enough(count, rate, needed, mu)
    model, roi = without_region(model), fitting(roi, model)
    detector = Detector(model, backend=backend, seed=seed, roi=roi, **options)

    order = np.arange(count)
    for_map = order[:0]
    if mu:
        order = np.random.default_rng(0).permutation(count)
        least = needed - calibrate.normals_needed(rate)
        half = min(max(count // 2, least), count - (needed - least))
        for_map, order = order[:half], order[half:]
    reader = _Reader(frames, on_frame, roi)
    if mu:
        model = _with_maps(model, reader, for_map, seed, backend, options)
        detector = Detector(model, backend=backend, seed=seed, roi=roi, **options)
    whole = detector
    if roi is not None and model.smoothing:
        whole = Detector(model, backend=backend, seed=seed, self_test=False, **options)
    scores, smoothed = _scores(detector, whole, reader, order)
    reader.check()
    _enough(count - reader.lost, rate, needed, mu)
    if len(scores) < calibrate.normals_needed(rate):
        raise CalibrationError(expected("frames", f"at least {calibrate.normals_needed(rate)} with a part to score", len(scores)))
    provenance: dict[str, Scalar] = {
        **model.provenance,
        "recalibrated_on": len(scores),
        "recalibrated_map_on": len(for_map),
        "recalibrated_sha256": reader.digest.hexdigest(),
        "recalibrated_backend": detector.backend,
        "recalibrated_seed": seed,
        CALIBRATED_UNDER: None if roi is None else roi.digest,
    }
    calibrated = dataclasses.replace(
        model,
        calibration_scores=np.sort(scores),
        smoothing=tuple(
            dataclasses.replace(one, calibration_scores=np.sort(smoothed[one.sigma]), false_alarm_rate=rate)
            for one in model.smoothing
        ),
        provenance=provenance,
    )
    return calibrated.with_false_alarm_rate(rate)


class _Reader:
    """Reads frames by number, and keeps account of them."""

    def __init__(self, frames: Sequence[object], on_frame: Progress | None, roi: Roi | None) -> None:
        self._frames, self._on_frame, self._roi = frames, on_frame, roi
        self._done = self.lost = 0
        self.digest = hashlib.sha256()

    def read(self, index: int, use: Callable[[object], bool]) -> None:
        """``use`` one frame, and say whether a part was found; what it raises names the frame."""
        try:
            frame = images.check_frame(self._frames[index])
            self.digest.update(repr(frame.shape).encode() + frame.tobytes())
            if not use(frame):
                self.lost += 1
        except AdvRADError as error:
            raise type(error)(f"frame {index}: {error}") from error
        self._done += 1
        if self._on_frame is not None:
            self._on_frame(self._done, len(self._frames))

    def check(self) -> None:
        """Raises a DatasetError if too many were lost."""
        if self.lost > MOST_LOST * self._done:
            where = " in the region of interest" if self._roi is not None else ""
            raise DatasetError(f"no part was found{where} in {self.lost} of {self._done} frames")


def _enough(count: int, rate: float, needed: int, mu: bool) -> None:
    if count < needed:
        also = f", {needed - calibrate.normals_needed(rate)} of them for the normal map" if mu else ""
        raise CalibrationError(f"frames: a false-alarm rate of {rate:g} takes at least {needed} good frames{also}, got {count}")


def _scores(
    detector: Detector, whole: Detector, reader: _Reader, order: NDArray[np.int64]
) -> tuple[list[float], dict[float, list[float]]]:
    """Of each frame the score, and for each sigma, by a detector of whole frames, what its calibration scores are."""
    scores: list[float] = []
    smoothed: dict[float, list[float]] = {one.sigma: [] for one in detector.model.smoothing}

    def use(frame: object) -> bool:
        result = detector.inspect(frame, maps=False)
        if result.score is None:
            _log.warning("left out: %s", result.error)
            return False
        scores.append(result.score)
        for one in detector.model.smoothing:
            draws = whole.smoothed_scores(frame, one.draws, sigma=one.sigma, seed=len(scores))
            smoothed[one.sigma].append(_smoothed(one, draws, detector.model))
        return True

    for index in order.tolist():
        reader.read(index, use)
    return scores, smoothed


def _smoothed(one: Smoothing, draws: NDArray[np.float32], model: ModelFile) -> float:
    if not one.radius:
        return float(np.median(draws))
    size = model.config.image
    pixels = size.height * size.width * size.channels
    least = least_ok_threshold(draws, one.radius, sigma=one.sigma, pixels=pixels, alpha=one.alpha)
    if least is None:
        raise ConfigError(expected("draws", f"enough to certify radius {one.radius:g} at sigma {one.sigma:g}", one.draws))
    return least


def _with_maps(
    model: ModelFile,
    reader: _Reader,
    order: NDArray[np.int64],
    seed: int | None,
    backend: str,
    options: Mapping[str, Any],
) -> ModelFile:
    """With the mean of the normals' error maps as mu, and their floored deviation as the spread.

    The error map is not negative, so it is what a backend returns where mu is 0 and the spread 1.
    """
    size = model.mu.shape
    engine = backends.create(backend, model.config, model.weights, np.zeros_like(model.mu), np.ones_like(model.mu), **options)
    count, mean, squares = 0, np.zeros(size), np.zeros(size)

    def use(frame: object) -> bool:
        nonlocal count
        try:
            image = images.prepare(frame, model.config.image).image
        except PartNotFoundError as error:
            _log.warning("left out: %s", error)
            return False
        noise = secrets.randbits(64) if seed is None else seed
        maps = engine.score(image[None], seed=noise, want_maps=True).maps
        if maps is None or maps.shape != (1, *size) or not np.isfinite(maps).all():
            raise InferenceError(expected("maps", f"a finite array {(1, *size)}", None if maps is None else maps.shape))
        count += 1  # Welford's update
        off = maps[0] - mean
        np.add(mean, off / count, out=mean)
        np.add(squares, off * (maps[0] - mean), out=squares)
        return True

    for index in order.tolist():
        reader.read(index, use)
    reader.check()
    if count < 2:
        raise CalibrationError(expected("frames", "at least 2 with a part, for the normal map", count))
    spread = None
    if model.config.score.spread:
        deviation = np.sqrt(squares / (count - 1))
        spread = np.hypot(deviation, SPREAD_FLOOR * deviation.mean()).astype(np.float32)
    changed = dataclasses.replace(model, mu=mean.astype(np.float32), spread=spread, self_test=None)
    return with_self_test(changed, **{key: value for key, value in options.items() if key in ("cache_dir", "threads")})


__all__ = ["frames_needed", "recalibrate"]
