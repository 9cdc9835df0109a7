"""Attacks on the frame as the camera delivers it, through the alignment, the resizing and the brightness of a model."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from advrad_fast import images
from advrad_fast.config import ImageConfig
from advrad_fast.errors import PartNotFoundError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


class Preparation:
    """From camera frames to prepared images: exactly those of :func:`advrad_fast.images.prepare`, with a gradient.

    Alignment finds a silhouette, rounds and resamples, so it has no useful gradient of its own.  Backwards the frame is taken to
    be resampled linearly, at the pose and with the gain that were found for this very frame (BPDA, Athalye et al., arXiv
    1802.00420).  Forwards nothing is approximated: the attacker sees what the frame, rounded to uint8, becomes.

    Args:
        frame: uint8 (H, W, C), the frame before the attack.  Where an attacked frame shows no part, its pose is used: what such
            a frame does to the detector is ABSTAIN, which the inspection finds.
        config: the detector's image settings.

    Raises:
        PartNotFoundError: there is no part in ``frame``.
    """

    def __init__(self, frame: NDArray[np.uint8], config: ImageConfig) -> None:
        self.config = config
        self._clean = images.prepare(frame, config)

    def __call__(self, frames: Tensor) -> Tensor:
        """float (N, C, H, W) in [0, 1] -> (N, channels, height, width) in [0, 1], differentiable."""
        return torch.cat([self._one(frame[None]) for frame in frames])

    def _one(self, frame: Tensor) -> Tensor:
        levels = (frame.detach()[0] * 255.0).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        try:
            prepared, found = images.prepare(levels, self.config), True
        except PartNotFoundError:
            prepared, found = self._clean, False
        linear = self._resampled(frame, prepared)
        if not found:
            return linear
        exact = torch.from_numpy(prepared.image).to(frame.device).permute(2, 0, 1)[None].float() / 255.0
        return linear + (exact - linear).detach()

    def _resampled(self, frame: Tensor, prepared: images.Prepared) -> Tensor:
        config = self.config
        size = (config.height, config.width)
        if config.channels == 1 and frame.shape[1] == 3:
            frame = (frame * torch.tensor(_LUMA, device=frame.device)[:, None, None]).sum(dim=1, keepdim=True)
        if prepared.affine is not None:
            frame = _warp(frame, prepared.affine, size)
        elif frame.shape[2:] != size:
            frame = functional.interpolate(frame, size, mode="bicubic", antialias=True)
        if config.brightness is not None:
            frame = frame * _gain(frame, config.brightness)
        frame = frame.clamp(0.0, 1.0)
        return frame.repeat(1, 3, 1, 1) if config.channels == 3 and frame.shape[1] == 1 else frame


def _gain(frame: Tensor, brightness: float) -> float:
    """A constant in the gradient: one pixel moves the median hardly at all."""
    pixels = frame.detach()[0].cpu()
    grey = pixels[0] if len(pixels) == 1 else (pixels * torch.tensor(_LUMA)[:, None, None]).sum(dim=0)
    median = float(grey.median())
    gain = images.MAX_GAIN if median <= 0.0 else brightness / median
    return min(max(gain, 1.0 / images.MAX_GAIN), images.MAX_GAIN)


def _warp(frame: Tensor, affine: NDArray[np.float64], size: tuple[int, int]) -> Tensor:
    """As :func:`advrad_fast.pose.align` resamples: reduced by a whole factor, then bicubic."""
    factor = max(1, math.floor(float(np.hypot(*affine[:, 0]))))
    reduced = functional.avg_pool2d(frame, factor, ceil_mode=True, count_include_pad=False) if factor > 1 else frame
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    at = affine[:, :1, None] * x + affine[:, 1:2, None] * y + affine[:, 2:, None]  # frame pixels
    at = (at + 0.5) / factor - 0.5
    scale = np.array([reduced.shape[3], reduced.shape[2]], np.float64)[:, None, None]
    grid = torch.from_numpy(((2.0 * at + 1.0) / scale - 1.0).transpose(1, 2, 0).astype(np.float32)).to(frame.device)
    return functional.grid_sample(reduced, grid[None], mode="bicubic", padding_mode="border", align_corners=False)
