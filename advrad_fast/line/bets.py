"""Bets on ranks: the statistics of the drift test (:mod:`advrad_fast.line.drift`), without images, files or clocks.

The null hypothesis: n calibration scores are independent draws from F, and the distribution of each new score, whatever came
before, gives an event A at most (1 - eps) F(A) + eps.  So a share ``eps`` of frames may be anything, defects for example.

**One event.**  Let A be "above the m-th largest calibration score", of probability q under F.  Given the calibration, a
gambler who stakes the fraction u at odds fair for p = (1 - eps) q + eps is multiplied by 1 + u (1 - p) / p when A happens and
by 1 - u when it does not: a non-negative supermartingale under the null (Waudby-Smith and Ramdas, arXiv 2010.09686, as in
:mod:`advrad_fast.certify.betting`).  A drift can begin late, when a gambler from the start has long lost: so only a part of
the money is staked at once, and a little of the rest before every frame, on a schedule fixed beforehand.  The sum, the rest
included, is a supermartingale from 1 too, and what is staked anew after t frames is still of the order of 1 / (t log(t)^2).

**q is not known**, and a fixed calibration set makes all p-values wrong together by the same unknown amount.  But q is
Beta(m, n + 1 - m) distributed (stochastically smaller with ties).  Cut [0, 1] into cells and give each a weight W, rising, with
sum of P[cell] W <= 1.  The fortune M(q) falls as q rises, so

    S = min over cells of W(cell) M(its upper end) <= W(q) M(q)   for the true q,

and P[S ever >= 1 / alpha] <= alpha E[W(q)] <= alpha (Ville, then the mean over the calibration).  That holds for n = 1 as for
n = 10,000, over both draws.  "Below the m-th smallest" is the mirror image.  The test is the mean of S over the events, again a
fortune of that kind.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Events are at these shares of the calibration scores from either end, and at the outermost score.
TAILS = (0.5, 0.25, 0.1)
#: u, each of an equal part of the money.
FRACTIONS: NDArray[np.float64] = np.array([0.03, 0.1, 0.25, 0.5, 0.75, 0.95])
#: Staked before the first frame; the rest follows as the share 1 / (1 + log(1 + t / PACE)) of it that is kept says.
AT_START, PACE = 0.5, 100.0

_CAP = 1e60  #: on a stake: lowered, a supermartingale stays one


class Bets:
    """The fortunes of all bets, of one stream or of ``batch`` independent ones.

    Args:
        n: calibration scores, >= 1.
        alpha: in (0, 1): the level that the cells are made for.
        contamination: eps, in [0, 0.5].
        batch: shape of the leading axes, for simulations.

    Attributes:
        ranks: int (K,): m of each event, falling.
        stakes: float64 (*batch, 2, K, cells, fractions), up first.
        evidence, since: of the bet at the most probable cell, CUSUM's sum of logarithms, (*batch, 2, K, fractions), and the frame
            after which that sum last began at 0.
        frames: taken so far.
    """

    def __init__(self, n: int, alpha: float, contamination: float, batch: tuple[int, ...] = ()) -> None:
        from scipy.special import betainccinv  # SciPy takes longer to import than the rest of this package: on use only

        ranks = sorted({*(max(1, round(tail * (n + 1))) for tail in TAILS), 1}, reverse=True)
        self.n, self.ranks = n, np.array(ranks)
        # Cells end where the probability of a larger q is e^-1, e^-2, ...; all have the same P[cell] W.  The last one reaches to
        # q = 1, at which nothing can be won: its W alone must be enough for an alarm.
        cells = 4
        while cells - 1 < math.log(100 * 2 * len(ranks) * cells / alpha):
            cells += 1
        ends = np.exp(-np.arange(1.0, cells))
        upper = np.array([np.append(betainccinv(m, n + 1 - m, ends), 1.0) for m in ranks])
        self._weights = 1.0 / (cells * np.append(np.exp(-np.arange(cells - 1.0)) * (1.0 - math.exp(-1.0)), ends[-1]))
        p = (1.0 - contamination) * upper + contamination
        self._won = 1.0 + FRACTIONS * ((1.0 - p) / p)[..., None]
        self._lost = 1.0 - FRACTIONS
        self._log_won, self._log_lost = np.log(self._won[:, 0]), np.log(self._lost)
        shape = (*batch, 2, len(ranks))
        self.frames = 0
        self.stakes = np.full((*shape, cells, FRACTIONS.size), AT_START / FRACTIONS.size)
        self.evidence = np.zeros((*shape, FRACTIONS.size))
        self.since = np.zeros(self.evidence.shape, dtype=np.int64)

    def bounds(self, calibration: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of sorted calibration scores (*batch, n): what a score must be above, and what below, (*batch, K) each."""
        scores = np.asarray(calibration, dtype=np.float64)
        return scores[..., self.n - self.ranks], scores[..., self.ranks - 1]

    def update(self, events: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Take one frame's events, bool (*batch, 2, K); returns :meth:`fortunes`."""
        before = _kept(self.frames)
        self.frames += 1
        happened = events[..., None]
        self.stakes += (before - _kept(self.frames)) / FRACTIONS.size
        self.stakes *= np.where(happened[..., None], self._won, self._lost)
        np.minimum(self.stakes, _CAP, out=self.stakes)
        self.since[self.evidence <= 0.0] = self.frames - 1
        self.evidence += np.where(happened, self._log_won, self._log_lost)
        np.clip(self.evidence, 0.0, _CAP, out=self.evidence)
        return self.fortunes()

    def fortunes(self) -> NDArray[np.float64]:
        """Up and down, (*batch, 2): their mean is the e-value."""
        total = self.stakes.sum(axis=-1) + _kept(self.frames)
        smallest: NDArray[np.float64] = (total * self._weights).min(axis=-1).mean(axis=-1)
        return smallest

    def onset(self, side: int) -> int:
        """Frames before the drift seems to have begun, by the bet that has gained most on this side; without a batch."""
        return int(self.since[side].flat[int(self.evidence[side].argmax())])


def _kept(frames: int) -> float:
    """The share of the money that is not staked yet."""
    return (1.0 - AT_START) / (1.0 + math.log1p(frames / PACE))
