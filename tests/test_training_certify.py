"""What a model needs to certify, fitted without training: folded statistics, score, maps, threshold."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import disc, scratched

from advrad_fast import Detector, ModelFile, calibrate
from advrad_fast.certify import least_ok_threshold
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, ScoreConfig, UNetConfig
from advrad_fast.errors import ConfigError
from advrad_fast.reference.unet import UNet
from advrad_fast.smoothing import folded
from advrad_fast.training import certify, fitting
from advrad_fast.training.batchnorm import fold, training_network, unfold
from advrad_fast.training.dataset import Split
from advrad_fast.training.pipeline import fit

UNET = UNetConfig(base_channels=8, channel_mult=(1, 2), norm_groups=0, prediction="x0")
CONFIG = DetectorConfig(UNET, DiffusionConfig(timestep=50), ScoreConfig(filter_size=7), ImageConfig(32, 32))
_rng = np.random.default_rng(0)
SPLIT = Split(*(np.stack([disc(_rng, 32) for _ in range(n)]) for n in (16, 6, 19)), "hash")


def trained() -> UNet:
    """A training network with statistics of its own: some gains are negative, as training leaves them."""
    torch.manual_seed(0)
    net = training_network(UNET)
    for name, parameter in net.named_parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3 if parameter.dim() == 1 else 0.15)
        if name.endswith(("time1.weight", "time2.weight")):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return net


def model(sigmas: tuple[float, ...] = (), *, half: bool = False) -> ModelFile:
    options = {"half": half, "seed": 0, "timesteps": [50], "provenance": {}, "false_alarm_rate": 0.1, "chosen": lambda c: c}
    return fit(trained().state_dict(), SPLIT, CONFIG, certify=sigmas, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def certifiable() -> ModelFile:
    return model((0.25, 0.125))


def test_unfold_is_the_inverse_of_fold() -> None:
    net = trained()
    x, k = fitting.folding_batch(SPLIT.train, CONFIG)
    again = unfold(fold(net, x, k), x, k)
    t = torch.full((4,), 160)
    with torch.inference_mode():
        difference = (again(x[:4] * 0.7, t) - net(x[:4] * 0.7, t)).abs().max()
        apart = (fold(net, x, k)(x[:4] * 0.7, t) - net(x[:4] * 0.7, t)).abs().max()
    # Only the epsilon of the normalisation differs.  Worst seen: 0.002, where the folded network itself is 1.7 away.
    assert difference < 0.008 < 0.1 * apart


def test_the_weights_at_a_sigma_are_those_that_training_would_fold(certifiable: ModelFile) -> None:
    """From the folded weights alone: what folding the trained network itself at the timestep of sigma gives."""
    for smoothing in certifiable.smoothing:
        config = smoothing.config(CONFIG)
        inputs = certify._noised(SPLIT.train, CONFIG, smoothing.sigma, first_id=300_000, draws=1)
        x = torch.cat([row for _, row in inputs])
        wanted = fold(trained(), x, torch.full((len(x),), config.diffusion.timestep)).state_dict()
        got = smoothing.weights(UNET, certifiable.weights)
        for name, tensor in wanted.items():
            assert np.abs(got[name] - tensor.numpy()).max() <= 2e-3 * tensor.abs().max().item() + 1e-6, name
        moved = [np.abs(got[f"{n}.bias"] - certifiable.weights[f"{n}.bias"]).max() for n in folded(UNET)]
        assert max(moved) > 0.05


def test_what_is_fitted(certifiable: ModelFile, tmp_path: Path) -> None:
    assert certifiable.sigmas == (0.125, 0.25)
    for smoothing in certifiable.smoothing:
        assert len(smoothing.calibration_scores) == 19 and smoothing.draws == certify.DRAWS
        assert smoothing.false_alarm_rate == 0.1
        assert smoothing.threshold == calibrate.conformal_threshold(smoothing.calibration_scores, 0.1)
        assert smoothing.score.spread and smoothing.score.filter_size in certify.FILTER_SIZES
    certifiable.save(tmp_path / "a")
    detector = Detector.load(tmp_path / "a", backend="cpu", precision="fp32", threads=1, cache_dir=False)
    # Runtime scores of calibration normals are distributed as those calibrated: the medians' range covers theirs.
    smoothing = certifiable.smoothing[1]
    medians = [
        float(np.median(detector.smoothed_scores(image, 21, sigma=0.25, seed=i))) for i, image in enumerate(SPLIT.calibration)
    ]
    assert np.median(medians) == pytest.approx(np.median(smoothing.calibration_scores), rel=0.1)
    assert sum(m > smoothing.threshold for m in medians) <= 5


def test_calibrated_scores_are_the_runtimes(certifiable: ModelFile) -> None:
    """The same draws through the plain backend give the very medians."""
    smoothing = certifiable.smoothing[0]
    config = smoothing.config(CONFIG)
    net = UNet(UNET).eval()
    weights = smoothing.weights(UNET, certifiable.weights)
    net.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    maps = fitting.NormalMaps(torch.from_numpy(np.array(smoothing.mu)), torch.from_numpy(np.array(smoothing.spread)))
    rows = list(certify.draw_scores(net, SPLIT.calibration, config, smoothing.score, maps, smoothing.sigma))
    np.testing.assert_allclose(np.sort([np.median(r) for r in rows]), smoothing.calibration_scores, rtol=1e-6)
    votes = Detector(certifiable, backend="reference")._votes(smoothing)
    z = certify.smoothing.draw_lattice_noise((3, 32, 32), smoothing.sigma, seed=fitting.FIT_SEED, draws=3, image_ids=[600_000])
    draws = iter(z)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advrad_fast.backends.reference.lattice.integers", lambda *a, **k: next(draws).numpy().reshape(-1))
        got = votes.scores(SPLIT.calibration[0], seed=0, draws=3)
    np.testing.assert_allclose(got, rows[0][:3], rtol=2e-5)


def test_half_precision_keeps_the_base_weights_alone_in_half(tmp_path: Path) -> None:
    made = model((0.25,), half=True)
    made.save(tmp_path / "a", half=True)
    loaded = ModelFile.load(tmp_path / "a")
    for a, b in zip(made.smoothing, loaded.smoothing, strict=True):
        wanted, got = a.weights(UNET, made.weights), b.weights(UNET, loaded.weights)
        assert all(np.array_equal(wanted[name], got[name]) for name in wanted)


def test_adding_to_a_model_replaces_the_same_sigma(certifiable: ModelFile, caplog: pytest.LogCaptureFixture) -> None:
    more = certify.add(certifiable, SPLIT, [0.25, 0.5], false_alarm_rate=0.2)
    assert more.sigmas == (0.125, 0.25, 0.5)
    assert [s.false_alarm_rate for s in more.smoothing] == [0.1, 0.2, 0.2]
    assert more.smoothing[1].threshold < certifiable.smoothing[1].threshold
    np.testing.assert_array_equal(more.smoothing[1].mu, certifiable.smoothing[1].mu)  # fitted again, to the same
    assert more.weights.keys() == certifiable.weights.keys()
    with caplog.at_level(logging.WARNING):
        few = dataclasses.replace(SPLIT, calibration=SPLIT.calibration[:4])
        assert certify.add(certifiable, few, [0.25]).smoothing[1].false_alarm_rate == 0.2
    assert "4 calibration images hold a false-alarm rate of 0.2 at best" in caplog.text
    assert certify.add(certifiable, SPLIT, []).sigmas == certifiable.sigmas


def test_a_threshold_for_a_radius(certifiable: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVRAD_CACHE", str(tmp_path / "cache"))
    made = certify.add(certifiable, SPLIT, [0.25], radius=0.1, alpha=0.01)
    plain, other, smoothing = certifiable.smoothing[1], made.smoothing[0], made.smoothing[1]
    np.testing.assert_array_equal(smoothing.mu, plain.mu)  # not fitted again
    assert other.document() == certifiable.smoothing[0].document()
    assert (smoothing.radius, smoothing.alpha, smoothing.draws, smoothing.false_alarm_rate) == (0.1, 0.01, 256, 0.1)
    assert smoothing.threshold == calibrate.conformal_threshold(smoothing.calibration_scores, 0.1) > plain.threshold
    made.save(tmp_path / "a")
    loaded = ModelFile.load(tmp_path / "a")
    assert loaded.smoothing[1].document() == smoothing.document() and loaded.fingerprint == made.fingerprint
    assert loaded.with_false_alarm_rate(0.2).smoothing[1].threshold < smoothing.threshold
    # With the very noise of the calibration, each is certified OK just where its score says.
    detector = Detector(loaded, threads=1, cache_dir=False)
    for i, image in enumerate(SPLIT.calibration[:4]):
        seed = certify._RADIUS + i
        scores = detector.smoothed_scores(image, 256, sigma=0.25, seed=seed)
        least = calibrate_least(scores)
        assert least in smoothing.calibration_scores
        for threshold, outcome in ((least, "OK"), (float(np.nextafter(least, 0.0)), "ABSTAIN")):
            options = {"sigma": 0.25, "alpha": 0.01, "seed": seed, "threshold": threshold, "max_votes": 256}
            assert detector.certify(image, 0.1, **options).outcome == outcome  # type: ignore[arg-type]


def calibrate_least(scores: np.ndarray) -> float:
    least = least_ok_threshold(scores, 0.1, sigma=0.25, pixels=32 * 32 * 3, alpha=0.01)
    assert least is not None
    return least


@pytest.mark.parametrize("radius", [0.0, -0.1, 2.0, float("nan")])
def test_radii_that_so_few_votes_cannot_certify(certifiable: ModelFile, radius: float) -> None:
    with pytest.raises(ConfigError, match="radius: expected"):
        certify.add(certifiable, SPLIT, [0.125], radius=radius)


@pytest.mark.parametrize("sigmas", [[0.0], [3.0], ["0.25"], [True]])
def test_sigmas_that_are_refused(certifiable: ModelFile, sigmas: list[float]) -> None:
    with pytest.raises(ConfigError, match="sigma: expected"):
        certify.add(certifiable, SPLIT, sigmas)


def test_a_network_with_a_norm_of_its_own_needs_no_factors() -> None:
    unet = dataclasses.replace(UNET, norm_groups=4)
    torch.manual_seed(0)
    options = {"half": False, "seed": 0, "timesteps": [50], "provenance": {}, "false_alarm_rate": 0.1, "chosen": lambda c: c}
    config = dataclasses.replace(CONFIG, unet=unet)
    made = fit(UNet(unet).state_dict(), SPLIT, config, certify=(0.25,), **options)  # type: ignore[arg-type]
    assert made.smoothing[0].affine is None


def test_defects_that_noise_does_not_hide_are_certified() -> None:
    """Through and through: a network that returns grey sees a scratch as it is, and so do nearly all draws."""
    options = {"half": True, "seed": 0, "timesteps": [50], "provenance": {}, "false_alarm_rate": 0.1, "chosen": lambda c: c}
    blank = {name: torch.zeros_like(tensor) for name, tensor in training_network(UNET).state_dict().items()}
    made = fit(blank, SPLIT, CONFIG, certify=(0.125,), **options)  # type: ignore[arg-type]
    detector = Detector(made, backend="cpu", precision="fp32", threads=1, cache_dir=False)
    rng = np.random.default_rng(9)
    bad = [detector.certify(scratched(rng, 32), 0.1, seed=i) for i in range(4)]
    good = [detector.certify(disc(rng, 32), 0.1, seed=i, threshold=2 * made.smoothing[0].threshold) for i in range(4)]
    assert [c.outcome for c in bad].count("DEFECT") >= 3  # where the part itself is bright a scratch is nothing to it
    assert [c.outcome for c in good] == ["OK"] * 4


def test_the_noise_of_fitting_is_the_plain_stream() -> None:
    pairs = list(certify._noised(SPLIT.train[:2], CONFIG, 0.25, first_id=7, draws=3))
    for i, (x, _) in enumerate(pairs):
        z = certify.smoothing.draw_lattice_noise((3, 32, 32), 0.25, seed=fitting.FIT_SEED, draws=3, image_ids=[7 + i])
        assert torch.equal(x, certify.smoothing.smoothed(torch.from_numpy(SPLIT.train[i : i + 1]), z))
