"""What a model certifies with at one sigma: the smoothed detector's own score, normal map, threshold and folded statistics.

The detector inside randomised smoothing sees x + delta, at the timestep of sigma.  Its errors are others than an inspection's
there, so the score's settings, mu, spread and the threshold are that sigma's own.  A network without normalisation has the
batch statistics of its timestep folded into its convolutions (:mod:`advrad_fast.training.batchnorm`); at another timestep they
are others: one factor and one bias a channel.

Layout in the model file, for the i-th sigma:

- ``smoothing.<i>.mu`` and, if ``score.spread``, ``smoothing.<i>.spread``: float32 (H, W);
- ``smoothing.<i>.calibration_scores``: float64 or float32 (n,), sorted;
- ``smoothing.<i>.affine``, if ``config.unet.norm_groups`` is 0: float32 (2, channels of all :func:`folded`);
- in the document's list ``smoothing``: ``{"sigma", "score", "draws", "false_alarm_rate", "threshold"}``, and ``"radius"`` and
  ``"alpha"`` where the threshold is for a radius.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advrad_fast import schedule
from advrad_fast.calibrate import conformal_threshold
from advrad_fast.certify import vote_probability
from advrad_fast.config import DetectorConfig, ScoreConfig, UNetConfig
from advrad_fast.errors import ConfigError
from advrad_fast.graph import expected_tensors
from advrad_fast.lattice import check_sigma
from advrad_fast.untrusted import (
    clip,
    dump,
    float32,
    inverse,
    number,
    parse,
    refuse,
    same_names,
    share,
    sorted_scores,
    spread_map,
)

MAX_DRAWS = 1 << 16  #: most draws that a median is taken of

_FIELDS = ("sigma", "score", "draws", "false_alarm_rate", "threshold")
_AT_RADIUS = ("radius", "alpha")

Weights = Mapping[str, NDArray[np.float32]]


def folded(config: UNetConfig) -> dict[str, int]:
    """The convolutions with batch statistics folded into them, in the order of their tensors: name -> output channels."""
    if config.norm_groups:
        return {}
    shapes = expected_tensors(config).items()
    return {name.removesuffix(".weight"): shape[0] for name, shape in shapes if name.endswith((".conv1.weight", ".conv2.weight"))}


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Settings and numbers of the smoothed detector at one sigma; a :class:`advrad_fast.model.ModelFile` validates them.

    The smoothed decision is DEFECT where P[A(x + delta) > threshold] > 1/2, that is where the median of A(x + delta) is above the
    threshold.  So the threshold is conformal (:mod:`advrad_fast.calibrate`) over the medians of ``draws`` draws of held-out
    normals.  What it promises is about such a median of a new normal; the true median differs by what ``draws`` draws leave.

    A normal whose median is just below that threshold is certified at no radius.  Where normals are to be *certified* OK at a
    radius, each calibration score is the least threshold at which a normal is
    (:func:`advrad_fast.certify.least_ok_threshold` of its ``draws`` draws), and the threshold is conformal over those: of new
    normals at most ``false_alarm_rate`` are not certified OK at ``radius`` and ``alpha`` with ``draws`` votes or more.

    Attributes:
        sigma: of delta, in [0, 1] pixel units.
        score: how the error between x + delta and its reconstruction becomes A.
        mu: float32 (H, W), over normals under this noise.
        spread: float32 (H, W), above 0; None iff not ``score.spread``.
        calibration_scores: float64 (n,), n >= 1, rising: the medians, or the least thresholds.
        draws: how many draws each is of; odd for medians.
        false_alarm_rate: in (0, 1), the target that ``threshold`` stands for.
        threshold: a vote is DEFECT where A is above it.
        affine: float32 (2, channels): a factor for the weights and the bias of every output channel of :func:`folded`; None
            where no statistics are folded.
        radius: l2, in [0, 1] pixel units, at which normals are to be certified OK; 0 for medians.
        alpha: of those certificates; 0 for medians.
    """

    sigma: float
    score: ScoreConfig
    mu: NDArray[np.float32]
    spread: NDArray[np.float32] | None
    calibration_scores: NDArray[np.float64]
    draws: int
    false_alarm_rate: float
    threshold: float
    affine: NDArray[np.float32] | None = None
    radius: float = 0.0
    alpha: float = 0.0

    @cached_property
    def inverse_spread(self) -> NDArray[np.float32]:
        """float32 (H, W): 1 / spread, or ones."""
        return inverse(self.mu, self.spread)

    def config(self, config: DetectorConfig) -> DetectorConfig:
        """The model's configuration, with the timestep and the score of this sigma."""
        timestep = schedule.timestep_for_sigma(config.diffusion, self.sigma)
        return dataclasses.replace(
            config, diffusion=dataclasses.replace(config.diffusion, timestep=timestep, draws=1), score=self.score
        )

    def weights(self, config: UNetConfig, weights: Weights) -> dict[str, NDArray[np.float32]]:
        """The network's weights at this sigma, from the model's: float32 throughout."""
        changed = dict(weights)
        if self.affine is not None:
            at = 0
            for name, channels in folded(config).items():
                factor, bias = self.affine[:, at : at + channels]
                changed[f"{name}.weight"] = weights[f"{name}.weight"] * factor[:, None, None, None]
                changed[f"{name}.bias"] = np.array(bias)
                at += channels
        return changed

    def with_false_alarm_rate(self, rate: float) -> Smoothing:
        """A copy with the conformal threshold for another target in (0, 1).

        Raises:
            CalibrationError: too few calibration scores for this rate.
            ConfigError: ``rate`` is not in (0, 1).
        """
        return dataclasses.replace(self, threshold=conformal_threshold(self.calibration_scores, rate), false_alarm_rate=rate)

    def checked(self, name: str, config: DetectorConfig) -> Smoothing:
        """A validated copy, its arrays read-only; ``name`` is what messages call it.

        Raises:
            ModelFileError: a field is inconsistent with ``config`` or out of range.
        """
        if not isinstance(self.score, ScoreConfig):
            refuse(f"{name}.score", "a ScoreConfig", self.score)
        score = _score(f"{name}.score", parse(f"{name}.score", dump(self.score.to_json()).encode()))
        size = (config.image.height, config.image.width)
        draws = self.draws
        sigma = _sigma(f"{name}.sigma", self.sigma, config)
        radius, alpha = number(f"{name}.radius", self.radius), number(f"{name}.alpha", self.alpha)
        if radius or alpha:
            try:
                vote_probability(radius, sigma, pixels=size[0] * size[1] * config.image.channels)
            except ConfigError as error:
                refuse(f"{name}.radius", f"one that can be certified at sigma {sigma:g}", clip(str(error)))
            if radius == 0.0:
                refuse(f"{name}.radius", "above 0, as there is an alpha", radius)
            share(f"{name}.alpha", alpha)
        if isinstance(draws, bool) or not isinstance(draws, int) or not 1 <= draws <= MAX_DRAWS or not (draws % 2 or radius):
            refuse(f"{name}.draws", f"an {'' if radius else 'odd '}integer in [1, {MAX_DRAWS}]", draws)
        channels = sum(folded(config.unet).values())
        affine = self.affine
        if channels:
            affine = float32(f"{name}.affine", affine, (2, channels))
            with np.errstate(over="ignore"):
                largest = float(np.abs(affine[0]).max())
            if largest > 1e6:
                refuse(f"{name}.affine", "factors up to 1e6", largest)
        elif affine is not None:
            refuse(f"{name}.affine", "None, as the network has a normalisation of its own", "an array")
        return Smoothing(
            sigma=sigma,
            score=score,
            mu=float32(f"{name}.mu", self.mu, size),
            spread=spread_map(f"{name}.spread", self.spread, size, used=score.spread),
            calibration_scores=sorted_scores(f"{name}.calibration_scores", self.calibration_scores),
            draws=draws,
            false_alarm_rate=share(f"{name}.false_alarm_rate", self.false_alarm_rate),
            threshold=number(f"{name}.threshold", self.threshold),
            affine=affine,
            radius=radius,
            alpha=alpha,
        )

    def document(self) -> dict[str, Any]:
        """What the JSON document holds of it."""
        return {
            "sigma": self.sigma,
            "score": self.score.to_json(),
            "draws": self.draws,
            "false_alarm_rate": self.false_alarm_rate,
            "threshold": self.threshold,
            **({"radius": self.radius, "alpha": self.alpha} if self.radius else {}),
        }

    def tensors(self, index: int) -> dict[str, NDArray[Any]]:
        """Its tensors under their names in the file."""
        found = {"mu": self.mu, "spread": self.spread, "calibration_scores": self.calibration_scores, "affine": self.affine}
        return {f"{_prefix(index)}{name}": array for name, array in found.items() if array is not None}


