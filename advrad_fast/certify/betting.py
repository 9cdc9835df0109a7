"""Tests and bounds that may be looked at after every vote, by betting (Waudby-Smith and Ramdas, arXiv 2010.09686).

A gambler doubts that P[vote] is as low as p.  At odds that are fair for p he stakes the fraction u of what he has on every
vote: a vote multiplies it by 1 + u (1 - p) / p, its absence by 1 - u.  While P[vote] <= p this is a non-negative
supermartingale from 1, so that it ever gets to 1 / alpha has at most probability alpha (Ville): whoever rejects then errs with at
most alpha, however often he looks.  That is the likelihood ratio of q = p + u (1 - p) against p.  As the right u
depends on the unknown P[vote], the stake is spread over :data:`FRACTIONS`, fixed beforehand: the mean of their fortunes is a
supermartingale too.

All alternatives lie on the side that is tested; a mixture over all of [0, 1] (Krichevsky and Trofimov's) wastes what it puts
on the other, which is most of it where p is near 1.  A fortune falls as p rises, so the p that are rejected form an interval from
0, and one spread gives the test and the confidence bound.  ``benchmarks/votes_needed.py`` has what it saves.
"""

from __future__ import annotations

import math
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advrad_fast.certify.bounds import check_counts, radius, vote_probability
from advrad_fast.certify.certificate import Certificate
from advrad_fast.checks import finite, share
from advrad_fast.errors import ConfigError, expected

_ODDS = np.geomspace(0.002 / 0.998, 0.97 / 0.03, 12)
#: u: twelve from 0.002 to 0.97, evenly on the logit scale, and everything.
FRACTIONS: NDArray[np.float64] = np.append(_ODDS / (1.0 + _ODDS), 1.0)
#: The shares of the stake: 0.3 on everything, the rest in proportion to u**0.6.  Of 30 spreads tried by exact computation at
#: p = 1, .95 and .1 for radius / sigma = .4, .8, 1.2 and 2 this needed the fewest votes, in the geometric mean.
WEIGHTS: NDArray[np.float64] = np.append(0.7 * FRACTIONS[:-1] ** 0.6 / np.sum(FRACTIONS[:-1] ** 0.6), 0.3)

#: What a fortune must exceed log(1 / alpha) by, far above the rounding errors of computing it (relative, 1e-15 a vote).
_MARGIN = 1e-9


def log_wealth(successes: ArrayLike, trials: ArrayLike, p: ArrayLike) -> NDArray[np.float64]:
    """The log of the gambler's fortune against P[vote] <= ``p`` after ``successes`` of ``trials`` votes; all broadcast."""
    k, n, q = (np.asarray(a, dtype=np.float64)[..., None] for a in (successes, trials, p))
    lost = np.append(np.log1p(-FRACTIONS[:-1]), -1e9)  # of everything: its exp is 0, and 0 * it is 0, as 0 * -inf isn't
    terms = k * np.log1p(FRACTIONS * (1.0 - q) / q) + (n - k) * lost + np.log(WEIGHTS)
    top = terms.max(axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(terms - top).sum(axis=-1)))


