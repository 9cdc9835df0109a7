"""The fused operation ``votes`` in Triton: interpreted, and as PTX, against its plain form and the C++ twin: exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_votes import reference

from advrad_fast import _native


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (2, 33), (3, 1000), (1, 5000)])
def test_votes_equals_reference(way: Any, rng: np.random.Generator, n: int, draws: int) -> None:
    """5000 are more than a program holds in registers."""
    scores = np.round(rng.normal(size=(n, draws)), 1).astype(np.float32)  # rounded: ties, also with the thresholds
    scores[0, rng.integers(0, draws)] = -np.inf
    scores[-1, rng.integers(0, draws)] = np.inf
    thresholds = np.concatenate([np.linspace(-2, 2, 9), [-np.inf, np.inf]]).round(1).astype(np.float32)
    ranks = np.array([0, draws - 1, *rng.integers(0, draws, 3)])
    got = way.votes(scores, thresholds, ranks)
    for mine, plain, native in zip(
        got, reference(scores, thresholds, ranks), _native.votes(scores, thresholds, ranks), strict=True
    ):
        assert mine.dtype == plain.dtype
        np.testing.assert_array_equal(mine, plain)
        np.testing.assert_array_equal(mine, native)


def test_a_fault_is_no_vote(way: Any, rng: np.random.Generator) -> None:
    scores = rng.normal(size=(3, 50)).astype(np.float32)
    scores[1, 49] = np.nan
    counts, statistics = way.votes(scores, np.zeros(2, np.float32), np.array([0, 49]))
    assert counts[1].tolist() == [-1, -1] and np.isnan(statistics[1]).all()
    assert (counts[[0, 2]] >= 0).all() and np.isfinite(statistics[[0, 2]]).all()


def test_no_thresholds_and_no_ranks(way: Any, rng: np.random.Generator) -> None:
    scores = rng.normal(size=(2, 3)).astype(np.float32)
    counts, statistics = way.votes(scores, np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert counts.shape == (2, 0) and statistics.shape == (2, 0)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_scores_are_read_once(target: str, executable: Any, rng: np.random.Generator) -> None:
    """By a program: for eight thresholds together, and for a rank while they fit into registers."""
    from emulated import Emulator

    emulator, scores = Emulator(executable, target), rng.normal(size=(2, 4096)).astype(np.float32)
    emulator.votes(scores, np.zeros(8, np.float32), np.array([7]))
    counts, ranks = emulator.reports
    for report, small in ((counts, 32 * 128), (ranks, 8 * 256)):
        assert scores.nbytes <= report.loaded.requested <= scores.nbytes + 2 * small  # thresholds and rank: once a thread
    assert counts.bytes_moved + ranks.bytes_moved <= 1.15 * 2 * scores.nbytes


@pytest.mark.parametrize(
    ("name", "value"),
    [("scores", torch.zeros(3)), ("scores", None), ("thresholds", torch.zeros(1).double()), ("thresholds", torch.zeros(1, 1)),
     ("ranks", torch.zeros(1))],
)  # fmt: skip
def test_votes_refuses(name: str, value: object) -> None:
    from advrad_fast.errors import ConfigError
    from advrad_fast.kernels.votes import votes

    arguments = {"scores": torch.zeros(2, 3), "thresholds": torch.zeros(1), "ranks": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=f"^{name}: expected "):
        votes(**{**arguments, name: value})