@dataclass(frozen=True)
class Outline:
    """One entry of an untrusted document, checked, before its tensors are read."""

    index: int
    score: ScoreConfig
    entry: dict[str, Any]
    shapes: dict[str, tuple[int, ...] | None]  #: of the tensors in the file; None for scores, (n,)

    def build(self, tensors: Mapping[str, NDArray[Any]]) -> Smoothing:
        """From tensors of :attr:`shapes`; still to be checked by value."""
        prefix = _prefix(self.index)
        return Smoothing(
            sigma=self.entry["sigma"],
            score=self.score,
            mu=tensors[f"{prefix}mu"],
            spread=tensors.get(f"{prefix}spread"),
            calibration_scores=tensors[f"{prefix}calibration_scores"],
            draws=self.entry["draws"],
            false_alarm_rate=self.entry["false_alarm_rate"],
            threshold=self.entry["threshold"],
            affine=tensors.get(f"{prefix}affine"),
            radius=self.entry.get("radius", 0.0),
            alpha=self.entry.get("alpha", 0.0),
        )


def outline(index: int, entry: object, config: DetectorConfig) -> Outline:
    """The ``index``-th entry of the document's list.

    Raises:
        ModelFileError: it is no object with exactly the fields, or its score's settings are out of range.
    """
    name = f"smoothing[{index}]"
    if not isinstance(entry, dict):
        refuse(name, "an object", entry)
    same_names(name, (*_FIELDS, *_AT_RADIUS) if "radius" in entry else _FIELDS, entry)
    score = _score(f"{name}.score", entry["score"])
    prefix, size = _prefix(index), (config.image.height, config.image.width)
    shapes: dict[str, tuple[int, ...] | None] = {f"{prefix}mu": size, f"{prefix}calibration_scores": None}
    if score.spread:
        shapes[f"{prefix}spread"] = size
    if channels := sum(folded(config.unet).values()):
        shapes[f"{prefix}affine"] = (2, channels)
    return Outline(index, score, entry, shapes)


def _prefix(index: int) -> str:
    return f"smoothing.{index}."


def _score(name: str, value: object) -> ScoreConfig:
    try:
        return ScoreConfig.from_json(value, name)
    except ConfigError as error:
        refuse(name, "a score's settings", clip(str(error)))


def _sigma(name: str, value: object, config: DetectorConfig) -> float:
    try:
        sigma = check_sigma(value)
        schedule.timestep_for_sigma(config.diffusion, sigma)
    except ConfigError as error:
        refuse(name, "a sigma within the lattice's and the schedule's range", clip(str(error)))
    return sigma
