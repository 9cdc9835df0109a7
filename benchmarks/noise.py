"""``python -m pytest benchmarks/noise.py --benchmark-enable``: the fused operation ``noise`` beside its PyTorch form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advrad_fast.bench.operations import BATCHES, Work


@pytest.fixture(scope="module", params=BATCHES)
def work(request: pytest.FixtureRequest) -> Work:
    checked = Work(request.param, 1, torch.get_num_threads())
    checked.check()  # no figure without parity
    return checked


@pytest.mark.parametrize("noise", ["gaussian", "lattice"])
def test_native(benchmark: Any, work: Work, noise: str) -> None:
    benchmark.group = f"noise, batch {len(work.images)}"
    benchmark(work.noise, work.table if noise == "lattice" else None)


def test_torch(benchmark: Any, work: Work) -> None:
    benchmark.group = f"noise, batch {len(work.images)}"
    with torch.inference_mode():
        benchmark(lambda: work.torch_noise(torch.randn(work.outputs.shape)))
