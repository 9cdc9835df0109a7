"""One call from a folder of good parts to a model file."""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast import __version__, calibrate, schedule
from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, UNetConfig
from advrad_fast.errors import ConfigError, TrainingError, expected
from advrad_fast.evaluation.datasets import Dataset, load_dataset
from advrad_fast.model import ModelFile, Scalar, round_to_half
from advrad_fast.reference.unet import UNet
from advrad_fast.selftest_record import with_self_test
from advrad_fast.training import certify as certification
from advrad_fast.training import fitting, tiles
from advrad_fast.training.batchnorm import training_network
from advrad_fast.training.dataset import Align, Split, image_config, load_samples, load_split
from advrad_fast.training.settings import Preset, TrainSettings, preset, replace
from advrad_fast.training.tiles import Tiled, load_tiles
from advrad_fast.training.trainer import Trainer, distributed

_log = logging.getLogger(__name__)

#: The false-alarm rate a model is made for, unless there are too few normals for it.
FALSE_ALARM_RATE = 0.05

#: Below this many input pixels the ``fast`` preset can afford a finer stem.
_FINE_STEM_PIXELS = 40_000


def train(
    data: str | Path | Dataset,
    out: str | Path,
    *,
    preset_name: str = "fast",
    size: int = 256,
    align: Align = "auto",
    grey: bool | None = None,
    brightness: float | None = None,
    false_alarm_rate: float = FALSE_ALARM_RATE,
    draws: int | None = None,
    prediction: str | None = None,
    patch: int | None = None,
    unet: Mapping[str, object] | None = None,
    half: bool = True,
    progress: bool = True,
    settings: dict[str, object] | None = None,
    note: str | None = None,
    certify: Sequence[float] | None = None,
    certify_radius: float | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    fixed: bool = False,
) -> ModelFile | None:
    """Train a detector on a folder of good parts and write its model file.

    An interrupted run goes on where its checkpoint (``<out>.checkpoint``, removed at the end) stands when called again.

    Args:
        data: a folder in MVTec AD layout, any folder of good images, or what ``load_dataset`` made of any layout.
        out: the model file to write.
        preset_name: ``fast`` or ``paper``.
        size, align, brightness: :func:`advrad_fast.training.dataset.image_config`.
        grey: one channel instead of three; None: where every sampled image is grey.
        false_alarm_rate: target of the threshold; raised to 1 / (n + 1) where n calibration normals allow no less.
        draws, prediction, patch: changes to the preset's network and detector.
        unet: further changes to the preset's :class:`UNetConfig`, by field.
        half: store the weights in fp16, for a file half as large.
        settings: changes to the preset's :class:`TrainSettings`.
        note: stored in the model file (a licence, an origin).
        certify: sigmas to certify at (:mod:`advrad_fast.training.certify`); None for those of
            :data:`advrad_fast.training.certify.SIGMAS` whose timesteps are trained on; none with ``tile``.
        certify_radius: set their thresholds so that good parts are certified OK at this radius, at alpha 0.001; None: so that the
            smoothed detector takes them for good.
        tile: train on square tiles of this side, cut from the images at their own resolution, and make a model that inspects
            whole frames in such tiles; ``size`` and ``align`` do not count then.
        overlap, fixed: with ``tile``: :class:`advrad_fast.training.tiles.Tiled`.

    Returns:
        the model, or None in the processes of a ``torchrun`` other than the first.

    Raises:
        DatasetError, ImageError, ConfigError, TrainingError: as their names say; nothing is written at ``out``.
    """
    out = Path(out)
    chosen = preset(preset_name)
    train_settings = replace(chosen.settings, **(settings or {}))
    # What would fail at the end fails now.
    if not out.absolute().parent.is_dir():
        raise TrainingError(f"{out}: its folder does not exist")
    calibrate.normals_needed(false_alarm_rate)
    rank, world_size = distributed()
    paths = (data if isinstance(data, Dataset) else load_dataset(data)).train
    tiled = None if tile is None else Tiled(tile, overlap, fixed)
    if tiled is None and (overlap is not None or fixed):
        raise ConfigError(expected("tile", "a tile's side, as overlap or fixed is given", tile))
    if tiled is not None and (certify or certify_radius is not None or align == "on"):
        raise ConfigError(expected("tile", "None, as a model of tiles neither certifies nor aligns", tile))
    samples = load_samples(paths) if tiled is None else load_samples(paths, 8)  # large ones
    net = _network(chosen, samples, {"prediction": prediction, "patch": patch, **(unet or {})}, grey=grey)
    if tiled is None:
        image = image_config(samples, net, size=size, align=align, brightness=brightness)
    else:
        image = tiled.image_config(net, brightness)
    if (
        preset_name == "fast"
        and patch is None
        and "patch" not in (unet or {})
        and image.height * image.width <= _FINE_STEM_PIXELS
    ):
        net = dataclasses.replace(net, patch=2)
    diffusion = DiffusionConfig(draws=draws if draws is not None else 1, timestep=min(100, train_settings.timestep_high))
    config = DetectorConfig(net, diffusion, chosen.score, image)
    sigmas: tuple[float, ...] = ()
    frames = None
    if tiled is not None:
        frames = load_tiles(paths, image, train_settings.seed, fixed=tiled.fixed)
        split = frames.tiles
    else:
        sigmas = _sigmas(diffusion, train_settings) if certify is None else certification.check_sigmas(certify, diffusion)
        if certify_radius is not None:
            if not sigmas:
                raise ConfigError(expected("certify_radius", "None, as there is no sigma to certify at", certify_radius))
            for sigma in sigmas:
                certification.check_radius(config, sigma, certify_radius)
        split = load_split(paths, image, train_settings.seed)
    _log.info(
        "%d good images: %d%s to train on, %d to choose settings on, %d to calibrate on; input %d x %d x %d, patch %d%s",
        len(paths), len(split.train), "" if tiled is None else " tiles", len(split.selection), len(split.calibration),
        image.height, image.width, image.channels, net.patch, ", aligned" if image.pose else "",
    )  # fmt: skip

    checkpoint = out.with_name(out.name + ".checkpoint")
    trainer = Trainer(split.train, net, diffusion, train_settings, checkpoint=checkpoint, rank=rank, world_size=world_size)
    weights = trainer.run(progress=progress)
    if world_size > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return None
    model = fit(
        weights,
        split if frames is None else frames.fitted(),
        config,
        false_alarm_rate=false_alarm_rate,
        half=half,
        seed=train_settings.seed,
        timesteps=_timesteps(train_settings),
        certify=sigmas,
        certify_radius=certify_radius,
        provenance={
            "preset": preset_name,
            "settings": str(train_settings.to_json()),
            "images": len(paths),
            "data_sha256": split.data_hash,
            "advrad_fast": __version__,
            "torch": str(torch.__version__),  # a subclass of str, which ModelFile refuses
            "numpy": np.__version__,
            "machine": platform.machine(),
            **({"note": note} if note else {}),
        },
    )
    if tiled is not None and frames is not None:
        model = tiles.finish(model, frames, tiled, false_alarm_rate)
    model.save(out, half=half)
    checkpoint.unlink(missing_ok=True)
    return model


