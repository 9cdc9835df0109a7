"""What every backend is: a function of (frame, seed) to a score and a map, and what it says about itself."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from advrad_fast.config import DetectorConfig
from advrad_fast.errors import BackendUnavailableError, ConfigError, ImageError, InferenceError, ModelFileError, expected
from advrad_fast.gpu_frames import GpuFrame
from advrad_fast.philox import check_seed
from advrad_fast.untrusted import kind

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "fp16", "bf16", "int8", "fp8")

MAX_THREADS = 1024

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """What a backend returns for N images.

    Attributes:
        scores: float32 (N,), finite.
        maps: float32 (N, H, W), finite, or None where none were asked for.  A score is its map's maximum.
        timings: milliseconds over all N images spent on ``noise``, ``network`` and ``error``, or on ``device`` where a GPU
            does all of them in one piece.
    """

    scores: Array
    maps: Array | None
    timings: dict[str, float]


class Votes(Protocol):
    """The detector inside randomised smoothing at one sigma: it sees x + delta and nothing else.  Thread-safe.

    delta is lattice noise of :mod:`advrad_fast.lattice`, the same integers on every backend.
    """

    @property
    def batch(self) -> int:
        """Draws a call of the network: the number to ask for at a time."""

    def scores(self, image: NDArray[np.uint8], *, seed: int, draws: int, first_draw: int = 0) -> Array:
        """One score for each of the draws [first_draw, first_draw + draws) of ``seed``: a function of (image, seed, draw).

        Args:
            image: uint8 (H, W, C) of the configured size, prepared.

        Returns:
            float32 (draws,), finite.

        Raises:
            ImageError: the dtype or the shape is not the configured one.
            ConfigError: the seed or a number of draws is out of range.
            InferenceError: the engine failed or returned something not finite: a fault is no vote.
        """


class Backend(Protocol):
    """One device's pipeline for one detector.  Thread-safe: threads may share it."""

    @property
    def name(self) -> str:
        """One of :data:`advrad_fast.backends.BACKENDS`."""

    @property
    def precision(self) -> str:
        """What the network computes in: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``."""

    def score(self, images: NDArray[np.uint8], *, seed: int, want_maps: bool) -> Scores:
        """Score images.  An image's result depends on it and on ``seed``, never on its neighbours.

        Args:
            images: uint8 (N, H, W, C) of the configured size, any strides; N may be 0.
            seed: of the noise, in [0, 2**64).
            want_maps: also return the anomaly maps.

        Raises:
            ImageError: the dtype or the shape is not the configured one.
            ConfigError: the seed is out of range.
            InferenceError: the engine failed, or returned something not finite.
        """

    def score_in_place(self, frame: GpuFrame, *, seed: int, want_maps: bool) -> Scores | None:
        """Score a frame that lies on the backend's GPU, where it lies.

        Args:
            frame: read until this returns, and not afterwards.
            seed, want_maps: as for :meth:`score`.

        Returns:
            What :meth:`score` gives for the same pixels, bit for bit; None for a frame that has to be prepared first
            (:func:`advrad_fast.images.is_prepared`).

        Raises:
            ImageError: it is no valid frame, on another GPU, or the backend is none of a GPU.
            ConfigError, InferenceError: as for :meth:`score`.
        """

    def download(self, frame: GpuFrame) -> NDArray[np.uint8]:
        """uint8 (H, W, C), a copy on the host of a frame that lies on the backend's GPU.

        Raises:
            ImageError, InferenceError: as for :meth:`score_in_place`.
        """

    def votes(
        self, config: DetectorConfig, weights: Mapping[str, Array], mu: Array, inverse_spread: Array, *, sigma: float
    ) -> Votes:
        """The smoothed detector, on this device and with this backend's options.

        Args:
            config: with the score at ``sigma``; the timestep follows from ``sigma``.
            weights, mu, inverse_spread: at ``sigma``.
            sigma: of the noise, in [0, 1] pixel units.

        Raises:
            ConfigError, ModelFileError, BackendUnavailableError: as for the backend itself.
        """


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here.

    Attributes:
        name: one of :data:`advrad_fast.backends.BACKENDS`.
        usable: whether it can.
        detail: what would run (device, library and version, precision), or the reason why nothing would.
    """

    name: str
    usable: bool
    detail: str


def check_draws(
    config: DetectorConfig, image: NDArray[np.uint8], seed: int, draws: int, first_draw: int
) -> tuple[NDArray[np.uint8], int]:
    """What :meth:`Votes.scores` is given, checked: the image, C-contiguous (1, H, W, C), and the seed.

    Raises:
        ImageError, ConfigError: as there.
    """
    size = config.image
    shape = (size.height, size.width, size.channels)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != shape:
        raise ImageError(f"image: expected uint8 {shape}, got {kind(image)}")
    seed = check_seed(seed)
    for name, value in (("draws", draws), ("first_draw", first_draw)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= 2**31:
            raise ConfigError(expected(name, f"an integer in [0, {2**31}]", value))
    return np.ascontiguousarray(image[None]), seed


def check_scores(scores: Array) -> Array:
    """``scores`` if all are finite, or an InferenceError."""
    if not np.isfinite(scores).all():
        raise InferenceError(expected("scores", "finite numbers", scores[~np.isfinite(scores)][0]))
    return scores


@dataclass(frozen=True)
class Frame:
    """One image's result, before it is checked: its score, and the milliseconds of each of the backend's steps."""

    score: float
    timings: dict[str, float]


class FrameBackend(ABC):
    """A backend that runs images one at a time, each as one batch of ``draws``: so N and order cannot matter."""

    name: str
    precision: str
    steps: tuple[str, ...] = ("noise", "network", "error")

    def __init__(self, config: DetectorConfig, mu: Array, inverse_spread: Array) -> None:
        size = (config.image.height, config.image.width)
        for what, array in (("mu", mu), ("inverse_spread", inverse_spread)):
            if array.dtype != np.float32 or array.shape != size:
                raise ModelFileError(f"{what}: expected float32 {size}, got {array.dtype} {array.shape}")
        self._config = config

    @abstractmethod
    def _frame(self, image: NDArray[np.uint8], seed: int, maps: Array | None) -> Frame:
        """Score one C-contiguous image (1, H, W, C), and fill in its map (1, H, W) if there is one to fill in."""

    def votes(
        self, config: DetectorConfig, weights: Mapping[str, Array], mu: Array, inverse_spread: Array, *, sigma: float
    ) -> Votes:
        """See :meth:`Backend.votes`; here for backends without a smoothed detector."""
        raise BackendUnavailableError(f"certify: the {self.name} backend cannot yet; use backend='cpu'")

    def score(self, images: NDArray[np.uint8], *, seed: int, want_maps: bool) -> Scores:
        """See :meth:`Backend.score`."""
        seed = check_seed(seed)
        size = self._config.image
        shape = (size.height, size.width, size.channels)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise ImageError(f"images: expected uint8 (N, {', '.join(map(str, shape))}), got {kind(images)}")
        scores = np.empty(len(images), dtype=np.float32)
        maps = np.empty((len(images), *shape[:2]), dtype=np.float32) if want_maps else None
        timings = dict.fromkeys(self.steps, 0.0)
        for i in range(len(images)):
            only = None if maps is None else maps[i : i + 1]
            frame = self._frame(np.ascontiguousarray(images[i : i + 1]), seed, only)
            check_frame(f"images[{i}]", frame, only)
            scores[i] = frame.score
            for name in timings:
                timings[name] += frame.timings[name]
        return Scores(scores, maps, timings)

    def score_in_place(self, frame: GpuFrame, *, seed: int, want_maps: bool) -> Scores | None:
        """See :meth:`Backend.score_in_place`; here for backends that read the host's memory."""
        raise self._not_here(frame)

    def download(self, frame: GpuFrame) -> NDArray[np.uint8]:
        """See :meth:`Backend.download`."""
        raise self._not_here(frame)

    def _not_here(self, frame: GpuFrame) -> ImageError:
        wanted = f"an array in the host's memory for the {self.name} backend"
        advice = "copy it there (CuPy: cupy.asnumpy(frame), PyTorch: frame.cpu()), or load the detector with backend='cuda'"
        return ImageError(f"{expected('frame', wanted, str(frame))}; {advice}")


