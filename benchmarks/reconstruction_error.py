"""``python -m pytest benchmarks/reconstruction_error.py --benchmark-enable``: the operation beside its PyTorch form."""

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


@pytest.mark.parametrize("skip", [True, False], ids=["eps", "x0"])
def test_native(benchmark: Any, work: Work, skip: bool) -> None:
    benchmark.group = f"reconstruction_error, batch {len(work.images)}"
    benchmark(work.error, skip=skip)


def test_torch(benchmark: Any, work: Work) -> None:
    benchmark.group = f"reconstruction_error, batch {len(work.images)}"
    eps = torch.randn(work.outputs.shape)
    with torch.inference_mode():
        benchmark(work.torch_error, eps)
