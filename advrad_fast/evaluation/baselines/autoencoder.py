"""A convolutional autoencoder that scores by its reconstruction error, as it is or adversarially trained.

The score is AdvRAD's own (:mod:`advrad_fast.reference.score`: four scales, mean filter, deviation from the normal map over its
spread, maximum), so that what differs is the reconstruction alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn
from tqdm import tqdm

from advrad_fast.config import ScoreConfig, _Config, _integer, _number
from advrad_fast.errors import AdvRADError, ConfigError, ModelFileError, TrainingError, expected
from advrad_fast.evaluation.baselines.base import Baseline, as_tensor
from advrad_fast.files import write_atomically
from advrad_fast.reference import score
from advrad_fast.training import fitting

_FORMAT = "advrad_fast.autoencoder.1"
_BATCH = 16  # of the passes that measure the normals


@dataclass(frozen=True)
class AutoencoderSettings(_Config):
    """The network, its training and its score.

    Attributes:
        width: channels of the first level; each of the ``levels`` halves the image and doubles the channels, up to 128.
        levels: how often the image is halved.
        latent: channels of the bottleneck.
        steps, batch_size, learning_rate: of AdamW, with a cosine to zero.
        epsilon: l_inf budget, in [0, 1] units, of the perturbations to train against; 0 for plain training.
        attack_steps: PGD steps for each of them.
        filter_size: of the score's mean filter, odd.
        seed: of weights, batches and random starts.
    """

    width: int = 32
    levels: int = 4
    latent: int = 16
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-3
    epsilon: float = 0.0
    attack_steps: int = 3
    filter_size: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer("width", self.width, 8, 128)
        if self.width % 8:
            raise ConfigError(expected("width", "a multiple of 8", self.width))
        _integer("levels", self.levels, 1, 6)
        _integer("latent", self.latent, 1, 1024)
        _integer("steps", self.steps, 1, 1_000_000)
        _integer("batch_size", self.batch_size, 1, 1024)
        _number("learning_rate", self.learning_rate, 1e-8, 1.0)
        _number("epsilon", self.epsilon, 0.0, 1.0)
        _integer("attack_steps", self.attack_steps, 1, 1000)
        _integer("seed", self.seed, 0, 2**63 - 1)
        ScoreConfig(filter_size=self.filter_size)


class _Network(nn.Sequential):
    """Strided convolutions down to the bottleneck, nearest-neighbour upsampling and convolutions back: [-1, 1] -> [-1, 1]."""

    def __init__(self, channels: int, settings: AutoencoderSettings) -> None:
        widths = [min(settings.width << level, 128) for level in range(settings.levels)]
        layers: list[nn.Module] = []
        previous = channels
        for width in widths:
            layers += [nn.Conv2d(previous, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            previous = width
        layers += [nn.Conv2d(previous, settings.latent, 1), nn.Conv2d(settings.latent, previous, 1)]
        for width in [*widths[-2::-1], widths[0]]:
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(previous, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            previous = width
        layers.append(nn.Conv2d(previous, channels, 3, padding=1))
        super().__init__(*layers)


class Autoencoder(Baseline):
    """The baseline; ``fit`` it or ``load`` it before use."""

    def __init__(self, settings: AutoencoderSettings | None = None) -> None:
        self.settings = settings or AutoencoderSettings()
        self.name = "adversarial autoencoder" if self.settings.epsilon else "autoencoder"
        self._network: _Network | None = None
        self._score = ScoreConfig()
        self._mu = self._inverse_spread = torch.empty(0)

    def to(self, device: str | torch.device) -> Self:
        """See :meth:`Baseline.to`; before ``fit``, also where it trains."""
        if self._network is not None:
            self._network.to(device)
        self._mu, self._inverse_spread = self._mu.to(device), self._inverse_spread.to(device)
        return super().to(device)

    def fit(self, images: NDArray[np.uint8], *, progress: bool = False) -> None:
        """Train, then measure the error of these normals.

        Raises:
            ImageError: not uint8 (N, H, W, C).
            TrainingError: sides that are not multiples of 8 and of 2 to the power of ``levels``, or a loss that is not finite.
        """
        s = self.settings
        x = as_tensor(images).to(self.device)
        multiple = max(8, 1 << s.levels)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise TrainingError(expected("images", f"sides that are multiples of {multiple}", tuple(x.shape[2:])))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            network = _Network(x.shape[1], s).to(self.device)
        self._train(network, x, progress)
        network.eval().requires_grad_(False)
        with torch.no_grad():
            errors = torch.cat([score.scale_errors(b, network(b)) for b in torch.split(2.0 * x - 1.0, _BATCH)]).cpu()
        smooth = fitting.filtered(errors, s.filter_size)
        config = ScoreConfig(fitting.equal_weights(smooth) if len(x) > 1 else ScoreConfig().scale_weights, s.filter_size, True)
        normal = fitting.normal_maps(fitting.error_maps(smooth, config.scale_weights), config)
        self._network, self._score = network, config
        self._mu, self._inverse_spread = normal.mu.to(self.device), (1.0 / normal.spread.clamp_min(1e-12)).to(self.device)

    def _train(self, network: _Network, x: Tensor, progress: bool) -> None:
        s = self.settings
        generator = torch.Generator().manual_seed(s.seed)
        optimiser = torch.optim.AdamW(network.parameters(), s.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, s.steps)

        def loss(batch: Tensor) -> Tensor:
            """The reconstruction error of each image: (N,)."""
            values: Tensor = (network(2.0 * batch - 1.0) - (2.0 * batch - 1.0)).square().mean(dim=(1, 2, 3))
            return values

        for step in tqdm(range(s.steps), desc=self.name, unit="step", disable=not progress):
            batch = x[torch.randint(len(x), (s.batch_size,), generator=generator)]
            if s.epsilon:
                batch = worst_images(loss, batch, s.epsilon, s.attack_steps, generator)
            value = loss(batch).mean()
            if not bool(value.isfinite()):
                raise TrainingError(f"{self.name}: the loss became {float(value.detach())} at step {step}")
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        x = 2.0 * images - 1.0
        errors = score.scale_errors(x, self._fitted()(x))
        found: Tensor = score.anomaly_map(score.error_map(errors, self._score), self._mu, self._inverse_spread)
        return torch.stack([found] * noise.shape[1], dim=1)

    def _fitted(self) -> _Network:
        if self._network is None:
            raise TrainingError(f"{self.name}: fit it first")
        return self._network

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {f"network.{name}": tensor.contiguous() for name, tensor in self._fitted().state_dict().items()}
        tensors |= {"mu": self._mu.contiguous(), "inverse_spread": self._inverse_spread.contiguous()}
        header = {"format": _FORMAT, "settings": self.settings.to_json(), "score": self._score.to_json()}
        write_atomically(path, serialise(tensors, {"autoencoder": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> Autoencoder:
        """Read what :meth:`save` wrote.

        Raises:
            ModelFileError: not such a file, or one whose tensors are not those of its settings.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["autoencoder"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["format"] != _FORMAT:
                raise ModelFileError(expected(f"{path}: format", _FORMAT, header["format"]))
            found = cls(AutoencoderSettings.from_json(header["settings"]))
            found._score = ScoreConfig.from_json(header["score"])
            found._mu, found._inverse_spread = tensors.pop("mu"), tensors.pop("inverse_spread")
            channels = tensors["network.0.weight"].shape[1]
            network = _Network(channels, found.settings)
            network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in tensors.items()})
        except ModelFileError:
            raise
        except (SafetensorError, AdvRADError, KeyError, IndexError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise ModelFileError(f"{path}: not an autoencoder's file: {error}") from error
        if found._mu.ndim != 2 or found._mu.shape != found._inverse_spread.shape:
            raise ModelFileError(expected(f"{path}: mu and inverse_spread", "two maps (H, W)", tuple(found._mu.shape)))
        if not all(bool(tensor.isfinite().all()) for tensor in (*network.parameters(), found._mu, found._inverse_spread)):
            raise ModelFileError(f"{path}: expected finite numbers, got NaN or infinity")
        found._network = network.eval().requires_grad_(False)
        return found


class MeanSquaredError(Baseline):
    """An autoencoder by the plainest of scores, as much of the literature has it: the mean squared error of the whole image.

    The network is that of ``autoencoder``, so that what differs from it is the score alone.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.name = f"{autoencoder.name}, mean squared error"

    def to(self, device: str | torch.device) -> Self:
        """See :meth:`Baseline.to`; the autoencoder goes along."""
        self.autoencoder.to(device)
        return super().to(device)

    def fit(self, images: NDArray[np.uint8]) -> None:
        """Fit the autoencoder."""
        self.autoencoder.fit(images)

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        x = 2.0 * images - 1.0
        error: Tensor = (self.autoencoder._fitted()(x) - x).square().mean(dim=(1, 2, 3))
        return error[:, None, None, None].expand(-1, noise.shape[1], 1, 1)


def worst_images(loss: Callable[[Tensor], Tensor], x: Tensor, epsilon: float, steps: int, generator: torch.Generator) -> Tensor:
    """PGD (Madry et al., arXiv 1706.06083): images within ``epsilon`` (l_inf) of x and in [0, 1], of a large loss (N,)."""
    start = x + epsilon * (2.0 * torch.rand(x.shape, generator=generator).to(x.device) - 1.0)
    images = start.clamp(0.0, 1.0)
    for _ in range(steps):
        images = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(images).sum(), images)
        images = images.detach() + 2.5 * epsilon / steps * gradient.sign()
        images = torch.minimum(torch.maximum(images, x - epsilon), x + epsilon).clamp(0.0, 1.0)
    return images.detach()
