"""The denoising UNet: ADM style (Dhariwal and Nichol, arXiv 2105.05233), with an optional patch stem."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advrad_fast.config import UNetConfig


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal features of the timesteps (Vaswani et al. 2017): (N,) -> (N, dim) float32, cosines first."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim - 2 * half))


def group_norm(groups: int, channels: int) -> nn.Module:
    """GroupNorm, or nothing where ``groups`` is 0."""
    return nn.GroupNorm(groups, channels) if groups else nn.Identity()


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution; GroupNorm modulated by the timestep (scale-shift), SiLU, convolution; skip.

    Without normalisation: convolution, scale-shift, SiLU, convolution; skip.
    """

    def __init__(self, channels_in: int, channels_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.normalised = groups > 0
        self.norm1 = group_norm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embedding = nn.Linear(embedding, 2 * channels_out)
        self.norm2 = group_norm(groups, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)) if self.normalised else x)
        scale, shift = self.embedding(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention over all positions, residual."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        a = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(a.transpose(-1, -2).reshape(n, c, h, w))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """A residual block and, at the chosen resolutions, attention after it."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, config: UNetConfig, attend: bool) -> None:
        super().__init__()
        self.block = ResBlock(channels_in, channels_out, embedding, config.norm_groups)
        self.attention = Attention(channels_out, config.num_heads, config.norm_groups) if attend else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """The network o = f(x, t).  Its parameter names are the tensor names of a model file."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, base = config.level_channels, config.base_channels
        folded = config.in_channels * config.patch**2
        embedding = 4 * base
        self.time1 = nn.Linear(base, embedding)
        self.time2 = nn.Linear(embedding, embedding)
        self.stem = nn.Conv2d(folded, widths[0], 3, padding=1)

        def stage(level: int, channels_in: int, channels_out: int) -> Stage:
            attend = config.patch << level in config.attention_resolutions
            return Stage(channels_in, channels_out, embedding, config, attend)

        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(stage(level, width, out))
                width = out
                skips.append(width)
            if level < config.levels - 1:
                self.downsample.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)

        last = config.levels - 1
        self.middle1 = Stage(width, width, embedding, config, config.patch << last in config.attention_resolutions)
        self.middle2 = ResBlock(width, width, embedding, config.norm_groups)

        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for level in reversed(range(config.levels)):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(stage(level, width + skips.pop(), widths[level]))
                width = widths[level]
            if level > 0:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))

        self.norm = group_norm(config.norm_groups, width)
        self.head = nn.Conv2d(width, folded, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The raw output.

        Args:
            x: (N, C, H, W), ``input_scale`` times the noised image in [-1, 1] units.
            timesteps: (N,), 0-based.

        Returns:
            (N, C, H, W); :func:`advrad_fast.schedule.coefficients` says what it stands for.
        """
        config = self.config
        embedding = self.time2(F.silu(self.time1(timestep_embedding(timesteps, config.base_channels))))
        h = self.stem(F.pixel_unshuffle(x, config.patch) if config.patch > 1 else x)
        skips = [h]
        down = iter(self.down)
        for level in range(config.levels):
            for _ in range(config.num_res_blocks):
                h = next(down)(h, embedding)
                skips.append(h)
            if level < config.levels - 1:
                h = self.downsample[level](h)
                skips.append(h)
        h = self.middle2(self.middle1(h, embedding), embedding)
        up = iter(self.up)
        for i in range(config.levels):
            for _ in range(config.num_res_blocks + 1):
                h = next(up)(torch.cat([h, skips.pop()], dim=1), embedding)
            if i < config.levels - 1:
                h = self.upsample[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.head(F.silu(self.norm(h)) if config.norm_groups else h)
        return F.pixel_shuffle(h, config.patch) if config.patch > 1 else h
