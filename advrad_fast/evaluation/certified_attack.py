"""Certificates put to the test: attack each certified image within its radius, and look whether the decision holds.

A certificate may be false with probability alpha, and a decision that flipped shows it; none that flipped is no proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advrad_fast import images
from advrad_fast.certify import Certificate, lower_bound
from advrad_fast.detector import Detector
from advrad_fast.errors import ConfigError, expected


@dataclass(frozen=True)
class CertifiedAttack:
    """One certified image under attack.

    Attributes:
        outcome: the certified decision.
        radius: that was certified, l2 in [0, 1] units.
        distance: of the attacked uint8 image: below ``factor`` times the radius.
        share: of fresh votes for DEFECT at the attacked image.
        flipped: the smoothed decision there is another one, with confidence 1 - alpha.
    """

    outcome: str
    radius: float
    distance: float
    share: float
    flipped: bool


def attack_certified(
    detector: Detector,
    frames: Sequence[NDArray[np.uint8]],
    certificates: Sequence[Certificate],
    *,
    steps: int = 200,
    eot: int = 8,
    votes: int = 1000,
    alpha: float = 0.001,
    factor: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> list[CertifiedAttack]:
    """Attack each frame just below its certified radius, and estimate the smoothed decision there with fresh draws.

    A flip is counted where Clopper and Pearson's lower bound, at ``alpha``, of the probability of the *other* vote is above 1/2.

    Args:
        detector: of a model that neither aligns nor brightens (or of :func:`advrad_fast.evaluation.robust.prepared_model`, with
            prepared frames): the certificate is about the prepared image.
        frames: one for each certificate; those that ABSTAIN are left out.
        steps, eot: as :func:`advrad_fast.evaluation.attacks.smoothed.attack_smoothed` has them.
        votes: fresh draws at the attacked image, from the operating system's randomness.
        factor: of the radius, above 0.  Above 1 the attack goes further than the certificate, which shows what it can flip.

    Returns:
        One result for each certificate with a radius above 0 that a uint8 image other than the original lies within.

    Raises:
        ConfigError: the numbers of frames and certificates differ, the factor is not above 0, or the model aligns or brightens.
    """
    from advrad_fast.evaluation.attacks.pipeline import generator
    from advrad_fast.evaluation.attacks.smoothed import SmoothedPipeline, attack_smoothed

    if len(frames) != len(certificates):
        raise ConfigError(expected("certificates", f"{len(frames)}, one a frame", len(certificates)))
    if not 0.0 < factor < math.inf:
        raise ConfigError(expected("factor", "a finite number above 0", factor))
    config = detector.model.config.image
    if config.pose is not None or config.brightness is not None:
        raise ConfigError("detector: expected one that neither aligns nor brightens, got one that does; use prepared_model()")
    pipelines: dict[float, SmoothedPipeline] = {}
    results = []
    for index, (frame, certificate) in enumerate(zip(frames, certificates, strict=True)):
        radius = factor * math.nextafter(certificate.radius, 0.0) * (1.0 - 1e-6)  # the statement is about smaller norms
        if certificate.outcome == "ABSTAIN" or radius < 1.0 / 255.0:
            continue
        sigma = certificate.sigma
        if sigma not in pipelines:
            pipelines[sigma] = SmoothedPipeline(detector.model, sigma, device=device)
        image = images.prepare(frame, config).image
        label = int(certificate.outcome == "DEFECT")
        found = attack_smoothed(
            pipelines[sigma], image[None], [label], radius, certificate.threshold,
            generators=[generator(seed, "certified", index)], steps=steps, eot=eot,
        )  # fmt: skip
        attacked = found.rounded[0]
        scores = detector.smoothed_scores(attacked, votes, sigma=sigma)
        defects = int((scores > certificate.threshold).sum())
        other = votes - defects if label else defects
        results.append(
            CertifiedAttack(
                outcome=certificate.outcome,
                radius=certificate.radius,
                distance=float(np.sqrt(np.square(attacked.astype(np.float64) - image).sum()) / 255.0),
                share=defects / votes,
                flipped=float(lower_bound(other, votes, alpha)) > 0.5,
            )
        )
    return results
