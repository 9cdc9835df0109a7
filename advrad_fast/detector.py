"""The detector: what people embed.

>>> detector = Detector.load("bottle.safetensors")
>>> inspection = detector.inspect(frame)              # uint8 (H, W, 3), straight from the camera
>>> if inspection.outcome is not Outcome.OK:
...     reject(part)
>>> detector.certify(frame, radius=0.2)               # the same, and how far nobody can push the answer
"""

from __future__ import annotations

import logging
import math
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from os import PathLike
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import backends, calibrate, gpu_frames, images, philox, selftest, tiles, voting
from advrad_fast.backends import Votes
from advrad_fast.backends.checked import checked_score, float32_below
from advrad_fast.certify import Certificate, DecisionTest
from advrad_fast.checks import finite, several, truth
from advrad_fast.errors import AdvRADError, ConfigError, ImageError, InferenceError, PartNotFoundError, expected
from advrad_fast.model import ModelFile
from advrad_fast.roi import Roi, fitting, warn_of_another
from advrad_fast.smoothing import Smoothing
from advrad_fast.voting import OnVotes

_log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What an inspection says.  Only ``OK`` means a good part."""

    OK = "OK"
    DEFECT = "DEFECT"
    ABSTAIN = "ABSTAIN"  #: no statement can be made: the part was not found
    ERROR = "ERROR"  #: the frame could not be inspected


@dataclass(frozen=True)
class Inspection:
    """One frame's result.

    Attributes:
        outcome: OK, DEFECT, ABSTAIN or ERROR.
        score: the anomaly score, the maximum of the anomaly map; None without one (ABSTAIN, ERROR).
        threshold: the threshold it was held against: ``score > threshold`` is a DEFECT.
        p_value: share of normal parts that would score at least as high, a conformal p-value in (0, 1].
        anomaly_map: float32 (H, W) at the frame's size, in the score's units, 0 where the model does not look; None
            if not asked for.
        mask: bool (H, W), where the map is above the threshold; None if no map was asked for.
        backend: which backend computed it.
        timings: milliseconds a stage: prepare, noise, network, error, total; ``device`` for the middle three on a GPU.
        error: why there is no score (ABSTAIN, ERROR).
    """

    outcome: Outcome
    score: float | None
    threshold: float
    p_value: float | None
    anomaly_map: NDArray[np.float32] | None = field(repr=False)
    mask: NDArray[np.bool_] | None = field(repr=False)
    backend: str
    timings: Mapping[str, float] = field(repr=False)
    error: AdvRADError | None = None


class Detector:
    """Scores frames against a model of good parts.  Thread-safe: share one among threads.

    A result is a function of the frame and the seed, not of batch, order or thread.  Processes load their own: spawned, or forked
    before OpenVINO was loaded; in a child forked later, :meth:`inspect` raises InferenceError where OpenVINO would hang.

    A model with ``tiling`` inspects a frame in tiles, at the frame's own resolution, and blends their maps into one: all else is
    the same.  :mod:`advrad_fast.tiling` makes such models.

    Args:
        model: a model file's contents.
        backend: ``auto``, ``cpu``, ``cuda`` or ``reference``.
        seed: of the noise, in [0, 2**64).  None draws a fresh one from the operating system for every frame, so that
            nobody can prepare a part or an image for the noise to come.
        roi: where frames are looked at: a :class:`advrad_fast.roi.Roi`, or a bool array (H, W) of their size; None for
            everywhere.  Outside, nothing counts in the score and the map is 0: scores can only be lower, so the rate holds.
        self_test: run :meth:`self_test` now.
        options: the backend's own (:func:`advrad_fast.backends.create`).

    Raises:
        BackendUnavailableError: the backend can't be had here; the message has each one's reason.
        ConfigError: ``seed`` or ``roi`` is out of range, or the region is empty or does not fit the model.
        SelfTestError, InferenceError: the self-test failed.
    """

    def __init__(
        self,
        model: ModelFile,
        *,
        backend: str = "auto",
        seed: int | None = 0,
        roi: Roi | NDArray[np.bool_] | None = None,
        self_test: bool = True,
        **options: Any,
    ) -> None:
        self._model, self._roi = model, fitting(roi, model)
        warn_of_another(self._roi, model)
        self._seed = None if seed is None else philox.check_seed(seed)
        self._by_position = model.tiling is not None and model.tiling.frame is not None
        mu, inverse_spread = model.network_maps
        self._backend = backends.create(backend, model.config, model.weights, mu, inverse_spread, **options)
        self._threshold = model.threshold
        self._smoothed: dict[float, Votes] = {}
        self._building = threading.Lock()
        if self_test:
            self.self_test()

    @classmethod
    def load(cls, path: str | PathLike[str], *, backend: str = "auto", seed: int | None = 0, **options: Any) -> Detector:
        """The detector in a model file.

        Raises:
            ModelFileError: the file is damaged, foreign or inconsistent.
            BackendUnavailableError, InferenceError: as for the constructor.
        """
        return cls(ModelFile.load(path), backend=backend, seed=seed, **options)

    @property
    def model(self) -> ModelFile:
        """The model file's contents."""
        return self._model

    @property
    def backend(self) -> str:
        """The backend that runs, and its precision: for example ``cpu (bf16)``."""
        return f"{self._backend.name} ({self._backend.precision})"

    @property
    def threshold(self) -> float:
        """``score > threshold`` is a DEFECT.  Can be set to any finite number."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = finite("threshold", value)

    @property
    def false_alarm_rate(self) -> float:
        """The bound on the false-alarm rate at the present threshold: the p-value of a score just above it."""
        above = np.nextafter(np.array([self._threshold]), sys.float_info.max)
        return float(calibrate.p_value(self._model.calibration_scores, above)[0])

    @false_alarm_rate.setter
    def false_alarm_rate(self, rate: float) -> None:
        """Set the threshold to the least that holds this rate.

        Raises:
            CalibrationError: the model has too few calibration scores for it.
        """
        self._threshold = calibrate.conformal_threshold(self._model.calibration_scores, rate)

    def inspect(self, frame: object, *, maps: bool = True, seed: int | None = None) -> Inspection:
        """Inspect one frame.

        Args:
            frame: an array or a PIL image (:func:`advrad_fast.images.check_frame`); for ``cuda`` also a uint8 array on the GPU
                (:mod:`advrad_fast.gpu_frames`).  That is read where it lies if the model takes it as it is
                (:func:`advrad_fast.images.is_prepared`: it has the network's size and channels, and neither pose nor brightness
                is set); else it is copied to the host once, prepared there, and goes the usual way.
            maps: also compute the anomaly map and mask.
            seed: instead of the detector's.

        Returns:
            OK or DEFECT, or ABSTAIN where the model aligns the part first and finds none, or none in the region.

        Raises:
            ImageError: the frame breaks the input contract, is not of the region's size, or lies on a GPU and the backend is not
                ``cuda`` on that one.
            InferenceError: the engine failed, memory ran out, or what came back is no result: not finite, of another shape, or
                a score that is not its map's maximum.
            ConfigError: ``maps`` or ``seed`` is out of range.
        """
        start = time.perf_counter()
        inspect = self._inspect if self._model.tiling is None else self._inspect_tiles
        try:
            return inspect(frame, truth("maps", maps), self._draw_seed(seed), start)
        except MemoryError as error:
            raise InferenceError("out of memory") from error

    def _inspect(self, frame: object, maps: bool, seed: int, start: float) -> Inspection:
        threshold = self._threshold  # read once: another thread may set it
        on_gpu = gpu_frames.find(frame)
        prepare, prepared, counted, roi = 0.0, None, None, self._roi
        wanted = maps or roi is not None
        image = self._model.config.image
        size = (image.height, image.width)
        result = None
        if on_gpu is not None and (roi is None or roi.mask.shape == size):
            result = self._backend.score_in_place(on_gpu, seed=seed, want_maps=wanted)
            counted = None if roi is None else roi.mask  # what is read in place is neither resized nor aligned
        if result is None:
            try:
                prepared = self._prepared(frame, on_gpu)
                counted = None if roi is None else roi.on_image(prepared)
            except PartNotFoundError as error:
                return self._failed(Outcome.ABSTAIN, error, start)
            prepare = _ms(start)
            result = self._backend.score(prepared.image[None], seed=seed, want_maps=wanted)
        score = checked_score(result, size, wanted)
        anomaly_map = mask = None
        if wanted and result.maps is not None:
            anomaly_map, mask = result.maps[0], result.maps[0] > float32_below(threshold)
            if counted is not None:
                anomaly_map, mask = np.where(counted, anomaly_map, np.float32(0.0)), mask & counted
                score = float(anomaly_map.max())
            if prepared is not None and maps:  # else the frame is the network's image
                anomaly_map = images.map_to_frame(anomaly_map, prepared, counted)
                mask = images.mask_to_frame(mask, prepared)
                if roi is not None:
                    inside = roi.on_frame(prepared)
                    anomaly_map, mask = np.where(inside, anomaly_map, np.float32(0.0)), mask & inside
        if not maps:
            anomaly_map = mask = None
        return self._judged(score, threshold, anomaly_map, mask, {"prepare": prepare, **result.timings}, start)

    def _inspect_tiles(self, frame: object, maps: bool, seed: int, start: float) -> Inspection:
        config, tiling = self._model.config.image, self._model.tiling
        if tiling is None:
            raise ConfigError(expected("model", "one with tiling", tiling))
        whole = images.prepare_whole(self._on_host(frame, gpu_frames.find(frame)), config)
        if tiling.frame is not None and whole.shape[:2] != tiling.frame:
            raise ImageError(expected("frame", f"one of the size that the model was made for, {tiling.frame}", whole.shape[:2]))
        region = None if self._roi is None else self._roi.mask
        if self._roi is not None:
            self._roi.check_frame(whole.shape[:2])
        timings = {"prepare": _ms(start)}
        threshold = self._threshold  # read once: another thread may set it
        size = (config.height, config.width)

        def run(tile: NDArray[np.uint8], index: int) -> NDArray[np.float32]:
            result = self._backend.score(tile[None], seed=tiles.tile_seed(seed, index), want_maps=True)
            checked_score(result, size, want_maps=True)
            if result.maps is None:
                raise InferenceError(expected("maps", f"a float32 array {(1, *size)}", None))
            for name, value in result.timings.items():
                timings[name] = timings.get(name, 0.0) + value
            values: NDArray[np.float32] = result.maps[0]
            return values

        anomaly_map = tiles.blend(whole, size, tiling.overlap, run, region)
        if self._by_position:
            anomaly_map -= self._model.mu
            np.abs(anomaly_map, out=anomaly_map)
            anomaly_map *= self._model.inverse_spread
        if region is not None:
            anomaly_map[~region] = 0.0
        score = float(anomaly_map.max())
        if not math.isfinite(score):
            raise InferenceError(expected("score", "a finite number", score))
        mask = anomaly_map > float32_below(threshold) if maps else None
        if mask is not None and region is not None:
            mask &= region
        return self._judged(score, threshold, anomaly_map if maps else None, mask, timings, start)

    def _judged(
        self,
        score: float,
        threshold: float,
        anomaly_map: NDArray[np.float32] | None,
        mask: NDArray[np.bool_] | None,
        timings: Mapping[str, float],
        start: float,
    ) -> Inspection:
        return Inspection(
            outcome=Outcome.DEFECT if score > threshold else Outcome.OK,
            score=score,
            threshold=threshold,
            p_value=calibrate.checked_p_value(self._model.calibration_scores, score),
            anomaly_map=anomaly_map,
            mask=mask,
            backend=self.backend,
            timings=MappingProxyType({**timings, "total": _ms(start)}),
        )

    def inspect_batch(self, frames: Iterable[object], *, maps: bool = True, seed: int | None = None) -> list[Inspection]:
        """Inspect frames; a bad one becomes an ERROR in its place, and the others keep their results.

        Each result equals :meth:`inspect`'s of the same frame and seed.

        Raises:
            ImageError: ``frames`` is not iterable.
            ConfigError: as :meth:`inspect`.
        """
        if not several(frames):
            raise ImageError(expected("frames", "an iterable of frames", type(frames)))
        results: list[Inspection] = []
        for frame in frames:
            start = time.perf_counter()
            try:
                results.append(self.inspect(frame, maps=maps, seed=seed))
            except (ImageError, InferenceError) as error:
                _log.warning("frame %d: %s", len(results), error)
                results.append(self._failed(Outcome.ERROR, error, start))
        return results

    def self_test(self) -> selftest.SelfTest | None:
        """Look at the frames whose results the model knows (:mod:`advrad_fast.selftest`); this also warms everything up.

        It sees a model, an engine or a machine that is damaged, as far as that changes results by more than the precision does.
        It does not see the networks that :meth:`certify` builds, nor normal maps by position.

        Returns:
            by how much the results were off; None where the model knows none (schemas 1 to 3): nothing was tested.

        Raises:
            SelfTestError: a result is off by more than the bound of the precision.
            InferenceError: the engine failed, or what came back is no result.
        """
        known = self._model.self_test
        if known is None:
            _log.info("no self-test: the model has no frames with known results")
            return None
        frames = selftest.frames(self._model.config.image)
        scores, maps = np.empty(len(frames), dtype=np.float32), np.empty(frames.shape[:3], dtype=np.float32)
        for i, frame in enumerate(frames):
            for want_maps in (False, True):  # both ways that a frame can go
                result = self._backend.score(frame[None], seed=selftest.SEED, want_maps=want_maps)
                score = checked_score(result, frame.shape[:2], want_maps)
                if not want_maps:
                    scores[i] = score
                elif result.maps is not None:
                    maps[i] = result.maps[0]
        return selftest.compare(known, scores, maps, self._backend.precision)

    def certify(
        self,
        frame: object,
        radius: float | None = None,
        *,
        sigma: float | None = None,
        alpha: float = 0.001,
        max_votes: int = 10_000,
        seed: int | None = None,
        threshold: float | None = None,
        on_votes: OnVotes | None = None,
    ) -> Certificate:
        """Certify the smoothed detector's decision for one frame (docs/certificates.md says what that means).

        Votes are drawn in the backend's batches and counted one by one, in order, to the one that settles the question: the
        rest of that batch is thrown away, so that the result is a function of (frame, seed) and the arguments alone.
        A KeyboardInterrupt is served between batches and leaves the detector as it was.

        Args:
            frame: as for :meth:`inspect`; one on the GPU is copied to the host once.
            radius: l2 over all pixels and channels of the prepared image, each in [0, 1].  Which decision, if any, is robust
                at it?  Stops as soon as that is settled, either way.  None: the largest radius that ``max_votes`` votes
                certify, for which all of them are drawn.
            sigma: one of ``model.sigmas``.  None: the smallest from which ``radius`` can be certified with ``max_votes`` votes,
                or the largest if none can; without a radius, the smallest.
            alpha: the statement is false with at most this probability, over the noise.
            max_votes: undecided after so many is ABSTAIN; in [1, 1,000,000].
            seed: None for a fresh one from the operating system, whatever the detector's: the confidence is over
                noise that the frame was not chosen against.
            threshold: a score of the noised image above it is a vote for DEFECT; None for the model's at this sigma.
            on_votes: called after every batch with the votes so far and how many are for DEFECT.

        Returns:
            OK, DEFECT, or ABSTAIN: nothing is certified.  ABSTAIN with 0 votes where the model aligns the part first and finds
            none.

        Raises:
            ImageError: the frame breaks the input contract.
            ConfigError: an argument is out of range, or the model has no such sigma, or none at all.
            InferenceError: the engine failed, memory ran out, or something not finite came back: a fault is no vote.
            BackendUnavailableError: the network cannot be compiled at this sigma.
        """
        max_votes = voting.check_votes("max_votes", max_votes)
        smoothing = self._smoothing(radius, sigma, alpha, max_votes)
        threshold = smoothing.threshold if threshold is None else finite("threshold", threshold)
        test = None if radius is None else DecisionTest(radius, smoothing.sigma, alpha, pixels=self._pixels)
        noise_seed = secrets.randbits(64) if seed is None else philox.check_seed(seed)
        try:
            batches = self._batches(frame, smoothing, noise_seed, threshold, max_votes, on_votes)
            aligned = self._model.config.image.pose is not None
            if test is None:
                return voting.largest_radius(smoothing.sigma, alpha, batches, threshold, pixels=self._pixels, aligned=aligned)
            return voting.at_radius(test, batches, threshold, aligned=aligned)
        except MemoryError as error:
            raise InferenceError("out of memory") from error

    def _batches(
        self, frame: object, smoothing: Smoothing, seed: int, threshold: float, max_votes: int, on_votes: OnVotes | None
    ) -> Iterator[NDArray[np.bool_]]:
        """A frame's votes as they are drawn; none where its part is not found."""
        try:
            image = self._prepared(frame, gpu_frames.find(frame)).image
        except PartNotFoundError as error:
            _log.info("not certified: %s", error)
            return iter(())
        votes = self._votes(smoothing)

        def draw(first: int, count: int) -> NDArray[np.float32]:
            return votes.scores(image, seed=seed, draws=count, first_draw=first)

        return voting.batches(draw, votes.batch, threshold, max_votes, on_votes)

    def smoothed_scores(
        self, frame: object, draws: int, *, sigma: float | None = None, seed: int | None = None
    ) -> NDArray[np.float32]:
        """Scores A(x + delta) of one frame: what :mod:`advrad_fast.certify` turns into certified scores and AUROC.

        Args:
            draws: how many, in [1, 1,000,000].
            sigma: one of ``model.sigmas``; None for the only or the smallest one.
            seed: None for a fresh one from the operating system.

        Returns:
            float32 (draws,), finite, independent draws.

        Raises:
            ImageError: as :meth:`inspect`; PartNotFoundError where the model aligns the part first and finds none.
            ConfigError, InferenceError, BackendUnavailableError: as :meth:`certify`.
        """
        draws = voting.check_votes("draws", draws)
        smoothing = self._smoothing(None, sigma, 0.001, draws)
        noise_seed = secrets.randbits(64) if seed is None else philox.check_seed(seed)
        try:
            image = self._prepared(frame, gpu_frames.find(frame)).image
            return self._votes(smoothing).scores(image, seed=noise_seed, draws=draws)
        except MemoryError as error:
            raise InferenceError("out of memory") from error

    def _prepared(self, frame: object, on_gpu: gpu_frames.GpuFrame | None) -> images.Prepared:
        """On the host; a frame on a GPU is copied there."""
        return images.prepare(self._on_host(frame, on_gpu), self._model.config.image)

    def _on_host(self, frame: object, on_gpu: gpu_frames.GpuFrame | None) -> object:
        return frame if on_gpu is None else self._backend.download(on_gpu)

    @property
    def _pixels(self) -> int:
        size = self._model.config.image
        return size.height * size.width * size.channels

    def _smoothing(self, radius: float | None, sigma: float | None, alpha: float, max_votes: int) -> Smoothing:
        model = self._model
        if self._roi is not None:
            raise ConfigError("certify: expected a detector without a region of interest: its votes are of whole images")
        if model.tiling is not None:
            raise ConfigError("certify: expected a model that inspects whole frames, got one that inspects tiles")
        if not model.smoothing:
            raise ConfigError("certify: expected a model that has a sigma to certify at; `advrad-fast certify --fit` adds one")
        if sigma is not None:
            if finite("sigma", sigma) not in model.sigmas:
                raise ConfigError(expected("sigma", f"one of the model's {list(model.sigmas)}", sigma))
            return model.smoothing[model.sigmas.index(sigma)]
        if radius is None:
            return model.smoothing[0]
        for smoothing in model.smoothing:
            if voting.least_votes(radius, smoothing.sigma, alpha, pixels=self._pixels, max_votes=max_votes) is not None:
                return smoothing
        return model.smoothing[-1]

    def _votes(self, smoothing: Smoothing) -> Votes:
        """Built when it is first needed."""
        with self._building:
            votes = self._smoothed.get(smoothing.sigma)
            if votes is None:
                config = self._model.config
                votes = self._smoothed[smoothing.sigma] = self._backend.votes(
                    smoothing.config(config),
                    smoothing.weights(config.unet, self._model.weights),
                    smoothing.mu,
                    smoothing.inverse_spread,
                    sigma=smoothing.sigma,
                )
            return votes

    def _draw_seed(self, seed: int | None) -> int:
        if seed is not None:
            return philox.check_seed(seed)
        return secrets.randbits(64) if self._seed is None else self._seed

    def _failed(self, outcome: Outcome, error: AdvRADError, start: float) -> Inspection:
        timings = MappingProxyType({"total": _ms(start)})
        return Inspection(outcome, None, self._threshold, None, None, None, self.backend, timings, error)


def _ms(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
