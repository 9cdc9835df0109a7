"""GANomaly and DRAEM around a stand-in for anomalib, and around anomalib where it is installed (slow: its import alone is)."""

from __future__ import annotations

import anomalib_stub
import numpy as np
import pytest
import torch
from test_baselines import discs

from advrad_fast.errors import ConfigError, TrainingError
from advrad_fast.evaluation.attacks.pgd import PGD, pgd
from advrad_fast.evaluation.baselines.anomalib import AnomalibSettings, Draem, Ganomaly
from advrad_fast.evaluation.baselines.base import as_tensor
from advrad_fast.evaluation.rows import Budget

TINY = AnomalibSettings(width=2, steps=2, batch_size=2)
KINDS = (Ganomaly, Draem)


@pytest.fixture(params=["stand-in", pytest.param("anomalib", marks=pytest.mark.slow)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "stand-in":
        anomalib_stub.install(monkeypatch)
    else:
        pytest.importorskip("anomalib.models")


@pytest.mark.filterwarnings("ignore")  # anomalib's own libraries warn of one another
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
def test_fits_repeat_and_scores_have_a_gradient(kind: type[Ganomaly | Draem]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (kind(AnomalibSettings(**{**TINY.to_json(), "seed": seed})) for seed in (0, 0, 1))
    for detector in (first, again, other):
        detector.fit(discs(4))
    assert torch.equal(torch.get_rng_state(), before)
    images = discs(3, seed=3)[..., :1]
    if kind is Ganomaly:  # its network has as many channels as what it was trained on
        images = np.repeat(images, 3, axis=3)
    scores = first.score_images(images)
    np.testing.assert_array_equal(again.score_images(images), scores)
    assert not np.array_equal(other.score_images(images), scores)
    x = as_tensor(images).requires_grad_(True)
    maps = first.maps(x, torch.empty(3, 2, 0))
    assert maps.shape == ((3, 2, 1, 1) if kind is Ganomaly else (3, 2, 32, 32)) and bool((maps >= 0).all())
    np.testing.assert_allclose(maps.amax(dim=(2, 3)).detach().numpy(), np.stack([scores] * 2, axis=1), rtol=1e-3)
    (gradient,) = torch.autograd.grad(maps.sum(), x)
    assert float(gradient.abs().amax(dim=(1, 2, 3)).min()) > 0
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    found = pgd(first, images, [0, 1, 0], Budget.parse("linf 8/255"), PGD(5, 1, checks=1), generators=generators)  # type: ignore[arg-type]
    assert np.all((first.score_images(found.rounded) - scores) * [1, -1, 1] > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_fitted(kind: type[Ganomaly | Draem], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="fit it first"):
        kind().score(torch.zeros(1, 3, 32, 32))
    anomalib_stub.install(monkeypatch)
    with pytest.raises(TrainingError, match="images: expected"):
        kind(TINY).fit(np.zeros((2, 8, 8, 3), np.uint8))
    monkeypatch.setattr(anomalib_stub.GeneratorLoss, "forward", lambda *a: a[1].sum() * torch.nan)
    monkeypatch.setattr(anomalib_stub.DraemLoss, "forward", lambda *a: a[4].sum() * torch.nan)
    with pytest.raises(TrainingError, match="the loss became nan"):
        kind(TINY).fit(discs(2))
    anomalib_stub.remove(monkeypatch)
    with pytest.raises(TrainingError, match=r"anomalib is not installed; needed here: pip install 'advrad-fast\[baselines\]'"):
        kind(TINY).fit(discs(2))


def test_settings_that_cannot_be() -> None:
    for name, value in (("width", 3), ("steps", 0), ("batch_size", 1), ("learning_rate", 0.0), ("seed", -1)):
        with pytest.raises(ConfigError, match=f"{name}: expected"):
            AnomalibSettings(**{name: value})  # type: ignore[arg-type]
