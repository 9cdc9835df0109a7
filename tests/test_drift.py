"""The drift test: its false-alarm rate by simulation, what it finds, and that its state survives."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from advrad_fast.errors import CalibrationError, ConfigError, DriftStateError, OtherDriftStateError
from advrad_fast.line import Direction, Drift, DriftState
from advrad_fast.line.bets import Bets

Scores = NDArray[np.float64]


def scored(score: float | None) -> Any:
    return SimpleNamespace(score=score)


def feed(drift: Drift, scores: Any) -> DriftState:
    for score in scores:
        drift.update(scored(float(score)))
    return drift.state


def simulate(
    n: int,
    alpha: float,
    eps: float,
    streams: int,
    frames: int,
    rng: np.random.Generator,
    *,
    draw: Any = None,
    defects: float = 0.0,
) -> tuple[Scores, Scores]:
    """The largest e-value of each stream, and the largest of one that takes the share of the calibration for the truth.

    ``draw`` makes normal scores of a shape; each frame is, with probability ``defects``, above or below all of them.
    """
    draw = draw or rng.standard_normal
    bets = Bets(n, alpha, eps, (streams,))
    above, below = bets.bounds(np.sort(draw((streams, n)), axis=-1))
    largest = np.zeros(streams)
    naive = largest.copy()
    side = rng.choice([-1e9, 1e9], streams)[:, None]  # all of a stream's defects: the worst for it
    for _ in range(frames):
        score = np.where(rng.random((streams, 1)) < defects, side, draw((streams, 1)))
        largest = np.maximum(largest, bets.update(np.stack([score > above, score < below], axis=1)).mean(axis=-1))
        naive = np.maximum(naive, bets.stakes[..., 0, :].sum(axis=-1).mean(axis=(-2, -1)))
    return largest, naive


def assert_at_most(largest: Scores, alpha: float) -> None:
    """The share of false alarms is at most alpha, but for four standard errors."""
    share = np.mean(largest >= 1.0 / alpha)
    assert share <= alpha + 4.0 * math.sqrt(alpha * (1.0 - alpha) / largest.size), share


@pytest.mark.parametrize(("n", "eps", "defects"), [(20, 0.02, 0.02), (20, 0.0, 0.0), (3, 0.02, 0.02)])
def test_false_alarms(n: int, eps: float, defects: float) -> None:
    largest, naive = simulate(n, 0.1, eps, 2000, 120, np.random.default_rng(n), defects=defects)
    assert_at_most(largest, 0.1)
    # The simulation can tell: a test that forgets that the calibration is a draw itself fails it.
    assert n == 3 or np.mean(naive >= 10.0) > 0.15


def test_false_alarms_of_scores_with_ties() -> None:
    rng = np.random.default_rng(6)
    largest, _ = simulate(20, 0.1, 0.0, 2000, 100, rng, draw=lambda shape: rng.integers(0, 4, shape).astype(np.float64))
    assert_at_most(largest, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5, 20, 31, 100, 1000])
@pytest.mark.parametrize(("alpha", "eps", "defects"), [(0.01, 0.02, 0.02), (0.05, 0.0, 0.0), (0.2, 0.02, 0.02)])
def test_false_alarms_of_many_long_streams(n: int, alpha: float, eps: float, defects: float) -> None:
    largest, _ = simulate(n, alpha, eps, 4000, 1000, np.random.default_rng(n), defects=defects)
    assert_at_most(largest, alpha)


def test_cells_spend_no_more_than_they_may() -> None:
    """The sum of P[cell] W is 1 and W rises: the calibration's part of the proof."""
    from scipy.stats import beta

    for n in (1, 2, 20, 1000):
        bets = Bets(n, 0.01, 0.0)
        p = 1.0 / (1.0 + (bets._won[..., 0] - 1.0) / 0.03)  # won = 1 + u (1 - p) / p, and p = q without contamination
        assert (np.diff(bets._weights) > 0).all()
        for m, upper in zip(bets.ranks, p, strict=True):
            mass = np.diff(beta.cdf(upper, m, n + 1 - m), prepend=0.0)
            assert np.isclose(np.sum(mass * bets._weights), 1.0, rtol=1e-6)
            assert upper[-1] == 1.0 and bets._weights[-1] >= 2 * len(bets.ranks) / 0.01


def test_a_bet_is_fair_at_most() -> None:
    """One step's expectation at the odds' own probability is what went in."""
    bets = Bets(30, 0.01, 0.02)
    p = 1.0 / (1.0 + (bets._won[..., 0] - 1.0) / 0.03)
    expectation = p[..., None] * bets._won + (1.0 - p[..., None]) * bets._lost
    np.testing.assert_allclose(expectation, 1.0, rtol=1e-12)