def anytime_lower_bound(successes: ArrayLike, trials: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """A lower bound of P[vote] that holds after every vote at once, but for a probability ``alpha`` (a confidence sequence).

    So the number of trials may depend on the votes, and the largest of the bounds seen holds too.

    Args:
        successes, trials: integers, 0 <= successes <= trials, trials >= 1; they broadcast.
        alpha: in (0, 1).

    Returns:
        float64 of the broadcast shape, in [0, 1): the supremum of the p against which the fortune is at least 1 / ``alpha``,
        rounded down by at most 2**-52.

    Raises:
        ConfigError: a number is out of range.
    """
    k, n = check_counts(successes, trials)
    goal = -math.log(share("alpha", alpha)) + _MARGIN
    low, high = np.zeros(k.shape), np.maximum(k / n, 2.0**-52)  # at the mean the fortune is at most 1
    for _ in range(53):
        middle = (low + high) / 2
        rejected = log_wealth(k, n, middle) >= goal
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return np.asarray(low)


class _Boundary:
    """The least number of votes, after each number of trials, by which P[vote] <= p is rejected; trials + 1 where none is."""

    def __init__(self, p: float, alpha: float) -> None:
        self._p, self._goal = p, -math.log(alpha) + _MARGIN
        self._least = np.empty(0, dtype=np.int64)

    def __call__(self, trials: int) -> NDArray[np.int64]:
        """int64 (at least ``trials``,), of 1, 2, ... trials."""
        known = self._least
        if known.size < trials:
            n = np.arange(known.size + 1, max(trials, 2 * known.size, 256) + 1)
            low, high = np.full(n.size, -1), n + 1  # a fortune rises with the votes: bisect
            for _ in range(int(n[-1]).bit_length() + 1):
                middle = (low + high) // 2
                enough = (middle > low) & (log_wealth(np.minimum(middle, n), n, self._p) >= self._goal)
                low, high = np.where(enough | (middle == low), low, middle), np.where(enough, middle, high)
            known = self._least = np.concatenate([known, high])
        return known


@lru_cache(maxsize=64)
def boundary(p: float, alpha: float) -> _Boundary:
    """The boundary of the test of P[vote] <= ``p``; kept, as every image is tested against the same."""
    return _Boundary(p, alpha)


class Claim(StrEnum):
    """What a test says of a radius."""

    ROBUST = "robust"  #: a vote is probable enough
    NOT_CERTIFIABLE = "not certifiable"  #: it is not: more votes would not help
    UNDECIDED = "undecided"  #: more votes are needed


class RobustnessTest:
    """Is a decision, given beforehand, robust at ``radius``?  Stops as soon as votes settle it, either way.

    With p* = :func:`vote_probability`, ROBUST is claimed when P[vote] <= p* is rejected, NOT_CERTIFIABLE when P[vote] >= p*
    is.  Each at the full ``alpha``: whatever P[vote] is, only one of the two claims can be false, so P[a false claim] <=
    ``alpha``.  The decision must come from elsewhere than these votes; :class:`DecisionTest` finds it from them.

    Args:
        radius: l2 in [0, 1] pixel units, >= 0.
        sigma: in [0, 1] pixel units.
        alpha: in (0, 1).
        pixels: noised values an image.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, radius: float, sigma: float, alpha: float = 0.001, *, pixels: int) -> None:
        self.vote_probability = vote_probability(radius, sigma, pixels=pixels)
        self.radius, self.sigma, self.alpha = float(radius), float(sigma), share("alpha", alpha)
        self.claim = Claim.UNDECIDED
        self.votes_used = 0  #: up to the one that settled it
        self.successes = 0  #: among them
        self._for = boundary(self.vote_probability, self.alpha)
        self._against = boundary(1.0 - self.vote_probability, self.alpha)

    def update(self, votes: NDArray[np.bool_]) -> Claim:
        """Take a batch of votes, bool (n,), in the order drawn; those after the one that settles it are not used."""
        votes = check_votes(votes)
        if self.claim is not Claim.UNDECIDED or not votes.size:
            return self.claim
        k, n, end = _counts(votes, self.successes, self.votes_used)
        robust = k >= self._for(end)[self.votes_used : end]
        hopeless = n - k >= self._against(end)[self.votes_used : end]
        last = _first(robust | hopeless)
        self.successes, self.votes_used = int(k[last]), int(n[last])
        if robust[last]:
            self.claim = Claim.ROBUST
        elif hopeless[last]:
            self.claim = Claim.NOT_CERTIFIABLE
        return self.claim


class DecisionTest:
    """Which decision, if any, is robust at ``radius``?  Decides from the votes alone, without a first round to choose the side.

    DEFECT is claimed when P[vote] <= p* is rejected, OK when P[no vote] <= p* is, both at level a; ABSTAIN when both P[vote] and
    P[no vote] are shown to be below p*, for which more votes would not help.  With p* > 1/2 both DEFECT and OK can be false
    claims at the same P[vote], so a is less than alpha.  Half of it would do; less is enough:

    Let P[vote] be at least 1/2.  DEFECT is claimed falsely with at most a.  OK is claimed with no more than the probability
    it has at 1/2, as "no vote" is what leads to it.  Where the fortune crosses, after n trials, the share of "no vote" is
    above p*, so changing the measure from p* to 1/2 costs a factor of at most exp(-n KL(p* || 1/2)); and n is at least n_min,
    at which all votes agree.  So P[any false claim] <= a (1 + exp(-n_min KL(p* || 1/2))), which is set to alpha.  It is the
    same below 1/2, and where P[vote] >= p* ABSTAIN (at most a) takes the place of DEFECT.

    Args:
        radius, sigma, alpha, pixels: as for :class:`RobustnessTest`.
    """

    def __init__(self, radius: float, sigma: float, alpha: float = 0.001, *, pixels: int) -> None:
        self.vote_probability = p = vote_probability(radius, sigma, pixels=pixels)
        self.radius, self.sigma, self.alpha = float(radius), float(sigma), share("alpha", alpha)
        n_min = math.ceil(math.log(self.alpha) / math.log(p))  # or more: no fortune is above p**-n
        divergence = math.log(2.0) + p * math.log(p) + (1.0 - p) * math.log1p(-p)
        #: a
        self.level = share("alpha", self.alpha / (1.0 + math.exp(-n_min * max(divergence, 0.0))))  # half of 5e-324 is 0
        self.outcome: str | None = None  #: OK, DEFECT or ABSTAIN once settled
        self.votes_used = 0  #: up to the one that settled it
        self.defects = 0  #: votes for DEFECT among them
        self._for, self._against = boundary(p, self.level), boundary(1.0 - p, self.level)
        self._defect_hopeless = self._ok_hopeless = False

    def update(self, votes: NDArray[np.bool_]) -> str | None:
        """Take a batch of votes, bool (n,), True for DEFECT, in the order drawn; those after it is settled are not used."""
        votes = check_votes(votes)
        if self.outcome is not None or not votes.size:
            return self.outcome
        k, n, end = _counts(votes, self.defects, self.votes_used)
        enough, hopeless = (side(end)[self.votes_used : end] for side in (self._for, self._against))
        defect, ok = k >= enough, n - k >= enough
        # Once shown to be hopeless, a side stays so.
        no_defect = np.logical_or.accumulate(n - k >= hopeless) | self._defect_hopeless
        no_ok = np.logical_or.accumulate(k >= hopeless) | self._ok_hopeless
        last = _first(defect | ok | (no_defect & no_ok))
        self.defects, self.votes_used = int(k[last]), int(n[last])
        self._defect_hopeless, self._ok_hopeless = bool(no_defect[last]), bool(no_ok[last])
        if defect[last]:
            self.outcome = "DEFECT"
        elif ok[last]:
            self.outcome = "OK"
        elif no_defect[last] and no_ok[last]:
            self.outcome = "ABSTAIN"
        return self.outcome

    def certificate(self, threshold: float, *, aligned: bool = False) -> Certificate:
        """What the votes so far certify: undecided is ABSTAIN."""
        outcome = self.outcome or "ABSTAIN"
        certified = outcome != "ABSTAIN"
        most = max(self.defects, self.votes_used - self.defects)
        bound = float(anytime_lower_bound(most, self.votes_used, self.level)) if self.votes_used else 0.0
        return Certificate(
            outcome=outcome,
            radius=self.radius if certified else 0.0,
            votes=self.votes_used,
            p_lower=self.vote_probability if certified else bound,
            sigma=self.sigma,
            alpha=self.alpha,
            threshold=finite("threshold", threshold),
            method="anytime",
            aligned=aligned,
        )


class RadiusSequence:
    """The largest radius that the votes so far certify for a decision given beforehand; stop at any time.

    P[any of the radii ever shown is too large] <= ``alpha``.  For a decision that is found from the same votes run one for each
    side at ``split_alpha(alpha, 2)``.

    Args:
        sigma, alpha, pixels: as for :class:`RobustnessTest`.
    """

    def __init__(self, sigma: float, alpha: float = 0.001, *, pixels: int) -> None:
        radius(0.5, sigma, pixels=pixels)  # refuses what is out of range now
        self.sigma, self.alpha, self._pixels = float(sigma), share("alpha", alpha), pixels
        self.p_lower = 0.0  #: the largest bound so far
        self.votes_used = 0
        self.successes = 0

    @property
    def radius(self) -> float:
        """l2 in [0, 1] pixel units; never falls."""
        return float(radius(self.p_lower, self.sigma, pixels=self._pixels))

    def update(self, votes: NDArray[np.bool_]) -> float:
        """Take a batch of votes, bool (n,), and look once, after it; returns :attr:`radius`."""
        votes = check_votes(votes)
        if votes.size:
            self.votes_used += votes.size
            self.successes += int(np.count_nonzero(votes))
            self.p_lower = max(self.p_lower, float(anytime_lower_bound(self.successes, self.votes_used, self.alpha)))
        return self.radius


def check_votes(votes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``votes`` if they are bool (n,), or a ConfigError."""
    if not isinstance(votes, np.ndarray) or votes.dtype != np.bool_ or votes.ndim != 1:
        got = f"{votes.dtype} {votes.shape}" if isinstance(votes, np.ndarray) else votes
        raise ConfigError(expected("votes", "a bool array (n,)", got))
    return votes


def _counts(votes: NDArray[np.bool_], successes: int, trials: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Successes and trials after each of the votes, and the trials in the end."""
    end = trials + votes.size
    return successes + np.cumsum(votes), np.arange(trials + 1, end + 1), end


def _first(settled: NDArray[np.bool_]) -> int:
    """The index of the first True, or the last index."""
    return int(np.argmax(settled)) if settled.any() else settled.size - 1
