"""certify.betting: tests and bounds that may stop at any time, against a plain loop and in simulation."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advrad_fast import certify
from advrad_fast.certify import Claim, DecisionTest, RadiusSequence, RobustnessTest
from advrad_fast.certify.betting import FRACTIONS, WEIGHTS, boundary, log_wealth
from advrad_fast.errors import ConfigError

PIXELS = 256 * 256 * 3
SIMULATIONS = 20_000
votes_lists = st.tuples(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 0.99, 1.0]), st.integers(0, 2**32 - 1)).map(
    lambda a: np.random.default_rng(a[1]).random(400) < a[0]
)


class PlainBets:
    """The gambler, vote by vote: one purse for each fraction."""

    def __init__(self, p: float) -> None:
        self.p, self.purses = p, WEIGHTS.tolist()

    def fortune(self, vote: bool) -> float:
        odds = (1 - self.p) / self.p
        self.purses = [x * (1 + u * odds if vote else 1 - u) for x, u in zip(self.purses, FRACTIONS.tolist(), strict=True)]
        return sum(self.purses)


def plain_robustness_test(votes: np.ndarray, p: float, alpha: float) -> tuple[Claim, int]:
    rich, poor = PlainBets(p), PlainBets(1 - p)
    for used, vote in enumerate(votes.tolist(), 1):
        if rich.fortune(vote) >= 1 / alpha:
            return Claim.ROBUST, used
        if poor.fortune(not vote) >= 1 / alpha:
            return Claim.NOT_CERTIFIABLE, used
    return Claim.UNDECIDED, len(votes)


def plain_decision_test(votes: np.ndarray, p: float, level: float) -> tuple[str | None, int]:
    defect, ok, no_defect, no_ok = PlainBets(p), PlainBets(p), PlainBets(1 - p), PlainBets(1 - p)
    hopeless = [False, False]
    for used, vote in enumerate(votes.tolist(), 1):
        fortunes = defect.fortune(vote), ok.fortune(not vote), no_defect.fortune(not vote), no_ok.fortune(vote)
        enough = [x >= 1 / level for x in fortunes]
        hopeless = [hopeless[0] or enough[2], hopeless[1] or enough[3]]
        if enough[0]:
            return "DEFECT", used
        if enough[1]:
            return "OK", used
        if all(hopeless):
            return "ABSTAIN", used
    return None, len(votes)


def in_batches(test: Any, votes: np.ndarray, batch: int) -> Any:
    for start in range(0, len(votes), batch):
        test.update(votes[start : start + batch])
    return test


@given(
    votes=votes_lists,
    ratio=st.sampled_from([0.0, 0.4, 0.8, 1.2, 2.0]),
    batch=st.integers(1, 400),
    alpha=st.sampled_from([0.05, 0.001]),
)
def test_equal_to_the_plain_loop_in_any_batches(votes: np.ndarray, ratio: float, batch: int, alpha: float) -> None:
    test = in_batches(RobustnessTest(ratio * 0.25, 0.25, alpha, pixels=PIXELS), votes, batch)
    assert (test.claim, test.votes_used) == plain_robustness_test(votes, test.vote_probability, alpha)
    assert test.successes == votes[: test.votes_used].sum()
    both = in_batches(DecisionTest(ratio * 0.25, 0.25, alpha, pixels=PIXELS), votes, batch)
    assert (both.outcome, both.votes_used) == plain_decision_test(votes, both.vote_probability, both.level)
    assert both.defects == votes[: both.votes_used].sum()


def test_a_fair_bet_in_exact_fractions() -> None:
    """At P[vote] = p the expected fortune after one more vote is the fortune before; below p it is less."""
    assert math.fsum(WEIGHTS) == pytest.approx(1.0, abs=1e-15) and (WEIGHTS > 0).all() and FRACTIONS[-1] == 1.0
    for u in map(Fraction, FRACTIONS.tolist()):
        for p in (Fraction(1, 2), Fraction(9, 10), Fraction(999, 1000)):
            win, lose = 1 + u * (1 - p) / p, 1 - u
            assert p * win + (1 - p) * lose == 1 and lose >= 0
            assert (p / 2) * win + (1 - p / 2) * lose < 1


@given(n=st.integers(1, 2000), data=st.data(), p=st.floats(0.001, 0.999))
def test_fortunes_are_monotone(n: int, data: st.DataObject, p: float) -> None:
    k = data.draw(st.integers(0, n - 1))
    assert float(log_wealth(k + 1, n, p)) > float(log_wealth(k, n, p))
    assert float(log_wealth(k + 1, n, p)) > float(log_wealth(k + 1, n, min(p * 1.001, 0.9999)))
    assert float(log_wealth(math.floor(n * p), n, p)) <= 1e-9  # nothing is won at the mean


def test_fortune_by_hand() -> None:
    assert float(log_wealth(1, 1, 0.5)) == pytest.approx(math.log(1 + (WEIGHTS * FRACTIONS).sum()), rel=1e-12)
    assert float(log_wealth(0, 1, 0.5)) == pytest.approx(math.log(1 - (WEIGHTS * FRACTIONS).sum()), rel=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.788, 0.977])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_boundary_and_bound_are_the_fortunes(p: float, alpha: float) -> None:
    n = np.arange(1, 1201)
    least = boundary(p, alpha)(1200)[:1200]
    assert set(np.diff(least)) <= {0, 1}
    there = least <= n
    goal = -math.log(alpha)
    assert (log_wealth(least[there], n[there], p) >= goal).all()
    assert (log_wealth(least - 1, n, p)[least > 0] < goal + 2e-9).all()
    bounds = certify.anytime_lower_bound(least[there], n[there], alpha)
    assert (bounds >= p - 1e-12).all()
    assert (certify.anytime_lower_bound(least[there] - 1, n[there], alpha) <= p + 1e-9).all()


@given(k=st.integers(0, 300), failures=st.integers(0, 300), alpha=st.floats(1e-6, 0.5))
def test_anytime_bound_is_monotone(k: int, failures: int, alpha: float) -> None:
    n = k + failures
    if n == 0:
        return
    low = float(certify.anytime_lower_bound(k, n, alpha))
    assert 0 <= low < 1 and low <= k / n
    assert float(certify.anytime_lower_bound(k + 1, n + 1, alpha)) >= low >= float(certify.anytime_lower_bound(k, n + 1, alpha))
    assert float(certify.anytime_lower_bound(k, n, alpha / 2)) <= low


def walks(p: float, trials: int, seed: int = 7) -> np.ndarray:
    """Votes so far, int32 (SIMULATIONS, trials)."""
    votes = np.random.default_rng(seed).random((SIMULATIONS, trials), dtype=np.float32) < p
    return np.cumsum(votes, axis=1, dtype=np.int32)


def at_most(errors: Any, alpha: float) -> bool:
    return bool(errors <= SIMULATIONS * alpha + 4 * (SIMULATIONS * alpha * (1 - alpha)) ** 0.5)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("ratio", [0.4, 0.8, 2.0])
def test_coverage_of_the_robustness_test(ratio: float, alpha: float) -> None:
    """At P[vote] = p*, the worst of both claims: whoever looks after every vote is rarely wrong."""
    test = RobustnessTest(ratio * 0.25, 0.25, alpha, pixels=PIXELS)
    trials = 800
    k, n = walks(test.vote_probability, trials), np.arange(1, trials + 1)
    robust = (k >= boundary(test.vote_probability, alpha)(trials)[:trials]).any(axis=1)
    hopeless = (n - k >= boundary(1 - test.vote_probability, alpha)(trials)[:trials]).any(axis=1)
    assert at_most(robust.sum(), alpha) and at_most(hopeless.sum(), alpha)
    if alpha == 0.05:
        assert robust.sum() > 100  # the simulation can fail: it does reject now and then


def test_a_fixed_bound_looked_at_after_every_vote_is_wrong() -> None:
    """The reason for all this: Clopper-Pearson at every step is broken far more often than alpha."""
    p, trials, alpha = 0.788, 400, 0.05
    n = np.arange(1, trials + 1)
    k = np.minimum(np.arange(trials + 1)[:, None], n)
    enough = certify.lower_bound(k, n, alpha) >= p
    least = np.where(enough, k, n + 1).min(axis=0)
    assert not at_most((walks(p, trials) >= least).any(axis=1).sum(), 3 * alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.8])
def test_coverage_of_the_decision_test(ratio: float, alpha: float) -> None:
    """At 1/2, at p* and between, where DEFECT and OK are false at once; at p* ABSTAIN is false too."""
    test = DecisionTest(ratio * 0.25, 0.25, alpha, pixels=PIXELS)
    star, trials = test.vote_probability, 600
    n, up, down = (
        np.arange(1, trials + 1),
        boundary(star, test.level)(trials)[:trials],
        boundary(1 - star, test.level)(trials)[:trials],
    )
    assert alpha / 2 <= test.level <= alpha
    for p in (0.5, (0.5 + star) / 2, star):
        k = walks(p, trials)
        defect, ok = (k >= up).any(axis=1), (n - k >= up).any(axis=1)
        assert at_most((defect | ok).sum(), alpha)
        if p == star:
            abstain = (n - k >= down).any(axis=1) & (k >= down).any(axis=1)
            assert at_most((ok | abstain).sum(), alpha)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
def test_coverage_of_the_radius_sequence(p: float) -> None:
    """The largest of the bounds shown after every one of 150 votes."""
    trials, alpha = 150, 0.05
    n = np.arange(1, trials + 1)
    table = certify.anytime_lower_bound(np.minimum(np.arange(trials + 1)[:, None], n), n, alpha)
    shown = table[walks(p, trials), n - 1].max(axis=1)
    errors = (shown > p).sum()
    assert at_most(errors, alpha) and (errors > 0 or p == 0.99)  # 150 votes can't get above 0.99


def test_radius_sequence(rng: np.random.Generator) -> None:
    sequence, last = RadiusSequence(0.25, pixels=PIXELS), 0.0
    for batch in (1, 5, 16, 16, 200, 16):
        r = sequence.update(rng.random(batch) < 0.9)
        assert r == sequence.radius >= last
        last = r
    best = sequence.p_lower
    sequence.update(np.zeros(20, dtype=bool))
    assert sequence.p_lower == best and sequence.votes_used == 274
    assert last == float(certify.radius(best, 0.25, pixels=PIXELS)) > 0


@pytest.mark.parametrize(("ratio", "robust", "hopeless"), [(0.4, 18, 7), (0.8, 32, 5), (1.2, 62, 4), (2.0, 329, 2)])
def test_votes_when_all_agree(ratio: float, robust: int, hopeless: int) -> None:
    for vote, claim, used in ((True, Claim.ROBUST, robust), (False, Claim.NOT_CERTIFIABLE, hopeless)):
        test = RobustnessTest(ratio * 0.25, 0.25, pixels=PIXELS)
        assert test.update(np.full(1000, vote)) is claim and test.votes_used == used
        assert test.update(np.full(10, not vote)) is claim and test.votes_used == used  # settled is settled


def test_certificates() -> None:
    test = DecisionTest(0.2, 0.25, pixels=PIXELS)
    assert test.certificate(1.5).outcome == "ABSTAIN" and test.certificate(1.5).votes == 0
    assert test.update(np.zeros(20, dtype=bool)) is None and test.update(np.zeros(0, dtype=bool)) is None
    assert test.certificate(1.5).outcome == "ABSTAIN" and test.certificate(1.5).radius == 0.0
    assert test.update(np.zeros(20, dtype=bool)) == "OK"
    made = test.certificate(1.5, aligned=True)
    assert (made.outcome, made.radius, made.votes, made.method, made.aligned) == ("OK", 0.2, 32, "anytime", True)
    assert made.p_lower == test.vote_probability and made.alpha == 0.001 and made.threshold == 1.5


def test_a_large_radius_needs_no_large_table() -> None:
    test = DecisionTest(1.4, 0.25, pixels=PIXELS)  # p* = 1 - 1e-8
    assert test.update(np.ones(1000, dtype=bool)) is None and test.level == pytest.approx(0.001)


@pytest.mark.parametrize("votes", [[True], np.ones(3), np.ones((2, 2), dtype=bool), None])
@pytest.mark.parametrize("test", [RobustnessTest, DecisionTest])
def test_refuses_votes(test: Any, votes: Any) -> None:
    with pytest.raises(ConfigError, match="votes: expected a bool array"):
        test(0.2, 0.25, pixels=PIXELS).update(votes)
    with pytest.raises(ConfigError, match="votes: expected a bool array"):
        RadiusSequence(0.25, pixels=PIXELS).update(votes)


@pytest.mark.parametrize("test", [RobustnessTest, DecisionTest])
def test_refuses_settings(test: Any) -> None:
    for arguments in ((-0.1, 0.25, 0.001), (0.2, 0.0, 0.001), (0.2, 0.25, 1.0), (2.0, 0.25, 0.001)):
        with pytest.raises(ConfigError):
            test(*arguments, pixels=PIXELS)
    with pytest.raises(ConfigError, match="pixels"):
        test(0.2, 0.25, pixels=0)
