"""``python benchmarks/votes_needed.py``: votes that a certificate takes, computed exactly (no simulation); seconds.

The probability of every count of votes is carried from vote to vote, and what crosses a boundary is taken out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln

from advrad_fast import certify
from advrad_fast.certify.betting import boundary

SIGMA, ALPHA, PIXELS = 0.25, 0.001, 256 * 256 * 3
LIMIT = 5_000  # votes
RATIOS = (0.4, 0.8, 1.2, 2.0)
PROBABILITIES = (1.0, 0.99, 0.95, 0.5, 0.1, 0.0)

Boundary = NDArray[np.int64]


def kt_boundary(p: float) -> Boundary:
    """The least votes by which a mixture over all of [0, 1] (Krichevsky and Trofimov's) rejects P[vote] <= p."""
    n = np.arange(1, LIMIT + 1)

    def rejects(k: Boundary) -> NDArray[np.bool_]:
        wealth = betaln(k + 0.5, n - k + 0.5) - betaln(0.5, 0.5) - k * np.log(p) - (n - k) * np.log1p(-p)
        return np.asarray((k > n * p) & (wealth >= -np.log(ALPHA)))

    low, high = np.full(n.size, -1), n + 1
    for _ in range(LIMIT.bit_length() + 1):
        middle = (low + high) // 2
        enough = (middle > low) & rejects(np.clip(middle, 0, n))
        low, high = np.where(enough | (middle == low), low, middle), np.where(enough, middle, high)
    return np.asarray(high)


def expected_votes(up: Boundary, down: Boundary, p: float) -> tuple[float, float]:
    """Mean votes until ``up`` is reached by the votes or ``down`` by their absence, and how probable it is that neither is."""
    alive, mean = np.ones(1), 0.0
    for n in range(1, LIMIT + 1):
        mean += alive.sum()
        alive = np.append(alive * (1 - p), 0.0) + np.append(0.0, alive * p)
        alive[up[n - 1] :] = 0.0
        alive[: max(n - down[n - 1] + 1, 0)] = 0.0
        if alive.sum() < 1e-9:
            break
    return float(mean), float(alive.sum())


def cohen(ratio: float, p: float, votes: int = 1_000) -> float:
    """The probability that a fixed number of votes certifies the radius."""
    from scipy.stats import binom

    rank = certify.certified_rank(votes, ratio * SIGMA, SIGMA, ALPHA, pixels=PIXELS)
    return 0.0 if rank is None else float(binom.sf(rank - 1, votes, p))


def rows() -> list[str]:
    lines = []
    for ratio in RATIOS:
        p_star = certify.vote_probability(ratio * SIGMA, SIGMA, pixels=PIXELS)
        level = certify.DecisionTest(ratio * SIGMA, SIGMA, ALPHA, pixels=PIXELS).level

        def ours(p: float, alpha: float) -> Boundary:
            return boundary(p, alpha)(LIMIT)[:LIMIT]

        tests: tuple[tuple[Callable[[float], Boundary], str], ...] = (
            (lambda p: ours(p, ALPHA), "ours"),
            (lambda p, level=level: ours(p, level), "two sides"),
            (kt_boundary, "kt"),
        )
        sides = {name: (make(p_star), make(1.0 - p_star)) for make, name in tests}
        for p in PROBABILITIES:
            means = {name: expected_votes(*side, p) for name, side in sides.items()}
            (one, undecided), (kt, _) = means["ours"], means["kt"]
            # The decision test is the one-sided test at its own level wherever a side is certified.
            two = f"{means['two sides'][0]:.1f}" if p > p_star else "-"
            note = f" ({undecided:.1%} undecided)" if undecided > 5e-4 else ""
            answer = "robust" if p > p_star else "not certifiable"
            lines.append(
                f"| {ratio} | {p} | {answer} | {one:.1f}{note} | {two} | {kt:.1f} | {1000 / one:.0f} x | {cohen(ratio, p):.3f} |"
            )
    return lines


if __name__ == "__main__":
    print("| radius / sigma | P[vote] | true answer | test | decision test | KT mixture | Cohen's 1,000 | which certifies with |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows()))
