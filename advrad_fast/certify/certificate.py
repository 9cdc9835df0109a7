"""What is claimed, and the rule for a number of votes fixed beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from advrad_fast.certify.bounds import check_counts, lower_bound, radius, split_alpha, vote_probability
from advrad_fast.checks import finite, integer, share
from advrad_fast.errors import ConfigError, expected
from advrad_fast.lattice import check_sigma

OUTCOMES = ("OK", "DEFECT", "ABSTAIN")
METHODS = ("anytime", "fixed")


@dataclass(frozen=True)
class Certificate:
    """A statement about one prepared image: the uint8 image that the network's noise is added to.

    With confidence 1 - ``alpha`` over the noise, the smoothed detector says ``outcome`` for this image and for every other that
    differs from it by less than ``radius``.  That is about the image *after* resizing, and after the part has been laid level if
    ``aligned``: what a change of the camera's frame does to the prepared image is not covered.

    Raises:
        ConfigError: a field is out of range, or the fields contradict one another.
    """

    outcome: str  #: OK, DEFECT, or ABSTAIN: nothing is certified
    radius: float  #: l2 over all pixels and channels, each in [0, 1]; 0 for ABSTAIN
    votes: int  #: draws of noise that it took
    p_lower: float  #: lower bound of the probability of a vote for ``outcome`` (ABSTAIN: of the more frequent vote)
    sigma: float  #: of the noise, in [0, 1] pixel units
    alpha: float  #: P[the statement is false] is at most this
    threshold: float  #: a vote is DEFECT where the noised image's score is above it
    method: str  #: ``anytime``: stopped once settled; ``fixed``: Clopper-Pearson, the number of votes set beforehand
    aligned: bool = False  #: whether the prepared image is one whose part has been laid level

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        share("alpha", self.alpha)
        if not isinstance(self.outcome, str) or self.outcome not in OUTCOMES:
            raise ConfigError(expected("outcome", f"one of {', '.join(OUTCOMES)}", self.outcome))
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ConfigError(expected("method", f"one of {', '.join(METHODS)}", self.method))
        if not isinstance(self.aligned, bool):
            raise ConfigError(expected("aligned", "True or False", self.aligned))
        if isinstance(self.votes, bool) or not isinstance(self.votes, int) or self.votes < 0:
            raise ConfigError(expected("votes", "an integer >= 0", self.votes))
        for name in ("radius", "p_lower", "threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float) or not math.isfinite(value):
                raise ConfigError(expected(name, "a finite number", value))
        if not 0.0 <= self.p_lower < 1.0:
            raise ConfigError(expected("p_lower", "a number in [0, 1)", self.p_lower))
        if self.outcome == "ABSTAIN":
            if self.radius != 0.0:
                raise ConfigError(expected("radius", "0 for ABSTAIN", self.radius))
        elif self.votes == 0:
            raise ConfigError(expected("votes", f"at least 1 for {self.outcome}", self.votes))
        elif not self.p_lower > 0.5 or not 0.0 <= self.radius <= self.sigma * NormalDist().inv_cdf(self.p_lower):
            raise ConfigError(expected("radius", f"what p_lower {self.p_lower:g} certifies at sigma {self.sigma:g}", self.radius))

    @property
    def about(self) -> str:
        """What kind of image the statement is about, in words."""
        return "the prepared uint8 image, its part laid level" if self.aligned else "the prepared uint8 image"


def fixed_certificate(
    defects: int,
    votes: int,
    *,
    threshold: float,
    sigma: float,
    pixels: int,
    alpha: float = 0.001,
    at_radius: float | None = None,
    aligned: bool = False,
) -> Certificate:
    """The certificate of ``defects`` votes for DEFECT among ``votes``, a number fixed before the first was drawn.

    Cohen et al. choose the class by a first round of votes and bound its probability by a second.  With two classes no first
    round is needed: both probabilities are bounded from below at ``alpha`` / 2, both bounds hold but for ``alpha``, and as they
    sum to at most 1, at most one is above 1/2.  That one is certified.

    Args:
        at_radius: certify this radius or ABSTAIN; None: the largest there is, or ABSTAIN where that is 0.

    Raises:
        ConfigError: a number is out of range.
    """
    defects, votes = integer("defects", defects), integer("votes", votes)
    check_counts(defects, votes)
    outcome, most = ("DEFECT", defects) if 2 * defects > votes else ("OK", votes - defects)
    p = float(lower_bound(most, votes, split_alpha(alpha, 2)))
    if at_radius is None:
        certified = float(radius(p, sigma, pixels=pixels))
        holds = certified > 0.0
    else:
        holds = p >= vote_probability(at_radius, sigma, pixels=pixels)
        certified = float(at_radius)
    return Certificate(
        outcome=outcome if holds else "ABSTAIN",
        radius=certified if holds else 0.0,
        votes=votes,
        p_lower=p,
        sigma=float(sigma),
        alpha=float(alpha),
        threshold=finite("threshold", threshold),
        method="fixed",
        aligned=aligned,
    )