def check_frame(name: str, frame: Frame, maps: Array | None) -> None:
    """Raises an InferenceError unless the score and the map, if there is one, are finite."""
    if not np.isfinite(frame.score):
        raise InferenceError(expected(f"{name}: score", "a finite number", frame.score))
    if maps is not None and not np.isfinite(maps).all():
        raise InferenceError(f"{name}: expected a finite anomaly map, got {maps.size} values with NaN or infinity")


def check_threads(threads: object) -> int | None:
    """``threads`` as an int in [1, MAX_THREADS], or None for the library's own choice; else a ConfigError."""
    if threads is None:
        return None
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or not 1 <= threads <= MAX_THREADS:
        raise ConfigError(expected("threads", f"None or an integer in [1, {MAX_THREADS}]", threads))
    return int(threads)


def check_precision(precision: Any, known: tuple[str, ...] = PRECISIONS, whose: str = "") -> Precision:
    """``precision`` as one of ``known``, or a ConfigError; ``whose``: said in it."""
    if not isinstance(precision, str) or precision not in known:
        raise ConfigError(expected("precision", f"one of {list(known)}{whose}", precision))
    return precision  # type: ignore[return-value]


def milliseconds(start: float, end: float) -> float:
    """Between two readings of ``time.perf_counter``."""
    return (end - start) * 1e3


now = time.perf_counter
