"""The fused operation ``votes`` in C++ against its plain form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advrad_fast import _native
from advrad_fast.reference import smoothing


def reference(scores: np.ndarray, thresholds: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts, statistics = smoothing.votes(*(torch.from_numpy(a.copy()) for a in (scores, thresholds, ranks)))
    return counts.numpy(), statistics.numpy()


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (1, 100), (5, 33), (3, 1000)])
def test_votes_equals_reference(rng: np.random.Generator, n: int, draws: int) -> None:
    scores = np.round(rng.normal(size=(n, draws)), 1).astype(np.float32)  # rounded: ties, also with the thresholds
    thresholds = np.concatenate([np.linspace(-2, 2, 41), [-np.inf, np.inf]]).round(1).astype(np.float32)
    ranks = rng.integers(0, draws, 7)
    for got, expected in zip(_native.votes(scores, thresholds, ranks), reference(scores, thresholds, ranks), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_votes_by_hand() -> None:
    scores = np.array([[3.0, 1.0, 2.0, 2.0], [-1.0, np.inf, 0.0, -np.inf]], dtype=np.float32)
    counts, statistics = _native.votes(scores, np.array([2.0, 0.0, 5.0], dtype=np.float32), np.array([0, 3, 1]))
    assert counts.tolist() == [[1, 4, 0], [1, 1, 1]]
    assert statistics.tolist() == [[1.0, 3.0, 2.0], [-np.inf, np.inf, -1.0]]


def test_a_fault_is_no_vote(rng: np.random.Generator) -> None:
    scores = rng.normal(size=(3, 50)).astype(np.float32)
    scores[1, 49] = np.nan
    thresholds, ranks = np.zeros(2, dtype=np.float32), np.array([0, 49])
    counts, statistics = _native.votes(scores, thresholds, ranks)
    assert counts[1].tolist() == [-1, -1] and np.isnan(statistics[1]).all()
    for got, expected in zip((counts, statistics), reference(scores, thresholds, ranks), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_no_thresholds_and_no_ranks(rng: np.random.Generator) -> None:
    scores = rng.normal(size=(2, 3)).astype(np.float32)
    counts, statistics = _native.votes(scores, np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64))
    assert counts.shape == (2, 0) and statistics.shape == (2, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scores", np.zeros(3, dtype=np.float32)),
        ("scores", np.zeros((2, 3))),
        ("scores", np.zeros((2, 0), dtype=np.float32)),
        ("scores", None),
        ("thresholds", np.zeros(1)),
        ("thresholds", np.array([0.0, np.nan], dtype=np.float32)),
        ("thresholds", np.zeros((1, 1), dtype=np.float32)),
        ("ranks", np.array([3])),
        ("ranks", np.array([-1])),
        ("ranks", np.zeros(1, dtype=np.int32)),
    ],
)
def test_votes_refuses(name: str, value: object) -> None:
    arguments: dict[str, object] = {
        "scores": np.zeros((2, 3), dtype=np.float32), "thresholds": np.zeros(1, dtype=np.float32), "ranks": np.array([2]),
    }  # fmt: skip
    _native.votes(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        _native.votes(**{**arguments, name: value})  # type: ignore[arg-type]
