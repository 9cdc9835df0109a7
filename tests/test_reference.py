"""The reference against things not derived from it: closed forms for Gaussian data, SciPy and scikit-image."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.ndimage
import torch
from skimage.measure import block_reduce

from advrad_fast import schedule
from advrad_fast.config import SCALES, DetectorConfig, DiffusionConfig, ImageConfig, Prediction, ScoreConfig, UNetConfig
from advrad_fast.errors import ConfigError
from advrad_fast.reference import diffusion, score
from advrad_fast.reference.unet import UNet, timestep_embedding

SHAPE = (1, 8, 8)
PIXELS = 64


def settings(prediction: Prediction = "eps", timestep: int = 100) -> DetectorConfig:
    unet = UNetConfig(in_channels=1, base_channels=8, channel_mult=(1,), norm_groups=4, patch=1, prediction=prediction)
    return DetectorConfig(unet, DiffusionConfig(timestep=timestep), ScoreConfig(), ImageConfig(8, 8, 1))


class GaussianData:
    """Images x ~ N(mean, covariance), correlated between pixels, and the exact optimal network for them."""

    def __init__(self, config: DetectorConfig) -> None:
        rng = np.random.default_rng(0)
        factor = rng.normal(size=(PIXELS, PIXELS)) * 0.06
        self.config = config
        self.mean = torch.tensor(rng.uniform(-0.5, 0.5, PIXELS))
        self.covariance = torch.tensor(factor @ factor.T + 0.01 * np.eye(PIXELS))

    def gain(self, bar: float) -> torch.Tensor:
        """K with E[x | x_t] = mean + K (x_t - sqrt(bar) mean): normal-normal conditioning."""
        total = bar * self.covariance + (1 - bar) * torch.eye(PIXELS, dtype=torch.float64)
        return bar**0.5 * self.covariance @ torch.linalg.inv(total)

    def posterior_mean(self, x_t: torch.Tensor, bar: float) -> torch.Tensor:
        flat = x_t.reshape(-1, PIXELS)
        return (self.mean + (flat - bar**0.5 * self.mean) @ self.gain(bar).T).reshape(x_t.shape)

    def posterior_covariance(self, bar: float) -> torch.Tensor:
        return self.covariance - bar**0.5 * self.gain(bar) @ self.covariance

    def network(self, scaled: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The optimal output for the configured parametrisation, written out case by case from its definition."""
        t = int(timesteps[0])
        bar = float(schedule.alpha_bar(self.config.diffusion)[t])
        kind, d = self.config.unet.prediction, self.config.unet.sigma_data
        s = ((1 - bar) / bar) ** 0.5
        x_t = scaled * bar**0.5 * (s * s + d * d) ** 0.5 if kind == "edm" else scaled
        x0 = self.posterior_mean(x_t, bar)
        eps = (x_t - bar**0.5 * x0) / (1 - bar) ** 0.5
        if kind == "eps":
            return eps
        if kind == "x0":
            return x0
        if kind == "v":
            return bar**0.5 * eps - (1 - bar) ** 0.5 * x0
        return (x0 - d * d / (s * s + d * d) * x_t / bar**0.5) / (s * d / (s * s + d * d) ** 0.5)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        root = torch.linalg.cholesky(self.covariance)
        z = torch.randn((n, PIXELS), generator=generator, dtype=torch.float64)
        return (self.mean + z @ root.T).reshape(n, *SHAPE)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
@pytest.mark.parametrize("timestep", [1, 100, 400])
def test_one_shot_is_the_posterior_mean(prediction: Prediction, timestep: int) -> None:
    """With the optimal network Algorithm 1 gives E[x | x_k], whatever the parametrisation."""
    config = settings(prediction, timestep)
    data = GaussianData(config)
    g = torch.Generator().manual_seed(1)
    x = data.sample(16, g)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    bar = float(schedule.alpha_bar(config.diffusion)[timestep])
    wanted = data.posterior_mean(bar**0.5 * x + (1 - bar) ** 0.5 * eps, bar)
    got = diffusion.one_shot(data.network, x, eps, config)
    # Worst seen 1.4e-15 (eps, t = 400); factor 10.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1.4e-14)


