"""``python -m pytest benchmarks/votes.py --benchmark-enable``: the fused operation ``votes`` beside its PyTorch form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from advrad_fast import _native
from advrad_fast.reference import smoothing


@pytest.fixture(scope="module", params=[1_000, 100_000])
def arguments(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((8, request.param), dtype=np.float32)
    return scores, np.linspace(-2, 2, 101, dtype=np.float32), np.arange(0, request.param, request.param // 20)


def test_native(benchmark: Any, arguments: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    benchmark.group = f"votes, 8 x {arguments[0].shape[1]}"
    got = benchmark(_native.votes, *arguments) or _native.votes(*arguments)
    for a, b in zip(got, smoothing.votes(*map(torch.from_numpy, arguments)), strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def test_torch(benchmark: Any, arguments: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    benchmark.group = f"votes, 8 x {arguments[0].shape[1]}"
    benchmark(smoothing.votes, *map(torch.from_numpy, arguments))
