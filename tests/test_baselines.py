"""The baselines: fits that repeat, files, and the gradient that attacks need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import small_model
from parts import disc

from advrad_fast.errors import ConfigError, ImageError, ModelFileError, TrainingError
from advrad_fast.evaluation.baselines.autoencoder import Autoencoder, AutoencoderSettings, MeanSquaredError
from advrad_fast.evaluation.baselines.base import as_tensor
from advrad_fast.evaluation.baselines.purifier import Purifier

TINY = {"width": 8, "levels": 2, "latent": 4, "batch_size": 4, "filter_size": 3}


def discs(count: int, mark: int = 0, seed: int = 0) -> np.ndarray:
    """Drawn parts of 32 x 32, each with a bar that is ``mark`` grey levels brighter."""
    rng = np.random.default_rng(seed)
    images = np.stack([disc(rng, 32) for _ in range(count)]).astype(int)
    for image in images:
        top = int(rng.integers(8, 16))
        image[top : top + 4, 8:24] += mark
    return np.clip(images, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted() -> Autoencoder:
    found = Autoencoder(AutoencoderSettings(**{**TINY, "steps": 3}))
    found.fit(discs(6))
    return found


@pytest.mark.parametrize("epsilon", [0.0, 2 / 255])
def test_a_fit_is_repeatable_and_survives_its_file(tmp_path: Path, epsilon: float) -> None:
    first, again = (Autoencoder(AutoencoderSettings(**{**TINY, "steps": 2, "epsilon": epsilon})) for _ in range(2))
    first.fit(discs(6))
    again.fit(discs(6))
    images = discs(3, seed=3)
    first.save(tmp_path / "a.safetensors")
    loaded = Autoencoder.load(tmp_path / "a.safetensors")
    assert loaded.settings == first.settings and loaded.name == first.name
    for other in (again, loaded):
        np.testing.assert_array_equal(other.score_images(images), first.score_images(images))


def test_files_that_are_none(tmp_path: Path, fitted: Autoencoder) -> None:
    path = tmp_path / "a.safetensors"
    fitted.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    for file in (path, tmp_path / "nowhere"):
        with pytest.raises(ModelFileError, match="not an autoencoder's file"):
            Autoencoder.load(file)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(TrainingError, match="fit it first"):
        Autoencoder().score(torch.zeros(1, 3, 32, 32))
    with pytest.raises(TrainingError, match="multiples of 16"):
        Autoencoder().fit(np.zeros((2, 24, 32, 3), np.uint8))
    with pytest.raises(ImageError, match="images: expected uint8"):
        Autoencoder().fit(np.zeros((2, 32, 32, 3), np.float32))  # type: ignore[arg-type]


def test_the_plain_score(fitted: Autoencoder) -> None:
    images = discs(3, seed=3)
    plain = MeanSquaredError(fitted)
    assert plain.name == "autoencoder, mean squared error"
    with torch.no_grad():
        x = 2.0 * as_tensor(images) - 1.0
        wanted = (fitted._fitted()(x) - x).double().square().mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(plain.score_images(images), wanted, rtol=1e-4)
    maps = plain.maps(as_tensor(images).requires_grad_(True), torch.empty(3, 2, 0))
    assert maps.shape == (3, 2, 1, 1) and maps.requires_grad


def test_the_purifier(fitted: Autoencoder) -> None:
    purifier = Purifier.from_model(small_model(), fitted, timestep=60, steps=3)
    x = as_tensor(discs(2)).requires_grad_(True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = purifier.draw(generators, 4)
    assert noise.shape == (2, 4, 3, 3, 32, 32)
    maps = purifier.maps(x, noise)
    assert maps.shape == (2, 4, 32, 32)
    (gradient,) = torch.autograd.grad(maps.amax(dim=(2, 3)).sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().amax(dim=(1, 2, 3)).min()) > 0
    # Each image with each of its draws is what it is alone.
    alone = purifier.maps(x[1:].detach(), noise[1:, 2:3])
    torch.testing.assert_close(maps[1:, 2:3].detach(), alone, rtol=1e-4, atol=1e-4 * float(alone.max()))
    assert not torch.equal(maps[1, 0], maps[1, 1])


def test_a_purifier_that_cannot_be(fitted: Autoencoder) -> None:
    purifier = Purifier.from_model(small_model(), fitted, timestep=60, steps=3)
    with pytest.raises(ConfigError, match="a deterministic one"):
        Purifier.from_model(small_model(), purifier, timestep=60)
    with pytest.raises(ConfigError, match=r"steps: expected an integer in \[1, 61\]"):
        Purifier.from_model(small_model(), fitted, timestep=60, steps=62)