def test_one_shot_error_is_the_posterior_variance() -> None:
    """E ||x - x~||^2 over data and noise is the trace of the posterior covariance."""
    config = settings()
    data = GaussianData(config)
    g = torch.Generator().manual_seed(2)
    x = data.sample(8_000, g)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    squares = (x - diffusion.one_shot(data.network, x, eps, config)).square().sum(dim=(1, 2, 3))
    bar = float(schedule.alpha_bar(config.diffusion)[100])
    wanted = float(data.posterior_covariance(bar).trace())
    error = float(squares.std()) / len(squares) ** 0.5
    assert abs(float(squares.mean()) - wanted) < 4 * error
    assert error < 0.01 * wanted  # the bound means something


def test_scale_errors_have_their_expectation() -> None:
    """E[Err_l] in a cell is the posterior variance of the cell's mean: the pooling commutes with the closed form."""
    config = settings()
    data = GaussianData(config)
    g = torch.Generator().manual_seed(3)
    x = data.sample(8_000, g)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    errors = score.scale_errors(x, diffusion.one_shot(data.network, x, eps, config))
    posterior = data.posterior_covariance(float(schedule.alpha_bar(config.diffusion)[100])).numpy()
    for level, scale in enumerate(SCALES):
        pool = np.zeros((PIXELS // scale**2, PIXELS))
        for i in range(PIXELS):
            pool[(i // 8 // scale) * (8 // scale) + i % 8 // scale, i] = 1 / scale**2
        wanted = np.diag(pool @ posterior @ pool.T).reshape(8 // scale, 8 // scale).repeat(scale, 0).repeat(scale, 1)
        seen = errors[:, level].numpy()
        bound = 5 * seen.std(axis=0) / len(seen) ** 0.5
        assert (np.abs(seen.mean(axis=0) - wanted) < bound).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 101])
def test_any_number_of_shots_keeps_the_posterior_mean(steps: int) -> None:
    """Ancestral steps are linear in x~, so with the optimal network the mean over their noise is E[x | x_k] exactly."""
    config = settings()
    data = GaussianData(config)
    g = torch.Generator().manual_seed(4)
    x = data.sample(1, g)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    many = diffusion.arbitrary_shot(data.network, x.expand(1500, *SHAPE), eps.expand(1500, *SHAPE), config, steps, g)
    bar = float(schedule.alpha_bar(config.diffusion)[100])
    wanted = data.posterior_mean(bar**0.5 * x + (1 - bar) ** 0.5 * eps, bar)[0]
    bound = 5 * many.std(dim=0) / len(many) ** 0.5 + 1e-12
    assert ((many.mean(dim=0) - wanted).abs() < bound).all()


def test_full_shot_samples_the_posterior() -> None:
    """Down the whole schedule, Algorithm 2 draws from p(x | x_k): its variance is the posterior's, not the one-shot's zero.

    DDPM's fixed variance is exact for small steps only: 3.2 to 4.0 % short here over four seeds; the bound is twice that.
    """
    config = settings()
    data = GaussianData(config)
    g = torch.Generator().manual_seed(5)
    x = data.sample(1, g)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    many = diffusion.full_shot(data.network, x.expand(1500, *SHAPE), eps.expand(1500, *SHAPE), config, g)
    total = float(many.var(dim=0).sum())
    wanted = float(data.posterior_covariance(float(schedule.alpha_bar(config.diffusion)[100])).trace())
    assert 0.92 < total / wanted < 1.04


def test_one_step_of_algorithm_3_is_algorithm_1() -> None:
    config = settings()
    data = GaussianData(config)
    g = torch.Generator().manual_seed(6)
    x = data.sample(3, g)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    assert torch.equal(
        diffusion.arbitrary_shot(data.network, x, eps, config, 1), diffusion.one_shot(data.network, x, eps, config)
    )


@pytest.mark.parametrize("steps", [0, 102, -1])
def test_steps_out_of_range(steps: int) -> None:
    config = settings()
    x = torch.zeros((1, *SHAPE))
    with pytest.raises(ConfigError, match="steps"):
        diffusion.arbitrary_shot(lambda x, t: x, x, x, config, steps)


def test_scale_errors_against_scikit_image() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, 2, 3, 40, 24))
    got = score.scale_errors(torch.tensor(x), torch.tensor(y)).numpy()
    for n in range(2):
        for level, scale in enumerate(SCALES):
            down = [block_reduce(z[n], (1, scale, scale), np.mean) for z in (x, y)]
            wanted = ((down[0] - down[1]) ** 2).mean(axis=0).repeat(scale, 0).repeat(scale, 1)
            np.testing.assert_allclose(got[n, level], wanted, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 15, 63])
