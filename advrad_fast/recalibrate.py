"""A model's calibration from new normals, without retraining and without PyTorch: for a line that has changed.

The weights stay.  New are the calibration scores and with them the threshold; the same for every sigma that the model can certify
at; and, where asked for, the normal map.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import backends, calibrate, images, philox, selftest
from advrad_fast.backends import Backend
from advrad_fast.errors import AdvRADError, CalibrationError, DatasetError, InferenceError, PartNotFoundError, expected
from advrad_fast.model import ModelFile, Scalar
from advrad_fast.smoothing import Smoothing

_log = logging.getLogger(__name__)

MAP_FRAMES = 10  #: fewest frames that a normal map is made of
SPREAD_FLOOR = 0.5  #: share of the spread's mean, as in training
MOST_LOST = 0.1  #: share of the frames in which no part may be found

Progress = Callable[[int, int], None]


def frames_needed(false_alarm_rate: float, *, mu: bool = False) -> int:
    """Fewest frames for a false-alarm rate in (0, 1); with ``mu`` as many again, and at least ``MAP_FRAMES``, go into the map."""
    needed = calibrate.normals_needed(false_alarm_rate)
    return needed + max(needed, MAP_FRAMES) if mu else needed


def recalibrate(
    model: ModelFile,
    frames: Iterable[object],
    *,
    false_alarm_rate: float | None = None,
    mu: bool = False,
    seed: int | None = 0,
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
        frames: as for ``Detector.inspect``.
        false_alarm_rate: target of the thresholds, in (0, 1); None for the model's.
        mu: also make the normal map.
        seed: of an inspection's noise, the one that the line's detector has: under the same noise calibration and line are
            exchangeable.  None for a detector that has None: noise of its own for every frame.
        backend, options: what scores the frames, as for ``Detector``: best what runs on the line.
        on_frame: called after every frame's score with how many are done, and of how many.

    Raises:
        CalibrationError: too few frames; the message says how many it takes.
        ConfigError: an argument is out of range.
        DatasetError: the pose rule finds no part in more than a tenth of the frames.
        ImageError: a frame breaks the input contract.
        InferenceError, BackendUnavailableError: as for ``Detector``.
    """
    rate = model.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
    needed = frames_needed(rate, mu=mu)  # refuses the rate
    seed = None if seed is None else philox.check_seed(seed)
    prepared, digest = _prepare(model, frames)
    count = len(prepared)
    if count < needed:
        also = f", {needed - calibrate.normals_needed(rate)} of them for the normal map" if mu else ""
        raise CalibrationError(f"frames: a false-alarm rate of {rate:g} takes at least {needed} good frames{also}, got {count}")
    order = np.random.default_rng(0).permutation(count)
    for_map, for_scores = order[: count // 2 if mu else 0], order[count // 2 if mu else 0 :]
    if mu and len(for_map) < MAP_FRAMES:
        for_map, for_scores = order[:MAP_FRAMES], order[MAP_FRAMES:]

    total, done = count + len(for_scores) * len(model.smoothing), 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_frame is not None:
            on_frame(done, total)

    if mu:
        model = _with_maps(model, (prepared[i] for i in for_map), seed, step, backend, options)
    scorer = backends.create(backend, model.config, model.weights, model.mu, model.inverse_spread, **options)
    scores = np.empty(len(for_scores))
    for j, i in enumerate(for_scores):
        scores[j] = scorer.score(prepared[i][None], seed=_noise(seed), want_maps=False).scores[0]
        step()
    smoothing = tuple(_smoothing(model, one, scorer, [prepared[i] for i in for_scores], rate, step) for one in model.smoothing)
    scores.sort()
    provenance: dict[str, Scalar] = {
        **model.provenance,
        "recalibrated_on": len(for_scores),
        "recalibrated_map_on": len(for_map),
        "recalibrated_sha256": digest,
        "recalibrated_backend": f"{scorer.name} ({scorer.precision})",
    }
    return dataclasses.replace(
        model,
        calibration_scores=scores,
        false_alarm_rate=rate,
        threshold=calibrate.conformal_threshold(scores, rate),
        smoothing=smoothing,
        provenance=provenance,
    )


def with_self_test(model: ModelFile, *, backend: str = "cpu", **options: Any) -> ModelFile:
    """The model with what it must say, in fp32, of the frames of :mod:`advrad_fast.selftest`.

    The options are the backend's.  Where that cannot be told apart from nothing, a score or a map of zeros, the model gets no
    self-test.

    Raises:
        BackendUnavailableError: the backend is unusable here.
        InferenceError: it failed.
    """
    engine = backends.create(backend, model.config, model.weights, model.mu, model.inverse_spread, precision="fp32", **options)
    result = engine.score(selftest.frames(model.config.image), seed=selftest.SEED, want_maps=True)
    if result.maps is None:
        raise InferenceError(expected("maps", "an array", None))
    means = tuple(result.maps.astype(np.float64).mean(axis=(1, 2)).tolist())
    scores = tuple(float(score) for score in result.scores)
    if min(*scores, *means) < 1e-9:
        _log.warning("no self-test: scores %s, means %s", scores, means)
        return dataclasses.replace(model, self_test=None)
    return dataclasses.replace(model, self_test=selftest.Expected(scores, means))


def is_half(model: ModelFile) -> bool:
    """Whether all weights are float16 numbers, so that ``ModelFile.save(half=True)`` changes none."""
    with np.errstate(over="ignore"):
        return all(np.array_equal(array.astype(np.float16), array) for array in model.weights.values())


def _prepare(model: ModelFile, frames: Iterable[object]) -> tuple[list[NDArray[np.uint8]], str]:
    prepared, digest, lost, count = [], hashlib.sha256(), 0, 0
    for count, frame in enumerate(frames, 1):
        try:
            image = images.prepare(frame, model.config.image).image
        except PartNotFoundError as error:
            lost += 1
            _log.warning("frame %d: left out: %s", count - 1, error)
            continue
        except AdvRADError as error:
            raise type(error)(f"frame {count - 1}: {error}") from error
        digest.update(image.tobytes())
        prepared.append(image)
    if lost > MOST_LOST * count:
        raise DatasetError(f"no part was found in {lost} of {count} frames")
    return prepared, digest.hexdigest()


def _with_maps(
    model: ModelFile,
    prepared: Iterable[NDArray[np.uint8]],
    seed: int | None,
    step: Callable[[], None],
    backend: str,
    options: Mapping[str, Any],
) -> ModelFile:
    """With the mean of the normals' error maps as mu, and their floored deviation as the spread.

    The error map is not negative, so it is what a backend returns where mu is 0 and the spread 1.
    """
    nothing, one = np.zeros_like(model.mu), np.ones_like(model.mu)
    engine = backends.create(backend, model.config, model.weights, nothing, one, **options)
    count, mean, squares = 0, np.zeros(model.mu.shape), np.zeros(model.mu.shape)
    for image in prepared:  # Welford
        maps = engine.score(image[None], seed=_noise(seed), want_maps=True).maps
        if maps is None:
            raise InferenceError(expected("maps", "an array", None))
        count += 1
        off = maps[0] - mean
        mean += off / count
        squares += off * (maps[0] - mean)
        step()
    spread = None
    if model.config.score.spread:
        deviation = np.sqrt(squares / (count - 1))
        spread = np.hypot(deviation, SPREAD_FLOOR * deviation.mean()).astype(np.float32)
    changed = dataclasses.replace(model, mu=mean.astype(np.float32), spread=spread)
    # The model knew the results under the old map.
    return with_self_test(changed, **{key: value for key, value in options.items() if key in ("cache_dir", "threads")})


def _smoothing(
    model: ModelFile,
    one: Smoothing,
    scorer: Backend,
    prepared: list[NDArray[np.uint8]],
    rate: float,
    step: Callable[[], None],
) -> Smoothing:
    """With the medians of ``one.draws`` draws of every frame."""
    config = model.config
    votes = scorer.votes(one.config(config), one.weights(config.unet, model.weights), one.mu, one.inverse_spread, sigma=one.sigma)
    medians = np.empty(len(prepared))
    for i, image in enumerate(prepared):
        medians[i] = np.median(votes.scores(image, seed=i + 1, draws=one.draws))
        step()
    medians.sort()
    threshold = calibrate.conformal_threshold(medians, rate)
    return dataclasses.replace(one, calibration_scores=medians, false_alarm_rate=rate, threshold=threshold)


def _noise(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed


__all__ = ["frames_needed", "is_half", "recalibrate", "with_self_test"]