def fit(
    weights: dict[str, Tensor],
    split: Split,
    config: DetectorConfig,
    *,
    false_alarm_rate: float,
    half: bool,
    seed: int,
    timesteps: list[int],
    provenance: Mapping[str, Scalar],
    certify: Sequence[float] = (),
    certify_radius: float | None = None,
    chosen: Callable[[DetectorConfig], DetectorConfig] | None = None,
) -> ModelFile:
    """Choose the settings, compute the normal maps and calibrate: from trained weights to a model.

    Args:
        weights: of a :func:`training_network`.
        half: round the network's weights to fp16.
        timesteps: candidates for k.
        certify, certify_radius: sigmas to certify at, and the radius that their thresholds are for.
        chosen: instead of the selection: a function from the configuration to the one to use.
    """
    trained = training_network(config.unet)
    trained.load_state_dict(weights)

    def network(config: DetectorConfig) -> UNet:
        net = fitting.network_at(trained, split.train, config)
        if half:  # first, so that what is chosen and calibrated is what is stored
            net.load_state_dict({n: torch.from_numpy(a) for n, a in round_to_half(_arrays(net)).items()})
        return net

    if chosen is not None:
        config = chosen(config)
    else:
        config, trials = fitting.select(network, split.train, split.selection, config, timesteps=timesteps, seed=seed)
        best = trials[0]
        weights_ = ", ".join(f"{w:.2f}" for w in best.score.scale_weights)
        _log.info(
            "chose k=%d, s=%d, scales weighted %s: AUROC %.4f on synthetic defects",
            best.timestep, best.score.filter_size, weights_, best.auroc,
        )  # fmt: skip
        provenance = {**provenance, "selection_auroc": round(best.auroc, 5)}

    net = network(config)

    def error_maps(images: NDArray[np.uint8], first_id: int) -> Tensor:
        smooth = fitting.filtered(fitting.scale_errors(net, images, config, first_id=first_id), config.score.filter_size)
        return fitting.error_maps(smooth, config.score.scale_weights)

    maps = fitting.normal_maps(error_maps(split.train, 1), config.score)
    scores = np.sort(fitting.scores(error_maps(split.calibration, 200_000), maps))
    rate = max(false_alarm_rate, calibrate.attainable_rate(len(scores)))
    if rate > false_alarm_rate:
        _log.warning(
            "%d calibration images hold a false-alarm rate of %.3g at best, not %.3g", len(scores), rate, false_alarm_rate
        )
    model = ModelFile(
        config=config,
        weights=_arrays(net),
        mu=maps.mu.numpy(),
        spread=maps.spread.numpy() if config.score.spread else None,
        calibration_scores=scores,
        false_alarm_rate=rate,
        threshold=calibrate.conformal_threshold(scores, rate),
        provenance=dict(provenance),
    )
    model = certification.add(model, split, certify, radius=certify_radius, seed=seed)
    return with_self_test(model, backend="reference")


def _arrays(net: UNet) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def _timesteps(settings: TrainSettings) -> list[int]:
    """The candidates for k that were trained on."""
    low, high = settings.timestep_low, settings.timestep_high
    return [k for k in fitting.TIMESTEPS if low <= k <= high] or [(low + high) // 2]


def _sigmas(config: DiffusionConfig, settings: TrainSettings) -> tuple[float, ...]:
    """The default sigmas whose timesteps were trained on."""
    trained = range(settings.timestep_low, settings.timestep_high + 1)
    reached = [sigma for sigma in certification.SIGMAS if 2.0 * sigma <= schedule.sigma(config)[-1]]
    return tuple(sigma for sigma in reached if schedule.timestep_for_sigma(config, sigma) in trained)


def _network(chosen: Preset, samples: list[np.ndarray], changes: Mapping[str, object], *, grey: bool | None) -> UNetConfig:
    if grey is None:
        grey = all(s.shape[2] == 1 or (np.ptp(s, axis=2) == 0).all() for s in samples)
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(chosen.unet, in_channels=1 if grey else 3, **given)  # type: ignore[arg-type]


__all__ = ["FALSE_ALARM_RATE", "ImageConfig", "fit", "train"]
