"""Stands in for the parts of anomalib 2.7 that are used: the same calls and shapes, with tiny networks."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encode, self.decode, self.again = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fake = self.decode(self.encode(x)).tanh()
        return fake, self.encode(x).mean(dim=(2, 3)), self.again(fake).mean(dim=(2, 3))


class Discriminator(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, 1, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layer(x)
        return features.mean(dim=(1, 2, 3)).sigmoid(), features


class GanomalyModel(nn.Module):
    def __init__(self, input_size: tuple[int, int], num_input_channels: int, n_features: int, latent_vec_size: int) -> None:
        super().__init__()
        self.side = input_size[0]
        self.generator, self.discriminator = Generator(num_input_channels), Discriminator(num_input_channels)

    def forward(self, x: Tensor) -> object:
        x = F.pad(x, (0, self.side - x.shape[3], 0, self.side - x.shape[2]))
        fake, latent, again = self.generator(x)
        if self.training:
            return x, fake, latent, again
        return SimpleNamespace(pred_score=(latent - again).square().mean(dim=1))


class GeneratorLoss(nn.Module):
    def forward(self, latent: Tensor, again: Tensor, images: Tensor, fake: Tensor, real: Tensor, says: Tensor) -> Tensor:
        return F.mse_loss(real, says) + F.l1_loss(images, fake) + F.mse_loss(latent, again)


class DiscriminatorLoss(nn.Module):
    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.binary_cross_entropy(real, torch.ones_like(real)) + F.binary_cross_entropy(fake, torch.zeros_like(fake))


class ReconstructiveSubNetwork(nn.Conv2d):
    def __init__(self, base_width: int) -> None:
        super().__init__(3, 3, 3, padding=1)


class DiscriminativeSubNetwork(nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int, base_width: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)


class DraemLoss(nn.Module):
    def forward(self, image: Tensor, repaired: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
        return F.mse_loss(repaired, image) + F.cross_entropy(logits, mask[:, 0].long())


class PerlinAnomalyGenerator:
    def __init__(self, blend_factor: tuple[float, float]) -> None:
        self.blend_factor = blend_factor

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mask = (F.interpolate(torch.rand(len(images), 1, 4, 4), size=images.shape[2:]) > 0.7).float()
        return images * (1.0 - mask) + torch.rand(len(images), 1, 1, 1) * mask, mask


_MODULES = {
    "models.image.ganomaly.torch_model": (GanomalyModel,),
    "models.image.ganomaly.loss": (GeneratorLoss, DiscriminatorLoss),
    "models.image.draem.torch_model": (ReconstructiveSubNetwork, DiscriminativeSubNetwork),
    "models.image.draem.loss": (DraemLoss,),
    "data.utils.generators.perlin": (PerlinAnomalyGenerator,),
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, anomalib is this."""
    for name, classes in _MODULES.items():
        module = ModuleType(f"anomalib.{name}")
        for each in classes:
            setattr(module, each.__name__, each)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, there is no anomalib."""
    for name in _MODULES:
        monkeypatch.setitem(sys.modules, f"anomalib.{name}", None)