@pytest.mark.parametrize(("shift", "direction", "within"), [(2.0, Direction.UP, 60), (-2.0, Direction.DOWN, 60)])
def test_a_shift_is_found(shift: float, direction: Direction, within: int) -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        drift = Drift(np.sort(rng.standard_normal(31)))
        assert not feed(drift, rng.standard_normal(300)).alarm
        state = feed(drift, shift + rng.standard_normal(200))
        assert state.alarm and state.direction is direction
        assert state.alarm_frame is not None and 300 < state.alarm_frame <= 300 + within
        assert state.onset_frame is not None and abs(state.onset_frame - 300) <= 30
        assert state.p_value <= 0.01


def test_two_per_cent_of_defects_are_no_drift_and_a_tenth_are() -> None:
    rng = np.random.default_rng(4)
    for share, alarm in ((0.02, False), (0.1, True)):
        drift = Drift(np.sort(rng.standard_normal(200)))
        scores = np.where(rng.random(3000) < share, 50.0, rng.standard_normal(3000))
        assert feed(drift, scores).alarm is alarm


def test_an_alarm_stays_until_reset_and_says_when() -> None:
    drift = Drift(np.arange(50.0), false_alarm_rate=0.05)
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for k in range(40):
        drift.update(SimpleNamespace(score=100.0, captured_at=at.replace(second=k)))  # type: ignore[arg-type]
    alarmed = drift.state
    assert alarmed.alarm and alarmed.direction is Direction.UP and alarmed.level == 20.0 and alarmed.onset_frame == 0
    assert alarmed.alarm_frame is not None and alarmed.alarm_at == at.replace(second=alarmed.alarm_frame - 1)
    later = feed(drift, np.random.default_rng(0).uniform(0.0, 49.0, 400))
    assert later.alarm_frame == alarmed.alarm_frame and later.e_value < 1.0 < 20.0 <= later.peak
    drift.reset()
    assert drift.state == Drift(np.arange(50.0), false_alarm_rate=0.05).state and not drift.state.alarm


def test_frames_without_a_score_change_nothing() -> None:
    drift = Drift(np.arange(5.0))
    before = drift.state
    assert drift.update(scored(None)) == before
    with pytest.raises(ConfigError, match="score: expected a finite number, got nan"):
        drift.update(scored(math.nan))
    assert drift.state == before


@pytest.mark.parametrize("calibration", [[], [2.0, 1.0], [math.nan], [[1.0]]])
def test_bad_calibrations(calibration: list[float]) -> None:
    with pytest.raises(CalibrationError):
        Drift(calibration)


@pytest.mark.parametrize(
    "settings", [{"false_alarm_rate": 0}, {"false_alarm_rate": 1}, {"contamination": -0.1}, {"contamination": True}]
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Drift([1.0], **settings)


def test_a_restored_test_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    calibration, scores = np.sort(rng.standard_normal(40)), rng.standard_normal(120) + 0.8
    whole, first = Drift(calibration), Drift(calibration)
    for score in scores[:60]:
        whole.update(scored(score))
        first.update(scored(score))
    first.save(tmp_path / "drift.json")
    second = Drift.restore(tmp_path / "drift.json", calibration)
    assert second.state == whole.state
    for score in scores[60:]:
        assert second.update(scored(score)) == whole.update(scored(score))
    assert whole.state.alarm
    whole.update(SimpleNamespace(score=1.0))  # type: ignore[arg-type]
    whole.save(tmp_path / "drift.json")
    assert Drift.restore(tmp_path / "drift.json", calibration).state == whole.state


def test_a_state_of_another_test_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    Drift(np.arange(9.0)).save(path)
    with pytest.raises(OtherDriftStateError, match="calibration: expected that of this test"):
        Drift.restore(path, np.arange(10.0))
    with pytest.raises(OtherDriftStateError, match="contamination: expected that of this test"):
        Drift.restore(path, np.arange(9.0), contamination=0.1)
    with pytest.raises(DriftStateError, match=r"none\.json"):
        Drift.restore(tmp_path / "none.json", np.arange(9.0))
    with pytest.raises(DriftStateError, match="cannot be written"):
        Drift(np.arange(9.0)).save(tmp_path / "no folder" / "drift.json")
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(DriftStateError, match="at most"):
        Drift.restore(path, np.arange(9.0))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(["schema", "state", "stakes", "evidence", "since"]), inner=st.text(max_size=12), value=_JSON)
def test_a_damaged_state_is_a_typed_error_or_a_state(
    tmp_path_factory: pytest.TempPathFactory, key: str, inner: str, value: Any
) -> None:
    path = tmp_path_factory.mktemp("drift") / "drift.json"
    calibration = np.arange(4.0)
    Drift(calibration).save(path)
    document = json.loads(path.read_text())
    if key == "state" and inner:
        document[key][min(document[key], key=lambda name: abs(hash(name) - hash(inner)))] = value
    else:
        document[key] = value
    path.write_text(json.dumps(document))
    try:
        restored = Drift.restore(path, calibration)
    except DriftStateError:
        return
    assert math.isfinite(restored.update(scored(1.0)).e_value)


def test_states_are_values() -> None:
    state = Drift(np.arange(4.0)).state
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.frames = 3  # type: ignore[misc]
    assert (state.frames, state.alarm, state.p_value) == (0, False, 1.0)
