"""From draws of a smoothed detector to a certificate: votes in the order drawn, to the one that settles it and no further.

How many draws a backend makes at a time decides nothing: votes are taken in the order of the draws, what was drawn
beyond the deciding vote is thrown away, and where a bound is looked at does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from advrad_fast.certify import Certificate, DecisionTest, RadiusSequence, split_alpha
from advrad_fast.certify.bounds import check_radius
from advrad_fast.checks import integer
from advrad_fast.lattice import check_sigma

#: (first, count) -> float32 (count,): scores of the draws [first, first + count).
Draw = Callable[[int, int], NDArray[np.float32]]
#: Called after every batch with the votes drawn so far and how many of them are for DEFECT.
OnVotes = Callable[[int, int], None]

#: Votes between two looks at the largest radius.
LOOK = 50

MAX_VOTES = 1_000_000  #: of one certificate


def batches(draw: Draw, batch: int, threshold: float, max_votes: int, on_votes: OnVotes | None) -> Iterator[NDArray[np.bool_]]:
    """Votes, bool (n,) at a time, True for DEFECT, ``max_votes`` in all."""
    defects = 0
    for first in range(0, max_votes, batch):
        votes = draw(first, min(batch, max_votes - first)).astype(np.float64) > threshold
        defects += int(np.count_nonzero(votes))
        if on_votes is not None:
            on_votes(first + votes.size, defects)
        yield votes


def least_votes(radius: float, sigma: float, alpha: float, *, pixels: int, max_votes: int) -> int | None:
    """The votes it takes to certify ``radius`` where all agree; None if that is more than ``max_votes``.

    Raises:
        ConfigError: a number is out of range.
    """
    radius, max_votes = check_radius(radius), check_votes("max_votes", max_votes)
    if radius > 6.0 * check_sigma(sigma):  # 7e9 votes
        return None
    test = DecisionTest(radius, sigma, alpha, pixels=pixels)
    while test.outcome is None and test.votes_used < max_votes:
        test.update(np.ones(min(1000, max_votes - test.votes_used), dtype=np.bool_))
    return test.votes_used if test.outcome == "DEFECT" else None


def at_radius(test: DecisionTest, votes: Iterator[NDArray[np.bool_]], threshold: float, *, aligned: bool) -> Certificate:
    """OK or DEFECT at the test's radius, or ABSTAIN: not robust there, or undecided after all votes."""
    for some in votes:
        if test.update(some) is not None:
            break
    return test.certificate(threshold, aligned=aligned)


def largest_radius(
    sigma: float, alpha: float, votes: Iterator[NDArray[np.bool_]], threshold: float, *, pixels: int, aligned: bool
) -> Certificate:
    """The largest radius that all votes certify, for whichever side it is; each side at half of ``alpha``."""
    sides = {name: RadiusSequence(sigma, split_alpha(alpha, 2), pixels=pixels) for name in ("DEFECT", "OK")}
    waiting = np.empty(0, dtype=np.bool_)

    def look(some: NDArray[np.bool_]) -> None:
        sides["DEFECT"].update(some)
        sides["OK"].update(~some)

    for some in votes:
        waiting = np.concatenate([waiting, some])
        while waiting.size >= LOOK:
            look(waiting[:LOOK])
            waiting = waiting[LOOK:]
    look(waiting)
    certified = [name for name, side in sides.items() if side.radius > 0.0]
    # Both at once contradict one another: one bound is false, which has at most probability alpha, and nobody knows which.
    outcome = certified[0] if len(certified) == 1 else "ABSTAIN"
    side = sides[outcome] if outcome != "ABSTAIN" else max(sides.values(), key=lambda s: s.successes)
    return Certificate(
        outcome=outcome,
        radius=side.radius if outcome != "ABSTAIN" else 0.0,
        votes=side.votes_used,
        p_lower=side.p_lower,
        sigma=sigma,
        alpha=alpha,
        threshold=threshold,
        method="anytime",
        aligned=aligned,
    )


def check_votes(name: str, votes: object) -> int:
    """A number of votes as an int in [1, MAX_VOTES], or a ConfigError."""
    return integer(name, votes, 1, MAX_VOTES)
