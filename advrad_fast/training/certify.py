"""From a detector to one that certifies: what the smoothed detector needs at each sigma, without training anything.

Under lattice noise of deviation sigma the network runs at the timestep of sigma.  Everything that was fitted at the detector's
own k is fitted again there, on x + delta: the folded batch statistics, the score, its normal maps, the threshold.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast import _native as operations
from advrad_fast import backends, calibrate, lattice, schedule, voting
from advrad_fast.certify import least_ok_threshold
from advrad_fast.config import DetectorConfig, DiffusionConfig, ScoreConfig
from advrad_fast.errors import ConfigError, expected
from advrad_fast.evaluation.metrics import auroc
from advrad_fast.lattice import check_sigma
from advrad_fast.model import ModelFile
from advrad_fast.reference import diffusion, score, smoothing
from advrad_fast.reference.unet import UNet
from advrad_fast.smoothing import Smoothing, folded
from advrad_fast.training import fitting
from advrad_fast.training.batchnorm import fold, unfold
from advrad_fast.training.dataset import Split
from advrad_fast.training.synthetic import synthetic_defects

_log = logging.getLogger(__name__)

#: Sigmas that a model is made to certify at, in [0, 1] pixel units.
SIGMAS = (0.125, 0.25)

#: What is tried: filter sizes, each with the scales weighted equally by their spread and with every scale alone.
FILTER_SIZES = (3, 7, 11, 15, 21)
ALONE: tuple[fitting.Weights, ...] = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))

DRAWS = 21  # of which a calibration normal's median is
MAP_DRAWS = 200  # noised normals that mu and the spread are made of, at least
TRIAL_DRAWS = 6  # of every image that the score is chosen on
RADIUS_VOTES = 256  #: of every calibration normal, for a threshold at a radius

#: Image ids of the noise: ranges of their own, away from inspection's id 0.
_TRIAL, _MAPS, _CALIBRATION = 400_000, 500_000, 600_000
#: Seeds of the votes at a radius, from here on, one an image.
_RADIUS = 770_000


def add(
    model: ModelFile,
    split: Split,
    sigmas: Sequence[float] = SIGMAS,
    *,
    radius: float | None = None,
    alpha: float = 0.001,
    false_alarm_rate: float | None = None,
    seed: int = 0,
) -> ModelFile:
    """The model with what it takes to certify at each of ``sigmas``; what it had at the same sigma is replaced.

    The threshold is conformal over the calibration normals' medians, or over the least thresholds at which they are certified
    OK at ``radius``: :class:`advrad_fast.smoothing.Smoothing` says what that promises.  With a radius a sigma that the model has
    already keeps its score and maps; only its threshold is set anew (:func:`at_radius`).

    Args:
        split: normals as for :func:`advrad_fast.training.pipeline.fit`; the calibration ones must not have been trained on.
        radius: l2 in [0, 1] pixel units; None for thresholds over medians.
        alpha: of the certificates at ``radius``.
        false_alarm_rate: target of the thresholds; None for the model's.  Raised where there are too few calibration normals.
        seed: of the synthetic defects.

    Raises:
        ConfigError: a sigma is out of range, or :data:`RADIUS_VOTES` votes cannot certify the radius at it.
    """
    sigmas = check_sigmas(sigmas, model.config.diffusion)
    if radius is not None:
        for sigma in sigmas:  # what would fail at the end fails now
            check_radius(model.config, sigma, radius, alpha)
    rate = model.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
    attainable = calibrate.attainable_rate(len(split.calibration))
    if rate < attainable:
        _log.warning(
            "%d calibration images hold a false-alarm rate of %.3g at best, not %.3g", len(split.calibration), attainable, rate
        )
        rate = attainable
    made = {one.sigma: one for one in model.smoothing}
    for sigma in sigmas:
        if radius is None or sigma not in made:
            made[sigma] = fit(model, split, sigma, false_alarm_rate=rate, seed=seed)
        if radius is not None:
            made[sigma] = at_radius(model, made[sigma], split.calibration, radius, alpha=alpha, false_alarm_rate=rate)
    return dataclasses.replace(model, smoothing=tuple(made[sigma] for sigma in sorted(made)))


def fit(model: ModelFile, split: Split, sigma: float, *, false_alarm_rate: float, seed: int = 0) -> Smoothing:
    """What the smoothed detector needs at one sigma."""
    timestep = schedule.timestep_for_sigma(model.config.diffusion, sigma)
    config = dataclasses.replace(model.config, diffusion=dataclasses.replace(model.config.diffusion, timestep=timestep, draws=1))
    affine = refold(model, split.train, sigma)
    blank = Smoothing(sigma, config.score, model.mu, None, model.calibration_scores, DRAWS, false_alarm_rate, 0.0, affine)
    net = UNet(config.unet).eval()
    weights = blank.weights(config.unet, model.weights)  # as a backend will compute them
    net.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})

    chosen, found = select(net, split, config, sigma, seed=seed)
    maps = fitting.normal_maps(_error_maps(net, split.train, config, chosen, sigma), chosen)
    medians = np.sort([np.median(values) for values in draw_scores(net, split.calibration, config, chosen, maps, sigma)])
    _log.info(
        "sigma %.3g: k=%d, s=%d, scales weighted %s: AUROC %.4f of synthetic defects' lowest draw against normals' highest",
        sigma, timestep, chosen.filter_size, ", ".join(f"{w:.2f}" for w in chosen.scale_weights), found,
    )  # fmt: skip
    return dataclasses.replace(
        blank,
        score=chosen,
        mu=maps.mu.numpy(),
        spread=maps.spread.numpy(),
        calibration_scores=medians,
        threshold=calibrate.conformal_threshold(medians, false_alarm_rate),
    )


def at_radius(
    model: ModelFile,
    smoothing: Smoothing,
    normals: NDArray[np.uint8],
    radius: float,
    *,
    alpha: float = 0.001,
    false_alarm_rate: float,
    votes: int = RADIUS_VOTES,
    backend: str = "auto",
) -> Smoothing:
    """The same, with the threshold at which a new normal is certified OK at ``radius`` but for the false-alarm rate.

    Args:
        normals: uint8 (N, H, W, C), prepared, neither trained on nor chosen by.
        radius, alpha: of the certificates, as :meth:`advrad_fast.Detector.certify` will be asked for.
        votes: of each normal.  The promise is for certificates that may take as many, or more.
        backend: that draws them: the one that will certify.

    Raises:
        ConfigError: so many votes cannot certify the radius, or a number is out of range.
        CalibrationError: too few normals for the rate.
    """
    config, pixels = smoothing.config(model.config), check_radius(model.config, smoothing.sigma, radius, alpha, votes)
    engine = backends.create(backend, model.config, model.weights, model.mu, model.inverse_spread)
    drawn = engine.votes(
        config,
        smoothing.weights(model.config.unet, model.weights),
        smoothing.mu,
        smoothing.inverse_spread,
        sigma=smoothing.sigma,
    )
    found = []
    for i, image in enumerate(normals):
        scores = drawn.scores(np.ascontiguousarray(image), seed=_RADIUS + i, draws=votes)
        found.append(least_ok_threshold(scores, radius, sigma=smoothing.sigma, pixels=pixels, alpha=alpha))
    least_thresholds = np.sort(np.array(found, dtype=np.float64))  # none is None: check_radius has seen to that
    return dataclasses.replace(
        smoothing,
        calibration_scores=least_thresholds,
        draws=votes,
        false_alarm_rate=false_alarm_rate,
        threshold=calibrate.conformal_threshold(least_thresholds, false_alarm_rate),
        radius=float(radius),
        alpha=float(alpha),
    )


def check_radius(config: DetectorConfig, sigma: float, radius: float, alpha: float = 0.001, votes: int = RADIUS_VOTES) -> int:
    """The noised values an image has, where ``votes`` that all agree certify ``radius``, above 0; or a ConfigError."""
    size = config.image
    pixels = size.height * size.width * size.channels
    if voting.least_votes(radius, sigma, alpha, pixels=pixels, max_votes=votes) is None or not radius > 0.0:
        raise ConfigError(expected("radius", f"one above 0 that {votes} votes can certify at sigma {sigma:g}", radius))
    return pixels


def refold(model: ModelFile, normals: NDArray[np.uint8], sigma: float) -> NDArray[np.float32] | None:
    """The batch statistics at the timestep of ``sigma``, relative to those folded at k: float32 (2, channels), or None.

    A convolution's output has, over normals at k, the mean and the deviation that training gave it; those are measured, and
    folded again over normals under lattice noise.
    """
    names = folded(model.config.unet)
    if not names:
        return None
    config = model.config
    net = UNet(config.unet).eval()
    net.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in model.weights.items()})
    x, k = fitting.folding_batch(normals, config)
    trained = unfold(net, x, k)
    timestep = schedule.timestep_for_sigma(config.diffusion, sigma)
    chosen = normals[:: max(1, len(normals) // fitting.FOLDED)][: fitting.FOLDED]
    x = torch.cat([inputs for _, inputs in _noised(chosen, config, sigma, first_id=300_000, draws=1)])
    state = fold(trained, x, torch.full((len(x),), timestep)).state_dict()
    # The factor of a channel, from its largest weight: all of the channel's weights were scaled by it.
    factors, biases = [], []
    for name in names:
        before, after = torch.from_numpy(np.array(model.weights[f"{name}.weight"])).flatten(1), state[f"{name}.weight"].flatten(1)
        at = before.abs().argmax(dim=1, keepdim=True)
        largest = before.gather(1, at)
        factors.append(torch.where(largest == 0, 1.0, after.gather(1, at) / torch.where(largest == 0, 1.0, largest))[:, 0])
        biases.append(state[f"{name}.bias"])
    return torch.stack([torch.cat(factors), torch.cat(biases)]).numpy()


def select(net: UNet, split: Split, config: DetectorConfig, sigma: float, *, seed: int = 0) -> tuple[ScoreConfig, float]:
    """Choose the scales' weights and the filter at ``sigma``, on selection normals and synthetic defects made from them.

    A certificate asks that nearly all draws lie on one side of the threshold.  So the criterion is the AUROC of the defects'
    lowest score of :data:`TRIAL_DRAWS` draws against the normals' highest.

    Returns:
        the score, and its criterion.
    """
    normals = split.selection
    defects = synthetic_defects(normals, 2 * len(normals), seed)
    labels = np.r_[np.zeros(len(normals), dtype=int), np.ones(len(defects), dtype=int)]
    train = split.train[:: max(1, len(split.train) // fitting.FITTED)][: fitting.FITTED]
    trained = torch.cat(list(_scale_errors(net, train, config, sigma, first_id=_TRIAL, draws=-(-fitting.FITTED // len(train)))))
    candidates: list[ScoreConfig] = []
    maps: list[fitting.NormalMaps] = []
    for size in FILTER_SIZES:
        smooth = fitting.filtered(trained, size)
        for weights in (fitting.equal_weights(smooth), *ALONE):
            candidates.append(ScoreConfig(weights, size, spread=True))
            maps.append(fitting.normal_maps(fitting.error_maps(smooth, weights), candidates[-1]))
    lowest, highest = (np.empty((len(candidates), len(labels))) for _ in range(2))
    tests = np.concatenate([normals, defects])
    for i, errors in enumerate(_scale_errors(net, tests, config, sigma, first_id=_TRIAL + 10_000, draws=TRIAL_DRAWS)):
        smooths = {size: fitting.filtered(errors, size) for size in FILTER_SIZES}
        for j, (candidate, normal) in enumerate(zip(candidates, maps, strict=True)):
            error = fitting.error_maps(smooths[candidate.filter_size], candidate.scale_weights)
            values = fitting.scores(error, normal)
            lowest[j, i], highest[j, i] = values.min(), values.max()
    found = [auroc(labels, np.where(labels == 1, lowest[j], highest[j])) for j in range(len(candidates))]
    best = int(np.argmax(found))
    return candidates[best], found[best]


def draw_scores(
    net: UNet, images: NDArray[np.uint8], config: DetectorConfig, chosen: ScoreConfig, maps: fitting.NormalMaps, sigma: float
) -> Iterator[NDArray[np.float64]]:
    """:data:`DRAWS` scores A(x + delta) of every image."""
    for errors in _scale_errors(net, images, config, sigma, first_id=_CALIBRATION, draws=DRAWS):
        yield fitting.scores(score.error_map(errors, chosen), maps)


def _error_maps(net: UNet, images: NDArray[np.uint8], config: DetectorConfig, chosen: ScoreConfig, sigma: float) -> Tensor:
    draws = math.ceil(MAP_DRAWS / len(images))
    errors = _scale_errors(net, images, config, sigma, first_id=_MAPS, draws=draws)
    return torch.cat([score.error_map(some, chosen) for some in errors])


@torch.inference_mode()
def _scale_errors(
    net: UNet, images: NDArray[np.uint8], config: DetectorConfig, sigma: float, *, first_id: int, draws: int
) -> Iterator[Tensor]:
    """Err_l between x + delta and its reconstruction, image by image: float32 (draws, 4, H, W)."""
    c = diffusion.coefficients_at(config)
    for x, inputs in _noised(images, config, sigma, first_id=first_id, draws=draws):
        outputs = torch.cat([net(some, torch.full((len(some),), config.diffusion.timestep)) for some in torch.split(inputs, 8)])
        yield score.scale_errors(x, c.skip * c.signal * x + c.out * outputs)


def _noised(
    images: NDArray[np.uint8], config: DetectorConfig, sigma: float, *, first_id: int, draws: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """x + delta, and the network's inputs, image by image: float32 (draws, C, H, W) each."""
    timestep = schedule.timestep_for_sigma(config.diffusion, sigma)
    c = diffusion.coefficients_at(config, timestep)
    table = operations.Lattice(lattice.thresholds(sigma))
    for i, image in enumerate(images):
        # The integers of smoothing.draw_lattice_noise, which take NumPy as long as a colour image takes the network.
        one = first_id + i
        rows = [operations.lattice_noise(image.size, table, seed=fitting.FIT_SEED, draw=d, image_id=one) for d in range(draws)]
        z = torch.from_numpy(np.stack(rows)).reshape(draws, image.shape[2], *image.shape[:2])
        frame = torch.from_numpy(image[None])
        yield smoothing.smoothed(frame, z), smoothing.lattice_inputs(frame, z, c)


def check_sigmas(sigmas: Sequence[float], config: DiffusionConfig) -> tuple[float, ...]:
    """Sigmas of the lattice and the schedule, rising, each once; or a ConfigError."""
    checked = tuple(sorted({check_sigma(sigma) for sigma in sigmas}))
    for sigma in checked:
        schedule.timestep_for_sigma(config, sigma)
    return checked
