"""GANomaly (Akcay et al., arXiv 1805.06725) and DRAEM (Zavrtanik et al., arXiv 2108.07610), from the extra ``baselines``.

From anomalib come the networks, their losses, and DRAEM's Perlin anomalies, with noise in place of the textures that it would
download.  The loops below take the steps of its ``training_step`` without its engine, which works on folders of images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from advrad_fast.config import _Config, _integer, _number
from advrad_fast.errors import ConfigError, TrainingError, expected
from advrad_fast.evaluation.baselines.base import Baseline, as_tensor, optional


@dataclass(frozen=True)
class AnomalibSettings(_Config):
    """Size and training.

    Attributes:
        width: channels of the first level, a multiple of 2.  anomalib has 64 in GANomaly; in DRAEM 128, and half of it in the
            second network.
        steps, batch_size, learning_rate: of Adam.
        seed: of weights, batches and synthetic anomalies.
    """

    width: int = 16
    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 2e-4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer("width", self.width, 2, 128)
        if self.width % 2:
            raise ConfigError(expected("width", "a multiple of 2", self.width))
        _integer("steps", self.steps, 1, 1_000_000)
        _integer("batch_size", self.batch_size, 2, 1024)
        _number("learning_rate", self.learning_rate, 1e-8, 1.0)
        _integer("seed", self.seed, 0, 2**63 - 1)


class _Trained(Baseline):
    """What the two have in common; ``fit`` before use."""

    def __init__(self, settings: AnomalibSettings | None = None) -> None:
        self.settings = settings or AnomalibSettings()
        self._network: nn.Module | None = None

    def to(self, device: str | torch.device) -> Self:
        """See :meth:`Baseline.to`; before ``fit``, also where it trains."""
        if self._network is not None:
            self._network.to(device)
        return super().to(device)

    def fit(self, images: NDArray[np.uint8], *, progress: bool = False) -> None:
        """Train.

        Raises:
            ImageError: not uint8 (N, H, W, C).
            TrainingError: anomalib is not installed, or sides that the network cannot take, or a loss that is not finite.
        """
        x = as_tensor(images).to(self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed)
            self._network = self._trained(x, progress).eval().requires_grad_(False)

    @abstractmethod
    def _trained(self, x: Tensor, progress: bool) -> nn.Module: ...

    def _batches(self, x: Tensor, progress: bool) -> Iterator[Tensor]:
        for _ in tqdm(range(self.settings.steps), desc=self.name, unit="step", disable=not progress):
            yield x[torch.randint(len(x), (self.settings.batch_size,))]

    def _descend(self, optimiser: torch.optim.Optimizer, loss: Tensor, *, retain_graph: bool = False) -> None:
        if not bool(loss.isfinite()):
            raise TrainingError(f"{self.name}: the loss became {float(loss.detach())}")
        optimiser.zero_grad()
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        optimiser.step()

    def _fitted(self) -> Any:
        if self._network is None:
            raise TrainingError(f"{self.name}: fit it first")
        return self._network


class Ganomaly(_Trained):
    """An encoder after an autoencoder; the score is the mean squared difference of what the two encoders say of an image.

    It has no map.  Images are padded to the square of the next power of 2, as anomalib does.
    """

    name = "GANomaly"

    def _trained(self, x: Tensor, progress: bool) -> nn.Module:
        with optional():
            from anomalib.models.image.ganomaly.loss import DiscriminatorLoss, GeneratorLoss
            from anomalib.models.image.ganomaly.torch_model import GanomalyModel
        s = self.settings
        side = 1 << (max(x.shape[2:]) - 1).bit_length()
        if side < 16:
            raise TrainingError(expected("images", "a side of more than 8", tuple(x.shape[2:])))
        model: Any = GanomalyModel((side, side), x.shape[1], s.width, latent_vec_size=100).to(self.device).train()
        of_generator, of_discriminator = GeneratorLoss(), DiscriminatorLoss()
        generator, discriminator = (
            torch.optim.Adam(part.parameters(), s.learning_rate, betas=(0.5, 0.999))
            for part in (model.generator, model.discriminator)
        )
        for batch in self._batches(2.0 * x - 1.0, progress):
            real, fake, latent, again = model(batch)
            says_real, _ = model.discriminator(real)
            says_fake, _ = model.discriminator(fake)
            self._descend(generator, of_generator(latent, again, real, fake, says_real, says_fake), retain_graph=True)
            says_fake, _ = model.discriminator(fake.detach())
            self._descend(discriminator, of_discriminator(says_real, says_fake))
        found: nn.Module = model
        return found

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        score: Tensor = self._fitted()(2.0 * images - 1.0).pred_score
        return score[:, None, None, None].expand(-1, noise.shape[1], 1, 1)


class Draem(_Trained):
    """A network that repairs the image and one that finds, from both, what was repaired; trained on synthetic anomalies.

    The map is -log P(pixel is normal), where anomalib's is P(pixel is anomalous): the same order, so the same AUROC, and a
    gradient where that probability is 0 or 1 to the last bit, which would hide it from an attack.
    """

    name = "DRAEM"

    def _trained(self, x: Tensor, progress: bool) -> nn.Module:
        with optional():
            from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
            from anomalib.models.image.draem.loss import DraemLoss
            from anomalib.models.image.draem.torch_model import DiscriminativeSubNetwork, ReconstructiveSubNetwork
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise TrainingError(expected("images", "sides that are multiples of 32", tuple(x.shape[2:])))
        s = self.settings
        repair = ReconstructiveSubNetwork(base_width=s.width)
        find = DiscriminativeSubNetwork(in_channels=6, out_channels=2, base_width=s.width // 2)
        networks = nn.ModuleList([repair, find]).to(self.device).train()
        loss, spoil = DraemLoss(), PerlinAnomalyGenerator(blend_factor=(0.1, 1.0))
        optimiser = torch.optim.Adam(networks.parameters(), s.learning_rate)
        for batch in self._batches(x, progress):
            image = _colour(batch)
            spoiled, mask = spoil(image)
            repaired = repair(spoiled)
            self._descend(optimiser, loss(image, repaired, mask, find(torch.cat([spoiled, repaired], dim=1))))
        return networks

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        repair, find = self._fitted()
        image = _colour(images)
        logits = find(torch.cat([image, repair(image)], dim=1))
        return F.softplus(logits[:, 1:] - logits[:, :1]).expand(-1, noise.shape[1], -1, -1)


def _colour(images: Tensor) -> Tensor:
    """(N, 1 or 3, H, W) -> (N, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)