def test_mean_filter_against_scipy(size: int) -> None:
    maps = np.random.default_rng(8).normal(size=(2, 1, 40, 24))
    got = score.mean_filter(torch.tensor(maps), size).numpy()
    for n in range(2):
        total = scipy.ndimage.uniform_filter(maps[n, 0], size, mode="constant")
        inside = scipy.ndimage.uniform_filter(np.ones((40, 24)), size, mode="constant")
        np.testing.assert_allclose(got[n, 0], total / inside, rtol=1e-9, atol=1e-12)


def test_score_is_the_maximum_deviation_from_normal() -> None:
    """Algorithm 4 by hand: a reconstruction that differs in one 8 x 8 cell."""
    config = ScoreConfig(filter_size=1)
    errors = torch.zeros((1, 4, 16, 16))
    errors[0, :, 8:, 8:] = 0.4
    mu = torch.full((16, 16), 0.1)
    spread = torch.full((16, 16), 2.0)
    maps = score.anomaly_map(score.error_map(errors, config), mu, 1 / spread)
    assert maps[0, 12, 12] == pytest.approx((0.4 - 0.1) / 2)
    assert maps[0, 0, 0] == pytest.approx(0.1 / 2)  # the deviation counts both ways


def test_fused_form_equals_its_parts() -> None:
    config = dataclasses.replace(settings("edm"), score=ScoreConfig((0.1, 0.2, 0.3, 0.4), 3, True))
    g = torch.Generator().manual_seed(9)
    images = torch.randint(0, 256, (2, 8, 8, 1), generator=g).to(torch.uint8)
    eps = torch.randn((4, *SHAPE), generator=g)
    net = UNet(config.unet)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    c = diffusion.coefficients_at(config)
    with torch.no_grad():
        outputs = net(diffusion.noise(images, eps, c), torch.full((4,), 100))
        x = diffusion.normalise(images).repeat_interleave(2, dim=0)
        x_tilde = diffusion.one_shot(net, x, eps, config)
    mu, inverse = torch.rand((8, 8), generator=g), torch.rand((8, 8), generator=g) + 0.5
    scores, maps = score.reconstruction_error(images, outputs, eps, mu, inverse, config.score, c)
    errors = score.scale_errors(x, x_tilde).reshape(2, 2, 4, 8, 8).mean(dim=1)
    wanted = score.anomaly_map(score.error_map(errors, config.score), mu, inverse)
    torch.testing.assert_close(maps, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, wanted.flatten(1).max(dim=1).values, rtol=1e-4, atol=1e-5)


def test_unet_is_identity_on_shapes_and_depends_on_the_timestep() -> None:
    config = UNetConfig(base_channels=16, channel_mult=(1, 2), norm_groups=8, patch=2, attention_resolutions=(4,), num_heads=2)
    torch.manual_seed(0)
    net = UNet(config)
    x = torch.randn(2, 3, 16, 24)
    assert net(x, torch.tensor([0, 500])).shape == x.shape
    assert net(x, torch.tensor([0, 500])).abs().max() == 0.0  # the head starts at zero
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        assert not torch.allclose(net(x, torch.tensor([0, 0])), net(x, torch.tensor([500, 500])))


def test_timestep_embedding_by_hand() -> None:
    got = timestep_embedding(torch.tensor([3]), 5)[0]
    wanted = [np.cos(3), np.cos(3 * 0.01), np.sin(3), np.sin(3 * 0.01), 0.0]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-6)
