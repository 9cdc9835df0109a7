"""The statistics of certificates: from votes of a smoothed detector to radii that hold (NumPy and SciPy, no images, no network).

The smoothed detector says DEFECT where P[A(x + delta) > h] > 1/2, delta being Gaussian noise of deviation sigma rounded to the
1/255 lattice (:mod:`advrad_fast.lattice`).  If a vote for its decision at x has probability p, the decision is the same for every
image closer to x than sigma Phi^-1(p) in l2 (Cohen et al., arXiv 1902.02918; Theorem 5.1 of AdvRAD, arXiv 2408.04839).  p is
not known; n votes bound it from below.

- :mod:`bounds`: Clopper-Pearson, radii, and what drawing the noise from a finite table costs them.
- :mod:`betting`: tests and bounds that may be looked at after every vote.
- :mod:`scores`: one statement an image that holds for every threshold; certified AUROC.
- :mod:`certificate`: what is claimed, and the rule for a fixed number of votes.

All confidence is over the noise: the image must not have been chosen with knowledge of the seed, and votes must be independent
draws.  An error of at most ``alpha`` is per claim; :func:`split_alpha` makes claims hold together.
"""

from advrad_fast.certify.betting import Claim, DecisionTest, RadiusSequence, RobustnessTest, anytime_lower_bound
from advrad_fast.certify.bounds import allowance, lower_bound, radius, split_alpha, upper_bound, vote_probability
from advrad_fast.certify.certificate import Certificate, fixed_certificate
from advrad_fast.certify.scores import certified_auroc, certified_rank, certified_scores, least_ok_threshold

__all__ = [
    "Certificate",
    "Claim",
    "DecisionTest",
    "RadiusSequence",
    "RobustnessTest",
    "allowance",
    "anytime_lower_bound",
    "certified_auroc",
    "certified_rank",
    "certified_scores",
    "fixed_certificate",
    "least_ok_threshold",
    "lower_bound",
    "radius",
    "split_alpha",
    "upper_bound",
    "vote_probability",
]
